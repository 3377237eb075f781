"""Seconds of work on a device.

On a GPU between two events, after what the cache held has been overwritten and with warm-up left to
the caller; elsewhere by the host's clock. Rounds are interleaved: each runs every call once, so
that a slow minute of a shared machine hits all alike, and a ratio is formed within its round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name")
# Of the largest cache there is, 60 MB of an H200, several times.
_FLUSHED_BYTES = 256 * 2**20


class Stopwatch:
    """Times calls on a device, "cpu" or "cuda"."""

    def __init__(self, device: str) -> None:
        self._flushed: torch.Tensor | None = None
        if device != "cpu":
            self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, call: Call) -> float:
        """Of one call, all of its device work included."""
        if self._flushed is None:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        torch.cuda.synchronize()
        self._flushed.zero_()
        first, last = self._events
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def repeated(self, call: Call, repeats: int, warmups: int = 2) -> list[float]:
        """Of one call after the other."""
        for _ in range(warmups):
            call()
        return [self.seconds(call) for _ in range(repeats)]

    def interleaved(
        self, calls: Mapping[Name, Call], rounds: int, before: Call = lambda: None
    ) -> dict[Name, list[float]]:
        """Of every call in every round; `before` runs ahead of each and is not timed.

        On a GPU a round ahead of the first is not timed either: a forward without gradients may
        compile kernels that no step has run.
        """
        seconds: dict[Name, list[float]] = {name: [] for name in calls}
        for call in calls.values() if self._flushed is not None else ():
            before()
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                before()
                seconds[name].append(self.seconds(call))
        return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and middle half."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return {"median": statistics.median(ordered), "low": low, "high": high}


def spread_of_ratios(values: list[float], baseline: list[float] | None) -> dict[str, float] | None:
    """Median and middle half of the ratios, each within its round."""
    if baseline is None:
        return None
    return spread([a / b for a, b in zip(values, baseline, strict=True)])
