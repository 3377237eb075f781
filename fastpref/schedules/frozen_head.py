"""Frozen head, 2 U: rows of gradient are finished in the forward and multiplied in the backward."""

from __future__ import annotations

from torch import Tensor

from fastpref.backends import Backend, Head, RowStats
from fastpref.backends.gradients import keep
from fastpref.planner import Plan, even_ranges
from fastpref.schedules.kept_rows import KeptRows


def rows_of_gradient(
    hidden: Tensor,  # (M, H)
    index: Tensor | None,  # (n,) rows of hidden, None for all
    places: Tensor | None,  # (n,) where their gradients go, None for all
    targets: Tensor,  # (n,)
    head: Head,
    plan: Plan,
    backend: Backend,
    stats: tuple[str, ...],
) -> tuple[RowStats, KeptRows]:
    """Statistics of every row, and its ∂ℓ/∂h."""
    kept = KeptRows(hidden, places, len(targets), head, backend.elementwise)
    buffer = hidden.new_empty(plan.tile, dtype=head.accumulate_dtype)

    def of_group(a: int, b: int) -> RowStats:
        rows = hidden[a:b] if index is None else hidden.index_select(0, index[a:b])
        part, grad = backend.forward_with_gradients(
            rows, targets[a:b], head, buffer[: b - a], stats
        )
        keep(backend.elementwise, grad, kept[a:b])
        return part

    groups = even_ranges(len(targets), plan.tile[0])
    return RowStats.concatenate([of_group(a, b) for a, b in groups]), kept
