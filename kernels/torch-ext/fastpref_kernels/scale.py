"""Gradients times an upstream gradient on the device; no pass over memory when it is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import check_halves
from .primitives import joined, rounded, widened

BLOCK_ELEMENTS = 4096
_PROGRAMS = 1024  # enough to fill a device, few enough to cost nothing when there is no work


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["upstream_ptr"])
def scale_kernel(
    grad_ptr,  # (elements,)
    low_ptr,  # (elements,) remainders where grad_ptr has upper halves, or None
    upstream_ptr,  # ()
    out_ptr,  # (elements,) out; grad_ptr if IN_PLACE
    elements,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr)
    blocks = tl.cdiv(elements, BLOCK)
    if IN_PLACE:  # of a factor of 1 there is nothing to do
        blocks = tl.where(upstream == 1, 0, blocks)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * BLOCK
        where = first + tl.arange(0, BLOCK)
        if first + BLOCK <= elements:  # a mask would part the loads
            scale_block(grad_ptr, low_ptr, upstream, out_ptr, where, None)
        else:
            scale_block(grad_ptr, low_ptr, upstream, out_ptr, where, where < elements)


@triton.jit
def scale_block(grad_ptr, low_ptr, upstream, out_ptr, where, within):
    grad = tl.load(grad_ptr + where, within)
    if low_ptr is not None:
        grad = joined(grad, tl.load(low_ptr + where, within))
    grad = widened(grad)
    grad = grad * upstream.to(grad.dtype)
    tl.store(out_ptr + where, rounded(grad, out_ptr.dtype.element_ty), within)


def scale_(
    grad: Tensor,  # dense, scaled in place
    upstream: Tensor,  # ()
    low: Tensor | None,  # dense int8, what bf16 left of grad
) -> None:
    """`(grad + low) · upstream`, where grad is."""
    _launch(grad, low, upstream, grad)


def scaled(
    grad: Tensor,  # dense
    upstream: Tensor,  # ()
    dtype: torch.dtype,
    low: Tensor | None,  # dense int8, what bf16 left of grad
) -> Tensor:
    """`(grad + low) · upstream`, rounded once."""
    out = torch.empty_like(grad, dtype=dtype)
    _launch(grad, low, upstream, out)
    return out


def _launch(grad: Tensor, low: Tensor | None, upstream: Tensor, out: Tensor) -> None:
    check_halves(grad, low, grad.shape)
    if grad.numel():
        blocks = triton.cdiv(grad.numel(), BLOCK_ELEMENTS)
        scale_kernel[(min(blocks, _PROGRAMS),)](
            grad,
            low,
            upstream,
            out,
            grad.numel(),
            IN_PLACE=out is grad,
            BLOCK=BLOCK_ELEMENTS,
            num_warps=8,
            num_stages=1,
        )
