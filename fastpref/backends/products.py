"""The large matrix products: operands, dtype, precision, and gradients slice after slice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import Grads, Head, RowStats

# Rows of the weight converted at a time where the products do not take its dtype.
_CONVERTED_ROWS = 4096
# Rows of the weight gathered at a time.
_TARGET_ROWS = 256
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


def as_operand(hidden: Tensor, head: Head) -> Tensor:
    """Rounded to the head's `compute_dtype`, in the products' dtype."""
    return hidden.to(head.compute_dtype).to(product_dtype(head))


def weight_slices(head: Head, columns: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """`(first, last, weight[first:last])` over the vocabulary, in the products' dtype.

    Without `columns` the slices are as large as they can be: all of the weight, or
    `_CONVERTED_ROWS` where a conversion makes a copy.
    """
    vocabulary, dtype = head.weight.shape[0], product_dtype(head)
    converts = head.weight.dtype != dtype
    step = columns or (_CONVERTED_ROWS if converts else vocabulary)
    for first in range(0, vocabulary, step):
        last = min(first + step, vocabulary)
        yield first, last, head.weight[first:last].to(head.compute_dtype).to(dtype)


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


def sliced_gradients(
    hidden: Tensor,  # (n, H)
    head: Head,
    tile: tuple[int, int],
    wants: tuple[bool, bool, bool],  # hidden, weight, bias
    gradient_of: Callable[[Tensor, Tensor, slice, int, Tensor], Tensor],
) -> Grads:
    """Gradients from logits computed once more, vocabulary slice after vocabulary slice.

    `gradient_of(operand, weight, block, first, buffer)` computes the logits of the rows `block` in
    `buffer` and returns their gradient, in the products' dtype. A slice's ∂W is one sum over all
    rows, accumulated wide and written once.
    """
    rows, columns = tile
    operand = as_operand(hidden, head)
    grads = Grads(
        operand.new_zeros(operand.shape, dtype=head.accumulate_dtype) if wants[0] else None,
        torch.empty_like(head.weight) if wants[1] else None,
        torch.empty_like(head.bias) if wants[2] and head.bias is not None else None,
    )
    buffer = hidden.new_empty(min(rows, len(hidden)), columns, dtype=head.accumulate_dtype)
    for first, last, weight in weight_slices(head, columns):
        grad_weight = None
        if grads.weight is not None:  # a slice of itself where it needs no conversion
            grad_weight = grads.weight[first:last].to(buffer.dtype).zero_()
        grad_bias = buffer.new_zeros(last - first)
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            held = buffer[: len(operand[block]), : last - first]
            grad_logits = gradient_of(operand[block], weight, block, first, held)
            if grads.bias is not None:
                grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, operand[block])
            if grads.hidden is not None:
                add_product(grads.hidden[block], grad_logits, weight)
        if grads.weight is not None and grad_weight is not None:
            grads.weight[first:last] = grad_weight
        if grads.bias is not None:
            grads.bias[first:last] = grad_bias
    return grads


def add_target_rows(
    grad: Tensor,  # (n, H) −Σ over the other columns of p ∂z/∂h, in and out
    operand: Tensor,  # (n, H)
    rows: RowStats,
    targets: Tensor,  # (n,)
    head: Head,
) -> None:
    """Completes ∂ℓ/∂h by the target's part, (1 − p) ∂z/∂h, of which nothing is rounded."""
    share = -torch.expm1(rows.logps) * (head.logit_scale / head.temperature)
    for start in range(0, len(targets), _TARGET_ROWS):
        part = slice(start, start + _TARGET_ROWS)
        of_targets = head.weight[targets[part]].to(head.compute_dtype).to(grad.dtype)
        of_rows = share[part]
        if head.softcap is not None:
            inner = head.logit_scale / head.softcap
            of_rows = of_rows * _target_slopes(
                of_targets, operand[part], targets[part], head.bias, inner
            )
        grad[part].addcmul_(of_targets, of_rows[:, None])


def _target_slopes(
    of_targets: Tensor, operand: Tensor, targets: Tensor, bias: Tensor | None, inner: float
) -> Tensor:
    """1 − tanh² of the targets' logits `(n,)`, from the products: a small cap drowns in the lse."""
    z = torch.linalg.vecdot(of_targets, operand.to(of_targets.dtype))
    if bias is not None:
        z = z + bias[targets].to(z.dtype)
    return torch.cosh(z * inner).square().reciprocal()
