"""One small step of every schedule, for a memory checker to watch."""

from __future__ import annotations

import dataclasses

from fastpref.commands.benchmark.schedules import SCHEDULES, schedule_step
from fastpref.commands.benchmark.workloads import Workload, make_inputs

# Ends rows, columns and slices early.
SMALL = Workload("smollm2-135m", 1, 33, "bfloat16", entries=1009)


def run(workload: Workload, device: str) -> list[str]:
    """The plans of what has run."""
    return [
        schedule_step(schedule, make_inputs(dataclasses.replace(workload, frozen=frozen), device))()
        for schedule, (_, frozen) in SCHEDULES.items()
    ]


if __name__ == "__main__":
    print("\n".join(run(SMALL, "cuda")))
