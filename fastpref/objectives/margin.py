"""Objectives of a margin between two rewards: DPO and its family.

    objective       margin m                                          loss of a pair
    DPO             β[(ℓ_w−r_w) − (ℓ_l−r_l)]                          −(1−ε) log σ(m) − ε log σ(−m)
    Hinge (SLiC)    as DPO                                            max(0, 1 − m)
    IPO             (ℓ̄_w−r̄_w) − (ℓ̄_l−r̄_l)                             (m − 1/(2β))²
    SimPO           β(ℓ̄_w − ℓ̄_l) − γ                                  −log σ(m)
    RDPO            DPO's + α(n_w − n_l)                              −log σ(m)
    CPO             β(ℓ_w − ℓ_l)                                      −log σ(m) − λ ℓ̄_w
    ORPO            log odds(p̄_w) − log odds(p̄_l)                     −ℓ̄_w − λ log σ(m)

ℓ is a response's log-probability under the policy, r under the reference, n its scored tokens, a
bar divides by n. `Balance` multiplies the two rewards of any margin by stop-gradient coefficients.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.domains import check_fields, number
from fastpref.objectives.balance import Balance
from fastpref.objectives.base import Objective, PairFormula, PairLogps, is_built_in
from fastpref.objectives.divergence import Divergence


@dataclass(frozen=True)
class MarginObjective(Objective):
    """An objective of a margin between two rewards, which a `Balance` may weight."""

    balance: Balance | None = dataclasses.field(default=None, kw_only=True)
    divergence: Divergence | None = dataclasses.field(default=None, kw_only=True)

    uses_reference: ClassVar[bool] = True
    takes_betas = True
    # A field where the formula does not fix it; annotated here, it would come before beta there.
    length_normalized = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.balance is not None and not isinstance(self.balance, Balance):
            raise TypeError(f"balance must be a Balance or None, got {self.balance!r}")
        if self.divergence is None:
            return
        if not isinstance(self.divergence, Divergence):
            raise TypeError(f"divergence must be a Divergence or None, got {self.divergence!r}")
        if not self.uses_reference:
            raise ValueError(f"{type(self).__name__} has no reference to diverge from")

    @property
    def needs_reference(self) -> bool:
        by_balance = self.balance is not None and self.balance.source == "implicit_reward"
        return self.uses_reference or by_balance

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        pick = pairs.log_ratios if self.uses_reference else pairs.logps
        return pick(self.length_normalized)

    def margin_rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The two rewards ρ whose difference is the margin, before β and the balance."""
        if self.divergence is None:
            return self.rewards(pairs)
        chosen, rejected = map(self.divergence.reward, pairs.log_ratios(normalized=False))
        if not self.length_normalized:
            return chosen, rejected
        return chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths

    def beta_of(self, pairs: PairLogps) -> float | Tensor:
        """β, of each pair where the batch has its own."""
        if pairs.betas is not None:
            return pairs.betas
        return self.beta  # type: ignore[attr-defined]  # a field where it is asked for

    def balance_log_probs(self, balance: Balance, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return balance.log_probs(pairs)

    def formula(self) -> PairFormula | None:
        """Of the objectives that have ingredients; a subclass may compute something else."""
        ingredients = self._ingredients()
        if ingredients is None or not is_built_in(self) or self.divergence is not None:
            return None
        common = {
            "uses_reference": self.uses_reference,
            "normalized": self.length_normalized,
            "balance": self.balance,
            "reward_scale": self.reward_scale,
        }
        return PairFormula(**(common | ingredients))

    def _ingredients(self) -> dict[str, Any] | None:
        """What the formula has besides the fields that all share; None where it does not fit."""
        return None

    def reward_margin(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.margin_rewards(pairs)
        if self.balance is None:
            return chosen - rejected
        log_probs = self.balance_log_probs(self.balance, pairs)
        a_chosen, a_rejected = self.balance.coefficients(*log_probs)
        return a_chosen * chosen - a_rejected * rejected

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        if self.balance is None:
            return {}
        log_probs = self.balance_log_probs(self.balance, pairs)
        a_chosen, a_rejected = self.balance.coefficients(*log_probs)
        return {
            "balance/chosen": a_chosen,
            "balance/rejected": a_rejected,
            "balance/clipped": self.balance.clipped(*log_probs),
        }


@dataclass(frozen=True)
class DPO(MarginObjective):
    """Direct preference optimisation (arXiv 2305.18290); ε is conservative DPO's label noise.

    `m = β[(ℓ_w−r_w) − (ℓ_l−r_l)]`, `L = −(1−ε) log σ(m) − ε log σ(−m)`.

    Args:
        beta: β > 0.
        label_smoothing: ε in [0, 0.5).
        length_normalized: use averages per token, ℓ̄ and r̄.
        balance: adaptive balance, None for a_w = a_l = 1.
        divergence: which reward stands for ℓ − r, None for the reverse KL divergence's, itself.
    """

    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    length_normalized: bool = False

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "label_smoothing": self.label_smoothing}

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin = self.beta_of(pairs) * self.reward_margin(pairs)
        if self.label_smoothing == 0:
            return -logsigmoid(margin)
        noise = self.label_smoothing
        return -(1 - noise) * logsigmoid(margin) - noise * logsigmoid(-margin)


@dataclass(frozen=True)
class AdaDPO(DPO):
    """`DPO` under adaptive balance (arXiv 2605.28440): `DPO(balance=Balance())` by its name.

        β_w = β min(sg[P_w / P_l], 2)      m = β_w (ℓ_w − r_w) − β (ℓ_l − r_l)      L = −log σ(m)

    P is a response's geometric-mean token probability; see `Balance` for sources and variants.
    """

    balance: Balance | None = dataclasses.field(default=Balance(), kw_only=True)


@dataclass(frozen=True)
class Hinge(MarginObjective):
    """SLiC's hinge on DPO's margin (arXiv 2305.10425): `L = max(0, 1 − m)`.

    Args: `beta`, `length_normalized`, `balance` as in `DPO`.
    """

    beta: float = number(0.1, above=0)
    length_normalized: bool = False

    def _ingredients(self) -> dict[str, Any]:
        return {"link": "hinge", "scale": self.beta}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return torch.relu(1 - self.beta_of(pairs) * self.reward_margin(pairs))


@dataclass(frozen=True)
class IPO(MarginObjective):
    """Identity preference optimisation (arXiv 2310.12036), always averaged per token.

    `m = (ℓ̄_w−r̄_w) − (ℓ̄_l−r̄_l)`, `L = (m − 1/(2β))²`. Its authors confirmed the average to TRL.

    Args: `beta` (the paper's τ) and `balance` as in `DPO`.
    """

    beta: float = number(0.1, above=0)

    length_normalized = True

    def _ingredients(self) -> dict[str, Any]:
        return {"link": "square", "shift": -1 / (2 * self.beta), "beta_shifts": True}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return (self.reward_margin(pairs) - 1 / (2 * self.beta_of(pairs))) ** 2


@dataclass(frozen=True)
class SimPO(MarginObjective):
    """Simple preference optimisation (arXiv 2405.14734), without a reference.

    `m = β(ℓ̄_w − ℓ̄_l) − γ`, `L = −log σ(m)`.

    Args:
        beta: β > 0.
        gamma: γ, the target margin.
        balance: adaptive balance.
    """

    beta: float = number(2.0, above=0)
    gamma: float = number(0.5)

    uses_reference: ClassVar[bool] = False
    length_normalized = True

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "shift": -self.gamma}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return -logsigmoid(self.beta_of(pairs) * self.reward_margin(pairs) - self.gamma)


@dataclass(frozen=True)
class RDPO(MarginObjective):
    """DPO with a length penalty (arXiv 2403.19159): `m` is DPO's plus `α(n_w − n_l)`.

    Args:
        beta: β > 0.
        alpha: α, per token of length difference.
        length_normalized: averages in the rewards.
        balance: adaptive balance.
    """

    beta: float = number(0.1, above=0)
    alpha: float = number(0.01)
    length_normalized: bool = False

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "length_weight": self.alpha}

    def __call__(self, pairs: PairLogps) -> Tensor:
        lengths = self.alpha * (pairs.chosen_lengths - pairs.rejected_lengths)
        return -logsigmoid(self.beta_of(pairs) * self.reward_margin(pairs) + lengths)


@dataclass(frozen=True)
class CPO(MarginObjective):
    """Contrastive preference optimisation (arXiv 2401.08417), without a reference.

    `m = β(ℓ_w − ℓ_l)`, `L = −log σ(m) − λ ℓ̄_w`.

    Args:
        beta: β > 0.
        nll_weight: λ.
        length_normalized: averages in the rewards (the NLL always is one).
        balance: adaptive balance of the rewards.
    """

    beta: float = number(0.1, above=0)
    nll_weight: float = number(1.0, at_least=0)
    length_normalized: bool = False

    uses_reference: ClassVar[bool] = False

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "nll_weight": self.nll_weight}

    def __call__(self, pairs: PairLogps) -> Tensor:
        preference = -logsigmoid(self.beta_of(pairs) * self.reward_margin(pairs))
        return preference - self.nll_weight * pairs.chosen_mean_logps


def log1m_exp(mean_logps: Tensor) -> Tensor:
    """log(1 − p̄) from ℓ̄, which stays below −1e-6: a perfectly predicted response is finite."""
    # Of 1 − e^ℓ̄ near ℓ̄ = 0 float32 keeps nothing; of expm1 all, and so does its derivative.
    return torch.log(-torch.expm1(mean_logps.clamp(max=-1e-6)))


@dataclass(frozen=True)
class ORPO(MarginObjective):
    """Odds-ratio preference optimisation (arXiv 2403.07691), without a reference.

    `m = log odds(p̄_w) − log odds(p̄_l)`, `odds p = p/(1−p)`, `L = −ℓ̄_w − λ log σ(m)`.

    Args:
        odds_weight: λ.
        balance: adaptive balance of the two log-odds; b = log p̄ + log(1 − p̄).

    Raises:
        ValueError: a balance with source "implicit_reward", which has no odds.
    """

    odds_weight: float = number(0.1, at_least=0)

    uses_reference: ClassVar[bool] = False
    takes_betas = False
    length_normalized = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance is not None and self.balance.source != "policy":
            raise ValueError("ORPO balances log-odds of the policy: source must be 'policy'")

    @property
    def reward_scale(self) -> float:
        return self.odds_weight

    def margin_rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.chosen_mean_logps, pairs.rejected_mean_logps
        return chosen - log1m_exp(chosen), rejected - log1m_exp(rejected)

    def balance_log_probs(self, balance: Balance, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().balance_log_probs(balance, pairs)
        return chosen + log1m_exp(chosen), rejected + log1m_exp(rejected)

    def _ingredients(self) -> dict[str, Any]:
        return {
            "log_odds": True,
            "weight": self.odds_weight,
            "nll_weight": 1.0,
        }

    def __call__(self, pairs: PairLogps) -> Tensor:
        odds = logsigmoid(self.reward_margin(pairs))
        return -pairs.chosen_mean_logps - self.odds_weight * odds
