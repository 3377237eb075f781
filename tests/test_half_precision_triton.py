"""The Triton backend's half-precision steps, interpreted, with the library's products simulated.

As in test_half_precision.py, whose simulation and whose promise these are; in a process of its own.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
from fastpref_kernels import configs
from test_half_precision import (
    PROMISED,
    SCHEDULES,
    TensorCores,
    how_of,
    inputs,
    relative,
    step,
    truth_of,
)

from fastpref.backends import gradients, products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of −inf − −inf


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


@pytest.fixture
def hidden_by(monkeypatch):
    """Who multiplied for gradients of hidden states, call after call, under simulated products."""
    monkeypatch.setattr(products, "multiplies_half", lambda _: True)
    seen = []
    for owner, name, who in (
        (kernels, "hidden_gradient_", "kernel"),
        (gradients, "put_hidden_gradient", "library"),
    ):
        wrapped = getattr(owner, name)
        spy = lambda *args, who=who, wrapped=wrapped: (seen.append(who), wrapped(*args))  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    return seen


def on_triton(batch, schedule, **how):
    """Two groups of pair groups, unless told else."""
    how = {"logits_budget": 24 * 2 * len(batch[1])} | how_of(schedule) | how
    with TensorCores(cuts=False):
        return step(*batch, backend="triton", **how)


def check(found, truth):
    for value, expected in zip(found[1:], truth[1:], strict=True):
        assert value is None or relative(value, expected) <= PROMISED
    assert (found[0] - truth[0]).abs().max() <= 1e-3


GROUPS = {"pair_groups": 2, "one group": 1}


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_keep_the_promise(schedule, dtype, hidden_by, poison):
    batch = inputs(96, vocabulary=131, length=11, dtype=dtype)
    check(on_triton(batch, schedule), truth_of(*batch))
    assert hidden_by == ["kernel"] * GROUPS.get(schedule, 0)


@interpreted
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bias_and_softcap(schedule, hidden_by, poison):
    batch = inputs(64, vocabulary=131, length=11)
    batch = *batch[:2], batch[2].masked_fill(batch[2] == 7, 8), batch[3]
    values = torch.linspace(-1, 1, 131)
    values[7] = -torch.inf
    wants = schedule != "frozen_head"
    biases = [values.to(dtype, copy=True).requires_grad_(wants) for dtype in (None, torch.float64)]
    head = {"softcap": 3.0, "temperature": 0.8}
    found = on_triton(batch, schedule, bias=biases[0], **head)
    check(found, truth_of(*batch, bias=biases[1], **head))
    assert not wants or relative(biases[0].grad, biases[1].grad) <= PROMISED


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_parameters_in_autocast(dtype, hidden_by):
    """Operands are rounded, gradients are not; kept rows are float32."""
    batch = inputs(64, vocabulary=131, length=11, dtype=dtype)
    truth = truth_of(*batch)
    wide = batch[0].float(), batch[1].float(), *batch[2:]
    with torch.autocast("cpu", dtype):
        found = on_triton(wide, "pair_groups")
    check(found, truth)
    assert hidden_by == ["kernel"] * 2
    assert all(value is None or value.dtype == torch.float32 for value in found[1:])


@interpreted
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_no_range_of_the_operands_is_too_wide(size, hidden_by):
    hidden, weight, targets, ref_logps = inputs(64, vocabulary=131, length=11)
    batch, how = (hidden, weight * size, targets, ref_logps), {"logit_scale": 1 / size}
    check(on_triton(batch, "pair_groups", **how), truth_of(*batch, **how))


@interpreted
def test_the_library_keeps_it_too(hidden_by):
    batch = inputs(64, vocabulary=131, length=11)
    with configs.trial({("choices", "hidden_gradient"): "library"}):
        check(on_triton(batch, "pair_groups"), truth_of(*batch))
    assert hidden_by == ["library"] * 2


@interpreted
def test_a_head_that_is_not_fitted_would_break_it(hidden_by, monkeypatch):
    """The checks above can fail: float16 loses what is below its range."""
    monkeypatch.setattr(gradients, "fits", lambda _: False)
    hidden, weight, targets, ref_logps = inputs(64, vocabulary=131, length=11)
    batch, how = (hidden, weight * 1e-6, targets, ref_logps), {"logit_scale": 1e6}
    with pytest.raises(ValueError, match="give the bound"):
        on_triton(batch, "pair_groups", **how)
