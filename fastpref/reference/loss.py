"""`fastpref.preference_loss` by definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.objectives import (
    ListLogps,
    Objective,
    evaluate,
    is_built_in,
    mean_or_zero,
    step_metrics,
)
from fastpref.output import PreferenceOutput
from fastpref.reference.formulas import pair_losses
from fastpref.reference.head import IGNORED, offsets, sequence_logps, sums, token_statistics


def preference_loss(
    hidden: Tensor,  # (K·B, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape
    objective: Objective,
    *,
    ref_logps: Tensor | None = None,  # (K·B,)
    scores: Tensor | None = None,  # (K·B,)
    pair_weights: Tensor | None = None,  # (B,)
    betas: Tensor | None = None,  # (B,)
    extras: Mapping[str, Tensor] | None = None,  # each (B,) or (K·B,)
    responses: int = 2,
    cu_seqlens: Tensor | None = None,  # (K·B + 1,)
    token_weights: Tensor | None = None,
    weighted_lengths: bool = False,
    reduction: str = "mean",
    stats: tuple[str, ...] = (),
    **head: Any,
) -> PreferenceOutput:
    """`fastpref.preference_loss` by definition; every field is differentiable."""
    logps, tokens = sequence_logps(
        hidden, weight, targets, cu_seqlens=cu_seqlens, token_weights=token_weights, **head
    )
    dtype, prompts = logps.dtype, len(logps) // responses
    counted = (tokens.view(responses, -1) > 0).all(0)
    lengths = tokens
    if weighted_lengths and token_weights is not None:
        scored = (targets.flatten() != IGNORED).to(hidden.device)
        lengths = sums(scored * token_weights.flatten().to(logps), targets, cu_seqlens)
        lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny)
    names = (*stats, *("log_sum_sq_probs",) * objective.needs_alignments)
    constants = hidden.flatten(0, -2).detach(), weight.detach(), targets.flatten()
    values = token_statistics(*constants, stats=names, **head) if names else {}
    aligned = None
    if objective.needs_alignments:
        aligned = sums(values["logps"] - values["log_sum_sq_probs"], targets, cu_seqlens)

    def of(values: Tensor) -> Tensor:
        """Of the counted prompts, `(K, ·)`, or `(·,)` where there is one number a prompt."""
        values = values.to(dtype) if values is logps else values.detach().to(dtype)
        return values[counted] if len(values) == prompts else values.view(responses, -1)[:, counted]

    seen = ListLogps(
        of(logps),
        of(lengths),
        None if ref_logps is None else of(ref_logps),
        None if scores is None else of(scores),
        None if betas is None else of(betas),
        {name: of(value) for name, value in (extras or {}).items()},
        None if aligned is None else of(aligned),
        tuple(lengths.view(responses, -1).to(dtype).mean(1).unbind()),
    )
    losses = 0 * logps[:prompts]  # differentiable where no prompt counts, too
    if counted.any():
        if is_built_in(objective):
            by_formula = pair_losses(objective, objective.view(seen))
        else:
            by_formula = evaluate(objective, seen)
        losses = losses.masked_scatter(counted, by_formula)
    if pair_weights is not None:
        losses = losses * pair_weights.to(dtype)
    loss = losses if reduction == "none" else getattr(losses, reduction)()
    metrics = step_metrics(objective, seen)
    metrics |= _token_metrics(values, targets, cu_seqlens, responses, stats)
    return PreferenceOutput(loss, losses, logps, tokens, metrics)


def _token_metrics(
    values: dict[str, Tensor],
    targets: Tensor,
    cu_seqlens: Tensor | None,
    responses: int,
    stats: tuple[str, ...],
) -> dict[str, Tensor]:
    if not stats:
        return {}
    ends, device = offsets(targets, cu_seqlens), values["logps"].device
    prompts = (len(ends) - 1) // responses
    rows = torch.arange(len(targets.flatten()), device=device)
    scored = (targets.flatten() != IGNORED).to(device)
    chosen = scored & (rows < ends[prompts])
    rejected = scored & (rows >= ends[-1 - prompts])
    metrics = {}
    if "entropy" in stats:
        metrics["entropy"] = mean_or_zero(values["entropy"][scored])
    if "is_top1" in stats:
        metrics["mean_token_accuracy"] = mean_or_zero(values["is_top1"][chosen].float())
    if "mean_logits" in stats:
        metrics["logits/chosen"] = mean_or_zero(values["mean_logits"][chosen])
        metrics["logits/rejected"] = mean_or_zero(values["mean_logits"][rejected])
    return metrics
