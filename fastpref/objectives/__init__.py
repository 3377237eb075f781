"""Preference objectives: pure functions of the log-probabilities of whole responses.

base        what an objective is given and must offer; metrics
margin      DPO, Hinge, IPO, SimPO, R-DPO, CPO, ORPO, AdaDPO
balance     AdaDPO's coefficients, for any margin
divergence  f-divergences as rewards, for any margin
unidpo      Uni-DPO
variants    losses of DPO's margin with a twist: Robust, EXO, DiscoPOP, RPO, ODPO, …
separate    losses of each response's own reward: NCA, BCO, SPPO, APO, AOT, SFT
mixtures    weighted sums; WPO's weights
lists       K ranked responses a prompt: Plackett–Luce, pairs of a ranking
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastpref.objectives.balance import Balance
from fastpref.objectives.base import (
    ListLogps,
    Objective,
    PairFormula,
    PairLogps,
    evaluate,
    is_built_in,
    mean_or_zero,
    own_parameters,
    step_metrics,
)
from fastpref.objectives.divergence import Divergence
from fastpref.objectives.lists import ListObjective, PlackettLuce, RankedPairs
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
from fastpref.objectives.mixtures import WPO, Mixture
from fastpref.objectives.separate import (
    AOT,
    BCO,
    NCA,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
)
from fastpref.objectives.unidpo import PUBLISHED_SETTINGS, UniDPO
from fastpref.objectives.variants import (
    DPOP,
    EXO,
    ODPO,
    RPO,
    BetaDPO,
    ChiPO,
    DiscoPOP,
    Robust,
)

__all__ = [
    "AOT",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AdaDPO",
    "BCO",
    "Balance",
    "BetaDPO",
    "CPO",
    "ChiPO",
    "DPO",
    "DPOP",
    "DiscoPOP",
    "Divergence",
    "EXO",
    "Hinge",
    "IPO",
    "ListLogps",
    "ListObjective",
    "MarginObjective",
    "Mixture",
    "NCA",
    "ODPO",
    "ORPO",
    "Objective",
    "PUBLISHED_SETTINGS",
    "PairFormula",
    "PairLogps",
    "PlackettLuce",
    "RDPO",
    "RPO",
    "RankedPairs",
    "Robust",
    "SFT",
    "SPPO",
    "SimPO",
    "UniDPO",
    "WPO",
    "evaluate",
    "hyperparameters",
    "is_built_in",
    "make_objective",
    "mean_or_zero",
    "objective_names",
    "own_parameters",
    "step_metrics",
]

_PAIRWISE = (
    DPO, Hinge, IPO, SimPO, RDPO, CPO, ORPO, UniDPO, AdaDPO,
    Robust, EXO, DiscoPOP, RPO, ODPO, DPOP, ChiPO, BetaDPO,
    NCA, BCO, SPPO, APOZero, APODown, AOT, AOTUnpaired, SFT,
)  # fmt: skip
_BUILT_IN: dict[str, type[Any]] = {cls.__name__.lower(): cls for cls in _PAIRWISE}


def objective_names() -> list[str]:
    """Names `make_objective` takes, lower case."""
    return list(_BUILT_IN)


def hyperparameters(name: str) -> dict[str, Any]:
    """Field names and defaults of the objective called `name`."""
    return {field.name: field.default for field in dataclasses.fields(_class_of(name))}


def make_objective(name: str, **fields: Any) -> Objective:
    """The built-in objective called `name`, whatever its case, `-` or `_`.

    `balance` may be a `Balance`, a dictionary of its fields, True for `Balance()`, or None;
    `divergence` a `Divergence`, its name, or a dictionary of its fields.

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
    match fields.get("divergence"):
        case str() as divergence:
            fields["divergence"] = Divergence(divergence)
        case dict() as settings:
            fields["divergence"] = Divergence(**settings)
    return cls(**fields)


def _class_of(name: str) -> type[Any]:
    key = name.lower().replace("-", "").replace("_", "")
    if key not in _BUILT_IN:
        raise ValueError(f"unknown objective {name!r}; expected one of {objective_names()}")
    return _BUILT_IN[key]
