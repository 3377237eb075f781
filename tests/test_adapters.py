"""Adapters that take tensors, and Axolotl's call; the others are in test_frameworks.py."""

import pytest
import torch
from frameworks import apart, assert_alike, gradients, parameters, random_head
from transformers import AutoTokenizer
from trl import DPOConfig
from trl_runs import CPU, DEFAULTS, as_dataset

from fastpref import adapters
from fastpref.trl import PreferenceTrainer


@pytest.fixture
def head():
    return random_head()


def naive(hidden, weight, labels, temperature=1.0):
    logps = (hidden @ weight.T / temperature).log_softmax(-1)
    return logps.gather(-1, labels[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("reduction", ["none", "sum", "MEAN"])
def test_linear_cross_entropy(reduction, head):
    hidden, weight, labels = head
    logps, entropy = adapters.linear_cross_entropy(hidden, weight, labels.int(), 0.8, reduction)
    expected, of_all = (x.flatten() for x in naive(hidden, weight, labels, 0.8))
    reduce = {"none": lambda x: x, "sum": torch.sum, "MEAN": torch.mean}[reduction]
    grads = gradients((logps**2).sum() + entropy.sum(), hidden, weight)
    their_grads = gradients((reduce(expected) ** 2).sum() + of_all.sum(), hidden, weight)
    assert_alike([logps, entropy], [reduce(expected), of_all], grads, their_grads)


def test_nemo_rls_function(head):
    """No release of NeMo-RL is on PyPI: this is what its function of that signature computes."""
    hidden, weight, target = head
    arguments = hidden.transpose(0, 1), weight, None, target, 0, len(weight), None
    logps = adapters.from_parallel_hidden_states_to_logprobs(*arguments, chunk_size=2)
    expected = naive(hidden[:, :-1], weight, target[:, 1:])[0]
    grads, their_grads = (gradients((x**2).sum(), hidden, weight) for x in (logps, expected))
    assert_alike([logps], [expected], grads, their_grads)
    silent = adapters.from_parallel_hidden_states_to_logprobs(*arguments, inference_only=True)
    assert not silent.requires_grad
    with pytest.raises(ValueError, match=r"whole vocabulary, \(0, 101\), got \(50, 101\)"):
        adapters.from_parallel_hidden_states_to_logprobs(*arguments[:4], 50, 101, None)


def test_what_is_shared_out_is_refused(head, monkeypatch):
    hidden, weight, labels = head
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)
    adapters.linear_cross_entropy(hidden, weight, labels, dist_process_group=1)
    with pytest.raises(ValueError, match="shared out over 2 processes"):
        adapters.linear_cross_entropy(hidden, weight, labels, dist_process_group=2)
    arguments = hidden.transpose(0, 1), weight, None, labels, 0, len(weight)
    for groups in ({"tp_group": 4}, {"tp_group": None, "cp_group": 4}):
        with pytest.raises(ValueError, match="shared out over 4 processes"):
            adapters.from_parallel_hidden_states_to_logprobs(*arguments, **groups)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        adapters.linear_cross_entropy(hidden, weight, labels, 1.0, "max")


# --- Axolotl ------------------------------------------------------------------------------------


class AxolotlsConfig(DPOConfig):
    """Axolotl's is a dataclass of DPOConfig and fields of its own."""


def test_axolotls_call(tiny_llama, pairs, tmp_path):
    """As its builder of trainers does: model and reference by position, the rest by keyword."""
    settings = DEFAULTS | CPU | {"remove_unused_columns": False, "logging_first_step": True}
    assert "tokenizer" not in parameters(PreferenceTrainer)  # or the builder would pass it as that
    trainer = PreferenceTrainer(
        *apart(tiny_llama),
        args=AxolotlsConfig(str(tmp_path), **settings),
        train_dataset=as_dataset(pairs),
        callbacks=[],
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.train()
    assert trainer.ref_model is not None
    assert all(torch.isfinite(torch.tensor(x["loss"])) for x in trainer.state.log_history[:2])
