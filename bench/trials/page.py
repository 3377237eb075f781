"""The page: tables of study.json between the markers of STUDY.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from trials.arms import ABLATIONS, ARMS, MAIN
from trials.claims import (
    CLAIMS,
    CONTRADICTS,
    FACTOR,
    HOLDS,
    NATS,
    NOT_RUN,
    ONE_SEED,
    SHARE,
    UNCLEAR,
    shown,
)
from trials.summary import Study, difference, estimate, longer, seeds_of, shared_seeds, some

SHOWS = " *"  # beside a difference that shows


def tables(study: Study) -> dict[str, str]:
    """Each of the page's tables by the name of its marker."""
    return {
        "sizes": _sizes(study),
        "seeds": _seeds(study),
        "verdicts": _verdicts(study),
        **{f"claims: {paper}": _claims(study, paper) for paper in CLAIMS},
        "held out": _heldout(study),
        "gradients": _gradients(study),
        "weights": _weights(study),
        "lengths": _lengths(study),
        "ablations": _ablations(study),
        "sweep": _sweep(study),
        "properties": _properties(study),
    }


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """In Markdown; the first `text` columns are words."""
    line = ["---"] * text + ["---:"] * (len(headings) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, line, *rows))


def _named(study: Study, names: Sequence[str], row: Callable[[str], list[str]]) -> list[list[str]]:
    return [[name, *row(name)] for name in names if name in study["arms"]]


def _cell(study: Study, name: str, metric: str, form: str) -> str:
    return shown(estimate(seeds_of(study, name, metric)), form)


def _sizes(study: Study) -> str:
    sizes, pairs = study["sizes"], study["pairs"]
    runs = [run for arm in study["arms"].values() for run in arm["seeds"].values()]
    minutes = statistics.median(run["minutes"] for run in runs)
    versions = (f"{name} {study['about']['versions'][name]}" for name in ("torch", "transformers"))
    return _table(
        ["", ""],
        [
            ["pairs", f"{pairs['train']} trained on, {pairs['validation']} to choose settings by, "
             f"{pairs['heldout']} held out"],
            ["tokens", f"prompts of at most {sizes['prompt']}; responses cut off at "
             f"{sizes['response']}"],
            ["a run", f"{sizes['steps']} steps of {sizes['batch']} pairs, {minutes:.1f} minutes; "
             f"of the sweep {sizes['sweep_steps']} steps"],
            ["answers", f"{sizes['prompts']} held-out prompts, at most {sizes['drawn']} tokens"],
            ["in all", f"{len(runs)} runs and {sum(map(len, study['sweep'].values()))} of the "
             f"sweep, {study['hours']:.1f} hours"],
            ["machine", study["about"]["hardware"]],
            ["versions", f"{', '.join(versions)}; {study['about']['date']}"],
        ],
        text=2,
    )  # fmt: skip


def _seeds(study: Study) -> str:
    """What has been run, and of which arms nothing has."""
    rows = _named(
        study,
        list(ARMS),
        lambda name: [
            str(len(study["arms"][name]["seeds"])),
            f"{study['arms'][name]['rate']:g}",
            f"{ARMS[name].objective.beta * study['arms'][name]['factor']:g}",
            ARMS[name].like if ARMS[name].like != name else "its own sweep",
        ],
    )
    wanted = len(study["sizes"]["seeds"])
    text = _table(["", f"seeds, of {wanted}", "learning rate", "β", "settings from"], rows)
    missing = [name for name in ARMS if name not in study["arms"]]
    return text + (f"\n\nNot run yet: {'; '.join(missing)}." if missing else "")


def _verdicts(study: Study) -> str:
    """How many of the claims of each kind came to what."""
    verdicts = (HOLDS, UNCLEAR, CONTRADICTS, ONE_SEED, NOT_RUN)
    rows = []
    for paper, some_claims in CLAIMS.items():
        found = [claim.judged(study)[1] for claim in some_claims]
        rows.append([paper, *(str(found.count(verdict)) for verdict in verdicts)])
    return _table(["claims", *verdicts], rows)


def _claims(study: Study, paper: str) -> str:
    rows = []
    for claim in CLAIMS[paper]:
        seen, verdict = claim.judged(study)
        verdict = f"**{verdict}**" + ("" if claim.same_settings(study) else ", settings differ")
        rows.append([claim.text, seen, verdict])
    return _table(["claim", "measured", ""], rows, text=3)


def _heldout(study: Study) -> str:
    columns = {
        "accuracy": ("accuracy, own reward", SHARE),
        "accuracy of averages": ("of averages against the reference", SHARE),
        "accuracy without reference": ("of averages alone", SHARE),
        "margin": ("margin, nats", NATS),
        "chosen": ("chosen, nats", NATS),
        "rejected": ("rejected, nats", NATS),
        "KL": ("KL, nats a token", ".4f"),
        "drawn length": ("tokens of an answer", ".1f"),
    }
    rows = _named(
        study,
        list(ARMS),
        lambda name: [_cell(study, name, metric, form) for metric, (_, form) in columns.items()],
    )
    margins = study["heldout"]["reference's margin of averages"]
    had = f"{statistics.mean(m > 0 for m in margins):{SHARE}}"
    zero = f"{0:{NATS}}"
    untrained = ["the checkpoint", "", "", had, zero, zero, zero, f"{0:.4f}", ""]
    return _table(["", *(title for title, _ in columns.values())], [untrained, *rows])


def _gradients(study: Study) -> str:
    columns = {
        "gradient ratio": FACTOR,
        "imbalance": FACTOR,
        "chosen coefficient": ".2f",
        "rejected coefficient": ".2f",
        "share clipped": ".2f",
    }

    def row(name: str) -> list[str]:
        runs = study["arms"][name]["seeds"].values()
        return [
            _cell(study, name, metric, form)
            if all(metric in run["numbers"] for run in runs)
            else ""
            for metric, form in columns.items()
        ]

    headings = ["", "chosen over rejected", "typical factor apart", "coefficient, chosen"]
    headings += ["coefficient, rejected", "share clipped"]
    return _table(headings, _named(study, list(ARMS), row))


def _weights(study: Study) -> str:
    """Means over the seeds of each fifth of the pairs."""
    rows = []
    for name in (arm.name for arm in MAIN if arm.name in study["arms"]):
        runs = list(study["arms"][name]["seeds"].values())
        for weight in runs[0].get("weights", ()):
            bins = zip(*(run["weights"][weight] for run in runs), strict=True)
            means = [[statistics.mean(c) for c in zip(*each, strict=True)] for each in bins]
            cells = (f"{y:.3f} at {x:.2f}".replace("-", "−") for x, y in means)
            rows.append([f"{name}: {weight}", *cells])
    return _table(["fifth of the pairs", "least", "2nd", "3rd", "4th", "most"], rows)


def _lengths(study: Study) -> str:
    """Accuracy and margin by whether the chosen response is the longer one."""
    places = {sign: longer(study, sign) for sign in (1, 0, -1)}

    def row(name: str) -> list[str]:
        return [
            shown(estimate(some(seeds_of(study, name, metric), where)), form) if where else ""
            for metric, form in (("accuracy", SHARE), ("margin", NATS))
            for where in places.values()
        ]

    counts = [len(where) for where in places.values()]
    kinds = [f"{kind} ({count} pairs)" for kind, count in zip(
        ("longer", "as long", "shorter"), counts, strict=True)]  # fmt: skip
    headings = [f"{what}, chosen {kind}" for what in ("accuracy", "margin") for kind in kinds]
    return _table(["", *headings], _named(study, [arm.name for arm in MAIN], row))


def _ablations(study: Study) -> str:
    columns = {"accuracy": SHARE, "margin": NATS, "chosen": NATS, "rejected": NATS, "KL": ".4f"}

    def cell(name: str, like: str, metric: str, form: str) -> str:
        by = difference(*(seeds_of(study, arm, metric) for arm in (name, like)))
        return shown(by, "+" + form) + (SHOWS if by.shows else "")

    rows = [
        [f"{arm.name}, from {arm.like}"]
        + [cell(arm.name, arm.like, metric, form) for metric, form in columns.items()]
        for arm in ABLATIONS
        if shared_seeds(study, arm.name, arm.like)
    ]
    return _table(["difference", *columns], rows)


def _sweep(study: Study) -> str:
    """Every setting that was tried; what the runs have in bold."""
    rows = []
    for arm in MAIN:
        taken = study["arms"].get(arm.name)
        for each in study["sweep"].get(arm.name, ()):
            cells = [
                f"{each['rate']:g}",
                f"{arm.objective.beta * each['factor']:g}",
                f"{each['accuracy']:{SHARE}}",
                *(f"{each[side]:{NATS}}".replace("-", "−") for side in ("chosen", "rejected")),
            ]
            if taken and all(taken[key] == each[key] for key in ("rate", "factor")):
                cells = [f"**{cell}**" for cell in cells]
            rows.append([arm.name, *cells])
    headings = ["", "learning rate", "β", "accuracy", "chosen, nats", "rejected, nats"]
    return _table(headings, rows)


def _properties(study: Study) -> str:
    found = study["properties"]
    rows = [
        [f"{name}: chosen over rejected \\|∂L/∂ρ\\| / p̄, from 1", f"{error:.1e}"]
        for name, error in found["balance"].items()
    ]
    rows += [
        [f"Uni-DPO, {name}: gradient from its closed form, relative", f"{error:.1e}"]
        for name, error in found["unidpo"].items()
    ]
    return _table(["", "at most"], rows)
