"""A step of several processes and accumulated batches: what they say to each other, and count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed

from fastpref import agreement
from fastpref.memory import ranks
from fastpref.objectives import ListLogps, Objective, PairLogps
from fastpref.objectives.base import Composite


def gathered(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every process's whole numbers, by rank; all must call it, with as many."""
    return [list(numbers)] if ranks() == 1 else agreement.gathered(numbers, device)


def gathered_texts(text: str) -> list[str]:
    """Every process's text, by rank: what went wrong with whom."""
    everybody = [text] * ranks()
    if len(everybody) > 1:
        distributed.all_gather_object(everybody, text)
    return everybody


class EvenBatches:
    """A loader of unknown length, whose end every process must reach after as many batches.

    In all else it is the one that it wraps.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        batches, count = iter(self.loader), 0
        while True:
            batch = next(batches, None)
            more = [has for (has,) in gathered([batch is not None], self.device)]
            if any(more) and not all(more):
                ended = [rank for rank, has in enumerate(more) if not has]
                raise RuntimeError(
                    f"the evaluation's stream gives ranks {ended} {count} batches and the others "
                    "more; a data set that every rank reads whole (fewer shards than ranks) is "
                    "shared out evenly, and so is one of known length"
                )
            if not any(more):
                return
            count += 1
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


@dataclass(frozen=True)
class OfStep(Composite):
    """An objective whose averages over the batch become those of the whole step.

    Args:
        objective: computes the losses.
        mean_lengths: average lengths `(chosen, rejected)` over all pairs of the step.
    """

    objective: Objective
    mean_lengths: tuple[float, ...]

    @property
    def parts(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def view(self, lists: ListLogps) -> PairLogps:
        return self.objective.view(replace(lists, mean_lengths=self.mean_lengths))

    def __call__(self, pairs: PairLogps) -> Tensor:
        return self.objective(pairs)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.objective.rewards(pairs)

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        return self.objective.diagnostics(pairs)
