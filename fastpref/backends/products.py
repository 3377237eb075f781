"""The large matrix products: dtype of their operands, slices of the head, precision."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import Head

# Rows of the weight converted at a time where the products do not take its dtype.
_CONVERTED_ROWS = 4096
# `mm(..., out_dtype=float32)` keeps the fp32 accumulator of bf16 products; CUDA, torch ≥ 2.8.
_VERSION = tuple(int(x) for x in torch.__version__.split(".")[:2])
_MM_OUT_DTYPE = _VERSION >= (2, 8) and torch.version.hip is None
# Who multiplies float32, each with a setting of its own since torch 2.9.
_LIBRARIES: tuple[Any, ...] = ()
if _VERSION >= (2, 9):
    mkldnn: Any = torch.backends.mkldnn  # torch's own types lack its `matmul`
    _LIBRARIES = (torch.backends.cuda.matmul, mkldnn.matmul)
_SETTINGS_LOCK = threading.Lock()


def multiplies_half(device_type: str) -> bool:
    """Whether a product of half-precision operands can keep its fp32 accumulators."""
    return device_type == "cuda" and _MM_OUT_DTYPE


def product_dtype(head: Head) -> torch.dtype:
    """Half precision only where a product keeps its accumulators; else converted."""
    half = multiplies_half(head.weight.device.type)
    return head.compute_dtype if half else head.accumulate_dtype


def gradient_dtype(head: Head) -> torch.dtype:
    """Of the operands of gradients' products: float16, fitted, where products take half precision.

    With bfloat16 a gradient would be beyond the promised 2e-3, of which its own rounding to
    bfloat16 is 1.66e-3; with this it is within 1.1 times that rounding.
    """
    dtype = product_dtype(head)
    return torch.float16 if dtype.itemsize == 2 else dtype


def as_operand(hidden: Tensor, head: Head) -> Tensor:
    """Rounded to the head's `compute_dtype`, in the products' dtype."""
    return hidden.to(head.compute_dtype).to(product_dtype(head))


def weight_slices(head: Head, columns: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """`(first, last, weight[first:last])` over the vocabulary, in the products' dtype.

    Without `columns` the slices are as large as they can be: all of the weight, or
    `_CONVERTED_ROWS` where a copy is made.
    """
    vocabulary, dtype = head.weight.shape[0], product_dtype(head)
    copies = head.weight.dtype != dtype or head.frozen_weight is not None
    step = columns or (_CONVERTED_ROWS if copies else max(1, vocabulary))
    for first in range(0, vocabulary, step):
        last = min(first + step, vocabulary)
        yield first, last, head.rows(slice(first, last)).to(dtype)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 as such: in it no TF32 and no bf16, whatever the process allows.

    The settings are the process's own: they are held for the length of a product only, by one
    thread at a time, and left as they were.
    """
    with _SETTINGS_LOCK:
        apart = [(library, library.fp32_precision) for library in _LIBRARIES]
        together = _matmul_precision()
        if together == "highest" and all(allowed in ("ieee", "none") for _, allowed in apart):
            yield
            return
        _allow("highest" if together else None, [(library, "ieee") for library, _ in apart])
        try:
            yield
        finally:
            _allow(together, apart)


def _matmul_precision() -> str | None:
    """The one setting for all libraries; None where they were set apart and it refuses to say."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _allow(together: str | None, apart: list[tuple[Any, str]]) -> None:
    if together is not None:
        torch.set_float32_matmul_precision(together)
    for library, allowed in apart:
        library.fp32_precision = "none"  # takes after `torch.backends.fp32_precision`
        if library.fp32_precision != allowed:
            library.fp32_precision = allowed


def product_into(left: Tensor, right: Tensor, *, out: Tensor, scale: float = 1.0) -> None:
    """`out = scale · left @ right`, in out's dtype from the accumulators."""
    with full_precision():
        if left.dtype != out.dtype:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
        elif scale == 1:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
            return
    if scale != 1:
        out.mul_(scale)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, accumulated in total's dtype."""
    with full_precision():
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
