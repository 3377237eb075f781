"""Operands of the gradients' products, and gradients of hidden states kept from group to group.

*Fitted*: fp16 after a power of two that lifts the largest value into [2^14, 2^15). fp16 has three
bits more than bf16, and after the power its range suffices. The power is found on the device, from
a bound that lies there; products are divided by it afterwards.

*Kept*: float32 in 24 bits, as bf16 and an int8 remainder, until the backward pass knows what to
multiply by. The bf16 halves lie where the gradient will.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import check_halves, operands_config
from .primitives import joined, rounded, split, widened


@triton.jit
def fitted_power(bound_ptr, factor_bound_ptr):
    """2^(14 − ⌊log2 bound⌋) within 2^±100, and its inverse, both fp32; NaN of no finite bound."""
    bound = tl.load(bound_ptr).to(tl.float64)  # where a product of two floats neither ends
    if factor_bound_ptr is not None:
        bound *= tl.load(factor_bound_ptr).to(tl.float64)
    exponent = (bound.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
    exponent = tl.where(bound == 0, 0, exponent)
    shift = tl.minimum(tl.maximum(14 - exponent, -100), 100)
    power = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    usable = (bound >= 0) & (bound < float("inf"))
    return tl.where(usable, power, float("nan")), tl.where(usable, inverse, float("nan"))


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["bound_ptr", "factor_bound_ptr", "index_ptr", "factor_ptr"],
)
def fitted_kernel(
    x_ptr,  # (·, columns)
    bound_ptr,  # ()
    factor_bound_ptr,  # (), or None
    index_ptr,  # (rows,) rows of x, or None for all
    factor_ptr,  # (rows,), or None for 1
    out_ptr,  # (rows, columns) out
    inverse_ptr,  # () out
    rows,
    columns,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    power, inverse = fitted_power(bound_ptr, factor_bound_ptr)
    if tl.program_id(0) == 0:
        tl.store(inverse_ptr, inverse)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    source = row
    if index_ptr is not None:
        source = tl.load(index_ptr + row, is_row, other=0)
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + row, is_row, other=0.0)[:, None]
    for start in range(0, columns, BLOCK_H):
        column = (start + tl.arange(0, BLOCK_H))[None, :]
        within = is_row[:, None] & (column < columns)
        x = tl.load(x_ptr + source[:, None] * stride + column, within, other=0.0)
        # In this order: what x·factor loses to subnormals is 0 in fp16 after any power.
        x = widened(x) * factor * power
        tl.store(out_ptr + row[:, None] * columns + column, rounded(x, tl.float16), within)


def fitted(
    x: Tensor,  # (m, H) of any float dtype
    bound: Tensor,  # ()
    index: Tensor | None,  # (n,) int64
    factor: Tensor | None,  # (n,)
    factor_bound: Tensor | None,  # ()
) -> tuple[Tensor, Tensor]:
    """`x[index]·factor·power` in fp16, and `1 / power` in fp32, in one launch."""
    if (factor is None) != (factor_bound is None):
        raise ValueError("factor and factor_bound belong together: give both or neither")
    out, inverse = new_fitted(x, bound, index, factor, factor_bound)
    rows, columns = out.shape
    config = operands_config(x.device)
    fitted_kernel[(max(1, triton.cdiv(rows, config.block_n)),)](  # of no rows an inverse too
        x,
        bound,
        factor_bound,
        index,
        factor,
        out,
        inverse,
        rows,
        columns,
        x.stride(0),
        BLOCK_N=config.block_n,
        BLOCK_H=config.block_v,
        num_warps=config.num_warps,
        num_stages=1,
    )
    return out, inverse


def new_fitted(
    x: Tensor,
    bound: Tensor,
    index: Tensor | None,
    factor: Tensor | None,
    factor_bound: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `fitted` returns, uninitialised."""
    rows = len(x) if index is None else len(index)
    out = x.new_empty((rows, x.shape[1]), dtype=torch.float16)
    return out, x.new_empty((), dtype=torch.float32)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["index_ptr"])
def keep_kernel(
    wide_ptr,  # (rows, columns)
    high_ptr,  # (·, columns) out, rows `index`
    low_ptr,  # (rows, columns) out
    index_ptr,  # (rows,)
    rows,
    columns,
    high_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    place = tl.load(index_ptr + row, is_row, other=0)
    for start in range(0, columns, BLOCK_H):
        column = (start + tl.arange(0, BLOCK_H))[None, :]
        within = is_row[:, None] & (column < columns)
        dense = row[:, None] * columns + column
        high, low = split(tl.load(wide_ptr + dense, within, other=0.0))
        tl.store(high_ptr + place[:, None] * high_stride + column, high, within)
        tl.store(low_ptr + dense, low, within)


def keep_(
    wide: Tensor,  # (n, H) fp32
    high: Tensor,  # (M, H) bf16
    low: Tensor,  # (n, H) int8
    index: Tensor,  # (n,) int64, no two alike
) -> None:
    """`wide` as split numbers: rows `index` of high, all rows of low."""
    check_halves(high, low, wide.shape)
    if wide.numel():
        config = operands_config(wide.device)
        keep_kernel[(triton.cdiv(len(wide), config.block_n),)](
            wide,
            high,
            low,
            index,
            *wide.shape,
            high.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_H=config.block_v,
            num_warps=config.num_warps,
            num_stages=1,
        )


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["index_ptr", "coef_ptr", "upstream_ptr"],
)
def take_kernel(
    high_ptr,  # (·, columns)
    low_ptr,  # (rows, columns), or None
    out_ptr,  # (·, columns) out; may be high_ptr
    index_ptr,  # (rows,) rows of high and out
    coef_ptr,  # (rows,)
    upstream_ptr,  # ()
    rows,
    columns,
    high_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    place = tl.load(index_ptr + row, is_row, other=0)[:, None]
    coef = tl.load(coef_ptr + row, is_row, other=0.0)[:, None]
    upstream = tl.load(upstream_ptr)
    for start in range(0, columns, BLOCK_H):
        column = (start + tl.arange(0, BLOCK_H))[None, :]
        within = is_row[:, None] & (column < columns)
        grad = tl.load(high_ptr + place * high_stride + column, within, other=0.0)
        if low_ptr is not None:
            low = tl.load(low_ptr + row[:, None] * columns + column, within, other=0)
            grad = joined(grad, low)
        grad = widened(grad) * coef * upstream
        out = rounded(grad, out_ptr.dtype.element_ty)
        tl.store(out_ptr + place * out_stride + column, out, within)


def take_(
    high: Tensor,  # (M, H)
    low: Tensor | None,  # (n, H) int8
    index: Tensor,  # (n,) int64, no two alike
    coef: Tensor,  # (n,)
    upstream: Tensor,  # ()
) -> None:
    """`high[index] = (high[index] + low)·coef·upstream`, rounded once."""
    taken_(high, high, low, index, coef, upstream)


def taken_(
    out: Tensor,  # (M, H)
    high: Tensor,  # (M, H)
    low: Tensor | None,  # (n, H) int8
    index: Tensor,  # (n,) int64, no two alike
    coef: Tensor,  # (n,)
    upstream: Tensor,  # ()
) -> None:
    """As `take_`, into the rows `index` of `out`, and `high` stays as it is."""
    columns = high.shape[1]
    check_halves(high, low, (len(index), columns))
    if len(index) and columns:
        config = operands_config(high.device)
        take_kernel[(triton.cdiv(len(index), config.block_n),)](
            high,
            low,
            out,
            index,
            coef,
            upstream,
            len(index),
            columns,
            high.stride(0),
            out.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_H=config.block_v,
            num_warps=config.num_warps,
            num_stages=1,
        )
