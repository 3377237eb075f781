"""Logits by tile kernels or the library's matrix products, their rows by Triton kernels.

What is only looked at never leaves the tile kernel. Where the logits are needed a second time, they
are stored as exponentials relative to the peaks of their tiles, in the dtype that the gradients'
products take, and one kernel turns them into the gradient where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastpref_kernels as kernels
import torch
from fastpref_kernels import Epilogue
from torch import Tensor

from fastpref.backends import (
    Grads,
    Head,
    Kept,
    NamedRows,
    RowStats,
    Total,
    Weighed,
    gradients,
    torch_backend,
)
from fastpref.backends.gradients import (
    add_target_rows,
    sliced_gradients,
    target_products,
    target_slopes,
)
from fastpref.backends.products import (
    add_product,
    as_operand,
    gradient_dtype,
    product_dtype,
    product_into,
    weight_slices,
)
from fastpref.objectives import PairFormula

elementwise = kernels

# Nats. A row whose log-sum-exp is further above its target's logit has log-probabilities, but NaN
# in place of a gradient: its exponentials, relative to the target's, leave float32.
_MOST_ABOVE = 145.0
# And of a shard that the target is not in: what is left of its exponentials is then as good as 0.
_MOST_BELOW = 60.0


def forward(
    hidden: Tensor,  # (M, H)
    index: Tensor | None,  # (n,)
    targets: Tensor,  # (n,)
    head: Head,
    tile: tuple[int, int],  # the tile kernel has its own
    stats: tuple[str, ...],
) -> RowStats:
    if head.compute_dtype.itemsize == 2 and kernels.choice("forward", hidden.device) == "tiles":
        found = kernels.projection_statistics(
            hidden, head.whole, targets, _epilogue(head), stats, index, head.compute_dtype
        )
        return RowStats(*found)
    parts = []
    for start in range(0, max(1, len(targets)), tile[0]):
        part = slice(start, start + tile[0])
        rows = hidden[part] if index is None else hidden.index_select(0, index[part])
        partials = _library_statistics(as_operand(rows, head), targets[part], head, stats)
        parts.append(RowStats(*kernels.merge_statistics(partials, targets[part])))
    return RowStats.concatenate(parts)


def kept_dtype(head: Head) -> torch.dtype:
    return gradient_dtype(head)


def group_forward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, V)
    stats: tuple[str, ...],
) -> RowStats:
    operand = as_operand(hidden, head)
    if operand.dtype.itemsize == 2 and kernels.choice("exponentials", hidden.device) == "tiles":
        logps, lse, extra, peaks, block = kernels.projection_exponentials(
            operand, head.whole, targets, _epilogue(head), buffer, stats, head.compute_dtype
        )
        return RowStats(logps, lse, extra, peaks, block)
    partials = _library_statistics(operand, targets, head, stats, buffer)
    found = kernels.merge_statistics(partials, targets)
    return RowStats(*found, partials.peaks, partials.block)


def _library_statistics(
    operand: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    stats: tuple[str, ...],
    out: Tensor | None = None,  # (n, V) exponentials
) -> kernels.Partials:
    epilogue, columns = _epilogue(head), kernels.choice("columns", operand.device)
    partials = kernels.new_partials(operand, head.weight, epilogue, stats, columns, by="library")
    buffer = operand.new_empty(len(operand), columns, dtype=head.accumulate_dtype)
    for first, last, weight in weight_slices(head, columns):
        products = buffer[:, : last - first]
        product_into(operand, weight.T, out=products)
        exponentials = None if out is None else out[:, first:last]
        of_columns = epilogue.sliced(first, last)
        kernels.slice_statistics(products, targets, of_columns, partials, first, exponentials)
    return partials


def group_gradients(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, V)
    rows: RowStats,
    coef: Tensor,  # (n,)
) -> tuple[Tensor, Tensor]:
    assert rows.kept is not None  # `group_forward` gives it
    slopes = target_slopes(as_operand(hidden, head), targets, head)
    kernels.gradients_(buffer, rows.kept, rows.block, targets, rows.logps, rows.lse, coef, slopes)
    slope = head.logit_scale / head.temperature
    return buffer, torch.full_like(rows.lse, slope / kernels.SCALE)


def put_hidden_gradient(
    kept: Kept,
    gradient: Tensor,  # (n, V)
    factor: Tensor,  # (n,)
    head: Head,
) -> None:
    by = kernels.choice("hidden_gradient", gradient.device)
    if gradient.dtype != torch.float16 or by == "library":
        gradients.put_hidden_gradient(elementwise, kept, gradient, factor, head)
        return
    bound = head.bound if gradients.fits(head) else None
    rows = kept.high, kept.low, kept.index
    kernels.hidden_gradient_(gradient, head.whole, bound, factor, *rows, head.compute_dtype)


def add_weight_gradient(
    total: Total,  # (V, columns)
    gradient: Tensor,  # (n, V)
    rows: Tensor,  # (n, columns)
    inverse: Tensor | None,  # () of rows
) -> None:
    if inverse is None:
        gradients.add_weight_gradient(elementwise, total, gradient, rows, inverse)
        return
    kernels.add_weight_gradient_(total.high, total.low, gradient, rows, inverse, total.written)
    total.written = True


def forward_with_gradients(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, columns)
    stats: tuple[str, ...],
) -> tuple[RowStats, Tensor]:
    """Exponentials relative to the target's logit: one number a row, known before the others."""
    if head.compute_dtype.itemsize > 2:  # the tile kernel multiplies them without tensor cores
        return torch_backend.forward_with_gradients(hidden, targets, head, buffer, stats)
    operand, epilogue, columns = hidden.to(head.compute_dtype), _epilogue(head), buffer.shape[1]
    grad = hidden.new_zeros(hidden.shape, dtype=head.accumulate_dtype)
    anchors = _target_logits(operand, targets, head)
    partials = kernels.new_partials(operand, head.weight, epilogue, stats, columns)
    # float16 has no range for them.
    dtype = torch.bfloat16 if product_dtype(head).itemsize == 2 else product_dtype(head)
    for first in range(0, len(head.weight), columns):
        weight = head.rows(slice(first, first + columns)).to(operand.dtype)
        exponentials = buffer.view(dtype)[:, : len(weight)]
        of_columns = epilogue.sliced(first, first + len(weight))
        kernels.projection_anchored(
            operand, weight, targets, of_columns, anchors, exponentials, partials, first
        )
        for part in _parts(weight, dtype):
            add_product(grad, exponentials, part)
    rows = RowStats(*kernels.merge_statistics(partials, targets))
    above = (rows.lse - anchors).clamp(min=-_MOST_BELOW)
    half = torch.exp(-0.5 * above)  # of the whole, which may vanish
    share = half / kernels.ANCHORED_SCALE * half * (-head.logit_scale / head.temperature)
    grad.mul_(share.masked_fill(above > _MOST_ABOVE, torch.nan)[:, None])
    add_target_rows(grad, operand, rows.logps, targets, head)
    return rows, grad


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """What adds up to the weight in `dtype`: of float16's 11 bits bfloat16 holds 8 at a time."""
    high = weight.to(dtype)
    yield high
    if weight.dtype == torch.float16 and dtype == torch.bfloat16:
        yield (weight.float() - high.float()).to(dtype)


def _target_logits(operand: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Each row's logit of its target `(n,)`, in accumulate_dtype."""
    z = target_products(operand, targets, head) * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z / head.temperature
    return z if head.shards is None else head.shards.sum_(torch.where(targets >= 0, z, 0))


def recompute_backward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    entropy: tuple[Tensor, Tensor] | None,  # entropies (n,) and their coefficients (n,)
    tile: tuple[int, int],
    wants: tuple[bool, ...],
) -> Grads:
    dtype, epilogue = gradient_dtype(head), _epilogue(head)

    def gradient_of(
        operand: Tensor,
        weight: Tensor,
        block: slice,
        first: int,
        products: Tensor,
        coef: Tensor,
        entropy: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        product_into(operand, weight.T, out=products)
        of_entropy = None if entropy is None else (entropy[0][block], entropy[1][block])
        of_columns = epilogue.sliced(first, first + len(weight))
        return kernels.row_gradients_(
            products, targets[block], lse[block], coef[block], of_columns, dtype, first, of_entropy
        )

    return sliced_gradients(elementwise, hidden, head, coef, entropy, tile, wants, gradient_of)


def weigh_pairs(
    logps: Tensor,  # (n,)
    offsets: Tensor,  # (2B + 1,)
    formula: PairFormula,
    **pairs: Any,  # as in `fastpref_kernels.weigh_pairs`
) -> Weighed:
    """Losses, coefficients and metrics of pairs in one launch."""
    # A frozen dataclass is read-only, which a protocol of plain attributes cannot allow.
    found = kernels.weigh_pairs(logps, offsets, formula, **pairs)  # type: ignore[arg-type]
    sums, losses, coef, values = found
    groups = {"weights": formula.quality is not None, "balance": formula.balance is not None}
    names = [name if groups.get(name.split("/")[0], True) else None for name in kernels.METRICS]
    return Weighed(sums, losses, coef, NamedRows(tuple(names), values))


def _epilogue(head: Head) -> Epilogue:
    return Epilogue(head.bias, head.logit_scale, head.softcap, head.temperature)
