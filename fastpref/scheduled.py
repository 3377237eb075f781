"""The public functions by schedules over a backend: compact, plan, run.

Arguments are those of `fastpref.loss`, checked there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from fastpref.backends import (
    Backend,
    Head,
    HeadOptions,
    RowStats,
    accumulate_dtype,
    compute_dtype,
)
from fastpref.memory import spare_bytes
from fastpref.objectives import Objective, mean_or_zero, own_parameters, step_metrics
from fastpref.output import PreferenceOutput
from fastpref.planner import Plan, Problem, make_plan
from fastpref.schedules import PairGroups, PairLosses, Prompts, TokenLogps
from fastpref.sequences import IGNORED, Rows, on_device


@dataclass(frozen=True)
class Scheduled:
    """A backend, and what the caller asked of the planner.

    Under `torch.compile` it runs as it is: the plan reads lengths, where a graph would end, and
    products taken into a graph would multiply at the caller's precision.
    """

    backend: Backend
    schedule: str
    logits_budget: int | None

    @torch.compiler.disable
    def preference_loss(
        self,
        hidden: Tensor,  # (K·B, T, H), or (total, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # hidden's leading shape
        objective: Objective,
        *,
        ref_logps: Tensor | None,
        scores: Tensor | None,
        pair_weights: Tensor | None,
        betas: Tensor | None,
        extras: Mapping[str, Tensor] | None,
        responses: int,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        weighted_lengths: bool,
        reduction: str,
        stats: tuple[str, ...],
        **scalars: Unpack[HeadOptions],
    ) -> PreferenceOutput:
        head = _head(hidden, weight, scalars)
        rows = Rows.of(targets, cu_seqlens, token_weights, hidden.device, responses)
        flat = hidden.flatten(0, -2)
        plan = make_plan(
            _problem(flat, head, rows.counts, responses, self.backend),
            schedule=self.schedule,
            budget=self.logits_budget,
            spare=functools.partial(spare_bytes, hidden.device),
            pairs=True,
            couples_pairs=objective.couples_pairs,
            learns=bool(own_parameters(objective)),
            reduces=reduction != "none",
        )
        prompts = Prompts(
            rows,
            ref_logps=ref_logps,
            scores=scores,
            weights=pair_weights,
            betas=betas,
            extras=extras,
            weighted_lengths=weighted_lengths,
        )
        of_rows = (*stats, *("log_sum_sq_probs",) * objective.needs_alignments)
        divisor = len(rows.counts) // responses if reduction == "mean" else 1
        if plan.schedule == "pair_groups":
            loss, losses, logps, per_prompt, alignments, *extra = PairGroups.apply(
                flat, weight, head.bias, head.frozen_scale, rows, prompts, objective, divisor,
                head, plan, self.backend, of_rows,
            )  # fmt: skip
        else:
            per_row, *extra = self._of_rows(flat, head, rows, plan, of_rows)
            alignments = None
            if prompts.fusible(objective, self.backend):
                losses, logps, per_prompt = PairLosses.apply(
                    per_row, prompts, objective, self.backend
                )
            else:
                logps, per_prompt = rows.in_batch_order(rows.sums(per_row)), None
                if objective.needs_alignments:
                    of_tokens = RowStats(per_row, per_row, dict(zip(of_rows, extra, strict=True)))
                    count = len(rows.counts) // responses
                    alignments = rows.in_batch_order(prompts.alignments(of_tokens, 0, count))
                losses = prompts.losses(
                    objective, logps.view(responses, -1), _by_response(alignments, responses)
                )
            loss = losses
            if reduction != "none":
                loss = losses.mean() if divisor == len(losses) else losses.sum() / divisor
        logps = logps.detach()
        if per_prompt is not None:
            metrics = prompts.mean_metrics(per_prompt)
        else:
            alignments = _by_response(alignments, responses)
            seen, _ = prompts.lists(logps.view(responses, -1), alignments)
            metrics = step_metrics(objective, seen)
        metrics |= _token_metrics(rows, dict(zip(stats, extra, strict=False)))
        return PreferenceOutput(loss, losses.detach(), logps, rows.lengths, metrics, plan)

    def _of_rows(
        self, flat: Tensor, head: Head, rows: Rows, plan: Plan, stats: tuple[str, ...]
    ) -> list[Tensor]:
        """Log-probabilities and statistics of the rows, in their order."""
        how = head, plan, self.backend, stats
        if len(rows.targets) < len(flat):
            given = flat, head.weight, head.bias, head.frozen_scale
            return [*TokenLogps.apply(*given, rows.targets, rows.index, *how)]
        # Hidden is taken as it lies: it need not be copied to have its rows in another order.
        targets = torch.empty_like(rows.targets).index_copy_(0, rows.index, rows.targets)
        found = TokenLogps.apply(
            flat, head.weight, head.bias, head.frozen_scale, targets, None, *how
        )
        return [x.index_select(0, rows.index) for x in found]

    @torch.compiler.disable
    def sequence_logps(
        self,
        hidden: Tensor,  # (S, T, H), or (total, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # hidden's leading shape
        *,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        **scalars: Unpack[HeadOptions],
    ) -> tuple[Tensor, Tensor]:
        rows = Rows.of(targets, cu_seqlens, token_weights, hidden.device)
        flat, head = hidden.flatten(0, -2), _head(hidden, weight, scalars)
        plan = self._plan(flat, head, len(rows.targets))
        per_row = self._of_rows(flat, head, rows, plan, ())[0]
        return rows.sums(per_row), rows.lengths

    @torch.compiler.disable
    def token_statistics(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (N,)
        *,
        stats: tuple[str, ...],
        **scalars: Unpack[HeadOptions],
    ) -> dict[str, Tensor]:
        scored = (targets != IGNORED).nonzero().flatten()
        index = None
        if len(scored) < len(targets):
            targets, index = targets[scored], on_device(scored, hidden.device)
        wanted = on_device(targets, hidden.device)
        head = _head(hidden, weight, scalars)
        plan = self._plan(hidden, head, len(wanted))
        given = hidden, head.weight, head.bias, head.frozen_scale, wanted, index
        found = [*TokenLogps.apply(*given, head, plan, self.backend, stats)]
        if index is not None:
            found = [x.new_zeros(len(hidden)).index_copy(0, index, x) for x in found]
        return dict(zip(("logps", *stats), found, strict=True))

    def _plan(self, hidden: Tensor, head: Head, rows: int) -> Plan:
        """For log-probabilities of tokens."""
        problem = _problem(hidden, head, [rows], 1, self.backend)
        return make_plan(problem, schedule=self.schedule, budget=self.logits_budget)


def _head(hidden: Tensor, weight: Tensor, scalars: HeadOptions) -> Head:
    frozen = scalars["frozen_weight"]
    of_head = (weight,) if frozen is None else (weight, frozen)
    return Head(weight, **scalars, compute_dtype=compute_dtype(hidden, *of_head))


def _problem(
    flat: Tensor, head: Head, counts: list[int], responses: int, backend: Backend
) -> Problem:
    grad = torch.is_grad_enabled()
    of_head = head.weight, head.bias, head.frozen_scale
    head_tensors = [x for x in of_head if x is not None]
    return Problem(
        counts=tuple(counts),
        hidden_size=flat.shape[1],
        vocabulary=len(head.weight),
        dtype=flat.dtype,
        accumulate_dtype=accumulate_dtype(head.compute_dtype),
        device=flat.device.type,
        total_rows=len(flat),
        hidden_grad=grad and flat.requires_grad,
        head_grad=grad and any(x.requires_grad for x in head_tensors),
        head_dtype=head.weight.dtype,
        responses=responses,
        kept_dtype=backend.kept_dtype(head),
        head_columns=None if head.frozen_weight is None else head.weight.shape[1],
        scales=head.frozen_scale is not None and head.frozen_scale.requires_grad,
    )


def _by_response(per_sequence: Tensor | None, responses: int) -> Tensor | None:
    return None if per_sequence is None else per_sequence.view(responses, -1)


def _token_metrics(rows: Rows, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over scored tokens: of all, of the first response's and of the last one's."""
    if not stats:
        return {}
    k = rows.responses
    response = rows.repeat(torch.arange(len(rows.counts), device=rows.index.device) % k)
    is_chosen, is_rejected = response == 0, response == k - 1
    tokens = max(1, sum(rows.counts[::k])), max(1, sum(rows.counts[k - 1 :: k]))
    metrics = {}
    if "entropy" in stats:
        metrics["entropy"] = mean_or_zero(stats["entropy"])
    if "is_top1" in stats:
        metrics["mean_token_accuracy"] = (stats["is_top1"] & is_chosen).sum() / tokens[0]
    if "mean_logits" in stats:
        values = stats["mean_logits"]
        metrics["logits/chosen"] = torch.where(is_chosen, values, 0).sum() / tokens[0]
        metrics["logits/rejected"] = torch.where(is_rejected, values, 0).sum() / tokens[1]
    return metrics
