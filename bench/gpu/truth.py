"""Stage `truth`: the machine's rates, whether the code is right on it, and what it takes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.parts import ROOT, Part, python, run_for, surroundings
from gpu.setup import TERA, Setup, frozen, milliseconds, product, product_flop

from fastpref.commands.benchmark.measure import (
    accuracy,
    first_line,
    make_step,
    predicted_memory,
    runnable,
    time_peers,
)
from fastpref.commands.benchmark.peers import OURS
from fastpref.commands.benchmark.schedules import SCHEDULES, schedule_step
from fastpref.commands.benchmark.workloads import Inputs, Workload, make_inputs
from fastpref.commands.verify import accumulation_error

_TOP = 12  # kernels of a table
_BYTES_OF_A_TEST = 16e9


def parts(setup: Setup) -> list[Part]:
    """In order of importance."""
    sizes = {"large": setup.large, "small": setup.small}
    found = [Part("products", 30, functools.partial(_products, setup))]
    found += [
        Part(f"schedules, {size}", 40, functools.partial(_schedules, setup, workload))
        for size, workload in sizes.items()
    ]
    found.append(Part("errors, bfloat16", 20, functools.partial(_errors, setup, "bfloat16")))
    found.append(Part("GPU tests", 60, functools.partial(_gpu_tests, setup)))
    found += [
        Part(f"kernels, {size}", 15, functools.partial(_kernels, setup, workload))
        for size, workload in sizes.items()
    ]
    found += [
        Part(f"errors, {dtype}", 20, functools.partial(_errors, setup, dtype))
        for dtype in ("float16", "float32")
    ]
    found += [
        Part(f"peers, {size}", 40, functools.partial(_peers, setup, workload))
        for size, workload in sizes.items()
    ]
    return [dataclasses.replace(part, seconds=setup.short_of(part.seconds)) for part in found]


# --- rates --------------------------------------------------------------------------------------


def _products(setup: Setup) -> dict[str, Any]:
    """The library's products in the shapes of the schedules, and copies within the memory."""
    rows = []
    for shape, call, flop in _bare_products(setup):
        seconds = setup.seconds(call)
        rate = flop / statistics.median(seconds) / TERA
        rows.append(shape | {"ms": milliseconds(seconds), "TFLOP/s": rate})
    elements = 2**18 if setup.rehearsal else 2**32
    source = torch.randint(0, 255, (elements,), dtype=torch.uint8, device=setup.device)
    copy = torch.empty_like(source)
    seconds = setup.seconds(lambda: copy.copy_(source))
    rate = 2 * elements / statistics.median(seconds) / TERA
    return {"copy": [{"bytes": elements, "ms": milliseconds(seconds), "TB/s": rate}], "of": rows}


def _bare_products(setup: Setup) -> Iterator[tuple[dict[str, Any], Callable[[], Any], int]]:
    """Each with its shape and FLOP: logits, then ∂W over K rows, then ∂H over K columns.

    A gradient of logits lies dense, or in the front halves of fp32 rows (`apart`).
    """
    device, workload = setup.device, setup.large
    wide, size, vocabulary = torch.float32, workload.hidden_size, workload.vocabulary
    # A CPU has no `out_dtype`.
    bf16, fp16 = (wide, wide) if setup.rehearsal else (torch.bfloat16, torch.float16)
    sizes = (4, 8) if setup.rehearsal else (2048, 4096, 8192, 16384)

    def shape(name: str, k: int, operand: torch.Tensor, out: torch.Tensor, **how: Any) -> dict:
        m, n = out.shape
        dtypes = (str(x.dtype).removeprefix("torch.") for x in (operand, out))
        return {"product": name, "M": m, "N": n, "K": k, "of": " to ".join(dtypes)} | how

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=bf16)

    hidden, weight = normal(sizes[-1], size), normal(vocabulary, size)
    for n in (sizes[0], sizes[-1]):
        for dtype in dict.fromkeys((bf16, wide)):
            out = torch.empty(n, vocabulary, device=device, dtype=dtype)
            call = functools.partial(product, hidden[:n], weight.T, out)
            yield shape("logits", size, hidden, out), call, 2 * n * size * vocabulary
    del out, call
    for apart in (False, True):
        width = vocabulary * (1 + apart)
        of_logits = torch.empty(sizes[-1], width, device=device, dtype=bf16)
        for narrow in dict.fromkeys((bf16, fp16)):
            # One memory for both: such a matrix takes 8 GB.
            grad_logits = of_logits.view(narrow).normal_()[:, :vocabulary]
            rows, head = hidden.to(narrow), weight.to(narrow)
            sums = [(wide, 0), (wide, 1)] + [(narrow, 0)] * (narrow == bf16)
            how = {"lda": "2V" if apart else "V"}
            for dtype, beta in dict.fromkeys(sums):
                out = torch.zeros(vocabulary, size, device=device, dtype=dtype)
                for k in sizes:
                    operands = grad_logits[:k].T, rows[:k]
                    call = functools.partial(product, *operands, out, beta)
                    of_shape = shape("dW", k, rows, out, beta=beta, **how)
                    yield of_shape, call, 2 * k * size * vocabulary
            for beta in (0, 1):
                for n in dict.fromkeys((sizes[0] // 2, sizes[1], sizes[-1])):
                    out = torch.zeros(n, size, device=device, dtype=wide)
                    for k in (*sizes, vocabulary):
                        operands = grad_logits[:n, :k], head[:k]
                        call = functools.partial(product, *operands, out, beta)
                        of_shape = shape("dH", k, head, out, beta=beta, **how)
                        yield of_shape, call, 2 * n * k * size


# --- what a schedule takes ----------------------------------------------------------------------


def _schedules(setup: Setup, workload: Workload) -> dict[str, Any]:
    """Time on the device, time of the host, peak memory and the plan of each."""
    rows = []
    for schedule, (products, is_frozen) in SCHEDULES.items():
        of_schedule = frozen(workload) if is_frozen else workload
        inputs = make_inputs(of_schedule, setup.device)
        step = schedule_step(schedule, inputs)
        seconds = setup.seconds(step)
        without_waiting = setup.seconds(schedule_step(schedule, inputs, host_targets=True))
        started = time.perf_counter()
        plan = step()
        host = time.perf_counter() - started
        peak = setup.peak(step)
        predicted = predicted_memory(of_schedule, _peer(schedule), setup.device)
        median = statistics.median(seconds)
        rows.append(
            {
                "schedule": schedule,
                "ms": milliseconds(seconds),
                "ms, host's targets": 1e3 * statistics.median(without_waiting),
                "host ms": 1e3 * host,
                "TFLOP/s": products * product_flop(workload) / median / TERA,
                "peak MB": peak,
                "predicted MB": None if predicted is None else predicted / 1e6,
                "plan": plan,
            }
        )
    return {"workload": workload.name, "of": rows}


def _peer(schedule: str) -> str:
    return f"fastpref {schedule.split(',')[0].replace('_', ' ')}"


def _kernels(setup: Setup, workload: Workload) -> dict[str, Any]:
    """Launches of a step of each schedule and the kernels that take most of its time."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = setup.device == "cuda"
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found: dict[str, Any] = {"workload": workload.name}
    for schedule, (_, is_frozen) in SCHEDULES.items():
        inputs = make_inputs(frozen(workload) if is_frozen else workload, setup.device)
        step = schedule_step(schedule, inputs)
        step()
        activities = [ProfilerActivity.CUDA] * on_gpu + [ProfilerActivity.CPU]
        with profile(activities=activities) as profiled:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        of_kernel = [
            {
                "ms": (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e3,
                "launches": each.count,
                "kernel": each.key[:100],
            }
            for each in profiled.key_averages()
            if each.device_type == kind and not getattr(each, "is_user_annotation", False)
        ]
        of_kernel.sort(key=lambda row: -row["ms"])
        total = {name: sum(row[name] for row in of_kernel) for name in ("ms", "launches")}
        found[schedule] = [*of_kernel[:_TOP], total | {"kernel": "all of them"}]
    return found


# --- errors -------------------------------------------------------------------------------------


# Relative errors of gradients that the README promises, of bf16 inputs.
_PROMISED = 2e-3


def _errors(setup: Setup, dtype: str) -> dict[str, Any]:
    """Of log-probabilities, loss, ∂H and ∂W against float64, every schedule and what else runs.

    Beside fastpref's stands what its products' accumulators may take from a log-probability, and
    whether that and the promise on gradients are kept.
    """
    rows, skipped = [], {}
    for workload in (setup.checked, frozen(setup.checked)):
        workload = dataclasses.replace(workload, dtype=dtype)
        inputs = make_inputs(workload, setup.device)
        allowed = _allowed_nats(inputs)
        names, reasons = runnable([*setup.peers, *OURS], inputs)
        skipped |= {name: why for name, why in reasons.items() if name not in OURS}
        for name in dict.fromkeys(names):
            try:
                found = accuracy(inputs, [name], workload.name)
            except Exception as failure:
                if name in OURS:
                    raise
                skipped[name] = first_line(failure)
                continue
            head = {"head": "frozen" if workload.frozen else "trains"}
            for entry in found:
                row = head | {key: value for key, value in entry.items() if key != "inputs"}
                if name in OURS:
                    errors = [row[key] for key in ("grad_hidden", "grad_weight") if key in row]
                    row["allowed nats"] = allowed
                    row["kept"] = row["token_logps"] <= allowed
                    if dtype == "bfloat16":
                        row["kept"] &= max(errors) <= _PROMISED
                rows.append(row)
    return {"inputs": setup.checked.name, "of": rows, "not run": skipped}


def _allowed_nats(inputs: Inputs) -> float:
    """Of a token's log-probability: a target's logit and a log-sum-exp, each cut off.

    Their roundings to fp32 are few beside that; 2⁻²⁰ is four of each.
    """
    size = inputs.weight.shape[1]
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    largest = max((h.float() @ weight.float().T).abs().max().item() for h in hidden.split(512))
    return 2 * accumulation_error(size, largest) + 2**-20 * (1 + largest)


_OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED|XFAIL)(?:\s|$)")


def _gpu_tests(setup: Setup) -> dict[str, Any]:
    """`pytest -m gpu` in a process of its own; what failed, and how it says so."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if path.name == "test_gpu.py" or "pytest.mark.gpu" in path.read_text()
    )
    options = ["-m", "gpu", "-v", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    environment = surroundings()
    if setup.rehearsal:
        files = ["tests/test_gpu.py"]
        options += ["-k", "two_runs and frozen"]
        environment["FASTPREF_TEST_DEVICE"] = "cpu"
    elif importlib.util.find_spec("xdist"):
        # Of float64 on a whole head each holds some GB, and keeps them.
        memory = torch.cuda.get_device_properties(0).total_memory
        options += ["-n", str(max(1, min(8, int(memory / _BYTES_OF_A_TEST))))]
    left = max(20.0, min(240.0, setup.call.left() - 60))
    code, said = run_for(python("-m", "pytest", *options, *files), left, environment)
    lines = said.splitlines()
    outcomes = [match[1] for line in lines if (match := _OUTCOME.search(_without_summary(line)))]
    counts = {name.lower(): outcomes.count(name) for name in dict.fromkeys(outcomes)}
    failures = said.split("= FAILURES =")[1] if "= FAILURES =" in said else ""
    failed = sorted({line for line in lines if line.startswith(("FAILED", "ERROR"))})
    if code not in (0, 1) and not outcomes:
        raise RuntimeError(f"pytest ended by {code}: {said[-2000:]}")
    return {
        "exit code": code,  # None: ended by the clock
        "files": " ".join(files),
        "counts": counts,
        "failed": failed,
        "summary": lines[-1] if lines else "",
        "failures": failures[-12000:],
    }


def _without_summary(line: str) -> str:
    """A test's own line of `-v`; the summary's lines begin with the outcome and name no share."""
    return line if "%]" in line else ""


# --- peers --------------------------------------------------------------------------------------


def _peers(setup: Setup, workload: Workload) -> dict[str, Any]:
    """Time and peak of whatever can be imported, three rounds; `confirm` takes nine."""
    found: dict[str, Any] = {}
    for title, each in (("head trains", workload), ("head frozen", frozen(workload))):
        names = list(dict.fromkeys([*setup.peers, *OURS]))
        entries, skipped = time_peers(each, names, rounds=min(3, setup.rounds), device=setup.device)
        rows = []
        for entry in entries:
            rows.append(
                {
                    "peer": entry["peer"],
                    "phase": entry["phase"],
                    "ms": milliseconds(entry["seconds"]),
                    "of naive": (entry["ratio"] or {}).get("median"),
                }
            )
        memory = []
        for name in dict.fromkeys(row["peer"] for row in rows):
            peak = setup.peak(make_step(each, name, setup.device))
            memory.append({"peer": name, "peak MB": peak})
        found[title] = {"times": rows, "memory": memory, "not run": skipped}
    return {"workload": workload.name} | found
