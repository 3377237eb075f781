"""Gradients of hidden states, written where they are kept until their coefficients are known.

    high[index] (+ low) = factor · gradient @ weight

The head becomes an fp16 operand, fitted by a power of two, while its tiles are on their way to the
product: there is no copy of it, and no sum of the vocabulary's slices in memory.

What is converted lies in registers, and wgmma takes from there its left operand only. So the
product is weightᵀ @ gradientᵀ where that is the instruction; elsewhere as the formula has it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    INTERPRETED,
    ProjectionConfig,
    check_halves,
    hidden_gradient_config,
)
from .forward import _describable, _processors
from .operands import fitted_power
from .primitives import rounded, split, widened

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def fp16_operand(weight, power, DTYPE: tl.constexpr):
    """Rounded to `DTYPE` as the forward's operand is, then fitted."""
    weight = rounded(weight, DTYPE)
    if power is not None:
        weight = rounded(widened(weight) * power, tl.float16)
    return weight


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["bound_ptr", "factor_ptr", "index_ptr"],
)
def hidden_gradient_kernel(
    high_ptr,  # (·, hidden_size) out, rows `index`
    low_ptr,  # (rows, hidden_size) out, or None
    gradient,  # (rows, columns) pointer, or descriptor of blocks (BLOCK_N, BLOCK_V)
    weight,  # (columns, hidden_size) pointer, or descriptor of blocks (BLOCK_V, BLOCK_H)
    bound_ptr,  # (), or None for a weight that is fp16 as it is
    factor_ptr,  # (rows,)
    index_ptr,  # (rows,)
    rows,
    columns,
    hidden_size,
    high_stride,
    gradient_stride,
    weight_stride,
    DTYPE: tl.constexpr,  # that the weight is rounded to first
    HAS_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies no half precision
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BAND: tl.constexpr,
):
    power, inverse = None, 1.0
    if bound_ptr is not None:
        # Loaded as a block: of a scalar the compiler would make one in a layout of its choice, and
        # take the weight through shared memory once more to meet it there.
        power, inverse = fitted_power(bound_ptr + tl.zeros((1, 1), tl.int32), None)

    # Down a band of row blocks first, then on to the next block of hidden.
    row_blocks, h_blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(hidden_size, BLOCK_H)
    tile = tl.program_id(0)
    band = tile // (BAND * h_blocks)
    band_height = tl.minimum(row_blocks - band * BAND, BAND)
    row_block = band * BAND + (tile % (BAND * h_blocks)) % band_height
    h_block = (tile % (BAND * h_blocks)) // band_height

    h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
    if HAS_DESCRIPTORS:  # beyond rows and columns there are zeros
        product = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
        for v in range(0, columns, BLOCK_V):
            right = gradient.load([row_block * BLOCK_N, v])
            left = fp16_operand(weight.load([v, h_block * BLOCK_H]), power, DTYPE)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left.T, right.T, product, input_precision="ieee")
        halves = tl.permute(tl.reshape(product, (BLOCK_H, 2, BLOCK_N // 2)), (0, 2, 1))
    else:
        row = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        along = tl.arange(0, BLOCK_V)
        left_ptr = gradient + row.to(tl.int64)[:, None] * gradient_stride + along[None, :]
        right_ptr = weight + along.to(tl.int64)[:, None] * weight_stride + h[None, :]
        product = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for v in range(0, columns, BLOCK_V):
            is_column = along < columns - v
            left = tl.load(left_ptr, (row < rows)[:, None] & is_column[None, :], other=0.0)
            right = tl.load(right_ptr, is_column[:, None] & (h < hidden_size)[None, :], other=0.0)
            right = fp16_operand(right, power, DTYPE)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product, input_precision="ieee")
            left_ptr += BLOCK_V
            right_ptr += tl.cast(weight_stride, tl.int64) * BLOCK_V
        halves = tl.permute(tl.reshape(product, (2, BLOCK_N // 2, BLOCK_H)), (1, 2, 0))

    # In two halves: the whole tile in fp32, laid out as memory is, takes too much room.
    first, second = tl.split(halves)
    for half in tl.static_range(2):
        row = row_block * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        is_row = row < rows
        place = tl.load(index_ptr + row, is_row, other=0)
        factor = tl.load(factor_ptr + row, is_row, other=0.0)[:, None]
        value = first if half == 0 else second
        if HAS_DESCRIPTORS:
            value = value.T
        value *= factor * inverse
        within = is_row[:, None] & (h < hidden_size)[None, :]
        if low_ptr is not None:
            high, low = split(value)
            dense = row.to(tl.int64)[:, None] * hidden_size + h[None, :]
            tl.store(low_ptr + dense, low, within)
        else:
            high = rounded(value, high_ptr.dtype.element_ty)
        tl.store(high_ptr + place[:, None] * high_stride + h[None, :], high, within)


def hidden_gradient_(
    high: Tensor,  # (M, H)
    low: Tensor | None,  # (n, H) int8
    index: Tensor,  # (n,) int64, no two alike
    gradient: Tensor,  # (n, V) fp16
    factor: Tensor,  # (n,)
    weight: Tensor,  # (V, H)
    bound: Tensor | None,  # ()
    dtype: torch.dtype,  # bf16 or fp16
) -> None:
    """`high[index] + low = factor · gradient @ weight`, in one launch."""
    (rows, columns), hidden_size = gradient.shape, weight.shape[1]
    check_halves(high, low, (rows, hidden_size))
    _check(gradient, factor, index, bound, dtype)
    describable = all(_describable(x, x.dtype) for x in (gradient, weight))
    config = _configuration(rows, hidden_size, high.device, describable)
    tiles = _tiles(rows, hidden_size, config)
    if not tiles:
        return
    strides = high.stride(0), gradient.stride(0), weight.stride(0)
    if config.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        gradient = TensorDescriptor.from_tensor(gradient, [config.block_n, config.block_v])
        weight = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_h])
    hidden_gradient_kernel[(tiles,)](
        high,
        low,
        gradient,
        weight,
        bound,
        factor,
        index,
        rows,
        columns,
        hidden_size,
        *strides,
        DTYPE=_DTYPES[dtype],
        HAS_DESCRIPTORS=config.descriptors,
        UPCAST=INTERPRETED,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        BAND=config.band,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _configuration(
    rows: int, hidden_size: int, device: torch.device, describable: bool
) -> ProjectionConfig:
    """Small tiles where large ones would leave every second processor without one."""
    large = hidden_gradient_config(device, describable=describable)
    if 2 * _tiles(rows, hidden_size, large) > _processors(device):
        return large
    return hidden_gradient_config(device, small=True, describable=describable)


def _tiles(rows: int, hidden_size: int, config: ProjectionConfig) -> int:
    return triton.cdiv(rows, config.block_n) * triton.cdiv(hidden_size, config.block_h)


def _check(
    gradient: Tensor, factor: Tensor, index: Tensor, bound: Tensor | None, dtype: torch.dtype
) -> None:
    if gradient.dtype != torch.float16:
        raise ValueError(f"gradient must be float16, got {gradient.dtype}")
    if dtype not in _DTYPES:
        raise ValueError(f"weight is rounded to bfloat16 or float16 first, not to {dtype}")
    if bound is None and dtype != torch.float16:
        raise ValueError(f"{dtype} is fitted to float16: give the bound of weight")
    if not len(gradient) == len(factor) == len(index):
        lengths = len(gradient), len(factor), len(index)
        raise ValueError("gradient, factor and index have {}, {} and {} rows".format(*lengths))
