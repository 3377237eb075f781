"""Rows of ∂ℓ_t/∂h_t, kept from the forward until their coefficients are known."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import Elementwise, Head, Kept
from fastpref.schedules.autograd import ROWS_AT_ONCE


class KeptRows:
    """∂ℓ_t/∂h_t of every row, which depends on no coefficient.

    It is kept where the gradient of hidden will be, so that nothing is copied when it becomes that.
    Narrower than the accumulators it would be rounded twice: of bfloat16 an int8 remainder is kept
    beside it; of others the rows are kept wide, for a loss scale may lift what underflows.
    """

    def __init__(
        self, hidden: Tensor, places: Tensor | None, rows: int, head: Head, by: Elementwise
    ) -> None:
        self.by, self.dtype, self.positions = by, hidden.dtype, len(hidden)
        self.index = torch.arange(rows, device=hidden.device) if places is None else places
        # Laid out at the end only.
        self.compact = hidden.dtype not in (torch.bfloat16, head.accumulate_dtype)
        self.places = self.index  # in high
        self.low: Tensor | None = None
        # On a CPU rows without a coefficient are never put; others may lie between the scored.
        fills = torch.zeros_like
        if hidden.device.type != "cpu" and rows == len(hidden):
            fills = torch.empty_like
        if self.compact:
            self.places = torch.arange(rows, device=hidden.device)
            shape = rows, hidden.shape[1]
            self.high = hidden.new_zeros(shape, dtype=head.accumulate_dtype)
        else:
            self.high = fills(hidden, memory_format=torch.contiguous_format)  # (M, H)
            if hidden.dtype == torch.bfloat16:
                low = hidden.new_empty(rows, hidden.shape[1], dtype=torch.int8)  # (n, H)
                self.low = low.zero_() if hidden.device.type == "cpu" else low

    def __getitem__(self, rows: slice) -> Kept:
        """Room for some of the rows."""
        low = None if self.low is None else self.low[rows]
        return Kept(self.high, low, self.places[rows])

    def times(self, coef: Tensor, upstream: Tensor, *, keeps: bool = False) -> Tensor:
        """`coef · upstream · ∂ℓ/∂h` in hidden's layout and dtype; in place unless it is kept."""
        high = self.high.clone() if keeps and not self.compact else self.high
        whole = high
        if self.compact:
            whole = high.new_zeros((self.positions, high.shape[1]), dtype=self.dtype)
        for start in range(0, len(coef), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            if self.compact:
                rows = high[part] * (coef[part] * upstream)[:, None]
                whole.index_copy_(0, self.index[part], rows.to(self.dtype))
            else:
                low = None if self.low is None else self.low[part]
                self.by.take_(high, low, self.index[part], coef[part], upstream)
        return whole
