"""Preference objectives: pure functions of a chosen and a rejected sequence log-probability.

An objective never sees tokens, logits or weights. It receives a `PairLogps` and returns one loss a
pair by ordinary torch operations; autograd turns that into the two coefficients a pair with which
the projection scales its gradients. Log-probabilities are in nats.

    objective       margin m                                          loss of a pair
    DPO             β[(ℓ_w−r_w) − (ℓ_l−r_l)]                          −(1−ε) log σ(m) − ε log σ(−m)
    Hinge (SLiC)    as DPO                                            max(0, 1 − m)
    IPO             (ℓ̄_w−r̄_w) − (ℓ̄_l−r̄_l)                             (m − 1/(2β))²
    SimPO           β(ℓ̄_w − ℓ̄_l) − γ                                  −log σ(m)
    RDPO            DPO's + α(n_w − n_l)                              −log σ(m)
    CPO             β(ℓ_w − ℓ_l)                                      −log σ(m) − λ ℓ̄_w
    ORPO            log odds(p̄_w) − log odds(p̄_l)                     −ℓ̄_w − λ log σ(m)
    UniDPO          β[(ℓ̄_w−r̄_w) − (ℓ̄_l−r̄_l)]                          see the class

ℓ is a response's log-probability under the policy, r under the reference, n its scored tokens, a
bar divides by n. `Balance` multiplies the two rewards of any margin by stop-gradient coefficients.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogps:
    """What an objective may look at: eight vectors `(B,)`, one entry a pair.

    Args:
        chosen_logps: policy log-probability of the chosen response, nats; the sum over its scored
            tokens, each times its token weight. float32, or float64 where the inputs are.
        rejected_logps: the same for the rejected response.
        chosen_lengths: number of scored tokens, in the dtype of the log-probabilities.
        rejected_lengths: the same for the rejected response.
        ref_chosen_logps: log-probability under the reference model, or None.
        ref_rejected_logps: the same for the rejected response.
        chosen_scores: quality score from the data set, any scale, or None.
        rejected_scores: the same for the rejected response.

    The `…_mean_logps` properties divide by the lengths: averages per token.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None

    @property
    def chosen_mean_logps(self) -> Tensor:
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> Tensor:
        return self.rejected_logps / self.rejected_lengths

    @property
    def ref_chosen_mean_logps(self) -> Tensor:
        return self.ref_chosen_logps / self.chosen_lengths

    @property
    def ref_rejected_mean_logps(self) -> Tensor:
        return self.ref_rejected_logps / self.rejected_lengths

    def logps(self, normalized: bool) -> tuple[Tensor, Tensor]:
        """Policy log-probabilities `(chosen, rejected)`, per token if `normalized`."""
        if normalized:
            return self.chosen_mean_logps, self.rejected_mean_logps
        return self.chosen_logps, self.rejected_logps

    def log_ratios(self, normalized: bool) -> tuple[Tensor, Tensor]:
        """Policy minus reference log-probabilities `(chosen, rejected)`."""
        if normalized:
            chosen = self.chosen_mean_logps - self.ref_chosen_mean_logps
            return chosen, self.rejected_mean_logps - self.ref_rejected_mean_logps
        chosen = self.chosen_logps - self.ref_chosen_logps
        return chosen, self.rejected_logps - self.ref_rejected_logps


@dataclass(frozen=True)
class PairFormula:
    """How an objective describes itself to a fused kernel, in general ingredients.

        ρ_y = x_y, or log-odds x_y − log(1 − e^x_y);  x_y = ℓ_y − r_y or ℓ_y, over n_y or not
        m   = scale (a_w ρ_w − a_l ρ_l) + shift + length_weight (n_w − n_l)
        L   = weight · σ(quality (s_w − s_l)) · (1 − σ(u))^γ · f(m) − c ℓ_w
        u   = scale (ℓ_w − ℓ_l) − τ

    Args:
        link: f, one of "log_sigmoid" (−log σ(m), with label noise), "hinge" (max(0, 1 − m)) and
            "square" (m²).
        uses_reference: rewards are log-ratios to the reference.
        normalized: rewards, u and the gate of c are per token.
        log_odds: of the rewards and of the balance's b.
        nll_weight: c, a constant; with `nll_least_score` only where ℓ_w < r_w and
            s_w ≥ nll_least_score.
        nll_normalized: c multiplies ℓ̄_w.
        quality: η, None for no such weight.
        focus: (γ, τ), None for no such weight; `focus_detached` takes it as a constant.
        balance: a_w and a_l, None for 1 and 1.
        reward_scale: of the logged rewards.
    """

    link: str = "log_sigmoid"
    scale: float = 1.0
    shift: float = 0.0
    length_weight: float = 0.0
    label_smoothing: float = 0.0
    weight: float = 1.0
    uses_reference: bool = True
    normalized: bool = False
    log_odds: bool = False
    nll_weight: float = 0.0
    nll_normalized: bool = True
    nll_least_score: float | None = None
    quality: float | None = None
    focus: tuple[float, float] | None = None
    focus_detached: bool = False
    balance: Balance | None = None
    reward_scale: float = 1.0


class Objective:
    """Base class of every objective, and of your own.

    Subclass it, implement `__call__`, and hand an instance to `preference_loss`:

        class Exponential(Objective):
            def __call__(self, pairs):
                chosen, rejected = pairs.log_ratios(normalized=False)
                return torch.exp(-0.1 * (chosen - rejected))

    `couples_pairs` says that a pair's loss depends on other pairs of the batch (a batch mean, a
    sort); the pairs are then seen together, at the cost of one more matrix product.
    `needs_reference` and `needs_scores` make missing inputs an error that names them.
    `reward_scale` multiplies log-ratios in the logged rewards (β where there is one).
    """

    couples_pairs: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_scores(self) -> bool:
        return False

    @property
    def reward_scale(self) -> float:
        return float(getattr(self, "beta", 1.0))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """One loss a pair, `(B,)`, from `PairLogps`."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(pairs)")

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        """More numbers to log, each `(B,)`; called without gradients."""
        return {}

    def formula(self) -> PairFormula | None:
        """The same loss and diagnostics for a fused kernel; None to differentiate `__call__`."""
        return None


@dataclass(frozen=True)
class Balance:
    """Adaptive balance of chosen and rejected gradients (AdaDPO, arXiv 2605.28440).

    The rewards of a margin are multiplied by stop-gradient coefficients
    `a_w = clip(exp(+α_w δ), 1/κ, κ)` and `a_l = clip(exp(−α_l δ), 1/κ, κ)`, `δ = b_w − b_l`.

    The paper fixes that the coefficients are per pair, come from generation probabilities with an
    optional reference, make the gradients with respect to both probabilities equal in magnitude,
    balance per token and are clipped. It leaves open what follows, which is derived here: a token
    of response y receives |c_y| = β a_y (1−σ(m)), with respect to the probability |c_y| / p̄_y, so
    the two are equal exactly when a_w / a_l = p̄_w / p̄_l = e^δ, which holds where α_w + α_l = 1 and
    nothing is clipped. For a reward ρ(p̄) other than log p̄ the rule is
    a_w / a_l = ρ'(p̄_l) / ρ'(p̄_w), so ORPO's log-odds take b = log p̄ + log(1 − p̄).

    Args:
        source: "policy", b = ℓ̄; or "implicit_reward", b = ℓ̄ − r̄ (needs the reference).
        chosen_exponent: α_w.
        rejected_exponent: α_l.
        clip: κ ≥ 1; 1 switches the balance off, `math.inf` never clips.
        per_token: False uses sequence log-probabilities ℓ instead of averages ℓ̄.

    Raises:
        ValueError: unknown source or `clip < 1`.
    """

    source: str = "policy"
    chosen_exponent: float = 0.5
    rejected_exponent: float = 0.5
    clip: float = 10.0
    per_token: bool = True

    def __post_init__(self) -> None:
        if self.source not in ("policy", "implicit_reward"):
            raise ValueError(f"source must be 'policy' or 'implicit_reward', got {self.source!r}")
        if not self.clip >= 1:
            raise ValueError(f"clip must be at least 1, got {self.clip}")

    def log_probs(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """b_w and b_l `(B,)`, detached."""
        pick = pairs.logps if self.source == "policy" else pairs.log_ratios
        chosen, rejected = pick(self.per_token)
        return chosen.detach(), rejected.detach()

    def coefficients(self, b_chosen: Tensor, b_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """a_w and a_l `(B,)` from the two log-probabilities."""
        delta = b_chosen - b_rejected
        chosen = torch.exp(self.chosen_exponent * delta).clamp(1 / self.clip, self.clip)
        rejected = torch.exp(-self.rejected_exponent * delta).clamp(1 / self.clip, self.clip)
        return chosen, rejected

    def clipped(self, b_chosen: Tensor, b_rejected: Tensor) -> Tensor:
        """1.0 for each pair `(B,)` of which a coefficient lies beyond the bound."""
        exponent = max(abs(self.chosen_exponent), abs(self.rejected_exponent))
        return (exponent * (b_chosen - b_rejected).abs() > math.log(self.clip)).to(b_chosen.dtype)


@dataclass(frozen=True)
class MarginObjective(Objective):
    """An objective of a margin between two rewards, which a `Balance` may weight."""

    balance: Balance | None = dataclasses.field(default=None, kw_only=True)

    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        beta = getattr(self, "beta", 1.0)
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if self.balance is not None and not isinstance(self.balance, Balance):
            raise TypeError(f"balance must be a Balance or None, got {self.balance!r}")

    @property
    def needs_reference(self) -> bool:
        by_balance = self.balance is not None and self.balance.source == "implicit_reward"
        return self.uses_reference or by_balance

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The two rewards whose difference is the margin, before β and the balance."""
        raise NotImplementedError

    def balance_log_probs(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.balance.log_probs(pairs)

    def formula(self) -> PairFormula | None:
        """Built-in objectives have one; a subclass may compute something else, and has none."""
        if type(self) not in _BUILT_IN.values():
            return None
        common = {
            "uses_reference": self.uses_reference,
            "normalized": getattr(self, "length_normalized", False),
            "balance": self.balance,
            "reward_scale": self.reward_scale,
        }
        return PairFormula(**(common | self._ingredients()))

    def _ingredients(self) -> dict[str, Any]:
        """What the formula has besides the fields that all objectives share."""
        raise NotImplementedError

    def reward_margin(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        if self.balance is None:
            return chosen - rejected
        a_chosen, a_rejected = self.balance.coefficients(*self.balance_log_probs(pairs))
        return a_chosen * chosen - a_rejected * rejected

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        if self.balance is None:
            return {}
        log_probs = self.balance_log_probs(pairs)
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
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.log_ratios(self.length_normalized)

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "label_smoothing": self.label_smoothing}

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin = self.beta * self.reward_margin(pairs)
        if self.label_smoothing == 0:
            return -logsigmoid(margin)
        noise = self.label_smoothing
        return -(1 - noise) * logsigmoid(margin) - noise * logsigmoid(-margin)


@dataclass(frozen=True)
class AdaDPO(DPO):
    """`DPO` under adaptive balance (arXiv 2605.28440): `DPO(balance=Balance())` by its name."""

    balance: Balance | None = dataclasses.field(default=Balance(), kw_only=True)


@dataclass(frozen=True)
class Hinge(MarginObjective):
    """SLiC's hinge on DPO's margin (arXiv 2305.10425): `L = max(0, 1 − m)`.

    Args: `beta`, `length_normalized`, `balance` as in `DPO`.
    """

    beta: float = 0.1
    length_normalized: bool = False

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.log_ratios(self.length_normalized)

    def _ingredients(self) -> dict[str, Any]:
        return {"link": "hinge", "scale": self.beta}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return torch.relu(1 - self.beta * self.reward_margin(pairs))


@dataclass(frozen=True)
class IPO(MarginObjective):
    """Identity preference optimisation (arXiv 2310.12036), always averaged per token.

    `m = (ℓ̄_w−r̄_w) − (ℓ̄_l−r̄_l)`, `L = (m − 1/(2β))²`. Its authors confirmed the average to TRL.

    Args: `beta` (the paper's τ) and `balance` as in `DPO`.
    """

    beta: float = 0.1

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.log_ratios(normalized=True)

    def _ingredients(self) -> dict[str, Any]:
        return {"link": "square", "shift": -1 / (2 * self.beta), "normalized": True}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return (self.reward_margin(pairs) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class SimPO(MarginObjective):
    """Simple preference optimisation (arXiv 2405.14734), without a reference.

    `m = β(ℓ̄_w − ℓ̄_l) − γ`, `L = −log σ(m)`.

    Args:
        beta: β > 0.
        gamma: γ, the target margin.
        balance: adaptive balance.
    """

    beta: float = 2.0
    gamma: float = 0.5

    uses_reference: ClassVar[bool] = False

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.logps(normalized=True)

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "shift": -self.gamma, "normalized": True}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return -logsigmoid(self.beta * self.reward_margin(pairs) - self.gamma)


@dataclass(frozen=True)
class RDPO(MarginObjective):
    """DPO with a length penalty (arXiv 2403.19159): `m` is DPO's plus `α(n_w − n_l)`.

    Args:
        beta: β > 0.
        alpha: α, per token of length difference.
        length_normalized: averages in the rewards.
        balance: adaptive balance.
    """

    beta: float = 0.1
    alpha: float = 0.01
    length_normalized: bool = False

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.log_ratios(self.length_normalized)

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "length_weight": self.alpha}

    def __call__(self, pairs: PairLogps) -> Tensor:
        lengths = self.alpha * (pairs.chosen_lengths - pairs.rejected_lengths)
        return -logsigmoid(self.beta * self.reward_margin(pairs) + lengths)


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

    beta: float = 0.1
    nll_weight: float = 1.0
    length_normalized: bool = False

    uses_reference: ClassVar[bool] = False

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.logps(self.length_normalized)

    def _ingredients(self) -> dict[str, Any]:
        return {"scale": self.beta, "nll_weight": self.nll_weight}

    def __call__(self, pairs: PairLogps) -> Tensor:
        preference = -logsigmoid(self.beta * self.reward_margin(pairs))
        return preference - self.nll_weight * pairs.chosen_mean_logps


def log1m_exp(mean_logps: Tensor) -> Tensor:
    """log(1 − p̄) from ℓ̄, which stays below −1e-6: a perfectly predicted response is finite."""
    return torch.log1p(-torch.exp(mean_logps.clamp(max=-1e-6)))


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

    odds_weight: float = 0.1

    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance is not None and self.balance.source != "policy":
            raise ValueError("ORPO balances log-odds of the policy: source must be 'policy'")

    @property
    def reward_scale(self) -> float:
        return self.odds_weight

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.chosen_mean_logps, pairs.rejected_mean_logps
        return chosen - log1m_exp(chosen), rejected - log1m_exp(rejected)

    def balance_log_probs(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().balance_log_probs(pairs)
        return chosen + log1m_exp(chosen), rejected + log1m_exp(rejected)

    def _ingredients(self) -> dict[str, Any]:
        return {
            "normalized": True,
            "log_odds": True,
            "weight": self.odds_weight,
            "nll_weight": 1.0,
        }

    def __call__(self, pairs: PairLogps) -> Tensor:
        odds = logsigmoid(self.reward_margin(pairs))
        return -pairs.chosen_mean_logps - self.odds_weight * odds


@dataclass(frozen=True)
class UniDPO(MarginObjective):
    """Uni-DPO (arXiv 2506.10054, ICLR 2026): pairs weighted by quality and by what is learned.

        m      = β[(ℓ̄_w − r̄_w) − (ℓ̄_l − r̄_l)]
        u      = β(ℓ̄_w − ℓ̄_l) − τ_ref
        w_qual = σ(η (s_w − s_l))
        w_perf = (1 − σ(u))^γ
        c_nll  = λ · 1[r̄_w > ℓ̄_w] · 1[s_w ≥ τ_good]
        L      = −w_qual · w_perf · log σ(m) − c_nll · ℓ̄_w

    Defaults are the published training settings for GPT-4o scores of UltraFeedback; the mathematics
    runs used `tau_ref=2.0, nll_weight=0.2, tau_good=8.0`. A balance multiplies the rewards of m
    only: u measures what the policy has learned and stays as published.

    Args:
        beta: β > 0.
        eta: η, sharpness of the quality weight; 0 gives every pair 1/2.
        tau_ref: τ_ref, the constant margin below which a pair counts as not yet learned.
        gamma: γ ≥ 0, the focusing exponent.
        nll_weight: λ of the calibrated NLL term.
        tau_good: τ_good, the least chosen score for that term.
        length_normalized: averages in policy, reference and NLL alike.
        detach_performance_weight: take w_perf as a constant. The released code differentiates it.
        balance: adaptive balance.

    Scores are needed unless `eta == 0` and `nll_weight == 0`.
    """

    beta: float = 2.0
    eta: float = 0.7
    tau_ref: float = 0.8
    gamma: float = 3.0
    nll_weight: float = 0.001
    tau_good: float = 3.2
    length_normalized: bool = True
    detach_performance_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")

    @property
    def needs_scores(self) -> bool:
        return self.eta != 0 or self.nll_weight != 0

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return pairs.log_ratios(self.length_normalized)

    def quality_weight(self, pairs: PairLogps) -> Tensor:
        if self.eta == 0:
            return torch.full_like(pairs.chosen_logps, 0.5)
        return torch.sigmoid(self.eta * (pairs.chosen_scores - pairs.rejected_scores))

    def performance_weight(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.logps(self.length_normalized)
        u = self.beta * (chosen - rejected) - self.tau_ref
        # (1 − σ(u))^γ through the logarithm keeps its derivative finite where σ(u) rounds to 1.
        return torch.exp(self.gamma * logsigmoid(-u))

    def nll_coefficient(self, pairs: PairLogps) -> Tensor:
        if self.nll_weight == 0:
            return torch.zeros_like(pairs.chosen_logps)
        log_ratio, _ = pairs.log_ratios(self.length_normalized)
        applies = (log_ratio < 0) & (pairs.chosen_scores >= self.tau_good)
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
        preference = logsigmoid(self.beta * self.reward_margin(pairs))
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


_BUILT_IN: dict[str, type[MarginObjective]] = {
    cls.__name__.lower(): cls for cls in (DPO, Hinge, IPO, SimPO, RDPO, CPO, ORPO, UniDPO, AdaDPO)
}


def objective_names() -> list[str]:
    """Names `make_objective` takes, lower case."""
    return list(_BUILT_IN)


def hyperparameters(name: str) -> dict[str, Any]:
    """Field names and defaults of the objective called `name`."""
    return {field.name: field.default for field in dataclasses.fields(_class_of(name))}


def make_objective(name: str, **fields: Any) -> Objective:
    """The built-in objective called `name`, whatever its case, `-` or `_`.

    `balance` may be a `Balance`, a dictionary of its fields, True for `Balance()`, or None.

    Raises:
        ValueError: an unknown name or hyperparameter; the message lists those there are.
    """
    cls = _class_of(name)
    known = hyperparameters(name)
    for field in fields:
        if field not in known:
            raise ValueError(f"{cls.__name__} has no hyperparameter {field!r}; it has {[*known]}")
    match fields.get("balance"):
        case dict() as settings:
            fields["balance"] = Balance(**settings)
        case True:
            fields["balance"] = Balance()
        case False:
            fields["balance"] = None
    return cls(**fields)


def _class_of(name: str) -> type[MarginObjective]:
    key = name.lower().replace("-", "").replace("_", "")
    if key not in _BUILT_IN:
        raise ValueError(f"unknown objective {name!r}; expected one of {objective_names()}")
    return _BUILT_IN[key]


def pair_metrics(objective: Objective, pairs: PairLogps) -> dict[str, Tensor]:
    """What a step reports: scalars, means over the pairs, detached.

    `rewards/*` are β(ℓ − r), or βℓ without a reference; `rewards/accuracies` is the share of pairs
    whose chosen reward is the larger; `logps/*` in nats; then the objective's own diagnostics.
    """
    with torch.no_grad():
        has_reference = pairs.ref_chosen_logps is not None
        pick = pairs.log_ratios if has_reference else pairs.logps
        chosen, rejected = (objective.reward_scale * x for x in pick(False))
        per_pair = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": pairs.chosen_logps,
            "logps/rejected": pairs.rejected_logps,
        } | objective.diagnostics(pairs)
        return {name: mean_or_zero(values) for name, values in per_pair.items()}


def mean_or_zero(values: Tensor) -> Tensor:
    """Detached mean; 0 of nothing, where `mean` gives NaN."""
    return values.detach().mean() if len(values) else values.new_zeros(())
