"""Parts of a stage: each measured once, saved as it ends, and never the end of the others.

A supervisor, which never touches the device, starts a worker that measures part after part. A part
that fails is kept with its reason; one that takes the device or the process with it is too, and
another worker goes on behind it. When the clock has run out what is left is named. Another call
keeps the parts that are done, as long as code and device are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A worker that lost its device asks for another one.
AGAIN = 75
# Beyond the clock, for the part under way and what is read back: then the worker is ended.
GRACE = 30.0
STATUSES = ("done", "skipped", "failed", "not run")


class NotHereError(Exception):
    """A part that this machine has not the means for; its message says which."""


@dataclass(frozen=True)
class Part:
    """Args: `run()` gives what is saved, as JSON holds it; `seconds` is what that should take."""

    name: str
    seconds: float
    run: Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """One call of the script.

    Args:
        stage: "truth", "tune" or "confirm".
        directory: where `<stage>.json` lies.
        deadline: of `time.monotonic()`, which is the same for supervisor and worker.
        started: tells this call's attempts from earlier ones.
    """

    stage: str
    directory: Path
    deadline: float
    started: str

    @property
    def path(self) -> Path:
        return self.directory / f"{self.stage}.json"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def load(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"parts": []}

    def save(self, record: dict[str, Any]) -> None:
        """Whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(self.path)


def source() -> str:
    """The measured code and its settings by their contents: there may be no git there."""
    digest = hashlib.sha256()
    for directory in ("fastpref", "kernels"):
        for path in sorted((ROOT / directory).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    if tuned := os.environ.get("FASTPREF_CONFIGS"):
        digest.update(Path(tuned).read_bytes())
    return digest.hexdigest()[:16]


# --- the worker ---------------------------------------------------------------------------------


def work(
    call: Call, parts: list[Part], environment: dict[str, Any], settle: Callable[[], bool]
) -> int:
    """Measures what is not there yet; the process's exit code.

    Args:
        environment: what is measured on; parts of other code or hardware are measured again.
        settle: lets go of what a part has left; False where the device does not compute any more.
    """
    record = call.load()
    of_here = {"source": environment["source"], "hardware": environment["hardware"]}
    before = {entry["name"]: entry for entry in record["parts"]}
    record = {"stage": call.stage, "environment": environment, "parts": []}
    for part in parts:
        entry = before.get(part.name, {})
        kept = entry.get("status") == "done" and entry.items() >= of_here.items()
        if kept or entry.get("call") == call.started:
            record["parts"].append(entry)
        else:
            record["parts"].append(_not_run(part, "the stage ended before it") | of_here)
    here = record["parts"][:]
    wanted = {part.name for part in parts}
    record["parts"] += [entry for name, entry in before.items() if name not in wanted]
    for part, entry in zip(parts, here, strict=True):
        if entry["status"] == "done" or entry.get("call") == call.started:
            print(f"{part.name}: {entry['status']} already", flush=True)
            continue
        if call.left() < part.seconds:
            left = max(0, call.left())
            why = f"takes about {part.seconds:.0f} s, and {left:.0f} s were left"
            entry.update(_not_run(part, why))
            print(f"{part.name}: not run: {why}", flush=True)
            continue
        entry.update(status="running", why="ended with the process", call=call.started)
        call.save(record)
        _measure(part, entry)
        call.save(record)
        if not settle():
            return AGAIN
    call.save(record)
    return 0


def _not_run(part: Part, why: str) -> dict[str, Any]:
    return {"name": part.name, "status": "not run", "why": why}


def _measure(part: Part, entry: dict[str, Any]) -> None:
    started = time.monotonic()
    try:
        found = {"status": "done", "result": part.run()}
    except NotHereError as reason:
        found = {"status": "skipped", "why": str(reason)}
    except Exception as failure:
        traceback.print_exc()
        where = traceback.extract_tb(failure.__traceback__)[-1]
        said = f"{type(failure).__name__}: {str(failure)[:2000]}"
        found = {"status": "failed", "why": f"{said} ({Path(where.filename).name}:{where.lineno})"}
    entry.pop("why", None)
    entry.update(found, seconds=round(time.monotonic() - started, 2))
    print(f"{part.name}: {entry['status']}, {entry['seconds']:.1f} s", flush=True)


# --- the supervisor -----------------------------------------------------------------------------


def supervise(call: Call, command: list[str]) -> dict[str, Any]:
    """Runs workers until every part has had its turn or the clock has run out; the record."""
    while True:
        code = _run_worker(call, command)
        record = call.load()
        for entry in record["parts"]:
            if entry["status"] == "running":
                entry["status"] = "failed"
                entry["why"] = code if isinstance(code, str) else f"the process ended by {code}"
                print(f"{entry['name']}: failed: {entry['why']}", flush=True)
                call.save(record)
                code = AGAIN if isinstance(code, int) else code
        if code != AGAIN or call.left() < 0:
            break
    if code != 0:
        record["ended"] = code if isinstance(code, str) else f"the worker ended by {code}"
        call.save(record)
    return record


def _run_worker(call: Call, command: list[str]) -> int | str:
    """Its exit code, or why it was ended."""
    worker = subprocess.Popen(command, cwd=ROOT, env=surroundings(), start_new_session=True)
    try:
        return worker.wait(timeout=max(0, call.left()) + GRACE)
    except subprocess.TimeoutExpired:
        return "ran beyond the stage's clock"
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)  # and what it has started
            worker.wait()


# --- other processes ----------------------------------------------------------------------------


def surroundings(**variables: str) -> dict[str, str]:
    """Environment variables under which Python finds this checkout before any other."""
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables


def run_for(
    command: list[str], seconds: float, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Exit code, None where it was ended after `seconds`, and all that a command printed."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=max(1, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and its own, which hold the pipe open
            said, _ = process.communicate()
            return None, said
        return process.returncode, said


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
