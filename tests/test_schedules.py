"""Every schedule against float64, within the derived error budget of `fastpref.commands.verify`."""

import copy
import dataclasses
import math

import pytest
import torch

from fastpref import (
    CPO,
    DPO,
    AdaDPO,
    Balance,
    Hinge,
    Objective,
    UniDPO,
    linear_logps,
    preference_loss,
    reference,
    sequence_logps,
    shift_targets,
)
from fastpref.backends import accumulate_dtype
from fastpref.commands.verify import SHAPES, Shape, make_batch, verify
from fastpref.objectives import own_parameters

SCHEDULES = ("frozen_head", "pair_groups", "recompute")
# Also the sizes that end a tile, a block and a group early.
ODD_SHAPES = (
    *SHAPES,
    Shape("N 127", 1, 64, 64, 1009, rows=127),
    Shape("N 128, one piece over", 1, 90, 33, 4099, rows=60, bias=True),
    Shape("softcap alone", 2, 9, 64, 1009, rows=40, scalars={"softcap": 5.0}),
    Shape("scale alone", 2, 9, 64, 1009, rows=7, scalars={"logit_scale": 1.7}),
    Shape("one column over a tile", 2, 17, 32, 513, rows=2),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda shape: shape.name)
def test_within_the_error_budget(shape, dtype):
    for schedule, results in verify(UniDPO(balance=Balance()), shape, dtype).items():
        for result in results:
            assert result.passed, (schedule, result)


@pytest.mark.parametrize("shape", ODD_SHAPES[1:4], ids=lambda shape: shape.name)
def test_uninitialised_memory_is_never_read(shape, poison):
    for schedule, results in verify(DPO(), shape, torch.float32).items():
        for result in results:
            assert result.passed, (schedule, result)


@pytest.mark.parametrize("deviation", [6.0])
def test_log_probabilities_from_bf16_are_exact_to_5e_5(deviation):
    torch.manual_seed(0)
    hidden = torch.randn(64, 576).bfloat16()
    weight = (torch.randn(49152, 576) * deviation / 24).bfloat16()
    targets = torch.randint(0, 49152, (64,))
    truth = reference.linear_logps(hidden.double(), weight.double(), targets)
    for backend in ("torch", "reference"):
        found = linear_logps(hidden, weight, targets, backend=backend)
        assert found.dtype == torch.float32
        assert (found - truth).abs().max() <= 5e-5


def run(batch, objective=None, *, frozen=False, **how):
    leaves = {
        "hidden": batch.hidden.clone().requires_grad_(),
        "weight": batch.weight.clone().requires_grad_(not frozen),
    }
    if batch.bias is not None:
        leaves["bias"] = batch.bias.clone().requires_grad_(not frozen)
    output = preference_loss(
        targets=batch.targets,
        objective=UniDPO() if objective is None else objective,
        **leaves,
        **(batch.options | how),
    )
    if output.loss.dim() == 0:
        output.loss.backward()
    return output, leaves


BATCH = make_batch(SHAPES[3], torch.float32, "cpu")
PADDED = make_batch(SHAPES[1], torch.float32, "cpu")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_runs_agree_bit_for_bit(schedule):
    how = {"schedule": schedule, "frozen": schedule == "frozen_head", "logits_budget": 70 * 4036}
    (one, of_one), (two, of_two) = run(BATCH, **how), run(BATCH, **how)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.logps, two.logps)
    for name, leaf in of_one.items():
        assert leaf.grad is None or torch.equal(leaf.grad, of_two[name].grad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_wanted_gradients_are_made(schedule):
    hidden, weight = PADDED.hidden.clone(), PADDED.weight.clone().requires_grad_()
    if schedule == "frozen_head":
        hidden, weight = hidden.requires_grad_(), PADDED.weight.clone()
    out = preference_loss(
        hidden, weight, PADDED.targets, UniDPO(), schedule=schedule, **PADDED.options
    )
    out.loss.backward()
    assert (hidden.grad is None) == (schedule != "frozen_head")
    assert (weight.grad is None) == (schedule == "frozen_head")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("upstream", [1.0, 0.125, -3.0])
def test_gradients_scale_with_the_upstream_gradient(schedule, upstream):
    frozen = schedule == "frozen_head"
    _, plain = run(PADDED, frozen=frozen, schedule=schedule)
    hidden = PADDED.hidden.clone().requires_grad_()
    weight = PADDED.weight.clone().requires_grad_(not frozen)
    out = preference_loss(
        hidden, weight, PADDED.targets, UniDPO(), schedule=schedule, **PADDED.options
    )
    (upstream * out.loss).backward()
    eps = torch.finfo(torch.float32).eps
    for found, expected in ((hidden, plain["hidden"]), (weight, plain["weight"])):
        if expected.grad is None:
            continue
        # The factor enters before or after a few roundings of each product.
        allowed = 8 * eps * abs(upstream) * expected.grad.abs().max()
        assert (found.grad - upstream * expected.grad).abs().max() <= allowed


@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
def test_reduction_none_takes_any_upstream_gradient(schedule):
    frozen = schedule == "frozen_head"
    upstream = torch.tensor([0.5, -2.0, 3.0])
    grads = []
    for how in ({"backend": "reference"}, {"schedule": schedule}):
        out, leaves = run(PADDED, frozen=frozen, reduction="none", **how)
        assert out.loss.shape == (3,)
        out.loss.backward(upstream)
        grads.append(leaves["hidden"].grad)
    assert (grads[0] - grads[1]).abs().max() <= 2e-5 * grads[0].abs().max()
    with pytest.raises(ValueError, match="reduction='none'"):
        run(PADDED, reduction="none", schedule="pair_groups")


def test_sum_is_the_mean_times_the_pairs():
    mean, summed = run(PADDED)[0].loss, run(PADDED, reduction="sum")[0].loss
    torch.testing.assert_close(summed, 3 * mean)


def test_packed_equals_padded():
    padded, of_padded = run(PADDED)
    sequences, length = PADDED.targets.shape
    keep = torch.ones(sequences, length, dtype=torch.bool)
    keep[:, -2:] = PADDED.targets[:, -2:] != -100  # drop some padding: ragged lengths
    packed = dataclasses.replace(
        PADDED,
        hidden=PADDED.hidden[keep],
        targets=PADDED.targets[keep],
        options=PADDED.options
        | {"cu_seqlens": torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).int()},
    )
    out, of_packed = run(packed)
    assert torch.equal(out.logps, padded.logps)
    assert torch.equal(out.loss, padded.loss)
    assert torch.equal(of_packed["hidden"].grad, of_padded["hidden"].grad[keep])
    assert torch.equal(of_packed["weight"].grad, of_padded["weight"].grad)


def test_ignored_positions_are_never_looked_at():
    dirty = PADDED.hidden.clone()
    dirty[PADDED.targets == -100] = math.nan
    clean, _ = run(PADDED)
    out, leaves = run(dataclasses.replace(PADDED, hidden=dirty))
    assert torch.equal(out.loss, clean.loss)
    assert (leaves["hidden"].grad[PADDED.targets == -100] == 0).all()


def test_tokens_of_weight_zero_count_in_the_length_only():
    weights = torch.ones(PADDED.targets.shape)
    weights[:, 10:] = 0
    out, leaves = run(PADDED, token_weights=weights)
    dropped = PADDED.targets.clone()
    dropped[:, 10:] = -100
    sums, _ = sequence_logps(PADDED.hidden, PADDED.weight, dropped)
    torch.testing.assert_close(out.logps, sums)
    assert torch.equal(out.lengths, (PADDED.targets != -100).sum(1))
    assert (leaves["hidden"].grad[:, 10:] == 0).all()


# --- pairs without tokens, NaN, infinity --------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", [UniDPO(), CPO(), AdaDPO(), UniDPO(balance=Balance())])
def test_an_empty_response_adds_nothing(schedule, objective):
    frozen = schedule == "frozen_head"
    targets = PADDED.targets.clone()
    targets[1] = -100  # the chosen response of pair 1
    out, leaves = run(
        dataclasses.replace(PADDED, targets=targets), objective, frozen=frozen, schedule=schedule
    )
    assert out.logps[1] == 0
    assert out.lengths[1] == 0
    assert out.losses[1] == 0
    assert out.loss == out.losses.sum() / 3
    assert all(value.isfinite() for value in out.metrics.values())
    assert (leaves["hidden"].grad[[1, 4]] == 0).all()
    for leaf in leaves.values():
        assert leaf.grad is None or leaf.grad.isfinite().all()
    assert leaves["hidden"].grad[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_scored_is_a_differentiable_zero(schedule):
    frozen = schedule == "frozen_head"
    nothing = torch.full_like(PADDED.targets, -100)
    out, leaves = run(
        dataclasses.replace(PADDED, targets=nothing),
        frozen=frozen,
        schedule=schedule,
        stats=("entropy", "mean_logits", "is_top1"),
    )
    assert out.loss == 0
    assert out.loss.requires_grad
    assert all(value == 0 for value in out.metrics.values())
    assert (leaves["hidden"].grad == 0).all()
    assert frozen or (leaves["weight"].grad == 0).all()


@pytest.mark.parametrize("schedule", [*SCHEDULES, "forward"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("objective", [DPO(), Hinge(), UniDPO(), AdaDPO(), CPO()])
def test_non_finite_hidden_is_a_non_finite_loss(schedule, bad, objective):
    hidden = PADDED.hidden.clone()
    row = (PADDED.targets[4] != -100).nonzero()[0]
    hidden[4, row, 3] = bad
    frozen = schedule == "frozen_head"
    hidden.requires_grad_(schedule != "forward")
    weight = PADDED.weight.clone().requires_grad_(not frozen and schedule != "forward")
    out = preference_loss(
        hidden,
        weight,
        PADDED.targets,
        objective,
        schedule="auto" if schedule == "forward" else schedule,
        **PADDED.options,
    )
    assert out.plan.schedule == schedule
    assert not out.loss.isfinite()


@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
def test_a_bias_may_mask_tokens(schedule):
    """−inf logits, of the whole first slice of 576 columns too, are probability 0 and not NaN."""
    bias = torch.zeros(1009)
    bias[:600] = -math.inf
    hidden = PADDED.hidden.clone().requires_grad_()
    exact = PADDED.hidden.double().requires_grad_()
    targets = PADDED.targets.where(PADDED.targets == -100, PADDED.targets % 400 + 600)
    how = {"stats": ("entropy",), "schedule": schedule, "logits_budget": 32 * 4036}
    logps, stats = linear_logps(hidden, PADDED.weight, targets, bias=bias, **how)
    given = PADDED.weight.double(), targets.flatten()
    truth = reference.linear_logps(exact.flatten(0, 1), *given, bias=bias.double())
    torch.testing.assert_close(logps.flatten(), truth.float(), rtol=1e-5, atol=1e-5)
    assert stats["entropy"].isfinite().all()
    true_entropy = reference.token_statistics(exact.flatten(0, 1), *given, bias=bias.double())
    (logps.sum() + 3 * stats["entropy"].sum()).backward()
    (truth.sum() + 3 * true_entropy["entropy"].sum()).backward()
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("cap", [0.05, 1.0, 500.0])
def test_frozen_head_of_a_small_softcap(cap, temperature, has_bias):
    """The target's slope must not come from a log-sum-exp in which the capped logit drowns."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 24), torch.randn(1009, 24)
    bias = torch.randn(1009) if has_bias else None
    targets = torch.randint(0, 1009, (40,))
    head = {"softcap": cap, "temperature": temperature, "logit_scale": 0.05}
    grads = []
    for dtype, how in (
        (torch.float64, {"backend": "reference"}),
        (torch.float32, {"backend": "reference"}),
        (torch.float32, {"schedule": "frozen_head"}),
    ):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        of_dtype = None if bias is None else bias.to(dtype)
        logps = linear_logps(leaf, weight.to(dtype), targets, bias=of_dtype, **head, **how)
        logps.sum().backward()
        grads.append(leaf.grad.double())
    truth, plain, ours = grads
    rounding = 4 * 2**-24 * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + rounding


# --- dtypes and devices -------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("of_bias", FLOATS)
@pytest.mark.parametrize("of_weight", FLOATS)
@pytest.mark.parametrize("of_hidden", FLOATS)
def test_dtypes_are_promoted_as_torch_does(of_hidden, of_weight, of_bias, schedule):
    """Results are those of operands converted first; gradients come in each operand's dtype."""
    frozen = schedule == "frozen_head"
    batch = dataclasses.replace(
        PADDED,
        hidden=PADDED.hidden.to(of_hidden),
        weight=PADDED.weight.to(of_weight),
        bias=torch.linspace(-1, 1, 1009).to(of_bias),
    )
    dtype = torch.promote_types(of_hidden, of_weight)
    same = dataclasses.replace(
        batch, hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype), bias=batch.bias
    )
    out, leaves = run(batch, frozen=frozen, schedule=schedule)
    expected, of_same = run(same, frozen=frozen, schedule=schedule)
    assert out.loss.dtype == accumulate_dtype(dtype)
    assert torch.equal(out.logps, expected.logps)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            truth = of_same[name].grad.double()
            rounding = torch.finfo(leaf.dtype).eps / 2 + torch.finfo(dtype).eps / 2
            allowed = rounding * truth.abs() + torch.finfo(leaf.dtype).tiny
            assert ((leaf.grad.double() - truth).abs() <= allowed).all(), name


def test_float64_stays_float64_in_autocast():
    """As torch's own products leave it."""
    double = dataclasses.replace(
        PADDED, hidden=PADDED.hidden.double(), weight=PADDED.weight.double()
    )
    plain, _ = run(double)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, leaves = run(double)
        assert (double.hidden @ double.weight.T).dtype == torch.float64
    assert torch.equal(out.loss, plain.loss)
    assert leaves["hidden"].grad.dtype == torch.float64


@pytest.mark.parametrize("schedule", [*SCHEDULES, "forward"])
def test_the_default_device_is_nobodys_business(schedule):
    """`with torch.device("cuda")` while the tensors lie elsewhere; meta stands for any other."""
    how = {"objective": UniDPO(), "stats": ("entropy", "mean_logits", "is_top1")}
    empty = dataclasses.replace(PADDED, targets=PADDED.targets.clone())
    empty.targets[1] = -100
    with torch.device("meta"):
        if schedule == "forward":
            out = preference_loss(empty.hidden, empty.weight, empty.targets, **how, **empty.options)
            linear_logps(empty.hidden, empty.weight, empty.targets)
            sequence_logps(empty.hidden, empty.weight, empty.targets)
            shift_targets(empty.targets, empty.targets)
        else:
            objective = how.pop("objective")
            frozen = schedule == "frozen_head"
            out, _ = run(empty, objective, frozen=frozen, schedule=schedule, **how)
            run(empty, Cubic(), frozen=frozen, schedule=schedule)
    assert out.loss.device.type == "cpu"
    assert out.plan.schedule == schedule


# --- objectives of one's own, coupling, saturation ----------------------------------------------


class Cubic(Objective):
    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=True)
        return (1 - chosen + rejected) ** 3


class BatchBaseline(Objective):
    """Looks across pairs: margins relative to the batch."""

    couples_pairs = True

    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=True)
        margin = chosen - rejected
        return torch.nn.functional.softplus(margin.mean() - margin)


@pytest.mark.parametrize("objective", [Cubic(), BatchBaseline()])
def test_objective_of_ones_own(objective):
    truth, of_truth = run(PADDED, objective, backend="reference")
    out, leaves = run(PADDED, objective)
    expected = "recompute" if objective.couples_pairs else "pair_groups"
    assert out.plan.schedule == expected
    torch.testing.assert_close(out.loss, truth.loss)
    for name, leaf in leaves.items():
        size = of_truth[name].grad.abs().max()
        assert (leaf.grad - of_truth[name].grad).abs().max() <= 2e-5 * size
    if objective.couples_pairs:
        with pytest.raises(ValueError, match="couples pairs"):
            run(PADDED, objective, schedule="pair_groups")


class Learned(Objective, torch.nn.Module):
    """A β of its own that trains, and a module among its attributes."""

    def __init__(self):
        super().__init__()
        self.log_beta = torch.nn.Parameter(torch.tensor(-1.0))
        self.of_lengths = torch.nn.Linear(1, 1)

    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=True)
        shift = self.of_lengths(pairs.chosen_lengths[:, None]).squeeze(-1)
        return torch.nn.functional.softplus(-self.log_beta.exp() * (chosen - rejected) + shift)


class Plain(Objective):
    """Its β is a tensor among plain attributes."""

    def __init__(self):
        self.log_beta = torch.tensor(-1.0, requires_grad=True)

    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=True)
        return torch.nn.functional.softplus(-self.log_beta.exp() * (chosen - rejected))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [Learned, Plain])
def test_parameters_of_an_objective_get_their_gradient(make, frozen):
    torch.manual_seed(0)
    ours = make()
    truth = copy.deepcopy(ours) if make is Learned else make()
    out, leaves = run(PADDED, ours, frozen=frozen)
    _, of_truth = run(PADDED, truth, frozen=frozen, backend="reference")
    assert out.plan.schedule == ("frozen_head" if frozen else "recompute")
    assert ours.log_beta.grad.abs() > 1e-3
    for found, expected in zip(own_parameters(ours), own_parameters(truth), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaves["hidden"].grad, of_truth["hidden"].grad, rtol=1e-3, atol=1e-6)
    if not frozen:
        with pytest.raises(ValueError, match="parameters of its own"):
            run(PADDED, make(), schedule="pair_groups")


def test_parameters_that_cannot_be_found_are_an_error():
    hidden_away = [torch.tensor(2.0, requires_grad=True)]

    class Closure(Objective):
        def __call__(self, pairs):
            return hidden_away[0].exp() * pairs.chosen_logps

    with pytest.raises(ValueError, match="Closure uses a tensor that requires a gradient"):
        run(PADDED, Closure())
    grads = []
    for how in ({"schedule": "recompute"}, {"backend": "reference"}):
        hidden_away[0].grad = None
        run(PADDED, Closure(), **how)
        grads.append(hidden_away[0].grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("schedule", ["frozen_head", "pair_groups", "recompute"])
@pytest.mark.parametrize(
    ("losses", "error"),
    [
        (lambda pairs: -pairs.chosen_logps.detach(), "losses without a gradient"),
        (lambda pairs: (pairs.chosen_logps * 0 + 1).detach(), "losses without a gradient"),
        (lambda pairs: torch.no_grad()(lambda: -pairs.chosen_logps)(), "losses without a gradient"),
        (lambda pairs: pairs.chosen_logps.long(), "floating-point losses, got torch.int64"),
        (lambda pairs: pairs.chosen_logps > pairs.rejected_logps, "floating-point losses"),
    ],
)
def test_losses_that_train_nothing_are_an_error(losses, error, schedule):
    objective = type("Odd", (Objective,), {"__call__": lambda self, pairs: losses(pairs)})()
    for backend in ("torch", "reference"):
        with pytest.raises((ValueError, TypeError), match=f"Odd .*{error}"):
            how = {"backend": backend, "schedule": schedule}
            run(PADDED, objective, frozen=schedule == "frozen_head", **how)
    if "gradient" in error:  # but to look at them is no error
        with torch.no_grad():
            preference_loss(
                PADDED.hidden, PADDED.weight, PADDED.targets, objective, **PADDED.options
            )


class SilentBaseline(BatchBaseline):
    couples_pairs = False


def test_an_objective_that_couples_pairs_must_say_so():
    """Its loss would depend on how many pairs fit the budget."""
    one, _ = run(PADDED, SilentBaseline())
    assert len(one.plan.groups) == 1
    torch.testing.assert_close(one.loss, run(PADDED, BatchBaseline())[0].loss)
    with pytest.raises(ValueError, match="SilentBaseline.*set couples_pairs = True"):
        run(PADDED, SilentBaseline(), logits_budget=40 * 4036)
    for honest in (Cubic(), Plain()):
        run(PADDED, honest, logits_budget=40 * 4036)


def test_wrong_shape_from_an_objective_is_an_error():
    class Scalar(Objective):
        def __call__(self, pairs):
            return pairs.chosen_logps.mean()

    with pytest.raises(ValueError, match=r"Scalar must return one loss a pair, \(3,\)"):
        run(PADDED, Scalar())


@pytest.mark.parametrize("schedule", ["pair_groups", "recompute"])
def test_saturated_pairs_skip_the_backward_products(schedule, monkeypatch):
    """Hinge losses of 0 have coefficient 0: their rows take part in no backward product."""
    from fastpref.backends import torch_backend

    ref_logps = PADDED.options["ref_logps"].clone()
    ref_logps[[1, 4]] = torch.tensor([-1000.0, 0.0])  # pair 1 is far beyond the hinge
    options = PADDED.options | {"ref_logps": ref_logps}
    batch = dataclasses.replace(PADDED, options=options)
    rows = []
    for name in ("group_gradients", "recompute_backward"):
        original = getattr(torch_backend, name)

        def counting(hidden, *args, original=original):
            rows.append(len(hidden))
            return original(hidden, *args)

        monkeypatch.setattr(torch_backend, name, counting)
    _, leaves = run(batch, Hinge(beta=1.0), schedule=schedule)
    live = run(batch, Hinge(beta=1.0), backend="reference")[0].losses > 0
    assert live.any()
    assert not live[1]
    scored = (PADDED.targets != -100).sum(1).view(2, 3).sum(0)
    assert sum(rows) == scored[live].sum()
    assert (leaves["hidden"].grad[[1, 4]] == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_second_derivatives_are_refused(schedule):
    """A gradient penalty would add nothing, without a word."""
    weight = PADDED.weight.clone().requires_grad_(schedule != "frozen_head")
    hidden = PADDED.hidden.clone().requires_grad_()
    given = hidden, weight, PADDED.targets
    out = preference_loss(*given, UniDPO(), schedule=schedule, **PADDED.options)
    with pytest.raises(RuntimeError, match="create_graph=True.*backend='reference'"):
        torch.autograd.grad(out.loss, hidden, create_graph=True)
    if schedule != "pair_groups":
        logps, stats = linear_logps(*given, schedule=schedule, stats=("entropy",))
        for value in (logps, stats["entropy"]):
            with pytest.raises(RuntimeError, match="create_graph"):
                torch.autograd.grad(value.sum(), hidden, create_graph=True, retain_graph=True)
    exact = preference_loss(*given, UniDPO(), backend="reference", **PADDED.options)
    (grad,) = torch.autograd.grad(exact.loss, hidden, create_graph=True)
    grad.square().sum().backward()
    assert hidden.grad.abs().max() > 0


def test_second_backward_says_what_to_do():
    hidden = PADDED.hidden.clone().requires_grad_()
    weight = PADDED.weight.clone().requires_grad_()
    out = preference_loss(hidden, weight, PADDED.targets, UniDPO(), **PADDED.options)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="schedule='recompute'"):
        out.loss.backward()
    again = preference_loss(
        hidden, weight, PADDED.targets, UniDPO(), schedule="recompute", **PADDED.options
    )
    again.loss.backward(retain_graph=True)
    again.loss.backward()


def test_without_gradients_only_the_forward_runs():
    with torch.no_grad():
        out, _ = run_without_grad(schedule="pair_groups")
    assert out.plan.schedule == "forward"
    expected, _ = run(PADDED)
    torch.testing.assert_close(out.loss, expected.loss)


def run_without_grad(**how):
    out = preference_loss(
        PADDED.hidden, PADDED.weight, PADDED.targets, UniDPO(), **(PADDED.options | how)
    )
    return out, None


# --- token statistics, linear_logps, sequence_logps ---------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_token_metrics(schedule):
    stats = ("entropy", "mean_logits", "is_top1")
    frozen = schedule == "frozen_head"
    truth, _ = run(BATCH, frozen=frozen, stats=stats, backend="reference")
    out, _ = run(BATCH, frozen=frozen, stats=stats, schedule=schedule, logits_budget=9 * 4036)
    assert truth.metrics.keys() == out.metrics.keys()
    for name, value in truth.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
@pytest.mark.parametrize("uses", ["logps", "entropy", "both"])
def test_linear_logps_gradcheck(schedule, uses):
    torch.manual_seed(1)
    targets = torch.tensor([3, -100, 0, 16, 5])
    hidden = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    frozen = schedule == "frozen_head"
    weight = torch.randn(17, 7, dtype=torch.float64, requires_grad=not frozen)
    bias = torch.randn(17, dtype=torch.float64, requires_grad=not frozen)

    def function(hidden, weight, bias):
        logps, stats = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=3.0,
            logit_scale=1.4,
            temperature=0.8,
            schedule=schedule,
            logits_budget=2 * 17 * 8,
            stats=("is_top1", "entropy"),
        )
        return {"logps": logps, "entropy": stats["entropy"], "both": logps * stats["entropy"]}[uses]

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_reference_gradcheck():
    torch.manual_seed(2)
    hidden = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (4, 3))
    targets[0, 0] = -100

    def function(hidden, weight, bias):
        return reference.preference_loss(
            hidden,
            weight,
            targets,
            DPO(),
            ref_logps=torch.full((4,), -5.0, dtype=torch.float64),
            bias=bias,
            softcap=2.0,
            logit_scale=1.3,
            temperature=0.7,
        ).loss

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
@pytest.mark.parametrize("budget_rows", [1, 5, 1000])
def test_linear_logps_statistics(schedule, budget_rows):
    torch.manual_seed(3)
    names = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    hidden = torch.randn(3, 11, 24, dtype=torch.float64)
    weight = torch.randn(1009, 24, dtype=torch.float64)
    targets = (hidden @ weight.T).argmax(-1)
    targets[:, ::2] = torch.randint(0, 1009, (3, 6))
    targets[1, 4] = -100
    truth = reference.token_statistics(hidden.flatten(0, 1), weight, targets.flatten())
    leaf = hidden.clone().requires_grad_()
    logps, found = linear_logps(
        leaf,
        weight,
        targets,
        stats=names,
        schedule=schedule,
        logits_budget=budget_rows * 1009 * 8,
    )
    assert logps.shape == targets.shape
    torch.testing.assert_close(logps.flatten(), truth["logps"])
    assert found["is_top1"].sum() >= 14
    for name in names:
        torch.testing.assert_close(found[name].flatten(), truth[name], msg=name)


def test_linear_logps_returns_a_tensor_without_statistics():
    found = linear_logps(PADDED.hidden, PADDED.weight, PADDED.targets)
    assert isinstance(found, torch.Tensor)
    assert (found[PADDED.targets == -100] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_sequence_logps_of_any_number_of_sequences(backend):
    hidden = PADDED.hidden[:5].clone().requires_grad_()
    given = PADDED.weight, PADDED.targets[:5]
    sums, lengths = sequence_logps(hidden, *given, backend=backend)
    exact = PADDED.hidden[:5].double().requires_grad_()
    truth, counts = reference.sequence_logps(exact, given[0].double(), given[1])
    torch.testing.assert_close(sums, truth.detach().float())
    assert torch.equal(lengths, counts)
    with torch.no_grad():
        unrecorded, _ = sequence_logps(hidden, *given, backend=backend)
    assert not unrecorded.requires_grad
    assert torch.equal(unrecorded, sequence_logps(hidden.detach(), *given, backend=backend)[0])
    upstream = torch.linspace(-1, 2, 5)
    sums.backward(upstream)
    truth.backward(upstream.double())
    size = exact.grad.abs().max()
    assert (hidden.grad - exact.grad).abs().max() <= 2e-5 * size


def test_reference_log_probabilities_of_the_policy_itself_give_no_margin():
    """Forward only and pair groups see the same logits: the margin at the start is rounding."""
    ref_logps, _ = sequence_logps(PADDED.hidden, PADDED.weight, PADDED.targets)
    out, _ = run(PADDED, DPO(beta=1.0), ref_logps=ref_logps)
    eps = torch.finfo(torch.float32).eps
    assert out.metrics["rewards/margins"].abs() <= 4 * eps * ref_logps.abs().max()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_rounds_operands_and_keeps_float32_gradients(schedule):
    frozen = schedule == "frozen_head"
    _, rounded = run(
        dataclasses.replace(
            PADDED,
            hidden=PADDED.hidden.bfloat16().float(),
            weight=PADDED.weight.bfloat16().float(),
        ),
        frozen=frozen,
        schedule=schedule,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, leaves = run(PADDED, frozen=frozen, schedule=schedule)
    assert out.loss.dtype == torch.float32
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad.dtype == torch.float32
            size = rounded[name].grad.abs().max()
            assert (leaf.grad - rounded[name].grad).abs().max() <= 2e-5 * size


def test_shift_targets():
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    expected = torch.tensor([[-100, 7, 8, -100], [4, -100, -100, -100]])
    assert torch.equal(shift_targets(ids, mask), expected)
    with pytest.raises(ValueError, match="mask"):
        shift_targets(ids, mask[:, :3])


def test_memory_does_not_grow_with_the_pairs():
    """No tensor beyond inputs and gradients exceeds the budget, however many pairs there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self, known):
            super().__init__()
            self.known, self.largest = known, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.known:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
            return out

    budget = 60 * 1009 * 4
    for schedule in SCHEDULES:
        for pairs in (4, 16):
            batch = make_batch(Shape("", pairs, 24, 16, 1009, rows=60), torch.float32, "cpu")
            assert (batch.targets != -100).sum() * 1009 * 4 > 2 * budget
            how = {"frozen": schedule == "frozen_head", "schedule": schedule}
            with Largest({(1009, 16), (2 * pairs * 24, 16), (2 * pairs, 24, 16)}) as seen:
                run(batch, logits_budget=budget, **how)
            assert budget / 16 < seen.largest <= budget
