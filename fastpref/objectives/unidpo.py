"""Uni-DPO: pairs weighted by their data quality and by what the model has already learned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.domains import FINITE, number
from fastpref.objectives.base import PairLogps, given
from fastpref.objectives.margin import MarginObjective


@dataclass(frozen=True)
class UniDPO(MarginObjective):
    """Uni-DPO (arXiv 2506.10054, ICLR 2026): pairs weighted by quality and by what is learned.

        m      = β[(ℓ̄_w − r̄_w) − (ℓ̄_l − r̄_l)]
        u      = β(ℓ̄_w − ℓ̄_l) − τ_ref
        w_qual = σ(η (s_w − s_l))
        w_perf = (1 − σ(u))^γ
        c_nll  = λ · 1[r̄_w > ℓ̄_w] · 1[s_w ≥ τ_good]
        L      = −w_qual · w_perf · log σ(m) − c_nll · ℓ̄_w

    Defaults are the published settings of Llama-3-8B-Base for GPT-4o scores of UltraFeedback.
    `UniDPO.for_model` has those of the other models, as far as they differ:

        model                                  β     τ_ref   λ       τ_good   learning rate
        llama-3-8b-base                        2     0.8     0.001   3.2      1e-6
        llama-3-8b-instruct                          1
        llama-3-8b-instruct-v2                 10    1
        gemma-2-9b-it                          10                             8e-7
        qwen2.5-0.5b, -1.5b, -3b, -7b, -14b    3.5                            2e-6
        qwen2.5-math-7b                              2       0.2     8
        qwen2-vl-2b                                  2               2.5

    (Instruct v2: ArmoRM's pairs with GPT-4o scores.)
    η 0.7, γ 3 and averages throughout. τ_good and η belong to a scale of scores: `for_scores`
    carries them to another. A balance multiplies the rewards of m only: u measures what the policy
    has learned and stays as published.

    Args:
        beta: β > 0.
        eta: η ≥ 0, sharpness of the quality weight, per unit of score; 0 gives every pair 1/2.
        tau_ref: τ_ref, the constant margin below which a pair counts as not yet learned.
        gamma: γ ≥ 0, the focusing exponent; 0 gives every pair 1.
        nll_weight: λ ≥ 0 of the calibrated NLL term, which is to keep chosen responses up. Of the
            published 0.001 nothing showed in bench/STUDY.md; `make demo` has 0.5.
        tau_good: τ_good, the least chosen score for that term, in the scores' unit.
        length_normalized: averages in policy, reference and NLL alike.
        detach_performance_weight: take w_perf as a constant. The released code differentiates it.
        balance: adaptive balance.

    Scores are needed unless `eta == 0` and `nll_weight == 0`.
    """

    beta: float = number(2.0, above=0)
    eta: float = number(0.7, at_least=0)
    tau_ref: float = number(0.8)
    gamma: float = number(3.0, at_least=0)
    nll_weight: float = number(0.001, at_least=0)
    tau_good: float = number(3.2)
    length_normalized: bool = True
    detach_performance_weight: bool = False

    @classmethod
    def for_model(cls, name: str, **fields: Any) -> UniDPO:
        """The published settings of a model, by its name on the hub with or without the owner.

        Args:
            name: such as "gemma-2-9b-it" or "meta-llama/Meta-Llama-3-8B-Instruct".
            fields: changes to them, and a balance.

        Raises:
            ValueError: a model that the paper did not train; the message lists those it did.
        """
        key = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
        if key not in PUBLISHED_SETTINGS:
            raise ValueError(
                f"Uni-DPO published no settings for {name!r}, only for {[*PUBLISHED_SETTINGS]}"
            )
        settings = PUBLISHED_SETTINGS[key]
        published = {x: settings[x] for x in settings if x != "learning_rate"}
        return cls(**(published | fields))

    def for_scores(self, theirs: tuple[float, float], yours: tuple[float, float]) -> UniDPO:
        """The same objective for scores on another scale.

        A score s of the scale that `eta` and `tau_good` are meant for is worth s' = a + b s on
        yours, b > 0, where `theirs` becomes `yours`: `for_scores((1, 5), (0, 100))`. Then
        η' = η / b keeps every σ(η(s_w − s_l)), and τ_good' = a + b τ_good every gate, as they were.

        Args:
            theirs: two scores of the scale that the present settings are for, the lower first.
            yours: what the same two qualities score on your scale, the lower first.

        Raises:
            ValueError: scores that are not finite or do not increase.
        """
        for scale_name, (low, high) in (("theirs", theirs), ("yours", yours)):
            for value in (low, high):
                FINITE.check(scale_name, value)
            if not low < high:
                raise ValueError(f"{scale_name} must increase, got {(low, high)}")
        stretch = (yours[1] - yours[0]) / (theirs[1] - theirs[0])
        good = yours[0] + stretch * (self.tau_good - theirs[0])
        return dataclasses.replace(self, eta=self.eta / stretch, tau_good=good)

    @property
    def needs_scores(self) -> bool:
        return self.eta != 0 or self.nll_weight != 0

    def quality_weight(self, pairs: PairLogps) -> Tensor:
        if self.eta == 0:
            return torch.full_like(pairs.chosen_logps, 0.5)
        return torch.sigmoid(self.eta * pairs.score_gap())

    def performance_weight(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.logps(self.length_normalized)
        u = self.beta_of(pairs) * (chosen - rejected) - self.tau_ref
        # (1 − σ(u))^γ through the logarithm keeps its derivative finite where σ(u) rounds to 1.
        return torch.exp(self.gamma * logsigmoid(-u))

    def nll_coefficient(self, pairs: PairLogps) -> Tensor:
        if self.nll_weight == 0:
            return torch.zeros_like(pairs.chosen_logps)
        log_ratio, _ = pairs.log_ratios(self.length_normalized)
        applies = (log_ratio < 0) & (given("scores", pairs.chosen_scores) >= self.tau_good)
        return self.nll_weight * applies.to(pairs.chosen_logps.dtype)

    def _ingredients(self) -> dict[str, Any]:
        return {
            "scale": self.beta,
            "quality": self.eta,
            "focus": (self.gamma, self.tau_ref),
            "focus_detached": self.detach_performance_weight,
            "nll_weight": self.nll_weight,
            "nll_normalized": self.length_normalized,
            "nll_least_score": self.tau_good,
        }

    def __call__(self, pairs: PairLogps) -> Tensor:
        performance = self.performance_weight(pairs)
        if self.detach_performance_weight:
            performance = performance.detach()
        preference = logsigmoid(self.beta_of(pairs) * self.reward_margin(pairs))
        chosen, _ = pairs.logps(self.length_normalized)
        weight = self.quality_weight(pairs) * performance
        return -weight * preference - self.nll_coefficient(pairs) * chosen

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        weights = {
            "weights/quality": self.quality_weight(pairs),
            "weights/performance": self.performance_weight(pairs),
            "weights/nll": self.nll_coefficient(pairs),
        }
        return weights | super().diagnostics(pairs)


_BASE = {"beta": 2.0, "tau_ref": 0.8, "nll_weight": 0.001, "tau_good": 3.2, "learning_rate": 1e-6}
_QWEN = {f"qwen2.5-{size}b": {"beta": 3.5, "learning_rate": 2e-6} for size in (0.5, 1.5, 3, 7, 14)}
# Of every model the paper trained: fields of `UniDPO` and the learning rate that went with them.
PUBLISHED_SETTINGS: dict[str, dict[str, float]] = {
    name: _BASE | changes
    for name, changes in {
        "llama-3-8b-base": {},
        "llama-3-8b-instruct": {"tau_ref": 1.0},
        "llama-3-8b-instruct-v2": {"beta": 10.0, "tau_ref": 1.0},
        "gemma-2-9b-it": {"beta": 10.0, "learning_rate": 8e-7},
        **_QWEN,
        "qwen2.5-math-7b": {"tau_ref": 2.0, "nll_weight": 0.2, "tau_good": 8.0},
        "qwen2-vl-2b": {"tau_ref": 2.0, "tau_good": 2.5},
    }.items()
}
