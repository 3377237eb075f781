"""What the objectives do to a real model: trains each of them alike, and writes what was seen.

    python bench/study.py run --model DIR --data PAIRS.jsonl --out bench/results/study
    python bench/study.py page --runs bench/results/study/runs --out bench/results
    python bench/study.py properties

A run of all takes hours on two cores. Each training's numbers are a file of their own in OUT/runs
as it ends, and what is there is not trained again: the command may be stopped at any time and given
again, and `--minutes` stops it by itself. `--quick` goes through everything at sizes that show
nothing. `page` makes study.json, the charts and STUDY.md's tables of the runs that have ended.
`properties` needs no model: what balanced gradients and Uni-DPO's are, on fixed states.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from trials.arms import ABLATIONS, BETA_FACTORS, MAIN, RATES, Arm
from trials.charts import write_charts
from trials.page import tables
from trials.properties import balance_report, unidpo_report
from trials.summary import save, study_of
from trials.training import Bench, Sizes, accuracy

from fastpref.commands.benchmark.report import insert_tables
from fastpref.commands.tables import new_table, show

PAGE = Path(__file__).with_name("STUDY.md")
app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="A SmolLM2 checkpoint.", file_okay=False)],
    data: Annotated[Path, typer.Option(help="Scored pairs.", exists=True)],
    out: Annotated[Path, typer.Option(help="Directory of the results.")],
    quick: Annotated[bool, typer.Option(help="Sizes that show nothing, in minutes.")] = False,
    minutes: Annotated[float, typer.Option(help="Begins no training after these.")] = float("inf"),
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 2,
) -> None:
    """Trains what has not been trained yet."""
    torch.set_num_threads(threads)
    ends = time.monotonic() + 60 * minutes
    sizes = Sizes.quick() if quick else Sizes()
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    console = Console()
    with console.status("log-probabilities of all pairs under the checkpoint"):
        bench = Bench(model, data, sizes, out / "references.json")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        trials = Trials(bench, runs, progress, ends)
        try:
            chosen = {arm.name: trials.sweep(arm) for arm in MAIN}
            for seed in sizes.seeds:
                for arm in (*MAIN, *ABLATIONS):
                    trials.train(arm, *chosen[arm.like], seed)
        except TimeIsUp:
            console.print(f"{minutes:g} minutes are over; the same command goes on from here")


@app.command()
def page(
    runs: Annotated[Path, typer.Option(help="OUT/runs of `run`.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Directory of study.json and the charts.")],
    text: Annotated[
        Path, typer.Option(help="The page whose tables are renewed.", exists=True, dir_okay=False)
    ] = PAGE,
    quick: Annotated[bool, typer.Option(help="The runs are of `run --quick`.")] = False,
) -> None:
    """Summarises the runs that have ended."""
    try:
        found = study_of(runs, Sizes.quick() if quick else Sizes())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--runs") from error
    out.mkdir(parents=True, exist_ok=True)
    save(found, out / "study.json")
    charts = write_charts(found, out)
    text.write_text(insert_tables(text.read_text(), tables(found)))
    print(*[text, out / "study.json", *charts], sep="\n")


@app.command()
def properties() -> None:
    """What holds of gradients without training."""
    console = Console()
    for title, report in (
        ("chosen over rejected |∂L/∂ρ| / p̄ of balanced objectives, from 1", balance_report()),
        ("Uni-DPO's gradient, from its closed form, relative", unidpo_report()),
    ):
        table = new_table(title, "", "at most")
        for name, error in report.items():
            table.add_row(name, f"{error:.1e}")
        show(console, table)


class TimeIsUp(Exception):
    """No training is begun any more."""


class Trials:
    """Trainings by name, each a file of `directory` once it has ended."""

    def __init__(self, bench: Bench, directory: Path, progress: Progress, ends: float) -> None:
        self.bench, self.directory, self.progress, self.ends = bench, directory, progress, ends

    def sweep(self, arm: Arm) -> tuple[float, float]:
        """Learning rate and factor of β: the rate at the default β, then β at that rate.

        Judged by the accuracy of the objective's own reward on the validation pairs; of equal ones
        by the smaller step away from the checkpoint.
        """
        found = {(rate, 1.0): self._swept(arm, rate, 1.0) for rate in RATES}
        rate, _ = max(found, key=lambda key: (found[key], -key[0]))
        found |= {(rate, factor): self._swept(arm, rate, factor) for factor in BETA_FACTORS}
        at_rate = {key: value for key, value in found.items() if key[0] == rate}
        return max(at_rate, key=lambda key: (at_rate[key], key[1]))

    def _swept(self, arm: Arm, rate: float, factor: float) -> float:
        sizes = self.bench.sizes
        name = f"sweep, {arm.name}, rate {rate:g}, beta x{factor:g}"
        result = self._kept(
            name, arm, factor, rate=rate, steps=sizes.sweep_steps, seed=sizes.seeds[0],
            judged_on="validation",
        )  # fmt: skip
        return accuracy(result["validation"])

    def train(self, arm: Arm, rate: float, factor: float, seed: int) -> dict[str, Any]:
        steps = self.bench.sizes.steps
        name = f"{arm.name}, seed {seed}"
        return self._kept(name, arm, factor, rate=rate, steps=steps, seed=seed, judged_on="heldout")

    def _kept(self, name: str, arm: Arm, factor: float, **settings: Any) -> dict[str, Any]:
        objective = arm.with_beta(factor)
        path = self.directory / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            same = kept["objective"] == repr(objective) and kept["rate"] == settings["rate"]
            if same and kept["steps"] == settings["steps"]:
                return kept
        if time.monotonic() > self.ends:
            raise TimeIsUp
        task = self.progress.add_task(name, total=settings["steps"])
        result = self.bench.run(
            objective, **settings, step_done=lambda: self.progress.advance(task)
        )
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"name": name, "arm": arm.name} | result) + "\n")
        part.replace(path)
        return result


if __name__ == "__main__":
    app()
