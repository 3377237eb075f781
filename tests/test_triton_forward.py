"""Exponentials and slices of the forward kernels against float64, and what makes a variant.

Interpreted as in `test_triton_interpreter.py`, in a process of their own.
"""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
from fastpref_kernels import Epilogue, configs, forward
from test_triton_interpreter import (
    HEADS,
    INTERPRETED,
    STATS,
    check_statistics,
    embedded,
    interpreted,
    make_problem,
    unit,
)

from fastpref.backends import accumulate_dtype

KINDS = {"plain": {}, "negative": {"logit_scale": -0.7, "temperature": 1.3}, "all": HEADS["all"]}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of −inf − −inf


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


def of_kind(kind, *args, **kwargs):
    problem = make_problem(*args, "plain", **kwargs)
    return dataclasses.replace(problem, head=KINDS[kind])


def truth_of(problem):
    """Statistics, logits and the slopes 1 − tanh², in float64; statistics in float32."""
    truth, z = problem.statistics(torch.float64)
    plain, _ = problem.statistics(torch.float32)
    slopes = torch.ones_like(z)
    if "softcap" in problem.head:
        cap = problem.head["softcap"] / problem.head.get("temperature", 1.0)
        slopes = 1 - (z / cap) ** 2
    return truth, plain, z, slopes


def check_exponentials(found, log_scale, relative_to, z, slopes, dtype):
    """e^(z − what they are relative to + log_scale)·s: a rounding of z and of the exponent each."""
    wide = accumulate_dtype(dtype)
    exponent = z - relative_to + log_scale
    expected = torch.exp(exponent) * slopes
    u = unit(wide) + unit(torch.float64)
    # Of z and of what it is relative to: the product's own error too, which grows with its sum.
    error = 8 * u * (1 + z.abs().max()) * torch.exp(exponent)
    smallest = 2 * torch.finfo(torch.float32).smallest_normal  # which the products of e may lose
    if found.dtype == torch.float16:
        smallest = 2**-24
    allowed = error + 2 * unit(found.dtype) * expected + smallest
    wrong = (found.double() - expected).abs() > allowed
    assert not wrong.any()
    assert found.isfinite().all()


def peaks_of(z, block):
    return torch.stack([x.max(1).values for x in z.split(block, 1)], 1)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("by", ["tiles", "library"])
def test_exponentials(by, dtype, stored, kind, poison):
    """Of both multipliers, in rows that lie apart, beside what must stay as it is."""
    n, v = 19, 517  # ends rows and blocks of both early
    problem = of_kind(kind, n, v, 24, dtype, bias=kind != "plain")
    truth, plain, z, slopes = truth_of(problem)
    epilogue = Epilogue(problem.bias, **problem.head)
    around = torch.full((n + 1, v + 3), 7.0, dtype=stored)
    out = around[:n, :v]
    out.fill_(math.nan)
    if by == "tiles":
        logps, lse, extra, peaks, block = kernels.projection_exponentials(
            problem.hidden, problem.weight, problem.targets, epilogue, out, STATS
        )
    else:
        wide = accumulate_dtype(dtype)
        partials = kernels.new_partials(
            problem.hidden, problem.weight, epilogue, STATS, columns=256, by=by
        )
        for a in (256, 0, 512):  # in any order
            b = min(a + 256, v)
            products = embedded(problem.hidden.to(wide) @ problem.weight[a:b].to(wide).T)
            of_columns = epilogue.sliced(a, b)
            kernels.slice_statistics(
                products, problem.targets, of_columns, partials, a, out=out[:, a:b]
            )
        logps, lse, extra = kernels.merge_statistics(partials, problem.targets)
        peaks, block = partials.peaks, partials.block
    check_statistics({"logps": logps, "lse": lse} | extra, truth, plain, z, dtype)
    of_truth = peaks_of(z, block)
    assert peaks.shape == of_truth.shape
    assert peaks.dtype == accumulate_dtype(dtype)
    u = unit(peaks.dtype) + unit(torch.float64)
    assert ((peaks - of_truth).abs() <= 8 * u * (1 + z.abs().max())).all()
    columns = of_truth.repeat_interleave(block, 1)[:, :v]
    check_exponentials(out, math.log(kernels.SCALE), columns, z, slopes, dtype)
    assert (around[n:] == 7).all()
    assert (around[:, v:] == 7).all()


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_anchored(dtype, stored, kind, poison):
    """In slices that end within tiles; each row's target is 0, and nothing else."""
    n, v, columns = 19, 300, 101
    problem = of_kind(kind, n, v, 24, dtype, bias=kind != "plain")
    truth, plain, z, slopes = truth_of(problem)
    epilogue = Epilogue(problem.bias, **problem.head)
    wide = accumulate_dtype(dtype)
    anchors = z.gather(1, problem.targets[:, None])[:, 0].to(wide)
    partials = kernels.new_partials(problem.hidden, problem.weight, epilogue, STATS, columns)
    found = []
    for a in range(0, v, columns):
        weight = problem.weight[a : a + columns]
        out = torch.full((n, len(weight) + 5), math.nan, dtype=stored)[:, : len(weight)]
        of_columns = epilogue.sliced(a, a + columns)
        kernels.projection_anchored(
            problem.hidden, weight, problem.targets, of_columns, anchors, out, partials, a
        )
        found.append(out)
    found = torch.cat(found, 1)
    logps, lse, extra = kernels.merge_statistics(partials, problem.targets)
    check_statistics({"logps": logps, "lse": lse} | extra, truth, plain, z, dtype)
    at_target = torch.arange(v) == problem.targets[:, None]
    assert (found[at_target] == 0).all()
    slopes = slopes.masked_fill(at_target, 0)
    relative_to = anchors.double()[:, None]
    check_exponentials(found, math.log(kernels.ANCHORED_SCALE), relative_to, z, slopes, dtype)


@interpreted
def test_anchors_far_below(poison):
    """Finite up to 148 nats above the anchor and beyond; what vanishes is far below."""
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[0.0], [-20.0], [40.0], [100.0], [147.0], [149.0], [3000.0]])
    targets, anchors = torch.tensor([0]), torch.zeros(1)
    for dtype in (torch.float32, torch.bfloat16):
        for last in range(2, 8):
            out = torch.full((1, last), math.nan, dtype=dtype)
            partials = kernels.new_partials(hidden, weight[:last], Epilogue())
            kernels.projection_anchored(
                hidden, weight[:last], targets, Epilogue(), anchors, out, partials, 0
            )
            assert out.isfinite().all()
            found, z = out[0, last - 1].double(), weight[last - 1, 0].double()
            expected = torch.exp(z.clamp(max=148)) * kernels.ANCHORED_SCALE
            torch.testing.assert_close(found, expected, rtol=4e-5 + unit(dtype), atol=0)


@interpreted
def test_a_block_that_the_bias_masks_has_no_exponentials(poison):
    n, v = 5, 200
    problem = of_kind("plain", n, v, 8, torch.float32, bias=True)
    problem.bias[64:128] = -math.inf
    problem.bias[130] = -math.inf
    targets = problem.targets % 64
    epilogue = Epilogue(problem.bias)
    out = torch.full((n, v), math.nan, dtype=torch.float16)
    logps, lse, _, peaks, block = kernels.projection_exponentials(
        problem.hidden, problem.weight, targets, epilogue, out
    )
    assert block == 64
    assert (peaks[:, 1] == -math.inf).all()
    assert (out[:, 64:128] == 0).all()
    assert (out[:, 130] == 0).all()
    assert out.isfinite().all()
    assert logps.isfinite().all()
    assert lse.isfinite().all()


@interpreted
@pytest.mark.parametrize("softcap", [0.05, 5.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softcaps_of_every_size(softcap, dtype, poison):
    problem = make_problem(5, 131, 16, dtype, "plain")
    problem = dataclasses.replace(problem, head={"softcap": softcap})
    truth, _, z, _ = truth_of(problem)
    out = torch.full((5, 131), math.nan, dtype=dtype)
    epilogue = Epilogue(**problem.head)
    logps, lse, _, peaks, block = kernels.projection_exponentials(
        problem.hidden, problem.weight, problem.targets, epilogue, out
    )
    u = unit(dtype) + unit(torch.float64)
    # Of a logit: the product, its factor, tanh and the factor after it, from ln 2 and back to it.
    of_logit = 8 * u * (1 + z.abs().max())
    assert ((lse - truth["lse"]).abs() <= of_logit).all()
    assert ((logps - truth["logps"]).abs() <= 2 * of_logit).all()
    x = problem.hidden.double() @ problem.weight.double().T / softcap
    slopes = torch.cosh(x).square().reciprocal()  # also where 1 − tanh² cancels
    e = torch.exp(z - peaks_of(z, block).repeat_interleave(block, 1)[:, :131])
    error = (out.double() / kernels.SCALE - e * slopes).abs()
    # The slope moves twice as fast as tanh's argument.
    of_product = 2 * of_logit + 8 * u * (1 + x.abs().max())
    assert (error <= of_product * e * slopes + torch.finfo(torch.float32).smallest_normal).all()


@interpreted
def test_exponentials_of_weights_converted_slice_by_slice(monkeypatch, poison):
    """As in autocast: float32 parameters, bf16 products; one tile of 64 columns at a time."""
    problem = of_kind("all", 20, 300, 16, torch.bfloat16, bias=True)
    epilogue, found = Epilogue(problem.bias, **problem.head), []
    monkeypatch.setattr(forward, "_CONVERTED_BYTES", 70 * 16 * 2)
    for hidden, weight in (
        (problem.hidden, problem.weight),
        (problem.hidden.float() * (1 + 2**-12), problem.weight.float()),
    ):
        out = torch.full((20, 300), math.nan, dtype=torch.float16)
        statistics = kernels.projection_exponentials(
            hidden, weight, problem.targets, epilogue, out, dtype=torch.bfloat16
        )
        found.append([out, statistics[0], statistics[1], statistics[3]])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@interpreted
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_no_finite_gradient_of_others(bad, poison):
    problem = make_problem(5, 131, 16, torch.float32, "plain")
    problem.hidden[3, 2] = bad
    out = torch.full((5, 131), math.nan)
    logps, _, _, _, _ = kernels.projection_exponentials(
        problem.hidden, problem.weight, problem.targets, Epilogue(), out
    )
    assert not logps[3].isfinite()
    assert not out[3].isfinite().all()
    others = [0, 1, 2, 4]
    assert logps[others].isfinite().all()
    assert out[others].isfinite().all()


@interpreted
def test_no_rows(poison):
    hidden, weight = torch.randn(0, 8), torch.randn(33, 8)
    targets, out = torch.zeros(0, dtype=torch.int64), torch.empty(0, 33)
    logps, _, extra, peaks, _ = kernels.projection_exponentials(
        hidden, weight, targets, Epilogue(), out, STATS
    )
    assert logps.shape == extra["entropy"].shape == (0,)
    assert peaks.shape == (0, 1)


@interpreted
def test_what_contradicts_itself_is_an_error():
    hidden, weight, targets = torch.randn(3, 8), torch.randn(300, 8), torch.zeros(3).long()
    tiles = kernels.new_partials(hidden, weight, Epilogue(), columns=100)
    library = kernels.new_partials(hidden, weight, Epilogue(), columns=100, by="library")
    products, anchors = torch.randn(3, 100), torch.zeros(3)
    with pytest.raises(ValueError, match="at least one column"):
        kernels.new_partials(hidden, weight, Epilogue(), columns=0)
    with pytest.raises(ValueError, match="'tiles' or 'library'"):
        kernels.new_partials(hidden, weight, Epilogue(), by="both")
    with pytest.raises(ValueError, match="do not end with a block"):
        kernels.slice_statistics(products, targets, Epilogue(), library, 0, out=products.clone())
    with pytest.raises(ValueError, match="multiple of 100"):
        kernels.slice_statistics(products, targets, Epilogue(), library, 50)
    with pytest.raises(ValueError, match="256 columns, got partials of 64"):
        kernels.slice_statistics(products, targets, Epilogue(), tiles, 0)
    arguments = hidden, weight[:100], targets, Epilogue(), anchors
    with pytest.raises(ValueError, match="64 columns, not 256"):
        kernels.projection_anchored(*arguments, products, library, 0)
    with pytest.raises(ValueError, match="do not fit into float16"):
        kernels.projection_anchored(*arguments, products.half(), tiles, 0)


# --- what makes a variant -----------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("architecture", ["sm_90", "sm_86"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_batch_and_no_temperature_is_compiled_for(architecture, softcap, monkeypatch):
    """What the compiler is asked for, without a GPU: one variant of each kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", int(architecture[3:]), 32))
    variants = {}

    def run(kernel, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*args, **kwargs)
        variants.setdefault(kernel.__name__, set()).add(str((specialization, options)))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(configs, "_trial", configs.entries_of(architecture))
    weight = torch.zeros(512, 64, dtype=torch.bfloat16)
    many = torch.zeros(200, 64, dtype=torch.bfloat16)
    labels, floats = torch.zeros(200, dtype=torch.int64), torch.zeros(200)
    products, group = torch.zeros(200, 512), torch.zeros(200, 512, dtype=torch.float16)
    for n, start, temperature in ((1, 0, 1.0), (16, 1, 1.0), (17, 3, 0.7), (128, 7, 1.0)):
        part, epilogue = slice(start, start + n), Epilogue(None, 1.0, softcap, temperature)
        hidden, targets, out = many[:n], labels[part], group[:n]
        given = hidden, weight, targets, epilogue
        kernels.projection_statistics(*given, STATS)
        kernels.projection_statistics(many, weight, targets, epilogue, STATS, labels[part])
        assert len(variants["projection_kernel"]) <= 2  # without and with an index
    variants.clear()
    for n, start, temperature in ((1, 0, 1.0), (16, 1, 1.0), (17, 3, 0.7), (128, 7, 1.0)):
        part, epilogue = slice(start, start + n), Epilogue(None, 1.0, softcap, temperature)
        hidden, targets, out = many[:n], labels[part], group[:n]
        partials = kernels.new_partials(hidden, weight, epilogue, STATS, columns=256)
        anchored = out.view(torch.bfloat16)
        for first in (0, 256):
            kernels.projection_anchored(
                hidden, weight[first : first + 256], targets, epilogue, floats[part],
                anchored[:, :256], partials, first,
            )  # fmt: skip
        kernels.merge_statistics(partials, targets)
        kernels.row_statistics(products[:n], targets, epilogue, STATS)
        kernels.row_gradients_(
            products[:n], targets, floats[part], floats[part], epilogue, torch.bfloat16
        )
    assert {name: len(of_kernel) for name, of_kernel in variants.items()} == {
        "projection_kernel": 1,
        "merge_kernel": 1,
        "row_exponentials_kernel": 1,
        "row_gradients_kernel": 1,
    }
