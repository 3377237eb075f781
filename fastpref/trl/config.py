"""Which objective a configuration means: `PreferenceConfig`, or TRL's own `DPOConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trl import DPOConfig

from fastpref.backends import BACKENDS
from fastpref.objectives import (
    AOT,
    BCO,
    DPO,
    EXO,
    IPO,
    NCA,
    SFT,
    SPPO,
    WPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Divergence,
    Hinge,
    Mixture,
    Objective,
    Robust,
    hyperparameters,
    make_objective,
)
from fastpref.planner import SCHEDULES
from fastpref.trl.faults import ON_NONFINITE


def _sft(divergence: Divergence | None, use_weighting: bool) -> SFT:
    """It has no reward that a divergence would change: TRL takes any, to no effect."""
    if use_weighting:
        raise ValueError(
            "use_weighting weighs pairs, and loss_type 'sft' is one number of all chosen tokens; "
            "TRL 1.16 fails at its first step"
        )
    return SFT()


# TRL's names: what makes the objective, and which of TRL's settings that takes.
_LOSSES: dict[str, tuple[Callable[..., Objective], tuple[str, ...]]] = {
    "sigmoid": (DPO, ("beta", "divergence")),
    "sigmoid_norm": (partial(DPO, length_normalized=True), ("beta", "divergence")),
    "hinge": (Hinge, ("beta", "divergence")),
    "ipo": (IPO, ("beta", "divergence")),
    "exo_pair": (EXO, ("beta", "divergence", "label_smoothing")),
    "robust": (Robust, ("beta", "divergence", "label_smoothing")),
    "discopop": (DiscoPOP, ("beta", "divergence", "tau")),
    "nca_pair": (NCA, ("beta",)),
    "bco_pair": (BCO, ("beta",)),
    "sppo_hard": (SPPO, ("beta",)),
    "apo_zero": (APOZero, ("beta",)),
    "apo_down": (APODown, ("beta",)),
    "aot": (AOT, ("beta", "label_smoothing")),
    "aot_unpaired": (AOTUnpaired, ("beta", "label_smoothing")),
    "sft": (_sft, ("divergence", "use_weighting")),
}
_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
_FIELDS_OF_LOSSES = (
    "loss_type",
    "loss_weights",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
)


class _OwnBeta(float):
    """A β that nobody gave: the objective's own, which another objective replaces by its own."""


@dataclass
class PreferenceConfig(DPOConfig):
    """`DPOConfig`, which means here what it means in TRL, or an objective of fastpref.

    Args:
        objective: name of a built-in objective ("dpo", "unidpo", "adadpo", …), in place of all of
            TRL's fields that choose a loss. None, the default: they choose it, see `trl_objective`.
        objective_args: the objective's hyperparameters by field name; `balance` may be a dictionary
            of `Balance` fields or True. On a command line, JSON.
        beta: β; None for the objective's own default, which `beta` then reads: 0.1 where TRL's
            fields choose. Also scales the logged rewards.
        schedule: as in `preference_loss`.
        backend: as in `preference_loss`.
        logits_budget: bytes of logits to hold at once, as in `preference_loss`; by default a share
            of the accelerator's free memory, the same on all ranks, or 128 MiB on a CPU.
        padding_free: a batch is one row of packed sequences without padding; the numbers are those
            of the padded batch, to rounding.
        share_prompt: True to have, in one such row, one copy of each prompt, which chosen and
            rejected both continue; "auto" where that saves 3 % of a pair's tokens or more, and the
            model can without looking at all pairs of tokens. Packs, whatever `padding_free` says.
        on_nonfinite: what a loss or gradient that is NaN or infinite does on any rank: "raise", the
            default, ends the run on every rank before the step is taken; "skip" leaves the step
            out on all alike, says why, and logs how many as `skipped_steps`. Not under DeepSpeed.

    `ld_alpha` becomes token weights, of any objective.

    Raises:
        ValueError: an unknown name; a number out of its range; `objective` beside a changed field
            of TRL's losses; `objective_args` without `objective`; a `beta` that the objective does
            not have, or that contradicts `objective_args`.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective_args"]

    objective: str | None = field(
        default=None, metadata={"help": "Name of the objective; None for that of loss_type."}
    )
    objective_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the objective, by field name."}
    )
    beta: float | None = field(  # type: ignore[assignment]  # None until the objective is known
        default=None, metadata={"help": "The objective's beta; None for its own default."}
    )
    schedule: str = field(default="auto", metadata={"help": f"One of {SCHEDULES}."})
    backend: str = field(default="auto", metadata={"help": f"One of {BACKENDS}."})
    logits_budget: int | None = field(
        default=None, metadata={"help": "Bytes of logits to hold at once; None for a default."}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Batches are one row of packed sequences."}
    )
    share_prompt: bool | str = field(
        default=False,
        metadata={"help": "Chosen and rejected attend to one copy of the prompt; true or auto."},
    )

    on_nonfinite: str = field(
        default="raise",
        metadata={"help": f"Of a loss that is not finite, one of {ON_NONFINITE}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_nonfinite not in ON_NONFINITE:
            raise ValueError(
                f"unknown on_nonfinite {self.on_nonfinite!r}; expected one of {ON_NONFINITE}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; expected one of {SCHEDULES}")
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; expected one of {BACKENDS}")
        check_packing(self)
        objective = self.make_objective()
        if given_beta(self) is None:
            self.beta = _OwnBeta(objective.reward_scale)

    def make_objective(self) -> Objective:
        """The objective that the configuration names, or else that of TRL's fields."""
        if self.objective is None:
            if self.objective_args:
                raise ValueError(
                    f"objective_args={self.objective_args} need an objective by its name"
                )
            return trl_objective(self)
        check_own_objective(self, f"objective={self.objective!r}")
        fields = self.objective_args or {}
        if isinstance(fields, str):
            raise ValueError(f"objective_args must be a dictionary, or JSON of one, got {fields!r}")
        fields = dict(fields)
        beta = given_beta(self)
        if beta is not None and "beta" in hyperparameters(self.objective):
            fields.setdefault("beta", beta)
        objective = make_objective(self.objective, **fields)
        check_beta(self, objective)
        return objective

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"beta": None if self.beta is None else float(self.beta)}


def trl_objective(args: DPOConfig) -> Objective:
    """The objective that TRL's own fields choose, with TRL's numbers.

    `loss_type` and `loss_weights`, `beta`, `label_smoothing` (of robust, EXO and AOT alone),
    `f_divergence_type` and its coefficient, `discopop_tau` and `use_weighting` mean what they mean
    in TRL 1.16, odd or not: the rewards it reports are β × summed log-ratios to the reference,
    also for losses of averages (ipo, sigmoid_norm) and for sft, which has no reference; and sft
    counts whole responses where `ld_alpha` weights the tokens of the others. Two things TRL does
    are not repeated: its averages count a response's first token even where nothing stands before
    it to predict it from (an empty prompt, or one that `keep_end` cuts away), and it fails at the
    first step of hinge with `use_weighting`.

    Raises:
        ValueError, TypeError: an unknown name, a number out of its range (TRL 1.16 trains on with
            a label smoothing of 0.5 and more, or a β of 0), or a combination that TRL's trainer
            refuses as well.
    """
    terms = [(_term(name, args), weight) for name, weight in _weighted_losses(args)]
    if len(terms) == 1 and terms[0][1] == 1:
        (objective, _), *_ = terms
        formula = objective.formula()
        if formula is not None and not formula.normalized:
            return objective  # its own rewards are TRL's, and kernels fuse it
    return Mixture(terms, beta=_trl_beta(args))


def sft_weight(args: DPOConfig) -> float:
    """Of the loss whose tokens TRL does not weight by `ld_alpha`; 0 where it is not asked for."""
    return sum(weight for name, weight in _weighted_losses(args) if name == "sft")


def _weighted_losses(args: DPOConfig) -> Iterator[tuple[str, float]]:
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    return zip(args.loss_type, weights, strict=True)


def _term(loss_type: str, args: DPOConfig) -> Objective:
    if loss_type not in _LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; expected some of {[*_LOSSES]}")
    make, taken = _LOSSES[loss_type]
    divergence = _divergence(args)
    if divergence is not None and "divergence" not in taken:
        able = [name for name, (_, taken) in _LOSSES.items() if "divergence" in taken]
        raise ValueError(
            f"loss_type {loss_type!r} has no form for f_divergence_type="
            f"{args.f_divergence_type!r}; {able} have"
        )
    settings = {
        "beta": _trl_beta(args),
        "divergence": divergence,
        "label_smoothing": args.label_smoothing,
        "tau": args.discopop_tau,
        "use_weighting": args.use_weighting,
    }
    objective = make(**{name: settings[name] for name in taken})
    if not args.use_weighting:
        return objective
    if objective.couples_pairs:
        raise ValueError(
            f"use_weighting weighs pairs, and loss_type {loss_type!r} sorts what they are made of"
        )
    return WPO(objective)


def _divergence(args: DPOConfig) -> Divergence | None:
    name = args.f_divergence_type
    if name == "reverse_kl":
        return None
    if name not in _DIVERGENCES:
        expected = ["reverse_kl", *_DIVERGENCES]
        raise ValueError(f"unknown f_divergence_type {name!r}; expected one of {expected}")
    if name == "alpha_divergence":
        return Divergence("alpha", args.f_alpha_divergence_coef)
    return Divergence(_DIVERGENCES[name])


def _trl_beta(args: DPOConfig) -> float:
    beta = given_beta(args)
    return DPOConfig.beta if beta is None else beta


def given_beta(args: DPOConfig) -> float | None:
    """The β that somebody gave; of a plain `DPOConfig`, one other than its default."""
    if isinstance(args, PreferenceConfig):
        return None if isinstance(args.beta, _OwnBeta) else args.beta
    return None if args.beta == DPOConfig.beta else args.beta


def check_beta(args: DPOConfig, objective: Objective) -> None:
    """Raises ValueError where a β was given and the objective has another."""
    beta = given_beta(args)
    if beta is not None and beta != objective.reward_scale:
        raise ValueError(
            f"beta={beta} was given, but {objective} scales its rewards by "
            f"{objective.reward_scale}; leave beta out or change the objective's own"
        )


def check_packing(args: DPOConfig) -> None:
    """Raises ValueError for a `share_prompt` that is none, and for padding in a row that has none.

    A command line's "true" and "false" become what they say.
    """
    share = getattr(args, "share_prompt", False)
    if isinstance(share, str) and share.lower() in ("true", "false"):
        share = share.lower() == "true"
        args.share_prompt = share  # type: ignore[attr-defined]
    if not (isinstance(share, bool) or share == "auto"):
        raise ValueError(f"share_prompt must be True, False or 'auto', got {share!r}")
    if not isinstance(args.padding_free, bool):
        raise ValueError(f"padding_free must be True or False, got {args.padding_free!r}")
    multiple = args.pad_to_multiple_of
    if (args.padding_free or share) and isinstance(multiple, int):
        option = "padding_free=True" if args.padding_free else f"share_prompt={share!r}"
        raise ValueError(
            f"{option} packs rows without padding, and pad_to_multiple_of={multiple} pads them"
        )


def check_own_objective(args: DPOConfig, given: str) -> None:
    """Raises ValueError where an objective is given and TRL's fields choose another loss."""
    defaults = {each.name: each for each in dataclasses.fields(DPOConfig)}
    for name in _FIELDS_OF_LOSSES:
        default, value = defaults[name], getattr(args, name)
        factory = default.default_factory
        neutral = default.default if factory is dataclasses.MISSING else factory()
        if value != neutral:
            raise ValueError(
                f"{name}={value!r} chooses a loss of TRL's, and {given} takes its place; leave out "
                "one of them (hyperparameters of an objective go into objective_args)"
            )
