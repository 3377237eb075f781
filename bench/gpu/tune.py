"""Stage `tune`: what `fastpref tune` measures, a question a part, and counters of the best two.

Later questions are asked under the winners of earlier ones, in whichever call those were found.
`tuned.json` beside the results is the file that the kernels read.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import shutil
from typing import Any

from fastpref_kernels import configs
from gpu import one_candidate
from gpu.parts import ROOT, NotHereError, Part, python, run_for, surroundings
from gpu.setup import Setup

from fastpref.commands.tune import run
from fastpref.commands.tune.questions import Question, Sizes, dry_sizes, questions

# What tells why one is faster than the other.
_COUNTED = ("projection, plain", "weight_gradient, plain")
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")


def parts(setup: Setup) -> list[Part]:
    """The questions in their order, then whole steps, then counters."""
    sizes = dry_sizes("bfloat16") if setup.rehearsal else Sizes()
    found = [
        Part(each.name, 40, functools.partial(_ask, setup, each, sizes))
        for each in questions(setup.rehearsal)
    ]
    found.append(Part("whole steps", 40, lambda: _steps(setup, sizes)))
    found += [
        Part(f"counters of {name}", 45, functools.partial(_counters, setup, name, sizes))
        for name in _COUNTED
    ]
    return [dataclasses.replace(part, seconds=setup.short_of(part.seconds)) for part in found]


def _ask(setup: Setup, question: Question, sizes: Sizes) -> dict[str, Any]:
    entries = run.defaults(setup.device) | _winners(setup)
    answer = run.ask(question, sizes, entries, setup.repeats)
    candidates = {run.text_of(entry): entry for entry in answer.timed}
    best = sorted(answer.rows, key=lambda row: row["of default"]["median"])[:2]
    return {
        "of": answer.rows,
        "best two": [run.nested({answer.key: candidates[row["candidate"]]}) for row in best],
        "winner": run.nested(run.winners([answer])),
        "left out": answer.left_out,
    }


def _winners(setup: Setup) -> configs.Entries:
    """Of the questions that are answered."""
    found: configs.Entries = {}
    for part in setup.call.load()["parts"]:
        result = part.get("result")
        if part["status"] == "done" and isinstance(result, dict) and "winner" in result:
            found |= configs.entries_in(result["winner"])
    return found


def _steps(setup: Setup, sizes: Sizes) -> list[dict[str, Any]]:
    """Before and after, and the file."""
    entries = _winners(setup)
    found = run.steps(sizes, entries, setup.repeats)
    run.write(setup.call.directory / "tuned.json", entries, sizes, found)
    return found


def _counters(setup: Setup, name: str, sizes: Sizes) -> list[dict[str, Any]]:
    """What Nsight Compute counts of a question's best two candidates, a row a kernel."""
    answered = {part["name"]: part.get("result") for part in setup.call.load()["parts"]}
    if not answered.get(name):
        raise NotHereError(f"{name} is not answered yet")
    rows = []
    for content in answered[name]["best two"]:
        (entry,) = configs.entries_in(content).values()
        candidate = {"candidate of": name, "blocks": run.text_of(entry)}
        if setup.rehearsal:
            one_candidate.run(name, content, sizes, times=1)
            counted = of_csv(_SAID)
        else:
            counted = of_csv(_profile(setup, name, json.dumps(content)))
        rows += [candidate | row for row in counted]
    return rows


def _profile(setup: Setup, name: str, content: str) -> str:
    binary = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not os.path.exists(binary):
        raise NotHereError("Nsight Compute (ncu) is not on this machine")
    # The clocks are left as they are found; the first of two runs warms up.
    command = [binary, "--csv", "--page", "details", "--clock-control", "none"]
    command += ["-k", "regex:projection_kernel|weight_gradient_kernel", "--launch-count", "4"]
    command += [option for section in _SECTIONS for option in ("--section", section)]
    command += python(str(ROOT / "bench/gpu/one_candidate.py"), name, content)
    code, said = run_for(command, max(30.0, min(120.0, setup.call.left())), surroundings())
    if code != 0:
        raise RuntimeError(f"ncu ended by {code}: {said[-2000:]}")
    return said


def of_csv(said: str) -> list[dict[str, Any]]:
    """A row a kernel, a column a metric, of what ncu prints with `--csv --page details`."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu printed no table: {said[-2000:]}")
    rows: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        row = rows.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        if line["Metric Name"]:
            unit = line["Metric Unit"]
            row[f"{line['Metric Name']}{', ' * bool(unit)}{unit}"] = line["Metric Value"]
    return list(rows.values())


# What it prints, in few lines: for rehearsals.
_SAID = """==PROF== Connected to process 1
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","projection_kernel","GPU Speed Of Light Throughput","Duration","us","812.3"
"0","projection_kernel","Occupancy","Achieved Occupancy","%","12.4"
"""
