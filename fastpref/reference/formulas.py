"""The objectives by definition, one function each under its class's name in lower case.

They share no code with `fastpref.objectives`. Each takes what the objective is given and the
objective's fields, `beta` replaced by the batch's own where it has its own, and gives one loss a
prompt, `(B,)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.objectives import Balance, ListLogps, Mixture, Objective, PairLogps, is_built_in
from fastpref.objectives.base import given


def balance_coefficients(
    balance: Balance | None, pairs: PairLogps, *, log_odds: bool = False
) -> tuple[Tensor | float, Tensor | float]:
    """a_w and a_l of AdaDPO, constants to autograd; 1 and 1 without a balance."""
    if balance is None:
        return 1.0, 1.0
    b_w, b_l = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
    if balance.source == "implicit_reward":
        b_w = b_w - given("ref_logps", pairs.ref_chosen_logps)
        b_l = b_l - given("ref_logps", pairs.ref_rejected_logps)
    if balance.per_token:
        b_w, b_l = b_w / pairs.chosen_lengths, b_l / pairs.rejected_lengths
    if log_odds:  # dρ/dp̄ = 1/(p̄(1−p̄))
        b_w, b_l = b_w + _log1m(b_w), b_l + _log1m(b_l)
    delta = b_w - b_l
    a_w: Tensor | float = 1.0
    a_l: Tensor | float = 1.0
    if balance.chosen_exponent != 0:
        a_w = (balance.chosen_exponent * delta).exp().clip(balance.floor, balance.ceiling)
    if balance.rejected_exponent != 0:
        a_l = (-balance.rejected_exponent * delta).exp().clip(balance.floor, balance.ceiling)
    return a_w, a_l


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


def _reward(divergence, log_ratio):
    """f'(π/π_ref) of f-DPO."""
    if divergence is None or divergence.name == "reverse_kl":
        return log_ratio
    t = log_ratio.exp()
    if divergence.name == "forward_kl":
        return 1 - 1 / t
    if divergence.name == "js":
        return torch.log(2 * t / (1 + t))
    return (t ** (divergence.alpha - 1) - 1) / (divergence.alpha - 1)


def _dpo_margin(pairs, beta, length_normalized, balance, divergence):
    n_w, n_l = _normalizers(pairs, length_normalized)
    a_w, a_l = balance_coefficients(balance, pairs)
    reward_w = _reward(divergence, pairs.chosen_logps - pairs.ref_chosen_logps) / n_w
    reward_l = _reward(divergence, pairs.rejected_logps - pairs.ref_rejected_logps) / n_l
    return beta * (a_w * reward_w - a_l * reward_l)


def dpo(pairs, *, beta, label_smoothing, length_normalized, balance, divergence):
    m = _dpo_margin(pairs, beta, length_normalized, balance, divergence)
    return (1 - label_smoothing) * _nlls(m) + label_smoothing * _nlls(-m)


adadpo = dpo


def hinge(pairs, *, beta, length_normalized, balance, divergence):
    m = _dpo_margin(pairs, beta, length_normalized, balance, divergence)
    return torch.clip(1 - m, min=0)


def ipo(pairs, *, beta, balance, divergence):
    m = _dpo_margin(pairs, 1.0, True, balance, divergence)
    return (m - 1 / (2 * beta)).square()


def simpo(pairs, *, beta, gamma, balance, divergence):
    a_w, a_l = balance_coefficients(balance, pairs)
    mean_w = pairs.chosen_logps / pairs.chosen_lengths
    mean_l = pairs.rejected_logps / pairs.rejected_lengths
    return _nlls(beta * (a_w * mean_w - a_l * mean_l) - gamma)


def rdpo(pairs, *, beta, alpha, length_normalized, balance, divergence):
    m = _dpo_margin(pairs, beta, length_normalized, balance, divergence)
    return _nlls(m + alpha * (pairs.chosen_lengths - pairs.rejected_lengths))


def cpo(pairs, *, beta, nll_weight, length_normalized, balance, divergence):
    n_w, n_l = _normalizers(pairs, length_normalized)
    a_w, a_l = balance_coefficients(balance, pairs)
    m = beta * (a_w * pairs.chosen_logps / n_w - a_l * pairs.rejected_logps / n_l)
    return _nlls(m) - nll_weight * pairs.chosen_logps / pairs.chosen_lengths


def orpo(pairs, *, odds_weight, balance, divergence):
    mean_w = pairs.chosen_logps / pairs.chosen_lengths
    mean_l = pairs.rejected_logps / pairs.rejected_lengths
    a_w, a_l = balance_coefficients(balance, pairs, log_odds=True)
    m = a_w * (mean_w - _log1m(mean_w)) - a_l * (mean_l - _log1m(mean_l))
    return -mean_w + odds_weight * _nlls(m)


def unidpo(
    pairs, *, beta, eta, tau_ref, gamma, nll_weight, tau_good, length_normalized,
    detach_performance_weight, balance, divergence,
):  # fmt: skip
    n_w, n_l = _normalizers(pairs, length_normalized)
    policy_w, policy_l = pairs.chosen_logps / n_w, pairs.rejected_logps / n_l
    m = _dpo_margin(pairs, beta, length_normalized, balance, divergence)
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


def robust(pairs, *, beta, label_smoothing, balance, divergence):
    m, e = _dpo_margin(pairs, beta, False, balance, divergence), label_smoothing
    return ((1 - e) * _nlls(m) - e * _nlls(-m)) / (1 - 2 * e)


def exo(pairs, *, beta, label_smoothing, balance, divergence):
    m, e = _dpo_margin(pairs, beta, False, balance, divergence), label_smoothing
    q, rest = torch.sigmoid(m), torch.sigmoid(-m)  # 1 − q would lose what is left of it
    return torch.xlogy(q, q / (1 - e)) + torch.xlogy(rest, rest / e)


def discopop(pairs, *, beta, tau, balance, divergence):
    m = _dpo_margin(pairs, beta, False, balance, divergence)
    share, rest = torch.sigmoid(m / tau), torch.sigmoid(-m / tau)
    return rest * _nlls(m) + share * torch.exp(-m)


def rpo(pairs, *, beta, label_smoothing, length_normalized, nll_weight, balance, divergence):
    how = {"length_normalized": length_normalized, "balance": balance, "divergence": divergence}
    preference = dpo(pairs, beta=beta, label_smoothing=label_smoothing, **how)
    return preference - nll_weight * pairs.chosen_logps / pairs.chosen_lengths


def odpo(pairs, *, beta, alpha, balance, divergence):
    gap = pairs.chosen_scores - pairs.rejected_scores
    return _nlls(_dpo_margin(pairs, beta, False, balance, divergence) - alpha * gap.log())


def dpop(pairs, *, beta, penalty, balance, divergence):
    fell = (pairs.ref_chosen_logps - pairs.chosen_logps).clip(min=0)
    return _nlls(_dpo_margin(pairs, beta, False, balance, divergence) - beta * penalty * fell)


def chipo(pairs, *, beta, largest_reward, balance, divergence):
    a_w, a_l = balance_coefficients(balance, pairs)
    x_w = pairs.chosen_logps - pairs.ref_chosen_logps
    x_l = pairs.rejected_logps - pairs.ref_rejected_logps
    phi_w, phi_l = (x.clip(max=80).exp() + x for x in (x_w, x_l))
    m = beta * (a_w * phi_w - a_l * phi_l)
    return _nlls(m.clip(-2 * largest_reward, 2 * largest_reward))


def betadpo(pairs, *, beta, alpha, threshold, balance, divergence):
    m = _dpo_margin(pairs, beta, False, balance, divergence)
    return _nlls(max(1 + alpha * (m.mean().item() - threshold), 1e-3) * m)


def _two_rewards(pairs, beta):
    chosen = beta * (pairs.chosen_logps - pairs.ref_chosen_logps)
    return chosen, beta * (pairs.rejected_logps - pairs.ref_rejected_logps)


def nca(pairs, *, beta):
    r_w, r_l = _two_rewards(pairs, beta)
    return _nlls(r_w) + (_nlls(-r_w) + _nlls(-r_l)) / 2


def bco(pairs, *, beta):
    r_w, r_l = _two_rewards(pairs, beta)
    return _nlls(r_w) + _nlls(-r_l)


def sppo(pairs, *, beta):
    r_w, r_l = _two_rewards(pairs, 1.0)
    return (r_w - 1 / (2 * beta)).square() + (r_l + 1 / (2 * beta)).square()


def apozero(pairs, *, beta):
    r_w, r_l = _two_rewards(pairs, beta)
    return 1 - torch.sigmoid(r_w) + torch.sigmoid(r_l)


def apodown(pairs, *, beta):
    r_w, r_l = _two_rewards(pairs, beta)
    return torch.sigmoid(r_w) + 1 - torch.sigmoid(r_w - r_l)


def _of_sorted(first, second, beta, label_smoothing):
    m = beta * (torch.sort(first)[0] - torch.sort(second)[0])
    return (1 - label_smoothing) * _nlls(m) + label_smoothing * _nlls(-m)


def aot(pairs, *, beta, label_smoothing):
    policy = pairs.chosen_logps - pairs.rejected_logps
    reference = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    return _of_sorted(policy, reference, beta, label_smoothing)


def aotunpaired(pairs, *, beta, label_smoothing):
    r_w, r_l = _two_rewards(pairs, 1.0)
    return _of_sorted(r_w, r_l, beta, label_smoothing)


def sft(pairs):
    return -pairs.chosen_logps / pairs.mean_chosen_length


def mixture(pairs, *, terms):
    return torch.stack([weight * pair_losses(term, pairs) for term, weight in terms]).sum(0)


def wpo(pairs, *, objective):
    aligned_w = pairs.chosen_alignments / pairs.chosen_lengths
    aligned_l = pairs.rejected_alignments / pairs.rejected_lengths
    return aligned_w.exp() * aligned_l.exp() * pair_losses(objective, pairs)


def plackettluce(lists, *, beta, length_normalized):
    lengths = lists.lengths if length_normalized else 1.0
    rewards = beta * (lists.logps - lists.ref_logps) / lengths
    losses = []
    for of_prompt, scores in zip(rewards.T, lists.scores.T, strict=True):
        order = sorted(range(len(scores)), key=lambda k: -scores[k].item())
        ranked = of_prompt[order]
        shares = [ranked[k] - torch.logsumexp(ranked[k:], 0) for k in range(len(order))]
        losses.append(-torch.stack(shares).sum())
    return torch.stack(losses)


def rankedpairs(lists, *, objective):
    totals = []
    for prompt in range(lists.logps.shape[1]):
        of_prompt = _one_prompt(lists, prompt)
        ordered = [
            (a, b)
            for a in range(lists.responses)
            for b in range(lists.responses)
            if lists.scores[a, prompt] > lists.scores[b, prompt]
        ]
        losses = [pair_losses(objective, of_prompt.pairs(a, b))[0] for a, b in ordered]
        totals.append(torch.stack(losses).mean() if losses else 0 * lists.logps[0, prompt])
    return torch.stack(totals)


def _one_prompt(lists: ListLogps, prompt: int) -> ListLogps:
    def of(value):
        return value[..., prompt : prompt + 1] if isinstance(value, Tensor) else value

    fields = {name: of(value) for name, value in vars(lists).items()}
    fields["extras"] = {name: of(value) for name, value in lists.extras.items()}
    return ListLogps(**fields)


def pair_losses(objective: Objective, seen: Any) -> Tensor:
    """Losses `(B,)` of a built-in objective by the formulas above, of a user's by itself.

    `seen` is the objective's own `view`.
    """
    formula = globals().get(type(objective).__name__.lower())
    if formula is None or not is_built_in(objective):
        return objective(seen)
    if isinstance(objective, Mixture):
        return formula(seen, terms=objective.terms)
    fields = dict(vars(objective))
    if seen.betas is not None and "beta" in fields:
        fields["beta"] = seen.betas
    return formula(seen, **fields)
