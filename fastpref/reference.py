"""The definition of everything this package computes, naive and readable.

Logits are materialised, autograd does the gradients, formulas stand as in the papers and share no
code with `objectives.py`. Works in float64 and float32 on any device; half-precision inputs are
computed in float32. The tests take these functions, in float64, as the truth.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastpref.objectives import (
    Balance,
    Objective,
    PairLogps,
    evaluate,
    is_built_in,
    mean_or_zero,
    pair_metrics,
)
from fastpref.output import PreferenceOutput

IGNORED = -100


# --- the projection -----------------------------------------------------------------------------


def logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Logits `(N, V)`: `cap·tanh(scale·(W h + b) / cap) / temperature`."""
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    dtype = torch.float64 if wide else torch.float32
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    **head,  # bias, logit_scale, softcap, temperature
) -> Tensor:
    """Log-probability of each target `(N,)`, nats; 0 where the target is -100."""
    return token_statistics(hidden, weight, targets, **head)["logps"]


def token_statistics(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    **head,
) -> dict[str, Tensor]:
    """logps, entropy, mean_logits, is_top1, log_sum_sq_probs, each `(N,)`; 0 where not scored."""
    scored = targets != IGNORED
    z = logits(hidden[scored], weight, **head)  # (n, V)
    log_probs = torch.log_softmax(z, dim=-1)
    wanted = targets[scored]
    values = {
        "logps": log_probs.gather(-1, wanted[:, None]).squeeze(-1),
        # e^−1e4 is 0, and so is its product: a probability of 0 adds 0, to the gradient too.
        "entropy": -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == wanted,
        "log_sum_sq_probs": torch.logsumexp(2 * log_probs, -1).detach(),
    }
    return {
        name: value.new_zeros(targets.shape).masked_scatter(scored, value)
        for name, value in values.items()
    }


def sequence_logps(
    hidden: Tensor,  # (S, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    token_weights: Tensor | None = None,  # hidden's leading shape
    **head,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of token log-probabilities `(S,)` and scored lengths `(S,)`."""
    logps = linear_logps(hidden.flatten(0, -2), weight, targets.flatten(), **head)
    weighted = logps if token_weights is None else logps * token_weights.flatten().to(logps.dtype)
    scored = (targets != IGNORED).flatten()
    ends = _offsets(targets, cu_seqlens)
    rows = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    sums = torch.stack([weighted[row].sum() for row in rows])
    return sums, torch.stack([scored[row].sum() for row in rows])


def _offsets(targets: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is not None:
        return cu_seqlens.tolist()
    sequences, length = targets.shape
    return [i * length for i in range(sequences + 1)]


# --- the balance --------------------------------------------------------------------------------


def balance_coefficients(
    balance: Balance | None, pairs: PairLogps, *, log_odds: bool = False
) -> tuple[Tensor | float, Tensor | float]:
    """a_w and a_l of AdaDPO, constants to autograd; 1 and 1 without a balance."""
    if balance is None:
        return 1.0, 1.0
    b_w, b_l = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
    if balance.source == "implicit_reward":
        b_w, b_l = b_w - pairs.ref_chosen_logps, b_l - pairs.ref_rejected_logps
    if balance.per_token:
        b_w, b_l = b_w / pairs.chosen_lengths, b_l / pairs.rejected_lengths
    if log_odds:  # dρ/dp̄ = 1/(p̄(1−p̄))
        b_w, b_l = b_w + _log1m(b_w), b_l + _log1m(b_l)
    delta = b_w - b_l
    a_w, a_l = 1.0, 1.0
    if balance.chosen_exponent != 0:
        a_w = (balance.chosen_exponent * delta).exp().clip(balance.floor, balance.ceiling)
    if balance.rejected_exponent != 0:
        a_l = (-balance.rejected_exponent * delta).exp().clip(balance.floor, balance.ceiling)
    return a_w, a_l


# --- the objectives, one function each, (B,) losses ---------------------------------------------


def _nlls(x: Tensor) -> Tensor:
    """−log σ(x)"""
    return torch.logaddexp(torch.zeros_like(x), -x)


def _log1m(mean_logps: Tensor) -> Tensor:
    """log(1 − p̄)"""
    return torch.log(-torch.expm1(torch.clip(mean_logps, max=-1e-6)))


def _normalizers(
    pairs: PairLogps, length_normalized: bool
) -> tuple[Tensor | float, Tensor | float]:
    if length_normalized:
        return pairs.chosen_lengths, pairs.rejected_lengths
    return 1.0, 1.0


def _dpo_margin(pairs, beta, length_normalized, balance):
    n_w, n_l = _normalizers(pairs, length_normalized)
    a_w, a_l = balance_coefficients(balance, pairs)
    reward_w = (pairs.chosen_logps - pairs.ref_chosen_logps) / n_w
    reward_l = (pairs.rejected_logps - pairs.ref_rejected_logps) / n_l
    return beta * (a_w * reward_w - a_l * reward_l)


def dpo(pairs, *, beta, label_smoothing, length_normalized, balance):
    m = _dpo_margin(pairs, beta, length_normalized, balance)
    return (1 - label_smoothing) * _nlls(m) + label_smoothing * _nlls(-m)


adadpo = dpo


def hinge(pairs, *, beta, length_normalized, balance):
    m = _dpo_margin(pairs, beta, length_normalized, balance)
    return torch.clip(1 - m, min=0)


def ipo(pairs, *, beta, balance):
    m = _dpo_margin(pairs, 1.0, True, balance)
    return (m - 1 / (2 * beta)).square()


def simpo(pairs, *, beta, gamma, balance):
    a_w, a_l = balance_coefficients(balance, pairs)
    mean_w = pairs.chosen_logps / pairs.chosen_lengths
    mean_l = pairs.rejected_logps / pairs.rejected_lengths
    return _nlls(beta * (a_w * mean_w - a_l * mean_l) - gamma)


def rdpo(pairs, *, beta, alpha, length_normalized, balance):
    m = _dpo_margin(pairs, beta, length_normalized, balance)
    return _nlls(m + alpha * (pairs.chosen_lengths - pairs.rejected_lengths))


def cpo(pairs, *, beta, nll_weight, length_normalized, balance):
    n_w, n_l = _normalizers(pairs, length_normalized)
    a_w, a_l = balance_coefficients(balance, pairs)
    m = beta * (a_w * pairs.chosen_logps / n_w - a_l * pairs.rejected_logps / n_l)
    return _nlls(m) - nll_weight * pairs.chosen_logps / pairs.chosen_lengths


def orpo(pairs, *, odds_weight, balance):
    mean_w = pairs.chosen_logps / pairs.chosen_lengths
    mean_l = pairs.rejected_logps / pairs.rejected_lengths
    a_w, a_l = balance_coefficients(balance, pairs, log_odds=True)
    m = a_w * (mean_w - _log1m(mean_w)) - a_l * (mean_l - _log1m(mean_l))
    return -mean_w + odds_weight * _nlls(m)


def unidpo(
    pairs, *, beta, eta, tau_ref, gamma, nll_weight, tau_good, length_normalized,
    detach_performance_weight, balance,
):  # fmt: skip
    n_w, n_l = _normalizers(pairs, length_normalized)
    policy_w, policy_l = pairs.chosen_logps / n_w, pairs.rejected_logps / n_l
    m = _dpo_margin(pairs, beta, length_normalized, balance)
    u = beta * (policy_w - policy_l) - tau_ref
    performance = torch.exp(-gamma * _nlls(-u))  # (1 − σ(u))^γ
    if detach_performance_weight:
        performance = performance.detach()
    quality, nll = torch.full_like(m, 0.5), torch.zeros_like(m)
    if eta != 0:
        quality = 1 / (1 + torch.exp(-eta * (pairs.chosen_scores - pairs.rejected_scores)))
    if nll_weight != 0:
        fell_behind = pairs.ref_chosen_logps / n_w > policy_w
        nll = nll_weight * (fell_behind & (pairs.chosen_scores >= tau_good)).to(m.dtype)
    return quality * performance * _nlls(m) - nll * policy_w


def pair_losses(objective: Objective, pairs: PairLogps) -> Tensor:
    """Losses `(B,)` of a built-in objective by the formulas above, of a user's by itself."""
    formula = globals().get(type(objective).__name__.lower())
    if formula is None or not is_built_in(objective):
        return evaluate(objective, pairs)
    fields = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    return formula(pairs, **fields)


# --- the loss -----------------------------------------------------------------------------------


def preference_loss(
    hidden: Tensor,  # (2B, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape
    objective: Objective,
    *,
    ref_logps: Tensor | None = None,  # (2B,)
    scores: Tensor | None = None,  # (2B,)
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    stats: tuple[str, ...] = (),
    **head,
) -> PreferenceOutput:
    """`fastpref.preference_loss` by definition; every field is differentiable."""
    logps, lengths = sequence_logps(
        hidden, weight, targets, cu_seqlens=cu_seqlens, token_weights=token_weights, **head
    )
    half = len(logps) // 2
    counted = (lengths[:half] > 0) & (lengths[half:] > 0)
    halves = []
    constants = (None if x is None else x.detach() for x in (ref_logps, scores))
    for per_sequence in (logps, lengths, *constants):
        if per_sequence is None:
            halves += [None, None]
        else:
            per_sequence = per_sequence.to(logps.dtype)
            halves += [per_sequence[:half][counted], per_sequence[half:][counted]]
    pairs = PairLogps(*halves)
    losses = torch.zeros_like(logps[:half]).masked_scatter(counted, pair_losses(objective, pairs))
    loss = {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()
    metrics = pair_metrics(objective, pairs)
    metrics |= _token_metrics(hidden, weight, targets, cu_seqlens, stats, **head)
    return PreferenceOutput(loss, losses, logps, lengths, metrics)


def _token_metrics(hidden, weight, targets, cu_seqlens, stats, **head) -> dict[str, Tensor]:
    if not stats:
        return {}
    ends = _offsets(targets, cu_seqlens)
    targets = targets.flatten()
    values = token_statistics(hidden.flatten(0, -2).detach(), weight.detach(), targets, **head)
    rows = torch.arange(len(targets), device=targets.device)
    scored = targets != IGNORED
    chosen = scored & (rows < ends[len(ends) // 2])
    metrics = {}
    if "entropy" in stats:
        metrics["entropy"] = mean_or_zero(values["entropy"][scored])
    if "is_top1" in stats:
        metrics["mean_token_accuracy"] = mean_or_zero(values["is_top1"][chosen].float())
    if "mean_logits" in stats:
        metrics["logits/chosen"] = mean_or_zero(values["mean_logits"][chosen])
        metrics["logits/rejected"] = mean_or_zero(values["mean_logits"][scored & ~chosen])
    return metrics
