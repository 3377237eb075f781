"""Rows of materialised products: their statistics in one pass, their gradient in one more.

Both read what a matrix product wrote, W h in fp32, and apply the head's epilogue on the way, so
logits themselves are never stored. The gradient `coef·(onehot − p)·slope` takes the products'
place, in the dtype that the next product multiplies. A row belongs to one program, which walks
along the vocabulary: all of it, or one slice, with what the slices before it left as `state`.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Epilogue, rows_config
from .primitives import (
    finite,
    head_epilogue,
    load_bias,
    online_argmax_update,
    online_softmax_update,
    rounded,
    store_statistics,
)


@triton.jit(do_not_specialize=["rows", "first"])
def row_statistics_kernel(
    products_ptr,  # (rows, columns) W h of the vocabulary from `first` on
    bias_ptr,  # (columns,), or None
    targets_ptr,  # (rows,)
    state_ptr,  # (7, rows) in and out, or None: running values over the columns before `first`
    logps_ptr,  # (rows,) out, as the five below, of which the last four may be None
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
    if state_ptr is not None:
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
        bias = load_bias(bias_ptr, column, is_column, products_ptr.dtype.element_ty)
        product = tl.load(line_ptr + column[None, :], within, other=0.0)
        z, _ = head_epilogue(product, bias, INNER, OUTER, HAS_SOFTCAP)
        if mean_logits_ptr is not None:
            sum_z += tl.sum(z, 1)  # beyond the vocabulary a logit is still 0 here
        is_target = first + column[None, :] == target[:, None]
        target_z += tl.sum(tl.where(is_target, z, 0.0), 1)  # and 0 beyond this slice
        z = tl.where(is_column[None, :], z, float("-inf"))
        if is_top1_ptr is not None:
            best = online_argmax_update(best, peak, z, first + start)
        peak, total, sum_ez, sum_ee = online_softmax_update(
            peak, total, sum_ez, sum_ee, z, 1.0, None, 1.0,
            entropy_ptr is not None, log_sum_sq_ptr is not None,
        )  # fmt: skip
    if state_ptr is not None:
        tl.store(state_ptr + row, peak, is_row)
        tl.store(state_ptr + rows + row, total, is_row)
        tl.store(state_ptr + 2 * rows + row, sum_ez, is_row)
        tl.store(state_ptr + 3 * rows + row, sum_ee, is_row)
        tl.store(state_ptr + 4 * rows + row, sum_z, is_row)
        tl.store(state_ptr + 5 * rows + row, target_z, is_row)
        tl.store(state_ptr + 6 * rows + row, best.to(zero.dtype), is_row)
    store_statistics(
        (logps_ptr, lse_ptr, entropy_ptr, mean_logits_ptr, is_top1_ptr, log_sum_sq_ptr),
        row, is_row, (peak, total, sum_ez, sum_ee), sum_z / vocabulary, best == target, target_z,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first"])
def row_gradients_kernel(
    products_ptr,  # (rows, columns) W h of the vocabulary from `first` on
    grad_ptr,  # (rows, columns) out; may begin where products_ptr does
    bias_ptr,  # (columns,), or None
    targets_ptr,  # (rows,) and the four below
    lse_ptr,
    coef_ptr,
    entropy_ptr,  # or None, with its coefficients
    entropy_coef_ptr,
    rows,
    columns,
    first,
    stride,
    grad_stride,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row, is_row, other=0.0)[:, None]
        entropy_coef = tl.load(entropy_coef_ptr + row, is_row, other=0.0)[:, None]
        live = live | (entropy_coef != 0)
    line_ptr = products_ptr + row.to(tl.int64)[:, None] * stride
    grad_line_ptr = grad_ptr + row.to(tl.int64)[:, None] * grad_stride

    for start in range(0, columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        is_column = column < columns
        within = is_row[:, None] & is_column[None, :]
        bias = load_bias(bias_ptr, column, is_column, products_ptr.dtype.element_ty)
        product = tl.load(line_ptr + column[None, :], within & live, other=0.0)
        z, slope = head_epilogue(product, bias, INNER, OUTER, HAS_SOFTCAP)
        log_p = z - lse
        p = tl.exp(log_p)
        at_target = 0.0
        if HAS_TARGET:
            at_target = 1.0 - p  # before any rounding
        grad = coef * tl.where(column[None, :] == target, at_target, -p)
        if entropy_ptr is not None:  # ∂H/∂z = −p (log p + H)
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
    bias: Tensor | None,  # (columns,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
    first: int,
    vocabulary: int,
    state: Tensor | None,  # (7, n); with it `products` may be a slice
) -> list[Tensor]:
    """Log-probabilities, log-sum-exps, further statistics and the next state, in one launch."""
    rows, columns = products.shape
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    found = new_statistics(stats, products, rows, products.dtype)
    after = None if state is None else state.clone()
    if rows:
        config = rows_config()
        row_statistics_kernel[(triton.cdiv(rows, config.block_n),)](
            products,
            bias,
            targets,
            after,
            *statistics_pointers(found),
            rows,
            columns,
            first,
            vocabulary,
            products.stride(0),
            **epilogue.flags(),
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
    return finished(found) + ([] if after is None else [after])


def row_gradients_(
    products: Tensor,  # (n, columns) W h, consumed
    targets: Tensor,  # (n,) int64
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    bias: Tensor | None,  # (columns,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    first: int,
    entropies: Tensor | None,  # (n,)
    entropy_coefs: Tensor | None,  # (n,)
    at_target: bool,
) -> None:
    """Puts the gradient of Σ coef·ℓ with respect to W h + b where `narrowed` finds it."""
    rows, columns = products.shape
    grad = narrowed(products, dtype)
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    if rows and columns:
        config = rows_config()
        row_gradients_kernel[(triton.cdiv(rows, config.block_n),)](
            products,
            grad,
            bias,
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
            HAS_TARGET=at_target,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )


def narrowed(products: Tensor, dtype: torch.dtype) -> Tensor:
    """`(n, columns)` of `dtype` in the memory of wider ones: each row in the front of its old."""
    return products.view(dtype)[:, : products.shape[1]]


# In the kernels' order; the first two are always there.
STATISTICS = ("logps", "lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def new_statistics(stats: str, like: Tensor, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised outputs `(rows,)` by name, on the device of `like`."""
    names = *STATISTICS[:2], *stats.split()
    dtypes = {"is_top1": torch.int8}
    return {name: like.new_empty(rows, dtype=dtypes.get(name, dtype)) for name in names}


def statistics_pointers(found: Mapping[str, Tensor]) -> list[Tensor | None]:
    """All outputs in the kernels' order, None for those not asked for."""
    return [found.get(name) for name in STATISTICS]


def finished(found: Mapping[str, Tensor]) -> list[Tensor]:
    """What was asked for, in the caller's order."""
    return [x.view(torch.bool) if name == "is_top1" else x for name, x in found.items()]
