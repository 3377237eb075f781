"""Time, peak memory and error.

Times are `timing`'s, interleaved. Peak memory on a CPU is the growth of the largest resident size
of a fresh process over three steps; on a GPU the allocator's peak.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import reference
from fastpref.commands.benchmark.peers import OURS, PEERS, Loss, dpo_loss
from fastpref.commands.benchmark.timing import Stopwatch, spread_of_ratios
from fastpref.commands.benchmark.workloads import Inputs, Workload, make_inputs
from fastpref.commands.plan import estimates

BASELINE = "naive"
MEMORY_STEPS = 3


def runnable(names: list[str], inputs: Inputs) -> tuple[list[str], dict[str, str]]:
    """Peers that can run on these inputs, and why each other cannot."""
    skipped = {name: why for name in names if (why := PEERS[name].obstacle(inputs))}
    return [name for name in names if name not in skipped], skipped


def time_peers(
    workload: Workload,
    names: list[str],
    *,
    rounds: int,
    device: str,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Seconds of a forward, and of forward + backward, of each peer on one workload.

    Returns:
        Entries for the results' "speed", and why each other peer was not timed: it cannot run
        here, failed, or computes something else than float64 does.

    Raises:
        RuntimeError: fastpref itself computes something else.
    """
    inputs = make_inputs(workload, device)
    losses, skipped = checked_losses(names, inputs)
    phases = {"forward": _forward, "forward + backward": _step}
    calls = {
        (name, phase): functools.partial(run, loss)
        for name, loss in losses.items()
        for phase, run in phases.items()
    }
    watch = Stopwatch(device)
    seconds = watch.interleaved(calls, rounds, before=lambda: clear_gradients(inputs))
    entries = [
        {
            "workload": workload.name,
            "peer": name,
            "phase": phase,
            "seconds": values,
            "ratio": spread_of_ratios(values, seconds.get((BASELINE, phase))),
        }
        for (name, phase), values in seconds.items()
    ]
    return entries, skipped


def checked_losses(names: list[str], inputs: Inputs) -> tuple[dict[str, Loss], dict[str, str]]:
    """Losses that have run once and are right, and why each other peer is left out.

    Raises:
        RuntimeError: fastpref itself computes something else than float64 does.
    """
    names, skipped = runnable(names, inputs)
    losses: dict[str, Loss] = {}
    with torch.no_grad():
        expected = reference_loss(inputs, torch.float64).item()
    for name in names:
        try:
            loss = PEERS[name].prepare(inputs)
            _check_result(loss, inputs, expected)  # also compiles and warms up
            losses[name] = loss
        except Exception as failure:
            if name in OURS:
                raise
            skipped[name] = first_line(failure)
    return losses, skipped


def first_line(failure: Exception) -> str:
    """Kind of a failure and the first line of what it says."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def _forward(loss: Loss) -> None:
    with torch.no_grad():
        loss()


def _step(loss: Loss) -> None:
    loss().backward()


def _check_result(loss: Loss, inputs: Inputs, expected: float) -> None:
    """The loss is float64's, up to what float32 or half-precision logits may lose."""
    value = loss()
    value.backward()
    clear_gradients(inputs)
    found = value.item()
    allowed = 1e-4 if inputs.hidden.dtype == torch.float32 else 5e-2
    if not abs(found - expected) <= allowed * (1 + abs(expected)):
        raise RuntimeError(f"computes {found:.6g}, expected {expected:.6g}")


def reference_loss(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The DPO loss without gradient, a few rows of logits at a time."""
    hidden, targets = inputs.hidden.flatten(0, -2), inputs.targets.flatten()
    weight = inputs.weight.to(dtype)
    parts = [
        reference.linear_logps(h.to(dtype), weight, t, softcap=inputs.softcap)
        for h, t in zip(hidden.split(128), targets.split(128), strict=True)
    ]
    return dpo_loss(torch.cat(parts).view(inputs.targets.shape), inputs)


# --- memory -------------------------------------------------------------------------------------


def peak_memory(workload: Workload, name: str, device: str, repeats: int = 2) -> dict[str, Any]:
    """Peak bytes beyond the inputs over three steps, gradients included: the median of repeats."""
    if device == "cpu":
        arguments = [dataclasses.asdict(workload), name]
        found = [run_in_fresh_process(__spec__.name, arguments) for _ in range(repeats)]
    else:
        found = [memory_growth(make_step(workload, name, device), device) for _ in range(repeats)]
    return {
        "workload": workload.name,
        "peer": name,
        "bytes": statistics.median(found),
        "low": min(found),
        "high": max(found),
    }


# What `fastpref plan` calls a peer, where it knows it.
_PLANNED = {
    "naive": "naive",
    "TRL 1.16 chunked": "TRL 1.16",
    "Liger DPO": "Liger DPO",
    "fastpref pair groups": "pair_groups",
    "fastpref frozen head": "frozen_head",
    "fastpref recompute": "recompute",
}


def predicted_memory(workload: Workload, name: str, device: str) -> int | None:
    """What `fastpref plan` expects `peak_memory` to be; None of a peer that it does not know."""
    found = {each.name: each.extra_bytes for each in estimates(workload.problem(device))}
    return found.get(_PLANNED.get(name, ""))


def run_in_fresh_process(module: str, arguments: list[Any], *, frees: bool = True) -> Any:
    """What `python -m module` prints last, as JSON, for arguments and number of threads.

    Args:
        frees: what is freed goes back at once, so that a peak is of what was held together.
    """
    run = subprocess.run(
        [sys.executable, "-m", module, json.dumps([*arguments, torch.get_num_threads()])],
        capture_output=True,
        text=True,
        check=False,
        # glibc would keep freed tiles for later, or not, as sizes fall.
        env=os.environ | ({"MALLOC_MMAP_THRESHOLD_": "131072"} if frees else {}),
    )
    if run.returncode:
        said = run.stderr.strip().splitlines() or [f"ended by {run.returncode}"]
        raise RuntimeError(f"{module} {arguments}: {said[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def memory_growth(step: Callable[[], object], device: str, steps: int = MEMORY_STEPS) -> int:
    """Peak bytes of some steps beyond what is there: the GPU's allocator's, or resident ones."""
    gc.collect()
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(steps):
        step()
    return (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def make_step(workload: Workload, name: str, device: str) -> Callable[[], None]:
    """A forward and backward of a peer, after which nothing but its inputs is left."""
    inputs = make_inputs(workload, device)
    loss = PEERS[name].prepare(inputs)

    def step() -> None:
        loss().backward()
        clear_gradients(inputs)

    return step


# --- accuracy -----------------------------------------------------------------------------------


def accuracy(inputs: Inputs, names: list[str], source: str) -> list[dict[str, Any]]:
    """Largest errors against float64 on the same rounded inputs.

    Log-probabilities of a token and of a response in nats, the loss, and the gradients' errors
    relative to their norms. `inputs` are padded.
    """
    truth = inputs.on(torch.float64)
    true_logps = reference.linear_logps(
        truth.hidden.flatten(0, 1), truth.weight, truth.targets.flatten(), softcap=truth.softcap
    ).view(truth.targets.shape)
    true_loss, true_grads = _run(lambda: dpo_loss(true_logps, truth), truth)
    results = []
    for name in runnable(names, inputs)[0]:
        mine = inputs.on(inputs.hidden.dtype)
        loss, grads = _run(PEERS[name].prepare(mine), mine)
        entry: dict[str, Any] = {
            "peer": name,
            "inputs": source,
            "dtype": str(inputs.hidden.dtype).removeprefix("torch."),
            "loss": abs(loss - true_loss),
        }
        logps_of = PEERS[name].logps
        if logps_of is not None:
            with torch.no_grad():
                off = logps_of(mine).double() - true_logps
            entry["token_logps"] = off.abs().max().item()
            entry["response_logps"] = off.sum(-1).abs().max().item()
        for leaf, grad in grads.items():
            off = grad.double() - true_grads[leaf]
            entry[leaf] = (off.norm() / true_grads[leaf].norm()).item()
        results.append(entry)
    return results


def _run(loss: Loss, inputs: Inputs) -> tuple[float, dict[str, Tensor]]:
    value = loss()
    value.backward()
    leaves = {"grad_hidden": inputs.hidden, "grad_weight": inputs.weight}
    return value.item(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


# --- what it was measured on --------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and commit of a run."""
    packages = ("fastpref", "torch", "triton", "transformers", "trl", "liger-kernel")
    return {
        "hardware": _hardware(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in info.open() if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:  # no git
        return None
    return run.stdout.strip() or None


def clear_gradients(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


if __name__ == "__main__":
    fields, peer, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(memory_growth(make_step(Workload(**fields), peer, "cpu"), "cpu"))
