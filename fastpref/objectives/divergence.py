"""f-divergences: which reward a margin is taken of (f-DPO, arXiv 2309.16240)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.domains import check_fields, number

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
_LARGEST_EXPONENT = 80.0  # of float32, with room for sums


@dataclass(frozen=True)
class Divergence:
    """The reward f'(t) of a response with t = π/π_ref, x = log t = ℓ − r summed over its tokens.

        reverse_kl    x                          DPO's own
        forward_kl    1 − e^(−x)
        js            log 2 + log σ(x)           Jensen–Shannon
        alpha         (e^((α−1)x) − 1)/(α − 1)   x where α = 1

    Args:
        name: one of `DIVERGENCES`.
        alpha: α, of "alpha" alone.

    Exponents stop at 80, so that a reward stays finite in float32.

    Raises:
        ValueError, TypeError: an unknown name, or an α that is no finite number.
    """

    name: str = "reverse_kl"
    alpha: float = number(0.5)

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(f"unknown divergence {self.name!r}; expected one of {DIVERGENCES}")
        check_fields(self)

    def reward(self, log_ratio: Tensor) -> Tensor:
        """`(B,)` from summed log-ratios `(B,)`."""
        match self.name:
            case "forward_kl":
                return 1 - torch.exp((-log_ratio).clamp(max=_LARGEST_EXPONENT))
            case "js":
                return math.log(2) + logsigmoid(log_ratio)
            case "alpha" if abs(self.alpha - 1) >= 1e-6:
                power = (self.alpha - 1) * log_ratio
                return torch.expm1(power.clamp(max=_LARGEST_EXPONENT)) / (self.alpha - 1)
        return log_ratio
