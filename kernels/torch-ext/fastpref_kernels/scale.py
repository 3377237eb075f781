"""Gradients times an upstream gradient on the device; no pass over memory when it is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import rounded

BLOCK_ELEMENTS = 4096
_PROGRAMS = 1024  # enough to fill a device, few enough to cost nothing when there is no work


@triton.jit(do_not_specialize=["elements"])
def scale_kernel(
    grad_ptr,  # (elements,)
    upstream_ptr,  # ()
    out_ptr,  # (elements,) out; grad_ptr if IN_PLACE
    elements,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr).to(grad_ptr.dtype.element_ty)
    blocks = tl.cdiv(elements, BLOCK)
    if IN_PLACE:  # of a factor of 1 there is nothing to do
        blocks = tl.where(upstream == 1, 0, blocks)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        where = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + where, where < elements, other=0.0) * upstream
        tl.store(out_ptr + where, rounded(grad, out_ptr.dtype.element_ty), where < elements)


def scale_(
    grad: Tensor,  # dense, scaled in place
    upstream: Tensor,  # ()
) -> None:
    """`grad · upstream`, where grad is."""
    _launch(grad, upstream, grad)


def scaled(
    grad: Tensor,  # dense
    upstream: Tensor,  # ()
    dtype: torch.dtype,
) -> Tensor:
    """`grad · upstream`, rounded once."""
    out = torch.empty_like(grad, dtype=dtype)
    _launch(grad, upstream, out)
    return out


def _launch(grad: Tensor, upstream: Tensor, out: Tensor) -> None:
    if grad.numel():
        blocks = triton.cdiv(grad.numel(), BLOCK_ELEMENTS)
        scale_kernel[(min(blocks, _PROGRAMS),)](
            grad,
            upstream,
            out,
            grad.numel(),
            IN_PLACE=out is grad,
            BLOCK=BLOCK_ELEMENTS,
            num_warps=8,
        )
