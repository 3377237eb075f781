"""The kernels of the backward pass, interpreted on the CPU, against float64.

As in test_triton_interpreter.py: a process of its own, sizes that end blocks early, NaN beside
every operand and in whatever is uninitialised, and error budgets that follow from the roundings.
"""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
import triton
import triton.language as tl
from fastpref_kernels import Epilogue, configs
from fastpref_kernels.primitives import joined, one_minus_exp, split

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of −inf − −inf


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


U16, U32 = 2.0**-11, 2.0**-24  # half the distance of neighbours, relative
TINY16 = 2.0**-25  # and absolute, where fp16 is subnormal
S = kernels.SCALE


def embedded(tensor):
    """The same values inside a larger tensor, in rows that lie apart, NaN (or 77) around."""
    fill = math.nan if tensor.is_floating_point() else 77
    around = torch.full([n + 3 for n in tensor.shape], fill, dtype=tensor.dtype)
    return around[tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)


def draw(seed):
    return torch.Generator().manual_seed(seed)


# --- split numbers ------------------------------------------------------------------------------


def halves(x):
    """The definition on float32's bits, in torch."""
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32))
    kept = (bits + 0x80) >> 8
    high = (kept + 0x80) >> 8
    return high.to(torch.int16).view(torch.bfloat16), (kept - (high << 8)).to(torch.int8)


def whole(high, low):
    upper = high.view(torch.int16).to(torch.int32)
    return (((upper << 8) + low.to(torch.int32)) << 8).view(torch.float32)


@triton.jit
def split_kernel(x_ptr, high_ptr, low_ptr, back_ptr, BLOCK: tl.constexpr):
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, low = split(tl.load(x_ptr + where))
    tl.store(high_ptr + where, high)
    tl.store(low_ptr + where, low)
    tl.store(back_ptr + where, joined(high, low))


def every_kind_of_float():
    """All exponents and signs, with mantissas at and around each place where something rounds."""
    ends = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8080, 0xFF80]
    mantissas = torch.tensor([*ends, 0x7F0000, 0x7F7F7F, 0x7F7F80, 0x7FFF7F, 0x7FFF80, 0x7FFFFF])
    drawn = torch.randint(0, 2**23, (109,), generator=draw(0))
    signs_and_exponents = torch.arange(512) << 23
    bits = signs_and_exponents[:, None] + torch.cat([mantissas, drawn])
    return bits.flatten().to(torch.int32).view(torch.float32)


@interpreted
def test_split_numbers_bit_for_bit():
    x = every_kind_of_float()
    high, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int8)
    back = torch.empty_like(x)
    split_kernel[(len(x) // 4096,)](x, high, low, back, BLOCK=4096)
    expected = halves(x)
    assert torch.equal(high.view(torch.int16), expected[0].view(torch.int16))
    assert torch.equal(low, expected[1])
    assert torch.equal(back.view(torch.int32), whole(*expected).view(torch.int32))


def test_split_numbers_keep_24_bits_of_which_16_are_bf16():
    """15 bits behind the first and one before it: half of the last is 2^-16, of bf16 2^-8."""
    x = every_kind_of_float()
    x = x[x.isfinite()]
    high, low = halves(x)
    normal = (x.abs() >= 2.0**-126) & high.isfinite()
    back = whole(high, low)
    assert ((back - x).abs() <= 2.0**-16 * x.abs())[normal].all()
    assert ((back - x).abs() <= 2.0**-142).logical_or(x.abs() >= 2.0**-126).all()
    nearest = x.to(torch.bfloat16)
    assert ((high.double() - x).abs() <= 2.0**-8 * (1 + 2.0**-8) * x.double().abs())[normal].all()
    # Ties, and what the 24 bits make one of them, go away from zero.
    differs = (high != nearest) & (normal)
    tie = (x.view(torch.int32) & 0xFFFF) - 0x8000
    assert (tie[differs].abs() <= 0x80).all()
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    assert torch.equal(whole(*halves(special)).view(torch.int32), special.view(torch.int32))
    assert whole(*halves(torch.tensor([math.nan]))).isnan().all()


@triton.jit
def one_minus_exp_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    where = tl.arange(0, BLOCK)
    tl.store(out_ptr + where, one_minus_exp(tl.load(x_ptr + where)))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_minus_exp(dtype):
    x = -torch.logspace(-12, 2, 1021, dtype=dtype)
    x = torch.cat([x, torch.tensor([-math.inf, 0.0, 1e-7], dtype=dtype)])
    found = torch.empty_like(x)
    one_minus_exp_kernel[(1,)](x, found, BLOCK=1024)
    # tanh within 2 roundings and the argument's, then 3 operations: 8 at the very most.
    truth = -torch.expm1(x.double())
    allowed = 8 * (torch.finfo(dtype).eps / 2) * truth.abs()
    assert ((found.double() - truth).abs() <= allowed).all()


# --- gradients in place of exponentials ---------------------------------------------------------


def make_exponentials(n, v, block, dtype, *, softcap=None, seed=0, bias=None):
    """What a projection leaves, its exact values, and the gradient in float64 times S."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = 4 * torch.randn(n, v, generator=draw(seed), dtype=torch.float64)
    slope = torch.ones_like(z)
    if softcap:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    if bias is not None:
        z = z + bias
    targets = torch.randint(0, v, (n,), generator=draw(seed + 1))
    if bias is not None:
        targets = torch.where(bias[targets] == 0, targets, bias.argmax())
    logps, lse = z.log_softmax(-1), z.logsumexp(-1)
    of_targets = logps.gather(1, targets[:, None]).squeeze(1)
    padded = torch.nn.functional.pad(z, (0, -v % block), value=-math.inf)
    peaks = padded.view(n, -1, block).amax(-1).to(wide)
    anchor = peaks.double().repeat_interleave(block, 1)[:, :v]
    exponentials = S * torch.exp(z - anchor) * slope
    exponentials = exponentials.nan_to_num(0.0).to(dtype)  # of a masked block: −inf − −inf
    grad = -S * logps.exp() * slope
    slopes = slope.gather(1, targets[:, None]).squeeze(1)
    at_target = -S * torch.expm1(of_targets) * slopes
    grad.scatter_(1, targets[:, None], at_target[:, None])
    values = of_targets.to(wide), lse.to(wide)
    return exponentials, peaks, targets, *values, slopes.to(wide) if softcap else None, grad


def check_gradients(n, v, block, dtype, *, transposed=True, **how):
    given = make_exponentials(n, v, block, dtype, **how)
    exponentials, peaks, targets, logps, lse, slopes, grad = given
    coef = torch.randn(n, generator=draw(9)).to(lse.dtype)
    coef[::3] = 0
    dead = coef == 0
    buffer = embedded(exponentials)
    buffer[dead] = math.nan
    peaks = peaks.clone()
    peaks[dead] = math.nan
    peaks = embedded(peaks.T).T if transposed else peaks
    kernels.gradients_(buffer, peaks, block, targets, logps, lse, coef, slopes)
    assert (buffer[dead] == 0).all()
    assert buffer._base[:, v:].isnan().all() and buffer._base[n:].isnan().all()
    # E and G are rounded once each, and lse by |lse|·u; the exponent's error is that of its
    # exponential. At the target there is one rounding, and logp's of |logp|·u.
    u = {torch.float16: U16, torch.float32: U32, torch.float64: 2.0**-53}[dtype]
    wide = U32 if dtype != torch.float64 else 2.0**-53
    of_exponent = 2 * wide * (lse.abs() + peaks.nan_to_num(0, 0, 0).abs().amax(1) + 4).double()
    allowed = (2 * u + of_exponent[:, None]) * grad.abs()
    if dtype == torch.float16:
        allowed += 2 * TINY16
    p = 1 - grad.gather(1, targets[:, None]).abs() / S
    at_target = (u + 12 * wide) * grad.abs() + wide * (S * p * logps.double().abs()[:, None])
    is_target = torch.arange(v) == targets[:, None]
    allowed = torch.where(is_target, at_target + TINY16 * (dtype == torch.float16), allowed)
    error = (buffer.double() - grad).abs()
    assert (error <= allowed)[~dead].all(), (error - allowed)[~dead].max()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_in_place_of_exponentials(dtype, softcap, poison):
    check_gradients(19, 517, 64, dtype, softcap=softcap)


# A program's block is 256 columns: it holds several peaks, one, or a part of one.
@interpreted
@pytest.mark.parametrize("block", [1, 64, 256, 512])
@pytest.mark.parametrize("v", [1, 63, 65, 256, 257, 600])
def test_gradients_at_the_ends_of_blocks(v, block, poison):
    for n in (1, 4):
        check_gradients(n, v, block, torch.float64, transposed=n == 1)


@interpreted
def test_gradients_of_a_block_that_the_bias_masks(poison):
    """Its exponentials are not even read."""
    bias = torch.zeros(300, dtype=torch.float64)
    bias[64:192] = -math.inf
    check_gradients(7, 300, 64, torch.float16, bias=bias)
    exponentials, peaks, *rest, slopes, _ = make_exponentials(7, 300, 64, torch.float16, bias=bias)
    exponentials[:, 64:192] = math.nan
    targets, logps, lse = rest
    kernels.gradients_(exponentials, peaks, 64, targets, logps, lse, torch.ones(7), slopes)
    assert (exponentials[:, 64:192] == 0).all()
    assert exponentials.isfinite().all()


@interpreted
def test_the_targets_gradient_of_a_confident_token():
    """1 − p is a thousandth of what fp16 knows of p."""
    exponentials = torch.tensor([[S, 0.01, 0.0]], dtype=torch.float16)
    logps = torch.tensor([-3e-7])
    given = torch.zeros(1, 1), 4, torch.tensor([0]), logps, torch.tensor([3e-7]), torch.ones(1)
    kernels.gradients_(exponentials, *given)
    expected = -S * torch.expm1(logps.double())
    assert (exponentials[0, 0].double() - expected).abs() <= U16 * expected + TINY16


@interpreted
def test_gradients_of_what_is_not_finite():
    """A NaN of a row stays in the row; a NaN coefficient does not make the row dead."""
    exponentials, peaks, targets, logps, lse, _, _ = make_exponentials(5, 70, 64, torch.float16)
    given = exponentials.clone()
    logps[0], lse[1], peaks[2, 1] = math.nan, math.nan, math.nan
    coef = torch.tensor([1.0, 1.0, 1.0, math.nan, 1.0])
    kernels.gradients_(given, peaks, 64, targets, logps, lse, coef)
    is_target = torch.arange(70) == targets[:, None]
    assert torch.equal(given[0].isnan(), is_target[0])
    assert given[1][~is_target[1]].isnan().all()
    assert torch.equal(given[2].isnan(), (torch.arange(70) >= 64) & ~is_target[2])
    assert given[3:].isfinite().all() and (given[3:] != 0).any(1).all()


@interpreted
def test_a_target_among_other_columns_is_nobodys(poison):
    exponentials, peaks, targets, logps, lse, _, _ = make_exponentials(4, 70, 64, torch.float32)
    targets = torch.tensor([-1, 70, -100, 10**9])
    buffer = embedded(exponentials)
    kernels.gradients_(buffer, peaks, 64, targets, logps, lse, torch.ones(4))
    assert (buffer <= 0).all()
    around = buffer._base
    assert around[:, 70:].isnan().all() and around[4:].isnan().all()


@interpreted
def test_gradients_refuse_what_describes_no_peaks():
    row = torch.zeros(2)
    given = torch.zeros(2, dtype=torch.int64), row, row, row
    with pytest.raises(ValueError, match="power of two, got 48"):
        kernels.gradients_(torch.zeros(2, 70), torch.zeros(2, 2), 48, *given)
    with pytest.raises(ValueError, match=r"\(2, 2\), got \(2, 3\)"):
        kernels.gradients_(torch.zeros(2, 70), torch.zeros(2, 3), 64, *given)
    kernels.gradients_(torch.zeros(0, 70), torch.zeros(0, 2), 64, *(x[:0] for x in given))


@interpreted
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_in_fp16_of_fitted_coefficients_are_finite(entropy, poison):
    """A coefficient of 2^15 is the largest, and a gradient at most that: half of fp16's range."""
    n, v = 5, 300
    products = 30 * torch.randn(n, v, generator=draw(2))
    targets = products.argmin(-1)  # of probability 0
    logps, lse, found = kernels.row_statistics(products, targets, Epilogue(), ("entropy",))
    coef = torch.tensor([S, -S, S, 0.0, 1.0])
    of_entropy = (found["entropy"], torch.zeros(n)) if entropy else None
    p = products.double().softmax(-1)
    expected = coef.double()[:, None] * ((torch.arange(v) == targets[:, None]).double() - p)
    buffer = embedded(products)
    given = buffer, targets, lse, coef, Epilogue(), torch.float16
    grad = kernels.row_gradients_(*given, entropy=of_entropy)
    assert grad.dtype == torch.float16 and grad.data_ptr() == buffer.data_ptr()
    assert grad.isfinite().all() and grad.abs().max() == S
    # One rounding, and of an exponent of up to 2·max|z| one in fp32.
    budget = (U16 + 4 * U32 * products.abs().max()) * expected.abs() + TINY16
    assert ((grad.double() - expected).abs() <= budget).all()


# --- the head's gradient ------------------------------------------------------------------------


def make_operands(n, v, h, seed=0):
    gradient = (S / 8 * torch.randn(n, v, generator=draw(seed))).half()
    rows = (S / 8 * torch.randn(n, h, generator=draw(seed + 1))).half()
    return gradient, rows


def new_total(v, h, dtype, fill=math.nan):
    """A total, uninitialised, and one row more behind it."""
    high = torch.full((v + 1, h), fill, dtype=torch.bfloat16 if dtype == "halves" else dtype)
    low = torch.full((v + 1, h), 77, dtype=torch.int8)[:v] if dtype == "halves" else None
    return high[:v], low


def value_of(high, low):
    return high.double() if low is None else whole(high, low).double()


UNITS = {"halves": 2.0**-16, torch.bfloat16: 2.0**-8, torch.float16: U16, torch.float32: U32}


def check_total(found, old, gradient, rows, scale, unit, tiny=0.0):
    """n products summed in fp32, in any order, their total scaled, added and rounded."""
    product = scale * gradient.double().T @ rows.double()
    magnitude = scale * gradient.double().abs().T @ rows.double().abs()
    truth = old + product
    allowed = U32 * ((len(rows) + 1) * magnitude + truth.abs()) + unit * truth.abs() + tiny
    allowed += unit * U32 * (len(rows) + 2) * magnitude
    assert ((found - truth).abs() <= allowed).all(), ((found - truth).abs() - allowed).max()


@pytest.fixture
def by(request):
    """Who multiplies for the head's gradient."""
    with configs.trial({("choices", "weight_gradient"): request.param}):
        yield


@interpreted
@pytest.mark.parametrize("by", ["tiles", "library"], indirect=True)
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("add", [False, True])
def test_weight_gradient(add, dtype, by, monkeypatch, poison):
    monkeypatch.setattr("fastpref_kernels.weight_gradient._SLICE_BYTES", 4 * 70 * 50)
    n, v, h = 37, 131, 70  # blocks are 16 × 32 × 64
    gradient, rows = make_operands(n, v, h)
    scale, tiny = 2.0**-24, 2.0**-25 if dtype == torch.float16 else 0.0
    old = 30 * torch.randn(v, h, generator=draw(5))
    high, low = new_total(v, h, dtype)
    if add and dtype == "halves":
        high.copy_(halves(old)[0])
        low.copy_(halves(old)[1])
    elif add:
        high.copy_(old)
    before = value_of(high, low) if add else 0.0
    given = embedded(gradient), embedded(rows), torch.tensor(scale)
    kernels.add_weight_gradient_(high, low, *given, add)
    check_total(value_of(high, low), before, gradient, rows, scale, UNITS[dtype], tiny)
    assert high._base[v:].isnan().all() and (low is None or (low._base[v:] == 77).all())


# Blocks are 16 rows × 32 columns × 64 hidden, bands 16 blocks of hidden.
@interpreted
@pytest.mark.parametrize(
    ("n", "v", "h"),
    [(1, 1, 1), (15, 31, 63), (16, 32, 64), (17, 33, 65), (48, 5, 129), (3, 33, 1100)],
)
@pytest.mark.parametrize("descriptors", [False, True])
def test_weight_gradient_at_the_ends_of_blocks(n, v, h, descriptors, monkeypatch, poison):
    from dataclasses import replace

    from fastpref_kernels import weight_gradient

    described = []
    launch = weight_gradient._multiply
    monkeypatch.setattr(
        weight_gradient,
        "_multiply",
        lambda *args: (described.append(args[-1].descriptors), launch(*args)),
    )
    described_by = {}
    for variant in ("plain", "pointers"):
        key = "weight_gradient", variant
        described_by[key] = replace(
            configs.entries_of("interpreter")[key], descriptors=descriptors and variant == "plain"
        )
    gradient, rows = make_operands(n, v, h)
    if descriptors:  # rows that begin at multiples of 16 bytes, as descriptors ask for
        gradient = torch.nn.functional.pad(gradient, (0, -v % 8 + 8), value=math.nan)[:, :v]
        rows = torch.nn.functional.pad(rows, (0, -h % 8 + 8), value=math.nan)[:, :h]
    else:
        gradient, rows = embedded(gradient), embedded(rows)
    scale = torch.tensor(2.0**-20)
    high, low = new_total(v, h, "halves")
    with configs.trial(described_by):
        kernels.add_weight_gradient_(high, low, gradient, rows, scale, add=False)
        first = value_of(high, low)
        check_total(first, 0.0, gradient, rows, scale.item(), UNITS["halves"])
        kernels.add_weight_gradient_(high, low, gradient, rows, scale, add=True)
    check_total(value_of(high, low), first, gradient, rows, scale.item(), UNITS["halves"])
    assert described == [descriptors] * 2


@interpreted
def test_weight_gradient_of_no_rows():
    gradient, rows = make_operands(0, 33, 5)
    for dtype in UNITS:
        high, low = new_total(33, 5, dtype)
        kernels.add_weight_gradient_(high, low, gradient, rows, torch.tensor(1.0), add=False)
        assert (value_of(high, low) == 0).all()
        high.fill_(2.0)
        kernels.add_weight_gradient_(high, low, gradient, rows, torch.tensor(1.0), add=True)
        assert (high == 2).all()


@interpreted
@pytest.mark.parametrize("by", ["tiles", "library"], indirect=True)
def test_eight_groups_in_24_bits_round_as_one_does(by):
    """And eight in bf16 alone do not: what the remainder is for.

    One rounding to bf16 has a relative error of 1.66e-3 in the mean square, whatever the numbers;
    the groups' own rounding, 2^-8 of it, is lost in that.
    """
    n, v, h = 40, 96, 64
    truth = torch.zeros(v, h, dtype=torch.float64)
    split_total, plain = new_total(v, h, "halves"), new_total(v, h, torch.bfloat16)
    scale = torch.tensor(2.0**-30)
    for group in range(8):
        gradient, rows = make_operands(n, v, h, seed=10 * group)
        truth += scale.double() * gradient.double().T @ rows.double()
        for total in (split_total, plain):
            kernels.add_weight_gradient_(*total, gradient, rows, scale, add=group > 0)

    def error(found):
        return ((found.double() - truth).norm() / truth.norm()).item()

    once = error(truth.to(torch.bfloat16))
    assert 1.5e-3 < once < 1.8e-3
    assert error(split_total[0]) <= 1.1 * once
    assert error(plain[0]) > 1.25 * once
    assert error(value_of(*split_total)) <= once / 50


@interpreted
def test_a_sum_that_is_not_finite_shows(monkeypatch):
    gradient, rows = make_operands(3, 33, 5)
    gradient[1, 7] = math.inf
    high, low = new_total(33, 5, "halves")
    kernels.add_weight_gradient_(high, low, gradient, rows, torch.tensor(1.0), add=False)
    others = torch.arange(33) != 7
    assert not value_of(high, low)[7].isfinite().any()
    assert value_of(high, low)[others].isfinite().all()
    kernels.add_weight_gradient_(high, low, gradient, rows, torch.tensor(math.nan), add=True)
    assert value_of(high, low).isnan().all()


@interpreted
@pytest.mark.parametrize("rows", [0, 1, 31, 33])
@pytest.mark.parametrize("dtype", UNITS)
def test_accumulate(dtype, rows, poison):
    """A slice of the gradient, at 2,048 elements a block."""
    product = torch.randn(rows, 64, generator=draw(3))
    high, low = new_total(40, 64, dtype)
    part = slice(5, 5 + rows)
    halves_of_it = high[part], None if low is None else low[part]
    scale = torch.tensor(0.375)
    kernels.accumulate_(*halves_of_it, product, scale, add=False)
    kernels.accumulate_(*halves_of_it, product, scale, add=True)
    truth = 0.75 * product.double()
    # Two roundings to the total's numbers, of which the first is of half the size.
    allowed = (1.5 * UNITS[dtype] * (1 + 2**-6) + 3 * U32) * truth.abs() + 2**-24
    assert ((value_of(*halves_of_it) - truth).abs() <= allowed).all()
    assert high[:5].isnan().all() and high[5 + rows :].isnan().all()


@interpreted
def test_totals_refuse_what_are_no_halves():
    low = torch.zeros(2, 3, dtype=torch.int8)
    given = torch.zeros(2, 3), torch.tensor(1.0), True
    with pytest.raises(ValueError, match="bfloat16 and int8, got torch.float32 and torch.int8"):
        kernels.accumulate_(torch.zeros(2, 3), low, *given)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(1, 3\)"):
        kernels.accumulate_(torch.zeros(2, 3).bfloat16(), low[:1], *given)


# --- gradients of hidden states -----------------------------------------------------------------


def make_hidden_problem(n, v, h, dtype, *, seed=0, size=1.0):
    """Gradient, head and factors, and where rows of `2n + 1` are to be kept."""
    gradient = (S / 8 * torch.randn(n, v, generator=draw(seed))).half()
    weight = (size * torch.randn(v, h, generator=draw(seed + 1))).to(dtype)
    factor = torch.randn(n, generator=draw(seed + 2)) / S
    factor[1::4] = 0
    index = torch.randperm(2 * n + 1, generator=draw(seed + 3))[:n]
    return gradient, weight, factor, index


def new_kept(n, h, dtype):
    """Rows among which a gradient's will be, and room for remainders."""
    high = torch.full((2 * n + 1, h), 3.0, dtype=torch.bfloat16 if dtype == "halves" else dtype)
    low = torch.full((n + 1, h), 77, dtype=torch.int8)[:n] if dtype == "halves" else None
    return embedded(high), low


def fp16_of(weight, compute_dtype, bound):
    """The operand as `fitted` makes it, exactly, and what its products are divided by."""
    power = 1.0 if bound is None else power_of(bound.item())
    return (weight.to(compute_dtype).double() * power).half(), power


def check_hidden_gradient(
    n,
    v,
    h,
    *,
    dtype=torch.bfloat16,
    compute_dtype=torch.bfloat16,
    kept="halves",
    lay=embedded,
    **how,
):
    gradient, weight, factor, index = make_hidden_problem(n, v, h, dtype, **how)
    bound = None if compute_dtype == torch.float16 else weight.abs().max()
    high, low = new_kept(n, h, kept)
    kernels.hidden_gradient_(
        lay(gradient), lay(weight), bound, factor, high, low, index, compute_dtype
    )
    operand, power = fp16_of(weight, compute_dtype, bound)
    factors = factor.double()[:, None] / power
    truth = factors * (gradient.double() @ operand.double())
    magnitude = factors.abs() * (gradient.double().abs() @ operand.double().abs())
    found, unit = value_of(high[index], low), UNITS[kept]
    # V products summed in fp32, in any order, times two numbers, and rounded once.
    of_sum = U32 * (v + 3) * magnitude
    allowed = of_sum + unit * (truth.abs() + of_sum)
    if kept == torch.float16:
        allowed += TINY16
    error = (found - truth).abs()
    assert (error <= allowed).all(), (error - allowed).max()
    assert (found[factor == 0] == 0).all()
    others = torch.ones(2 * n + 1, dtype=torch.bool).index_fill(0, index, False)
    assert (high[others] == 3).all() and (low is None or (low._base[n:] == 77).all())
    assert high._base[:, h:].isnan().all()
    # And the fitting itself: of the head as it is rounded for the forward.
    exact = factor.double()[:, None] * (gradient.double() @ weight.to(compute_dtype).double())
    assert found.numel() == 0 or (found - exact).norm() <= (U16 + unit) * exact.norm() + 1e-30


HEADS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
]


@interpreted
@pytest.mark.parametrize("kept", UNITS)
@pytest.mark.parametrize(("dtype", "compute_dtype"), HEADS)
def test_hidden_gradient(dtype, compute_dtype, kept, poison):
    check_hidden_gradient(37, 131, 70, dtype=dtype, compute_dtype=compute_dtype, kept=kept)


def described(tensor):
    """Rows that begin at multiples of 16 bytes, as descriptors ask for, NaN between."""
    apart = -tensor.shape[1] % 8 + 8
    padded = torch.nn.functional.pad(tensor, (0, apart, 0, 3), value=math.nan)
    return padded[: len(tensor), : tensor.shape[1]]


# Blocks are 32 rows × 64 columns × 32 hidden, or 16 rows, bands 8 blocks of rows.
@interpreted
@pytest.mark.parametrize(
    ("n", "v", "h"),
    [(1, 1, 1), (15, 63, 31), (16, 64, 32), (33, 65, 33), (48, 5, 129), (300, 66, 40)],
)
@pytest.mark.parametrize("descriptors", [False, True])
def test_hidden_gradient_at_the_ends_of_blocks(n, v, h, descriptors, monkeypatch, poison):
    from dataclasses import replace

    from fastpref_kernels import hidden_gradient

    used = []
    kernel = hidden_gradient.hidden_gradient_kernel
    spy = {
        "__getitem__": lambda _, grid: (
            lambda *a, **k: (used.append((grid, k)), kernel[grid](*a, **k))
        )
    }
    monkeypatch.setattr(hidden_gradient, "hidden_gradient_kernel", type("Spy", (), spy)())
    entries = {}
    for variant in ("plain", "small"):
        key = "hidden_gradient", variant
        entries[key] = replace(configs.entries_of("interpreter")[key], descriptors=descriptors)
    lay = described if descriptors else embedded
    dtype = torch.float32 if descriptors else torch.bfloat16  # NumPy describes no bfloat16
    with configs.trial(entries):
        check_hidden_gradient(n, v, h, dtype=dtype, lay=lay)
        check_hidden_gradient(n, v, h, dtype=torch.float16, compute_dtype=torch.float16, lay=lay)
    # 3 processors: one large tile would leave two of them without work.
    blocks = -(-n // 32) * -(-h // 32)
    for grid, given in used:
        assert given["HAS_DESCRIPTORS"] == descriptors
        assert given["BLOCK_N"] == (16 if blocks < 2 else 32)
        assert grid == (-(-n // given["BLOCK_N"]) * -(-h // 32),)
    assert len(used) == 2


@interpreted
@pytest.mark.parametrize("size", [0.0, 1e-25, 3e-4, 1e25])
def test_hidden_gradient_of_heads_of_any_size(size):
    """Exponents of sums stay within fp32's, whatever the power of two."""
    check_hidden_gradient(5, 70, 33, size=size, dtype=torch.bfloat16, kept=torch.float32)


@interpreted
def test_hidden_gradient_of_what_is_not_finite():
    """What is NaN stays in its row, its column or, of a bound, nowhere."""
    gradient, weight, factor, index = make_hidden_problem(5, 70, 33, torch.bfloat16)
    bound = weight.abs().max()
    gradient[0, 3] = math.nan
    factor[2] = math.nan
    gradient[3], factor[3] = 1.0, 0.0
    weight[69, 32] = math.nan
    high, low = new_kept(5, 33, "halves")
    kernels.hidden_gradient_(gradient, weight, bound, factor, high, low, index, torch.bfloat16)
    found = value_of(high[index], low)
    assert found[[0, 2]].isnan().all() and found[:, 32].isnan().all()
    assert found[[1, 3, 4], :32].isfinite().all() and (found[3, :32] == 0).all()
    for unusable in (math.nan, math.inf, -1.0):
        given = gradient, weight, torch.tensor(unusable), factor
        kernels.hidden_gradient_(*given, high, low, index, torch.bfloat16)
        assert value_of(high[index], low).isnan().all()


@interpreted
def test_hidden_gradient_of_no_rows():
    gradient, weight, factor, index = make_hidden_problem(0, 70, 33, torch.bfloat16)
    for dtype in UNITS:
        high, low = new_kept(0, 33, dtype)
        given = gradient, weight, torch.tensor(4.0), factor, high, low, index
        kernels.hidden_gradient_(*given, torch.bfloat16)
        assert (high == 3).all()


@interpreted
def test_hidden_gradient_refuses_what_contradicts_itself():
    gradient, weight, factor, index = make_hidden_problem(4, 70, 33, torch.bfloat16)
    high, low = new_kept(4, 33, "halves")
    one, half = torch.tensor(1.0), torch.bfloat16

    def refuses(message, gradient=gradient, bound=one, factor=factor, low=low, dtype=half):
        with pytest.raises(ValueError, match=message):
            kernels.hidden_gradient_(gradient, weight, bound, factor, high, low, index, dtype)

    refuses("float16, got torch.float32", gradient=gradient.float())
    refuses("not to torch.float32", dtype=torch.float32)
    refuses("torch.bfloat16 is fitted to float16: give the bound", bound=None)
    refuses("have 4, 3 and 4 rows", factor=factor[:3])
    refuses(r"shape \(4, 33\), got \(3, 33\)", low=low[:3])
    assert (high == 3).all()


@pytest.mark.parametrize(("rows", "hidden_size", "small"), [(512, 2048, True), (2048, 4096, False)])
def test_few_rows_get_small_tiles(rows, hidden_size, small, monkeypatch):
    """32 large tiles would leave a hundred of 132 processors without one."""
    from fastpref_kernels import hidden_gradient

    monkeypatch.setattr(hidden_gradient, "_processors", lambda _: 132)
    found = hidden_gradient._configuration(rows, hidden_size, "sm_90", True)
    assert found == configs.hidden_gradient_config("sm_90", small=small)
    assert (hidden_gradient._tiles(rows, hidden_size, found) >= 128) and found.descriptors


# --- operands, and gradients of hidden states ---------------------------------------------------


def power_of(bound):
    if bound == 0:
        return 2.0**14
    return 2.0 ** min(max(14 - (math.frexp(bound)[1] - 1), -100), 100)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("has_factor", [False, True])
@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize(("n", "h"), [(1, 1), (16, 256), (19, 257)])  # blocks are 16 × 256
def test_fitted(n, h, has_index, has_factor, dtype, poison):
    x = torch.randn(2 * n if has_index else n, h, generator=draw(1)).to(dtype)
    index = torch.randperm(2 * n, generator=draw(2))[:n] if has_index else None
    picked = x if index is None else x[index]
    if has_index:
        x[torch.ones(2 * n, dtype=torch.bool).index_fill(0, index, False)] = math.nan
    bound = picked.abs().max()
    factor = 1e-6 * torch.randn(n, generator=draw(3)) if has_factor else None
    factor_bound = factor.abs().max() if has_factor else None
    found, inverse = kernels.fitted(embedded(x), bound, index, factor, factor_bound)
    product, largest = picked.double(), bound.item()
    if has_factor:
        product, largest = product * factor.double()[:, None], largest * factor_bound.item()
    power = power_of(largest)
    assert found.dtype == torch.float16 and inverse.dtype == torch.float32
    assert inverse.shape == () and inverse.item() == 1 / power
    truth = power * product
    assert 2**14 <= largest * power < 2**15
    if not has_factor:
        assert torch.equal(found, truth.half() if dtype == torch.float64 else truth.float().half())
        assert found.abs().max() >= 2**14
    # x·factor is rounded to fp32, the result to fp16.
    allowed = (U16 + 2 * U32) * truth.abs() + TINY16 * (1 + U16)
    assert ((found.double() - truth).abs() <= allowed).all()


@interpreted
@pytest.mark.parametrize(
    "bound", [0.0, 1e-45, 2.0**-87, 2.0**-86, 0.99999994, 1.0, 1.9999999, 2.0, 65504.0, 3e38]
)
def test_the_power_of_every_bound(bound):
    x = torch.tensor([[bound, -bound, 0.0]])
    found, inverse = kernels.fitted(x, torch.tensor(bound))
    power = power_of(torch.tensor(bound).item())
    assert inverse.item() == 1 / power
    assert torch.equal(found, (x.double() * power).half())


@interpreted
def test_the_power_of_two_bounds_is_that_of_their_product():
    """Which may be none of float32's."""
    for one, other in ((1e-30, 1e-20), (1e30, 1e30), (0.0, 3.0), (3.0, 0.0), (1.5, 1.5)):
        x, factor = torch.tensor([[one]]), torch.tensor([other])
        found, inverse = kernels.fitted(x, x.amax(), None, factor, factor.amax())
        assert inverse.item() == 1 / power_of(x.double().item() * factor.double().item())
        assert (found == 0).all() == (one * other < 1e-44)


@interpreted
@pytest.mark.parametrize("bound", [math.nan, math.inf, -1.0])
def test_no_bound_is_nan_and_not_a_number(bound):
    x = torch.tensor([[1.0, 0.0, -2.0]])
    for pair in ((bound, 1.0), (1.0, bound)):
        bounds = [torch.tensor(b) for b in pair]
        found, inverse = kernels.fitted(x, bounds[0], None, torch.ones(1), bounds[1])
        assert found.isnan().all() and inverse.isnan()


@interpreted
def test_fitted_rows_that_are_nan_stay_so_and_others_do_not_care():
    x = torch.ones(5, 7)
    x[2], x[3, 1] = math.nan, math.inf
    found, _ = kernels.fitted(x, torch.tensor(1.0))
    assert found[2].isnan().all() and found[3, 1] == math.inf
    assert found[[0, 1, 4]].eq(2**14).all()


@interpreted
def test_fitted_of_no_rows_and_of_half_a_factor(poison):
    found, inverse = kernels.fitted(torch.zeros(0, 8), torch.tensor(4.0))
    assert found.shape == (0, 8) and inverse == 2.0**-12
    with pytest.raises(ValueError, match="give both or neither"):
        kernels.fitted(torch.zeros(1, 8), torch.tensor(4.0), None, torch.ones(1))


@interpreted
@pytest.mark.parametrize(("n", "h"), [(0, 8), (1, 1), (16, 256), (19, 257)])
def test_gradients_kept_and_taken(n, h, poison):
    wide = torch.randn(n, h, generator=draw(1))
    index = torch.randperm(2 * n + 1, generator=draw(2))[:n]
    high = embedded(torch.full((2 * n + 1, h), 3.0, dtype=torch.bfloat16))
    low = torch.full((n, h), 77, dtype=torch.int8)
    kernels.keep_(wide, high, low, index)
    expected = halves(wide)
    assert torch.equal(high[index], expected[0]) and torch.equal(low, expected[1])
    others = torch.ones(2 * n + 1, dtype=torch.bool).index_fill(0, index, False)
    assert (high[others] == 3).all()

    coef, upstream = torch.randn(n, generator=draw(3)), torch.tensor(-0.3)
    kept = high.clone()
    out = torch.full((2 * n + 1, h), 5.0, dtype=torch.bfloat16)
    kernels.take_(high, low, index, coef, upstream, out)
    assert torch.equal(high, kept)
    truth = whole(*expected).double() * coef.double()[:, None] * upstream.double()
    kernels.take_(high, low, index, coef, upstream)
    for found, left in ((out, 5), (high, 3)):
        # Two products in fp32 and one rounding to bf16.
        error = (found[index].double() - truth).abs()
        assert (error <= (2.0**-8 * (1 + 2**-8) + 3 * U32) * truth.abs()).all()
        assert (found[others] == left).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_wide_gradients_taken(dtype, poison):
    high = torch.randn(6, 9, generator=draw(1)).to(dtype)
    given, index = high.clone(), torch.tensor([4, 0, 3])
    coef, upstream = torch.tensor([2.0, -3.0, 0.5]).to(high.dtype), torch.tensor(0.7)
    kernels.take_(high, None, index, coef, upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = given[index].to(wide) * coef.to(wide)[:, None] * upstream.to(wide)
    assert torch.equal(high[index], expected.to(dtype))
    assert torch.equal(high[[1, 2, 5]], given[[1, 2, 5]])


@interpreted
def test_kept_gradients_refuse_what_are_no_halves():
    index, low = torch.tensor([0]), torch.zeros(1, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="bfloat16 and int8, got torch.float16"):
        kernels.keep_(torch.zeros(1, 3), torch.zeros(2, 3).half(), low, index)
    with pytest.raises(ValueError, match=r"shape \(1, 3\), got \(2, 3\)"):
        low = torch.zeros(2, 3, dtype=torch.int8)
        one = torch.tensor(1.0)
        kernels.take_(torch.zeros(2, 3).bfloat16(), low, index, one[None], one)


# --- scaling ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("size", [(0,), (1,), (4096,), (70, 61)])
@pytest.mark.parametrize("upstream", [1.0, -0.3])
def test_scaling_of_halves(size, upstream, poison):
    wide = torch.randn(size, generator=draw(1))
    high, low = halves(wide)
    given, remainder = high.clone(), low.clone()
    factor = torch.tensor(upstream)
    assert kernels.scaled(high, factor, torch.bfloat16, low) is high
    expected = (whole(given, remainder) * factor).to(torch.bfloat16)
    assert torch.equal(high, given if upstream == 1 else expected)
    assert torch.equal(low, remainder)
    wider = kernels.scaled(given, factor, torch.float32, low)
    assert torch.equal(wider, whole(given, remainder) * factor)


@interpreted
def test_scaling_of_half_precision_is_not_in_half_precision():
    grad = torch.randn(5000, generator=draw(1)).to(torch.bfloat16)
    factor = torch.tensor(1.01)
    expected = (grad.float() * factor).to(torch.bfloat16)
    assert torch.equal(kernels.scaled(grad, factor, torch.bfloat16), expected)


# --- what varies with the batch -----------------------------------------------------------------


def test_a_ragged_batch_compiles_nothing_new():
    """Numbers of rows and all that follows from them, and pointers to parts of a batch."""
    if INTERPRETED:
        pytest.skip("only compiled kernels know what they specialise on")
    of_head = {"columns", "hidden_size", "stride", "gradient_stride", "hidden_stride"}
    of_head |= {"high_stride", "out_stride", "weight_stride"}  # of whole tensors: (·, H)
    of_tensor = {"exponentials_ptr", "high_ptr", "low_ptr", "product_ptr", "grad_ptr"}
    of_tensor |= {"out_ptr", "x_ptr", "wide_ptr", "inverse_ptr", "gradient", "hidden", "weight"}
    names = {"gradients", "weight_gradient", "accumulate", "fitted", "keep", "take", "scale"}
    names |= {"hidden_gradient"}
    seen = set()
    for case in kernels.compile_cases("sm_90"):
        name = case.kernel.__name__.removesuffix("_kernel")
        if name in names:
            seen.add(name)
            for parameter in case.kernel.params:
                free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
                fixed = parameter.is_constexpr or parameter.name in of_head | of_tensor
                assert free != fixed, (name, parameter.name)
    assert seen == names
