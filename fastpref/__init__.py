"""fastpref: preference-tuning losses that never hold the logits."""

from fastpref import reference
from fastpref.loss import linear_logps, preference_loss, sequence_logps
from fastpref.objectives import (
    CPO,
    DPO,
    IPO,
    ORPO,
    RDPO,
    AdaDPO,
    Balance,
    Hinge,
    Objective,
    PairLogps,
    SimPO,
    UniDPO,
)
from fastpref.output import PreferenceOutput
from fastpref.planner import Plan, Problem, make_plan
from fastpref.sequences import shift_targets

__version__ = "0.1.0"

__all__ = [
    "CPO",
    "DPO",
    "IPO",
    "ORPO",
    "RDPO",
    "AdaDPO",
    "Balance",
    "Hinge",
    "Objective",
    "PairLogps",
    "Plan",
    "PreferenceOutput",
    "SimPO",
    "UniDPO",
    "Problem",
    "linear_logps",
    "make_plan",
    "preference_loss",
    "reference",
    "sequence_logps",
    "shift_targets",
]
