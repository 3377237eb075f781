"""What `preference_loss` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastpref.planner import Plan


@dataclass(frozen=True)
class PreferenceOutput:
    """What `preference_loss` returns.

    Args:
        loss: scalar, or `(B,)` with `reduction="none"`; the one differentiable field. fp32, as
            all others (float64 where hidden is).
        losses: loss of each pair `(B,)`.
        logps: log-probability of each response `(2B,)`, nats, chosen first.
        lengths: scored tokens of each response `(2B,)`, int64, chosen first.
        metrics: scalars by name, means over the pairs in which both responses have a scored token:
            `rewards/*` (the objective's own, β times nats, per token where the loss is),
            `logps/*` (nats), the objective's weights and balance; with `stats` also `entropy`
            (nats), `logits/chosen`, `logits/rejected`, and `mean_token_accuracy` (of chosen
            tokens, as TRL has it).
        plan: the schedule that ran; `print(output.plan)` says why. None in a compiled graph, and of
            `backend="reference"`.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    lengths: Tensor
    metrics: dict[str, Tensor]
    plan: Plan | None = None
