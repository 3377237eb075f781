"""Objectives made of others: weighted sums, and weights of how likely the policy finds a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.domains import FINITE, POSITIVE
from fastpref.objectives.base import Composite, Objective, PairLogps, given
from fastpref.objectives.lists import check_of_pairs


class Mixture(Composite):
    """A weighted sum of objectives of pairs: mixed preference optimisation (arXiv 2411.10442).

    `Mixture([(DPO(beta=0.1), 0.8), (BCO(), 0.2), (SFT(), 1.0)])`.

    Args:
        terms: objectives and their weights, at least one.
        beta: scales the logged rewards, summed log-ratios; None for the first term's own scale.

    Raises:
        ValueError, TypeError: no terms, or one that is no objective of pairs with a finite weight.
    """

    def __init__(self, terms: Sequence[tuple[Objective, float]], beta: float | None = None) -> None:
        if not terms:
            raise ValueError("a Mixture needs at least one (objective, weight)")
        for objective, weight in terms:
            check_of_pairs(objective)
            FINITE.check("weight", weight)
        if beta is not None:
            POSITIVE.check("beta", beta)
        self.terms = tuple((objective, float(weight)) for objective, weight in terms)
        self.beta = beta

    @property
    def parts(self) -> tuple[Objective, ...]:
        return tuple(objective for objective, _ in self.terms)

    @property
    def reward_scale(self) -> float:
        return super().reward_scale if self.beta is None else self.beta

    def __call__(self, pairs: PairLogps) -> Tensor:
        (first, weight), *others = self.terms
        return sum((w * objective(pairs) for objective, w in others), weight * first(pairs))

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= part.diagnostics(pairs)
        return found

    def __repr__(self) -> str:
        return f"Mixture({list(self.terms)}, beta={self.beta})"


@dataclass(frozen=True)
class WPO(Composite):
    """Weighted preference optimisation (arXiv 2406.11827, eq. 2) of any objective of pairs.

    `L = w_w w_l L'`, `w_y = exp(mean_t [log p(y_t) − log Σ_v p(v)²])`, constants: responses that
    the policy itself would give count for more. TRL's `use_weighting`.

    Args:
        objective: whose losses L' are weighted.
    """

    objective: Objective

    needs_alignments = True

    def __post_init__(self) -> None:
        check_of_pairs(self.objective)
        if self.objective.couples_pairs:
            raise ValueError("WPO weights each pair's loss: its objective must couple no pairs")

    @property
    def parts(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def weight(self, pairs: PairLogps) -> Tensor:
        """w_w w_l `(B,)`."""
        chosen = given("alignments", pairs.chosen_alignments) / pairs.chosen_lengths
        rejected = given("alignments", pairs.rejected_alignments) / pairs.rejected_lengths
        return torch.exp(chosen + rejected)

    def __call__(self, pairs: PairLogps) -> Tensor:
        return self.weight(pairs) * self.objective(pairs)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.objective.rewards(pairs)

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        return self.objective.diagnostics(pairs) | {"weights/policy": self.weight(pairs)}
