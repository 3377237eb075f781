"""Rows of materialised products: what the projection leaves of its tiles, and their gradient.

Both kernels read what a matrix product wrote, W h in fp32, and apply the head's epilogue on the
way, so logits themselves are never stored: all columns of the vocabulary, or a slice of them. For
statistics a row is cut into blocks, each a tile of its own for `partials.py`. The gradient
`coef·(onehot − p)·slope` takes the products' place, in the dtype that the next product multiplies;
there a row belongs to one program, which walks along the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import UNIT, Epilogue, rows_config
from .partials import finished, merge_into, new_partials, new_statistics
from .primitives import finite, head_epilogue, load_bias, rounded, store_tile


@triton.jit(
    do_not_specialize=["rows", "tile_offset", "first", "partial_stride"],
    do_not_specialize_on_alignment=["targets_ptr", "target_z_ptr"],
)
def row_exponentials_kernel(
    products_ptr,  # (rows, columns) W h of the vocabulary from `first` on
    bias_ptr,  # (columns,), or None
    targets_ptr,  # (rows,)
    out_ptr,  # (rows, columns) exponentials out, or None
    target_z_ptr,  # (rows,) out
    partials_ptr,  # (values, tiles, rows) out
    best_ptr,  # (tiles, rows) out, or None
    rows,
    columns,
    first,  # column of the vocabulary that products begin with
    tile_offset,  # its tile
    partial_stride,  # tiles · rows
    out_stride,
    stride,
    inner: tl.float64,
    outer: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row, is_column = row < rows, column < columns
    line_ptr = products_ptr + row.to(tl.int64)[:, None] * stride
    within = is_row[:, None] & is_column[None, :]
    product = tl.load(line_ptr + column[None, :], within, other=0.0)
    bias = load_bias(bias_ptr, column, is_column, products_ptr.dtype.element_ty)
    z, slope = head_epilogue(product, bias, inner, outer, HAS_SOFTCAP)
    local = (tl.load(targets_ptr + row, is_row, other=-1) - first).to(tl.int32)
    store_tile(
        z, slope, row, is_row, local, tl.program_id(1) * BLOCK_V, columns, first,
        tile_offset + tl.program_id(1), rows, out_ptr, None,
        (partials_ptr, partial_stride, best_ptr, target_z_ptr, out_stride),
        HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN, HAS_LOG_SUM_SQ,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "first"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "lse_ptr",
        "coef_ptr",
        "entropy_ptr",
        "entropy_coef_ptr",
    ],
)
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
    inner: tl.float64,
    outer: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    target = tl.load(targets_ptr + row, is_row, other=0)[:, None] - first
    lse = tl.load(lse_ptr + row, is_row, other=0.0)[:, None]
    coef = tl.load(coef_ptr + row, is_row, other=0.0)[:, None]
    live = coef != 0  # the others' logits are not even read
    # What a logit moves with its product, but for its slope.
    scale = tl.full((1, 1), inner, coef.dtype) * tl.full((1, 1), outer, coef.dtype)
    coef *= scale
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row, is_row, other=0.0)[:, None]
        entropy_coef = tl.load(entropy_coef_ptr + row, is_row, other=0.0)[:, None]
        live = live | (entropy_coef != 0)
        entropy_coef *= scale
    line_ptr = products_ptr + row.to(tl.int64)[:, None] * stride
    grad_line_ptr = grad_ptr + row.to(tl.int64)[:, None] * grad_stride

    for start in range(0, columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        is_column = column < columns
        within = is_row[:, None] & is_column[None, :]
        bias = load_bias(bias_ptr, column, is_column, products_ptr.dtype.element_ty)
        product = tl.load(line_ptr + column[None, :], within & live, other=0.0)
        z, slope = head_epilogue(product, bias, inner, outer, HAS_SOFTCAP)
        log_p = z - lse
        p = tl.exp(log_p)
        grad = coef * tl.where(column[None, :] == target, 1.0 - p, -p)  # before any rounding
        if entropy_ptr is not None:  # ∂H/∂z = −p (log p + H)
            grad -= entropy_coef * p * (finite(log_p) + entropy)
        grad = tl.where(live, grad * slope, 0.0)
        # A narrower row overwrites the beginning of its own wider one: all threads have read the
        # tile before any writes, and no tile is written beyond what has been read.
        tl.debug_barrier()
        tl.store(grad_line_ptr + column[None, :], rounded(grad, grad_ptr.dtype.element_ty), within)


def row_statistics(
    products: Tensor,  # (n, V) W h; fp32 or fp64
    targets: Tensor,  # (n,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
) -> list[Tensor]:
    """Log-probabilities, log-sum-exps and further statistics of whole rows."""
    rows, vocabulary = products.shape
    config, dtype = rows_config(products.device, softcap=softcap is not None), products.dtype
    found = new_statistics(stats, products, rows, dtype)
    partials = new_partials(products, rows, vocabulary, stats, dtype, config.block_v)
    of_tiles = partials.values, partials.best, partials.target_z
    epilogue = bias, logit_scale, softcap, temperature
    row_exponentials(products, targets, *epilogue, stats, None, *of_tiles, config.block_v, 0, 0)
    merge_into(found, *of_tiles, targets, vocabulary)
    return finished(found)


def row_exponentials(
    products: Tensor,  # (n, columns) W h of the vocabulary from `first` on; fp32 or fp64
    targets: Tensor,  # (n,) int64
    bias: Tensor | None,  # (columns,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
    out: Tensor | None,  # (n, columns) out; None for statistics alone
    values: Tensor,  # (values, tiles, n) and the two below out, for these columns
    best: Tensor | None,  # (tiles, n)
    target_z: Tensor,  # (n,)
    block: int,
    tile: int,  # among all tiles of a row, the first of these columns
    first: int,
) -> None:
    """What the projection leaves of its tiles, of products that are there."""
    rows, columns = products.shape
    _, tiles, _ = values.shape
    config, names = rows_config(products.device, softcap=softcap is not None), stats.split()
    if block != config.block_v:
        raise ValueError(f"tiles have {config.block_v} columns, got partials of {block}")
    if rows and columns:
        grid = triton.cdiv(rows, config.block_n), triton.cdiv(columns, block)
        row_exponentials_kernel[grid](
            products,
            bias,
            targets,
            out,
            target_z,
            values,
            best,
            rows,
            columns,
            first,
            tile,
            tiles * rows,
            0 if out is None else out.stride(0),
            products.stride(0),
            **Epilogue(bias, logit_scale, softcap, temperature).arguments(UNIT),
            HAS_ENTROPY="entropy" in names,
            HAS_MEAN="mean_logits" in names,
            HAS_LOG_SUM_SQ="log_sum_sq_probs" in names,
            BLOCK_N=config.block_n,
            BLOCK_V=block,
            num_warps=config.num_warps,
            num_stages=1,
        )


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
) -> None:
    """Puts the gradient of Σ coef·ℓ with respect to W h + b where `narrowed` finds it."""
    rows, columns = products.shape
    grad = narrowed(products, dtype)
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    if rows and columns:
        config = rows_config(products.device, softcap=softcap is not None)
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
            **epilogue.arguments(),
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
            num_stages=1,
        )


def narrowed(products: Tensor, dtype: torch.dtype) -> Tensor:
    """`(n, columns)` of `dtype` in the memory of wider ones: each row in the front of its old."""
    return products.view(dtype)[:, : products.shape[1]]
