"""Named device functions: the head's epilogue, and the online softmax with its statistics.

Every kernel that sees a logit goes through these, so there is one place where a scale is applied
and one where a maximum moves. Shapes: n rows, v columns of the vocabulary.
"""

import triton
import triton.language as tl

from .configs import INTERPRETED

_CUTS_BF16_OFF = tl.constexpr(INTERPRETED)
# What a power of two lifts stored exponentials by, so that fp16 holds them without its subnormals.
SCALE = 2.0**15
S = tl.constexpr(SCALE)
_LN2 = tl.constexpr(0.6931471805599453)
# And those relative to an anchor, so that they are finite in fp32 and bf16 up to _MOST nats above.
ANCHORED_SCALE = 2.0**-87
_ANCHORED_SCALE = tl.constexpr(ANCHORED_SCALE)
_MOST = tl.constexpr(148.0)


@triton.jit
def tanh(x):
    """tanh to the last bits of fp32 and fp64, without a library call, and 1 − tanh²."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    # Where 1 − e would cancel: Lambert's continued fraction, cut after its seventh level.
    s = size * size
    above = size * (135135.0 + s * (17325.0 + s * (378.0 + s)))
    below = 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0))
    found = tl.where(size < 0.5, above / below, large)
    return tl.where(x < 0, -found, found), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def head_epilogue(
    product,  # (n, v) W h
    bias,  # (1, v), or None
    inner,  # scale / T, or scale / cap under a softcap
    outer,  # 1, or cap / T under a softcap; over the unit that logits are wanted in
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits `outer·tanh(inner·(W h + b))`, or `outer·inner·(W h + b)`, and their slope.

    The slope s is 1 − tanh², or 1: the derivative with respect to W h + b is inner·outer·s.
    """
    # Scalars come as fp64; of Python's floats the interpreter makes what is asked for here.
    inner, outer = tl.full((1, 1), inner, product.dtype), tl.full((1, 1), outer, product.dtype)
    z = product
    if bias is not None:
        z += bias
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = tanh(z * inner)
        z *= outer
    else:
        z *= inner * outer
    return z, slope


@triton.jit
def load_bias(bias_ptr, column, is_column, dtype: tl.constexpr):
    """(1, v), or None."""
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, is_column, other=0.0).to(dtype)[None, :]
    return bias


@triton.jit
def finite(x):
    """Without −inf, so that its product with a probability of 0 is 0."""
    return tl.maximum(x, -3.0e38)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest; the interpreter would cut fp32 off to make it bf16."""
    if _CUTS_BF16_OFF and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        # Nothing is left to be cut off: of what is, it makes bf16's smallest numbers.
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def online_softmax_update(
    peak,  # (n,) largest logit so far, −inf at first
    total,  # (n,) Σ e^(z − peak)
    sum_ez,  # (n,) Σ e^(z − peak) (z − peak)
    sum_ee,  # (n,) Σ e^2(z − peak)
    tile_peak,  # (n, v) logits, or the largest of each tile; −inf where there is none
    tile_total,  # (n, v) the same sum of each tile; of a logit 1
    tile_ez,  # (n, v), or None for 0
    tile_ee,  # (n, v)
    HAS_ENTROPY: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
):
    """The four running values with more logits, or more tiles of them, in them."""
    highest = tl.maximum(peak, tl.max(tile_peak, 1))
    # Of rows that a bias masks whole so far, −inf − −inf would be NaN.
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    shift, tile_shift = peak - anchor, tile_peak - anchor[:, None]
    shrink, tile_shrink = tl.exp(shift), tl.exp(tile_shift)
    if HAS_ENTROPY:  # e^(z − anchor) (z − anchor), of which z − anchor is (z − peak) + shift
        carried = tl.where(total > 0, shift * total, 0.0)
        of_tile = finite(tile_shift) * tile_total
        if tile_ez is not None:
            of_tile += tile_ez
        sum_ez = shrink * (sum_ez + carried) + tl.sum(tile_shrink * of_tile, 1)
    if HAS_LOG_SUM_SQ:
        of_tile = tile_shrink * tile_shrink * tile_ee
        sum_ee = shrink * shrink * sum_ee + tl.sum(of_tile, 1)
    total = shrink * total + tl.sum(tile_shrink * tile_total, 1)
    return highest, total, sum_ez, sum_ee


@triton.jit
def online_argmax_update(
    best,  # (n,) column of the largest logit so far
    peak,  # (n,) that logit, before this tile is folded into it
    z,  # (n, v)
    first,  # column of the tile's first logit
):
    """The first of equal maxima wins, within a tile and across tiles."""
    highest, where = tl.max(z, 1, return_indices=True)
    return tl.where(highest > peak, first + where, best)


@triton.jit
def picked(
    z,  # (n, v)
    place,  # (n,) int32, a column of the vocabulary
    start,  # that z begins with
):
    """z[i, place[i] − start]; where there is no such column, anything."""
    column = start + tl.arange(0, z.shape[1])
    if z.shape[1] >= 256:
        # A thread has many columns: bit by bit it chooses one of two, where to compare each with
        # the place takes four times the instructions. The upper half may be other warps', and of
        # rows in narrow blocks some other bit too: then a choice goes through shared memory.
        z = z.reshape(z.shape[0], 2, z.shape[1] // 2)
        place -= start
        is_upper = place // z.shape[2]
        for _ in tl.static_range(3):
            low, high = tl.split(z.reshape(z.shape[0], 2, 2, z.shape[2] // 2).permute(0, 1, 3, 2))
            z = tl.where((place & z.shape[2] // 2)[:, None, None] == 0, low, high)
        place = is_upper * z.shape[2] + place % z.shape[2]
        z = z.reshape(z.shape[0], 2 * z.shape[2])
        column = tl.arange(0, z.shape[1])
    return tl.sum(tl.where(column[None, :] == place[:, None], z, 0.0), 1)


@triton.jit
def store_tile(
    z,  # (n, v) logits in units of ln 2, 0 beyond the columns
    slope,  # of `head_epilogue`
    row,  # (n,)
    is_row,
    local,  # (n,) int32, the target's column, counted as `start` is
    start,  # the tile's first column
    columns,  # of the weight at hand
    first,  # column of the vocabulary that those begin with
    tile,  # among all tiles of a row
    rows,
    out_ptr,  # (rows, columns) exponentials out, or None
    anchors_ptr,  # (rows,) what those are relative to; None for each row's peak in the tile
    partials,  # pointers and strides, see below
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
):
    """What a tile of logits leaves: values for the merge, and on request its exponentials.

    Exponentials are e^(z − peak)·s·SCALE; with anchors e^(z − anchor)·s·ANCHORED_SCALE, but for the
    target's, which is 0.
    """
    partials_ptr, partial_stride, best_ptr, target_z_ptr, out_stride = partials
    column = start + tl.arange(0, z.shape[1])
    is_column = column < columns
    at = tile.to(tl.int64) * rows + row
    if HAS_MEAN:
        tl.store(partials_ptr + 2 * partial_stride + at, tl.sum(z, 1) * _LN2, is_row)
    # Few tiles hold a target of their rows, and only the last one ends early.
    is_here = (local >= start) & (local < tl.minimum(start + z.shape[1], columns))
    has_target = tl.max(is_here.to(tl.int32), 0) > 0
    if has_target:
        tl.store(target_z_ptr + row, picked(z, local, start) * _LN2, is_here)
    if start + z.shape[1] > columns:
        if not HAS_SOFTCAP:  # what is left of the registers is too few there
            # Of a branch without a barrier a choice for each element of each tile would be made.
            tl.debug_barrier()
        z = tl.where(is_column[None, :], z, float("-inf"))

    peak = tl.max(z, 1)
    if best_ptr is not None:
        place = tl.arange(0, z.shape[1])[None, :]
        best = tl.min(tl.where(z == peak[:, None], place, z.shape[1]), 1)  # the first
        tl.store(best_ptr + at, first + start + best, is_row)
    # Of rows that a bias masks whole, −inf − −inf would be NaN.
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    z -= anchor[:, None]
    e = tl.exp2(z)
    peak *= _LN2
    tl.store(partials_ptr + at, peak, is_row)
    tl.store(partials_ptr + partial_stride + at, tl.sum(e, 1), is_row)
    if HAS_ENTROPY:
        sum_ez = tl.sum(e * finite(z), 1) * _LN2
        tl.store(partials_ptr + 3 * partial_stride + at, sum_ez, is_row)
    if HAS_LOG_SUM_SQ:
        tl.store(partials_ptr + 4 * partial_stride + at, tl.sum(e * e, 1), is_row)

    if out_ptr is not None:
        e *= slope
        if anchors_ptr is None:
            e *= S
        else:
            beyond = tl.minimum(peak - tl.load(anchors_ptr + row, is_row, other=0.0), _MOST)
            half = tl.exp(0.5 * beyond)  # the whole may not be finite
            e *= (half * _ANCHORED_SCALE * half)[:, None]
        line_ptr = out_ptr + row.to(tl.int64)[:, None] * out_stride
        within = is_row[:, None] & is_column[None, :]
        tl.store(line_ptr + column[None, :], rounded(e, out_ptr.dtype.element_ty), within)
        if anchors_ptr is not None:  # noqa: SIM102  (decided when compiled, the next for each tile)
            if has_target:
                tl.debug_barrier()  # another thread may have stored what is overwritten
                nothing = tl.zeros((z.shape[0],), out_ptr.dtype.element_ty)
                tl.store(out_ptr + row.to(tl.int64) * out_stride + local, nothing, is_here)


@triton.jit
def store_statistics(
    statistics_ptrs,  # (rows,) each, in the order below; None where not asked for
    row,
    is_row,
    sums,  # peak, total, sum_ez, sum_ee (n,), folded over the whole vocabulary
    mean,
    is_top1,
    target_z,
):
    """From running values to what is asked for, each `(n,)`."""
    logps_ptr, lse_ptr, entropy_ptr, mean_ptr, is_top1_ptr, log_sum_sq_ptr, peak_ptr = (
        statistics_ptrs
    )
    peak, total, sum_ez, sum_ee = sums
    log_total = tl.log(total)
    tl.store(logps_ptr + row, target_z - peak - log_total, is_row)
    tl.store(lse_ptr + row, peak + log_total, is_row)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_total - sum_ez / total, is_row)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, is_row)
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + row, is_top1.to(tl.int8), is_row)
    if log_sum_sq_ptr is not None:
        tl.store(log_sum_sq_ptr + row, tl.log(sum_ee) - 2.0 * log_total, is_row)
    if peak_ptr is not None:
        tl.store(peak_ptr + row, peak, is_row)


@triton.jit
def widened(x):
    """fp32 of half precision, what is wider as it is."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def one_minus_exp(x):
    """1 − e^x, to the last bits where e^x is nearly 1 as well."""
    half, _ = tanh(0.5 * x)
    return -2.0 * half / (1.0 - half)


@triton.jit
def split(x):
    """fp32 rounded to 24 bits: bf16, to the nearest, and what is left of it as int8."""
    x = x.to(tl.float32)
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))  # one NaN, that cannot carry
    kept = (bits + 0x80) >> 8
    high = (kept + 0x80) >> 8
    low = kept - (high << 8)
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low.to(tl.int8)


@triton.jit
def joined(high, low):
    """fp32 from the two halves that `split` made."""
    upper = high.to(tl.int16, bitcast=True).to(tl.int32)
    return (((upper << 8) + low.to(tl.int32)) << 8).to(tl.float32, bitcast=True)
