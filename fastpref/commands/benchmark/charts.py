"""A run as pictures: every peer on one workload, and how time and memory grow."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from fastpref.commands.benchmark.peers import OURS
from fastpref.commands.benchmark.report import MB


def write_results(results: dict[str, Any], directory: Path) -> Path:
    """`bench.json` in `directory`; `trainer.json` of a run of trainers."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("trainer.json" if "trainer" in results else "bench.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def write_charts(results: dict[str, Any], directory: Path) -> list[Path]:
    """`peers.png` and, where sizes were varied, `scaling.png`; of trainers `trainer.png`."""
    if "trainer" in results:
        return [_trainer_chart(results, directory / "trainer.png")]
    charts = [_peers_chart(results, directory / "peers.png")]
    if results["sweeps"]:
        charts.append(_scaling_chart(results, directory / "scaling.png"))
    return charts


def _peers_chart(results: dict[str, Any], path: Path) -> Path:
    """Time, memory and error by peer, of the first workload."""
    figure, panels = _figure(1, 3, (13, 4))
    workload = results["speed"][0]["workload"]
    timed = [
        entry
        for entry in results["speed"]
        if entry["workload"] == workload and entry["phase"] == "forward + backward"
    ]
    speed = {e["peer"]: statistics.median(e["seconds"]) for e in timed}
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
    titles = (
        "time of forward + backward, s",
        "peak memory beyond inputs, MB",
        "error of a response's log-probability\nfrom bf16 inputs, nats",
    )
    labels = ("{:.2f}", "{:,.0f}", "{:.0e}")
    for panel, values, title, label in zip(
        panels, (speed, memory, error), titles, labels, strict=True
    ):
        names = list(values)[::-1]
        colours = ["tab:green" if name in OURS else "tab:gray" for name in names]
        bars = panel.barh(names, [values[name] for name in names], color=colours)
        panel.bar_label(bars, [label.format(values[name]) for name in names], padding=3)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.25)
    if error:
        panels[2].set_xscale("log")
    figure.suptitle(f"{workload}  ·  {results['environment']['hardware']}", fontsize=11)
    return _save(figure, path)


def _trainer_chart(results: dict[str, Any], path: Path) -> Path:
    """Time of a step and peak memory beside stock TRL's, and trunk tokens, by workload."""
    workloads = list(dict.fromkeys(entry["workload"] for entry in results["trainer"]))
    figure, panels = _figure(len(workloads), 3, (13, 2.6 * len(workloads)))
    for row, workload in enumerate(workloads):
        entries = [e for e in results["trainer"] if e["workload"] == workload][::-1]
        names = [entry["peer"] for entry in entries]
        colours = ["tab:gray" if name == "DPOTrainer" else "tab:green" for name in names]
        columns = (
            ("a step, of DPOTrainer's", "{:.2f}", [e["ratio"]["median"] for e in entries]),
            ("peak memory, MB", "{:,.0f}", [e["bytes"] / MB for e in entries]),
            ("tokens through the trunk", "{:,.0f}", [e["trunk_tokens"] for e in entries]),
        )
        for panel, (title, label, values) in zip(panels[3 * row :], columns, strict=False):
            bars = panel.barh(names, values, color=colours)
            panel.bar_label(bars, [label.format(value) for value in values], padding=3)
            panel.set_title(f"{workload}: {title}", fontsize=10)
            panel.margins(x=0.25)
    hardware = results["environment"]["hardware"]
    figure.suptitle(f"{results['model']}, 4 pairs  ·  {hardware}", fontsize=11)
    return _save(figure, path)


def _scaling_chart(results: dict[str, Any], path: Path) -> Path:
    """Peak memory and time against rows, vocabulary and pairs."""
    axes = list(dict.fromkeys(entry["axis"] for entry in results["sweeps"]))
    figure, panels = _figure(2, len(axes), (4.3 * len(axes), 7))
    for column, axis in enumerate(axes):
        of_axis = [entry for entry in results["sweeps"] if entry["axis"] == axis]
        for name in dict.fromkeys(entry["peer"] for entry in of_axis):
            of_peer = [entry for entry in of_axis if entry["peer"] == name]
            sizes = [entry["size"] for entry in of_peer]
            style = {"marker": "o", "label": name, "ls": "-" if name in OURS else "--"}
            panels[column].plot(sizes, [entry["bytes"] / MB for entry in of_peer], **style)
            panels[column + len(axes)].plot(sizes, [e["seconds"] for e in of_peer], **style)
        first = of_axis[0]["workload"]
        panels[column].set_title(f"more {axis} than in\n{first}", fontsize=9)
        for panel in (panels[column], panels[column + len(axes)]):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted({entry["size"] for entry in of_axis})
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
            panel.set_xlabel({"rows": "scored rows", "vocabulary": "vocabulary"}.get(axis, axis))
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.yaxis.set_minor_formatter("")
            panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("peak memory beyond inputs, MB")
    panels[len(axes)].set_ylabel("forward + backward, s")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names))
    figure.suptitle(results["environment"]["hardware"], fontsize=11)
    return _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
