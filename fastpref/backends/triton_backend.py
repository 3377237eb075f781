"""Logits by tile kernels and by the library's matrix products, their rows by Triton kernels.

What is only looked at never leaves the tile kernel. Where the logits are needed a second time, a
library product writes W h in fp32 and one kernel each reads the statistics and turns the products
into their gradient, in place and in the dtype that the next products take.
"""

from __future__ import annotations

from typing import Any

import fastpref_kernels as kernels
import torch
from fastpref_kernels import Epilogue
from torch import Tensor

from fastpref.backends import Grads, Head, NamedRows, RowStats, Weighed
from fastpref.backends.products import (
    add_product,
    add_target_rows,
    as_operand,
    product_dtype,
    product_into,
    sliced_gradients,
    weight_slices,
)
from fastpref.objectives import PairFormula

scaled = kernels.scaled

# Rows of the head gathered at a time.
_GATHERED = 256
# Nats. A row whose log-sum-exp is further above its target's logit has log-probabilities, but NaN
# in place of a gradient: its exponentials, relative to the target's, leave float32.
_MOST_ABOVE = 145.0


def forward(
    hidden: Tensor,  # (M, H)
    index: Tensor | None,  # (n,)
    targets: Tensor,  # (n,)
    head: Head,
    tile: tuple[int, int],  # the kernel has its own
    stats: tuple[str, ...],
) -> RowStats:
    found = kernels.projection_statistics(
        hidden, head.weight, targets, _epilogue(head), stats, index, head.compute_dtype
    )
    return RowStats(*found)


def group_forward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, V)
    stats: tuple[str, ...],
) -> RowStats:
    operand = as_operand(hidden, head)
    for first, last, weight in weight_slices(head):
        product_into(operand, weight.T, out=buffer[:, first:last])
    return RowStats(*kernels.row_statistics(buffer, targets, _epilogue(head), stats))


def group_backward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, V)
    rows: RowStats,
    coef: Tensor,  # (n,)
    grads: Grads,
) -> None:
    grad_logits = kernels.row_gradients_(
        buffer, targets, rows.lse, coef, _epilogue(head), product_dtype(head)
    )
    if grads.bias is not None:
        grads.bias += grad_logits.sum(0, dtype=grads.bias.dtype)
    if grads.weight is not None:
        add_product(grads.weight, grad_logits.T, as_operand(hidden, head))
    if grads.hidden is not None:
        grads.hidden.zero_()
        for first, last, weight in weight_slices(head):
            add_product(grads.hidden, grad_logits[:, first:last], weight)


def forward_with_gradients(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, columns)
    stats: tuple[str, ...],
) -> tuple[RowStats, Tensor]:
    operand, dtype, epilogue = hidden.to(head.compute_dtype), _anchored_dtype(head), _epilogue(head)
    grad = hidden.new_zeros(hidden.shape, dtype=head.accumulate_dtype)
    anchors, columns = _target_logits(operand, targets, head), buffer.shape[1]
    partials = kernels.new_partials(operand, head.weight, epilogue, stats, columns)
    for first in range(0, len(head.weight), columns):
        weight = head.weight[first : first + columns].to(operand.dtype)
        exponentials = buffer.view(dtype)[:, : len(weight)]
        of_columns = epilogue.sliced(first, first + len(weight))
        kernels.projection_anchored(
            operand, weight, targets, of_columns, anchors, exponentials, partials, first
        )
        add_product(grad, exponentials, weight.to(dtype))
    rows = RowStats(*kernels.merge_statistics(partials, targets))
    above = rows.lse - anchors
    half = torch.exp(-0.5 * above)  # of the whole, which may vanish
    share = half / kernels.ANCHORED_SCALE * half * (-head.logit_scale / head.temperature)
    grad.mul_(share.masked_fill(above > _MOST_ABOVE, torch.nan)[:, None])
    add_target_rows(grad, operand, rows, targets, head)
    return rows, grad


def _anchored_dtype(head: Head) -> torch.dtype:
    """Of exponentials that are multiplied: the products', or float32 for what float16 cannot hold.

    float16's rows of the head are exact in float32 and would not be in bfloat16.
    """
    dtype = product_dtype(head)
    return head.accumulate_dtype if dtype == torch.float16 else dtype


def _target_logits(operand: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Each row's logit of its target `(n,)`, in accumulate_dtype."""
    dtype, found = head.accumulate_dtype, []
    for rows, of_rows in zip(operand.split(_GATHERED), targets.split(_GATHERED), strict=True):
        weight = head.weight[of_rows].to(head.compute_dtype).to(dtype)
        found.append(torch.linalg.vecdot(weight, rows.to(dtype)))
    z = torch.cat(found)
    if head.bias is not None:
        z += head.bias[targets].to(dtype)
    z *= head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def recompute_backward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    entropy: tuple[Tensor, Tensor] | None,
    tile: tuple[int, int],
    wants: tuple[bool, bool, bool],
) -> Grads:
    dtype, epilogue = product_dtype(head), _epilogue(head)

    def gradient_of(
        operand: Tensor, weight: Tensor, block: slice, first: int, products: Tensor
    ) -> Tensor:
        product_into(operand, weight.T, out=products)
        of_entropy = None if entropy is None else (entropy[0][block], entropy[1][block])
        of_columns = epilogue.sliced(first, first + len(weight))
        return kernels.row_gradients_(
            products, targets[block], lse[block], coef[block], of_columns, dtype, first, of_entropy
        )

    return sliced_gradients(hidden, head, tile, wants, gradient_of)


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
