"""Pair groups, 3 U: with whole prompts at hand, gradients are finished while the logits are there.

The objective can already say its coefficients when all responses of a prompt are projected, so the
logits of the group become their own gradient in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.backends import (
    Backend,
    Head,
    NamedRows,
    RowStats,
    Total,
    Weighed,
    concatenated,
)
from fastpref.backends.gradients import add_scale_gradient, fitted_rows, new_total
from fastpref.backends.products import as_operand
from fastpref.objectives import Objective
from fastpref.planner import Plan, even_ranges
from fastpref.schedules.autograd import first_order, no_autocast
from fastpref.schedules.kept_rows import KeptRows
from fastpref.schedules.prompts import Prompts, total_of
from fastpref.sequences import Rows


class PairGroups(torch.autograd.Function):
    """Gradients in the forward; only the loss is differentiable.

    `(loss, losses (B,), logps (K·B,), metrics, alignments (K·B,), *stats (N,))`, metrics and
    alignments where there are any.

    What leaves the forward is a gradient for an upstream gradient of 1, scaled in the backward
    without a device synchronisation, then handed over: a second backward is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        frozen_scale: Tensor | None,  # (V,)
        rows: Rows,
        prompts: Prompts,
        objective: Objective,
        divisor: int,  # B for the mean
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> tuple[Any, ...]:
        with no_autocast(hidden):
            groups = _Groups(hidden, rows, head, plan, backend, stats)
            for first, last in plan.groups:
                groups.run(first, last, prompts, objective, divisor)
        losses = concatenated([part.losses for part in groups.weighed])
        logps = rows.in_batch_order(concatenated([part.logps for part in groups.weighed]))
        alignments = None
        if objective.needs_alignments:
            parts = [part.alignments for part in groups.weighed if part.alignments is not None]
            alignments = rows.in_batch_order(concatenated(parts))
        if len(plan.groups) > 1 and not prompts.fusible(objective, backend):
            prompts.refuse_coupled(objective, logps, alignments, losses)
        metrics = _joined([part.metrics for part in groups.weighed])
        found = RowStats.concatenate(groups.parts)
        extra = [found.extra[name] for name in stats]
        ctx.gradients = groups.gradients
        constants = [losses, logps, *extra, *([] if alignments is None else [alignments])]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return total_of(losses, divisor), losses, logps, metrics, alignments, *extra

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple:
        if upstream is None:
            return (None,) * 12
        if ctx.gradients is None:
            raise RuntimeError(
                "preference_loss handed its gradients over in the first backward; for a second "
                "one through the same loss use schedule='recompute'"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.times(upstream), *[None] * 8


class _Live(NamedTuple):
    """Rows whose gradients of logits are at hand."""

    gradient: Tensor  # (n, V)
    operand: Tensor  # (n, H)
    factor: Tensor  # (n,) of the gradient, coefficients included


class _Gradients:
    """Gradients but for the upstream one.

    Of several groups the head's is summed as they come, and where it is added to a buffer of the
    caller's, times the upstream gradient that was promised. Of one, its rows stay where they are
    until the backward: there the upstream gradient is known, and the head's is written once.
    """

    def __init__(
        self, hidden: Tensor, rows: Rows, head: Head, backend: Backend, *, defers: bool
    ) -> None:
        self.head, self.backend, self.defers = head, backend, defers
        self.kept: KeptRows | None = None
        if hidden.requires_grad:
            places = rows.index if rows.places is None else rows.places
            self.kept = KeptRows(hidden, places, len(places), head, backend.elementwise)
        self.parameters = [
            x.detach() if x is not None and x.requires_grad else None
            for x in (head.weight, head.bias, head.frozen_scale)
        ]
        self.totals: list[Total | None] = [None, None, None]
        self.live: list[_Live] = []
        self.coefs: list[Tensor] = []

    def add(self, start: int, live: _Live, factor: Tensor) -> None:
        """Of the rows from `start` on; `factor` is without coefficients."""
        if self.kept is not None:
            kept = self.kept[start : start + len(factor)]
            self.backend.put_hidden_gradient(kept, live.gradient, factor, self.head)
        if self.defers:
            self.live.append(live)
        else:
            self._add_to_head(live, groups=2)

    def times(self, upstream: Tensor) -> list[Tensor | None]:
        """Gradients of hidden and head, rounded once; what they are made of is let go."""
        of_hidden = None
        if self.kept is not None:
            of_hidden = self.kept.times(concatenated(self.coefs), upstream)
        groups = len(self.live)
        while self.live:
            live = self.live.pop()
            self._add_to_head(live._replace(factor=live.factor * upstream), groups)
        return [of_hidden, *(self._of_head(i, None if groups else upstream) for i in range(3))]

    def _of_head(self, which: int, upstream: Tensor | None) -> Tensor | None:
        parameter, total = self.parameters[which], self.totals[which]
        self.totals[which] = None
        if which == 0 and self.head.weight_grad is not None:
            return None
        if parameter is None or total is None:
            return None if parameter is None else torch.zeros_like(parameter)
        if upstream is None:
            return total.high.to(parameter.dtype).view(parameter.shape)
        scaled = self.backend.elementwise.scaled
        return scaled(total.high, upstream, parameter.dtype, total.low).view(parameter.shape)

    def _add_to_head(self, live: _Live, groups: int) -> None:
        """To be one of so many."""
        gradient, operand, factor = live
        wide = self.head.accumulate_dtype
        for i, parameter in enumerate(self.parameters):
            if parameter is None:
                continue
            into = self.head.weight_grad if i == 0 else None
            total = self.totals[i]
            if total is None:
                slot = parameter if i == 0 else parameter[:, None]
                slot = slot.to(wide) if i == 2 else slot
                total = self.totals[i] = new_total(slot, self.head, groups=groups, into=into)
            of_rows = factor
            if into is not None and not self.defers:
                of_rows = factor * self.head.weight_grad_scale
            rows = self._rows_of(i, operand)
            rows, inverse = fitted_rows(self.backend.elementwise, rows, of_rows)
            if i == 2:
                add_scale_gradient(total, gradient, rows, inverse, self.head)
            else:
                self.backend.add_weight_gradient(total, gradient, rows, inverse)

    def _rows_of(self, which: int, operand: Tensor) -> Tensor:
        """What the gradient of logits is multiplied with to become weight's, bias's or scale's."""
        if which == 1:
            return operand.new_ones(len(operand), 1)
        frozen = self.head.frozen_columns
        if not frozen:
            return operand
        return (operand[:, frozen:] if which == 0 else operand[:, :frozen]).contiguous()


class _Groups:
    """Runs group after group of whole prompts through one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Rows,
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> None:
        self.hidden, self.rows, self.head = hidden, rows, head
        self.plan, self.backend, self.stats = plan, backend, stats
        shape = (plan.group_rows, len(head.weight))
        self.buffer = hidden.new_empty(shape, dtype=backend.kept_dtype(head))
        once = len(plan.groups) == 1 and len(rows.targets) <= plan.group_rows
        self.gradients = _Gradients(hidden, rows, head, backend, defers=once)
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
        parts = []
        for a, b in pieces:
            operand, part = self._project(a, b)
            parts.append(part)
        group = RowStats.concatenate(parts)
        self.parts.append(group)
        weighed = prompts.weigh(objective, self.backend, group, first, last, divisor)
        self.weighed.append(weighed)
        self.gradients.coefs.append(weighed.coef)
        for a, b in pieces:
            part = parts.pop(0)
            if len(pieces) > 1:  # a prompt beyond the budget: its buffer has been overwritten
                operand, part = self._project(a, b)
            of_piece = weighed.coef[a - start : b - start]
            found = [
                self._live(a + i, operand[i:j], i, part[i:j], of_piece[i:j])
                for i, j in _live_ranges(of_piece)
            ]
            del part  # what it keeps has been used, and more is about to be allocated
            for of_range in found:
                self.gradients.add(*of_range)

    def _project(self, a: int, b: int) -> tuple[Tensor, RowStats]:
        operand = as_operand(self.hidden.index_select(0, self.rows.index[a:b]), self.head)
        targets, buffer = self.rows.targets[a:b], self.buffer[: b - a]
        part = self.backend.group_forward(operand, targets, self.head, buffer, self.stats)
        return operand, part

    def _live(
        self, start: int, operand: Tensor, i: int, part: RowStats, coef: Tensor
    ) -> tuple[int, _Live, Tensor]:
        """Arguments of `_Gradients.add`."""
        targets = self.rows.targets[start : start + len(coef)]
        buffer = self.buffer[i : i + len(coef)]
        gradient, factor = self.backend.group_gradients(
            operand, targets, self.head, buffer, part, coef
        )
        return start, _Live(gradient, operand, factor * coef), factor


def _joined(parts: list[NamedRows | None]) -> NamedRows | None:
    """Metrics of consecutive pairs as one."""
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return found[0] if found else None
    return NamedRows(found[0].names, torch.cat([part.values for part in found], 1))


def _live_ranges(coef: Tensor) -> list[tuple[int, int]]:
    """Maximal ranges of rows whose coefficient is not 0; all rows where looking makes us wait."""
    if coef.device.type != "cpu":
        return [(0, len(coef))]
    live = torch.cat([coef.new_zeros(1, dtype=torch.bool), coef != 0]).int()
    edges = torch.diff(live, append=live.new_zeros(1)).nonzero().flatten().tolist()
    if len(edges) // 2 > 1 + len(coef) // 64:  # scattered zeros: many small products cost more
        return [(0, len(coef))]
    return list(zip(edges[::2], edges[1::2], strict=True))
