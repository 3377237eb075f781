"""Objectives of K ranked responses a prompt; the ranking is that of their scores.

PlackettLuce    −log Π_k e^ρ_(k) / Σ_{j ≥ k} e^ρ_(j), best first
RankedPairs     the mean of a pair objective over all pairs of which one scores higher
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.domains import check_fields, number
from fastpref.objectives.base import Composite, ListLogps, Objective, given


class ListObjective(Objective):
    """Base class of objectives of K responses a prompt: `__call__` receives a `ListLogps`.

    Everything else as in `Objective`. `rewards` are `(K, B)`.
    """

    # Given lists for pairs, its methods differ in type from those of objectives of pairs.
    def view(self, lists: ListLogps) -> ListLogps:  # type: ignore[override]
        return lists

    def rewards(self, lists: ListLogps) -> Tensor:  # type: ignore[override]
        return lists.log_probs(False) if lists.ref_logps is None else lists.log_ratios(False)

    def diagnostics(self, lists: ListLogps) -> dict[str, Tensor]:  # type: ignore[override]
        return {}

    def report(self, lists: ListLogps) -> dict[str, Tensor]:  # type: ignore[override]
        """Rewards of the best- and the worst-scored response, and the share of pairs in order."""
        scale = self.reward_scale if lists.betas is None else lists.betas
        rewards = scale * self.rewards(lists)
        found = {"logps/mean": lists.logps.mean(0)}
        if lists.scores is not None:
            best, worst = (f(0, keepdim=True) for f in (lists.scores.argmax, lists.scores.argmin))
            chosen, rejected = (rewards.gather(0, which)[0] for which in (best, worst))
            better, agree = _ordered_pairs(lists.scores), _ordered_pairs(rewards)
            found |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": _mean_where(better, agree.to(rewards.dtype)),
            }
        return found | self.diagnostics(lists)


@dataclass(frozen=True)
class PlackettLuce(ListObjective):
    """DPO of whole rankings (arXiv 2305.18290, appendix A.3).

    `L = −Σ_k [ρ_(k) − log Σ_{j ≥ k} e^ρ_(j)]`, `ρ = β(ℓ − r)`, responses in falling order of their
    scores; of equal scores the first comes first. For K = 2 it is DPO.

    Args:
        beta: β > 0.
        length_normalized: averages per token, ℓ̄ and r̄.
    """

    beta: float = number(0.1, above=0)
    length_normalized: bool = False

    takes_betas = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_scores(self) -> bool:
        return True

    def rewards(self, lists: ListLogps) -> Tensor:  # type: ignore[override]
        return lists.log_ratios(self.length_normalized)

    def __call__(self, lists: ListLogps) -> Tensor:  # type: ignore[override]
        beta = self.beta if lists.betas is None else lists.betas
        ranking = given("scores", lists.scores).argsort(dim=0, descending=True, stable=True)
        ranked = (beta * self.rewards(lists)).gather(0, ranking)
        # Of what is left at each rank: the logarithm of sums from the end.
        left = ranked.flip(0).logcumsumexp(0).flip(0)
        return (left - ranked).sum(0)


@dataclass(frozen=True)
class RankedPairs(Composite, ListObjective):
    """Any objective of pairs, over every pair of responses of which one scores higher.

    A prompt's loss is the mean over those pairs, 0 where all scores are equal.

    Args:
        objective: of pairs.
    """

    objective: Objective

    needs_scores = True

    def __post_init__(self) -> None:
        check_of_pairs(self.objective)
        if self.objective.couples_pairs:
            raise ValueError("RankedPairs takes an objective that couples no pairs")

    @property
    def parts(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def rewards(self, lists: ListLogps) -> Tensor:  # type: ignore[override]
        """Each response's reward as the pair objective sees it: with itself for the other."""
        of_each = [self.objective.rewards(lists.pairs(k, k))[0] for k in range(lists.responses)]
        return torch.stack(of_each)

    def __call__(self, lists: ListLogps) -> Tensor:  # type: ignore[override]
        losses, better, scores = [], [], given("scores", lists.scores)
        for chosen, rejected in itertools.permutations(range(lists.responses), 2):
            losses.append(self.objective(lists.pairs(chosen, rejected)))
            better.append(scores[chosen] > scores[rejected])
        return _mean_where(torch.stack(better), torch.stack(losses))


def check_of_pairs(objective: object) -> None:
    """Raises TypeError for what is no objective of pairs."""
    if not isinstance(objective, Objective) or isinstance(objective, ListObjective):
        raise TypeError(f"expected an objective of pairs, got {objective!r}")


def _ordered_pairs(values: Tensor) -> Tensor:
    """`(K(K−1), B)`: of each ordered pair of responses, whether the first is larger."""
    pairs = itertools.permutations(range(len(values)), 2)
    return torch.stack([values[a] > values[b] for a, b in pairs])


def _mean_where(which: Tensor, values: Tensor) -> Tensor:
    """Mean over the first dimension of the values that count; 0 where none does."""
    return torch.where(which, values, 0).sum(0) / which.sum(0).clamp(min=1)
