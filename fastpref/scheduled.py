"""The public functions by schedules over a backend: compact, plan, run.

Arguments are those of `fastpref.loss`, checked there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from fastpref.backends.vocabulary_shards import Shards
from fastpref.domains import require
from fastpref.memory import spare_bytes
from fastpref.objectives import Objective, own_parameters, step_metrics
from fastpref.output import PreferenceOutput
from fastpref.planner import Plan, Problem, make_plan
from fastpref.schedules import PairGroups, PairLosses, Prompts, TokenLogps, total_of
from fastpref.sequence_parts import SequenceParts
from fastpref.sequences import IGNORED, Rows, on_device


@dataclass(frozen=True)
class Scheduled:
    """A backend, how the caller wants it done, and which ranks share the head or the sequences."""

    backend: Backend
    schedule: str
    logits_budget: int | None
    capturable: bool
    weight_grad: Tensor | None
    weight_grad_scale: float
    shards: Shards | None = None
    parts: SequenceParts | None = None

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
        head = self._head(hidden, weight, scalars)
        head = replace(head, weight_grad=self.weight_grad, weight_grad_scale=self.weight_grad_scale)
        rows = self._rows(hidden, targets, cu_seqlens, token_weights, responses)
        flat = hidden.flatten(0, -2)
        plan = make_plan(
            _problem(flat, head, rows.most, responses, self.backend),
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
            loss = losses if reduction == "none" else total_of(losses, divisor)
        if self.weight_grad is not None and loss.requires_grad:
            loss.register_hook(functools.partial(_require_upstream, self.weight_grad_scale))
        logps = logps.detach()
        if per_prompt is not None:
            metrics = prompts.mean_metrics(per_prompt)
        else:
            alignments = _by_response(alignments, responses)
            seen, _ = prompts.lists(logps.view(responses, -1), alignments)
            metrics = step_metrics(objective, seen)
        metrics |= _token_metrics(rows, dict(zip(stats, extra, strict=False)), losses.dtype)
        return PreferenceOutput(loss, losses.detach(), logps, rows.lengths, metrics, plan)

    def _of_rows(
        self, flat: Tensor, head: Head, rows: Rows, plan: Plan, stats: tuple[str, ...]
    ) -> list[Tensor]:
        """Log-probabilities and statistics of the rows, in their order."""
        how = head, plan, self.backend, stats
        if rows.places is not None or len(rows.targets) < len(flat):
            given = flat, head.weight, head.bias, head.frozen_scale
            return [*TokenLogps.apply(*given, rows.targets, rows.index, rows.places, *how)]
        # Hidden is taken as it lies: it need not be copied to have its rows in another order.
        targets = torch.empty_like(rows.targets).index_copy_(0, rows.index, rows.targets)
        given = flat, head.weight, head.bias, head.frozen_scale
        found = TokenLogps.apply(*given, targets, None, None, *how)
        return [x.index_select(0, rows.index) for x in found]

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
        rows = self._rows(hidden, targets, cu_seqlens, token_weights)
        flat, head = hidden.flatten(0, -2), self._head(hidden, weight, scalars)
        plan = self._plan(flat, head, len(rows.targets))
        per_row = self._of_rows(flat, head, rows, plan, ())[0]
        return rows.sums(per_row), rows.lengths

    def token_statistics(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (N,)
        *,
        stats: tuple[str, ...],
        **scalars: Unpack[HeadOptions],
    ) -> dict[str, Tensor]:
        head = self._head(hidden, weight, scalars)
        if self.capturable:
            rows = Rows.of_all(targets[None], None)
            plan = self._plan(hidden, head, len(targets))
            found = self._of_rows(hidden, head, rows, plan, stats)
            found = [x.masked_fill(targets == IGNORED, 0) for x in found]
            return dict(zip(("logps", *stats), found, strict=True))
        scored = (targets != IGNORED).nonzero().flatten()
        index = None
        if len(scored) < len(targets):
            targets, index = targets[scored], on_device(scored, hidden.device)
        wanted = on_device(targets, hidden.device)
        plan = self._plan(hidden, head, len(wanted))
        given = hidden, head.weight, head.bias, head.frozen_scale, wanted, index, None
        found = [*TokenLogps.apply(*given, head, plan, self.backend, stats)]
        if index is not None:
            found = [x.new_zeros(len(hidden)).index_copy(0, index, x) for x in found]
        return dict(zip(("logps", *stats), found, strict=True))

    def _rows(
        self,
        hidden: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        responses: int = 1,
    ) -> Rows:
        if self.capturable:
            return Rows.of_all(targets, token_weights, responses)
        given = targets, cu_seqlens, token_weights
        return Rows.of(*given, hidden.device, responses, self.parts)

    def _head(self, hidden: Tensor, weight: Tensor, scalars: HeadOptions) -> Head:
        frozen = scalars["frozen_weight"]
        of_head = (weight,) if frozen is None else (weight, frozen)
        dtype = compute_dtype(hidden, *of_head)
        return Head(weight, **scalars, compute_dtype=dtype, shards=self.shards)

    def _plan(self, hidden: Tensor, head: Head, rows: int) -> Plan:
        """For log-probabilities of tokens."""
        problem = _problem(hidden, head, [rows], 1, self.backend)
        return make_plan(problem, schedule=self.schedule, budget=self.logits_budget)


def _problem(
    flat: Tensor, head: Head, counts: list[int], responses: int, backend: Backend
) -> Problem:
    grad = torch.is_grad_enabled()
    of_head = head.weight, head.bias, head.frozen_scale
    head_tensors = [x for x in of_head if x is not None]
    return Problem(
        counts=tuple(counts),
        hidden_size=flat.shape[1],
        vocabulary=head.most_columns,
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
        weight_grad_dtype=None if head.weight_grad is None else head.weight_grad.dtype,
    )


def _require_upstream(scale: float, upstream: Tensor) -> None:
    """Of a loss whose gradient may have been added to a buffer before this was known."""
    allowed = 4 * torch.finfo(upstream.dtype).eps * abs(scale)  # of a division more or less
    require(
        (upstream - scale).abs() <= allowed,
        f"weight_grad was promised an upstream gradient of weight_grad_scale = {scale}, and the "
        "loss got another one; weight_grad may hold a wrong sum now",
    )


def _by_response(per_sequence: Tensor | None, responses: int) -> Tensor | None:
    return None if per_sequence is None else per_sequence.view(responses, -1)


def _token_metrics(rows: Rows, stats: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Means over scored tokens: of all, of the first response's and of the last one's."""
    if not stats:
        return {}
    k = rows.responses
    response = rows.repeat(torch.arange(len(rows.counts), device=rows.index.device) % k)
    if rows.scored is not None:
        response = torch.where(rows.scored, response, -1)
    every, chosen, rejected = response >= 0, response == 0, response == k - 1
    wanted = {
        "entropy": ("entropy", every),
        "mean_token_accuracy": ("is_top1", chosen),
        "logits/chosen": ("mean_logits", chosen),
        "logits/rejected": ("mean_logits", rejected),
    }
    wanted = {metric: found for metric, found in wanted.items() if found[0] in stats}
    sums = [
        torch.where(of, stats[name].detach(), 0).sum(dtype=dtype) for name, of in wanted.values()
    ]
    totals = torch.stack([*sums, *(of.sum(dtype=dtype) for _, of in wanted.values())])
    if rows.parts is not None:
        totals = rows.parts.sum(totals)
    sums_of_all, counts = totals.chunk(2)
    means = sums_of_all / counts.clamp(min=1)  # 0 of nothing
    return dict(zip(wanted, means.unbind(), strict=True))
