"""A head whose first columns are frozen: every schedule against the definition in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
from fastpref import linear_logps, preference_loss, sequence_logps
from fastpref.backends import Head
from fastpref.backends.gradients import largest

B, T, F, R, V = 3, 7, 24, 5, 301
SCALARS = {"softcap": 5.0, "logit_scale": 0.8, "temperature": 1.3}


def tensors(dtype=torch.float64, *, scaled=False):
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    found = {
        "hidden": normal(2 * B, T, F + R),
        "weight": 0.5 * normal(V, R),
        "frozen_weight": 0.5 * normal(V, F),
        "bias": normal(V),
    }
    if scaled:
        found["frozen_scale"] = 1 + 0.3 * normal(V)
    return found


def targets():
    found = torch.randint(V, (2 * B, T), generator=torch.Generator().manual_seed(4))
    found[:, :2] = -100
    return found


def leaves_of(given, frozen=()):
    return {
        name: tensor.clone().requires_grad_(name not in ("frozen_weight", *frozen))
        for name, tensor in given.items()
    }


def backward(leaves, **options):
    rest = {name: leaves[name] for name in leaves if name not in ("hidden", "weight")}
    out = preference_loss(
        leaves["hidden"],
        leaves["weight"],
        targets(),
        fastpref.DPO(beta=0.3),
        ref_logps=torch.linspace(-40, -30, 2 * B).to(leaves["hidden"]),
        **rest,
        **SCALARS,
        **options,
    )
    out.loss.sum().backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def loss_and_gradients(given, *, frozen=(), **options):
    return backward(leaves_of(given, frozen), **options)


def assert_exact(found, expected):
    """In float64: by 2^-40 one operand rounded to float32 would show."""
    assert abs(found[0].loss - expected[0].loss).max() <= 2**-40
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert grad.any()
        assert (found[1][name] - grad).abs().max() <= 2**-40 * grad.abs().max(), name


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, "pair_groups"),
        ({"schedule": "pair_groups", "logits_budget": 11 * V * 8}, "pair_groups"),  # three groups
        ({"schedule": "pair_groups", "logits_budget": 4 * V * 8}, "pair_groups"),  # in pieces
        ({"schedule": "recompute", "logits_budget": 9 * V * 8}, "recompute"),
        ({"reduction": "none"}, "recompute"),
        ({"frozen": ("weight", "bias", "frozen_scale")}, "frozen_head"),
        ({"frozen": ("hidden",)}, "pair_groups"),
        ({"frozen": ("hidden", "weight"), "schedule": "recompute"}, "recompute"),
    ],
)
def test_schedules_are_exact(options, schedule, scaled):
    options = dict(options)
    given = tensors(scaled=scaled)
    found = loss_and_gradients(given, **options)
    assert found[0].plan.schedule == schedule
    for option in ("schedule", "logits_budget"):
        options.pop(option, None)
    assert_exact(found, loss_and_gradients(given, backend="reference", **options))


def test_it_is_the_head_of_all_columns():
    given = tensors(scaled=True)
    whole = torch.cat([given["frozen_scale"][:, None] * given["frozen_weight"], given["weight"]], 1)
    head = {name: given[name] for name in ("bias", "frozen_weight", "frozen_scale")}
    rest = {"bias": given["bias"], **SCALARS}
    hidden, weight = given["hidden"], given["weight"]
    for function in (linear_logps, lambda *x, **options: sequence_logps(*x, **options)[0]):
        found = function(hidden, weight, targets(), **head, **SCALARS)
        assert (found - function(hidden, whole, targets(), **rest)).abs().max() <= 2**-40


def test_entropy_is_differentiable():
    given = tensors(scaled=True)
    grads = []
    for backend in ("torch", "reference"):
        leaves = {
            name: tensor.clone().requires_grad_(name != "frozen_weight")
            for name, tensor in given.items()
        }
        hidden, weight = leaves.pop("hidden"), leaves.pop("weight")
        logps, found = linear_logps(
            hidden, weight, targets(), stats=["entropy"], backend=backend, **leaves
        )
        (logps.sin() + found["entropy"].cos()).sum().backward()
        grads.append([hidden.grad, weight.grad, leaves["bias"].grad, leaves["frozen_scale"].grad])
    for ours, expected in zip(*grads, strict=True):
        assert (ours - expected).abs().max() <= 2**-40 * expected.abs().max()


def test_one_column_of_each():
    given = tensors(scaled=True)
    given["hidden"] = given["hidden"][..., F - 1 : F + 1]
    given["frozen_weight"], given["weight"] = given["frozen_weight"][:, :1], given["weight"][:, :1]
    for schedule in ("pair_groups", "recompute"):
        assert_exact(
            loss_and_gradients(given, schedule=schedule),
            loss_and_gradients(given, backend="reference"),
        )


@pytest.mark.parametrize("schedule", ["pair_groups", "recompute"])
def test_dtypes_are_promoted(schedule):
    """A float32 adapter on a bfloat16 head: nothing but the inputs is bfloat16."""
    given = tensors(torch.float32, scaled=True)
    given["frozen_weight"] = given["frozen_weight"].bfloat16()
    _, grads = loss_and_gradients(given, schedule=schedule)
    wide = {name: tensor.double() for name, tensor in given.items()}
    _, expected = loss_and_gradients(wide, backend="reference")
    for name, grad in expected.items():
        assert grads[name].dtype == torch.float32
        # A sum of V or N terms in float32; bfloat16 would err by 4e-3.
        assert (grads[name] - grad).abs().max() <= V**0.5 * 2**-23 * grad.abs().max(), name


def test_the_bound_holds():
    given = tensors(torch.float32, scaled=True)
    head = Head(
        given["weight"], None, 1.0, None, 1.0, torch.float32, given["frozen_weight"],
        given["frozen_scale"],
    )  # fmt: skip
    assert head.bound >= largest(head.whole)
    assert head.whole.shape == (V, head.hidden_size) == (V, F + R)


class Made(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor) and not each._is_view():
                self.largest = max(self.largest, each.numel())
        return out


@pytest.mark.parametrize("schedule", ["pair_groups", "recompute"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_no_head_is_made(scaled, schedule, monkeypatch):
    """Neither the effective weight nor its gradient: of either no more than some rows."""
    monkeypatch.setattr("fastpref.backends.products._CONVERTED_ROWS", 40)
    monkeypatch.setattr("fastpref.backends.gradients._FITTED_BYTES", 40 * 4 * F)
    leaves = leaves_of(tensors(torch.float32, scaled=scaled))
    budget = 2 * T * V * 4
    with Made() as made:
        backward(leaves, schedule=schedule, logits_budget=budget)
    assert 0 < made.largest <= budget // 4 < V * F


@pytest.mark.parametrize("name", ["frozen_weight", "frozen_scale"])
def test_nan_reaches_the_loss(name):
    given = tensors(scaled=True)
    given[name][17] = torch.nan
    out, _ = loss_and_gradients(given)
    assert out.loss.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frozen_weight": None}, "frozen_weight, which is missing"),
        ({"frozen_weight": torch.zeros(V, F - 1)}, f"H = {F + R} but .* have {F + R - 1} columns"),
        ({"frozen_weight": torch.zeros(V - 1, F)}, rf"must be \({V}, F\)"),
        ({"frozen_weight": torch.zeros(V)}, rf"must be \({V}, F\)"),
        ({"frozen_weight": torch.zeros(V, F, dtype=torch.int8)}, "must be one of"),
        ({"frozen_weight": [1.0]}, "must be a tensor"),
        ({"frozen_weight": torch.zeros(V, F, requires_grad=True)}, "detach it"),
        ({"frozen_scale": torch.ones(V, 1)}, rf"frozen_scale must be \({V},\)"),
        ({"frozen_scale": torch.ones(V, dtype=torch.int64)}, "must be one of"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_does_not_fit_is_an_error(change, message, backend):
    given = tensors(torch.float32, scaled=True) | change
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logps(**given, targets=targets(), backend=backend)


def test_products_are_planned():
    plain = tensors(torch.float32)
    out, _ = loss_and_gradients(plain)
    unit = 2 * 2 * B * (T - 2) * (F + R) * V
    assert out.plan.flop == 2 * unit + unit * R // (F + R)
    out, _ = loss_and_gradients(tensors(torch.float32, scaled=True))
    assert out.plan.flop == 3 * unit + unit * R // (F + R)
