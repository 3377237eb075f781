"""Everything that only a GPU can tell, in three stages of less than nine minutes each.

    python bench/on_gpu.py truth --out DIR     rates, GPU tests, errors, what each schedule takes
    python bench/on_gpu.py tune --out DIR      launch configurations and the alternatives to them
    python bench/on_gpu.py confirm --out DIR   the goals beside every peer, races, a training step

Writes DIR/<stage>.json, part by part, and DIR/<stage>.txt. Called again it keeps what is done with
the same code on the same GPU, and measures the rest. Needs torch and Triton, and nothing of this
repository installed; peers are measured where they can be imported. `--rehearse` runs the same code
at tiny sizes on the CPU, kernels interpreted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from gpu.parts import STATUSES, Call, python, source, supervise, work
from gpu.tables import report

STAGES = ("truth", "tune", "confirm")


def main() -> int:
    options = _options()
    deadline = options.deadline or time.monotonic() + options.budget
    started = options.started or str(time.time_ns())
    call = Call(options.stage, options.out.resolve(), deadline, started)
    if options.deadline:
        return _work(call, options.rehearse, options.only)
    worker = python(__file__, *sys.argv[1:], "--deadline", str(deadline), "--started", started)
    record = supervise(call, worker)
    text = report(record)
    call.path.with_suffix(".txt").write_text(text)
    print(text)
    found = {status: [] for status in STATUSES}
    for part in record["parts"]:
        found[part["status"]].append(part["name"])
    for status, names in found.items():  # the end of the output is what everybody sees
        print(f"{len(names)} {status}: {'; '.join(names)}")
    return int(bool(found["failed"]) or "ended" in record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--budget", type=_seconds, default=470.0, help="seconds of the stage")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so, and no others")
    # Of a worker, from its supervisor.
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--started", help=argparse.SUPPRESS)
    return parser.parse_args()


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def _work(call: Call, rehearse: bool, only: list[str] | None) -> int:
    if rehearse:  # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from gpu.setup import make_setup, settle

    setup = make_setup(call, rehearse)
    parts = importlib.import_module(f"gpu.{call.stage}").parts(setup)
    if only:
        names = [part.name for part in parts]
        parts = [part for part in parts if part.name.startswith(tuple(only))]
        if not parts:
            sys.exit(f"no part begins with {only}; there are {names}")
    environment = setup.environment() | {"source": source(), "rehearsal": rehearse}
    return work(call, parts, environment, lambda: settle(setup.device))


if __name__ == "__main__":
    sys.exit(main())
