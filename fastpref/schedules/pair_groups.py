"""Pair groups, 3 U: with whole prompts at hand, gradients are finished while the logits are there.

The objective can already say its coefficients when all responses of a prompt are projected, so the
logits of the group become their own gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.backends import Backend, Grads, Head, RowStats, Weighed
from fastpref.objectives import Objective
from fastpref.planner import Plan, even_ranges
from fastpref.schedules.autograd import first_order, no_autocast
from fastpref.schedules.prompts import Prompts
from fastpref.sequences import Rows


class PairGroups(torch.autograd.Function):
    """Gradients in the forward; only the loss is differentiable.

    `(loss, losses (B,), logps (K·B,), metrics, alignments (K·B,), *stats (N,))`, metrics and
    alignments where there are any.

    Gradients leave the forward for an upstream gradient of 1 and are scaled in the backward, in
    place and without a device synchronisation, then handed over: a second backward is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        rows: Rows,
        prompts: Prompts,
        objective: Objective,
        divisor: int,  # B for the mean
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> tuple[Any, ...]:
        dtype = head.accumulate_dtype
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if hidden.requires_grad else None
        grads = Grads(
            grad_hidden,
            weight.new_zeros(weight.shape, dtype=dtype) if weight.requires_grad else None,
            None
            if bias is None or not bias.requires_grad
            else bias.new_zeros(bias.shape, dtype=dtype),
        )
        with no_autocast(hidden):
            group = _Group(hidden, rows, head, plan, backend, stats, grads)
            for first, last in plan.groups:
                group.run(first, last, prompts, objective, divisor)
        losses = torch.cat([part.losses for part in group.weighed])
        logps = rows.in_batch_order(torch.cat([part.logps for part in group.weighed]))
        alignments = None
        if objective.needs_alignments:
            parts = [part.alignments for part in group.weighed if part.alignments is not None]
            alignments = rows.in_batch_order(torch.cat(parts))
        if len(plan.groups) > 1 and not prompts.fusible(objective, backend):
            prompts.refuse_coupled(objective, logps, alignments, losses)
        metrics = _joined([part.metrics for part in group.weighed])
        found = RowStats.concatenate(group.parts)
        extra = [found.extra[name] for name in stats]
        ctx.grads, ctx.backend = grads, backend
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        constants = [losses, logps, *extra, *([] if alignments is None else [alignments])]
        ctx.mark_non_differentiable(*constants)
        return losses.sum() / divisor, losses, logps, metrics, alignments, *extra

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple:
        if ctx.grads is None:
            raise RuntimeError(
                "preference_loss handed its gradients over in the first backward; for a second "
                "one through the same loss use schedule='recompute'"
            )
        grads, ctx.grads = ctx.grads, None
        accumulated = [grads.bias, grads.weight, grads.hidden]
        del grads
        # Rounded once, after scaling: fp16 gradients of an unscaled loss would underflow. Each is
        # let go before the next is made, the smaller ones first.
        scale = ctx.backend.scaled or _scaled
        scaled = []
        for dtype in ctx.dtypes:
            grad = accumulated.pop()
            scaled.append(None if grad is None else scale(grad, upstream, dtype))
            del grad
        return *scaled, *[None] * 8


class _Group:
    """Runs group after group of whole prompts through one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Rows,
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
        grads: Grads,
    ) -> None:
        self.hidden, self.rows, self.head = hidden, rows, head
        self.plan, self.backend, self.stats, self.grads = plan, backend, stats, grads
        shape = (plan.group_rows, len(head.weight))
        self.buffer = hidden.new_empty(shape, dtype=head.accumulate_dtype)
        self.parts: list[RowStats] = []
        self.weighed: list[Weighed] = []

    def run(
        self,
        first: int,
        last: int,
        prompts: Prompts,
        objective: Objective,
        divisor: int,
    ) -> None:
        """Losses and gradients of the prompts `first:last`."""
        rows, responses = self.rows, self.rows.responses
        start, stop = (sum(rows.counts[: responses * prompt]) for prompt in (first, last))
        pieces = [(start + a, start + b) for a, b in even_ranges(stop - start, len(self.buffer))]
        parts = [self._project(a, b) for a, b in pieces]
        self.parts += parts
        group = RowStats.concatenate(parts)
        weighed = prompts.weigh(objective, self.backend, group, first, last, divisor)
        self.weighed.append(weighed)
        for (a, b), part in zip(pieces, parts, strict=True):
            if len(pieces) > 1:  # a prompt beyond the budget: its buffer has been overwritten
                part = self._project(a, b)
            of_piece = weighed.coef[a - start : b - start]
            for i, j in _live_ranges(of_piece):
                self._backward(a, i, j, part, of_piece)

    def _project(self, a: int, b: int) -> RowStats:
        operand = self.hidden.index_select(0, self.rows.index[a:b])
        targets, buffer = self.rows.targets[a:b], self.buffer[: b - a]
        return self.backend.group_forward(operand, targets, self.head, buffer, self.stats)

    def _backward(self, start: int, i: int, j: int, part: RowStats, coef: Tensor) -> None:
        index = self.rows.index[start + i : start + j]
        targets = self.rows.targets[start + i : start + j]
        operand = self.hidden.index_select(0, index)
        of_rows = None
        if self.grads.hidden is not None:
            of_rows = operand.new_empty(operand.shape, dtype=self.head.accumulate_dtype)
        grads = Grads(of_rows, self.grads.weight, self.grads.bias)
        self.backend.group_backward(
            operand, targets, self.head, self.buffer[i:j], part[i:j], coef[i:j], grads
        )
        if self.grads.hidden is not None and of_rows is not None:
            self.grads.hidden.index_copy_(0, index, of_rows)


def _joined(parts: list[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Metrics of consecutive pairs as one."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _live_ranges(coef: Tensor) -> list[tuple[int, int]]:
    """Maximal ranges of rows whose coefficient is not 0; all rows where looking makes us wait."""
    if coef.device.type != "cpu":
        return [(0, len(coef))]
    live = torch.cat([coef.new_zeros(1, dtype=torch.bool), coef != 0]).int()
    edges = torch.diff(live, append=live.new_zeros(1)).nonzero().flatten().tolist()
    if len(edges) // 2 > 1 + len(coef) // 64:  # scattered zeros: many small products cost more
        return [(0, len(coef))]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad · upstream` in `dtype`; grad is consumed."""
    if upstream.device.type != "cpu" or upstream.item() != 1:
        grad.mul_(upstream)
    return grad.to(dtype)
