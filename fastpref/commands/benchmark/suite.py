"""What a run of the benchmark measures, and the run itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpref.commands.benchmark.measure import (
    BASELINE,
    accuracy,
    environment,
    peak_memory,
    time_peers,
)
from fastpref.commands.benchmark.peers import OURS, PEERS
from fastpref.commands.benchmark.workloads import Inputs, Workload, make_inputs, real_inputs

if TYPE_CHECKING:
    from rich.progress import Progress

CPU_SPEED = (
    Workload("smollm2-135m", 8, 256),
    Workload("smollm2-135m", 8, 256, frozen=True),
    Workload("smollm2-135m", 2, 0),
    Workload("smollm2-135m", 2, 0, packed=True),
    Workload("qwen3-0.6b", 1, 128),
)
CPU_QUICK = (Workload("smollm2-135m", 2, 96),)
GPU_SPEED = tuple(
    Workload(head, pairs, length, "bfloat16", frozen=frozen)
    for head, pairs, length in (
        ("llama-3-8b", 8, 1024),
        ("smollm2-135m", 2, 128),
        ("qwen3-0.6b", 8, 1024),
        ("gemma-2-9b", 8, 512),
        ("llama-3-70b", 8, 512),
    )
    for frozen in (False, True)
) + (
    Workload("llama-3-8b", 16, 0, "bfloat16"),
    Workload("llama-3-8b", 16, 0, "bfloat16", packed=True),
)
SWEEP_PEERS = (BASELINE, "TRL 1.16 chunked", *OURS)


@dataclass(frozen=True)
class Sweep:
    """Workloads that differ in one size: "rows", "vocabulary" or "pairs"."""

    axis: str
    workloads: tuple[Workload, ...]

    @classmethod
    def of(cls, base: Workload, axis: str, field: str, values: tuple[int, ...]) -> Sweep:
        fields: list[dict[str, Any]] = [{field: value} for value in values]
        return cls(axis, tuple(dataclasses.replace(base, **changed) for changed in fields))


def _sweeps(base: Workload, lengths: tuple, entries: tuple, pairs: tuple) -> tuple[Sweep, ...]:
    return (
        Sweep.of(base, "rows", "length", lengths),
        Sweep.of(base, "vocabulary", "entries", entries),
        Sweep.of(base, "pairs", "pairs", pairs),
    )


CPU_SWEEPS = _sweeps(
    Workload("smollm2-135m", 2, 128),
    lengths=(64, 128, 256, 512),
    entries=(12288, 24576, 49152, 98304),
    pairs=(2, 4, 8, 16, 32),
)
GPU_SWEEPS = _sweeps(
    Workload("llama-3-8b", 4, 512, "bfloat16"),
    lengths=(128, 256, 512, 1024, 2048),
    entries=(32064, 64128, 128256, 256512),
    pairs=(2, 4, 8, 16, 32),
)


@dataclass(frozen=True)
class Suite:
    """What one run measures.

    Args:
        speed: workloads for time and memory of every peer.
        rounds: interleaved, of each peer.
        memory_repeats: of fastpref's schedules; peers are measured once.
        sweeps: time and memory against one size, of `SWEEP_PEERS`.
        compiled: also peers that compile first, on the first workload.
        accuracy: workloads on random inputs.
        accuracy_pairs: pairs of text, for accuracy on a real model's hidden states.
        training_rounds: of whole training steps; 0 for none.
    """

    speed: tuple[Workload, ...]
    rounds: int
    memory_repeats: int
    sweeps: tuple[Sweep, ...]
    compiled: bool
    accuracy: tuple[Workload, ...]
    accuracy_pairs: int
    training_rounds: int


def suite_for(device: str, *, quick: bool, heads: list[str] | None = None) -> Suite:
    """The measurements of a run: under an hour on two cores, two minutes with `quick`."""
    small = Workload("smollm2-135m", 2, 64, "bfloat16")
    both = (small, dataclasses.replace(small, dtype="float32"))
    if device == "cpu":
        full = Suite(CPU_SPEED, 3, 2, CPU_SWEEPS, True, both, 8, 3)
    else:
        full = Suite(GPU_SPEED, 9, 1, GPU_SWEEPS, True, both, 16, 9)
    if quick:
        speed = CPU_QUICK if device == "cpu" else GPU_SPEED[:2]
        full = Suite(speed, 3, 1, (), False, both[:1], 2, 0)
    if heads:
        chosen = [workload for workload in full.speed if workload.head in heads]
        # A head that the suite has not is measured at its first workload's size.
        chosen += [
            dataclasses.replace(full.speed[0], head=head)
            for head in heads
            if head not in {workload.head for workload in chosen}
        ]
        sweeps = [sweep for sweep in full.sweeps if sweep.workloads[0].head in heads]
        full = dataclasses.replace(full, speed=tuple(chosen), sweeps=tuple(sweeps))
    return full


def run_suite(
    suite: Suite,
    names: list[str],
    device: str,
    model_directory: str | None,
    progress: Progress,
    save: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Measures everything of a suite; the result is what the JSON file holds.

    `save` gets the results so far after every part, so that an hour is not lost to the last one.
    """
    results: dict[str, Any] = {"environment": environment(device)}
    for part in ("speed", "memory", "skipped", "sweeps", "accuracy", "training"):
        results[part] = []
    parts = list(_parts(suite, names, device, model_directory))
    task = progress.add_task("", total=len(parts))
    for title, measured in parts:
        progress.update(task, description=title)
        for name, entries in measured().items():
            results[name] += entries
        save(results)
        progress.advance(task)
    progress.remove_task(task)
    return results


# Entries by the part of the results that they belong to.
Part = Callable[[], dict[str, list[dict[str, Any]]]]


def _parts(
    suite: Suite, names: list[str], device: str, model_directory: str | None
) -> Iterator[tuple[str, Part]]:
    exact = [name for name in names if not PEERS[name].compiles]
    for workload in suite.speed:
        wanted = names if suite.compiled and workload == suite.speed[0] else exact
        yield workload.name, partial(_compare, workload, wanted, suite, device)
    for sweep in suite.sweeps:
        for workload in sweep.workloads:
            title = f"against {sweep.axis}: {workload.name}"
            yield title, partial(_sweep_point, sweep, workload, names, device)
    for workload in suite.accuracy:
        inputs = partial(make_inputs, workload, device)
        yield f"accuracy: {workload.name}", partial(_accuracy, inputs, exact, "random, deviation 6")
        if model_directory is not None:
            inputs = partial(
                real_inputs, model_directory, suite.accuracy_pairs, workload.dtype, device
            )
            title = f"accuracy on text, {workload.dtype}"
            yield title, partial(_accuracy, inputs, exact, "SmolLM2 on text")
    if suite.training_rounds and model_directory is not None:
        for lora in (False, True):
            title = f"training steps: {'LoRA' if lora else 'full'}"
            yield title, partial(_training, model_directory, lora, suite.training_rounds, device)


def _accuracy(
    inputs: Callable[[], Inputs], names: list[str], source: str
) -> dict[str, list[dict[str, Any]]]:
    return {"accuracy": accuracy(inputs(), names, source)}


def _training(*given: Any) -> dict[str, list[dict[str, Any]]]:
    from fastpref.commands.benchmark.steps import measure_steps

    return {"training": measure_steps(*given)}


def _compare(
    workload: Workload, names: list[str], suite: Suite, device: str
) -> dict[str, list[dict[str, Any]]]:
    """Time and memory of every peer that can run."""
    speed, skipped = time_peers(workload, names, rounds=suite.rounds, device=device)
    memory = []
    for name in names:
        repeats = suite.memory_repeats if name in OURS else 1
        if name not in skipped:
            try:
                memory.append(peak_memory(workload, name, device, repeats))
            except RuntimeError as failure:
                if name in OURS:
                    raise
                skipped[name] = f"no peak memory: {failure}"
    of_workload = {"workload": workload.name}
    return {
        "speed": speed,
        "memory": memory,
        "skipped": [of_workload | {"peer": name, "why": why} for name, why in skipped.items()],
    }


def _sweep_point(
    sweep: Sweep, workload: Workload, names: list[str], device: str
) -> dict[str, list[dict[str, Any]]]:
    """One time and peak of each; of the frozen-head schedule with a frozen head."""
    entries = []
    for frozen in (False, True):
        variant = dataclasses.replace(workload, frozen=frozen)
        only_frozen = "fastpref frozen head"
        among = [n for n in SWEEP_PEERS if n in names and (n == only_frozen) == frozen]
        timed, _ = time_peers(variant, among, rounds=1, device=device)
        for entry in timed:
            if entry["phase"] == "forward + backward":
                used = peak_memory(variant, entry["peer"], device, repeats=1)
                size = {"axis": sweep.axis, "size": getattr(workload, sweep.axis)}
                entries.append(size | used | {"seconds": entry["seconds"][0]})
    return {"sweeps": entries}
