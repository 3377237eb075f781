"""Gradients in place of exponentials: one load, one multiplication and one store an element.

    E[t, j] = S·e^(z_tj − peak)·s_tj      what the projection left, `peak` that of the row's block
    G[t, j] = −E[t, j]·e^(peak − lse_t)   = S·(onehot − p)·s_tj wherever j is not the target
    G[t, y] = S·(1 − e^logp_t)·s_ty       from the log-probability, so that nothing cancels

Of `W h + b` the gradient is (INNER·OUTER / S)·G. A row's coefficient only says whether the row is
wanted: it multiplies the other operand of the products that follow, where it costs nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .configs import rows_config
from .primitives import S, one_minus_exp, rounded


@triton.jit(
    do_not_specialize=["peak_row_stride", "peak_block_stride"],
    do_not_specialize_on_alignment=[
        "peaks_ptr",
        "targets_ptr",
        "logps_ptr",
        "lse_ptr",
        "coef_ptr",
        "slopes_ptr",
    ],
)
def gradients_kernel(
    exponentials_ptr,  # (rows, columns) in and out
    peaks_ptr,  # (rows, blocks)
    targets_ptr,  # (rows,) and the four below
    logps_ptr,
    lse_ptr,
    coef_ptr,
    slopes_ptr,  # or None for 1
    columns,
    stride,
    peak_row_stride,
    peak_block_stride,
    PEAK_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WIDTH: tl.constexpr,  # columns that share a factor: the smaller of both blocks
):
    row = tl.program_id(0).to(tl.int64)
    line_ptr = exponentials_ptr + row * stride
    dtype = exponentials_ptr.dtype.element_ty
    live = tl.load(coef_ptr + row) != 0
    wanted = tl.where(live, columns, 0)  # of the other rows nothing is even read
    lse = tl.load(lse_ptr + row)
    for start in range(0, columns, BLOCK_V):
        first = start + tl.arange(0, BLOCK_V // WIDTH) * WIDTH
        block = (first // PEAK_BLOCK).to(tl.int64)
        peak_ptr = peaks_ptr + row * peak_row_stride + block * peak_block_stride
        peak = tl.load(peak_ptr, first < wanted, other=float("-inf"))
        filled = peak != float("-inf")
        factor = tl.where(filled, -tl.exp(peak - lse), 0.0)

        column = first[:, None] + tl.arange(0, WIDTH)[None, :]
        is_column = column < columns
        exponential = tl.load(line_ptr + column, is_column & filled[:, None], other=0.0)
        grad = exponential.to(factor.dtype) * factor[:, None]
        tl.store(line_ptr + column, rounded(grad, dtype), is_column)

    target = tl.load(targets_ptr + row)
    at_target = S * one_minus_exp(tl.load(logps_ptr + row))
    if slopes_ptr is not None:
        at_target *= tl.load(slopes_ptr + row)
    at_target = tl.where(live, at_target, 0.0)
    tl.debug_barrier()  # the row is written by all threads, its target by one
    tl.store(line_ptr + target, rounded(at_target, dtype), (target >= 0) & (target < columns))


def gradients_(
    exponentials: Tensor,  # (n, V) fp16, fp32 or fp64
    peaks: Tensor,  # (n, blocks) of any strides
    block: int,
    targets: Tensor,  # (n,) int64
    logps: Tensor,  # (n,)
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    slopes: Tensor | None,  # (n,)
) -> None:
    """Puts G in E's place, in one launch."""
    rows, columns = exponentials.shape
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    if peaks.shape != (rows, triton.cdiv(columns, block)):
        raise ValueError(
            f"peaks must be one a row and block of {block} of {columns} columns, "
            f"({rows}, {triton.cdiv(columns, block)}), got {tuple(peaks.shape)}"
        )
    if rows and columns:
        config = rows_config(exponentials.device, softcap=slopes is not None)
        gradients_kernel[(rows,)](
            exponentials,
            peaks,
            targets,
            logps,
            lse,
            coef,
            slopes,
            columns,
            exponentials.stride(0),
            *peaks.stride(),
            PEAK_BLOCK=block,
            BLOCK_V=config.block_v,
            WIDTH=min(block, config.block_v),
            num_warps=config.num_warps,
            num_stages=1,
        )
