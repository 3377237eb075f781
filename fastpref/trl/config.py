"""`PreferenceConfig`: TRL's `DPOConfig` with an objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from fastpref.backends import BACKENDS
from fastpref.objectives import Objective, hyperparameters, make_objective
from fastpref.planner import SCHEDULES


class _OwnBeta(float):
    """A β that nobody gave: the objective's own, which another objective replaces by its own."""


@dataclass
class PreferenceConfig(DPOConfig):
    """`DPOConfig` with an objective of fastpref in place of `loss_type`.

    Args:
        objective: name of a built-in objective ("dpo", "unidpo", "adadpo", …).
        objective_args: its hyperparameters by field name; `balance` may be a dictionary of
            `Balance` fields or True. On a command line, JSON.
        beta: the objective's β; None for its own default, which `beta` then reads. Also scales the
            logged rewards.
        schedule: as in `preference_loss`.
        backend: as in `preference_loss`.
        logits_budget: bytes of logits to hold at once, as in `preference_loss`.

    What `DPOConfig` has means the same here. `label_smoothing` is an ε of TRL's robust, EXO and AOT
    losses and changes no other: that of `DPO` goes into `objective_args`. `ld_alpha` becomes token
    weights. TRL's `loss_type`, `loss_weights`, `f_divergence_type` and `use_weighting` have no
    meaning here and are refused when changed.

    Raises:
        ValueError: an unknown name, a changed field of TRL's losses, a `beta` that the objective
            does not have, or that contradicts `objective_args`.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective_args"]

    objective: str = field(default="dpo", metadata={"help": "Name of the objective."})
    objective_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the objective, by field name."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "The objective's beta; None for its own default."}
    )
    schedule: str = field(default="auto", metadata={"help": f"One of {SCHEDULES}."})
    backend: str = field(default="auto", metadata={"help": f"One of {BACKENDS}."})
    logits_budget: int | None = field(
        default=None, metadata={"help": "Bytes of logits to hold at once."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, neutral in (
            ("loss_type", ["sigmoid"]),
            ("loss_weights", None),
            ("f_divergence_type", "reverse_kl"),
            ("use_weighting", False),
        ):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to TRL's own losses; "
                    "PreferenceConfig takes objective and objective_args"
                )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; expected one of {SCHEDULES}")
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; expected one of {BACKENDS}")
        objective = self.make_objective()
        if self._given_beta() is None:
            self.beta = _OwnBeta(objective.reward_scale)

    def _given_beta(self) -> float | None:
        return None if isinstance(self.beta, _OwnBeta) else self.beta

    def make_objective(self) -> Objective:
        """The objective that the configuration names."""
        fields = dict(self.objective_args or {})
        beta = self._given_beta()
        if beta is not None and "beta" in hyperparameters(self.objective):
            fields.setdefault("beta", beta)
        objective = make_objective(self.objective, **fields)
        if beta is not None and beta != objective.reward_scale:
            raise ValueError(
                f"beta={beta} was given, but {objective} scales its rewards by "
                f"{objective.reward_scale}; leave beta out or change objective_args"
            )
        return objective

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"beta": float(self.beta)}
