"""Every Triton kernel, interpreted on the CPU, against float64 within derived error budgets.

Triton decides when a kernel is decorated whether to interpret it, so these tests run in a process
of their own: collected without TRITON_INTERPRET, this file runs itself once with it. Sizes end
tiles, blocks and slices early; whatever lies beside an operand in memory is NaN.
"""

import dataclasses
import itertools
import math
import os
import weakref

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
from fastpref_kernels import Epilogue
from fastpref_kernels.pairs import flags_of, numbers_of

from fastpref import (
    CPO,
    DPO,
    IPO,
    ORPO,
    RDPO,
    RPO,
    SFT,
    WPO,
    AdaDPO,
    Balance,
    Hinge,
    Objective,
    PairLogps,
    Robust,
    SimPO,
    UniDPO,
    linear_logps,
    preference_loss,
    reference,
)
from fastpref.backends import accumulate_dtype
from fastpref.commands.verify import SHAPES, Shape, make_batch, objectives_to_verify, verify
from fastpref.objectives import mean_or_zero

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of −inf − −inf
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
SUBSETS = [s for n in range(5) for s in itertools.combinations(STATS, n)]
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.7},
    "temperature": {"temperature": 1.3},
    "softcap": {"softcap": 5.0},
    "all": {"softcap": 4.0, "logit_scale": 1.4, "temperature": 0.8},
}
HALF = (torch.bfloat16, torch.float16)


def unit(dtype):
    return torch.finfo(dtype).eps / 2


def fill_of(dtype):
    """What must not be read: NaN, or no valid index."""
    return math.nan if dtype.is_floating_point else min(10**6, torch.iinfo(dtype).max)


def embedded(tensor):
    """The same values inside a larger tensor of NaN (or of no valid index)."""
    around = torch.full([n + 3 for n in tensor.shape], fill_of(tensor.dtype), dtype=tensor.dtype)
    inside = around[tuple(slice(0, n) for n in tensor.shape)]
    return inside.copy_(tensor)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of the projection; `index` picks rows among others that are NaN."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    index: torch.Tensor | None
    head: dict

    @property
    def rows(self):
        return self.hidden if self.index is None else self.hidden[self.index]

    def statistics(self, dtype):
        """Truth in float64, plain summation in float32."""
        bias = None if self.bias is None else self.bias.to(dtype)
        found = reference.token_statistics(
            self.rows.to(dtype), self.weight.to(dtype), self.targets, bias=bias, **self.head
        )
        z = reference.logits(self.rows.to(dtype), self.weight.to(dtype), bias=bias, **self.head)
        return found | {"lse": torch.logsumexp(z, -1)}, z

    def found(self, stats, dtype=None):
        logps, lse, extra = kernels.projection_statistics(
            self.hidden,
            self.weight,
            self.targets,
            Epilogue(self.bias, **self.head),
            stats,
            self.index,
            dtype,
        )
        return {"logps": logps, "lse": lse} | extra


def make_problem(n, v, h, dtype, head, *, bias=False, index=False, seed=0, deviation=6.0):
    draw = torch.Generator().manual_seed(seed)
    narrow = torch.float32 if dtype == torch.float64 else dtype

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=draw) * scale).to(narrow).to(dtype)

    hidden, weight = normal(n, h), normal(v, h, scale=deviation / h**0.5)
    targets = torch.randint(0, v, (n,), generator=draw)
    targets[::3] = (hidden.double() @ weight.double().T).argmax(-1)[::3]  # some are top-1
    of_rows = None
    if index:
        of_rows = torch.randperm(2 * n, generator=draw)[:n]
        hidden = hidden.new_full((2 * n, h), math.nan).index_copy(0, of_rows, hidden)
    return Problem(
        embedded(hidden),
        embedded(weight),
        targets,
        embedded(normal(v)) if bias else None,
        of_rows,
        HEADS[head],
    )


def allowed_errors(truth, plain, z, dtype):
    """Twice the error of plain float32 summation, one rounding of each logit, one of the result.

    A logit's error enters each statistic with the sum of its derivatives' magnitudes.
    """
    u = unit(accumulate_dtype(dtype)) + unit(torch.float64)
    of_logit = u * (1 + z.abs().max().item())
    entropy = truth["entropy"].max().item()
    derivatives = {
        "logps": 2,
        "lse": 1,
        "mean_logits": 1,
        "log_sum_sq_probs": 4,
        "entropy": 2 * (1 + entropy),
    }
    scale = u / unit(torch.float32)
    return {
        name: 2 * scale * (plain[name] - truth[name]).abs().max().item()
        + of_logit * factor
        + u * truth[name].abs().max().item()
        for name, factor in derivatives.items()
    }


def check_statistics(found, truth, plain, z, dtype):
    allowed = allowed_errors(truth, plain, z, dtype)
    for name, value in found.items():
        if name == "is_top1":
            assert value.dtype == torch.bool
            assert torch.equal(value, truth[name]), name
        else:
            assert value.dtype == accumulate_dtype(dtype)
            error = (value.double() - truth[name]).abs().max().item()
            assert error <= allowed[name], (name, error, allowed[name])


# --- projection to log-probability --------------------------------------------------------------


def check_projection(problem, stats=STATS, dtype=None):
    truth, z = problem.statistics(torch.float64)
    plain, _ = problem.statistics(torch.float32)
    check_statistics(problem.found(stats, dtype), truth, plain, z, problem.hidden.dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("head", HEADS)
def test_projection_of_every_head(head, dtype, poison):
    check_projection(make_problem(33, 131, 48, dtype, head, bias=True, index=True))


@interpreted
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_projection_of_every_choice_of_statistics(bias, index, poison):
    problem = make_problem(17, 131, 33, torch.float64, "all", bias=bias, index=index)
    for stats in SUBSETS:
        check_projection(problem, stats)


# Blocks are 16 rows × 64 columns × 32 hidden, bands 8 row blocks, the merge 32 rows × 32 tiles.
@interpreted
@pytest.mark.parametrize(
    ("n", "v", "h"),
    [
        (1, 1, 1),
        (15, 63, 31),
        (16, 64, 32),
        (17, 65, 33),
        (31, 127, 5),
        (33, 129, 64),
        (3, 2049, 8),
        (1, 4097, 4),
        (130, 67, 3),
    ],
)
def test_projection_at_the_ends_of_blocks(n, v, h, poison):
    check_projection(make_problem(n, v, h, torch.float64, "plain", bias=True, index=True))


@interpreted
def test_projection_in_several_launches(monkeypatch, poison):
    from fastpref_kernels import forward

    # 16 rows of 5 tiles with 5 values each, and of 16 hidden.
    monkeypatch.setattr(forward, "_LAUNCH_BYTES", 16 * (5 * 5 + 16) * 8)
    check_projection(make_problem(70, 300, 16, torch.float64, "all", bias=True, index=True))


@interpreted
def test_projection_rounds_wide_operands_slice_by_slice(monkeypatch, poison):
    """As in autocast: float32 parameters, bf16 products."""
    from fastpref_kernels import forward

    monkeypatch.setattr(forward, "_CONVERTED_BYTES", 70 * 16 * 2)  # one tile of 64 columns
    problem = make_problem(20, 300, 16, torch.bfloat16, "all", bias=True, index=True)
    wide = dataclasses.replace(
        problem, hidden=problem.hidden.float() * (1 + 2**-12), weight=problem.weight.float()
    )
    truth, z = problem.statistics(torch.float64)
    plain, _ = problem.statistics(torch.float32)
    check_statistics(wide.found(STATS, torch.bfloat16), truth, plain, z, torch.bfloat16)


@interpreted
def test_a_wide_head_is_converted_once_for_several_launches(monkeypatch, poison):
    from fastpref_kernels import forward

    # 16 rows of 5 tiles with 2 values each, and of 16 hidden.
    monkeypatch.setattr(forward, "_LAUNCH_BYTES", 16 * (5 * 2 * 4 + 16 * 2))
    monkeypatch.setattr(forward, "_LAUNCHES", 3)
    monkeypatch.setattr(forward, "_CONVERTED_BYTES", 70 * 16 * 2)  # one tile of 64 columns
    problem = make_problem(70, 300, 16, torch.bfloat16, "all", bias=True, index=True)
    wide = dataclasses.replace(
        problem, hidden=problem.hidden.float() * (1 + 2**-12), weight=problem.weight.float()
    )
    converted, slices = [], []
    convert = torch.Tensor.to

    def seen(x, *how):
        if how == (torch.bfloat16,):
            converted.append(tuple(x.shape))
            assert all(each() is None for each in slices)  # when the next one is made
        found = convert(x, *how)
        if how == (torch.bfloat16,) and x.shape[0] in (64, 44):
            slices.append(weakref.ref(found))
        return found

    monkeypatch.setattr(torch.Tensor, "to", seen)
    found = wide.found((), torch.bfloat16)
    monkeypatch.undo()
    truth, z = problem.statistics(torch.float64)
    plain, _ = problem.statistics(torch.float32)
    check_statistics(found, truth, plain, z, torch.bfloat16)
    of_head = [*4 * [(64, 16)], (44, 16)]
    assert converted == [*3 * [(16, 16)], *of_head, (16, 16), (6, 16), *of_head]


@interpreted
@pytest.mark.parametrize("descriptors", [False, True])
def test_projection_at_a_depth(descriptors, monkeypatch, poison):
    """One accumulator would lose every 1 that is added to 2²⁴; another sums them first."""
    from fastpref_kernels import configs, forward

    hidden_size, dtype = 1104, torch.float32 if descriptors else torch.bfloat16  # 512, 512 and 80
    key = "projection", "wide" if descriptors else "rich"
    config = configs.entries_of("interpreter")[key]
    config = dataclasses.replace(config, descriptors=descriptors, block_h=16)
    hidden, weight = torch.zeros(1, hidden_size), torch.zeros(2, hidden_size)
    hidden[0, 0] = weight[0, 0] = 2.0**12
    hidden[0, 512::16] = weight[0, 512::16] = 1.0  # one a block
    target = torch.zeros(1, dtype=torch.int64)

    def sum_of(depth):
        with configs.trial({key: config, ("choices", "depth"): depth}):
            of_head = hidden.to(dtype), weight.to(dtype), target, Epilogue()
            _, _, found = kernels.projection_statistics(*of_head, ("mean_logits",))
        return 2 * found["mean_logits"].item() - 2**24

    rounding = 4  # of ln 2, in and out
    assert abs(sum_of(0)) <= rounding
    if descriptors:  # which the interpreter has of fp32, where there is no depth
        assert abs(sum_of(512)) <= rounding
        monkeypatch.setattr(forward, "projection_depth", lambda *_: 512)
    assert abs(sum_of(512) - 37) <= rounding
    problem = make_problem(5, 70, hidden_size, dtype, "all", bias=True, index=True)
    problem = dataclasses.replace(
        problem, hidden=problem.hidden.contiguous(), weight=problem.weight.contiguous()
    )
    with configs.trial({key: config, ("choices", "depth"): 512}):
        check_projection(problem)


@interpreted
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("hidden_size", [36, 33])  # the second has no aligned rows
def test_projection_by_descriptors(hidden_size, index, monkeypatch, poison):
    """The interpreter has descriptors of fp32; a GPU uses them for half precision."""
    from fastpref_kernels import configs, forward

    described = []
    launch = forward._project
    monkeypatch.setattr(
        forward, "_project", lambda *args: (described.append(args[-1].descriptors), launch(*args))
    )
    wide = "projection", "wide"
    config = dataclasses.replace(configs.entries_of("interpreter")[wide], descriptors=True)
    problem = make_problem(35, 131, hidden_size, torch.float32, "all", bias=True, index=index)
    problem = dataclasses.replace(
        problem, hidden=problem.hidden.contiguous(), weight=problem.weight.contiguous()
    )
    with configs.trial({wide: config}):
        check_projection(problem)
    assert described == [hidden_size == 36]


@interpreted
def test_of_equal_logits_the_first_is_top1(poison):
    """Within a tile and across tiles, in all kernels."""
    hidden = torch.ones(4, 8, dtype=torch.float64)
    weight = torch.zeros(300, 8, dtype=torch.float64)
    weight[[70, 100, 290]] = 1.0
    targets = torch.tensor([70, 100, 290, 0])
    expected = torch.tensor([True, False, False, False])
    _, _, found = kernels.projection_statistics(hidden, weight, targets, Epilogue(), ("is_top1",))
    assert torch.equal(found["is_top1"], expected)
    _, _, found = kernels.row_statistics(hidden @ weight.T, targets, Epilogue(), ("is_top1",))
    assert torch.equal(found["is_top1"], expected)


@interpreted
@pytest.mark.parametrize("block", [256, 512])
def test_every_column_may_hold_the_target(block, poison):
    from fastpref_kernels import configs

    entries = configs.entries_of("interpreter")
    tiles, rows = ("projection", "wide"), ("rows", "plain")
    wider = {key: dataclasses.replace(entries[key], block_v=block) for key in (tiles, rows)}
    n = block + 45
    targets = torch.arange(n)
    weight = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = torch.ones(n, 8, dtype=torch.float64)
    products = hidden @ weight.T
    with configs.trial(wider):
        of_tiles = kernels.projection_statistics(hidden, weight, targets, Epilogue())
        of_rows = kernels.row_statistics(products, targets, Epilogue())
    for logps, lse, _ in (of_tiles, of_rows):
        # Into units of ln 2 and out of them, the difference and this sum: each rounds once.
        rounding = 4 * torch.finfo(torch.float64).eps * (lse.abs() + products[0].abs()).max().item()
        torch.testing.assert_close(logps + lse, products[0], rtol=0, atol=rounding)


# --- rows of materialised products --------------------------------------------------------------


def of_products(products, targets, bias, head, dtype, coef, entropy_coef):
    """Statistics and the gradient of products by autograd, all of them inputs as they are."""
    leaf = products.to(dtype).detach().requires_grad_()
    wide_bias = None if bias is None else bias.to(dtype)
    eye = torch.eye(products.shape[1], dtype=dtype)
    found = reference.token_statistics(leaf, eye, targets, bias=wide_bias, **head)
    z = reference.logits(leaf, eye, bias=wide_bias, **head)
    found["lse"] = torch.logsumexp(z, -1)
    total = (found["logps"] * coef.to(dtype)).sum()
    if entropy_coef is not None:
        total = total + (found["entropy"] * entropy_coef.to(dtype)).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    return {name: value.detach() for name, value in found.items()}, z.detach(), grad


def make_products(n, v, dtype, seed=1):
    draw = torch.Generator().manual_seed(seed)
    wide = accumulate_dtype(dtype)

    def normal(*size):
        return torch.randn(size, generator=draw).to(wide)

    targets = torch.randint(0, v, (n,), generator=draw)
    coef, entropy_coef = normal(n), normal(n)
    coef[::4] = 0
    entropy_coef[::8] = 0
    return 6 * normal(n, v), targets, normal(v), coef, entropy_coef


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_rows(head, dtype, has_bias, has_entropy, poison):
    n, v = 19, 517  # blocks are 16 × 256
    products, targets, bias, coef, entropy_coef = make_products(n, v, dtype)
    bias = bias if has_bias else None
    entropy_coef = entropy_coef if has_entropy else None
    given = (products, targets, bias, HEADS[head])
    truth, z, grad = of_products(*given, torch.float64, coef, entropy_coef)
    plain, _, plain_grad = of_products(*given, torch.float32, coef, entropy_coef)

    buffer = embedded(products)
    epilogue = Epilogue(None if bias is None else embedded(bias), **HEADS[head])
    stats = STATS if has_entropy else ()
    logps, lse, extra = kernels.row_statistics(buffer, targets, epilogue, stats)
    assert torch.equal(buffer, products)
    check_statistics({"logps": logps, "lse": lse} | extra, truth, plain, z, dtype)

    entropy = (extra["entropy"], entropy_coef) if has_entropy else None
    buffer[(coef == 0) & (torch.tensor(not has_entropy) | (torch.arange(n) % 8 == 0))] = math.nan
    found = kernels.row_gradients_(buffer, targets, lse, coef, epilogue, dtype, entropy=entropy)
    assert found.dtype == dtype
    assert found.data_ptr() == buffer.data_ptr()
    u = unit(accumulate_dtype(dtype)) + unit(torch.float64)
    of_logit = u * (1 + z.abs().max().item())
    slope = HEADS[head].get("logit_scale", 1) / HEADS[head].get("temperature", 1)
    weights = coef.abs().max().item()
    if has_entropy:
        weights += entropy_coef.abs().max().item() * 2 * (1 + truth["entropy"].max().item())
    allowed = 2 * (u / unit(torch.float32)) * (plain_grad.double() - grad).abs().max().item()
    allowed += 2 * of_logit * slope * weights
    rounding = unit(dtype) * grad.abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found.double() - grad).abs() <= allowed + rounding + smallest).all()


@interpreted
@pytest.mark.parametrize("columns", [1, 255, 256, 257])
def test_rows_at_the_ends_of_blocks(columns, poison):
    for n in (1, 16, 17):
        products, targets, _, coef, _ = make_products(n, columns, torch.float64)
        truth, z, grad = of_products(products, targets, None, {}, torch.float64, coef, None)
        buffer = embedded(products)
        logps, lse, _ = kernels.row_statistics(buffer, targets, Epilogue())
        check_statistics({"logps": logps, "lse": lse}, truth, truth, z, torch.float64)
        found = kernels.row_gradients_(buffer, targets, lse, coef, Epilogue(), torch.float64)
        u = 2 * unit(torch.float64) * (1 + z.abs().max()) * coef.abs().max()
        assert ((found - grad).abs() <= 4 * u).all()


@interpreted
def test_gradient_of_vocabulary_slices_is_that_of_the_whole(poison):
    products, targets, bias, coef, entropy_coef = make_products(9, 300, torch.float64)
    logps, lse, extra = kernels.row_statistics(products, targets, Epilogue(bias), ("entropy",))
    entropy = (extra["entropy"], entropy_coef)
    slices = [
        kernels.row_gradients_(
            products[:, a:b].clone(), targets, lse, coef, Epilogue(bias).sliced(a, b),
            torch.float64, a, entropy,
        )
        for a, b in ((0, 101), (101, 102), (102, 300))
    ]  # fmt: skip
    whole = kernels.row_gradients_(
        products, targets, lse, coef, Epilogue(bias), torch.float64, entropy=entropy
    )
    assert torch.equal(torch.cat(slices, 1), whole)


@interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
@pytest.mark.parametrize("masked", [300, 600])
def test_a_slice_that_the_bias_masks(masked, schedule, poison):
    """Half of the first of 576 columns, or all: nothing has been summed when the second comes."""
    batch = make_batch(SHAPES[1], torch.float32, "cpu")
    bias = torch.zeros(len(batch.weight))
    bias[:masked] = -math.inf
    targets = batch.targets.where(batch.targets == -100, batch.targets % 400 + masked)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        hidden = batch.hidden.to(dtype, copy=True).requires_grad_()
        how = {"backend": backend, "schedule": schedule, "logits_budget": 32 * 4036}
        logps = linear_logps(hidden, batch.weight.to(dtype), targets, bias=bias.to(dtype), **how)
        logps.sum().backward()
        found.append((logps.detach().double(), hidden.grad.double()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- pairs --------------------------------------------------------------------------------------

OBJECTIVES = {
    **{name: x for name, x in objectives_to_verify().items() if x.formula() is not None},
    "label noise": DPO(label_smoothing=0.2),
    "normalized": DPO(beta=2.0, length_normalized=True),
    "normalized hinge": Hinge(beta=3.0, length_normalized=True),
    "normalized rdpo": RDPO(length_normalized=True, alpha=0.3),
    "normalized cpo": CPO(length_normalized=True, beta=1.0, nll_weight=0.3),
    "balanced cpo": CPO(balance=Balance(per_token=False, ceiling=3.0, floor=0.3)),
    "balance of rewards": SimPO(balance=Balance(source="implicit_reward", ceiling=math.inf)),
    "uneven balance": RDPO(balance=Balance(chosen_exponent=0.9, rejected_exponent=-0.3)),
    "no balance at all": IPO(balance=Balance(ceiling=1.0, floor=1.0)),
    "balanced odds": ORPO(odds_weight=2.0, balance=Balance(ceiling=1.5, rejected_exponent=1.0)),
    "sums": UniDPO(length_normalized=False, beta=0.1, nll_weight=0.2),
    "detached": UniDPO(detach_performance_weight=True, nll_weight=0.3, tau_good=5.0),
    "no quality": UniDPO(eta=0.0, nll_weight=0.0, gamma=0.7, balance=Balance()),
}


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Token log-probabilities of responses, chosen and rejected in turn; two of them are empty."""

    logps: torch.Tensor
    offsets: torch.Tensor
    ref_logps: torch.Tensor  # (2, B)
    scores: torch.Tensor  # (2, B)
    token_weights: torch.Tensor | None

    def pairs(self, dtype):
        """What the objective sees of the counted pairs, and which those are."""
        logps = self.logps if self.token_weights is None else self.logps * self.token_weights
        sums = [logps[a:b].to(dtype).sum() for a, b in itertools.pairwise(self.offsets.tolist())]
        sums = torch.stack(sums).view(-1, 2).T.detach()
        lengths = self.offsets.diff().view(-1, 2).T.to(dtype)
        counted = (lengths > 0).all(0)
        columns = [x.to(dtype)[:, counted] for x in (sums, lengths, self.ref_logps, self.scores)]
        return PairLogps(*(row for pair in columns for row in pair)), counted


def make_pairs(dtype, weighted, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 9, 1, 1, 0, 4, 3000, 1300, 7, 0, 12, 12, 2, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    # A mean log-probability of its own for each response, from near 0 to −6.
    means = -((6 * torch.rand(len(lengths), generator=draw)) ** 2) / 6
    noise = 0.5 + torch.rand(int(offsets[-1]), generator=draw)
    logps = (means.repeat_interleave(lengths) * noise).to(dtype)
    sums = (means * lengths).view(-1, 2).T
    ref_logps = sums + 2 * torch.randn(sums.shape, generator=draw)
    scores = 10 * torch.rand(sums.shape, generator=draw)
    weights = torch.rand(len(logps), generator=draw) if weighted else None
    return PairBatch(logps, offsets, ref_logps, scores, weights)


def weigh(objective, pairs, dtype, moved=0.0):
    """Losses, ∂Σ/∂ℓ `(2, B)` and metrics by the reference's formulas and autograd."""
    leaf = torch.stack([pairs.chosen_logps, pairs.rejected_logps]) + moved
    leaf = leaf.to(dtype).requires_grad_()
    fields = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in vars(pairs).items()}
    pairs = PairLogps(**(fields | {"chosen_logps": leaf[0], "rejected_logps": leaf[1]}))
    losses = reference.pair_losses(objective, pairs)
    (coefs,) = torch.autograd.grad(losses.sum(), leaf)
    with torch.no_grad():
        metrics = {name: mean_or_zero(x) for name, x in objective.report(pairs).items()}
    return losses.detach().double(), coefs.double(), metrics


@interpreted
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_of_every_objective(name, dtype, poison):
    objective, weighted = OBJECTIVES[name], dtype == torch.float64
    batch = make_pairs(dtype, weighted)
    pairs, counted = batch.pairs(torch.float64)
    losses, coefs, metrics = weigh(objective, pairs, torch.float64)
    plain_losses, plain_coefs, plain_metrics = weigh(objective, pairs, torch.float32)

    # As in `fastpref verify`: amplification as float32 shows it, what one rounding of each token
    # and of each sum does to the formula, and the roundings of the result.
    u = unit(dtype) + unit(torch.float64)
    scale = u / unit(torch.float32)
    sums = torch.stack([pairs.chosen_logps, pairs.rejected_logps])
    delta = u * sums.abs() * (2 if weighted else 1) + unit(torch.float64) * 3000
    allowed_losses = 2 * scale * (plain_losses - losses).abs().max() + 2 * u * losses.abs().max()
    allowed_coefs = 2 * scale * (plain_coefs - coefs).abs().max() + 2 * u * coefs.abs().max()
    for sign in itertools.product((-1, 1), repeat=2):
        moved = weigh(objective, pairs, torch.float64, delta * torch.tensor(sign)[:, None])
        allowed_losses += (moved[0] - losses).abs().max()
        allowed_coefs += (moved[1] - coefs).abs().max()

    scores = batch.scores if objective.needs_scores else None
    offsets = batch.offsets
    found_sums, found_losses, coef, values = kernels.weigh_pairs(
        batch.logps,
        offsets,
        objective.formula(),
        first=0,
        last=7,
        divisor=3,
        ref_logps=batch.ref_logps,
        scores=scores,
        token_weights=batch.token_weights,
    )
    in_pairs = found_sums.view(-1, 2).T[:, counted].double()
    assert ((in_pairs - sums).abs() <= delta).all()
    assert ((found_losses.double()[counted] - losses).abs() <= allowed_losses).all()
    assert (found_losses[~counted] == 0).all()
    per_row = torch.zeros(2, 7, dtype=torch.float64)
    per_row[:, counted] = coefs / 3
    expected = per_row.T.flatten().repeat_interleave(offsets.diff())
    if weighted:
        expected = expected * batch.token_weights
    assert ((coef.double() - expected).abs() <= allowed_coefs / 3 + u * expected.abs()).all()

    of_formula = objective.formula()
    for metric, value in zip(kernels.METRICS, values, strict=True):
        if metric not in metrics:
            absent = {"weights": of_formula.quality is None, "balance": objective.balance is None}
            assert absent[metric.split("/")[0]], metric
            continue
        truth = metrics[metric]
        assert (value[~counted] == 0).all()
        amplified = 2 * scale * (plain_metrics[metric].double() - truth).abs()
        # No metric moves faster with ℓ than the balance: a' = α a, and no a here exceeds 60.
        moves = delta.max() * max(
            1.0, objective.reward_scale, of_formula.balance is not None and 60
        )
        error = (value.double().sum() / counted.sum() - truth).abs()
        assert error <= amplified + moves + 4 * u * value.abs().max(), metric


@interpreted
def test_some_of_the_pairs_are_weighed_as_all_of_them(poison):
    batch = make_pairs(torch.float64, weighted=True)
    formula = UniDPO(balance=Balance()).formula()

    def found(first, last):
        a, b = batch.offsets[2 * first], batch.offsets[2 * last]
        return kernels.weigh_pairs(
            batch.logps[a:b],
            batch.offsets,
            formula,
            first=first,
            last=last,
            ref_logps=batch.ref_logps,
            scores=batch.scores,
            token_weights=batch.token_weights[a:b],
        )

    whole, parts = found(0, 7), [found(0, 3), found(3, 4), found(4, 7), found(7, 7)]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(several, -1))


@interpreted
@pytest.mark.parametrize("objective", [DPO(beta=1.0), Hinge(), IPO(), UniDPO(), AdaDPO(), ORPO()])
def test_extreme_pairs(objective):
    """Saturated margins are finite, NaN stays NaN."""
    offsets = torch.arange(9)
    logps = torch.tensor([-1e4, -1.0, -1.0, -1e4, 0.0, -1e-9, math.nan, -1.0]).double()
    ref_logps, scores = torch.full((2, 4), -1.0), torch.full((2, 4), 4.0)
    _, losses, coef, _ = kernels.weigh_pairs(
        logps, offsets, objective.formula(), first=0, last=4, ref_logps=ref_logps, scores=scores
    )
    batch = PairBatch(logps, offsets, ref_logps, scores, None)
    expected, coefs, _ = weigh(objective, batch.pairs(torch.float64)[0], torch.float64)
    assert losses[:3].isfinite().all()
    assert losses[3].isnan()
    eps = torch.finfo(torch.float64).eps
    truth = coefs.T.flatten()[:6]
    torch.testing.assert_close(losses[:3], expected[:3], rtol=1e3 * eps, atol=0)
    # 1 − e^x at −1e-6, the bound of ORPO's log-odds, keeps 10 of 16 digits in any order.
    torch.testing.assert_close(coef[:6], truth, rtol=1e-9, atol=1e-300)


# --- scaling ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("size", [(0,), (1,), (4095,), (4097,), (70, 61)])
@pytest.mark.parametrize("upstream", [1.0, -0.375])
def test_scaling(size, upstream, poison):
    grad = torch.randn(size)
    factor = torch.tensor(upstream)
    for dtype in (torch.float32, *HALF):
        given = grad.clone()
        found = kernels.scaled(given, factor, dtype)
        assert torch.equal(found, (grad * upstream).to(dtype))
        assert (found is given) == (dtype == torch.float32)


@interpreted
def test_zero_stays_zero_in_half_precision():
    for dtype in HALF:
        found = kernels.scaled(torch.zeros(9, dtype=torch.float64), torch.tensor(2.0), dtype)
        assert (found == 0).all()


@interpreted
def test_scaling_by_1_touches_nothing(monkeypatch):
    from fastpref_kernels import scale

    stored = []
    monkeypatch.setattr(scale.tl, "store", lambda *args, **kwargs: stored.append(args))
    grad = torch.randn(5000)
    kernels.scaled(grad, torch.tensor(1.0), torch.float32)
    assert not stored
    kernels.scaled(grad, torch.tensor(2.0), torch.float32)
    assert stored


# --- operators ----------------------------------------------------------------------------------


def operator_arguments():
    """Arguments of every operator, by its name; none is a constant, no two alike."""
    torch.manual_seed(4)
    hidden, weight, bias = torch.randn(9, 8), torch.randn(37, 8), torch.randn(37)
    targets, index = torch.randint(0, 37, (6,)), torch.randperm(9)[:6]
    products, lse, coef = torch.randn(6, 37), torch.randn(6) + 4, torch.randn(6)
    high, low = torch.randn(37, 8).bfloat16(), torch.randint(-128, 128, (37, 8)).to(torch.int8)
    of_tiles = torch.rand(5, 2, 6), torch.randint(0, 37, (2, 6), dtype=torch.int32), torch.rand(6)
    head = (bias, 0.7, 4.0, 1.3)
    formula = UniDPO(balance=Balance(), nll_weight=0.5).formula()

    def slice_of(block):
        return *(tensor.clone() for tensor in of_tiles), block, 0, 0

    return {
        "projection_statistics": (
            hidden, weight, targets, *head, " ".join(STATS), index, torch.float32,
        ),
        "projection_exponentials": (
            hidden[index], weight, targets, *head, " ".join(STATS), torch.float32, lse,
            products.clone(), *slice_of(64),
        ),
        "row_exponentials": (
            products, targets, *head, " ".join(STATS), products.clone(), *slice_of(256),
        ),
        "merge_statistics": (*of_tiles, targets, " ".join(STATS), 37),
        "row_statistics": (products, targets, *head, "entropy is_top1"),
        "row_gradients_": (
            products, targets, lse, coef, *head, torch.float32, 0, lse - 3, coef + 1,
        ),
        "weigh_pairs": (
            -torch.rand(6), torch.tensor([0, 2, 3, 4, 6]), torch.randn(2, 2), torch.randn(2, 2),
            torch.rand(6), torch.rand(2), torch.rand(2) + 0.5, torch.rand(2, 2) + 1,
            list(numbers_of(formula)),
            [int(flag) for flag in flags_of(formula).values()], 0, 2, 2,
        ),
        "scale_": (high.clone(), torch.tensor(2.0), low),
        "scaled": (products.clone(), torch.tensor(2.0), torch.bfloat16, None),
        "gradients_": (
            products.abs().half(), torch.rand(6, 10), 4, targets, -lse, lse, coef, torch.rand(6),
        ),
        "add_weight_gradient_": (
            high.clone(), low.clone(), products.half(), hidden[:6].half(), torch.tensor(0.3), True,
        ),
        "accumulate_": (high.clone(), low.clone(), weight.clone(), torch.tensor(0.3), True),
        "fitted": (hidden, torch.tensor(4.0), index, coef, torch.tensor(3.0)),
        "keep_": (torch.randn(6, 8), high.clone(), low[:6].clone(), index),
        "take_": (high.clone(), low[:6].clone(), index, coef, torch.tensor(0.7)),
        "taken_": (
            high.clone(), high.flip(0), low[:6].clone(), index, coef, torch.tensor(0.7),
        ),
        "hidden_gradient_": (
            high.clone(), low[:6].clone(), index, products.half(), coef, weight,
            torch.tensor(4.0), torch.bfloat16,
        ),
    }  # fmt: skip


@interpreted
def test_operators():
    """Schemas, fake implementations and tracing of all of them."""
    arguments = operator_arguments()
    assert [operator._name for operator in kernels.OPERATORS] == list(arguments)
    for operator, of_operator in zip(kernels.OPERATORS, arguments.values(), strict=True):
        torch.library.opcheck(operator, of_operator)


def between(tensor):
    """The same values in every second place of each dimension, NaN (or no index) between."""
    fill = fill_of(tensor.dtype)
    around = torch.full([2 * n + 1 for n in tensor.shape], fill, dtype=tensor.dtype)
    inside = around[tuple(slice(0, 2 * n, 2) for n in tensor.shape)]
    return inside.copy_(tensor)


LAYOUTS = {
    "offset": embedded,
    "strided": between,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "expanded": lambda tensor: tensor[:1].expand_as(tensor) if tensor.dim() else tensor,
    "expanded along rows": lambda tensor: tensor[..., :1].expand_as(tensor),
}


# Written in place, in rows that may lie apart.
ROWS_APART = {
    ("projection_exponentials", "out"),
    ("row_exponentials", "products"),
    ("row_exponentials", "out"),
    ("row_gradients_", "products"),
    ("gradients_", "exponentials"),
    ("keep_", "high"),
    ("take_", "high"),
    ("taken_", "out"),
    ("hidden_gradient_", "high"),
}
# Offsets increase, and no row is written twice.
NOT_ALIKE = {("weigh_pairs", 1), ("keep_", 3), ("take_", 2), ("taken_", 3)}
NOT_ALIKE |= {("hidden_gradient_", 2)}


def written_to(operator):
    arguments = operator._opoverload._schema.arguments
    return [i for i, x in enumerate(arguments) if x.alias_info and x.alias_info.is_write]


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operator_takes_every_layout_of_every_argument(layout):
    """Autograd hands over gradients of stride 0; targets are `ids[::2]`; a head is transposed."""
    checked = 0
    for operator in kernels.OPERATORS:
        name, written = operator._name, written_to(operator)
        schema = operator._opoverload._schema.arguments
        for place, argument in enumerate(operator_arguments()[name]):
            if not isinstance(argument, torch.Tensor) or argument.dim() == 0:
                continue
            if (name, place) in NOT_ALIKE and "expanded" in layout:
                continue
            laid_out = LAYOUTS[layout](argument)
            results = []
            for value in (laid_out.contiguous(), laid_out):
                given = [*operator_arguments()[name]]
                given[place] = value
                dense = value.is_contiguous() or (
                    layout == "offset" and (name, schema[place].name) in ROWS_APART
                )
                if place in written and not dense:
                    with pytest.raises(ValueError, match="written in place and must be dense"):
                        operator(*given)
                    continue
                out = operator(*given)
                results.append(
                    [given[i].clone() for i in written] + list(() if out is None else out)
                )
            if len(results) == 2:
                for expected, found in zip(*results, strict=True):
                    assert torch.equal(found.nan_to_num(), expected.nan_to_num()), (name, place)
                    checked += 1
    assert checked > 30


@interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
def test_gradients_of_stride_zero(schedule):
    """`.sum()` of log-probabilities and of entropies, of targets and a bias with strides."""
    torch.manual_seed(6)
    hidden, weight = torch.randn(9, 8), torch.randn(37, 8)
    targets, bias = torch.randint(0, 37, (18,))[::2], torch.randn(74)[::2]
    grads = []
    for backend in ("triton", "reference"):
        leaf = hidden.clone().requires_grad_()
        of_weight = weight.clone().requires_grad_(schedule == "recompute")
        how = {"schedule": schedule} if backend == "triton" else {}
        for head_bias in (bias, torch.zeros(1).expand(37)):
            logps, stats = linear_logps(
                leaf, of_weight, targets, bias=head_bias, stats=("entropy",), backend=backend, **how
            )
            logps.sum().backward(retain_graph=True)
            stats["entropy"].sum().backward()
        grads.append([x.grad for x in (leaf, of_weight) if x.grad is not None])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "pair_groups", "recompute"])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_promoted_as_torch_does(of_hidden, of_weight, schedule):
    batch = make_batch(TINY, torch.bfloat16, "cpu")
    found = []
    promoted = torch.promote_types(of_hidden, of_weight)
    for dtypes in ((of_hidden, of_weight), (promoted, promoted)):
        hidden = batch.hidden.to(dtypes[0], copy=True).requires_grad_()
        weight = batch.weight.to(dtypes[1], copy=True).requires_grad_(schedule != "frozen_head")
        out = preference_loss(
            hidden, weight, batch.targets, UniDPO(), schedule=schedule, backend="triton",
            **batch.options,
        )  # fmt: skip
        out.loss.backward()
        found.append((out.loss.detach(), hidden.grad))
    (loss, grad), (expected, of_promoted) = found
    assert torch.equal(loss, expected)
    assert grad.dtype == of_hidden
    eps = torch.finfo(of_hidden).eps
    torch.testing.assert_close(grad.float(), of_promoted.float(), rtol=2 * eps, atol=1e-7)


@interpreted
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("uses", ["linear_logps", "pair_groups", "recompute", "frozen_head"])
def test_compiled_equals_eager(uses, backend):
    torch.manual_seed(5)
    hidden, weight = torch.randn(4, 5, 8), torch.randn(31, 8)
    targets = torch.randint(0, 31, (4, 5))
    targets[:, :2] = -100

    def function(hidden, weight):
        if uses == "linear_logps":
            return 2 * linear_logps(1.5 * hidden, weight, targets, backend=backend).sum()
        how = {"backend": backend, "schedule": uses}
        return 2 * preference_loss(1.5 * hidden, weight, targets, SimPO(), **how).loss

    found = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone()]
        if uses != "frozen_head":
            leaves[1].requires_grad_()
        value = call(*leaves)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


# --- the backend --------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPES[0], torch.float64),
        (SHAPES[1], torch.float64),
        (SHAPES[2], torch.float16),
        (SHAPES[3], torch.float64),
        (SHAPES[3], torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_schedules_within_the_error_budget(shape, dtype, poison):
    found = verify(UniDPO(balance=Balance()), shape, dtype, backend="triton")
    for schedule, results in found.items():
        for result in results:
            assert result.passed, (schedule, result)


@interpreted
def test_log_probabilities_from_bf16_are_exact_to_5e_5():
    problem = make_problem(16, 4099, 96, torch.bfloat16, "plain")
    truth, _ = problem.statistics(torch.float64)
    found = linear_logps(problem.hidden, problem.weight, problem.targets, backend="triton")
    assert (found - truth["logps"]).abs().max() <= 5e-5


@interpreted
@pytest.mark.parametrize("schedule", ["frozen_head", "recompute"])
def test_linear_logps_gradcheck(schedule):
    torch.manual_seed(1)
    targets = torch.tensor([3, -100, 0])
    frozen = schedule == "frozen_head"
    hidden = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=not frozen)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=not frozen)

    def function(hidden, weight, bias):
        logps, stats = linear_logps(
            hidden, weight, targets, bias=bias, softcap=3.0, logit_scale=1.4, temperature=0.8,
            schedule=schedule, logits_budget=2 * 5 * 8, stats=("entropy",), backend="triton",
        )  # fmt: skip
        return logps * stats["entropy"]

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@interpreted
@pytest.mark.parametrize("schedule", ["recompute", "pair_groups", "frozen_head"])
def test_a_bias_may_mask_tokens(schedule):
    """−inf logits, of a whole tile too, are probability 0 and not NaN."""
    batch = make_batch(Shape("", 2, 9, 16, 301, rows=20), torch.float32, "cpu")
    bias = torch.zeros(301)
    bias[:150] = -math.inf
    targets = batch.targets.where(batch.targets == -100, batch.targets % 150 + 150)
    found = {}
    for backend in ("triton", "reference"):
        hidden = batch.hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_(schedule != "frozen_head")
        how = {} if backend == "reference" else {"schedule": schedule}
        out = preference_loss(
            hidden, weight, targets, DPO(), bias=bias, backend=backend, **batch.options, **how
        )
        out.loss.backward()
        found[backend] = out.loss.detach(), hidden.grad
    for ours, truth in zip(found["triton"], found["reference"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5 * truth.abs().max().item())


@interpreted
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_hidden_is_a_non_finite_log_probability(bad):
    problem = make_problem(5, 131, 16, torch.float32, "plain")
    problem.hidden[3, 2] = bad
    logps = problem.found(())["logps"]
    assert not logps[3].isfinite()
    assert logps[[0, 1, 2, 4]].isfinite().all()


@interpreted
def test_nothing_scored(poison):
    hidden, weight = torch.randn(0, 8), torch.randn(33, 8)
    targets = torch.zeros(0, dtype=torch.int64)
    logps, lse, extra = kernels.projection_statistics(hidden, weight, targets, Epilogue(), STATS)
    assert logps.shape == lse.shape == extra["entropy"].shape == (0,)
    logps, _, _ = kernels.row_statistics(hidden @ weight.T, targets, Epilogue())
    assert logps.shape == (0,)


# --- objectives through the backend -------------------------------------------------------------

TINY = Shape("tiny", 3, 7, 8, 37, rows=20)


def run(objective, backend, schedule, frozen, empty=True, **how):
    batch = make_batch(TINY, torch.float64, "cpu")
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(not frozen)
    if backend != "reference":
        how |= {"schedule": schedule, "logits_budget": TINY.rows * TINY.vocabulary * 8}
    targets = batch.targets.clone()
    targets[1, : None if empty else 3] = -100  # the chosen response of pair 1
    out = preference_loss(
        hidden, weight, targets, objective, backend=backend, **(batch.options | how)
    )
    out.loss.backward(torch.arange(1.0, 4.0, dtype=torch.float64) if out.loss.dim() else None)
    return out, hidden.grad


class Cubic(Objective):
    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=True)
        return (1 - chosen + rejected) ** 3


class Doubled(DPO):
    """A built-in's fields with another loss: it must not inherit the built-in's formula."""

    def __call__(self, pairs):
        return 2 * super().__call__(pairs)


@interpreted
@pytest.mark.parametrize("schedule", ["pair_groups", "recompute", "frozen_head"])
@pytest.mark.parametrize("objective", [UniDPO(balance=Balance()), CPO(), Cubic(), Doubled()])
def test_losses_and_metrics_are_the_references(objective, schedule, poison):
    frozen = schedule == "frozen_head"
    truth, of_truth = run(objective, "reference", None, frozen)
    out, grad = run(objective, "triton", schedule, frozen)
    torch.testing.assert_close(out.losses, truth.losses)
    torch.testing.assert_close(grad, of_truth)
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)


@interpreted
@pytest.mark.parametrize("schedule", ["pair_groups", "frozen_head"])
@pytest.mark.parametrize(
    "objective",
    [UniDPO(balance=Balance()), CPO(), IPO(), Hinge(), ORPO(), Robust(), RPO(), WPO(SFT())],
    ids=lambda x: type(x).__name__,
)
def test_weights_betas_and_lengths_of_pairs(objective, schedule, poison):
    """Fused where there is a formula, by autograd where there is none: the same numbers."""
    how = {
        "pair_weights": torch.tensor([0.5, 2.0, 0.0]),
        "token_weights": torch.rand(6, 7, generator=torch.Generator().manual_seed(1)),
        "weighted_lengths": True,
    }
    if objective.takes_betas:
        how["betas"] = torch.tensor([0.3, 1.0, 2.0])
    frozen = schedule == "frozen_head"
    truth, of_truth = run(objective, "reference", None, frozen, **how)
    out, grad = run(objective, "triton", schedule, frozen, **how)
    torch.testing.assert_close(out.losses, truth.losses)
    torch.testing.assert_close(grad, of_truth)
    for name, value in truth.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)


@interpreted
@pytest.mark.parametrize("schedule", ["pair_groups", "frozen_head", "recompute"])
@pytest.mark.parametrize("objective", [UniDPO(balance=Balance()), Cubic()])
@pytest.mark.parametrize("weighted_lengths", [False, True])
def test_all_positions_as_rows(weighted_lengths, objective, schedule, poison):
    """What is captured in a graph; fused where there is a formula."""
    how = {
        "token_weights": torch.rand(6, 7, generator=torch.Generator().manual_seed(1)),
        "weighted_lengths": weighted_lengths,
    }
    frozen = schedule == "frozen_head"
    truth, of_truth = run(objective, "reference", None, frozen, empty=False, **how)
    how |= {"capturable": True}
    out, grad = run(objective, "triton", schedule, frozen, empty=False, **how)
    torch.testing.assert_close(out.losses, truth.losses)
    torch.testing.assert_close(grad, of_truth)
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)


@interpreted
def test_reduction_none_takes_any_upstream_gradient():
    truth, of_truth = run(UniDPO(), "reference", None, False, reduction="none")
    out, grad = run(UniDPO(), "triton", "recompute", False, reduction="none")
    torch.testing.assert_close(out.loss, truth.loss)
    torch.testing.assert_close(grad, of_truth)


@interpreted
@pytest.mark.parametrize("name", ["hinge", "orpo+balance"])
def test_objectives_within_the_error_budget(name, poison):
    found = verify(OBJECTIVES[name], TINY, torch.float64, backend="triton")
    for schedule, results in found.items():
        for result in results:
            assert result.passed, (schedule, result)
