"""Projection to log-probability: hidden states in, statistics of each row out, no logits between.

A persistent kernel takes tile after tile of rows × vocabulary, multiplies, applies the head's
epilogue to the accumulators and leaves what `partials.py` merges. On request it also stores the
exponentials of a tile, for the gradient to be made of them without another product: each relative
to its row's peak in the tile, or to an anchor of its row that is known in advance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    INTERPRETED,
    UNIT,
    Epilogue,
    ProjectionConfig,
    projection_config,
    projection_depth,
)
from .partials import Partials, finished, merge_into, new_partials, new_statistics
from .primitives import head_epilogue, load_bias, store_tile

# What the tiles' values and a copy of the rows may take: more rows go in a launch of their own.
_LAUNCH_BYTES = 32 * 2**20
# Bytes of the weight converted at a time where the products do not take its dtype, and the launches
# that share them.
_CONVERTED_BYTES = 64 * 2**20
_LAUNCHES = 4


@triton.jit
def add_product(
    product,  # (n, v)
    hidden,  # pointer, or descriptor
    weight,
    left,  # (n, 1) where rows begin; with descriptors the first row
    right,  # (1, v)
    is_row,  # (n,)
    is_column,  # (v,)
    first,  # of H
    last,
    HAS_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies no half precision
    BLOCK_H: tl.constexpr,
):
    """`product` and that of `first` to `last` of H, which for descriptors are whole blocks."""
    if HAS_DESCRIPTORS:
        for h in range(first, last, BLOCK_H):
            rows, columns = hidden.load([left, h]), weight.load([right, h])
            product = tl.dot(rows, columns.T, product)
    else:
        along = tl.arange(0, BLOCK_H)
        left_ptr, right_ptr = hidden + left + along[None, :], weight + right + along[:, None]
        for h in range(first, last, BLOCK_H):
            is_along = along < last - h
            rows = tl.load(left_ptr + h, is_row[:, None] & is_along[None, :], other=0.0)
            columns = tl.load(right_ptr + h, is_along[:, None] & is_column[None, :], other=0.0)
            if UPCAST:
                rows, columns = rows.to(product.dtype), columns.to(product.dtype)
            product = tl.dot(
                rows, columns, product, input_precision="ieee", out_dtype=product.dtype
            )
    return product


@triton.jit(
    do_not_specialize=["rows", "tile_offset", "first", "partial_stride"],
    do_not_specialize_on_alignment=["index_ptr", "targets_ptr", "anchors_ptr", "target_z_ptr"],
)
def projection_kernel(
    hidden,  # (·, H) pointer, or descriptor of blocks (BLOCK_N, BLOCK_H)
    weight,  # (columns, H) pointer, or descriptor of blocks (BLOCK_V, BLOCK_H)
    bias_ptr,  # (columns,), or None
    index_ptr,  # (rows,) rows of hidden, or None for all
    targets_ptr,  # (rows,)
    anchors_ptr,  # (rows,), or None
    out_ptr,  # (rows, columns) exponentials out, or None
    target_z_ptr,  # (rows,) out
    partials_ptr,  # (values, tiles, rows) out
    best_ptr,  # (tiles, rows) out, or None
    rows,
    columns,
    first,  # column of the vocabulary that weight begins with
    tile_offset,  # its tile
    partial_stride,  # tiles · rows
    out_stride,
    hidden_stride,
    weight_stride,
    inner: tl.float64,
    outer: tl.float64,
    HIDDEN_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies no half precision
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DEPTH: tl.constexpr,  # of H, that one accumulator sums; 0 for all
    BAND: tl.constexpr,  # row blocks that share the weight's tiles
):
    row_blocks = tl.cdiv(rows, BLOCK_N)
    column_blocks = tl.cdiv(columns, BLOCK_V)
    dtype = partials_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        # Down a band of row blocks first, then on to the next column block.
        band = tile // (BAND * column_blocks)
        band_height = tl.minimum(row_blocks - band * BAND, BAND)
        row_block = band * BAND + (tile % (BAND * column_blocks)) % band_height
        column_block = (tile % (BAND * column_blocks)) // band_height

        row = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        column = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
        is_row, is_column = row < rows, column < columns
        if HAS_DESCRIPTORS:
            left, right = row_block * BLOCK_N, column_block * BLOCK_V
        else:
            source = row
            if index_ptr is not None:
                source = tl.load(index_ptr + row, is_row, other=0)
            left = source.to(tl.int64)[:, None] * hidden_stride
            right = column.to(tl.int64)[None, :] * weight_stride
        product = tl.zeros((BLOCK_N, BLOCK_V), dtype)
        if DEPTH == 0:
            product = add_product(
                product, hidden, weight, left, right, is_row, is_column, 0, HIDDEN_SIZE,
                HAS_DESCRIPTORS, UPCAST, BLOCK_H,
            )  # fmt: skip
        else:
            for h in range(0, HIDDEN_SIZE, DEPTH):
                nothing = tl.zeros((BLOCK_N, BLOCK_V), dtype)
                product += add_product(
                    nothing, hidden, weight, left, right, is_row, is_column, h,
                    tl.minimum(h + DEPTH, HIDDEN_SIZE), HAS_DESCRIPTORS, UPCAST, BLOCK_H,
                )  # fmt: skip

        bias = load_bias(bias_ptr, column, is_column, dtype)
        z, slope = head_epilogue(product, bias, inner, outer, HAS_SOFTCAP)
        local = (tl.load(targets_ptr + row, is_row, other=-1) - first).to(tl.int32)
        store_tile(
            z, slope, row, is_row, local, column_block * BLOCK_V, columns, first,
            tile_offset + column_block, rows, out_ptr, anchors_ptr,
            (partials_ptr, partial_stride, best_ptr, target_z_ptr, out_stride),
            HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN, HAS_LOG_SUM_SQ,
        )  # fmt: skip


def projection_statistics(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (n,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
    index: Tensor | None,  # (n,) rows of hidden; None for all
    dtype: torch.dtype,  # operands are rounded to it
) -> list[Tensor]:
    """Log-probabilities, log-sum-exps and further statistics of all rows, launch by launch."""
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    rows, (vocabulary, hidden_size) = len(targets), weight.shape
    config, wide = configuration(hidden, weight, dtype, softcap, stats), wide_dtype(dtype)
    found = new_statistics(stats, hidden, rows, wide)
    of_row = new_partials(hidden, 1, vocabulary, stats, wide, config.block_v).values.nbytes
    of_row += hidden_size * dtype.itemsize
    step = max(1, _LAUNCH_BYTES // of_row // config.block_n) * config.block_n
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    together = 1 if weight.dtype == dtype else _LAUNCHES
    for first in range(0, len(parts), together):
        _launch(
            found, parts[first : first + together], hidden, weight, targets, epilogue, stats,
            index, dtype, config,
        )  # fmt: skip
    return finished(found)


def _launch(
    found: dict[str, Tensor],  # (rows,) each, out
    parts: list[slice],  # of the rows, one a launch
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    epilogue: Epilogue,
    stats: str,
    index: Tensor | None,
    dtype: torch.dtype,
    config: ProjectionConfig,
) -> None:
    """A few launches, for which the head is converted once."""
    vocabulary, block = len(weight), config.block_v
    launches = []
    for part in parts:
        rows, wide = part.stop - part.start, wide_dtype(dtype)
        operand = _left_operand(hidden, index, part, dtype, config.descriptors)
        partials = new_partials(hidden, rows, vocabulary, stats, wide, block)
        launches.append((part, operand, partials))
    for first, last in _weight_slices(weight, dtype, block):
        columns = weight[first:last].to(dtype)
        for part, (left, left_index), partials in launches:
            _project(
                left, columns, epilogue.sliced(first, last), targets[part], left_index, None, None,
                partials, first // block, first, config,
            )  # fmt: skip
        del columns  # before the next are there
    for part, _, partials in launches:
        of_part = {name: x[part] for name, x in found.items()}
        merge_into(
            of_part, partials.values, partials.best, partials.target_z, targets[part], vocabulary
        )


def projection_exponentials(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (columns, H) of the vocabulary from `first` on
    targets: Tensor,  # (n,) int64
    bias: Tensor | None,  # (columns,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
    dtype: torch.dtype,  # operands are rounded to it
    anchors: Tensor | None,  # (n,) nats
    out: Tensor,  # (n, columns) out
    values: Tensor,  # (values, tiles, n) and the two below out, for these columns
    best: Tensor | None,  # (tiles, n)
    target_z: Tensor,  # (n,)
    block: int,
    tile: int,  # among all tiles of a row, the first of these columns
    first: int,
) -> None:
    """Exponentials of all of the vocabulary or of a slice, and what `merge_statistics` needs."""
    epilogue, columns = Epilogue(bias, logit_scale, softcap, temperature), len(weight)
    config = configuration(hidden, weight, dtype, softcap, stats, block)
    partials = Partials(values, best, target_z, stats, block, columns, columns)
    hidden = hidden.to(dtype)
    for a, b in _weight_slices(weight, dtype, block):
        _project(
            hidden, weight[a:b].to(dtype), epilogue.sliced(a, b), targets, None, out[:, a:b],
            anchors, partials, tile + a // block, first + a, config,
        )  # fmt: skip


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of accumulators and results, for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def configuration(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    stats: str,
    block: int | None = None,  # that partials or peaks were made for
) -> ProjectionConfig:
    """How these operands are multiplied."""
    config = projection_config(
        hidden.device,
        dtype,
        rich=bool(stats),
        softcap=softcap is not None,
        describable=_describable(hidden, dtype) and _describable(weight, dtype),
    )
    if block not in (None, config.block_v):
        raise ValueError(f"tiles have {config.block_v} columns, not {block}")
    return config


def _left_operand(
    hidden: Tensor, index: Tensor | None, part: slice, dtype: torch.dtype, descriptors: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows `part` in `dtype`, and the index to read them through.

    Descriptors read blocks of neighbours, so there the rows are copied: 2·n·H·itemsize bytes, at
    H 4096 and V 128256 a four-hundredth of the product's time on an H200.
    """
    if index is None:
        return hidden[part].to(dtype), None
    if descriptors or hidden.dtype != dtype:
        return hidden.index_select(0, index[part]).to(dtype), None
    return hidden, index[part]


def _weight_slices(weight: Tensor, dtype: torch.dtype, block: int) -> list[tuple[int, int]]:
    """All of the weight, or whole tiles of it where a conversion makes a copy."""
    vocabulary, hidden_size = weight.shape
    step = vocabulary
    if weight.dtype != dtype:
        step = max(1, _CONVERTED_BYTES // (hidden_size * dtype.itemsize * block)) * block
    return [(i, min(i + step, vocabulary)) for i in range(0, vocabulary, step)]


def _project(
    hidden: Tensor,  # (n, H), or (M, H) with an index
    weight: Tensor,  # (columns, H) of the vocabulary from `first` on
    epilogue: Epilogue,
    targets: Tensor,  # (n,)
    index: Tensor | None,  # (n,)
    out: Tensor | None,  # (n, columns) out
    anchors: Tensor | None,  # (n,)
    partials: Partials,  # out, of these columns
    tile: int,
    first: int,
    config: ProjectionConfig,
) -> None:
    rows, columns, names = len(targets), len(weight), partials.stats.split()
    strides, dtype = (hidden.stride(0), weight.stride(0)), weight.dtype
    _, tiles, _ = partials.values.shape
    blocks = triton.cdiv(rows, config.block_n) * triton.cdiv(columns, config.block_v)
    if not blocks:
        return
    if config.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        hidden = TensorDescriptor.from_tensor(hidden, [config.block_n, config.block_h])
        weight = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_h])
    projection_kernel[(min(blocks, _processors(targets.device)),)](
        hidden,
        weight,
        epilogue.bias,
        index,
        targets,
        anchors,
        out,
        partials.target_z,
        partials.values,
        partials.best,
        rows,
        columns,
        first,
        tile,
        tiles * rows,
        0 if out is None else out.stride(0),
        *strides,
        HIDDEN_SIZE=weight.shape[1],
        **epilogue.arguments(UNIT),
        HAS_ENTROPY="entropy" in names,
        HAS_MEAN="mean_logits" in names,
        HAS_LOG_SUM_SQ="log_sum_sq_probs" in names,
        HAS_DESCRIPTORS=config.descriptors,
        UPCAST=INTERPRETED and partials.values.dtype != torch.float64,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        DEPTH=projection_depth(targets.device, dtype),
        BAND=config.band,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _describable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the copy engine takes its rows: they begin at multiples of 16 bytes."""
    if tensor.dtype != dtype:  # it will be copied
        return tensor.shape[1] * dtype.itemsize % 16 == 0
    apart = tensor.stride(0) >= tensor.shape[1]  # which of a single row says nothing
    return apart and tensor.data_ptr() % 16 == 0 and tensor.stride(0) * dtype.itemsize % 16 == 0


def _processors(device: torch.device) -> int:
    """Programs that run at once: one a multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 3  # of the interpreter: more than one, and each with several tiles
