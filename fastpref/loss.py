"""The public functions: `preference_loss`, `sequence_logps`, `linear_logps`.

Each validates, compacts, asks the planner for a schedule and runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends import (
    TOKEN_STATS,
    Head,
    accumulate_dtype,
    choose_backend,
    compute_dtype,
)
from fastpref.objectives import Objective, mean_or_zero, own_parameters, pair_metrics
from fastpref.output import PreferenceOutput
from fastpref.planner import Problem, make_plan
from fastpref.schedules import PairGroups, PairInputs, PairLosses, TokenLogps
from fastpref.sequences import IGNORED, Rows, on_device
from fastpref.validation import check_head, check_objective, check_sequences

# Statistics of tokens that have a mean to report.
_AVERAGED = ("entropy", "mean_logits", "is_top1")


def preference_loss(
    hidden: Tensor,  # (2B, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape, int64
    objective: Objective | str,
    *,
    ref_logps: Tensor | None = None,  # (2B,)
    scores: Tensor | None = None,  # (2B,)
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    token_weights: Tensor | None = None,  # as targets
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
    schedule: str = "auto",
    logits_budget: int | None = None,
    stats: Sequence[str] = (),
) -> PreferenceOutput:
    """Preference loss of a batch of pairs straight from hidden states; logits are never held.

    Sequences `0..B-1` are the chosen responses, `B..2B-1` the rejected ones, in every argument and
    result. Logits are `softcap·tanh(logit_scale·(W h + bias)/softcap)/temperature`. Prompt and
    padding positions carry the target -100 and are skipped, whatever hidden holds there.

    Args:
        hidden: final hidden states, before the LM head: `(2B, T, H)`, or packed `(total, H)`.
            bf16, fp16, fp32 or fp64; in autocast operands other than fp64 are rounded to
            autocast's dtype.
        weight: LM head `(V, H)`. Of two dtypes products take what torch promotes them to; no copy
            of the head is made.
        targets: the token that each position predicts, -100 where not scored; `shift_targets`
            makes them from token ids. On hidden's device or on the CPU: the schedule is planned
            from lengths, so targets on an accelerator are read back once, those on the CPU never
            make a step wait. The same holds of cu_seqlens and token_weights.
        objective: `DPO(beta=0.1)`, … or an `Objective` of your own; a name takes its defaults.
            Its own parameters get their gradients, in schedules that see all pairs at once.
        ref_logps: log-probabilities of the responses under the reference, nats; see
            `sequence_logps`. Constants. Needed by every objective with a reference.
        scores: quality of the responses, any scale; needed by Uni-DPO.
        cu_seqlens: integer offsets of the packed sequences, from 0 to `total`.
        token_weights: constant weight of each token's log-probability, 1 by default.
        bias: bias of the LM head.
        reduction: "mean" over pairs (a pair of weight 0 counts), "sum" or "none".
        backend: "auto", "torch", "triton" or "reference"; one that cannot run is an error.
        schedule: "auto", "frozen_head" (2 U), "pair_groups" (3 U) or "recompute" (4 U), where U is
            one matrix product of all scored tokens; see `planner`. Without gradients 1 U.
        logits_budget: bytes of logits to hold at once; default 128 MiB on a CPU, else 1 GiB.
        stats: any of "entropy", "mean_logits", "is_top1", to be averaged into `metrics`.

    A response with no scored token has log-probability 0 and length 0; its pair adds loss 0 and no
    gradient. NaN or infinity in a scored row makes the loss non-finite. With "pair_groups" the
    gradients are handed over in the first backward, and a second one is an error. Gradients have
    no derivative of their own: `create_graph=True` is an error.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and says what
            was expected. Values (targets in range, finite scores) raise at once on a CPU and by an
            asynchronous assertion on an accelerator. So does an objective that couples pairs
            and does not say so, where its groups' losses are not those of all pairs together.
    """
    head, stats = _checked_head(
        hidden, weight, targets, stats, _AVERAGED, logits_budget, bias, logit_scale, softcap,
        temperature,
    )  # fmt: skip
    sequences = check_sequences(hidden, targets, cu_seqlens, token_weights, paired=True)
    objective = check_objective(
        objective,
        sequences,
        hidden.device,
        ref_logps=ref_logps,
        scores=scores,
        reduction=reduction,
    )
    chosen_backend = choose_backend(backend, hidden.device)
    if backend == "reference":
        return reference.preference_loss(
            hidden,
            weight,
            targets.to(hidden.device),
            objective,
            ref_logps=ref_logps,
            scores=scores,
            cu_seqlens=cu_seqlens,
            token_weights=None if token_weights is None else token_weights.to(hidden.device),
            reduction=reduction,
            stats=stats,
            **head.options,
        )
    rows = Rows.of(targets, cu_seqlens, token_weights, hidden.device, paired=True)
    flat = hidden.flatten(0, -2)
    plan = make_plan(
        _problem(flat, head, rows.counts),
        schedule=schedule,
        budget=logits_budget,
        pairs=True,
        couples_pairs=objective.couples_pairs,
        learns=bool(own_parameters(objective)),
        reduces=reduction != "none",
    )
    inputs = PairInputs(rows, ref_logps, scores)
    divisor = sequences // 2 if reduction == "mean" else 1
    if plan.schedule == "pair_groups":
        loss, losses, logps, per_pair, *extra = PairGroups.apply(
            flat, weight, bias, rows, inputs, objective, divisor, head, plan, chosen_backend, stats
        )
    else:
        per_row, *extra = TokenLogps.apply(
            flat, weight, bias, rows.targets, rows.index, head, plan, chosen_backend, stats
        )
        if inputs.fusible(objective, chosen_backend):
            losses, logps, per_pair = PairLosses.apply(per_row, inputs, objective, chosen_backend)
        else:
            logps, per_pair = rows.in_batch_order(rows.sums(per_row)), None
            losses = inputs.losses(objective, logps.view(2, -1))
        loss = losses if reduction == "none" else losses.sum() / divisor
    logps = logps.detach()
    if per_pair is not None:
        metrics = inputs.mean_metrics(per_pair)
    else:
        metrics = pair_metrics(objective, inputs.pairs(logps.view(2, -1))[0])
    metrics |= _token_metrics(rows, dict(zip(stats, extra, strict=True)))
    return PreferenceOutput(loss, losses.detach(), logps, rows.lengths, metrics, plan)


def sequence_logps(
    hidden: Tensor,  # (S, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape, int64
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    logits_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole responses, without gradient: what a reference model is asked for.

    Arguments as in `preference_loss`, for any number of sequences S. One matrix product; nothing
    of size tokens × vocabulary is held.

    Returns:
        Sums of (weighted) token log-probabilities `(S,)`, nats, fp32, and numbers of scored tokens
        `(S,)`, int64. In batches of pairs, `ref_logps` is the first of the two.
    """
    head, _ = _checked_head(
        hidden, weight, targets, (), (), logits_budget, bias, logit_scale, softcap, temperature
    )
    check_sequences(hidden, targets, cu_seqlens, token_weights, paired=False)
    chosen_backend = choose_backend(backend, hidden.device)
    with torch.no_grad():
        if backend == "reference":
            return reference.sequence_logps(
                hidden,
                weight,
                targets.to(hidden.device),
                cu_seqlens=cu_seqlens,
                token_weights=None if token_weights is None else token_weights.to(hidden.device),
                **head.options,
            )
        rows = Rows.of(targets, cu_seqlens, token_weights, hidden.device, paired=False)
        flat = hidden.flatten(0, -2)
        plan = make_plan(_problem(flat, head, rows.counts), budget=logits_budget)
        per_row, *_ = TokenLogps.apply(
            flat, weight, bias, rows.targets, rows.index, head, plan, chosen_backend, ()
        )
        return rows.sums(per_row), rows.lengths


@overload
def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, stats: tuple[()] = (), **options: Any
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, stats: Sequence[str], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]: ...
def linear_logps(
    hidden: Tensor,  # (N, H), or any leading shape
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    schedule: str = "auto",
    logits_budget: int | None = None,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each target, differentiable with any upstream gradient.

    Arguments as in `preference_loss`; `schedule` is "auto", "frozen_head" (2 U) or "recompute"
    (4 U). Entropy is differentiable too (its gradient recomputes the logits once).

    Args:
        stats: any of "entropy" (nats), "mean_logits", "is_top1" (bool) and "log_sum_sq_probs"
            (log Σ p²), to be returned for each token.

    Returns:
        Log-probabilities in targets' shape, nats, fp32, 0 where the target is -100; with `stats`
        a pair of them and a dictionary of further tensors of that shape.
    """
    head, stats = _checked_head(
        hidden, weight, targets, stats, TOKEN_STATS, logits_budget, bias, logit_scale, softcap,
        temperature,
    )  # fmt: skip
    chosen_backend = choose_backend(backend, hidden.device)
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    if backend == "reference":
        wanted = wanted.to(hidden.device)
        found = reference.token_statistics(flat, weight, wanted, **head.options)
        found = {name: value.view(targets.shape) for name, value in found.items()}
        return (found["logps"], {s: found[s] for s in stats}) if stats else found["logps"]
    index = (wanted != IGNORED).nonzero().flatten()
    if len(index) == len(wanted):
        index = None
    else:
        wanted, index = wanted[index], on_device(index, hidden.device)
    wanted = on_device(wanted, hidden.device)
    plan = make_plan(_problem(flat, head, [len(wanted)]), schedule=schedule, budget=logits_budget)
    outputs = TokenLogps.apply(flat, weight, bias, wanted, index, head, plan, chosen_backend, stats)
    if index is not None:
        outputs = [x.new_zeros(len(flat)).index_copy(0, index, x) for x in outputs]
    logps, *extra = (x.view(targets.shape) for x in outputs)
    return (logps, dict(zip(stats, extra, strict=True))) if stats else logps


def _checked_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    stats: Sequence[str],
    known_stats: tuple[str, ...],
    logits_budget: int | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[Head, tuple[str, ...]]:
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    scalars = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    check_head(
        hidden,
        weight,
        targets,
        bias=bias,
        **scalars,
        stats=stats,
        known_stats=known_stats,
        logits_budget=logits_budget,
    )
    return Head(weight, bias, **scalars, compute_dtype=compute_dtype(hidden, weight)), stats


def _problem(flat: Tensor, head: Head, counts: list[int]) -> Problem:
    grad = torch.is_grad_enabled()
    head_tensors = [x for x in (head.weight, head.bias) if x is not None]
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
    )


def _token_metrics(rows: Rows, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over scored tokens. Rows lie pair after pair: chosen, rejected, chosen, …"""
    if not stats:
        return {}
    chosen = rows.repeat((torch.arange(len(rows.counts), device=rows.index.device) + 1) % 2)
    tokens = max(1, sum(rows.counts[::2])), max(1, sum(rows.counts[1::2]))
    metrics = {}
    if "entropy" in stats:
        metrics["entropy"] = mean_or_zero(stats["entropy"])
    if "is_top1" in stats:
        metrics["mean_token_accuracy"] = (stats["is_top1"] & (chosen == 1)).sum() / tokens[0]
    if "mean_logits" in stats:
        values = stats["mean_logits"]
        metrics["logits/chosen"] = torch.where(chosen == 1, values, 0).sum() / tokens[0]
        metrics["logits/rejected"] = torch.where(chosen == 1, 0, values).sum() / tokens[1]
    return metrics
