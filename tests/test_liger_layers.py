"""A model whose layers Liger has patched trains as the unpatched one.

Interpreted as in `test_triton_interpreter.py`, in a process of their own: Liger's rotations, SwiGLU
and causal language model's forward. Its RMSNorm and GeGLU the interpreter cannot run.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers.models.llama import modeling_llama

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import families  # noqa: E402

pytest.importorskip("triton")
liger = pytest.importorskip("liger_kernel.transformers")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


@pytest.fixture
def scalars(monkeypatch):
    """Numbers that a kernel is given have a dtype, as on a GPU; the interpreter passes floats."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_dtype(argument):
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_dtype)


def step_of_one_pair(*given, **options):
    """A step of few tokens: the interpreter runs them one by one."""
    trainer = families.make_trainer(families.OURS, *given, **options)
    trainer.train_dataset = trainer.train_dataset.select([1])
    return families.step(trainer)


@interpreted
def test_a_patched_llama_trains_as_the_unpatched(scalars, monkeypatch):
    policy, reference = families.random_policy(families.FAMILIES["Llama 2, 3"])
    expected = step_of_one_pair(policy, reference)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    for model in (policy, reference):
        liger.apply_liger_kernel_to_llama(model=model, rms_norm=False)
    layer = policy.model.layers[0]
    for patched in (modeling_llama.apply_rotary_pos_emb, policy.forward, layer.mlp.forward):
        assert patched.__module__.startswith("liger_kernel.")
    for column in ("padded", "share_prompt"):
        found = step_of_one_pair(policy, reference, **families.COLUMNS[column])
        assert families.difference(found, expected) <= families.ALLOWED
