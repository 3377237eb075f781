"""What surrounds the large products, by torch: fitted operands, numbers in two halves, scaling.

Half-precision products of gradients take float16, whose three bits more than bfloat16's are what a
gradient's accuracy needs, and whose range suffices after a power of two. Sums in the making are
kept in 24 bits, as bfloat16 and an int8 remainder, so that the first half alone is the gradient.
Backends with kernels of their own replace the functions below, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = 0x7FC00000  # another one's bits could round over into the sign


def fitted(
    x: Tensor,  # (m, H)
    bound: Tensor,  # () at least max |x|
    index: Tensor | None = None,  # (n,) rows of x, None for all
    factor: Tensor | None = None,  # (n,)
    factor_bound: Tensor | None = None,  # () at least max |factor|
) -> tuple[Tensor, Tensor]:
    """`factor · x[index]` in float16 `(n, H)`, times a power of two; and what takes it away again.

    The power lifts the bound into [2^14, 2^15): of what is 2^-29 of it or more no bit is lost to
    float16's range. Nothing is read on the host.
    """
    if factor_bound is not None:
        bound = bound.float() * factor_bound.float()
    power = _fitting_power(bound)
    if index is not None:
        x = x.index_select(0, index)
    scale = power if factor is None else factor.float()[:, None] * power
    return (x.float() * scale).to(torch.float16), power.reciprocal()


def _fitting_power(bound: Tensor) -> Tensor:
    bound = bound.float()
    exponent = torch.frexp(torch.where(bound == 0, 1, bound)).exponent
    power = torch.ldexp(torch.ones_like(bound), (15 - exponent).clamp(-100, 100))
    return torch.where(bound.isfinite(), power, torch.nan)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as bfloat16, rounded to the nearest, and an int8 remainder: 24 bits of 32."""
    bits = torch.where(x.isnan(), _NAN, x.view(torch.int32))
    of_24 = (bits + 0x80) >> 8
    high = (of_24 + 0x80) >> 8
    low = of_24 - (high << 8)
    return (high << 16).view(torch.float32).to(torch.bfloat16), low.to(torch.int8)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """float32 from the two halves that `split` makes."""
    of_24 = (high.float().view(torch.int32) >> 8) + low
    return (of_24 << 8).view(torch.float32)


def accumulate_(
    high: Tensor,  # (rows, H), in place
    low: Tensor | None,  # (rows, H) int8 remainder of high, in place
    product: Tensor,  # (rows, H)
    scale: Tensor,  # ()
    add: bool,
) -> None:
    """`total (+)= scale · product`, rounded once; what is not added to may be uninitialised."""
    product = product * scale
    if add:
        product = product + (high if low is None else joined(high, low))
    if low is None:
        high.copy_(product)
    else:
        for half, value in zip((high, low), split(product), strict=True):
            half.copy_(value)


def keep_(
    wide: Tensor,  # (n, H)
    high: Tensor,  # (M, H) bfloat16, some rows of it written
    low: Tensor,  # (n, H) int8 remainder, written
    index: Tensor,  # (n,) rows of high
) -> None:
    """Keeps rows of gradient as two halves."""
    upper, lower = split(wide.float())
    high.index_copy_(0, index, upper)
    low.copy_(lower)


def take_(
    high: Tensor,  # (M, H), some rows of it rewritten
    low: Tensor | None,  # (n, H) int8 remainder
    index: Tensor,  # (n,) rows of high
    coef: Tensor,  # (n,)
    upstream: Tensor,  # ()
) -> None:
    """Kept rows times their coefficients and the upstream gradient, rounded once, where high is."""
    rows = high.index_select(0, index)
    wide = rows.to(coef.dtype) if low is None else joined(rows, low)
    high.index_copy_(0, index, (wide * (coef * upstream)[:, None]).to(high.dtype))


def scaled(
    grad: Tensor,  # consumed
    upstream: Tensor,  # ()
    dtype: torch.dtype,
    low: Tensor | None = None,  # int8 remainder of grad
) -> Tensor:
    """`grad · upstream` in `dtype`, rounded once; in place where that is grad's."""
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return grad.to(dtype)
    if low is None:
        return grad.mul_(upstream).to(dtype)
    for half, rest in zip(grad.split(_ROWS), low.split(_ROWS), strict=True):
        half.copy_(joined(half, rest) * upstream)
    return grad


_ROWS = 1024  # of a head, joined at a time
