"""The processes of a run, as `torchrun`, `accelerate launch` or nobody started them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

PROBLEMS = (ValueError, TypeError, OSError)  # of what a user gave; anything else is a fault of ours
T = TypeVar("T")


def processes() -> PartialState:
    """This process among the others; the first call joins them."""
    return PartialState(cpu=not torch.accelerator.is_available())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which nobody waits for another: where it fails on one process, it ends on all.

    The main process raises what went wrong, the same problem of several once; the others exit with
    status 2 and say nothing.
    """
    problem = None
    try:
        yield
    except PROBLEMS as found:
        problem = found
    texts = gather_object([None if problem is None else str(problem)])
    where: dict[str, list[int]] = {}
    for process, text in enumerate(texts):
        if text is not None:
            where.setdefault(text, []).append(process)
    if not where:
        return
    if not processes().is_main_process:
        raise SystemExit(2)
    if problem is not None and len(where) == 1:
        raise problem
    raise ValueError("\n".join(_of_processes(text, those) for text, those in where.items()))


def _of_processes(text: str, those: list[int]) -> str:
    """With the processes that have the problem, unless the main one is among them."""
    return text if 0 in those else f"process {', '.join(map(str, those))}: {text}"


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, which alone does it; its problem ends all."""
    found: list[T | None] = [None]
    with together():
        if processes().is_main_process:
            found = [work()]
    return broadcast_object_list(found)[0]
