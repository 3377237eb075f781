"""An accelerator's half-precision products, simulated: what they cost, and what is promised.

Operands are rounded as on a GPU; the accumulators are float32 that either rounds or, as tensor
cores are reported to, cuts off after every 16 products. Errors are against float64 on the same
inputs.
"""

import contextlib
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import DPO, UniDPO, linear_logps, preference_loss
from fastpref.backends import gradients, products, torch_backend
from fastpref.commands.verify import SHAPES, accumulation_error, verify

# ‖found − truth‖ / ‖truth‖ of gradients that are rounded to bfloat16 themselves, for 1.66e-3.
PROMISED, ROUNDING = 2e-3, 1.66e-3
# In units of that rounding: two float16 operands add at most 2⁻¹¹ each, and
# √(1 + 2 (2⁻¹¹ / 1.66e-3)²) = 1.083. The exponentials of a frozen head are bfloat16.
OF_FLOAT16 = 1.1
CHUNK = 16


def cut_off(x):
    """float64 as float32, towards zero."""
    return (x.view(torch.int64) & -(1 << 29)).view(torch.float64)


def product(left, right, total, cuts):
    """float32 `total + left @ right`, of operands that are taken as they are."""
    if not cuts:
        return (total.double() + left.double() @ right.double()).float()
    total, left, right = total.double(), left.double(), right.double()
    for start in range(0, left.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        total = cut_off(total + left[:, part] @ right[part])
    return total.float()


class TensorCores(TorchDispatchMode):
    """Products of half-precision operands that keep their accumulators, where a CPU has none."""

    def __init__(self, cuts):
        super().__init__()
        self.cuts, self.operands = cuts, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.dtype_out:
            left, right, _ = args
            total = kwargs["out"].new_zeros(())
        elif function is torch.ops.aten.addmm.dtype_out:
            total, left, right, _ = args
        else:
            return function(*args, **(kwargs or {}))
        self.operands.append(left.dtype)
        assert left.dtype == right.dtype
        return kwargs["out"].copy_(product(left, right, total, self.cuts))


@pytest.fixture
def tensor_cores(monkeypatch):
    monkeypatch.setattr(products, "multiplies_half", lambda _: True)
    return TensorCores


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


def assert_little_beyond_rounding(found, truth, schedule):
    rounding = relative(truth.bfloat16(), truth)
    assert rounding == pytest.approx(ROUNDING, rel=0.01)
    allowed = PROMISED if schedule == "frozen_head" else OF_FLOAT16 * rounding
    assert relative(found, truth) <= allowed


@functools.cache
def inputs(hidden_size, vocabulary=1009, length=24, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(3)
    shape = 4, length, hidden_size
    hidden = torch.randn(shape, generator=draw).to(dtype)
    weight = torch.randn(vocabulary, hidden_size, generator=draw) * 6 / hidden_size**0.5
    targets = torch.randint(0, vocabulary, shape[:2], generator=draw)
    targets[1, -5:] = -100
    return hidden, weight.to(dtype), targets, 20 * torch.randn(4, generator=draw)


def step(hidden, weight, targets, ref_logps, schedule, *, upstream=1.0, **how):
    """Log-probabilities, ∂h and ∂W of a step; three groups of pair groups, unless told else."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(schedule != "frozen_head")
    how = {"logits_budget": 50 * 2 * len(weight), "backend": "torch"} | how
    objective = how.pop("objective", DPO())
    out = preference_loss(
        hidden, weight, targets, objective, ref_logps=ref_logps - 80, schedule=schedule, **how
    )
    (out.loss * upstream).backward()
    return out.logps, hidden.grad, weight.grad


def truth_of(hidden, weight, targets, ref_logps, **how):
    wide = hidden.double(), weight.double(), targets, ref_logps
    return step(*wide, "auto", backend="reference", **how)


SCHEDULES = ("pair_groups", "one group", "frozen_head", "recompute")


def how_of(schedule):
    """A budget for all rows makes one group of pair groups."""
    if schedule == "one group":
        return {"schedule": "pair_groups", "logits_budget": 2**30}
    return {"schedule": schedule}


@pytest.mark.parametrize("cuts", [False, True], ids=["rounding", "cutting off"])
@pytest.mark.parametrize("hidden_size", [576, 2048, 4096, 8192])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_from_bf16_keep_the_promise(schedule, hidden_size, cuts, tensor_cores):
    batch = inputs(hidden_size, vocabulary=509)
    of_logps, of_hidden, of_weight = truth_of(*batch)
    with tensor_cores(cuts) as seen:
        logps, hidden, weight = step(*batch, **how_of(schedule))
    assert torch.float16 in seen.operands or schedule == "frozen_head"
    assert_little_beyond_rounding(hidden, of_hidden, schedule)
    if weight is not None:
        assert_little_beyond_rounding(weight, of_weight, schedule)
    tokens = (batch[2] != -100).sum(1).max().item()
    largest = (batch[0].double().flatten(0, 1) @ batch[1].double().T).abs().max().item()
    of_token = accumulation_error(hidden_size, 2 * largest) * cuts + 2e-5
    assert (logps - of_logps).abs().max() <= tokens * of_token


@pytest.mark.parametrize("schedule", ["pair_groups", "one group", "recompute"])
def test_bf16_gradients_of_logits_would_break_it(schedule, tensor_cores, monkeypatch):
    """The check above can fail."""
    for module in (gradients, torch_backend):
        monkeypatch.setattr(module, "gradient_dtype", products.product_dtype)
    plain = lambda x, *_: ((x * 1).bfloat16(), None)  # noqa: E731
    monkeypatch.setattr(torch_backend.elementwise, "fitted", plain)
    monkeypatch.setattr(gradients, "fitted_rows", scaled_rows)
    monkeypatch.setattr("fastpref.schedules.pair_groups.fitted_rows", scaled_rows)
    batch = inputs(576, vocabulary=509)
    _, _, of_weight = truth_of(*batch)
    with tensor_cores(cuts=False):
        _, _, weight = step(*batch, **how_of(schedule))
    assert relative(weight, of_weight) > PROMISED


def scaled_rows(by, operand, factor):
    return (operand * factor[:, None]).bfloat16(), None


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("of_weight", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("of_hidden", [1e-6, 1.0, 1e6])
def test_no_range_of_the_operands_is_too_wide(of_hidden, of_weight, schedule, tensor_cores):
    """A power of two fits them, whatever the head's scale makes of them; and one row is an outlier.

    The head's own scale keeps the logits where they were.
    """
    hidden, weight, targets, ref_logps = inputs(64, vocabulary=131)
    hidden = (hidden * of_hidden).clone()
    hidden[0, 0] *= 2**6
    batch = hidden, weight * of_weight, targets, ref_logps
    how = {"logit_scale": 1 / (of_hidden * of_weight)}
    truth = truth_of(*batch, **how)
    with tensor_cores(cuts=False):
        found = step(*batch, **how_of(schedule), **how)
    for value, expected in zip(found[1:], truth[1:], strict=True):
        assert value is None or relative(value, expected) <= PROMISED


@pytest.mark.parametrize("upstream", [1e-4, 1.0, 3.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_upstream_gradient_is_rounded_once(schedule, dtype, upstream, tensor_cores):
    """float16's own gradients underflow without a loss scale, and only then."""
    batch = inputs(64, vocabulary=131, dtype=dtype)
    truth = truth_of(*batch, upstream=upstream)
    with tensor_cores(cuts=False):
        found = step(*batch, **how_of(schedule), upstream=upstream)
    allowed = PROMISED if dtype == torch.bfloat16 else 4e-4
    for value, expected in zip(found[1:], truth[1:], strict=True):
        if value is not None and (dtype == torch.bfloat16 or upstream >= 1):
            assert relative(value, expected) <= allowed


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "head",
    [{"softcap": 0.5}, {"softcap": 30.0}, {"logit_scale": 4.0}, {"temperature": 0.3}, {"bias": 1}],
    ids=str,
)
def test_every_head(head, schedule, tensor_cores):
    batch = inputs(64, vocabulary=131)
    head = dict(head)
    if "bias" in head:
        bias = torch.linspace(-1, 1, 131)
        bias[7] = -torch.inf
        head["bias"] = bias
        targets = batch[2].masked_fill(batch[2] == 7, 8)
        batch = *batch[:2], targets, batch[3]
    of_bias = []

    def run(make, *args, dtype=torch.float32, **how):
        given = dict(head)
        if "bias" in given:
            given["bias"] = head["bias"].to(dtype, copy=True)
            given["bias"].requires_grad_(schedule != "frozen_head")
        found = make(*args, **given, **how)
        of_bias.append(given["bias"].grad if "bias" in given else None)
        return found

    truth = run(truth_of, *batch, dtype=torch.float64)
    with tensor_cores(cuts=False):
        found = run(step, *batch, **how_of(schedule))
    for value, expected in [*zip(found[1:], truth[1:], strict=True), of_bias[::-1]]:
        assert value is None or relative(value, expected) <= PROMISED


@pytest.mark.parametrize("frozen", [False, True])
def test_entropies(frozen, tensor_cores):
    """Recomputed with two coefficients a row, some 0, some far apart."""
    hidden, weight, targets, _ = inputs(64, vocabulary=131)
    draw = torch.Generator().manual_seed(4)
    coefs = torch.randn((2, *targets.shape), generator=draw).double()
    coefs *= torch.tensor([1e-3, 1.0, 0.0, 1e3]).double()[:, None]
    coefs[1, 1] = 0
    grads = []
    for dtype, how in ((torch.float64, {"backend": "reference"}), (torch.bfloat16, {})):
        h = hidden.to(dtype, copy=True).requires_grad_()
        w = weight.to(dtype, copy=True).requires_grad_(not frozen)
        with contextlib.nullcontext() if how else tensor_cores(cuts=False):
            logps, found = linear_logps(h, w, targets, stats=("entropy",), **how)
            (coefs[0] * logps + coefs[1] * found["entropy"]).sum().backward()
        grads.append((h.grad, w.grad))
    for truth, value in zip(*grads, strict=True):
        assert value is None or relative(value, truth) <= PROMISED


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wide_parameters_in_autocast(schedule, tensor_cores):
    """Operands are rounded to bfloat16, gradients are not."""
    hidden, weight, *others = inputs(64, vocabulary=131)
    truth = truth_of(hidden, weight, *others)
    with tensor_cores(cuts=False), torch.autocast("cpu", torch.bfloat16):
        found = step(hidden.float(), weight.float(), *others, **how_of(schedule))
    # Of float16 operands alone, two of them; the frozen head's exponentials are bfloat16.
    allowed = 2e-3 if schedule == "frozen_head" else 4e-4
    for value, expected in zip(found[1:], truth[1:], strict=True):
        assert value is None or value.dtype == torch.float32
        assert value is None or relative(value, expected) <= allowed


def test_rows_of_no_coefficient_get_no_gradient(tensor_cores):
    """And leave no trace in the head's, whatever stood where theirs would be."""
    hidden, weight, targets, ref_logps = inputs(64, vocabulary=131)
    weights = torch.tensor([0.0, 1.0])
    truth = truth_of(hidden, weight, targets, ref_logps, pair_weights=weights)
    with tensor_cores(cuts=False):
        found = step(
            hidden, weight, targets, ref_logps, "pair_groups", pair_weights=weights,
            logits_budget=2**30,
        )  # fmt: skip
    assert (found[1][[0, 2]] == 0).all()
    assert relative(found[2], truth[2]) <= PROMISED


def test_the_halves_of_a_number():
    """24 bits of 32, the first 16 of them bfloat16's nearest: every exponent, ties, ±0, ∞, NaN."""
    draw = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=draw, dtype=torch.int64)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F800080, 0x007FFFFF, 1, 0x7F7FFFFF])
    x = torch.cat([bits, ties, -ties, torch.tensor([0, -(2**31), 0x7F800000])]).int()
    x = torch.cat([x.view(torch.float32), torch.tensor([torch.nan, -torch.inf, -0.0])])
    high, low = torch_backend.elementwise.split(x)
    back = torch_backend.elementwise.joined(high, low)
    known = ~x.isnan()
    assert (back.isnan() == x.isnan()).all()
    finite = known & back.isfinite()
    assert (x[finite].abs() <= torch.finfo(torch.float32).max).all()
    unit = torch.maximum(x[finite].abs().double() * 2**-16, torch.tensor(2.0**-141).double())
    assert ((back[finite].double() - x[finite].double()).abs() <= unit).all()
    # The nearest, or a neighbour that is as near in 24 bits.
    nearest = (x[finite] - x[finite].bfloat16()).double().abs()
    ours = (x[finite].double() - high[finite].double()).abs()
    overflows = ~high[finite].isfinite() | ~x[finite].bfloat16().isfinite()
    assert ((ours <= nearest + 2 * unit) | overflows).all()
    assert torch.equal(back[known & x.isinf()], x[known & x.isinf()])


@pytest.mark.parametrize("cuts", [False, True], ids=["rounding", "cutting off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=lambda shape: shape.name)
def test_what_a_gpu_is_verified_by(shape, dtype, cuts, tensor_cores, monkeypatch):
    """`fastpref verify` allows every element what its derivation says, and no more is needed."""
    monkeypatch.setattr("fastpref.commands.verify.multiplies_half", lambda _: True)
    with tensor_cores(cuts):
        found = verify(UniDPO(), shape, dtype, backend="torch")
    assert found.keys() == {"frozen_head", "pair_groups", "recompute"}
    for results in found.values():
        assert all(result.passed for result in results), results


@pytest.mark.parametrize("schedule", ["pair_groups", "recompute"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_a_head_whose_first_columns_are_frozen(tensor_cores, schedule, scaled):
    """Its rows are rounded when they are put together, which the truth takes as given."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=draw).bfloat16()

    hidden, frozen, weight = normal(4, 24, 40), normal(509, 32), normal(509, 8)
    scale = (1 + 0.1 * normal(509)).bfloat16() if scaled else None
    targets = torch.randint(509, (4, 24), generator=draw)

    def gradients_of(hidden, frozen, weight, scale, **options):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, scale) if x is not None]
        out = preference_loss(
            leaves[0],
            leaves[1],
            targets,
            DPO(beta=0.1),
            ref_logps=torch.zeros(4, dtype=leaves[0].dtype),
            frozen_weight=frozen,
            frozen_scale=leaves[2] if scaled else None,
            **options,
        )
        out.loss.backward()
        return [leaf.grad for leaf in leaves]

    with tensor_cores(False) as seen:
        found = gradients_of(hidden, frozen, weight, scale, schedule=schedule, backend="torch")
    assert set(seen.operands) == {torch.bfloat16, torch.float16}
    hidden, frozen, weight = (x.double() for x in (hidden, frozen, weight))
    if scaled:
        scale = scale.double()
        frozen = (scale[:, None] * frozen).bfloat16().double() / scale[:, None]
    truth = gradients_of(hidden, frozen, weight, scale, backend="reference")
    for ours, expected in zip(found, truth, strict=True):
        assert relative(ours, expected) <= PROMISED
