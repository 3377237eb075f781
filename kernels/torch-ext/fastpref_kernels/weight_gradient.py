"""The head's gradient: a sum over groups of rows, kept in 24 bits.

    total (+)= scale · gradientᵀ @ rows

    1  a persistent kernel takes tile after tile of vocabulary × hidden and multiplies all rows
    2  half a tile after the other is added to what the total already holds, read and written once

A total in bf16 has an int8 remainder beside it: eight groups then round as one does, at 3 bytes an
element, and the bf16 half alone is the gradient. The library's products, slice after slice of the
vocabulary and added by `accumulate_kernel`, come to the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETED, ProjectionConfig, check_halves, choice, weight_gradient_config
from .forward import _describable, _processors
from .primitives import joined, rounded, split, widened

BLOCK_ELEMENTS = 2048  # of a sum without a product
_PROGRAMS = 2048
_SLICE_BYTES = 64 * 2**20  # of a library's product
# `mm(..., out_dtype=float32)` keeps the fp32 accumulator of fp16 products; CUDA, torch ≥ 2.8.
_VERSION = tuple(int(x) for x in torch.__version__.split(".")[:2])
_MM_OUT_DTYPE = _VERSION >= (2, 8) and torch.version.hip is None


@triton.jit
def add_to(
    high_ptr,  # the total, or the upper halves of its numbers
    low_ptr,  # their remainders, or None
    where,  # offsets
    within,  # which of them, None for all
    value,  # fp32
    ADD: tl.constexpr,  # else what is there is not read
):
    """total (+)= value."""
    if ADD:
        old = tl.load(high_ptr + where, within)
        if low_ptr is not None:
            old = joined(old, tl.load(low_ptr + where, within))
        value += widened(old)
    if low_ptr is not None:
        high, low = split(value)
        tl.store(low_ptr + where, low, within)
    else:
        high = rounded(value, high_ptr.dtype.element_ty)
    tl.store(high_ptr + where, high, within)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scale_ptr"])
def weight_gradient_kernel(
    high_ptr,  # (columns, hidden_size) in and out
    low_ptr,  # (columns, hidden_size) in and out, or None
    gradient,  # (rows, columns) pointer, or descriptor of blocks (BLOCK_N, BLOCK_V)
    hidden,  # (rows, hidden_size) pointer, or descriptor of blocks (BLOCK_N, BLOCK_H)
    scale_ptr,  # ()
    rows,
    columns,
    hidden_size,
    gradient_stride,
    hidden_stride,
    ADD: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies no half precision
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BAND: tl.constexpr,  # column blocks of the rows that share the gradient's tiles
):
    scale = tl.load(scale_ptr)
    v_blocks = tl.cdiv(columns, BLOCK_V)
    h_blocks = tl.cdiv(hidden_size, BLOCK_H)
    for tile in tl.range(tl.program_id(0), v_blocks * h_blocks, tl.num_programs(0)):
        # Along a band of hidden blocks first, then on to the next block of the vocabulary.
        band = tile // (BAND * v_blocks)
        band_width = tl.minimum(h_blocks - band * BAND, BAND)
        h_block = band * BAND + (tile % (BAND * v_blocks)) % band_width
        v_block = (tile % (BAND * v_blocks)) // band_width

        v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
        h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
        product = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        if HAS_DESCRIPTORS:  # beyond the rows there are zeros
            for n in range(0, rows, BLOCK_N):
                left = gradient.load([n, v_block * BLOCK_V])
                right = hidden.load([n, h_block * BLOCK_H])
                product = tl.dot(left.T, right, product)
        else:
            along = tl.arange(0, BLOCK_N)
            left_ptr = gradient + along.to(tl.int64)[None, :] * gradient_stride + v[:, None]
            right_ptr = hidden + along.to(tl.int64)[:, None] * hidden_stride + h[None, :]
            for n in range(0, rows, BLOCK_N):
                is_row = along < rows - n
                left = tl.load(left_ptr, (v < columns)[:, None] & is_row[None, :], other=0.0)
                right = tl.load(right_ptr, is_row[:, None] & (h < hidden_size)[None, :], other=0.0)
                if UPCAST:
                    left, right = left.to(tl.float32), right.to(tl.float32)
                product = tl.dot(left, right, product, input_precision="ieee")
                left_ptr += tl.cast(gradient_stride, tl.int64) * BLOCK_N
                right_ptr += tl.cast(hidden_stride, tl.int64) * BLOCK_N

        # In two halves: the whole tile in fp32, laid out as memory is, takes too much room.
        halves = tl.reshape(product, (BLOCK_V, 2, BLOCK_H // 2))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        line = v.to(tl.int64)[:, None] * hidden_size
        for half in tl.static_range(2):
            h = h_block * BLOCK_H + half * (BLOCK_H // 2) + tl.arange(0, BLOCK_H // 2)
            within = (v < columns)[:, None] & (h < hidden_size)[None, :]
            value = (first if half == 0 else second) * scale
            add_to(high_ptr, low_ptr, line + h[None, :], within, value, ADD)


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["scale_ptr"])
def accumulate_kernel(
    high_ptr,  # (elements,) in and out
    low_ptr,  # (elements,) in and out, or None
    product_ptr,  # (elements,)
    scale_ptr,  # ()
    elements,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr)
    for block in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * BLOCK
        where = first + tl.arange(0, BLOCK)
        if first + BLOCK <= elements:  # a mask would part the loads
            add_to(high_ptr, low_ptr, where, None, tl.load(product_ptr + where) * scale, ADD)
        else:
            within = where < elements
            value = tl.load(product_ptr + where, within) * scale
            add_to(high_ptr, low_ptr, where, within, value, ADD)


def add_weight_gradient_(
    high: Tensor,  # (V, H)
    low: Tensor | None,  # (V, H) int8
    gradient: Tensor,  # (n, V) fp16
    rows: Tensor,  # (n, H) fp16
    scale: Tensor,  # () fp32
    add: bool,
) -> None:
    """`high + low (+)= scale · gradientᵀ @ rows`, in one launch or slice by slice."""
    check_halves(high, low, high.shape)
    if not len(rows):
        if not add:
            for half in (high, low):
                if half is not None:
                    half.zero_()
    elif choice("weight_gradient", high.device) == "library":
        step = max(1, _SLICE_BYTES // (4 * rows.shape[1]))
        for first in range(0, len(high), step):
            part = slice(first, first + step)
            product = _product(gradient[:, part].T, rows)
            accumulate_(high[part], None if low is None else low[part], product, scale, add)
    else:
        describable = _describable(gradient, gradient.dtype) and _describable(rows, rows.dtype)
        config = weight_gradient_config(high.device, describable=describable)
        _multiply(high, low, gradient, rows, scale, add, config)


def _multiply(
    high: Tensor,
    low: Tensor | None,
    gradient: Tensor,
    rows: Tensor,
    scale: Tensor,
    add: bool,
    config: ProjectionConfig,
) -> None:
    columns, hidden_size = high.shape
    strides = gradient.stride(0), rows.stride(0)
    tiles = triton.cdiv(columns, config.block_v) * triton.cdiv(hidden_size, config.block_h)
    left, right = gradient, rows
    if config.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        left = TensorDescriptor.from_tensor(gradient, [config.block_n, config.block_v])
        right = TensorDescriptor.from_tensor(rows, [config.block_n, config.block_h])
    weight_gradient_kernel[(min(tiles, _processors(high.device)),)](
        high,
        low,
        left,
        right,
        scale,
        len(rows),
        columns,
        hidden_size,
        *strides,
        ADD=add,
        HAS_DESCRIPTORS=config.descriptors,
        UPCAST=INTERPRETED,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        BAND=config.band,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def accumulate_(
    high: Tensor,  # (rows, H)
    low: Tensor | None,  # (rows, H) int8
    product: Tensor,  # (rows, H) fp32
    scale: Tensor,  # () fp32
    add: bool,
) -> None:
    """`high + low (+)= scale · product`."""
    check_halves(high, low, high.shape)
    if product.numel():
        blocks = triton.cdiv(product.numel(), BLOCK_ELEMENTS)
        accumulate_kernel[(min(blocks, _PROGRAMS),)](
            high,
            low,
            product,
            scale,
            product.numel(),
            ADD=add,
            BLOCK=BLOCK_ELEMENTS,
            num_warps=8,
            num_stages=1,
        )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """With fp32 accumulators kept; converted fp16 loses nothing, and nothing to TF32."""
    if left.device.type == "cuda" and _MM_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
