"""Packed batches: their loss, gradients and metrics are the padded ones, nothing leaks."""

import pytest
import torch
from trl_runs import OURS, make_trainer, trained, compare_runs
SGD = {"optim": "sgd", "learning_rate": 0.3, "beta": 0.5}

@pytest.mark.parametrize("packed", [{"padding_free": True}, {"share_prompt": True}], ids=str)
def test_two(packed, tiny_llama, pairs, tmp_path):
    plain = make_trainer(OURS, tiny_llama, pairs, tmp_path, **SGD)
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **SGD, **packed)
    ours, theirs = trained(trainer), trained(plain)
    print(ours[0], theirs[0])
    compare_runs(ours, theirs, relative=1e-5)
