"""What the stages measure on: sizes, names of peers, the clock."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu.parts import Call

from fastpref.commands.benchmark import workloads
from fastpref.commands.benchmark.measure import environment, memory_growth
from fastpref.commands.benchmark.peers import PEERS
from fastpref.commands.benchmark.timing import Stopwatch, spread
from fastpref.commands.benchmark.workloads import Workload

TERA = 1e12


@dataclass(frozen=True)
class Setup:
    """Args: see `make_setup`, which fills in a GPU's sizes or a rehearsal's."""

    call: Call
    rehearsal: bool
    device: str
    large: Workload  # an 8 B model's head, 8 pairs
    small: Workload  # few tokens: what launches cost
    checked: Workload  # what float64 can follow
    group_rows: int  # of a pair group
    peers: tuple[str, ...]
    rounds: int  # interleaved, of what is compared
    repeats: int  # of one call after the other

    def environment(self) -> dict[str, Any]:
        found = environment(self.device)
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found["memory"] = properties.total_memory
            found["multiprocessors"] = properties.multi_processor_count
        return found

    def seconds(self, call: Callable[[], object]) -> list[float]:
        """Of a call, repeated after a warm-up."""
        warmups = 0 if self.rehearsal else 2
        return Stopwatch(self.device).repeated(call, self.repeats, warmups)

    def peak(self, step: Callable[[], object]) -> float:
        """MB beyond what is there, the most that some steps hold."""
        return memory_growth(step, self.device, 1 if self.rehearsal else 3) / 1e6

    def short_of(self, seconds: float) -> float:
        """A part's estimate: nothing takes long in a rehearsal."""
        return min(seconds, 1.0) if self.rehearsal else seconds


def make_setup(call: Call, rehearse: bool) -> Setup:
    """Of a GPU, or of a rehearsal on the CPU.

    Raises:
        RuntimeError: there is no GPU, and no rehearsal was asked for.
    """
    if rehearse:
        torch.set_num_threads(1)  # more of them wait for one another longer than they work
        workloads.HEADS["rehearsal"] = (32, 83, None)
        large = Workload("rehearsal", 2, 3, "bfloat16", backend="triton")
        return Setup(
            call,
            rehearsal=True,
            device="cpu",
            large=large,
            small=dataclasses.replace(large, pairs=1),
            checked=large,
            group_rows=6,
            peers=("naive", "CCE"),  # one that runs, one that cannot
            rounds=2,
            repeats=1,
        )
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; --rehearse runs tiny sizes on the CPU")
    return Setup(
        call,
        rehearsal=False,
        device="cuda",
        large=Workload("llama-3-8b", 8, 1024, "bfloat16"),
        small=Workload("smollm2-1.7b", 2, 128, "bfloat16"),
        checked=Workload("llama-3-8b", 2, 256, "bfloat16"),
        group_rows=2048,
        peers=tuple(name for name in PEERS if not PEERS[name].compiles),
        rounds=9,
        repeats=5,
    )


def settle(device: str) -> bool:
    """Frees what nothing refers to; False where a kernel has left the device unusable."""
    gc.collect()
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.ones(8, device=device).sum().item() == 8
    except RuntimeError:
        return False


def frozen(workload: Workload) -> Workload:
    return dataclasses.replace(workload, frozen=True)


def product_flop(workload: Workload) -> int:
    """U: one matrix product of all scored tokens."""
    return 2 * workload.rows * workload.hidden_size * workload.vocabulary


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and middle half."""
    return {name: 1e3 * value for name, value in spread(seconds).items()}


def product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, beta: int = 0
) -> torch.Tensor:
    """`out = left @ right + beta · out` by the library, from its accumulators."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=beta, out=out)
    if beta:
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)
