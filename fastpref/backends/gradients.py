"""From the gradient of logits to those of hidden states and head, by the large products.

The gradient of logits comes as `gradient (n, V)` and one `factor` a row: ∂ℓ_t/∂(W h + b) is
factor_t · gradient_t. Coefficients are never multiplied into the larger operand: half precision
takes gradients of log-probabilities alone, times `SCALE`, whose range is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastpref.backends import Elementwise, Grads, Head, Kept, Total, largest
from fastpref.backends.products import (
    add_product,
    as_operand,
    gradient_dtype,
    product_dtype,
    product_into,
    weight_slices,
)

# Of float16 gradients of log-probabilities, of which none is larger than 1.
SCALE = 2.0**15
# An entropy's gradient is at most this times its coefficient: p (|log p| + H) < 1 + log V.
_ENTROPY_SPAN = 32
# Bytes of the head fitted at a time, and its rows gathered at a time.
_FITTED_BYTES = 64 * 2**20
_TARGET_ROWS = 256
# Rows rounded at a time where there is no room for both.
_ROUNDED_ROWS = 1024


def new_total(parameter: Tensor, head: Head, *, groups: int, into: Tensor | None = None) -> Total:
    """Room for a gradient: of one group in its own dtype, of several as wide as a sum needs.

    Or what there is, to be added to; then too no bfloat16 is rounded more than once.
    """
    if into is not None:
        splits = groups > 1 and into.dtype == torch.bfloat16
        low = torch.zeros_like(into, dtype=torch.int8) if splits else None
        return Total(into, low, written=True)
    if groups == 1:
        return Total(torch.empty_like(parameter))
    if parameter.dtype == torch.bfloat16 and gradient_dtype(head) == torch.float16:
        return Total(torch.empty_like(parameter), torch.empty_like(parameter, dtype=torch.int8))
    return Total(torch.empty_like(parameter, dtype=head.accumulate_dtype))


def fitted_rows(
    by: Elementwise,
    operand: Tensor,  # (n, H)
    factor: Tensor,  # (n,)
    bound: Tensor | None = None,  # () of operand, where it is known
    factor_bound: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`factor · h` as an operand, and what its products are to be multiplied by, None for 1."""
    if operand.dtype.itemsize > 2:
        return operand * factor.to(operand.dtype)[:, None], None
    bound = largest(operand) if bound is None else bound
    factor_bound = largest(factor) if factor_bound is None else factor_bound
    return by.fitted(operand, bound, None, factor, factor_bound)


def fits(head: Head) -> bool:
    """Gradients' products take the head fitted to float16, and not as it is."""
    return gradient_dtype(head) != product_dtype(head)


class _HeadOperand:
    """The head as an operand of gradients' products, slice by slice, all fitted by one power."""

    def __init__(self, by: Elementwise, head: Head) -> None:
        self.by, self.head, self.fits = by, head, fits(head)
        self.inverse: Tensor | None = None  # what products are multiplied by, None for 1

    def of(self, weight: Tensor) -> Tensor:
        """A slice, in the dtype of the gradients' products."""
        if not self.fits:
            return weight
        found, self.inverse = self.by.fitted(weight, self.head.bound)
        return found


def put_hidden_gradient(
    by: Elementwise,
    kept: Kept,
    gradient: Tensor,  # (n, V)
    factor: Tensor,  # (n,)
    head: Head,
) -> None:
    """∂ℓ_t/∂h_t of every row, slice after slice of the head if it is converted."""
    hidden_size = head.hidden_size
    operand = _HeadOperand(by, head)
    columns = max(1, _FITTED_BYTES // (2 * hidden_size)) if operand.fits else None
    total = Total(gradient.new_empty(len(gradient), hidden_size, dtype=head.accumulate_dtype))
    for first, last, weight in weight_slices(head, columns):
        _add(total, gradient[:, first:last], operand.of(weight))
    inverse = operand.inverse
    keep(by, total.high.mul_((factor if inverse is None else factor * inverse)[:, None]), kept)


def keep(by: Elementwise, wide: Tensor, kept: Kept) -> None:
    """Rows of gradient `(n, H)`, in accumulate_dtype."""
    if kept.low is None:
        kept.high.index_copy_(0, kept.index, wide)
    else:
        by.keep_(wide, kept.high, kept.low, kept.index)


def add_weight_gradient(
    by: Elementwise,
    total: Total,  # (V, H), or (V, 1) for the bias
    gradient: Tensor,  # (n, V)
    rows: Tensor,  # (n, H)
    inverse: Tensor | None,  # () of rows
) -> None:
    """`total (+)= inverse · gradientᵀ @ rows`, slice after slice of the head if it is converted."""
    if total.high.dtype == gradient.dtype and total.low is None and inverse is None:
        _add(total, gradient.T, rows)
        return
    wide = torch.promote_types(torch.float32, gradient.dtype)
    scale = rows.new_ones((), dtype=wide) if inverse is None else inverse
    step = max(1, _FITTED_BYTES // (wide.itemsize * rows.shape[1]))
    for first in range(0, len(total.high), step):
        part = slice(first, first + step)
        high, low = total.high[part], None if total.low is None else total.low[part]
        product = rows.new_empty(high.shape, dtype=wide)
        product_into(gradient[:, part].T, rows, out=product)
        by.accumulate_(high, low, product, scale, total.written)
    total.written = True


def add_scale_gradient(
    total: Total,  # (V, 1)
    gradient: Tensor,  # (n, V)
    rows: Tensor,  # (n, F)
    inverse: Tensor | None,  # () of rows
    head: Head,
) -> None:
    """`total (+)= inverse · Σ_f (gradientᵀ @ rows) ∘ frozen_weight`, slice after slice."""
    wide = torch.promote_types(torch.float32, gradient.dtype)
    step = max(1, _FITTED_BYTES // (2 * wide.itemsize * rows.shape[1]))  # and the weight beside it
    for first in range(0, len(total.high), step):
        part = slice(first, first + step)
        product = rows.new_empty(gradient[:, part].shape[1], rows.shape[1], dtype=wide)
        product_into(gradient[:, part].T, rows, out=product)
        found = _times_frozen(product, part, head)
        found = found if inverse is None else found * inverse
        total.high[part] = total.high[part] + found if total.written else found
    total.written = True


def _times_frozen(product: Tensor, part: slice, head: Head) -> Tensor:
    """The scale's gradient `(rows, 1)` from that of the scaled weight's rows `(rows, F)`."""
    assert head.frozen_weight is not None  # nothing else is scaled
    frozen = head.frozen_weight[part].to(product.dtype)
    return torch.linalg.vecdot(product, frozen)[:, None]


def _add(total: Total, left: Tensor, right: Tensor) -> None:
    """`total (+)= left @ right`, where `high` alone is wide enough to sum in."""
    if total.written:
        add_product(total.high, left, right)
    else:
        product_into(left, right, out=total.high)
    total.written = True


def sliced_gradients(
    by: Elementwise,
    hidden: Tensor,  # (n, H)
    head: Head,
    coef: Tensor,  # (n,)
    entropy: tuple[Tensor, Tensor] | None,  # entropies (n,) and their coefficients (n,)
    tile: tuple[int, int],
    wants: tuple[bool, ...],  # hidden, weight, bias, frozen_scale
    gradient_of: Callable[..., Tensor],
) -> Grads:
    """Gradients from logits computed once more, vocabulary slice after vocabulary slice.

    `gradient_of(operand, weight, block, first, buffer, coef, entropy)` computes the logits of the
    rows `block` in `buffer` and returns their gradient, in the dtype of the gradients' products. A
    slice's ∂W is one sum over all rows, accumulated wide and written, or added, once.
    """
    rows, columns = tile
    wide, operand = head.accumulate_dtype, as_operand(hidden, head)
    coef, entropy, factor = _normalised(head, coef, entropy)
    grads = Grads(
        operand.new_zeros(operand.shape, dtype=wide) if wants[0] else None,
        torch.empty_like(head.weight) if wants[1] and head.weight_grad is None else None,
        torch.empty_like(head.bias) if wants[2] and head.bias is not None else None,
        torch.empty_like(head.frozen_scale) if wants[3] and head.frozen_scale is not None else None,
    )
    # Slots of the gradient, what the gradient of logits is multiplied with, what finishes a slice.
    of_head: list[tuple[Tensor, _RowOperand, Callable[..., Tensor] | None]] = []
    of_weight = head.weight_grad if grads.weight is None else grads.weight
    if wants[1] and of_weight is not None:
        trained = operand[:, head.frozen_columns :].contiguous()
        of_head.append((of_weight, _RowOperand(by, trained, factor), None))
    if grads.bias is not None:
        ones = operand.new_ones(len(operand), 1)
        of_head.append((grads.bias[:, None], _RowOperand(by, ones, factor), None))
    if grads.frozen_scale is not None:
        frozen = _RowOperand(by, operand[:, : head.frozen_columns].contiguous(), factor)
        of_head.append((grads.frozen_scale[:, None], frozen, _times_frozen))
    buffer = hidden.new_empty(min(rows, len(hidden)), columns, dtype=wide)
    of_hidden = _HeadOperand(by, head)

    def add_slice(first: int, last: int, weight: Tensor) -> None:  # what it holds goes with it
        of_gradients = of_hidden.of(weight) if grads.hidden is not None else weight
        part = slice(first, last)
        sums = [
            Total(
                slot[part]
                if slot.dtype == wide and finish is None and slot is not head.weight_grad
                else slot.new_empty((last - first, of_rows.rows.shape[1]), dtype=wide)
            )
            for slot, of_rows, finish in of_head
        ]
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            held = buffer[: len(operand[block]), : last - first]
            gradient = gradient_of(operand[block], weight, block, first, held, coef, entropy)
            for total, (_, of_rows, _) in zip(sums, of_head, strict=True):
                _add(total, gradient.T, of_rows.block(block))
            if grads.hidden is not None:
                add_product(grads.hidden[block], gradient, of_gradients)
        for total, (slot, of_rows, finish) in zip(sums, of_head, strict=True):
            found = total.finish().high
            if finish is not None:
                found = finish(found, part, head)
            if slot is head.weight_grad:
                if of_rows.inverse is not None:
                    found.mul_(of_rows.inverse)
                slot[part].add_(found)
            elif of_rows.inverse is not None:
                torch.mul(found, of_rows.inverse, out=slot[part])
            elif finish is not None or found.dtype != slot.dtype:
                slot[part] = found

    for first, last, weight in weight_slices(head, columns):
        add_slice(first, last, weight)
    if grads.hidden is not None and factor is not None:
        inverse = of_hidden.inverse
        grads.hidden.mul_((factor if inverse is None else factor * inverse)[:, None])
    return grads


class _RowOperand:
    """`factor · h`, block after block of rows, all fitted by the same power."""

    def __init__(self, by: Elementwise, rows: Tensor, factor: Tensor | None) -> None:
        self.by, self.rows, self.factor = by, rows, factor
        self.inverse: Tensor | None = None
        if factor is not None:
            self.bounds = largest(rows), largest(factor)

    def block(self, block: slice) -> Tensor:
        if self.factor is None:
            return self.rows[block]
        found, self.inverse = self.by.fitted(
            self.rows[block], self.bounds[0], None, self.factor[block], self.bounds[1]
        )
        return found


def _normalised(
    head: Head, coef: Tensor, entropy: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """Coefficients under which a gradient of logits fits float16, and what each row lacks then.

    The gradient is at most `SCALE`. Wide products take the coefficients as they are.
    """
    if gradient_dtype(head).itemsize > 2:
        return coef, entropy, None
    size = coef.abs()
    if entropy is not None:
        size = size + _ENTROPY_SPAN * entropy[1].abs()
    size = torch.where(size == 0, 1, size)
    lift = SCALE * head.temperature / abs(head.logit_scale)
    if entropy is not None:
        entropy = entropy[0], entropy[1] / size * lift
    return coef / size * lift, entropy, size / lift


def rounded_in_place(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense `(n, H)` in a narrower dtype, in the front of its own memory: none is added."""
    if wide.dtype == dtype:
        return wide
    narrow = wide.view(dtype).flatten()[: wide.numel()].view(wide.shape)
    for start in range(0, len(wide), _ROUNDED_ROWS):  # written no further than has been read
        part = slice(start, start + _ROUNDED_ROWS)
        narrow[part] = wide[part].to(dtype)
    return narrow


def add_target_rows(
    grad: Tensor,  # (n, H) −Σ over the other columns of p ∂z/∂h, in and out
    operand: Tensor,  # (n, H)
    logps: Tensor,  # (n,) log p
    targets: Tensor,  # (n,) where it is none of the columns, nothing is added
    head: Head,
) -> None:
    """Completes ∂ℓ/∂h by the target's part, (1 − p) ∂z/∂h, of which nothing is rounded."""
    share = -torch.expm1(logps) * (head.logit_scale / head.temperature)
    share = torch.where(targets >= 0, share, 0)
    slopes = target_slopes(operand, targets, head)
    if slopes is not None:
        share = share * slopes
    for part, of_targets in _target_rows(targets, head, grad.dtype):
        grad[part].addcmul_(of_targets, share[part, None])


def target_slopes(operand: Tensor, targets: Tensor, head: Head) -> Tensor | None:
    """1 − tanh² of the targets' logits `(n,)`, None without a softcap.

    From the products: a small cap drowns in the log-sum-exp.
    """
    if head.softcap is None:
        return None
    z = target_products(operand, targets, head)
    return torch.cosh(z * (head.logit_scale / head.softcap)).square().reciprocal()


def target_products(operand: Tensor, targets: Tensor, head: Head) -> Tensor:
    """W h + b of each row's target `(n,)`; of any column where it is none of the columns."""
    z = operand.new_empty(targets.shape, dtype=head.accumulate_dtype)
    for part, of_targets in _target_rows(targets, head, z.dtype):
        torch.linalg.vecdot(of_targets, operand[part].to(z.dtype), out=z[part])
    if head.bias is not None:
        z += head.bias[targets.clamp(min=0)].to(z.dtype)
    return z


def _target_rows(targets: Tensor, head: Head, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows of the targets, some at a time, rounded as operands are."""
    for start in range(0, len(targets), _TARGET_ROWS):
        part = slice(start, start + _TARGET_ROWS)
        yield part, head.rows(targets[part].clamp(min=0)).to(dtype)
