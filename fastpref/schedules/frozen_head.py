"""Frozen head, 2 U: rows of gradient are finished in the forward and multiplied in the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import Backend, Head, RowStats
from fastpref.planner import Plan
from fastpref.schedules.autograd import ROWS_AT_ONCE


class KeptRows:
    """∂ℓ_t/∂h_t of every row: it depends on no coefficient, so it can be had in the forward.

    It is kept where the gradient of hidden will be, so that nothing is copied when it becomes that.
    Narrower than the accumulators it would be rounded twice, so there the rest is kept beside it.
    Of bf16 as bf16: 16 bits in all, for 8 that remain. Of others as float32: a loss scale may lift
    what underflows in fp16.
    """

    def __init__(self, hidden: Tensor, index: Tensor | None, rows: int, head: Head) -> None:
        self.high = torch.zeros_like(hidden)  # (M, H)
        self.index = torch.arange(rows, device=hidden.device) if index is None else index
        self.low = None
        if hidden.dtype != head.accumulate_dtype:
            dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
            self.low = hidden.new_empty(rows, hidden.shape[1], dtype=dtype)  # (n, H)

    def fill(
        self,
        hidden: Tensor,  # (M, H)
        targets: Tensor,  # (n,)
        head: Head,
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> RowStats:
        buffer = hidden.new_empty(plan.tile, dtype=head.accumulate_dtype)

        def of_group(a: int, b: int) -> RowStats:
            rows = hidden.index_select(0, self.index[a:b])
            part, grad = backend.forward_with_gradients(
                rows, targets[a:b], head, buffer[: b - a], stats
            )
            high = grad.to(hidden.dtype)
            self.high.index_copy_(0, self.index[a:b], high)
            if self.low is not None:
                self.low[a:b] = grad.sub_(high)
            return part

        return RowStats.concatenate([of_group(a, b) for a, b in plan.groups])

    def times(self, coef: Tensor, keeps: bool) -> Tensor:
        """`coef · ∂ℓ/∂h` in hidden's layout and dtype; in place unless it is to be kept."""
        high = self.high.clone() if keeps else self.high
        for start in range(0, len(coef), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows = self.index[part]
            kept = high.index_select(0, rows).to(coef.dtype)
            if self.low is not None:
                kept += self.low[part]
            high.index_copy_(0, rows, kept.mul_(coef[part, None]).to(high.dtype))
        return high
