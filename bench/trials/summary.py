"""Runs as numbers: what study.json holds of them, and what several seeds together show."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials.arms import ARMS, BETA_FACTORS
from trials.measures import Table
from trials.properties import balance_report, unidpo_report
from trials.training import Sizes, accuracy, rounded

from fastpref.commands.benchmark.measure import environment

Study = dict[str, Any]
BINS = 5  # of pairs, by what a weight is looked at against


def study_of(directory: Path, sizes: Sizes) -> Study:
    """What study.json holds, of the runs of `directory` and the references beside it.

    Log ratios are policy minus reference, nats a response. What is seen of training is of its
    second half, curves aside.

    Raises:
        ValueError: no run has ended, or runs that do not belong together.
    """
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    ended = [run for run in runs if "heldout" in run]
    if not ended:
        raise ValueError(f"{directory} has no run of an arm that has ended")
    _check(runs, sizes)
    references = json.loads((directory.parent / "references.json").read_text())
    held = ended[0]["heldout"]
    lengths = [held["length/chosen"], held["length/rejected"]]
    reference = [
        chosen / n_chosen - rejected / n_rejected
        for (chosen, rejected), n_chosen, n_rejected in zip(
            references["heldout"], *lengths, strict=True
        )
    ]
    about = environment("cpu")
    study = {
        "about": {name: about[name] for name in ("hardware", "versions", "date")},
        "hours": sum(run["seconds"] for run in runs) / 3600,
        "sizes": dataclasses.asdict(sizes),
        "pairs": {part: len(found) for part, found in references.items()},
        "properties": {"balance": balance_report(), "unidpo": unidpo_report()},
        "heldout": {
            "chosen length": lengths[0],
            "rejected length": lengths[1],
            "score gap": held["gap"],
            "reference's margin of averages": reference,
        },
        "sweep": {name: _sweep(runs, name) for name in ARMS if _sweep(runs, name)},
        "arms": {name: _arm(ended, name, sizes) for name in ARMS if _of(ended, name)},
    }
    return rounded(study)


def _check(runs: Sequence[dict[str, Any]], sizes: Sizes) -> None:
    for run in runs:
        steps = sizes.steps if "heldout" in run else sizes.sweep_steps
        if run["steps"] != steps or len(run["training"]["margin"]) != steps * sizes.batch:
            raise ValueError(f"{run['name']}: {run['steps']} steps, where {steps} are looked for")
        if run["arm"] not in ARMS:
            raise ValueError(f"{run['name']}: no arm of the study is called {run['arm']}")
    ended = [run for run in runs if "heldout" in run]
    for name in {run["arm"] for run in ended}:
        settings = {(run["objective"], run["rate"]) for run in _of(ended, name)}
        if len(settings) > 1:
            raise ValueError(f"{name}: seeds of different settings, {sorted(settings)}")
    for key in ("length/chosen", "length/rejected", "gap"):
        if any(run["heldout"][key] != ended[0]["heldout"][key] for run in ended):
            raise ValueError("runs have been judged on different held-out pairs")


def _of(runs: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["arm"] == name]


def _factor(run: dict[str, Any]) -> float:
    """Of β's default."""
    arm = ARMS[run["arm"]]
    for factor in (1.0, *BETA_FACTORS):
        if repr(arm.with_beta(factor)) == run["objective"]:
            return factor
    raise ValueError(f"{run['name']}: {run['objective']} is not of the arm {arm.name}")


def _sweep(runs: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """What each setting came to on the validation pairs, at their default β by rate, then by β."""
    found = [
        {
            "rate": run["rate"],
            "factor": _factor(run),
            "accuracy": accuracy(run["validation"]),
            "chosen": statistics.mean(run["validation"]["log_ratio/chosen"]),
            "rejected": statistics.mean(run["validation"]["log_ratio/rejected"]),
        }
        for run in _of(runs, name)
        if "validation" in run
    ]
    return sorted(found, key=lambda each: (each["factor"] != 1, each["rate"], each["factor"]))


def _arm(runs: Sequence[dict[str, Any]], name: str, sizes: Sizes) -> dict[str, Any]:
    of_arm = sorted(_of(runs, name), key=lambda run: run["seed"])
    return {
        "objective": of_arm[0]["objective"],
        "rate": of_arm[0]["rate"],
        "factor": _factor(of_arm[0]),
        "seeds": {str(run["seed"]): summarise(run, sizes) for run in of_arm},
    }


def summarise(run: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """What one run came to: of each held-out pair, in numbers, by weight, and by step."""
    held, training = run["heldout"], run["training"]
    late = {name: values[len(values) // 2 :] for name, values in training.items()}
    summary = {
        "minutes": run["seconds"] / 60,
        "heldout": {
            "margin": held["margin"],
            "chosen": held["log_ratio/chosen"],
            "rejected": held["log_ratio/rejected"],
        },
        "numbers": {
            "KL": run["drawn"]["divergence"],
            "drawn length": run["drawn"]["length"],
            **_numbers(late),
        },
        "curves": {
            name: [_mean_of(name, step) for step in _steps(values, sizes.batch)]
            for name, values in training.items()
            if name.startswith(("log_ratio/", "gradient/", "balance/", "weights/"))
        },
    }
    if "weights/quality" in late:
        summary["weights"] = {
            "quality by score gap": in_bins(late["gap"], late["weights/quality"]),
            "performance by margin": in_bins(late["margin"], late["weights/performance"]),
        }
    return summary


def _numbers(late: Table) -> dict[str, float]:
    """Of gradients: chosen over rejected, and how far apart, whichever is the larger."""
    apart = [
        math.log(chosen / rejected)
        for chosen, rejected in zip(late["gradient/chosen"], late["gradient/rejected"], strict=True)
    ]
    numbers = {
        "gradient ratio": math.exp(statistics.mean(apart)),
        "imbalance": math.exp(statistics.mean(map(abs, apart))),
    }
    if "balance/clipped" in late:
        clipped = late["balance/clipped"]
        free = [abs(by) for by, is_clipped in zip(apart, clipped, strict=True) if not is_clipped]
        numbers |= {
            "share clipped": statistics.mean(clipped),
            "chosen coefficient": statistics.mean(late["balance/chosen"]),
            "rejected coefficient": statistics.mean(late["balance/rejected"]),
        }
        if free:
            numbers["largest imbalance, unclipped"] = math.exp(max(free))
    return numbers


def _steps(values: Sequence[float], batch: int) -> list[Sequence[float]]:
    return [values[first : first + batch] for first in range(0, len(values), batch)]


def _mean_of(name: str, values: Sequence[float]) -> float:
    """Geometric of gradients, which differ by factors."""
    is_factor = name.startswith("gradient/")
    return statistics.geometric_mean(values) if is_factor else statistics.mean(values)


def in_bins(by: Sequence[float], values: Sequence[float]) -> list[list[float]]:
    """Means of `by` and of `values` in fifths of the pairs, in rising order of `by`."""
    ordered = sorted(zip(by, values, strict=True))
    edges = [round(place * len(ordered) / BINS) for place in range(BINS + 1)]
    parts = [ordered[low:high] for low, high in zip(edges, edges[1:], strict=False) if high > low]
    return [[statistics.mean(column) for column in zip(*part, strict=True)] for part in parts]


def save(study: Study, path: Path) -> None:
    """As JSON, a line each list of numbers."""
    text = json.dumps(study, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")


# --- metrics ------------------------------------------------------------------------------------

Seeds = Mapping[str, Sequence[float]]  # of each seed: a number a held-out pair, or one of the run

# Of one run's held-out pairs and what all runs share about them.
HELDOUT: dict[str, Callable[[Table, Table], list[float]]] = {
    "chosen": lambda run, pairs: run["chosen"],
    "rejected": lambda run, pairs: run["rejected"],
    "both": lambda run, pairs: _each(lambda a, b: a + b, run["chosen"], run["rejected"]),
    "margin": lambda run, pairs: _each(lambda a, b: a - b, run["chosen"], run["rejected"]),
    "accuracy": lambda run, pairs: [float(m > 0) for m in run["margin"]],
    "accuracy of sums": lambda run, pairs: _each(
        lambda a, b: float(a > b), run["chosen"], run["rejected"]
    ),
    "accuracy of averages": lambda run, pairs: [float(m > 0) for m in _of_averages(run, pairs)],
    "accuracy without reference": lambda run, pairs: _each(
        lambda gained, had: float(gained + had > 0),
        _of_averages(run, pairs),
        pairs["reference's margin of averages"],
    ),
}


def _each(function: Callable[..., float], *values: Sequence[float]) -> list[float]:
    return [function(*each) for each in zip(*values, strict=True)]


def _of_averages(run: Table, pairs: Table) -> list[float]:
    """(ℓ̄_w − r̄_w) − (ℓ̄_l − r̄_l)"""
    lengths = pairs["chosen length"], pairs["rejected length"]
    return _each(lambda a, b, n, k: a / n - b / k, run["chosen"], run["rejected"], *lengths)


def seeds_of(study: Study, arm: str, metric: str) -> Seeds:
    runs = study["arms"][arm]["seeds"]
    if metric in HELDOUT:
        pairs = study["heldout"]
        return {seed: HELDOUT[metric](run["heldout"], pairs) for seed, run in runs.items()}
    return {seed: [run["numbers"][metric]] for seed, run in runs.items()}


def shared_seeds(study: Study, *arms: str) -> set[str]:
    """Those that all of the arms have been run with."""
    runs = (study["arms"].get(arm, {"seeds": {}})["seeds"] for arm in arms)
    return set.intersection(*map(set, runs))


def longer(study: Study, sign: int) -> list[int]:
    """Held-out pairs whose chosen response is longer (1), as long (0) or shorter (-1)."""
    held = study["heldout"]
    lengths = zip(held["chosen length"], held["rejected length"], strict=True)
    return [place for place, (a, b) in enumerate(lengths) if (a > b) - (a < b) == sign]


def some(seeds: Seeds, places: Sequence[int]) -> Seeds:
    return {seed: [values[place] for place in places] for seed, values in seeds.items()}


# --- several seeds ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number, or a difference, of every seed.

    Args:
        seeds: of each.
        error: standard error over the held-out pairs, which all seeds share; 0 of what is no mean
            over them.
    """

    seeds: tuple[float, ...]
    error: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.seeds)

    @property
    def spread(self) -> float:
        return max(self.seeds) - min(self.seeds)

    @property
    def shows(self) -> int:
        """Its sign: that of every seed, and it exceeds their spread and two standard errors.

        0 where it does not show, as of one seed alone.
        """
        if len(self.seeds) < 2 or abs(self.mean) <= max(self.spread, 2 * self.error):
            return 0
        return 1 if self.mean > 0 else -1


def estimate(seeds: Seeds) -> Estimate:
    means = tuple(statistics.mean(values) for values in seeds.values())
    of_pairs = [statistics.mean(values) for values in zip(*seeds.values(), strict=True)]
    error = statistics.stdev(of_pairs) / math.sqrt(len(of_pairs)) if len(of_pairs) > 1 else 0.0
    return Estimate(means, error)


def difference(first: Seeds, second: Seeds) -> Estimate:
    """Seed by seed and pair by pair: seeds share order, and all arms share held-out pairs."""
    return estimate(
        {
            seed: _each(lambda a, b: a - b, first[seed], second[seed])
            for seed in first
            if seed in second
        }
    )
