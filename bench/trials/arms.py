"""What is compared: objectives, and which of them another's learning rate and β are taken from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fastpref import DPO, AdaDPO, Balance, SimPO, UniDPO
from fastpref.objectives import MarginObjective

RATES = (5e-5, 2e-4, 8e-4)  # of AdamW on LoRA's factors
BETA_FACTORS = (0.5, 2.0)  # of an objective's default, which the rates are tried with


@dataclass(frozen=True)
class Arm:
    """One objective of the study.

    Args:
        name: as the page calls it.
        objective: with its default β.
        like: the arm whose learning rate and β it takes; itself where it is swept.
    """

    name: str
    objective: MarginObjective
    like: str

    def with_beta(self, factor: float) -> MarginObjective:
        return dataclasses.replace(self.objective, beta=self.objective.beta * factor)


def _swept(name: str, objective: MarginObjective) -> Arm:
    return Arm(name, objective, name)


MAIN = (
    _swept("DPO", DPO()),
    _swept("AdaDPO", AdaDPO()),
    _swept("AdaDPO, ratio space", AdaDPO(balance=Balance(source="implicit_reward"))),
    _swept(
        "AdaDPO, symmetric",
        AdaDPO(balance=Balance(chosen_exponent=0.5, rejected_exponent=0.5)),
    ),
    _swept("Uni-DPO", UniDPO()),
    _swept("Uni-DPO, balanced", UniDPO(balance=Balance())),
    _swept("SimPO", SimPO()),
    _swept("SimPO, balanced", SimPO(balance=Balance())),
)
ABLATIONS = (
    Arm("Uni-DPO without quality", UniDPO(eta=0.0), "Uni-DPO"),
    Arm("Uni-DPO without performance", UniDPO(gamma=0.0), "Uni-DPO"),
    Arm("Uni-DPO without NLL", UniDPO(nll_weight=0.0), "Uni-DPO"),
    Arm("AdaDPO, ceiling 1.5", AdaDPO(balance=Balance(ceiling=1.5)), "AdaDPO"),
    Arm("AdaDPO, ceiling 5", AdaDPO(balance=Balance(ceiling=5.0)), "AdaDPO"),
    Arm("AdaDPO, no ceiling", AdaDPO(balance=Balance(ceiling=math.inf)), "AdaDPO"),
    Arm("AdaDPO, per sequence", AdaDPO(balance=Balance(per_token=False)), "AdaDPO"),
)
ARMS = {arm.name: arm for arm in (*MAIN, *ABLATIONS)}
