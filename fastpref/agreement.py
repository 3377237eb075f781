"""Ranks that compute one thing together: what they tell each other before they do.

Ranks that were given different arguments, or of which one has refused its own, would wait for one
another for ever. So all compare notes before anything is computed, and all raise.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed


def check_group(name: str, group: Any, what: str) -> None:
    """Raises TypeError or ValueError for a `group` that is none, or not this rank's.

    Args:
        what: the group's ranks have of each other, for the message.
    """
    if group is None:
        return
    is_group = distributed.is_available() and isinstance(group, distributed.ProcessGroup)
    if not is_group:
        raise TypeError(
            f"{name} must be a torch.distributed ProcessGroup that this rank is in (new_group "
            f"gives others no group), got {group!r}"
        )
    if distributed.get_rank(group) < 0:
        raise ValueError(f"this rank is not in {name}, whose ranks have {what}")


def refuse_capturable(capturable: object, shared: str) -> None:
    """Raises ValueError: ranks compare notes on the host."""
    if capturable:
        raise ValueError(
            "capturable=True reads nothing on the host, where ranks with parts of "
            f"{shared} compare their arguments"
        )


def of_several(group: Any) -> Any:
    """The group, None where it is of one rank."""
    return None if group is None or distributed.get_world_size(group) == 1 else group


def gathered(numbers: Sequence[int], device: torch.device, group: Any = None) -> list[list[int]]:
    """Every rank's whole numbers, by rank in the group; all must call it, with as many.

    On the host, where the group reaches it: there nobody waits for `device`, whose work under way
    is waited for otherwise.
    """
    if "cpu:" in str(distributed.get_backend_config(group)):
        device = torch.device("cpu")
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = mine.new_empty(distributed.get_world_size(group), len(mine))
    distributed.all_gather([*every], mine, group=group)
    return every.tolist()


class Agreement:
    """What a rank notes down about what it was given, before all compare it."""

    def __init__(self) -> None:
        self.alike: dict[str, object] = {}
        self.number = 0  # each rank's own, which need not be alike
        self.numbers: tuple[int, ...] = ()  # of all ranks, once they have agreed


@contextlib.contextmanager
def agreeing(group: Any, shared: str, beside: Any) -> Iterator[Agreement]:
    """In it a rank may refuse its arguments; after it, all ranks have the same, or raise.

    24 bytes of each rank are compared; nothing without a group.

    Args:
        shared: what the ranks have parts of, for messages.
        beside: a tensor on the device to compare them on, where the group does not reach the host.

    Raises:
        RuntimeError: another rank has refused what it was given.
        ValueError: something that is to be `alike` differs between ranks.
    """
    notes = Agreement()
    if group is None:
        yield notes
        return
    refusal = None
    try:
        yield notes
    except Exception as found:
        refusal = found
    digest = zlib.crc32(repr(notes.alike).encode())
    mine = [refusal is not None, digest, notes.number]
    refused, digests, numbers = zip(*gathered(mine, beside.device, group), strict=True)
    if any(refused) or len({*digests}) > 1:
        _raise(refusal, notes.alike, group, shared)
    notes.numbers = numbers


def _raise(refusal: Exception | None, alike: dict[str, object], group: Any, shared: str) -> None:
    """What went wrong, on every rank."""
    everyone: list[Any] = [None] * distributed.get_world_size(group)
    why = None if refusal is None else f"{type(refusal).__name__}: {refusal}"
    distributed.all_gather_object(everyone, (why, alike), group=group)
    if refusal is not None:
        raise refusal
    for rank, (why, _) in enumerate(everyone):
        if why is not None:
            raise RuntimeError(f"rank {rank} of those that share {shared} has refused: {why}")
    for key in alike:
        values = [found.get(key) for _, found in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"the ranks that share {shared} must be given the same {key}, got {values}"
            )
