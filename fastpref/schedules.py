"""The schedules, as autograd functions over a backend's primitives.

`TokenLogps` yields per-row log-probabilities; what follows them, sums and objective, is ordinary
autograd, whose gradient per row comes back as one coefficient. Its backward either multiplies
rows of gradient kept from the forward (`frozen_head`) or computes the logits once more
(`recompute`).

`PairGroups` goes further in the forward: with a group of whole pairs at hand the objective can
already say its coefficients, so the gradients are finished while the logits are still there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import Backend, Grads, Head, RowStats, Weighed
from fastpref.objectives import Objective, PairLogps, evaluate
from fastpref.planner import Plan, even_ranges
from fastpref.sequences import Rows, on_device
from fastpref.validation import require

# Of the hidden states' size, converted together: 16 MiB of float32 at H = 4096.
_ROWS_AT_ONCE = 1024


def _first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward whose results are constants to autograd, and which must not be taken for more."""

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastpref's gradients have no derivative of their own, so create_graph=True would "
                "give zeros; backend='reference' has second derivatives"
            )
        return backward(ctx, *upstream)

    return checked


class TokenLogps(torch.autograd.Function):
    """`(logps, *stats)`, each `(n,)`, of the rows `index` of hidden; entropy is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (n,)
        index: Tensor | None,  # (n,) rows of hidden, None for all
        head: Head,  # scalars; its tensors are replaced by the arguments
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with _no_autocast(hidden):
            kept = None
            if plan.schedule == "frozen_head":
                kept = _KeptRows(hidden, index, len(targets), head)
                found = kept.fill(hidden, targets, head, plan, backend, stats)
            else:
                found = backend.forward(hidden, index, targets, head, plan.tile, stats)
        entropy = found.extra.get("entropy")
        ctx.save_for_backward(hidden, weight, bias, targets, index, found.lse, entropy)
        ctx.kept = kept
        ctx.settings = (head.logit_scale, head.softcap, head.temperature, head.compute_dtype)
        ctx.plan, ctx.backend, ctx.stats = plan, backend, stats
        ctx.mark_non_differentiable(*(found.extra[name] for name in stats if name != "entropy"))
        return found.logps, *(found.extra[name] for name in stats)

    @staticmethod
    @_first_order
    def backward(ctx: Any, coef: Tensor | None, *of_stats: Tensor | None) -> tuple:
        hidden, weight, bias, targets, index, lse, entropy = ctx.saved_tensors
        of_entropy = dict(zip(ctx.stats, of_stats, strict=True)).get("entropy")
        wants = tuple(ctx.needs_input_grad[:3])
        if coef is None:
            coef = torch.zeros_like(lse)
        keeps = _keeps_graph()
        kept = ctx.kept
        if not keeps:  # autograd lets go of saved tensors only
            ctx.kept = None
        if kept is not None and of_entropy is None:
            return kept.times(coef, keeps), *[None] * 8
        with _no_autocast(hidden):
            head = Head(weight, bias, *ctx.settings)
            entropy_terms = None if of_entropy is None else (entropy, of_entropy)
            live = _live_rows(coef, of_entropy)
            if live is not None:
                index = live if index is None else index[live]
                targets, lse, coef = targets[live], lse[live], coef[live]
                if of_entropy is not None:
                    entropy_terms = (entropy[live], of_entropy[live])
            rows = hidden if index is None else hidden.index_select(0, index)
            found = ctx.backend.recompute_backward(
                rows, targets, head, lse, coef, entropy_terms, ctx.plan.tile, wants
            )
            del rows
        grad_hidden = _at_rows(found.hidden, index, hidden) if wants[0] else None
        return grad_hidden, found.weight, found.bias, *[None] * 6


class _KeptRows:
    """∂ℓ_t/∂h_t of every row: it depends on no coefficient, so it can be had in the forward.

    It is kept where the gradient of hidden will be, so that nothing is copied when it becomes that.
    Narrower than the accumulators it would be rounded twice, so there the rest is kept beside it.
    Of bf16 as bf16: 16 bits in all, for 8 that remain. Of others as float32: a loss scale may lift
    what underflows in fp16.
    """

    def __init__(self, hidden: Tensor, index: Tensor | None, rows: int, head: Head) -> None:
        self.high = torch.zeros_like(hidden)  # (M, H)
        self.index = torch.arange(rows, device=hidden.device) if index is None else index
        self.low = None
        if hidden.dtype != head.accumulate_dtype:
            dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
            self.low = hidden.new_empty(rows, hidden.shape[1], dtype=dtype)  # (n, H)

    def fill(
        self,
        hidden: Tensor,  # (M, H)
        targets: Tensor,  # (n,)
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> RowStats:
        buffer = hidden.new_empty(plan.tile, dtype=head.accumulate_dtype)

        def of_group(a: int, b: int) -> RowStats:
            rows = hidden.index_select(0, self.index[a:b])
            part, grad = backend.forward_with_gradients(
                rows, targets[a:b], head, buffer[: b - a], stats
            )
            high = grad.to(hidden.dtype)
            self.high.index_copy_(0, self.index[a:b], high)
            if self.low is not None:
                self.low[a:b] = grad.sub_(high)
            return part

        return RowStats.concatenate([of_group(a, b) for a, b in plan.groups])

    def times(self, coef: Tensor, keeps: bool) -> Tensor:
        """`coef · ∂ℓ/∂h` in hidden's layout and dtype; in place unless it is to be kept."""
        high = self.high.clone() if keeps else self.high
        for start in range(0, len(coef), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            rows = self.index[part]
            kept = high.index_select(0, rows).to(coef.dtype)
            if self.low is not None:
                kept += self.low[part]
            high.index_copy_(0, rows, kept.mul_(coef[part, None]).to(high.dtype))
        return high


class PairGroups(torch.autograd.Function):
    """`(loss, losses (B,), logps (2B,), metrics, *stats (N,))`; only the loss is differentiable.

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
        pair_inputs: PairInputs,
        objective: Objective,
        divisor: int,  # B for the mean
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        dtype = head.accumulate_dtype
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if hidden.requires_grad else None
        grads = Grads(
            grad_hidden,
            weight.new_zeros(weight.shape, dtype=dtype) if weight.requires_grad else None,
            None
            if bias is None or not bias.requires_grad
            else bias.new_zeros(bias.shape, dtype=dtype),
        )
        with _no_autocast(hidden):
            group = _PairGroup(hidden, rows, head, plan, backend, stats, grads)
            for first, last in plan.groups:
                group.run(first, last, pair_inputs, objective, divisor)
        losses = torch.cat([part.losses for part in group.weighed])
        if len(plan.groups) > 1 and not pair_inputs.fusible(objective, backend):
            pair_inputs.refuse_coupled(objective, [part.logps for part in group.weighed], losses)
        logps = rows.in_batch_order(torch.cat([part.logps for part in group.weighed]))
        metrics = _joined([part.metrics for part in group.weighed])
        found = RowStats.concatenate(group.parts)
        extra = [found.extra[name] for name in stats]
        ctx.grads, ctx.backend = grads, backend
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(losses, logps, *extra)
        return losses.sum() / divisor, losses, logps, metrics, *extra

    @staticmethod
    @_first_order
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


class _PairGroup:
    """Runs group after group of whole pairs through one buffer."""

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
        pair_inputs: PairInputs,
        objective: Objective,
        divisor: int,
    ) -> None:
        """Losses and gradients of the pairs `first:last`."""
        rows = self.rows
        start, stop = sum(rows.counts[: 2 * first]), sum(rows.counts[: 2 * last])
        pieces = [(start + a, start + b) for a, b in even_ranges(stop - start, len(self.buffer))]
        parts = [self._project(a, b) for a, b in pieces]
        self.parts += parts
        group = RowStats.concatenate(parts)
        weighed = pair_inputs.weigh(objective, self.backend, group.logps, first, last, divisor)
        self.weighed.append(weighed)
        for (a, b), part in zip(pieces, parts, strict=True):
            if len(pieces) > 1:  # a pair beyond the budget: its buffer has been overwritten
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
        if of_rows is not None:
            self.grads.hidden.index_copy_(0, index, of_rows)


class PairInputs:
    """The per-sequence inputs of an objective, and the step from log-probabilities to losses.

    A pair of which a response has no scored token counts with loss 0 and no gradient: the
    objective never sees it.
    """

    def __init__(self, rows: Rows, ref_logps: Tensor | None, scores: Tensor | None) -> None:
        pairs = list(zip(rows.counts[::2], rows.counts[1::2], strict=True))
        self.counted = [chosen > 0 and rejected > 0 for chosen, rejected in pairs]
        # (2, B): chosen and rejected
        self.lengths = rows.lengths.view(2, -1)
        self.rows = rows
        self.ref_logps = None if ref_logps is None else ref_logps.detach().view(2, -1)
        self.scores = None if scores is None else scores.detach().view(2, -1)

    def pairs(
        self, logps: Tensor, first: int = 0, last: int | None = None
    ) -> tuple[PairLogps, Tensor | None]:
        """The counted pairs of `first:last` from `logps (2, pairs)`; which, None if all are."""
        last = len(self.counted) if last is None else last
        counted = self.counted[first:last]
        which = None
        if not all(counted):
            found = [i for i, counts in enumerate(counted) if counts]
            which = on_device(torch.tensor(found, dtype=torch.int64, device="cpu"), logps.device)

        def of(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if values is None:
                return None, None
            values = values[:, first:last].to(logps.dtype)
            if which is not None:
                values = values[:, which]
            return values[0], values[1]

        here = logps if which is None else logps[:, which]
        return PairLogps(
            here[0], here[1], *of(self.lengths), *of(self.ref_logps), *of(self.scores)
        ), which

    def losses(
        self, objective: Objective, logps: Tensor, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Losses of the pairs `first:last` from `logps (2, pairs)`, by ordinary autograd."""
        pairs, which = self.pairs(logps, first, last)
        count = logps.shape[1] if which is None else len(which)
        losses = evaluate(objective, pairs) if count else pairs.chosen_logps * 0
        if which is None:
            return losses
        return logps.new_zeros(logps.shape[1]).index_copy(0, which, losses.to(logps.dtype))

    def fusible(self, objective: Objective, backend: Backend) -> bool:
        """Whether the backend can do in one launch what autograd does otherwise."""
        return backend.weigh_pairs is not None and objective.formula() is not None

    def weigh(
        self,
        objective: Objective,
        backend: Backend,
        logps: Tensor,  # (n,) rows of the pairs first:last
        first: int,
        last: int,
        divisor: int,
    ) -> Weighed:
        """Losses of the pairs `first:last`, and the coefficients of their rows."""
        rows = self.rows
        if self.fusible(objective, backend):
            return backend.weigh_pairs(
                logps,
                rows.offsets,
                objective.formula(),
                first=first,
                last=last,
                divisor=divisor,
                ref_logps=self.ref_logps,
                scores=self.scores,
                token_weights=rows.weights_of(2 * first, 2 * last),
            )
        sums = rows.sums(logps, 2 * first, 2 * last)
        with torch.enable_grad():
            leaf = sums.view(-1, 2).T.detach().requires_grad_()
            losses = self.losses(objective, leaf, first, last)
            _refuse_other_leaves(losses, leaf, objective)
            (coefs,) = torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)
        coef = rows.spread(coefs.T.flatten() / divisor, 2 * first)
        return Weighed(sums, losses.detach(), coef)

    def refuse_coupled(self, objective: Objective, logps: list[Tensor], by_group: Tensor) -> None:
        """Raises where pairs seen together have other losses than group by group.

        A different length may take another instruction to the same function, which is a few units
        in the last place; a batch's mean or order changes far more.
        """
        with torch.no_grad():
            together = self.losses(objective, torch.cat(logps).view(-1, 2).T)
        allowed = 1024 * torch.finfo(by_group.dtype).eps * (1 + together.abs())
        alike = ((together - by_group).abs() <= allowed) | ~together.isfinite()
        name = type(objective).__name__
        require(
            alike.all(),
            f"{name} gives a pair another loss beside other pairs and does not say that it couples "
            f"them: set couples_pairs = True in {name}",
        )

    def mean_metrics(self, per_pair: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the counted pairs, 0 of none, from values that are 0 for the others."""
        counted = max(1, sum(self.counted))
        return {name: values.sum() / counted for name, values in per_pair.items()}


class PairLosses(torch.autograd.Function):
    """`(losses (B,), logps (2B,), metrics)` from token log-probabilities, by the fused kernel."""

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, inputs: PairInputs, objective: Objective, backend: Backend
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weighed = inputs.weigh(objective, backend, logps, 0, len(inputs.counted), 1)
        ctx.save_for_backward(weighed.coef)
        ctx.rows = inputs.rows
        summed = inputs.rows.in_batch_order(weighed.logps)
        ctx.mark_non_differentiable(summed)
        return weighed.losses, summed, weighed.metrics

    @staticmethod
    @_first_order
    def backward(ctx: Any, of_losses: Tensor, *_: Tensor) -> tuple:
        (coef,) = ctx.saved_tensors
        return coef * ctx.rows.repeat(of_losses.repeat_interleave(2)), None, None, None


def _refuse_other_leaves(losses: Tensor, leaf: Tensor, objective: Objective) -> None:
    """Raises where a tensor other than the log-probabilities would train: it would get nothing."""
    nodes, seen = [losses.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            raise ValueError(
                f"{type(objective).__name__} uses a tensor that requires a gradient but is none of "
                "its attributes; make it one, or use schedule='recompute'"
            )
        nodes += [following for following, _ in node.next_functions]


def _joined(parts: list[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Metrics of consecutive pairs as one."""
    if parts[0] is None:
        return None
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _live_rows(coef: Tensor, of_entropy: Tensor | None) -> Tensor | None:
    """Rows with a coefficient, None if all have one. Only looked for where looking is free."""
    if coef.device.type != "cpu":
        return None
    live = coef != 0 if of_entropy is None else (coef != 0) | (of_entropy != 0)
    return None if live.all() else live.nonzero().flatten()


def _live_ranges(coef: Tensor) -> list[tuple[int, int]]:
    """Maximal ranges of rows whose coefficient is not 0; all rows where looking makes us wait."""
    if coef.device.type != "cpu":
        return [(0, len(coef))]
    live = torch.cat([coef.new_zeros(1, dtype=torch.bool), coef != 0]).int()
    edges = torch.diff(live, append=live.new_zeros(1)).nonzero().flatten().tolist()
    if len(edges) // 2 > 1 + len(coef) // 64:  # scattered zeros: many small products cost more
        return [(0, len(coef))]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _at_rows(grad_rows: Tensor, index: Tensor | None, hidden: Tensor) -> Tensor:
    """Rows of the gradient in hidden's layout and dtype."""
    if index is None:
        return grad_rows.to(hidden.dtype)
    whole = torch.zeros_like(hidden)
    for some, rows in zip(index.split(_ROWS_AT_ONCE), grad_rows.split(_ROWS_AT_ONCE), strict=True):
        whole.index_copy_(0, some, rows.to(hidden.dtype))
    return whole


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad · upstream` in `dtype`; grad is consumed."""
    if upstream.device.type != "cpu" or upstream.item() != 1:
        grad.mul_(upstream)
    return grad.to(dtype)


@torch.compiler.disable
def _keeps_graph() -> bool:
    """Whether the running backward may be followed by another through the same graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _no_autocast(hidden: Tensor) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(hidden.device.type):
        return nullcontext()
    return torch.autocast(hidden.device.type, enabled=False)
