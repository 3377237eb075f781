"""Sequences whose positions lie on several ranks, as context and sequence parallelism lay them.

Every rank has all sequences, and some positions of each, whichever. What a row's log-probability
needs is in its hidden state, so the ranks part at the head and meet where a response is added up:
sums over its rows become sums over ranks, one all-reduce of a number a response, and from there on
all have the same. A row's gradient takes its response's coefficient, which every rank then knows:
backwards nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fastpref.agreement import (
    Agreement,
    agreeing,
    check_group,
    gathered,
    of_several,
    refuse_capturable,
)


@dataclass(frozen=True, eq=False)
class SequenceParts:
    """The ranks of `group`, each with its positions of every sequence."""

    group: Any  # ProcessGroup

    def sum(self, values: Tensor) -> Tensor:
        """Over ranks; each rank's part of it has the gradient of the whole."""
        return _Sum.apply(values, self.group)

    def counts(self, mine: list[int], device: torch.device) -> tuple[list[int], list[int]]:
        """Rows of whole sequences, and the most of each that one rank has; read on the host."""
        of_ranks = list(zip(*gathered(mine, device, self.group), strict=True))
        return [sum(counts) for counts in of_ranks], [max(counts) for counts in of_ranks]


class Sharing(NamedTuple):
    """One call's: the parts, None where sequences are whole, and what its ranks compare."""

    parts: SequenceParts | None
    notes: Agreement


@contextlib.contextmanager
def sharing_sequences(group: Any, hidden: Any, capturable: bool) -> Iterator[Sharing]:
    """As `agreeing`, between the ranks of `sequence_group`, of which there may be none or one.

    Raises:
        TypeError, ValueError: a group that is none, or not this rank's; `capturable` with it.
    """
    check_group("sequence_group", group, "the sequences")
    group = of_several(group)
    with agreeing(group, "sequences", hidden) as notes:
        if group is not None:
            refuse_capturable(capturable, "the same sequences")
        yield Sharing(None if group is None else SequenceParts(group), notes)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        if total.numel():
            distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None
