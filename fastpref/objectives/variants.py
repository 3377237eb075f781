"""Losses of DPO's margin with a twist, m = β[(ℓ_w−r_w) − (ℓ_l−r_l)].

Robust      [−(1−ε) log σ(m) + ε log σ(−m)] / (1 − 2ε)
EXO         KL between (σ(m), σ(−m)) and (1−ε, ε)
DiscoPOP    −(1−κ) log σ(m) + κ e^(−m), κ = σ(m/τ)
RPO         −log σ(m) − λ ℓ̄_w
ODPO        −log σ(m − α log(s_w − s_l))
DPOP        −log σ(m − β λ max(0, r_w − ℓ_w))
ChiPO       −log σ(clip(β[φ(ℓ_w−r_w) − φ(ℓ_l−r_l)], ±2R)), φ(x) = e^x + x
BetaDPO     −log σ(m) with the batch's own β
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.domains import number, require
from fastpref.objectives.base import PairLogps
from fastpref.objectives.margin import DPO, MarginObjective


@dataclass(frozen=True)
class Robust(MarginObjective):
    """Provably robust DPO (arXiv 2403.00409): unbiased where a share ε of the labels is flipped.

    `L = [−(1−ε) log σ(m) + ε log σ(−m)] / (1 − 2ε)`. TRL's "robust".

    Args: `beta`, `balance`, `divergence` as in `DPO`; `label_smoothing`, ε in [0, 0.5).
    """

    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.1, at_least=0, below=0.5)

    def _ingredients(self) -> dict[str, Any]:
        # Conservative DPO's formula with the noise −ε/(1 − 2ε), whose complement is (1−ε)/(1−2ε).
        noise = self.label_smoothing
        return {"scale": self.beta, "label_smoothing": -noise / (1 - 2 * noise)}

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin, noise = self.beta_of(pairs) * self.reward_margin(pairs), self.label_smoothing
        right, flipped = -logsigmoid(margin), -logsigmoid(-margin)
        return ((1 - noise) * right - noise * flipped) / (1 - 2 * noise)


@dataclass(frozen=True)
class EXO(MarginObjective):
    """Efficient exact optimisation, of pairs (arXiv 2402.00856, eq. 16). TRL's "exo_pair".

    `L = q [log q − log(1−ε)] + (1−q) [log(1−q) − log ε]`, `q = σ(m)`.

    Args: `beta`, `balance`, `divergence` as in `DPO`; `label_smoothing`, ε in (0, 0.5).
    """

    beta: float = number(0.1, above=0)
    label_smoothing: float = number(1e-3, above=0, below=0.5)

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin, noise = self.beta_of(pairs) * self.reward_margin(pairs), self.label_smoothing
        right = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-noise))
        return right + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(noise))


@dataclass(frozen=True)
class DiscoPOP(MarginObjective):
    """The discovered log-ratio modulated loss (arXiv 2406.08414, eq. 5). TRL's "discopop".

    `L = −(1−κ) log σ(m) + κ e^(−m)`, `κ = σ(m/τ)`.

    Args: `beta`, `balance`, `divergence` as in `DPO`; `tau`, τ > 0.
    """

    beta: float = number(0.1, above=0)
    tau: float = number(0.05, above=0)

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin = self.beta_of(pairs) * self.reward_margin(pairs)
        modulation, rest = torch.sigmoid(margin / self.tau), torch.sigmoid(-margin / self.tau)
        return -logsigmoid(margin) * rest + torch.exp(-margin) * modulation


@dataclass(frozen=True)
class RPO(DPO):
    """DPO with an NLL term, of iterative reasoning optimisation (arXiv 2404.19733): `− λ ℓ̄_w`.

    Args: those of `DPO`; `nll_weight`, λ ≥ 0.
    """

    nll_weight: float = number(1.0, at_least=0)

    def _ingredients(self) -> dict[str, Any]:
        return super()._ingredients() | {"nll_weight": self.nll_weight}

    def __call__(self, pairs: PairLogps) -> Tensor:
        return super().__call__(pairs) - self.nll_weight * pairs.chosen_mean_logps


@dataclass(frozen=True)
class ODPO(MarginObjective):
    """DPO with an offset (arXiv 2402.10571): `L = −log σ(m − α log(s_w − s_l))`.

    Args: `beta`, `balance`, `divergence` as in `DPO`; `alpha`, α ≥ 0. Chosen scores exceed rejected
    ones, or it is an error.
    """

    beta: float = number(0.1, above=0)
    alpha: float = number(1.0, at_least=0)

    @property
    def needs_scores(self) -> bool:
        return True

    def __call__(self, pairs: PairLogps) -> Tensor:
        gap = pairs.score_gap()
        require((gap > 0).all(), "ODPO needs chosen scores above the rejected ones", gap, gap > 0)
        margin = self.beta_of(pairs) * self.reward_margin(pairs)
        return -logsigmoid(margin - self.alpha * torch.log(gap))


@dataclass(frozen=True)
class DPOP(MarginObjective):
    """DPO-positive (Smaug, arXiv 2402.13228): a chosen response below the reference costs.

    `L = −log σ(β[(ℓ_w−r_w) − (ℓ_l−r_l) − λ max(0, r_w − ℓ_w)])`.

    Args: `beta`, `balance`, `divergence` as in `DPO`; `penalty`, λ ≥ 0.
    """

    beta: float = number(0.3, above=0)
    penalty: float = number(50.0, at_least=0)

    def __call__(self, pairs: PairLogps) -> Tensor:
        fell = torch.relu(-self.rewards(pairs)[0])
        return -logsigmoid(self.beta_of(pairs) * (self.reward_margin(pairs) - self.penalty * fell))


@dataclass(frozen=True)
class ChiPO(MarginObjective):
    """χ²-preference optimisation (arXiv 2407.13399): pessimism by `φ(x) = e^x + x` of log-ratios.

    `L = −log σ(clip(β[φ(ℓ_w−r_w) − φ(ℓ_l−r_l)], ±2R))`.

    Args: `beta`, `balance` as in `DPO`; `largest_reward`, R > 0.
    """

    beta: float = number(0.1, above=0)
    largest_reward: float = number(5.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is not None:
            raise ValueError("ChiPO has a divergence of its own")

    def margin_rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().margin_rewards(pairs)
        return chosen + chosen.clamp(max=80).exp(), rejected + rejected.clamp(max=80).exp()

    def __call__(self, pairs: PairLogps) -> Tensor:
        bound = 2 * self.largest_reward
        margin = self.beta_of(pairs) * self.reward_margin(pairs)
        return -logsigmoid(margin.clamp(-bound, bound))


@dataclass(frozen=True)
class BetaDPO(MarginObjective):
    """β-DPO (arXiv 2407.08639): β grows with the batch's mean margin, so it couples pairs.

    `β = β₀ [1 + α (mean(m) − m₀)]`, a constant to the gradient, m under β₀; never below β₀/1000.

    Args: `balance`, `divergence` as in `DPO`; `beta`, β₀; `alpha`, α ≥ 0; `threshold`, m₀ (the
    paper takes a running mean of earlier batches).
    """

    beta: float = number(0.1, above=0)
    alpha: float = number(0.6, at_least=0)
    threshold: float = number(0.0)

    couples_pairs = True

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin = self.beta_of(pairs) * self.reward_margin(pairs)
        factor = 1 + self.alpha * (margin.detach().mean() - self.threshold)
        return -logsigmoid(factor.clamp(min=1e-3) * margin)
