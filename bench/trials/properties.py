"""What needs no training: balanced gradients are equal, Uni-DPO's gradient is the published one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trials.measures import pair_logps, slopes

import fastpref
from fastpref import CPO, DPO, IPO, ORPO, RDPO, Balance, Hinge, SimPO, UniDPO
from fastpref.objectives import MarginObjective, PairLogps

PAIRS, LENGTH, WIDTH, VOCABULARY = 16, 12, 24, 50
UNBOUNDED = Balance(ceiling=math.inf)
# Without terms beside the margin, which no balance multiplies.
BALANCED: dict[str, MarginObjective] = {
    "DPO": DPO(balance=UNBOUNDED),
    "DPO, per token": DPO(length_normalized=True, balance=UNBOUNDED),
    "DPO, exponents 1/2": DPO(
        balance=Balance(chosen_exponent=0.5, rejected_exponent=0.5, ceiling=math.inf)
    ),
    "Hinge": Hinge(balance=UNBOUNDED),
    "IPO": IPO(balance=UNBOUNDED),
    "SimPO": SimPO(balance=UNBOUNDED),
    "R-DPO": RDPO(balance=UNBOUNDED),
    "CPO, NLL 0": CPO(nll_weight=0.0, balance=UNBOUNDED),
    "Uni-DPO, γ 0, NLL 0": UniDPO(gamma=0.0, nll_weight=0.0, balance=UNBOUNDED),
}


def fixed_pairs() -> PairLogps:
    """Log-probabilities of random hidden states under a random head, float64."""
    chance = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    hidden, weight = drawn(2 * PAIRS, LENGTH, WIDTH), drawn(VOCABULARY, WIDTH) / WIDTH**0.5
    targets = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH), generator=chance)
    for row, length in enumerate(torch.randint(2, LENGTH, (2 * PAIRS,), generator=chance)):
        targets[row, length:] = -100
    logps, lengths = fastpref.sequence_logps(hidden, weight, targets)
    references = logps + 0.3 * drawn(2 * PAIRS)
    return pair_logps(logps, lengths, references, 5 + 2 * drawn(2 * PAIRS))


def balance_report() -> dict[str, float]:
    """Of each objective: how far chosen over rejected |∂L/∂ρ| / p̄ is from 1, at most."""
    pairs = fixed_pairs()
    means = pairs.logps(normalized=True)
    report = {}
    for name, objective in BALANCED.items():
        chosen, rejected = (
            slope.abs() / mean.exp()
            for slope, mean in zip(slopes(objective, pairs), means, strict=True)
        )
        acts = rejected > 0  # a hinge that is met has no gradient
        report[name] = (chosen[acts] / rejected[acts] - 1).abs().max().item()
    report["ORPO"] = _odds_balance(pairs)
    return report


def _odds_balance(pairs: PairLogps) -> float:
    """Of ORPO's odds, whose ρ is log p̄ − log(1 − p̄): its NLL, of slope −1, is not balanced."""
    chosen, rejected = pairs.logps(normalized=True)
    of_chosen, of_rejected = slopes(ORPO(balance=UNBOUNDED), pairs)
    return (
        (((of_chosen + 1).abs() / chosen.exp()) / (of_rejected.abs() / rejected.exp()) - 1)
        .abs()
        .max()
        .item()
    )


def unidpo_report() -> dict[str, float]:
    """Largest relative error of ∂L/∂ℓ̄ of Uni-DPO against its closed form, by setting."""
    settings: dict[str, dict[str, Any]] = {
        "as published": {},
        "η 0": {"eta": 0.0},
        "γ 0": {"gamma": 0.0},
        "λ 0.2": {"nll_weight": 0.2},
    }
    pairs = fixed_pairs()
    return {
        name: _closed_form_error(dataclasses.replace(UniDPO(), **fields), pairs)
        for name, fields in settings.items()
    }


def _closed_form_error(objective: UniDPO, pairs: PairLogps) -> float:
    (policy_w, policy_l), (ratio_w, ratio_l) = pairs.logps(True), pairs.log_ratios(True)
    assert pairs.chosen_scores is not None
    u = objective.beta * (policy_w - policy_l) - objective.tau_ref
    m = objective.beta * (ratio_w - ratio_l)
    quality = torch.sigmoid(objective.eta * pairs.score_gap())
    performance = torch.sigmoid(-u) ** objective.gamma
    fitted = torch.sigmoid(-m) - objective.gamma * torch.sigmoid(u) * logsigmoid(m)
    pull = objective.beta * quality * performance * fitted
    counts = (ratio_w < 0) & (pairs.chosen_scores >= objective.tau_good)
    nll = objective.nll_weight * counts.double()
    chosen, rejected = slopes(objective, pairs)
    return max(
        ((chosen + pull + nll) / chosen).abs().max().item(),
        ((rejected - pull) / rejected).abs().max().item(),
    )
