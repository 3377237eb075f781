"""Preference objectives: pure functions of a chosen and a rejected sequence log-probability.

base      what an objective is given and must offer; metrics
balance   AdaDPO's coefficients, for any margin
margin    DPO, Hinge, IPO, SimPO, R-DPO, CPO, ORPO, AdaDPO
unidpo    Uni-DPO
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastpref.objectives.balance import Balance
from fastpref.objectives.base import (
    Objective,
    PairFormula,
    PairLogps,
    evaluate,
    is_built_in,
    mean_or_zero,
    own_parameters,
    pair_metrics,
)
from fastpref.objectives.margin import (
    CPO,
    DPO,
    IPO,
    ORPO,
    RDPO,
    AdaDPO,
    Hinge,
    MarginObjective,
    SimPO,
)
from fastpref.objectives.unidpo import PUBLISHED_SETTINGS, UniDPO

__all__ = [
    "CPO",
    "DPO",
    "IPO",
    "ORPO",
    "PUBLISHED_SETTINGS",
    "RDPO",
    "AdaDPO",
    "Balance",
    "Hinge",
    "MarginObjective",
    "Objective",
    "PairFormula",
    "PairLogps",
    "SimPO",
    "UniDPO",
    "evaluate",
    "hyperparameters",
    "is_built_in",
    "make_objective",
    "mean_or_zero",
    "objective_names",
    "own_parameters",
    "pair_metrics",
]

_BUILT_IN: dict[str, type[Objective]] = {
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


def _class_of(name: str) -> type[Objective]:
    key = name.lower().replace("-", "").replace("_", "")
    if key not in _BUILT_IN:
        raise ValueError(f"unknown objective {name!r}; expected one of {objective_names()}")
    return _BUILT_IN[key]
