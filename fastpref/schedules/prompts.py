"""From token log-probabilities to losses: what comes with the prompts of a batch, and the step.

A prompt of which a response has no scored token counts with loss 0 and no gradient: the objective
never sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import Backend, NamedRows, RowStats, Weighed
from fastpref.domains import require
from fastpref.objectives import ListLogps, Objective, evaluate
from fastpref.schedules.autograd import first_order
from fastpref.sequences import Rows, on_device


class Prompts:
    """The per-prompt inputs of an objective, and the step from log-probabilities to losses.

    Args:
        rows: the scored rows, of K responses a prompt.
        ref_logps: `(K·B,)`, as the caller gave them: response after response.
        scores: `(K·B,)`.
        weights: `(B,)`, of the losses.
        betas: `(B,)`.
        extras: by name `(B,)` or `(K·B,)`.
        weighted_lengths: lengths are sums of token weights.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        ref_logps: Tensor | None = None,
        scores: Tensor | None = None,
        weights: Tensor | None = None,
        betas: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        weighted_lengths: bool = False,
    ) -> None:
        self.rows = rows
        responses = rows.responses
        by_prompt = [rows.whole[i : i + responses] for i in range(0, len(rows.whole), responses)]
        self.counted = [min(counts) > 0 for counts in by_prompt]
        prompts = len(by_prompt)
        self.weights = None if weights is None else weights.detach()
        self.betas = None if betas is None else betas.detach()
        self.ref_logps = None if ref_logps is None else ref_logps.detach().view(responses, -1)
        self.scores = None if scores is None else scores.detach().view(responses, -1)
        self.extras = {
            name: x.detach() if len(x) == prompts else x.detach().view(responses, -1)
            for name, x in (extras or {}).items()
        }
        # Else they are numbers of rows, which the host knows.
        self.has_lengths = weighted_lengths or rows.scored is not None
        self.lengths = rows.lengths.view(responses, -1)
        self.mean_lengths: tuple[float | Tensor, ...]
        if weighted_lengths:
            ones = torch.ones(rows.targets.shape, dtype=torch.float64, device=rows.targets.device)
            lengths = rows.in_batch_order(rows.sums(ones))
            lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny)
            self.lengths = lengths.view(responses, -1)
        if self.has_lengths:
            self.mean_lengths = tuple(self.lengths.double().mean(1).unbind())
        else:
            of_responses = zip(*by_prompt, strict=True)
            self.mean_lengths = tuple(sum(counts) / prompts for counts in of_responses)

    def lists(
        self,
        logps: Tensor,  # (K, prompts) of first:last
        alignments: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> tuple[ListLogps, Tensor | None]:
        """What the objective sees of the counted prompts; which those are, None if all."""
        last = len(self.counted) if last is None else last
        counted = self.counted[first:last]
        which = None
        if not all(counted):
            found = [i for i, counts in enumerate(counted) if counts]
            which = on_device(torch.tensor(found, dtype=torch.int64, device="cpu"), logps.device)

        def picked(values: Tensor) -> Tensor:
            return values if which is None else values[..., which]

        def of(values: Tensor) -> Tensor:
            return picked(values[..., first:last].to(logps.dtype))

        def if_any(choose: Callable[[Tensor], Tensor], values: Tensor | None) -> Tensor | None:
            return None if values is None else choose(values)

        seen = ListLogps(
            logps=picked(logps),
            lengths=of(self.lengths),
            ref_logps=if_any(of, self.ref_logps),
            scores=if_any(of, self.scores),
            betas=if_any(of, self.betas),
            extras={name: of(values) for name, values in self.extras.items()},
            alignments=if_any(picked, alignments),
            mean_lengths=self.mean_lengths,
        )
        return seen, which

    def losses(
        self,
        objective: Objective,
        logps: Tensor,  # (K, prompts) of first:last
        alignments: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Losses of the prompts `first:last`, by ordinary autograd."""
        seen, which = self.lists(logps, alignments, first, last)
        count = logps.shape[1] if which is None else len(which)
        losses = evaluate(objective, seen) if count else seen.logps[0] * 0
        if which is not None:
            whole = logps.new_zeros(logps.shape[1])
            losses = whole.index_copy(0, which, losses.to(logps.dtype))
        if self.weights is not None:
            losses = losses * self.weights[first:last].to(losses.dtype)
        return losses

    def alignments(self, rows: RowStats, first: int, last: int) -> Tensor:
        """Σ_t (log p(y_t) − log Σ p²) of the responses of the prompts `first:last`, constants."""
        responses = self.rows.responses
        values = (rows.logps - rows.extra["log_sum_sq_probs"]).detach()
        return self.rows.sums(values, responses * first, responses * last, weighted=False)

    def fusible(self, objective: Objective, backend: Backend) -> bool:
        """Whether the backend can do in one launch what autograd does otherwise.

        It adds up the rows that are here.
        """
        fuses = backend.weigh_pairs is not None and self.rows.responses == 2
        return fuses and self.rows.parts is None and objective.formula() is not None

    def weigh(
        self,
        objective: Objective,
        backend: Backend,
        group: RowStats,  # rows of the prompts first:last
        first: int,
        last: int,
        divisor: int,
    ) -> Weighed:
        """Losses of the prompts `first:last`, and the coefficients of their rows."""
        if self.fusible(objective, backend):
            return self.weigh_fused(objective, backend, group.logps, first, last, divisor)
        rows, responses = self.rows, self.rows.responses
        sums = rows.sums(group.logps, responses * first, responses * last)
        alignments = by_response = None
        if objective.needs_alignments:
            alignments = self.alignments(group, first, last)
            by_response = alignments.view(-1, responses).T
        with torch.enable_grad():
            leaf = sums.view(-1, responses).T.detach().requires_grad_()
            losses = self.losses(objective, leaf, by_response, first, last)
            _refuse_other_leaves(losses, leaf, objective)
            (coefs,) = torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)
        coef = rows.spread(coefs.T.flatten() / divisor, responses * first)
        return Weighed(sums, losses.detach(), coef, alignments=alignments)

    def weigh_fused(
        self,
        objective: Objective,
        backend: Backend,
        logps: Tensor,
        first: int,
        last: int,
        divisor: int,
    ) -> Weighed:
        assert backend.weigh_pairs is not None  # else not `fusible`
        return backend.weigh_pairs(
            logps,
            self.rows.offsets,
            objective.formula(),
            first=first,
            last=last,
            divisor=divisor,
            ref_logps=self.ref_logps,
            scores=self.scores,
            token_weights=self.rows.weights_of(2 * first, 2 * last),
            pair_weights=self.weights,
            betas=self.betas,
            lengths=self.lengths if self.has_lengths else None,
        )

    def refuse_coupled(
        self, objective: Objective, logps: Tensor, alignments: Tensor | None, by_group: Tensor
    ) -> None:
        """Raises where prompts seen together have other losses than group by group.

        A different length may take another instruction to the same function, which is a few units
        in the last place; a batch's mean or order changes far more.
        """
        responses = self.rows.responses
        if alignments is not None:
            alignments = alignments.view(responses, -1)
        with torch.no_grad():
            together = self.losses(objective, logps.view(responses, -1), alignments)
        allowed = 1024 * torch.finfo(by_group.dtype).eps * (1 + together.abs())
        alike = ((together - by_group).abs() <= allowed) | ~together.isfinite()
        name = type(objective).__name__
        require(
            alike.all(),
            f"{name} gives a pair another loss beside other pairs and does not say that it couples "
            f"them: set couples_pairs = True in {name}",
        )

    def mean_metrics(self, per_prompt: NamedRows) -> dict[str, Tensor]:
        """Means over the counted prompts, 0 of none, from values that are 0 for the others."""
        if all(self.counted) and self.counted:
            means = per_prompt.values.mean(1).unbind()
        else:
            means = per_prompt.values.sum(1).div_(max(1, sum(self.counted))).unbind()
        named = zip(per_prompt.names, means, strict=True)
        return {name: mean for name, mean in named if name is not None}


class PairLosses(torch.autograd.Function):
    """`(losses (B,), logps (2B,), metrics)` from token log-probabilities, by the fused kernel."""

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, inputs: Prompts, objective: Objective, backend: Backend
    ) -> tuple[Tensor, Tensor, NamedRows | None]:
        weighed = inputs.weigh_fused(objective, backend, logps, 0, len(inputs.counted), 1)
        ctx.save_for_backward(weighed.coef)
        ctx.rows = inputs.rows
        summed = inputs.rows.in_batch_order(weighed.logps)
        ctx.mark_non_differentiable(summed)
        return weighed.losses, summed, weighed.metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, of_losses: Tensor, *_: Tensor) -> tuple:
        (coef,) = ctx.saved_tensors
        return coef * ctx.rows.repeat(of_losses.repeat_interleave(2)), None, None, None


def total_of(losses: Tensor, divisor: int) -> Tensor:
    """Their sum over `divisor`; where that is a mean, in one launch."""
    return losses.mean() if divisor == len(losses) else losses.sum() / divisor


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
