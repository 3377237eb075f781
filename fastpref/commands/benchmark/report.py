"""A run as tables: on the terminal, in the project's README, and against an earlier run."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpref.commands.benchmark.measure import BASELINE
from fastpref.commands.benchmark.peers import OURS
from fastpref.commands.plan import GPUS, estimates, problem_for
from fastpref.commands.tables import new_table, show

MB = 1e6
# Pages of code and threads differ from process to process.
MEMORY_NOISE = 1.02


def print_report(results: dict[str, Any], console: Console) -> None:
    """Tables of a run: one a workload and a sweep, accuracy, training, and what was skipped."""
    for table in _tables(results):
        show(console, table)
        console.print()
    for why, names in _skipped(results).items():
        console.print(f"[dim]not run: {', '.join(names)}: {escape(why)}[/dim]")


def _tables(results: dict[str, Any]) -> Iterator[Table]:
    for workload in dict.fromkeys(entry["workload"] for entry in results["speed"]):
        yield _workload_table(results, workload)
    for axis in dict.fromkeys(entry["axis"] for entry in results["sweeps"]):
        yield _sweep_table(results, axis)
    yield from _accuracy_tables(results)
    if results["training"]:
        yield _training_table(results)


def _workload_table(results: dict[str, Any], workload: str) -> Table:
    headings = ("forward\ns", "and back\ns", "of naive", "peak\nMB", "of\nnaive")
    table = new_table(workload, "", *headings)
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
            f"{statistics.median(timed[peer, 'forward']['seconds']):.3g}",
            f"{statistics.median(whole['seconds']):.3g}",
            _ratio(whole["ratio"]),
            f"{memory[peer] / MB:,.0f}" if peer in memory else "",
            f"{memory[peer] / memory[BASELINE]:.2f}" if {peer, BASELINE} <= set(memory) else "",
        ]
        table.add_row(peer, *map(escape, cells), style="bold" if peer in OURS else None)
    return table


def _sweep_table(results: dict[str, Any], axis: str) -> Table:
    of_axis = [entry for entry in results["sweeps"] if entry["axis"] == axis]
    found = {(entry["peer"], entry["size"]): entry for entry in of_axis}
    sizes = sorted({size for _, size in found})
    table = new_table(f"MB, and seconds, against {axis}", "", *(f"{size:,}" for size in sizes))
    for peer in dict.fromkeys(entry["peer"] for entry in of_axis):
        entries = [found.get((peer, size)) for size in sizes]
        cells = [f"{e['bytes'] / MB:,.0f}\n{e['seconds']:.2f} s" if e else "" for e in entries]
        table.add_row(peer, *cells, style="bold" if peer in OURS else None)
    return table


def _accuracy_tables(results: dict[str, Any]) -> Iterator[Table]:
    for kind in dict.fromkeys((entry["dtype"], entry["inputs"]) for entry in results["accuracy"]):
        table = new_table(
            f"error against float64: {', '.join(kind)}",
            *("nats; gradients relative", "token", "response", "loss", "dH", "dW"),
        )
        for entry in results["accuracy"]:
            if (entry["dtype"], entry["inputs"]) == kind:
                keys = ("token_logps", "response_logps", "loss", "grad_hidden", "grad_weight")
                cells = [f"{entry[key]:.1e}" if key in entry else "" for key in keys]
                table.add_row(
                    entry["peer"], *cells, style="bold" if entry["peer"] in OURS else None
                )
        yield table


def _training_table(results: dict[str, Any]) -> Table:
    table = new_table(
        "whole training step, SmolLM2-135M, 2 pairs of 256 tokens",
        *("", "method", "a step", "of DPOTrainer", "peak MB"),
        text=2,
    )
    for entry in results["training"]:
        table.add_row(
            entry["peer"],
            entry["method"],
            f"{statistics.median(entry['seconds']):.2f} s",
            escape(_ratio(entry["ratio"])),
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


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}–{ratio['high']:.2f}]"


# --- the project's README -----------------------------------------------------------------------


def markdown_tables(results: dict[str, Any]) -> dict[str, str]:
    """Tables of a run by name, as the README shows them between `<!-- name -->` markers.

    Args:
        results: bench.json, or what `bench/on_gpu.py confirm` has written.
    """
    if results.get("stage") == "confirm":
        return {"gpu": _markdown_gpu(results), "gpu training": _markdown_gpu_training(results)}
    return {
        "speed": _markdown_speed(results),
        "pairs": _markdown_pairs(results),
        "training": _markdown_training(results),
        "accuracy": _markdown_accuracy(results),
        "predicted": _markdown_predicted(),
    }


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
                seconds, peak = statistics.median(entry["seconds"]), memory[workload, name]
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
    """Peak memory as pairs are added."""
    of_pairs = [entry for entry in results["sweeps"] if entry["axis"] == "pairs"]
    found = {(entry["peer"], entry["size"]): entry["bytes"] for entry in of_pairs}
    sizes = sorted({size for _, size in found})
    rows = [
        [_emphasised(name), *(f"{found[name, n] / MB:,.0f} MB" for n in sizes)]
        for name in dict.fromkeys(entry["peer"] for entry in of_pairs)
    ]
    return _markdown(["", *(f"{n} pairs" for n in sizes)], rows)


def _markdown_training(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{_emphasised(entry['peer'])}, {entry['method']}",
            f"{statistics.median(entry['seconds']):.2f} s",
            _ratio(entry["ratio"]),
            f"{entry['bytes'] / MB:,.0f} MB",
        ]
        for entry in results["training"]
    ]
    return _markdown(["", "a step", "of DPOTrainer", "peak memory"], rows)


def _markdown_gpu(results: dict[str, Any]) -> str:
    """Times and peaks of every peer, the goals beside what they are of."""
    parts = _parts(results)
    rows = []
    for head, label in (
        ("head trains", ""),
        ("head frozen", ", head frozen"),
        ("small", ", small"),
    ):
        times, peaks = parts.get(f"times, {head}", {}), parts.get(f"peaks, {head}", {})
        of = {row["what"]: row["peak MB"] for row in peaks.get("of", [])}
        goals: dict[str, list[str]] = {}
        for goal in times.get("goals", []) + peaks.get("goals", []):
            goals.setdefault(goal["goal"], []).append(_goal(goal))
        timed = {row["what"]: row for row in times.get("of", [])}
        for name in dict.fromkeys([*timed, *of]):
            row = timed.get(name, {})
            cells = [
                f"{row['ms']['median']:.2f} ms" if row else "",
                _ratio(row.get("of naive") or None),
                f"{of[name]:,.0f} MB" if name in of else "",
                "; ".join(goals.get(name, [])),
            ]
            emphasised = f"**{name}**" if name.startswith("fastpref") else name
            rows.append([emphasised + label, *cells])
    hardware = results["environment"]["hardware"]
    return _markdown([hardware, "time", "of naive", "peak memory", "goals"], rows)


def _goal(goal: dict[str, Any]) -> str:
    """What was found, of what, and what was wanted."""
    if goal["met"] is None:
        return f"not measured: {goal['why']}"
    found, sign = goal["found"], "≤" if "at most" in goal else "≥"
    value = f"{found['median']:.2f}" if isinstance(found, dict) else f"{found:,.1f}"
    of = "" if goal["than"] in ("MB", "TFLOP/s") else "of "
    limit = goal.get("at most", goal.get("at least"))
    return f"{value} {of}{goal['than']} ({'met' if goal['met'] else 'missed'}, {sign} {limit:,g})"


def _markdown_gpu_training(results: dict[str, Any]) -> str:
    found = _parts(results).get("training step", {})
    rows = [
        [
            f"**{row['step']}**" if row["step"] in OURS else row["step"],
            f"{row['ms']['median']:.1f} ms",
            _ratio(row["of naive"]),
            f"{row['peak MB']:,.0f} MB",
        ]
        for row in found.get("of", [])
    ]
    return _markdown(
        [found.get("model", "not measured"), "a step", "of naive", "peak memory"], rows
    )


def _parts(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of the parts that are done."""
    return {part["name"]: part["result"] for part in results["parts"] if part["status"] == "done"}


def _markdown_predicted() -> str:
    """Arithmetic, no measurement: an 8 B model's head on a GPU, as `fastpref plan` has it."""
    rows = []
    for lora in (False, True):
        problem = problem_for(4096, 128256, pairs=8, length=1024, lora=lora)
        found = estimates(problem)
        trl = next(each.extra_bytes for each in found if each.name.startswith("TRL"))
        for each in found:
            cells = [
                each.name.replace("_", " ") + ", head frozen" * lora,
                f"{each.products:g} U",
                f"{1e3 * each.floor_seconds(GPUS['h200']):.0f} ms",
                f"{each.extra_bytes / 1e9:.2f} GB",
                f"{each.extra_bytes / trl:.2f}",
            ]
            rows.append(cells)
    headings = ["unmeasured", "products", "no faster than", "peak memory", "of TRL's"]
    return _markdown(headings, rows)


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
        if was and entry["peer"] in OURS and entry["low"] > MEMORY_NOISE * was["high"]:
            found.append(
                f"larger: {entry['peer']}, {entry['workload']}: {was['bytes'] / MB:,.0f} MB "
                f"became {entry['bytes'] / MB:,.0f} MB"
            )
    return found


def main(readme: Path, source: Path) -> None:
    """Renews the tables of `readme` that come from `source`; ends where there is none to renew."""
    results, text = json.loads(source.read_text()), readme.read_text()
    if results["environment"].get("rehearsal"):
        sys.exit(f"{source} is a rehearsal: its numbers mean nothing")
    tables = markdown_tables(results)
    if not any(f"<!-- {name} -->" in text for name in tables):
        markers = ", ".join(f"<!-- {name} --> … <!-- end {name} -->" for name in tables)
        sys.exit(f"{readme} has no place for these tables: put {markers} where they belong")
    readme.write_text(insert_tables(text, tables))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
