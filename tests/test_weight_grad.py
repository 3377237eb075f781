"""The head's gradient added to a buffer of the caller's: autograd's own numbers in fewer bytes."""

import pytest
import torch
from test_accelerator import LARGE, PeakBytes, batch
from test_half_precision import TensorCores, relative

from fastpref import DPO, SimPO, loss, preference_loss
from fastpref.backends import products, torch_backend
from fastpref.planner import MIB

VOCABULARY, HIDDEN, LENGTH, STEPS = 61, 8, 7, 3
SCHEDULES = {
    "groups": {"schedule": "pair_groups", "logits_budget": 15 * 8 * VOCABULARY},
    "one group": {"schedule": "pair_groups"},
    "recompute": {"schedule": "recompute"},
}


def micro_batches(dtype, hidden_size=HIDDEN, vocabulary=VOCABULARY):
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn((vocabulary, hidden_size), generator=draw) * 6 / hidden_size**0.5
    hidden = torch.randn((STEPS, 6, LENGTH, hidden_size), generator=draw)
    targets = torch.randint(0, vocabulary, (STEPS, 6, LENGTH), generator=draw)
    targets[:, 1, :3] = -100
    return hidden.to(dtype), weight.to(dtype).requires_grad_(), targets


def accumulate(hidden, weight, targets, into=None, scale=1 / STEPS, **how):
    """Gradients of all micro-batches, the bias's too; into the weight's own, or the buffer."""
    bias = torch.zeros(len(weight), dtype=weight.dtype).requires_grad_()
    weight, of_hidden = weight.detach().clone().requires_grad_(), []
    if into is not None:
        how |= {"weight_grad": into, "weight_grad_scale": scale}
    for h, t in zip(hidden, targets, strict=True):
        h = h.clone().requires_grad_()
        out = preference_loss(h, weight, t, SimPO(), bias=bias, **how)
        (out.loss * scale).backward()
        of_hidden.append(h.grad)
    if into is not None:
        assert weight.grad is None
    return torch.stack(of_hidden), weight.grad if into is None else into, bias.grad


@pytest.mark.parametrize("scale", [1 / STEPS, 1.0, -64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_equals_autograds_accumulation(schedule, dtype, scale):
    given, how = micro_batches(dtype), SCHEDULES[schedule]
    expected = accumulate(*given, scale=scale, **how)
    found = accumulate(*given, torch.ones_like(given[1], requires_grad=False), scale, **how)
    found[1].sub_(1)
    eps = 64 * torch.finfo(dtype).eps  # of sums of some ten numbers, in another order
    for value, truth in zip(found, expected, strict=True):
        assert value.dtype == truth.dtype
        assert (value - truth).abs().max() <= eps * (1 + truth.abs().max())


@pytest.mark.parametrize("buffer", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("half_products", [False, True])
def test_half_precision_is_rounded_once_a_step(half_products, schedule, buffer, monkeypatch):
    """Of a step into an empty buffer the error is that of one rounding; groups add none."""
    how = SCHEDULES[schedule] | {"backend": "torch"}
    if "logits_budget" in how:
        how["logits_budget"] = 15 * (2 if half_products else 4) * 509
    hidden, weight, targets = (x[:1] for x in micro_batches(torch.bfloat16, 64, 509))
    weight = micro_batches(torch.bfloat16, 64, 509)[1]
    _, truth, _ = accumulate(hidden.double(), weight.double(), targets)
    into = torch.zeros_like(weight, dtype=buffer, requires_grad=False)
    monkeypatch.setattr(products, "multiplies_half", lambda _: half_products)
    with TensorCores(cuts=False):
        _, found, _ = accumulate(hidden, weight, targets, into, **how)
        _, apart, _ = accumulate(hidden, weight, targets, **how)
    assert relative(apart, truth) <= 2e-3
    # Beside bfloat16's rounding there are only those of float16 operands, or of float32's.
    allowed = 1.02 * relative(apart, truth) if buffer == torch.bfloat16 else 5e-4
    assert relative(found, truth) <= allowed


def test_rounding_every_group_would_be_worse(monkeypatch):
    """The check above can fail: without the remainder it does."""
    hidden, weight, targets = micro_batches(torch.bfloat16, 64, 509)
    monkeypatch.setattr(
        "fastpref.schedules.pair_groups.new_total",
        lambda slot, head, *, groups, into: torch_backend.gradients.new_total(
            slot, head, groups=1, into=into
        ),
    )
    _, truth, _ = accumulate(hidden[:1].double(), weight.double(), targets[:1])
    into = torch.zeros_like(weight, requires_grad=False)
    how = {"schedule": "pair_groups", "logits_budget": 15 * 4 * 509, "backend": "torch"}
    _, found, _ = accumulate(hidden[:1], weight, targets[:1], into, **how)
    assert relative(found, truth) > 1.02 * relative(truth.bfloat16(), truth)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_upstream_gradient_is_an_error(schedule):
    hidden, weight, targets = micro_batches(torch.float64)
    how = SCHEDULES[schedule] | {"weight_grad": torch.zeros_like(weight, requires_grad=False)}
    step = hidden[0].requires_grad_(), weight, targets[0], SimPO()
    for upstream in (0.5, float("nan")):
        out = preference_loss(*step, weight_grad_scale=1 / 3, **how)
        with pytest.raises(ValueError, match=r"weight_grad_scale = 0\.333"):
            (out.loss * upstream).backward()
    preference_loss(*step, weight_grad_scale=1 / 3, **how).loss.div(3).backward()


def test_nothing_is_added_without_gradients():
    hidden, weight, targets = micro_batches(torch.float64)
    into = torch.zeros_like(weight, requires_grad=False)
    with torch.no_grad():
        preference_loss(hidden[0], weight, targets[0], SimPO(), weight_grad=into)
    assert not into.any()


def test_hidden_states_need_no_gradient():
    hidden, weight, targets = micro_batches(torch.float64)
    into = torch.zeros_like(weight, requires_grad=False)
    for given in ({}, {"weight_grad": into}):
        preference_loss(hidden[0], weight, targets[0], SimPO(), **given).loss.backward()
    torch.testing.assert_close(into, weight.grad, rtol=1e-12, atol=1e-14)


def test_what_is_no_buffer_says_so():
    hidden, weight, targets = micro_batches(torch.float64)
    into = torch.zeros_like(weight, requires_grad=False)

    def step(weight=weight, **how):
        preference_loss(hidden[0], weight, targets[0], SimPO(), **how)

    for wrong in (into[:-1], into.half(), into.T.contiguous().T, into.to("meta")):
        with pytest.raises(ValueError, match="weight_grad must be dense torch.float64"):
            step(weight_grad=wrong)
    with pytest.raises(TypeError, match="weight_grad must be a tensor"):
        step(weight_grad=3)
    with pytest.raises(ValueError, match="must not require a gradient"):
        step(weight_grad=weight)
    with pytest.raises(ValueError, match="weight does not require a gradient"):
        step(weight.detach(), weight_grad=into)
    with pytest.raises(ValueError, match="reduction='none'"):
        step(weight_grad=into, reduction="none")
    with pytest.raises(ValueError, match="leaves gradients to autograd"):
        step(weight_grad=into, backend="reference")
    with pytest.raises(ValueError, match="needs weight_grad"):
        step(weight_grad_scale=0.5)
    with pytest.raises(ValueError, match="weight_grad_scale must be finite"):
        step(weight_grad=into, weight_grad_scale=float("nan"))
    assert not into.any()


@pytest.mark.parametrize("buffer", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("schedule", "saved"),
    [("groups", 0.9), ("one group", 0.65), ("recompute", 0.9)],  # of one the forward peaks then
)
def test_peak_of_an_8b_models_head(schedule, saved, buffer, monkeypatch):
    """Without a tensor of the head's size, but for a byte an element of several groups in bf16."""
    pytest.importorskip("triton")
    from fastpref.backends import triton_backend

    monkeypatch.setattr(loss, "choose_backend", lambda *_: triton_backend)
    monkeypatch.setattr(products, "multiplies_half", lambda _: True)
    hidden, weight, targets = batch(*LARGE)
    into = torch.empty(weight.shape, dtype=buffer, device="meta")
    how = {"schedule": "recompute" if schedule == "recompute" else "pair_groups"}
    if schedule == "one group":
        how["logits_budget"] = 2 * 16 * 1024 * len(weight)
    peaks = []
    for given in ({}, {"weight_grad": into}):
        hidden.grad = weight.grad = None
        with PeakBytes(hidden, weight, into) as used:
            out = preference_loss(
                hidden, weight, targets, DPO(), ref_logps=into[0, :16].float(), **how, **given
            )
            out.loss.backward()
        peaks.append(used.peak)
        assert out.plan.extra_bytes == pytest.approx(used.peak + 32 * MIB, rel=0.05)
    assert (len(out.plan.groups) > 1) == (schedule == "groups")
    assert peaks[1] <= peaks[0] - saved * weight.nbytes
