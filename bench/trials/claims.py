"""What the two papers say, the arms that it is about, and what here speaks for or against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trials.summary import Estimate, Study, difference, estimate, seeds_of, shared_seeds

HOLDS, CONTRADICTS, UNCLEAR = "holds", "contradicts", "does not show"
NOT_RUN, ONE_SEED = "not run", "one seed"
VERDICTS = {1: HOLDS, 0: UNCLEAR, -1: CONTRADICTS}
ALIKE = 0.05  # accuracies that differ by less than this are called alike
# Two numbers of four digits are each off by 5e-4 of themselves at most.
ROUNDING = 1.0011

Measure = Callable[[Study], tuple[str, str]]  # what was measured, verdict


@dataclass(frozen=True)
class Claim:
    text: str
    arms: tuple[str, ...]
    measured: Measure

    def judged(self, study: Study) -> tuple[str, str]:
        """What was measured, and the verdict on it."""
        shared = shared_seeds(study, *self.arms)
        if not shared:
            missing = [arm for arm in self.arms if arm not in study["arms"]]
            return f"waits for {', '.join(missing or self.arms)}", NOT_RUN
        seen, verdict = self.measured(study)
        return seen, ONE_SEED if len(shared) == 1 else verdict

    def same_settings(self, study: Study) -> bool:
        """Whether learning rate and β's factor are those of all its arms that have been run."""
        arms = [study["arms"][arm] for arm in self.arms if arm in study["arms"]]
        return len({(arm["rate"], arm["factor"]) for arm in arms}) <= 1


def above(first: str, second: str, metric: str, form: str) -> tuple[tuple[str, ...], Measure]:
    """The first arm's number is the larger."""

    def measured(study: Study) -> tuple[str, str]:
        seen, by = compared(study, first, second, metric, form)
        return seen, VERDICTS[by.shows]

    return (first, second), measured


def alike(first: str, second: str, metric: str, form: str) -> tuple[tuple[str, ...], Measure]:
    """The two differ by less than `ALIKE`, whatever seeds and pairs leave open of it."""

    def measured(study: Study) -> tuple[str, str]:
        seen, by = compared(study, first, second, metric, form)
        if abs(by.mean) + max(by.spread, 2 * by.error) < ALIKE:
            return seen, HOLDS
        return seen, CONTRADICTS if by.shows else UNCLEAR

    return (first, second), measured


def negative(arm: str, metric: str, form: str) -> tuple[tuple[str, ...], Measure]:
    def measured(study: Study) -> tuple[str, str]:
        found = estimate(seeds_of(study, arm, metric))
        seen = f"{metric_name(metric)} {shown(found, form)}{_of_pairs(found, form)}"
        return seen, VERDICTS[-found.shows]

    return (arm,), measured


def equal_unclipped(arm: str) -> tuple[tuple[str, ...], Measure]:
    """No pair that is not clipped is out of balance, to the digits that a run keeps."""

    def measured(study: Study) -> tuple[str, str]:
        metric = "largest imbalance, unclipped"
        worst = max(estimate(seeds_of(study, arm, metric)).seeds)
        return f"{metric_name(metric)} {worst:.4f}", HOLDS if worst <= ROUNDING else CONTRADICTS

    return (arm,), measured


def rises(arm: str, weight: str, sign: int) -> tuple[tuple[str, ...], Measure]:
    """A weight of the last fifth of pairs is above (1) or below (-1) that of the first."""

    def measured(study: Study) -> tuple[str, str]:
        runs = study["arms"][arm]["seeds"]
        bins = {seed: run["weights"][weight] for seed, run in runs.items()}
        first, last = (
            estimate({seed: [found[place][1]] for seed, found in bins.items()}) for place in (0, -1)
        )
        by = estimate({seed: [found[-1][1] - found[0][1]] for seed, found in bins.items()})
        of, against = weight.split(" by ")
        seen = f"{of} weight {shown(first, '.3f')} in the fifth of least {against}"
        seen += f", {shown(last, '.3f')} in that of most"
        return seen, VERDICTS[sign * by.shows]

    return (arm,), measured


def compared(study: Study, first: str, second: str, metric: str, form: str) -> tuple[str, Estimate]:
    seeds = [seeds_of(study, arm, metric) for arm in (first, second)]
    by = difference(*seeds)
    a, b = (shown(estimate(each), form) for each in seeds)
    seen = f"{metric_name(metric)} {a} against {b}: {shown(by, '+' + form)}{_of_pairs(by, form)}"
    return seen, by


def shown(found: Estimate, form: str) -> str:
    """Mean, and the least and the largest of the seeds."""
    numbers = (found.mean, min(found.seeds), max(found.seeds))
    mean, low, high = (f"{number:{form}}".replace("-", "−") for number in numbers)
    return f"{mean} [{low}, {high}]"


def _of_pairs(found: Estimate, form: str) -> str:
    return f" ± {found.error:{form}} of pairs" if found.error else ""


NAMES = {
    "chosen": "chosen log ratio",
    "rejected": "rejected log ratio",
    "both": "sum of both log ratios",
    "largest imbalance, unclipped": "largest factor between the two gradients",
    "imbalance": "typical factor between the two gradients",
}


def metric_name(metric: str) -> str:
    return NAMES.get(metric, metric)


NATS, SHARE, FACTOR = ".2f", ".3f", "#.3g"
CLAIMS = {
    "AdaDPO": (
        Claim(
            "DPO pushes rejected responses down faster than chosen ones up",
            *negative("DPO", "both", NATS),
        ),
        Claim("Under DPO even the chosen ones fall", *negative("DPO", "chosen", NATS)),
        Claim(
            "AdaDPO makes the two gradients of a pair equal where nothing is clipped",
            *equal_unclipped("AdaDPO"),
        ),
        Claim(
            "With its clipping too they are closer than DPO's",
            *above("DPO", "AdaDPO", "imbalance", FACTOR),
        ),
        Claim("AdaDPO lifts chosen responses above DPO's", *above("AdaDPO", "DPO", "chosen", NATS)),
        Claim("Its reward margin is above DPO's", *above("AdaDPO", "DPO", "margin", NATS)),
        Claim("Its reward accuracy is above DPO's", *above("AdaDPO", "DPO", "accuracy", SHARE)),
        Claim(
            "Policy space and ratio space do alike",
            *alike("AdaDPO", "AdaDPO, ratio space", "accuracy", SHARE),
        ),
        Claim(
            "Ceilings from 1.5 to 2.5 do alike (here 2 and 1.5)",
            *alike("AdaDPO", "AdaDPO, ceiling 1.5", "accuracy", SHARE),
        ),
        Claim(
            "A ceiling of 5 hurts (beside 2)",
            *above("AdaDPO", "AdaDPO, ceiling 5", "accuracy", SHARE),
        ),
        Claim("So does none", *above("AdaDPO", "AdaDPO, no ceiling", "accuracy", SHARE)),
        Claim(
            "Probabilities per token do better than those of whole sequences",
            *above("AdaDPO", "AdaDPO, per sequence", "accuracy", SHARE),
        ),
        Claim(
            "The balance improves other objectives too (here SimPO)",
            *above("SimPO, balanced", "SimPO", "accuracy", SHARE),
        ),
    ),
    "Uni-DPO": (
        Claim(
            "Pairs of a large score gap weigh more",
            *rises("Uni-DPO", "quality by score gap", 1),
        ),
        Claim(
            "Pairs that are fitted weigh less",
            *rises("Uni-DPO", "performance by margin", -1),
        ),
        Claim(
            "The calibrated NLL keeps chosen responses up",
            *above("Uni-DPO", "Uni-DPO without NLL", "chosen", NATS),
        ),
        Claim("Uni-DPO does better than DPO", *above("Uni-DPO", "DPO", "accuracy", SHARE)),
        Claim(
            "And better than SimPO",
            *above("Uni-DPO", "SimPO", "accuracy of averages", SHARE),
        ),
        *(
            Claim(
                f"Its {part} helps",
                *above("Uni-DPO", f"Uni-DPO without {name}", "accuracy", SHARE),
            )
            for part, name in (
                ("quality weight", "quality"),
                ("performance weight", "performance"),
                ("NLL term", "NLL"),
            )
        ),
    ),
    "neither paper": (
        Claim(
            "A balance improves Uni-DPO",
            *above("Uni-DPO, balanced", "Uni-DPO", "accuracy", SHARE),
        ),
        Claim(
            "A balance lifts Uni-DPO's chosen responses",
            *above("Uni-DPO, balanced", "Uni-DPO", "chosen", NATS),
        ),
        Claim(
            "Exponents of 1/2 on both sides do as well as AdaDPO's",
            *alike("AdaDPO, symmetric", "AdaDPO", "accuracy", SHARE),
        ),
    ),
}
