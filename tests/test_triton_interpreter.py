"""Every Triton kernel, interpreted on the CPU, against float64 within derived error budgets.

Triton decides when a kernel is decorated whether to interpret it, so these tests run in a process
of their own: collected without TRITON_INTERPRET, this file runs itself once with it. Sizes end
tiles, blocks and slices early; whatever lies beside an operand in memory is NaN.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
from fastpref_kernels import Epilogue

from fastpref import DPO, Balance, UniDPO, linear_logps, preference_loss, reference
from fastpref.backends import accumulate_dtype
from fastpref.verify import SHAPES, Shape, make_batch, verify

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]


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


def embedded(tensor):
    """The same values inside a larger tensor of NaN (or of no valid index)."""
    around = torch.full(
        [n + 3 for n in tensor.shape],
        math.nan if tensor.is_floating_point() else 10**6,
        dtype=tensor.dtype,
    )
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

    monkeypatch.setattr(forward, "_PARTIAL_BYTES", 16 * 5 * 8 * 5)  # 16 rows of 5 tiles
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
    # The interpreter cuts bf16 off instead of rounding it: twice the error of one rounding.
    rounding = unit(dtype) * (2 if dtype == torch.bfloat16 else 1) * grad.abs()
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


# --- the backend --------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPES[0], torch.float64),
        (SHAPES[1], torch.float64),
        (SHAPES[1], torch.float16),
        (SHAPES[2], torch.float32),
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
