"""Losses of each response's own reward, ρ = β(ℓ − r), and not of a difference alone.

NCA         −log σ(ρ_w) − ½ log σ(−ρ_w) − ½ log σ(−ρ_l)
BCO         −log σ(ρ_w) − log σ(−ρ_l)
SPPO        (ℓ_w − r_w − 1/(2β))² + (ℓ_l − r_l + 1/(2β))²
APOZero     1 − σ(ρ_w) + σ(ρ_l)
APODown     σ(ρ_w) + 1 − σ(ρ_w − ρ_l)
AOT         −log σ of β(sort(ℓ_w − ℓ_l) − sort(r_w − r_l)) over the batch, with label noise
AOTUnpaired the same of sort(ℓ_w − r_w) − sort(ℓ_l − r_l)
SFT         −ℓ_w over the batch's mean chosen length
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.domains import check_fields, number
from fastpref.objectives.base import Objective, PairLogps, given


@dataclass(frozen=True)
class _OfRewards(Objective):
    """What these share: β, and the two rewards."""

    beta: float = number(0.1, above=0)

    takes_betas = True

    def __post_init__(self) -> None:
        check_fields(self)

    def scaled_rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """ρ_w and ρ_l `(B,)`."""
        beta = self.beta if pairs.betas is None else pairs.betas
        chosen, rejected = pairs.log_ratios(normalized=False)
        return beta * chosen, beta * rejected


@dataclass(frozen=True)
class NCA(_OfRewards):
    """Noise contrastive alignment, of pairs (arXiv 2402.05369). TRL's "nca_pair".

    Args: `beta`, β > 0.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.scaled_rewards(pairs)
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO(_OfRewards):
    """Binary classifier optimisation, of pairs (arXiv 2404.04656), without its shift δ.

    TRL's "bco_pair". Args: `beta`, β > 0.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.scaled_rewards(pairs)
        return -logsigmoid(chosen) - logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPO(_OfRewards):
    """Self-play preference optimisation with hard labels (arXiv 2405.00675, eq. 4.7).

    TRL's "sppo_hard". Args: `beta`, β > 0 (the paper's 1/η).
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        half = 0.5 / (self.beta if pairs.betas is None else pairs.betas)
        chosen, rejected = pairs.log_ratios(normalized=False)
        return (chosen - half) ** 2 + (rejected + half) ** 2


@dataclass(frozen=True)
class APOZero(_OfRewards):
    """Anchored preference optimisation where the chosen beats the model (arXiv 2408.06266, eq. 7).

    TRL's "apo_zero". Args: `beta`, β > 0.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.scaled_rewards(pairs)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(_OfRewards):
    """Anchored preference optimisation where the model beats the chosen (arXiv 2408.06266, eq. 8).

    TRL's "apo_down". Args: `beta`, β > 0.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.scaled_rewards(pairs)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class AOT(_OfRewards):
    """Alignment via optimal transport, of pairs (arXiv 2406.05882): margins in order of size.

    The policy's sorted margins against the reference's. TRL's "aot".

    Args: `beta`, β > 0; `label_smoothing`, ε in [0, 0.5).
    """

    label_smoothing: float = number(0.0, at_least=0, below=0.5)

    couples_pairs = True
    takes_betas = False  # a sorted margin is no pair's

    def sorted_difference(self, pairs: PairLogps) -> Tensor:
        policy = (pairs.chosen_logps - pairs.rejected_logps).sort().values
        ref_chosen = given("ref_logps", pairs.ref_chosen_logps)
        reference = (ref_chosen - given("ref_logps", pairs.ref_rejected_logps)).sort().values
        return policy - reference

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin, noise = self.beta * self.sorted_difference(pairs), self.label_smoothing
        return -(1 - noise) * logsigmoid(margin) - noise * logsigmoid(-margin)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """`AOT` of sorted chosen log-ratios against sorted rejected ones. TRL's "aot_unpaired"."""

    def sorted_difference(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.log_ratios(normalized=False)
        return chosen.sort().values - rejected.sort().values


@dataclass(frozen=True)
class SFT(Objective):
    """Negative log-likelihood a token of the batch's chosen responses. TRL's "sft".

    Its mean over pairs is `−Σ ℓ_w / Σ n_w`: a pair's loss is −ℓ_w over the mean chosen length.
    """

    uses_mean_length = True

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, pairs: PairLogps) -> Tensor:
        length = pairs.mean_chosen_length
        return -pairs.chosen_logps / (pairs.chosen_lengths.mean() if length is None else length)
