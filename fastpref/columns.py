"""Columns of numbers that a loss takes from a data set: which they are and what they may hold.

    column                                argument of preference_loss
    score_chosen, score_rejected          scores, where the objective needs them
    weight                                pair_weights, where there is such a column
    beta                                  betas, where there is such a column
    NAME, or NAME_chosen, NAME_rejected   extras[NAME], for every NAME in the objective's `extras`

Each holds one finite number a row; a weight is at least 0, a beta above 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fastpref.domains import FINITE, POSITIVE, Domain
from fastpref.objectives import Objective

SCORES = ("score_chosen", "score_rejected")
OF_PAIRS = {"weight": "pair_weights", "beta": "betas"}
_DOMAINS = {"weight": Domain(at_least=0), "beta": POSITIVE}


class LossColumns:
    """Which columns a loss takes of those that a data set has.

    Args:
        objective: of the loss.
        present: names of all columns of the data set.
        place: what to call the data set in messages.

    Raises:
        ValueError: a column is missing, is there in two forms, or is a `beta` that the objective
            does not take.
    """

    def __init__(self, objective: Objective, present: Collection[str], place: str) -> None:
        name = type(objective).__name__
        if objective.needs_scores and set(SCORES) - set(present):
            raise ValueError(
                f"{name} needs the columns score_chosen and score_rejected; {place} has "
                f"{sorted(present)}"
            )
        self.arguments: dict[str, tuple[str, ...]] = {}
        if objective.needs_scores:
            self.arguments["scores"] = SCORES
        self.extras = {x: _of_extra(x, name, present, place) for x in objective.extras}
        for column, argument in OF_PAIRS.items():
            if column in present and column not in objective.extras:
                self.arguments[argument] = (column,)
        if "betas" in self.arguments and not objective.takes_betas:
            raise ValueError(
                f"{name} takes no betas, and {place} has a column beta; remove or rename it"
            )

    @property
    def names(self) -> list[str]:
        """Of all these columns, each once."""
        groups = [*self.arguments.values(), *self.extras.values()]
        return list(dict.fromkeys(name for group in groups for name in group))

    def domain(self, name: str) -> Domain:
        """What the numbers of a column may be."""
        of_extras = {name for group in self.extras.values() for name in group}
        return FINITE if name in of_extras else _DOMAINS.get(name, FINITE)

    def unusable(self, row: Mapping[str, Any]) -> list[str]:
        """Names of the columns in which the row has none of the numbers there may be."""
        return [name for name in self.names if not _holds(self.domain(name), row.get(name))]

    def tensors(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Arguments of `preference_loss`: float32, chosen before rejected, extras by name."""

        def numbers(names: tuple[str, ...]) -> torch.Tensor:
            return torch.tensor([row[name] for name in names for row in rows], dtype=torch.float32)

        found: dict[str, Any] = {name: numbers(group) for name, group in self.arguments.items()}
        if self.extras:
            found["extras"] = {name: numbers(group) for name, group in self.extras.items()}
        return found


def possible_columns(objective: Objective) -> list[str]:
    """Every column that a loss may take from some data set."""
    extras = [form for name in objective.extras for form in (name, *_of_responses(name))]
    return list(dict.fromkeys([*SCORES * objective.needs_scores, *OF_PAIRS, *extras]))


def _of_extra(extra: str, objective: str, present: Collection[str], place: str) -> tuple[str, ...]:
    forms = (extra,), _of_responses(extra)
    found = [form for form in forms if not set(form) - set(present)]
    if len(found) != 1:
        both = ", not both" if found else ""
        raise ValueError(
            f"{objective} needs a column {extra}, or {' and '.join(forms[1])}{both}; {place} has "
            f"{sorted(present)}"
        )
    return found[0]


def _of_responses(extra: str) -> tuple[str, str]:
    return f"{extra}_chosen", f"{extra}_rejected"


def _holds(domain: Domain, value: Any) -> bool:
    """Whether it is such a number, and still is one in the float32 that the loss gets."""
    try:
        domain.check("value", value)
        domain.check("value", ctypes.c_float(value).value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
