"""The study as pictures, each to be read alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from trials.arms import ABLATIONS, ARMS, MAIN
from trials.summary import Seeds, Study, difference, estimate, longer, seeds_of, shared_seeds, some

SPAN = 5  # steps that a line of the training is a mean of
SIDES = {"chosen": "tab:green", "rejected": "tab:red"}


def write_charts(study: Study, directory: Path) -> list[Path]:
    """`study-*.png` in `directory`; those of arms without runs are left out."""
    charts = {
        "logps": _logps,
        "gradients": _gradients,
        "balance": _balance,
        "weights": _weights,
        "heldout": _heldout,
        "lengths": _lengths,
        "ablations": _ablations,
    }
    written = []
    for name, draw in charts.items():
        figure = draw(study)
        if figure is not None:
            FigureCanvasAgg(figure)
            written.append(directory / f"study-{name}.png")
            figure.savefig(written[-1], dpi=110)
    return written


def _logps(study: Study) -> Figure:
    figure, panels = _training(study, "log_ratio")
    for panel in panels:
        panel.axhline(0, color="black", lw=0.8)
    figure.supylabel("log-probability minus the reference's, nats a response")
    return _titled(figure, study, "What training does to the chosen and to the rejected response")


def _gradients(study: Study) -> Figure:
    figure, panels = _training(study, "gradient")
    for panel in panels:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
    figure.supylabel("|∂L/∂ρ| / p̄, geometric mean")
    title = (
        "Gradient ∂L/∂ρ of a response's log-probability, over its mean token probability p̄: where "
        "AdaDPO balances, both sides are one line"
    )
    return _titled(figure, study, title)


def _training(study: Study, kind: str) -> tuple[Figure, list[Any]]:
    """Both sides of every main arm, a panel an arm and a line a seed."""
    names = [arm.name for arm in MAIN if arm.name in study["arms"]]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns + 0.6, 2.5 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, name in zip(grid, names, strict=False):
        for run in study["arms"][name]["seeds"].values():
            for side, colour in SIDES.items():
                _line(panel, study, run["curves"][f"{kind}/{side}"], color=colour, alpha=0.7)
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in grid[len(names) :]:
        panel.remove()
    for panel in grid[len(names) - columns : len(names)]:
        panel.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("pairs trained on")
    lines = [figure.axes[0].plot([], [], color=SIDES[side], label=side)[0] for side in SIDES]
    figure.legend(handles=lines, loc="outside lower right", ncols=2)
    return figure, list(grid[: len(names)])


def _line(panel: Any, study: Study, values: Sequence[float], **style: Any) -> None:
    span = min(SPAN, len(values))
    means = [sum(values[end - span : end]) / span for end in range(span, len(values) + 1)]
    places = [study["sizes"]["batch"] * end for end in range(span, len(values) + 1)]
    panel.plot(places, means, **style)


def _balance(study: Study) -> Figure | None:
    """Coefficients and clipped pairs of the arms that have a balance."""
    found = {
        name: [run["curves"] for run in arm["seeds"].values()]
        for name, arm in study["arms"].items()
        if all("balance/clipped" in run["curves"] for run in arm["seeds"].values())
    }
    if not found:
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    curves = {
        "balance/chosen": "coefficient of the chosen reward",
        "balance/clipped": "share clipped",
    }
    for panel, (curve, label) in zip(panels, curves.items(), strict=True):
        for number, (name, runs) in enumerate(found.items()):
            steps = zip(*(run[curve] for run in runs), strict=True)
            means = [sum(step) / len(step) for step in steps]
            style = "-" if name in (arm.name for arm in MAIN) else "--"
            _line(panel, study, means, label=name, color=f"C{number}", ls=style)
        panel.set_ylabel(label)
        panel.set_xlabel("pairs trained on")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=9)
    return _titled(figure, study, "What the balance does, means of the seeds")


def _weights(study: Study) -> Figure | None:
    """Uni-DPO's two weights by what they are looked at against, a line a seed."""
    if "Uni-DPO" not in study["arms"]:
        return None
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    labels = {
        "quality by score gap": ("chosen score minus rejected, of 10", "quality weight"),
        "performance by margin": (
            "margin of the averages against the reference, nats a token",
            "performance weight",
        ),
    }
    for panel, (weight, (by, label)) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for seed, run in study["arms"]["Uni-DPO"]["seeds"].items():
            panel.plot(*zip(*run["weights"][weight], strict=True), "o-", label=f"seed {seed}")
        panel.set_xlabel(by)
        panel.set_ylabel(label)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panel.legend()
    title = "Uni-DPO's weights in the second half of training, means of fifths of the pairs"
    return _titled(figure, study, title)


HELDOUT = {
    "accuracy": "accuracy of its own reward",
    "margin": "chosen minus rejected\nlog ratio, nats",
    "chosen": "chosen log ratio,\nnats a response",
    "rejected": "rejected log ratio,\nnats a response",
    "KL": "KL to the reference,\nnats a token",
}


def _heldout(study: Study) -> Figure:
    """What every arm came to, seeds as dots."""
    names = [name for name in ARMS if name in study["arms"]][::-1]
    figure = Figure(figsize=(15, 0.36 * len(names) + 1.7), layout="constrained")
    panels = figure.subplots(1, len(HELDOUT), sharey=True)
    for panel, (metric, title) in zip(panels, HELDOUT.items(), strict=True):
        for place, name in enumerate(names):
            _dots(panel, place, seeds_of(study, name, metric), _colour(name))
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        panel.margins(y=0.01)
        panel.locator_params(axis="x", nbins=4)
    panels[0].axvline(0.5, color="black", lw=0.8)  # a guess
    for panel in panels[1:4]:
        panel.axvline(0, color="black", lw=0.8)
    panels[0].set_yticks(range(len(names)), names)
    title = (
        "On held-out pairs and prompts: bars are means of the seeds, which are the dots; lines two "
        "standard errors over the pairs; blue: swept, gray: ablations"
    )
    return _titled(figure, study, title)


def _lengths(study: Study) -> Figure:
    """Margins of the main arms by which response is the longer."""
    names = [arm.name for arm in MAIN if arm.name in study["arms"]][::-1]
    figure = Figure(figsize=(11, 0.36 * len(names) + 1.9), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    kinds = {1: "longer than rejected", 0: "as long as rejected", -1: "shorter than rejected"}
    for panel, (sign, kind) in zip(panels, kinds.items(), strict=True):
        places = longer(study, sign)
        for row, name in enumerate(names):
            if places:
                _dots(panel, row, some(seeds_of(study, name, "margin"), places), "tab:blue")
        panel.axvline(0, color="black", lw=0.8)
        panel.set_title(f"chosen {kind}: {len(places)} pairs", fontsize=10)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    figure.supxlabel("chosen minus rejected log ratio, nats", fontsize=10)
    title = (
        "Held-out margins by length: bars are means of the seeds, which are the dots; lines two "
        "standard errors over the pairs"
    )
    return _titled(figure, study, title)


def _ablations(study: Study) -> Figure | None:
    """Differences from the arm whose settings an ablation has."""
    arms = [arm for arm in ABLATIONS if shared_seeds(study, arm.name, arm.like)][::-1]
    if not arms:
        return None
    metrics = {name: HELDOUT[name] for name in ("accuracy", "margin", "chosen", "KL")}
    figure = Figure(figsize=(14, 0.42 * len(arms) + 1.7), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True)
    for panel, (metric, title) in zip(panels, metrics.items(), strict=True):
        for place, arm in enumerate(arms):
            of_arm, of_like = (seeds_of(study, name, metric) for name in (arm.name, arm.like))
            by = difference(of_arm, of_like)
            panel.plot(by.seeds, [place] * len(by.seeds), "k.")
            panel.errorbar(by.mean, place, xerr=2 * by.error, fmt="D", color="tab:gray", capsize=3)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(arms)), [f"{arm.name}\nfrom {arm.like}" for arm in arms])
    title = (
        "Ablations, held out: differences from the whole method at the same settings; diamonds are "
        "means of the seeds, which are the dots; lines two standard errors over the pairs"
    )
    return _titled(figure, study, title)


def _dots(panel: Any, place: int, seeds: Seeds, colour: str) -> None:
    found = estimate(seeds)
    panel.barh(place, found.mean, color=colour, alpha=0.45)
    if found.error:
        panel.errorbar(found.mean, place, xerr=2 * found.error, color=colour, capsize=3)
    panel.plot(found.seeds, [place] * len(found.seeds), "k.")


def _colour(name: str) -> str:
    return "tab:blue" if any(name == arm.name for arm in MAIN) else "tab:gray"


def _titled(figure: Figure, study: Study, title: str) -> Figure:
    sizes = study["sizes"]
    seeds = max(len(arm["seeds"]) for arm in study["arms"].values())
    under = (
        f"SmolLM2-135M-Instruct, LoRA, {sizes['steps']} steps of {sizes['batch']} pairs, "
        f"up to {seeds} seeds; {study['pairs']['heldout']} pairs held out"
    )
    figure.suptitle(f"{title}\n{under}", fontsize=11)
    return figure
