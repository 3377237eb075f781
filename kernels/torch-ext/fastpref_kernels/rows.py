"""Rows of materialised products: their statistics in one pass, their gradient in one more.

Both read what a matrix product wrote, W h in fp32, and apply the head's epilogue on the way, so
logits themselves are never stored. The gradient `coef·(onehot − p)·slope` takes the products'
place, in the dtype that the next product multiplies. A row belongs to one program, which walks
along the vocabulary: all of it, or one slice, with what the slices before it left as `state`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Epilogue, rows_config
from .primitives import (
    finite,
    head_epilogue,
    online_argmax_update,
    online_softmax_update,
    rounded,
    store_statistics,
)


@triton.jit(do_not_specialize=["rows", "first"])
def row_statistics_kernel(
    products_ptr,  # (rows, columns) W h of the vocabulary from `first` on
    bias_ptr,  # (columns,)
    targets_ptr,  # (rows,)
    state_ptr,  # (7, rows) in and out: running values over the columns before `first`
    logps_ptr,  # (rows,) out, as the five below
    lse_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_ptr,
    rows,
    columns,
    first,
    vocabulary,
    stride,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    target = tl.load(targets_ptr + row, is_row, other=0)
    line_ptr = products_ptr + row.to(tl.int64)[:, None] * stride

    zero = tl.zeros((BLOCK_N,), products_ptr.dtype.element_ty)
    peak, total, sum_ez, sum_ee = zero + float("-inf"), zero, zero, zero
    sum_z, target_z, best = zero, zero, target * 0 - 1
    if HAS_STATE:
        peak = tl.load(state_ptr + row, is_row, other=0.0)
        total = tl.load(state_ptr + rows + row, is_row, other=0.0)
        sum_ez = tl.load(state_ptr + 2 * rows + row, is_row, other=0.0)
        sum_ee = tl.load(state_ptr + 3 * rows + row, is_row, other=0.0)
        sum_z = tl.load(state_ptr + 4 * rows + row, is_row, other=0.0)
        target_z = tl.load(state_ptr + 5 * rows + row, is_row, other=0.0)
        best = tl.load(state_ptr + 6 * rows + row, is_row, other=0.0).to(target.dtype)
    for start in range(0, columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        is_column = column < columns
        within = is_row[:, None] & is_column[None, :]
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, is_column, other=0.0).to(
                products_ptr.dtype.element_ty
            )[None, :]
        product = tl.load(line_ptr + column[None, :], within, other=0.0)
        z, _ = head_epilogue(product, bias, INNER, OUTER, HAS_SOFTCAP)
        if HAS_MEAN:
            sum_z += tl.sum(z, 1)  # beyond the vocabulary a logit is still 0 here
        is_target = first + column[None, :] == target[:, None]
        target_z += tl.sum(tl.where(is_target, z, 0.0), 1)  # and 0 beyond this slice
        z = tl.where(is_column[None, :], z, float("-inf"))
        if HAS_TOP1:
            best = online_argmax_update(best, peak, z, first + start)
        peak, total, sum_ez, sum_ee = online_softmax_update(
            peak, total, sum_ez, sum_ee, z, HAS_ENTROPY, HAS_LOG_SUM_SQ
        )
    if HAS_STATE:
        tl.store(state_ptr + row, peak, is_row)
        tl.store(state_ptr + rows + row, total, is_row)
        tl.store(state_ptr + 2 * rows + row, sum_ez, is_row)
        tl.store(state_ptr + 3 * rows + row, sum_ee, is_row)
        tl.store(state_ptr + 4 * rows + row, sum_z, is_row)
        tl.store(state_ptr + 5 * rows + row, target_z, is_row)
        tl.store(state_ptr + 6 * rows + row, best.to(zero.dtype), is_row)
    store_statistics(
        peak, total, sum_ez, sum_ee, sum_z, best, target_z, target, vocabulary,
        logps_ptr, lse_ptr, entropy_ptr, mean_logits_ptr, is_top1_ptr, log_sum_sq_ptr, row, is_row,
        HAS_ENTROPY, HAS_MEAN, HAS_TOP1, HAS_LOG_SUM_SQ,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first"])
def row_gradients_kernel(
    products_ptr,  # (rows, columns) W h of the vocabulary from `first` on
    grad_ptr,  # (rows, columns) out; may begin where products_ptr does
    bias_ptr,  # (columns,)
    targets_ptr,  # (rows,) and the four below
    lse_ptr,
    coef_ptr,
    entropy_ptr,
    entropy_coef_ptr,
    rows,
    columns,
    first,
    stride,
    grad_stride,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    target = tl.load(targets_ptr + row, is_row, other=0)[:, None] - first
    lse = tl.load(lse_ptr + row, is_row, other=0.0)[:, None]
    coef = tl.load(coef_ptr + row, is_row, other=0.0)[:, None]
    live = coef != 0  # the others' logits are not even read
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row, is_row, other=0.0)[:, None]
        entropy_coef = tl.load(entropy_coef_ptr + row, is_row, other=0.0)[:, None]
        live = live | (entropy_coef != 0)
    line_ptr = products_ptr + row.to(tl.int64)[:, None] * stride
    grad_line_ptr = grad_ptr + row.to(tl.int64)[:, None] * grad_stride

    for start in range(0, columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        is_column = column < columns
        within = is_row[:, None] & is_column[None, :]
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, is_column, other=0.0).to(
                products_ptr.dtype.element_ty
            )[None, :]
        product = tl.load(line_ptr + column[None, :], within & live, other=0.0)
        z, slope = head_epilogue(product, bias, INNER, OUTER, HAS_SOFTCAP)
        log_p = z - lse
        p = tl.exp(log_p)
        at_target = 0.0
        if HAS_TARGET:
            at_target = 1.0 - p  # before any rounding
        grad = coef * tl.where(column[None, :] == target, at_target, -p)
        if HAS_ENTROPY:  # ∂H/∂z = −p (log p + H)
            grad -= entropy_coef * p * (finite(log_p) + entropy)
        grad = tl.where(live, grad * slope, 0.0)
        # A narrower row overwrites the beginning of its own wider one: all threads have read the
        # tile before any writes, and no tile is written beyond what has been read.
        tl.debug_barrier()
        tl.store(grad_line_ptr + column[None, :], rounded(grad, grad_ptr.dtype.element_ty), within)


def new_state(products: Tensor) -> Tensor:
    """What is known of each row before its first slice: `(7, n)`."""
    state = products.new_zeros(7, len(products))
    state[0] = -torch.inf  # the largest logit so far
    state[6] = -1  # its column
    return state


def row_statistics(
    products: Tensor,  # (n, columns) W h; fp32 or fp64
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,
    stats: list[str],
    first: int,
    vocabulary: int,
    state: Tensor | None = None,  # (7, n), updated; with it `products` may be a slice
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities, log-sum-exps and further statistics of all rows in one launch."""
    rows, columns = products.shape
    logps, lse = (products.new_empty(rows) for _ in range(2))
    extra = new_statistics(logps, stats)
    if rows:
        config = rows_config()
        row_statistics_kernel[(triton.cdiv(rows, config.block_n),)](
            products,
            epilogue.bias_or(products),
            targets,
            products if state is None else state,
            *statistics_pointers(logps, lse, extra),
            rows,
            columns,
            first,
            vocabulary,
            products.stride(0),
            **epilogue.flags(),
            **statistics_flags(stats),
            HAS_STATE=state is not None,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
    return logps, lse, as_booleans(extra)


def row_gradients_(
    products: Tensor,  # (n, columns) W h, consumed
    targets: Tensor,  # (n,) int64
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    epilogue: Epilogue,
    dtype: torch.dtype,
    first: int,
    entropy: tuple[Tensor, Tensor] | None,  # entropies (n,) and their coefficients (n,)
    at_target: bool,
) -> None:
    """Puts the gradient of Σ coef·ℓ with respect to W h + b where `narrowed` finds it."""
    rows, columns = products.shape
    grad = narrowed(products, dtype)
    entropies, entropy_coefs = (lse, coef) if entropy is None else entropy
    if rows and columns:
        config = rows_config()
        row_gradients_kernel[(triton.cdiv(rows, config.block_n),)](
            products,
            grad,
            epilogue.bias_or(products),
            targets,
            lse,
            coef,
            entropies,
            entropy_coefs,
            rows,
            columns,
            first,
            products.stride(0),
            grad.stride(0),
            **epilogue.flags(),
            HAS_ENTROPY=entropy is not None,
            HAS_TARGET=at_target,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )


def narrowed(products: Tensor, dtype: torch.dtype) -> Tensor:
    """`(n, columns)` of `dtype` in the memory of wider ones: each row in the front of its old."""
    return products.view(dtype)[:, : products.shape[1]]


STATISTICS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def new_statistics(logps: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """Uninitialised outputs `(n,)`, one for each name in `stats`."""
    dtypes = {"is_top1": torch.int8}
    return {name: torch.empty_like(logps, dtype=dtypes.get(name, logps.dtype)) for name in stats}


def statistics_pointers(logps: Tensor, lse: Tensor, extra: dict[str, Tensor]) -> list[Tensor]:
    """All outputs in the kernels' order; those not asked for are never written."""
    return [logps, lse, *(extra.get(name, logps) for name in STATISTICS)]


def statistics_flags(stats: Sequence[str]) -> dict[str, bool]:
    flags = ("HAS_ENTROPY", "HAS_MEAN", "HAS_TOP1", "HAS_LOG_SUM_SQ")
    return {flag: name in stats for flag, name in zip(flags, STATISTICS, strict=True)}


def as_booleans(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.view(torch.bool) if x.dtype == torch.int8 else x for k, x in extra.items()}
