"""A step for CUDA graphs: nothing of the batch is read on the host, and nothing else changes.

Meta tensors have no values: what reads one raises. What a GPU would wait for beside that is a copy
between host and device, of which the operators of a step are searched.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import (
    DPO,
    Balance,
    Objective,
    linear_logps,
    loss,
    preference_loss,
    sequence_logps,
)
from fastpref.backends import products, torch_backend
from fastpref.objectives import (
    SFT,
    WPO,
    Mixture,
    PlackettLuce,
    RankedPairs,
    SimPO,
    UniDPO,
    make_objective,
    objective_names,
)

VOCABULARY, HIDDEN, LENGTH = 61, 8, 9
STATS = ("entropy", "mean_logits", "is_top1")
# A group of whole prompts at a time, all at once, a prompt in pieces.
SCHEDULES = {
    "pair_groups": {"schedule": "pair_groups", "logits_budget": 20 * 8 * VOCABULARY},
    "one group": {"schedule": "pair_groups"},
    "pieces": {"schedule": "pair_groups", "logits_budget": 5 * 8 * VOCABULARY},
    "frozen_head": {"schedule": "frozen_head"},
    "recompute": {"schedule": "recompute"},
}


class OwnDPO(DPO):
    """Without a formula for the fused kernel."""

    def formula(self):
        return None


OBJECTIVES = {name: make_objective(name) for name in objective_names()} | {
    "own": OwnDPO(),
    "balanced": SimPO(balance=Balance()),
    "mixture": Mixture([(DPO(), 0.5), (UniDPO(), 2.0)]),
    "wpo": WPO(DPO()),
}
# Every objective, some of them in every schedule.
CASES = {
    f"{name} {schedule}": (objective, schedule)
    for name, objective in OBJECTIVES.items()
    for schedule in SCHEDULES
    if schedule == ("recompute" if objective.couples_pairs else "pair_groups")
    or name in ("unidpo", "own", "wpo")
}


def batch(prompts=3, responses=2, *, dtype=torch.float64, device="cpu", frozen=False):
    """Prompts of several lengths before the responses, and padding after them."""
    draw = torch.Generator().manual_seed(5)
    sequences = responses * prompts
    shape = sequences, LENGTH
    hidden = torch.randn((*shape, HIDDEN), generator=draw).to(device, dtype)
    weight = torch.randn((VOCABULARY, HIDDEN), generator=draw).to(device, dtype)
    targets = torch.randint(0, VOCABULARY, shape, generator=draw)
    for i in range(sequences):
        targets[i, : 1 + i % 4] = -100
        targets[i, LENGTH - i % 3 :] = -100
    sequence = torch.randn((2, sequences), generator=draw).to(device, dtype)
    given = {
        "ref_logps": sequence[0] * 3 - 20,
        "scores": sequence[1] + 3,
        "responses": responses,
    }
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    return *leaves, targets.to(device), given


def step(hidden, weight, targets, objective, **how):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(weight.requires_grad)
    out = preference_loss(hidden, weight, targets, objective, **how)
    (out.loss * 3).sum().backward()
    fields = {"loss": out.loss, "losses": out.losses, "logps": out.logps, "lengths": out.lengths}
    return fields | out.metrics | {"hidden": hidden.grad, "weight": weight.grad}


def check_equal(*args, **how):
    hidden, weight, targets, objective = args
    expected = step(*args, **how)
    with torch.no_grad():
        hidden[targets == -100] = torch.nan
    found = step(*args, capturable=True, **how)
    assert found.keys() == expected.keys()
    assert (found["hidden"][targets == -100] == 0).all()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


def options_of(objective, given, prompts=3):
    how = {"stats": STATS} | given
    if objective.takes_betas:
        how["betas"] = torch.linspace(0.1, 2, prompts, dtype=torch.float64)
    how["extras"] = {name: torch.ones(prompts).double() for name in objective.extras}
    how["pair_weights"] = torch.linspace(0, 2, prompts, dtype=torch.float64)
    return how


@pytest.mark.parametrize(("objective", "schedule"), CASES.values(), ids=CASES)
def test_it_equals_the_ordinary_step(objective, schedule):
    *tensors, given = batch(frozen=schedule == "frozen_head")
    check_equal(*tensors, objective, **options_of(objective, given), **SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weighted_lengths", [False, True])
@pytest.mark.parametrize("objective", [UniDPO(), WPO(SimPO()), SFT()], ids=["unidpo", "wpo", "sft"])
def test_token_weights(objective, weighted_lengths, schedule):
    *tensors, given = batch(frozen=schedule == "frozen_head")
    weights = torch.linspace(0.2, 2, 6 * LENGTH).double().view(6, LENGTH)
    how = given | {"token_weights": weights, "weighted_lengths": weighted_lengths}
    check_equal(*tensors, objective, **how, **SCHEDULES[schedule])


@pytest.mark.parametrize(
    ("schedule", "reduction"),
    [("pair_groups", "mean"), ("pieces", "sum"), ("frozen_head", "none"), ("recompute", "none")],
)
@pytest.mark.parametrize("objective", [PlackettLuce(), RankedPairs(DPO())], ids=["list", "pairs"])
def test_k_responses(objective, schedule, reduction):
    *tensors, given = batch(2, 4, frozen=schedule == "frozen_head")
    check_equal(*tensors, objective, reduction=reduction, **given, **SCHEDULES[schedule])


def test_a_masked_vocabulary_and_a_softcap():
    """A bias of −∞ would be met by targets that nobody asked for."""
    bias = torch.zeros(VOCABULARY, dtype=torch.float64)
    bias[0] = -torch.inf
    for schedule, how in SCHEDULES.items():
        *tensors, given = batch(frozen=schedule == "frozen_head")
        tensors[2][tensors[2] == 0] = 1
        check_equal(*tensors, DPO(), bias=bias, softcap=3.0, **given, **how)


def test_log_probabilities():
    hidden, weight, targets, _ = batch()
    weights = torch.linspace(0.2, 2, 6 * LENGTH).double().view(6, LENGTH)
    dirty = hidden.detach().clone()
    dirty[targets == -100] = torch.nan
    found = []
    for h, capturable in ((hidden.detach().clone(), False), (dirty, True)):
        h.requires_grad_()
        weight.grad = None
        logps, stats = linear_logps(h, weight, targets, stats=STATS, capturable=capturable)
        sums, lengths = sequence_logps(
            h, weight, targets, token_weights=weights, capturable=capturable
        )
        (logps.sin().sum() + stats["entropy"].cos().sum() + sums.sin().sum()).backward()
        found.append([logps, *stats.values(), sums, lengths, h.grad, weight.grad])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert (found[1][0][targets == -100] == 0).all()
    with torch.no_grad():
        again = sequence_logps(dirty, weight, targets, token_weights=weights, capturable=True)
    torch.testing.assert_close(again[0], found[0][-4], rtol=1e-10, atol=1e-12)


class HostCopies(TorchDispatchMode):
    """Operators that make the host wait for a device, or the other way round."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        name = function.overloadpacket.__name__
        if len(devices) > 1 or name in ("_local_scalar_dense", "nonzero", "lift_fresh"):
            self.found.append(name)
        return result


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Chosen for meta tensors as it would be for a GPU's, which multiplies half precision."""
    chosen = torch_backend
    if request.param == "triton":
        pytest.importorskip("triton")
        from fastpref.backends import triton_backend as chosen
    monkeypatch.setattr(loss, "choose_backend", lambda *_: chosen)
    monkeypatch.setattr(products, "multiplies_half", lambda _: True)


def meta_step(schedule, objective, given, *tensors, **how):
    given = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    given["extras"] = {name: x.to("meta") for name, x in given.get("extras", {}).items()}
    with HostCopies() as seen:
        out = preference_loss(*tensors, objective, **given, **SCHEDULES[schedule], **how)
        out.loss.backward()
    return seen.found


@pytest.mark.parametrize(("objective", "schedule"), CASES.values(), ids=CASES)
def test_nothing_is_read_or_copied(objective, schedule, backend):
    *tensors, given = batch(device="meta", dtype=torch.bfloat16, frozen=schedule == "frozen_head")
    given = options_of(objective, given)
    given["token_weights"] = torch.ones(6, LENGTH)
    assert meta_step(schedule, objective, given, *tensors, capturable=True) == []


def test_the_ordinary_step_copies(backend):
    """The check above can fail."""
    hidden, weight, _, given = batch(device="meta")
    *_, targets, _ = batch()
    assert "_to_copy" in meta_step("recompute", DPO(), given, hidden, weight, targets)


def test_what_is_read_is_seen(backend):
    class Looks(Objective):
        def __call__(self, pairs):
            return pairs.chosen_logps * pairs.chosen_lengths.max().item()

    *tensors, given = batch(device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        meta_step("recompute", Looks(), given, *tensors, capturable=True)


def test_log_probabilities_read_nothing(backend):
    hidden, weight, targets, _ = batch(device="meta", dtype=torch.bfloat16)
    with HostCopies() as seen:
        logps, found = linear_logps(hidden, weight, targets, stats=STATS, capturable=True)
        sums, _ = sequence_logps(hidden, weight, targets, capturable=True)
        (logps.sum() + found["entropy"].sum() + sums.sum()).backward()
    assert seen.found == []


def test_what_cannot_be_captured_says_so():
    hidden, weight, targets, given = batch()
    how = given | {"capturable": True}
    with pytest.raises(ValueError, match="a scored token in each sequence"):
        preference_loss(hidden, weight, targets.index_fill(0, torch.tensor(1), -100), "dpo", **how)
    with pytest.raises(ValueError, match="a scored token in each sequence"):
        linear_logps(hidden, weight, torch.full_like(targets, -100), capturable=True)
    with pytest.raises(ValueError, match="needs positions"):
        preference_loss(hidden[:, :0], weight, targets[:, :0], "dpo", **how)
    with pytest.raises(ValueError, match="takes padded batches"):
        packed = hidden.flatten(0, 1), weight, targets.flatten(), "dpo"
        preference_loss(*packed, cu_seqlens=torch.arange(7) * LENGTH, **how)
    with pytest.raises(ValueError, match="backend='reference' reads the batch"):
        sequence_logps(hidden, weight, targets, capturable=True, backend="reference")
    on_meta = batch(device="meta")
    with pytest.raises(ValueError, match="targets must be on hidden's device meta, got cpu"):
        linear_logps(*on_meta[:2], targets, capturable=True)
    weights = {"token_weights": torch.ones(6, LENGTH)}
    with pytest.raises(ValueError, match="token_weights must be on hidden's device meta"):
        sequence_logps(*on_meta[:3], capturable=True, **weights)
