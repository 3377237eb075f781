"""Stage `tune`: launch configurations, and what could replace the tile kernel.

A candidate is one part: it is checked first, and timed if its numbers are right. The environment
variables of `fastpref_kernels.configs` are read at every launch.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import fastpref_kernels as kernels
import torch
from fastpref_kernels import Epilogue, configs
from gpu.parts import Part
from gpu.setup import TERA, Setup, frozen, in_environment, milliseconds, product, product_flop
from gpu.truth import SCHEDULES, schedule_step
from torch import Tensor

from fastpref import reference
from fastpref.commands.benchmark.workloads import Workload, make_inputs

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# BLOCK_N, BLOCK_V, BLOCK_H, warps, stages; the configured one first.
_PROJECTION = (
    "128,256,64,8,3",
    "128,256,64,8,4",
    "256,128,64,8,3",
    "256,128,64,8,4",
    "128,128,64,8,4",
    "128,256,32,8,4",
    "128,256,128,8,2",
    "128,128,64,4,4",
    "128,128,128,8,3",
    "64,256,64,4,4",
    "64,256,64,8,4",
    "256,256,64,16,3",
    "128,256,64,16,3",
)
_PROJECTION_OF_ALL = (
    "128,128,64,8,4",
    "128,256,64,8,3",
    "128,128,64,8,3",
    "128,64,64,8,4",
    "64,128,64,4,4",
)
# BLOCK_N, BLOCK_V, warps.
_ROWS = (
    "1,4096,8",
    "1,2048,4",
    "1,2048,8",
    "1,4096,4",
    "1,4096,16",
    "1,8192,8",
    "1,8192,16",
    "1,16384,16",
    "2,2048,8",
    "4,1024,8",
)
# Rows × columns of the library's products in place of the tile kernel.
_SLICES = ((1024, 8192), (2048, 4096), (4096, 2048), (4096, 4096), (2048, 128256), (16384, 8192))
_BUDGETS = tuple(2**20 * mib for mib in (1024, 512, 2048, 4096))


def parts(setup: Setup) -> list[Part]:
    """In order of importance: the tile kernel, what could replace it, row kernels, groups."""
    projection, of_all, rows = _PROJECTION, _PROJECTION_OF_ALL, _ROWS
    slices, budgets = _SLICES, _BUDGETS
    if setup.rehearsal:
        projection, of_all, rows = ("16,64,32,1,1", "32,64,16,1,1"), (), ("16,256,1", "8,128,1")
        slices, budgets = ((5, 64),), (2**11,)
    found = [
        Part(f"projection {each}", 20, functools.partial(_projection, setup, each, ()))
        for each in projection
    ]
    found[1:1] = [
        Part(f"library slices {n} x {columns}", 5, functools.partial(_slices, setup, n, columns))
        for n, columns in slices
    ]
    found += [Part(f"rows {each}", 8, functools.partial(_rows, setup, each)) for each in rows]
    found += [
        Part(
            f"{schedule}, budget {budget / 2**20:g} MiB",
            10,
            functools.partial(_budget, setup, schedule, budget),
        )
        for schedule in ("pair_groups", "recompute", "frozen_head")
        for budget in budgets
    ]
    found += [
        Part(f"projection {each}, all", 20, functools.partial(_projection, setup, each, STATS))
        for each in of_all
    ]
    return [dataclasses.replace(part, seconds=setup.short_of(part.seconds)) for part in found]


# --- forward only -------------------------------------------------------------------------------

# `(hidden, weight, targets)` to log-probability and log-sum-exp `(n,)`.
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _projection(setup: Setup, candidate: str, stats: tuple[str, ...]) -> list[dict[str, Any]]:
    """The tile kernel under FASTPREF_PROJECTION."""

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.projection_statistics(hidden, weight, targets, Epilogue(), stats)[:2]

    def measure() -> list[dict[str, Any]]:
        name = configs.architecture(torch.device(setup.device))
        taken = configs.projection_config(name, torch.bfloat16, rich=bool(stats), softcap=False)
        _expect(candidate, taken)
        what = "forward only" + ", all statistics" * bool(stats)
        return [_forward(setup, what, f"tile kernel {candidate}", forward)]

    return in_environment({"FASTPREF_PROJECTION": candidate}, measure)


def _slices(setup: Setup, rows: int, columns: int) -> list[dict[str, Any]]:
    """Library products of a tile of logits at a time, folded by the row kernel."""

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            _folded(hidden[i : i + rows], weight, targets[i : i + rows], columns)
            for i in range(0, len(hidden), rows)
        ]
        return torch.cat([logps for logps, _ in found]), torch.cat([lse for _, lse in found])

    return [_forward(setup, "forward only", f"library slices {rows} x {columns}", forward)]


def _folded(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    vocabulary = len(weight)
    columns = min(columns, vocabulary)
    buffer = torch.empty(len(hidden), columns, dtype=torch.float32, device=hidden.device)
    partials = kernels.new_partials(hidden, weight, Epilogue(), columns=columns, by="library")
    for first in range(0, vocabulary, columns):
        part = weight[first : first + columns]
        out = buffer[:, : len(part)]
        _multiply(hidden, part.T, out)
        kernels.slice_statistics(out, targets, Epilogue(), partials, first)
    return kernels.merge_statistics(partials, targets)[:2]


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """In fp32 from half-precision operands, which a CPU has to convert."""
    if left.device.type == "cpu":
        left, right = left.float(), right.float()
    product(left, right, out)


def _forward(setup: Setup, what: str, candidate: str, forward: Forward) -> dict[str, Any]:
    error, allowed = _check(setup, forward)
    inputs = make_inputs(setup.large, setup.device)
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    targets = inputs.targets.flatten()
    seconds = setup.seconds(lambda: forward(hidden, weight, targets))
    rate = product_flop(setup.large) / statistics.median(seconds) / TERA
    return {
        "what": what,
        "candidate": candidate,
        "ms": milliseconds(seconds),
        "TFLOP/s": rate,
        "peak MB": setup.peak(lambda: forward(hidden, weight, targets)),
        "error": error,
        "allowed": allowed,
    }


def _check(setup: Setup, forward: Forward) -> tuple[float, float]:
    """Largest error of a log-probability, and what it may be; rows and columns end blocks early.

    The vocabulary is a multiple of 16, as the timed one is: Triton compiles once for both.

    A tensor core may cut off what it adds to its accumulator after each 16 products, at most
    2⁻²³ of what is there, and that is no more than Σ|h||w|. Exponentials and their sum add a few
    roundings of numbers as large as the log-sum-exp.
    """
    workload = dataclasses.replace(setup.large, pairs=1, length=150, entries=20016)
    if setup.rehearsal:
        workload = dataclasses.replace(workload, length=3, entries=112)
    inputs = make_inputs(workload, setup.device)
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    targets = inputs.targets.flatten()
    truth = reference.linear_logps(hidden.double(), weight.double(), targets)
    logps, lse = forward(hidden, weight, targets)
    magnitude = (hidden.float().abs() @ weight.float().abs().T).max().item()
    size = workload.hidden_size
    allowed = 2 * (size / 16) * 2**-23 * magnitude + 2**-20 * (1 + lse.abs().max().item())
    error = (logps - truth).abs().max().item()
    if not error <= allowed:
        raise RuntimeError(f"wrong numbers: off by {error:.3g}, allowed {allowed:.3g}")
    return error, allowed


def _expect(candidate: str, taken: object) -> None:
    """A candidate that is not taken would be the default, measured once more."""
    values = [int(value) for value in dataclasses.astuple(taken)]
    asked = [int(value) for value in candidate.split(",")]
    if values[: len(asked)] != asked:
        raise RuntimeError(f"asked for {asked}, the kernels take {taken}")


# --- row kernels --------------------------------------------------------------------------------


def _rows(setup: Setup, candidate: str) -> list[dict[str, Any]]:
    """Statistics and gradients of a group under FASTPREF_ROWS."""
    return in_environment({"FASTPREF_ROWS": candidate}, lambda: _measure_rows(setup, candidate))


def _measure_rows(setup: Setup, candidate: str) -> list[dict[str, Any]]:
    _expect(candidate, configs.rows_config())
    workload: Workload = setup.large
    shape = setup.group_rows, workload.vocabulary
    narrow = torch.bfloat16
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = {"generator": generator, "device": setup.device}
    products = torch.randn(shape, **draw).mul_(6)
    targets = torch.randint(0, shape[1], shape[:1], **draw)
    coef = torch.randn(shape[0], **draw)

    logps, lse, _ = kernels.row_statistics(products, targets, Epilogue())
    few = slice(0, min(64, shape[0]))
    true_lse = products[few].double().logsumexp(-1)
    error = (lse[few] - true_lse).abs().max().item()
    grad = kernels.row_gradients_(
        products[few].clone(), targets[few], lse[few], coef[few], Epilogue(), narrow
    )
    true_grad = -(products[few].double() - true_lse[:, None]).exp()
    true_grad.scatter_add_(1, targets[few, None], torch.ones_like(true_lse)[:, None])
    true_grad *= coef[few, None]
    off = ((grad.double() - true_grad).norm() / true_grad.norm()).item()
    # One rounding of each element to 8 bits, and the log-sum-exp's few to 24.
    if not (error <= 1e-5 and off <= 2**-8):
        raise RuntimeError(f"wrong numbers: log-sum-exp off by {error:.3g}, gradient {off:.3g}")

    epilogue = Epilogue()
    seconds = setup.seconds(lambda: kernels.row_statistics(products, targets, epilogue))
    rows = [_row_entry("row statistics", candidate, seconds, 4 * products.numel(), error)]
    # In place: what is read the next time are other finite numbers.
    lse += 20
    seconds = setup.seconds(
        lambda: kernels.row_gradients_(products, targets, lse, coef, epilogue, narrow)
    )
    rows.append(_row_entry("row gradients", candidate, seconds, 6 * products.numel(), off))
    return rows


def _row_entry(
    what: str, candidate: str, seconds: list[float], moved: int, error: float
) -> dict[str, Any]:
    return {
        "what": what,
        "candidate": candidate,
        "ms": milliseconds(seconds),
        "TB/s": moved / statistics.median(seconds) / TERA,
        "error": error,
    }


# --- groups -------------------------------------------------------------------------------------


def _budget(setup: Setup, schedule: str, budget: int) -> list[dict[str, Any]]:
    """A step under a budget of logits; larger groups sum the head's gradient less often."""
    workload = frozen(setup.large) if SCHEDULES[schedule][1] else setup.large
    step = schedule_step(schedule, make_inputs(workload, setup.device), budget)
    seconds = setup.seconds(step)
    return [
        {
            "what": f"{schedule} by budget",
            "candidate": f"{budget / 2**20:g} MiB",
            "ms": milliseconds(seconds),
            "peak MB": setup.peak(step),
            "plan": step(),
        }
    ]
