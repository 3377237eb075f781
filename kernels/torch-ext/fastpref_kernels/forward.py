"""Projection to log-probability: hidden states in, statistics of each row out, no logits between.

    1  a persistent kernel takes tile after tile of rows × vocabulary, multiplies, applies the
       head's epilogue to the accumulators and leaves, for each row of the tile, its maximum and
       its sum of exponentials (and on request three more sums and the place of the maximum);
       the one tile that holds a row's target also leaves the target's logit
    2  a small kernel merges a row's tiles

Each value has one writer, so there are no locks, no atomics, and two runs agree bit for bit. The
tiles' values are `(tiles, n)`: 8 bytes a row and tile.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETED, Epilogue, ProjectionConfig, architecture, projection_config
from .primitives import (
    head_epilogue,
    load_bias,
    online_argmax_update,
    online_softmax_update,
    store_statistics,
)
from .rows import finished, new_statistics, statistics_pointers

# What the tiles' values and a copy of the rows may take: more rows go in a launch of their own.
_LAUNCH_BYTES = 32 * 2**20
# Bytes of the weight converted at a time where the products do not take its dtype.
_CONVERTED_BYTES = 64 * 2**20
BAND = 8  # row blocks that share the weight's tiles while those are in the L2 cache
MERGE_N, MERGE_T = 32, 32  # rows × tiles that the merge holds


@triton.jit(do_not_specialize=["rows", "tile_offset", "first", "partial_stride"])
def projection_kernel(
    hidden,  # (·, H) pointer, or descriptor of blocks (BLOCK_N, BLOCK_H)
    weight,  # (columns, H) pointer, or descriptor of blocks (BLOCK_V, BLOCK_H)
    bias_ptr,  # (columns,), or None
    index_ptr,  # (rows,) rows of hidden, or None for all
    targets_ptr,  # (rows,)
    target_z_ptr,  # (rows,) out
    partials_ptr,  # (values, tiles, rows) out
    best_ptr,  # (tiles, rows) out, or None
    rows,
    columns,
    first,  # column of the vocabulary that weight begins with
    tile_offset,  # its tile
    partial_stride,  # tiles · rows
    hidden_stride,
    weight_stride,
    HIDDEN_SIZE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_LOG_SUM_SQ: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies no half precision
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BAND: tl.constexpr,
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
        product = tl.zeros((BLOCK_N, BLOCK_V), dtype)
        if HAS_DESCRIPTORS:
            for h in range(0, HIDDEN_SIZE, BLOCK_H):
                left = hidden.load([row_block * BLOCK_N, h])
                right = weight.load([column_block * BLOCK_V, h])
                product = tl.dot(left, right.T, product)
        else:
            source = row
            if index_ptr is not None:
                source = tl.load(index_ptr + row, is_row, other=0)
            along = tl.arange(0, BLOCK_H)
            left_ptr = hidden + source.to(tl.int64)[:, None] * hidden_stride + along[None, :]
            right_ptr = weight + column.to(tl.int64)[None, :] * weight_stride + along[:, None]
            for h in range(0, HIDDEN_SIZE, BLOCK_H):
                is_along = along < HIDDEN_SIZE - h
                left = tl.load(left_ptr + h, is_row[:, None] & is_along[None, :], other=0.0)
                right = tl.load(right_ptr + h, is_along[:, None] & is_column[None, :], other=0.0)
                if UPCAST:
                    left, right = left.to(dtype), right.to(dtype)
                product = tl.dot(left, right, product, input_precision="ieee", out_dtype=dtype)

        bias = load_bias(bias_ptr, column, is_column, dtype)
        z, _ = head_epilogue(product, bias, INNER, OUTER, HAS_SOFTCAP)
        out = (tile_offset + column_block).to(tl.int64) * rows + row
        if HAS_MEAN:
            sum_z = tl.sum(z, 1)  # beyond the vocabulary a logit is still 0 here
            tl.store(partials_ptr + 2 * partial_stride + out, sum_z, is_row)
        local = tl.load(targets_ptr + row, is_row, other=-1) - first  # (n,)
        target_z = tl.sum(tl.where(column[None, :] == local[:, None], z, 0.0), 1)
        has_target = (local >= column_block * BLOCK_V) & (local < (column_block + 1) * BLOCK_V)
        tl.store(target_z_ptr + row, target_z, is_row & has_target & (local < columns))
        z = tl.where(is_column[None, :], z, float("-inf"))
        zero = tl.zeros((BLOCK_N,), dtype)
        if best_ptr is not None:
            start = first + column_block * BLOCK_V
            best = online_argmax_update(
                tl.full((BLOCK_N,), -1, tl.int32), zero + float("-inf"), z, start
            )
            tl.store(best_ptr + out, best, is_row)
        peak, total, sum_ez, sum_ee = online_softmax_update(
            zero + float("-inf"), zero, zero, zero, z, 1.0, None, 1.0, HAS_ENTROPY, HAS_LOG_SUM_SQ
        )
        tl.store(partials_ptr + out, peak, is_row)
        tl.store(partials_ptr + partial_stride + out, total, is_row)
        if HAS_ENTROPY:
            tl.store(partials_ptr + 3 * partial_stride + out, sum_ez, is_row)
        if HAS_LOG_SUM_SQ:
            tl.store(partials_ptr + 4 * partial_stride + out, sum_ee, is_row)


@triton.jit(do_not_specialize=["rows", "tiles", "partial_stride"])
def merge_kernel(
    partials_ptr,  # (values, tiles, rows)
    best_ptr,  # (tiles, rows)
    targets_ptr,  # (rows,)
    target_z_ptr,  # (rows,)
    logps_ptr,  # (rows,) out, as the five below, of which the last four may be None
    lse_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_ptr,
    rows,
    tiles,
    partial_stride,
    vocabulary,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    target = tl.load(targets_ptr + row, is_row, other=0)
    target_z = tl.load(target_z_ptr + row, is_row, other=0.0)
    zero = tl.zeros((BLOCK_N,), partials_ptr.dtype.element_ty)
    peak, total, sum_ez, sum_ee = zero + float("-inf"), zero, zero, zero
    sum_z, best = zero, tl.full((BLOCK_N,), -1, tl.int32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        there = partials_ptr + tile.to(tl.int64)[None, :] * rows + row[:, None]  # (n, tiles)
        within = is_row[:, None] & (tile < tiles)[None, :]
        tile_peak = tl.load(there, within, other=float("-inf"))
        if is_top1_ptr is not None:
            which = online_argmax_update(zero.to(tl.int32) - 1, peak, tile_peak, start)
            place = best_ptr + which.to(tl.int64) * rows + row
            best = tl.where(which < 0, best, tl.load(place, is_row & (which >= 0), other=-1))
        if mean_logits_ptr is not None:
            sum_z += tl.sum(tl.load(there + 2 * partial_stride, within, other=0.0), 1)
        tile_total = tl.load(there + partial_stride, within, other=0.0)
        tile_ez, tile_ee = None, None
        if entropy_ptr is not None:
            tile_ez = tl.load(there + 3 * partial_stride, within, other=0.0)
        if log_sum_sq_ptr is not None:
            tile_ee = tl.load(there + 4 * partial_stride, within, other=0.0)
        peak, total, sum_ez, sum_ee = online_softmax_update(
            peak, total, sum_ez, sum_ee, tile_peak, tile_total, tile_ez, tile_ee,
            entropy_ptr is not None, log_sum_sq_ptr is not None,
        )  # fmt: skip
    store_statistics(
        (logps_ptr, lse_ptr, entropy_ptr, mean_logits_ptr, is_top1_ptr, log_sum_sq_ptr),
        row, is_row, (peak, total, sum_ez, sum_ee), sum_z / vocabulary, best == target, target_z,
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
    wide = wide_dtype(dtype)
    rows, (vocabulary, _) = len(targets), weight.shape
    config = projection_config(
        architecture(hidden.device),
        dtype,
        rich=bool(stats) or softcap is not None,
        describable=_describable(hidden, dtype) and _describable(weight, dtype),
    )
    found = new_statistics(stats, hidden, rows, wide)
    values = 5 if {"entropy", "log_sum_sq_probs"} & {*found} else 2 + ("mean_logits" in found)
    slices = _weight_slices(weight, dtype, config.block_v)
    tiles = triton.cdiv(vocabulary, config.block_v)

    of_row = tiles * values * wide.itemsize + weight.shape[1] * dtype.itemsize
    step = max(1, _LAUNCH_BYTES // of_row // config.block_n)
    step *= config.block_n
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        n = part.stop - part.start
        partials = hidden.new_empty((values, tiles, n), dtype=wide)
        best = None
        if "is_top1" in found:
            best = hidden.new_empty((tiles, n), dtype=torch.int32)
        target_z = hidden.new_empty(n, dtype=wide)
        left, left_index = _left_operand(hidden, index, part, dtype, config.descriptors)
        for first, last in slices:
            _project(
                left, weight[first:last].to(dtype), epilogue.sliced(first, last), targets[part],
                left_index, target_z, partials, best, first, config, found.keys(),
            )  # fmt: skip
        merge_kernel[(triton.cdiv(n, MERGE_N),)](
            partials,
            best,
            targets[part],
            target_z,
            *statistics_pointers({name: x[part] for name, x in found.items()}),
            n,
            tiles,
            tiles * n,
            vocabulary,
            BLOCK_N=MERGE_N,
            BLOCK_T=MERGE_T,
            num_warps=4,
        )
    return finished(found)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of accumulators and results, for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    target_z: Tensor,  # (n,) out, where the target is among these columns
    partials: Tensor,  # (values, tiles, n) out, the tiles of these columns
    best: Tensor | None,  # (tiles, n) out
    first: int,
    config: ProjectionConfig,
    stats: Collection[str],
) -> None:
    rows, columns = len(targets), len(weight)
    strides = hidden.stride(0), weight.stride(0)
    _, tiles, _ = partials.shape
    blocks = triton.cdiv(rows, config.block_n) * triton.cdiv(columns, config.block_v)
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
        target_z,
        partials,
        best,
        rows,
        columns,
        first,
        first // config.block_v,
        tiles * rows,
        *strides,
        HIDDEN_SIZE=weight.shape[1],
        **epilogue.flags(),
        HAS_ENTROPY="entropy" in stats,
        HAS_MEAN="mean_logits" in stats,
        HAS_LOG_SUM_SQ="log_sum_sq_probs" in stats,
        HAS_DESCRIPTORS=config.descriptors,
        UPCAST=INTERPRETED and partials.dtype != torch.float64,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        BAND=BAND,
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
