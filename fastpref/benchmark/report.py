"""A run of the benchmark: what it measures, tables, charts, JSON, comparison with an old run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastpref.benchmark.measure import (
    BASELINE,
    accuracy,
    environment,
    peak_memory,
    runnable,
    time_peers,
)
from fastpref.benchmark.peers import OURS, PEERS
from fastpref.benchmark.workloads import Workload, make_inputs, real_inputs

MB = 1e6
CPU_SPEED = (
    Workload("smollm2-135m", 8, 256),
    Workload("smollm2-135m", 8, 256, frozen=True),
    Workload("smollm2-135m", 2, 0),
    Workload("smollm2-135m", 2, 0, packed=True),
    Workload("qwen3-0.6b", 1, 128),
)
CPU_QUICK = (Workload("smollm2-135m", 2, 96), Workload("smollm2-135m", 2, 96, frozen=True))
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


@dataclass(frozen=True)
class Suite:
    """What one run measures."""

    speed: tuple[Workload, ...]
    rounds: int
    memory_repeats: int
    sweep_pairs: tuple[int, ...]  # memory against pairs, of the first workload
    compiled: bool  # also peers that compile first, on the first workload
    accuracy: tuple[Workload, ...]
    accuracy_pairs: int  # of text
    training_steps: int  # rounds; 0 for none


def suite_for(device: str, *, quick: bool, heads: list[str] | None = None) -> Suite:
    """The measurements of a run: minutes on two cores, two with `quick`."""
    small = Workload("smollm2-135m", 2, 64, "bfloat16")
    both = (small, dataclasses.replace(small, dtype="float32"))
    if device == "cpu":
        full = Suite(CPU_SPEED, 3, 2, (8, 16, 32), True, both, 8, 3)
    else:
        full = Suite(GPU_SPEED, 9, 1, (4, 8, 16, 32), True, both, 16, 9)
    if quick:
        speed = CPU_QUICK if device == "cpu" else GPU_SPEED[:2]
        full = Suite(speed, 3, 1, (), False, both[:1], 2, 0)
    if heads:
        speed = [workload for workload in full.speed if workload.head in heads]
        # A head that the suite has not is measured at its first workload's size.
        first = full.speed[0]
        speed += [
            dataclasses.replace(first, head=head)
            for head in heads
            if head not in {workload.head for workload in speed}
        ]
        full = dataclasses.replace(full, speed=tuple(speed))
    return full


def run_suite(
    suite: Suite,
    names: list[str],
    device: str,
    model_directory: str | None,
    progress: Progress,
    *,
    memory: bool = True,
) -> dict[str, Any]:
    """Measures everything of a suite; the result is what the JSON file holds."""
    results: dict[str, Any] = {"environment": environment(device), "skipped": []}
    for part in ("speed", "memory", "sweep", "accuracy", "training"):
        results[part] = []
    task = progress.add_task("", total=None)

    def say(text: str) -> None:
        progress.update(task, description=text, advance=1)

    for workload in suite.speed:
        compiles = suite.compiled and workload == suite.speed[0]
        wanted = [name for name in names if compiles or not PEERS[name].compiles]
        possible, skipped = runnable(wanted, make_inputs(workload, device))
        results["skipped"] += [
            {"workload": workload.name, "peer": name, "why": why} for name, why in skipped.items()
        ]
        say(f"time: {workload.name}")
        results["speed"] += time_peers(workload, possible, rounds=suite.rounds, device=device)
        for name in possible if memory else ():
            say(f"memory: {workload.name}, {name}")
            repeats = suite.memory_repeats if name in OURS else 1
            results["memory"].append(peak_memory(workload, name, device, repeats=repeats))
    for pairs in suite.sweep_pairs:
        for name in OURS:
            frozen = name == "fastpref frozen head"
            workload = dataclasses.replace(suite.speed[0], pairs=pairs, frozen=frozen)
            say(f"memory against pairs: {workload.name}, {name}")
            entry = peak_memory(workload, name, device, repeats=1)
            results["sweep"].append(entry | {"pairs": pairs})
    exact = [name for name in names if not PEERS[name].compiles]
    for workload in suite.accuracy:
        say(f"accuracy: {workload.name}")
        found = accuracy(make_inputs(workload, device), exact, "random, deviation 6")
        results["accuracy"] += found
        if model_directory is not None:
            inputs = real_inputs(model_directory, suite.accuracy_pairs, workload.dtype)
            results["accuracy"] += accuracy(inputs, exact, "SmolLM2 on text")
    if suite.training_steps and model_directory is not None:
        from fastpref.benchmark.steps import step_memory, time_steps

        for lora in (False, True):
            say(f"training steps: {'LoRA' if lora else 'full'}")
            timed = time_steps(model_directory, lora, suite.training_steps)
            used = {entry["peer"]: entry["bytes"] for entry in step_memory(model_directory, lora)}
            results["training"] += [entry | {"bytes": used[entry["peer"]]} for entry in timed]
    progress.remove_task(task)
    return results


# --- tables -------------------------------------------------------------------------------------


def print_report(results: dict[str, Any], console: Console) -> None:
    """Tables of a run: one a workload, accuracy, training steps, and what was skipped."""
    for workload in dict.fromkeys(entry["workload"] for entry in results["speed"]):
        console.print(_workload_table(results, workload))
    for table in _accuracy_tables(results):
        console.print(table)
    if results["training"]:
        console.print(_training_table(results))
    for why, names in _skipped(results).items():
        console.print(f"[dim]not run: {', '.join(names)}: {why}[/dim]")


def _workload_table(results: dict[str, Any], workload: str) -> Table:
    table = Table(title=workload, title_justify="left")
    for heading in ("", "forward", "forward + backward", "of naive", "peak MB", "of naive"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    timed = {
        (entry["peer"], entry["phase"]): entry
        for entry in results["speed"]
        if entry["workload"] == workload
    }
    memory = {
        entry["peer"]: entry["bytes"]
        for entry in results["memory"]
        if entry["workload"] == workload
    }
    for peer in dict.fromkeys(peer for peer, _ in timed):
        whole = timed[peer, "forward + backward"]
        cells = [
            f"{_median(timed[peer, 'forward']['seconds']):.3g} s",
            f"{_median(whole['seconds']):.3g} s",
            _ratio(whole["ratio"]),
            f"{memory[peer] / MB:,.0f}",
            f"{memory[peer] / memory[BASELINE]:.2f}" if BASELINE in memory else "",
        ]
        table.add_row(peer, *cells, style="bold" if peer in OURS else None)
    return table


def _accuracy_tables(results: dict[str, Any]) -> Iterator[Table]:
    for kind in dict.fromkeys((entry["dtype"], entry["inputs"]) for entry in results["accuracy"]):
        table = Table(title=f"error against float64: {', '.join(kind)}", title_justify="left")
        table.add_column("nats; gradients relative", no_wrap=True)
        for heading in ("token", "response", "loss", "dH", "dW"):
            table.add_column(heading, justify="right", no_wrap=True)
        for entry in results["accuracy"]:
            if (entry["dtype"], entry["inputs"]) == kind:
                keys = ("token_logps", "response_logps", "loss", "grad_hidden", "grad_weight")
                cells = [f"{entry[key]:.1e}" if key in entry else "" for key in keys]
                table.add_row(
                    entry["peer"], *cells, style="bold" if entry["peer"] in OURS else None
                )
        yield table


def _training_table(results: dict[str, Any]) -> Table:
    table = Table(title="whole training step, SmolLM2-135M, 2 pairs of 256 tokens")
    for heading in ("", "method", "a step", "of DPOTrainer", "peak MB"):
        table.add_column(heading, justify="left" if heading in ("", "method") else "right")
    for entry in results["training"]:
        table.add_row(
            entry["peer"],
            entry["method"],
            f"{_median(entry['seconds']):.2f} s",
            _ratio(entry["ratio"]),
            f"{entry['bytes'] / MB:,.0f}",
        )
    return table


def _skipped(results: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in results["skipped"]:
        names = found.setdefault(entry["why"], [])
        if entry["peer"] not in names:
            names.append(entry["peer"])
    return found


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}–{ratio['high']:.2f}]"


# --- files --------------------------------------------------------------------------------------


def write_report(results: dict[str, Any], directory: Path) -> list[Path]:
    """`bench.json` and the charts, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "bench.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    charts = [_bar_chart(results, directory)]
    if results["sweep"]:
        charts.append(_sweep_chart(results, directory))
    return [path, *charts]


def _bar_chart(results: dict[str, Any], directory: Path) -> Path:
    """Time, memory and error by peer, of the first workload."""
    figure, panels = _figure(1, 3, (13, 4))
    workload = results["speed"][0]["workload"]
    speed = {
        entry["peer"]: entry["ratio"]["median"]
        for entry in results["speed"]
        if entry["workload"] == workload and entry["phase"] == "forward + backward"
    }
    memory = {
        entry["peer"]: entry["bytes"] / MB
        for entry in results["memory"]
        if entry["workload"] == workload
    }
    error = {
        entry["peer"]: entry["response_logps"]
        for entry in results["accuracy"]
        if entry["dtype"] == "bfloat16" and "response_logps" in entry
    }
    for panel, values, title, label in (
        (panels[0], speed, "time of forward + backward, naive = 1", "{:.2f}"),
        (panels[1], memory, "peak memory beyond inputs, MB", "{:,.0f}"),
        (
            panels[2],
            error,
            "error of a response's log-probability\nfrom bf16 inputs, nats",
            "{:.0e}",
        ),
    ):
        names = list(values)[::-1]
        colours = ["tab:green" if name in OURS else "tab:gray" for name in names]
        bars = panel.barh(names, [values[name] for name in names], color=colours)
        panel.bar_label(bars, [label.format(values[name]) for name in names], padding=3)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.18)
    if error:
        panels[2].set_xscale("log")
    hardware = results["environment"]["hardware"]
    figure.suptitle(f"{workload}  ·  {hardware}", fontsize=11)
    return _save(figure, directory / "peers.png")


def _sweep_chart(results: dict[str, Any], directory: Path) -> Path:
    """Peak memory against pairs."""
    figure, panels = _figure(1, 1, (6, 4))
    panel = panels[0]
    for name in OURS:
        points = [
            (entry["pairs"], entry["bytes"] / MB)
            for entry in results["sweep"]
            if entry["peer"] == name
        ]
        panel.plot(*zip(*points, strict=True), marker="o", label=name)
    panel.set_xlabel("pairs")
    panel.set_ylabel("peak memory beyond inputs, MB")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend()
    panel.set_title(results["speed"][0]["workload"], fontsize=10)
    return _save(figure, directory / "memory.png")


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


# --- the project's README -----------------------------------------------------------------------


def markdown_tables(results: dict[str, Any]) -> dict[str, str]:
    """Tables of a run by name, as the README shows them between `<!-- name -->` markers."""
    tables = {
        "speed": _markdown_speed(results),
        "accuracy": _markdown_accuracy(results),
        "pairs": _markdown_pairs(results),
    }
    if results["training"]:
        tables["training"] = _markdown_training(results)
    return tables


def insert_tables(text: str, tables: dict[str, str]) -> str:
    """`text` with what stands between each table's markers replaced by the table."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if start in text:
            head, rest = text.split(start)
            text = head + start + table + "\n" + end + rest.split(end)[1]
    return text


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _emphasised(name: str) -> str:
    return f"**{name}**" if name in OURS or name == "PreferenceTrainer" else name


def _markdown_speed(results: dict[str, Any]) -> str:
    """The first workload, then what a frozen head makes of it; all against its naive."""
    trains, frozen = list(dict.fromkeys(entry["workload"] for entry in results["speed"]))[:2]
    memory = {(e["workload"], e["peer"]): e["bytes"] for e in results["memory"]}
    rows = []
    for workload, label in ((trains, ""), (frozen, ", head frozen")):
        for entry in results["speed"]:
            if entry["workload"] == workload and entry["phase"] == "forward + backward":
                name = entry["peer"]
                seconds, peak = _median(entry["seconds"]), memory[workload, name]
                cells = [f"{seconds:.2f} s", _ratio(entry["ratio"]), f"{peak / MB:,.0f} MB"]
                rows.append([_emphasised(name) + label, *cells])
    return _markdown(["", "forward + backward", "of naive", "peak memory"], rows)


def _markdown_accuracy(results: dict[str, Any]) -> str:
    """From bf16 inputs, of a real model on text."""
    keys = ("token_logps", "response_logps", "loss", "grad_hidden", "grad_weight")
    rows = [
        [_emphasised(entry["peer"]), *(f"{entry[k]:.1e}" if k in entry else "" for k in keys)]
        for entry in results["accuracy"]
        if entry["dtype"] == "bfloat16" and "text" in entry["inputs"]
    ]
    headings = ["", "a token, nats", "a response, nats", "loss", "dH, relative", "dW, relative"]
    return _markdown(headings, rows)


def _markdown_pairs(results: dict[str, Any]) -> str:
    found = {(entry["peer"], entry["pairs"]): entry["bytes"] for entry in results["sweep"]}
    pairs = sorted({key[1] for key in found})
    rows = [
        [
            _emphasised(name),
            *(f"{found[name, n] / MB:,.0f} MB" for n in pairs),
        ]
        for name in OURS
    ]
    return _markdown(["", *(f"{n} pairs" for n in pairs)], rows)


def _markdown_training(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{_emphasised(entry['peer'])}, {entry['method']}",
            f"{_median(entry['seconds']):.2f} s",
            _ratio(entry["ratio"]),
            f"{entry['bytes'] / MB:,.0f} MB",
        ]
        for entry in results["training"]
    ]
    return _markdown(["", "a step", "of DPOTrainer", "peak memory"], rows)


# --- comparison ---------------------------------------------------------------------------------


def regressions(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What became slower or larger beyond the measured spread of both runs."""
    found = []
    before = {(e["workload"], e["peer"], e["phase"]): e["ratio"] for e in old["speed"]}
    for entry in new["speed"]:
        was, now = before.get((entry["workload"], entry["peer"], entry["phase"])), entry["ratio"]
        if was and now and entry["peer"] in OURS and now["low"] > was["high"]:
            found.append(
                f"slower: {entry['peer']}, {entry['phase']}, {entry['workload']}: "
                f"{_ratio(was)} of naive became {_ratio(now)}"
            )
    sizes = {(e["workload"], e["peer"]): e for e in old["memory"]}
    for entry in new["memory"]:
        was = sizes.get((entry["workload"], entry["peer"]))
        if was and entry["peer"] in OURS and entry["low"] > was["high"]:
            found.append(
                f"larger: {entry['peer']}, {entry['workload']}: {was['bytes'] / MB:,.0f} MB "
                f"became {entry['bytes'] / MB:,.0f} MB"
            )
    return found


if __name__ == "__main__":
    readme, source = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    readme.write_text(insert_tables(readme.read_text(), markdown_tables(source)))
