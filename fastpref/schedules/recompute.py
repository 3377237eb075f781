"""Recompute, 4 U: the logits once more in the backward, vocabulary slice after slice."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import Backend, Grads, Head
from fastpref.backends.gradients import rounded_in_place
from fastpref.schedules.autograd import ROWS_AT_ONCE


def recomputed_gradients(
    hidden: Tensor,  # (M, H)
    index: Tensor | None,  # (n,) rows of hidden, None for all
    places: Tensor | None,  # (n,) where their gradients go, None for all
    targets: Tensor,  # (n,)
    head: Head,
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    entropy: tuple[Tensor, Tensor] | None,  # entropies (n,) and their coefficients (n,)
    tile: tuple[int, int],
    wants: tuple[bool, ...],  # hidden, weight, bias, frozen_scale
    backend: Backend,
) -> Grads:
    """Gradients in the parameters' layout and dtype; rows of coefficient 0 take no part."""
    live = _live_rows(coef, None if entropy is None else entropy[1])
    if live is not None:
        index = live if index is None else index[live]
        places = live if places is None else places[live]
        targets, lse, coef = targets[live], lse[live], coef[live]
        entropy = None if entropy is None else (entropy[0][live], entropy[1][live])
    rows = hidden if index is None else hidden.index_select(0, index)
    found = backend.recompute_backward(rows, targets, head, lse, coef, entropy, tile, wants)
    del rows
    if found.hidden is not None:
        found.hidden = _at_rows(found.hidden, places, hidden)
    return found


def _live_rows(coef: Tensor, of_entropy: Tensor | None) -> Tensor | None:
    """Rows with a coefficient, None if all have one. Only looked for where looking is free."""
    if coef.device.type != "cpu":
        return None
    live = coef != 0 if of_entropy is None else (coef != 0) | (of_entropy != 0)
    return None if live.all() else live.nonzero().flatten()


def _at_rows(grad_rows: Tensor, places: Tensor | None, hidden: Tensor) -> Tensor:
    """Rows of the gradient in hidden's layout and dtype."""
    if places is None:
        return rounded_in_place(grad_rows, hidden.dtype)
    whole = torch.zeros_like(hidden)
    for some, rows in zip(places.split(ROWS_AT_ONCE), grad_rows.split(ROWS_AT_ONCE), strict=True):
        whole.index_copy_(0, some, rows.to(hidden.dtype))
    return whole
