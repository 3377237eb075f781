"""Steps of each schedule by the public functions, whatever else a benchmark compares them with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpref import DPO, preference_loss, sequence_logps
from fastpref.commands.benchmark.workloads import BETA, Inputs

# Matrix products of each schedule, in U, and whether the head is frozen under it.
SCHEDULES = {
    "forward": (1, False),
    "pair_groups": (3, False),
    "recompute": (4, False),
    "frozen_head": (2, True),
    "recompute, head frozen": (3, True),
}


def schedule_step(
    schedule: str, inputs: Inputs, budget: int | None = None, host_targets: bool = False
) -> Callable[[], str]:
    """A forward, or a forward and backward, that says its plan.

    Args:
        schedule: a key of `SCHEDULES`.
        inputs: padded; the head requires a gradient unless the schedule is of a frozen one.
        budget: `logits_budget`.
        host_targets: they lie where a data loader leaves them, and no step waits to read them.
    """
    targets = inputs.targets.cpu() if host_targets else inputs.targets
    if schedule == "forward":

        def forward() -> str:
            with torch.no_grad():
                sequence_logps(inputs.hidden, inputs.weight, targets, backend=inputs.backend)
            return "forward only"

        return forward
    references = torch.zeros(len(inputs.hidden), device=inputs.hidden.device)
    name = schedule.split(",")[0]

    def step() -> str:
        out = preference_loss(
            inputs.hidden,
            inputs.weight,
            targets,
            DPO(beta=BETA),
            ref_logps=references,
            schedule=name,
            backend=inputs.backend,
            logits_budget=budget,
        )
        out.loss.backward()
        inputs.hidden.grad = inputs.weight.grad = None
        return str(out.plan)

    return step
