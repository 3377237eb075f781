"""AdaDPO's adaptive balance of chosen and rejected gradients, for any margin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.domains import check_fields, number
from fastpref.objectives.base import PairLogps


@dataclass(frozen=True)
class Balance:
    """Adaptive balance of chosen and rejected gradients (AdaDPO, arXiv 2605.28440).

    The two rewards ρ of a margin are multiplied by stop-gradient coefficients:

        δ   = b_w − b_l
        a_w = clip(exp(+α_w δ), floor, C)      a_l = clip(exp(−α_l δ), floor, C), 1 where α_l = 0
        m   = β (a_w ρ_w − a_l ρ_l)

    The defaults are the published "Stable AdaDPO", `β_w = β min(P_w / P_l, C)` and `β_l = β` with
    C = 2, where P is the geometric mean of a response's token probabilities. Only the chosen side
    is scaled, and only bounded from above. The paper forms the balance in policy space or, with the
    reference taken out, in ratio space, and finds both alike; C in [1.5, 2.5] is stable, C ≥ 5
    hurts; its grid is β in {0.005, 0.01, 0.05, 0.1} and learning rates in {3, 5, 6, 10}e-7.
    Exponents other than 1 and 0 are its future work.

    Why it balances: a token of response y receives |c_y| = β a_y (1−σ(m)), with respect to the
    probability |c_y| / p̄_y, and the two are equal exactly when a_w / a_l = p̄_w / p̄_l = e^δ, which
    holds where α_w + α_l = 1 and nothing is clipped. For a reward ρ(p̄) other than log p̄ the rule
    is a_w / a_l = ρ'(p̄_l) / ρ'(p̄_w), so ORPO's log-odds take b = log p̄ + log(1 − p̄). That, and the
    form for SimPO, R-DPO, IPO and CPO, is derived here: the paper's own is in no text that was
    within reach. (Sources of the formula: the paper's abstract, and four public texts that had read
    the whole paper and agree: a digest, two summaries and a training script.)

    Args:
        source: "policy", b = ℓ̄; or "implicit_reward", b = ℓ̄ − r̄ (ratio space, needs the reference).
        chosen_exponent: α_w.
        rejected_exponent: α_l.
        ceiling: C > 0, `math.inf` for none. A higher one kept chosen responses up and cost margin,
            a lower one pressed both down (bench/STUDY.md); from 5 on the paper saw harm.
        floor: the least coefficient, from 0 to C.
        per_token: False uses sequence log-probabilities ℓ instead of averages ℓ̄.

    Raises:
        ValueError, TypeError: an unknown source, or a number outside its bounds.
    """

    source: str = "policy"
    chosen_exponent: float = number(1.0)
    rejected_exponent: float = number(0.0)
    ceiling: float = number(2.0, above=0, infinite=True)
    floor: float = number(0.0, at_least=0)
    per_token: bool = True

    def __post_init__(self) -> None:
        if self.source not in ("policy", "implicit_reward"):
            raise ValueError(f"source must be 'policy' or 'implicit_reward', got {self.source!r}")
        check_fields(self)
        if self.floor > self.ceiling:
            raise ValueError(f"floor {self.floor} must not exceed ceiling {self.ceiling}")

    def log_probs(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """b_w and b_l `(B,)`, detached."""
        pick = pairs.logps if self.source == "policy" else pairs.log_ratios
        chosen, rejected = pick(self.per_token)
        return chosen.detach(), rejected.detach()

    def coefficients(self, b_chosen: Tensor, b_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """a_w and a_l `(B,)` from the two log-probabilities; finite wherever C is."""
        delta = b_chosen - b_rejected
        chosen = self._coefficient(self.chosen_exponent, delta)
        return chosen, self._coefficient(self.rejected_exponent, -delta)

    def _coefficient(self, exponent: float, delta: Tensor) -> Tensor:
        if exponent == 0:
            return torch.ones_like(delta)
        power = (exponent * delta).clamp(max=math.log(self.ceiling))  # so that exp is finite
        return power.exp().clamp(self.floor, self.ceiling)

    def clipped(self, b_chosen: Tensor, b_rejected: Tensor) -> Tensor:
        """1.0 for each pair `(B,)` of which a coefficient lies beyond a bound."""
        delta = b_chosen - b_rejected
        beyond = self._beyond(self.chosen_exponent, delta)
        return (beyond | self._beyond(self.rejected_exponent, -delta)).to(delta.dtype)

    def _beyond(self, exponent: float, delta: Tensor) -> Tensor:
        if exponent == 0:
            return torch.zeros_like(delta, dtype=torch.bool)
        lowest = math.log(self.floor) if self.floor else -math.inf
        power = exponent * delta
        return (power < lowest) | (power > math.log(self.ceiling))
