"""What the tests of adapters share, and real classes without what else their packages import."""

import contextlib
import copy
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from transformers import AutoModelForCausalLM

# What these import and the tests do not need; but what they do without where it is missing.
BUT = "flash_attn.ops"
MOCKS = """
    addict attrdict av binpacking blobfile codetiming dacite deepspeed einops fastapi fire
    flash_attn gradio hydra jieba json_repair kagglehub librosa modelscope nltk omegaconf openai
    optree oss2 PIL pylatexenc qwen_vl_utils ray ring_flash_attn rouge sentencepiece
    sortedcontainers sse_starlette tensorboard tensordict tiktoken torchao torchaudio torchdata
    torchvision trl.experimental.bco tyro uvicorn vllm zstandard
"""


class _Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, after all others, whatever lies under the given names."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.startswith(BUT):
            return None
        if any(name == each or name.startswith(f"{each}.") for each in self.names):
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __name__=spec.name, __version__="999")

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def mocked():
    """Imports of MOCKS, and of what lies in them, give mocks where nothing of the name is there."""
    before = set(sys.modules)
    finder = _Mocks(MOCKS.split())
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], MagicMock):
                del sys.modules[name]


def real(module, name):
    """Of a framework in FASTPREF_FRAMEWORKS, by module or by the path of a script in there."""
    directory = os.environ.get("FASTPREF_FRAMEWORKS")
    if not directory:
        pytest.skip("FASTPREF_FRAMEWORKS names no directory of frameworks; see `make frameworks`")
    if directory not in sys.path:
        sys.path.append(directory)
    with mocked():
        if not module.endswith(".py"):
            return getattr(importlib.import_module(module), name)
        spec = importlib.util.spec_from_file_location(Path(module).stem, Path(directory, module))
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return getattr(script, name)


def apart(directory):
    """A policy and its reference in float32, a little apart."""
    policy = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference = copy.deepcopy(policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy, reference


def random_head():
    """Hidden states `(3, 7, H)`, a head, and tokens, all of them scored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator, requires_grad=True)
    weight = torch.randn(101, 16, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, 101, (3, 7), generator=generator)


def gradients(loss, *leaves):
    return {str(index): grad for index, grad in enumerate(torch.autograd.grad(loss, leaves))}


def assert_alike(ours, theirs, grads, their_grads):
    """Sums of ten log-probabilities of 4 nats, in units of 2⁻²⁴ · 40 = 2e-6; gradients went through
    two layers of sums of 64 products, some hundred roundings of their largest entry.
    """
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        assert grad.any(), name
        assert (grads[name] - grad).abs().max() <= 5e-5 * grad.abs().max(), name


def parameters(function):
    return [*inspect.signature(function).parameters]
