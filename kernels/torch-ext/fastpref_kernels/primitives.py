"""Named device functions: the head's epilogue, and the online softmax with its statistics.

Every kernel that sees a logit goes through these, so there is one place where a scale is applied
and one where a maximum moves. Shapes: n rows, v columns of the vocabulary.
"""

import triton
import triton.language as tl

from .configs import INTERPRETED

_CUTS_BF16_OFF = tl.constexpr(INTERPRETED)


@triton.jit
def tanh(x):
    """tanh to the last bits of fp32 and fp64, without a library call."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    # Where 1 − e would cancel: Lambert's continued fraction, cut after its seventh level.
    s = size * size
    above = size * (135135.0 + s * (17325.0 + s * (378.0 + s)))
    below = 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0))
    found = tl.where(size < 0.5, above / below, large)
    return tl.where(x < 0, -found, found)


@triton.jit
def head_epilogue(
    product,  # (n, v) W h
    bias,  # (1, v), or 0.0
    INNER: tl.constexpr,  # scale / T, or scale / cap under a softcap
    OUTER: tl.constexpr,  # cap / T under a softcap
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits `cap·tanh(scale·(W h + b) / cap) / T`, and their slope with respect to W h + b."""
    z = (product + bias) * INNER
    slope = tl.full(product.shape, INNER, product.dtype)
    if HAS_SOFTCAP:
        capped = tanh(z)
        z = capped * OUTER
        slope = (1.0 - capped) * (1.0 + capped) * (INNER * OUTER)
    return z, slope


@triton.jit
def finite(x):
    """Without −inf, so that its product with a probability of 0 is 0."""
    return tl.maximum(x, -3.0e38)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest; the interpreter would cut fp32 off to make it bf16."""
    if _CUTS_BF16_OFF and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def online_softmax_update(
    peak,  # (n,) largest logit so far, −inf at first
    total,  # (n,) Σ e^(z − peak)
    sum_ez,  # (n,) Σ e^(z − peak) (z − peak)
    sum_ee,  # (n,) Σ e^2(z − peak)
    z,  # (n, v) −inf where there is no column
    HAS_ENTROPY: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
):
    """The four running values with one more tile of logits in them."""
    highest = tl.maximum(peak, tl.max(z, 1))
    # Of rows that a bias masks whole so far, −inf − −inf would be NaN.
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp(peak - anchor)
    shifted = z - anchor[:, None]
    e = tl.exp(shifted)
    if HAS_ENTROPY:
        carried = tl.where(total > 0, (peak - anchor) * total, 0.0)
        sum_ez = shrink * (sum_ez + carried) + tl.sum(e * finite(shifted), 1)
    if HAS_LOG_SUM_SQ:
        sum_ee = shrink * shrink * sum_ee + tl.sum(e * e, 1)
    total = shrink * total + tl.sum(e, 1)
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
def store_statistics(
    peak,  # (n,) and so on, folded over the whole vocabulary
    total,
    sum_ez,
    sum_ee,
    sum_z,
    best,
    target_z,
    target,
    vocabulary,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_ptr,
    row,
    is_row,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
):
    """From running values to what is asked for, each `(n,)`."""
    log_total = tl.log(total)
    tl.store(logps_ptr + row, target_z - peak - log_total, is_row)
    tl.store(lse_ptr + row, peak + log_total, is_row)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, log_total - sum_ez / total, is_row)
    if HAS_MEAN:
        tl.store(mean_logits_ptr + row, sum_z / vocabulary, is_row)
    if HAS_TOP1:
        tl.store(is_top1_ptr + row, (best == target).to(tl.int8), is_row)
    if HAS_LOG_SUM_SQ:
        tl.store(log_sum_sq_ptr + row, tl.log(sum_ee) - 2.0 * log_total, is_row)
