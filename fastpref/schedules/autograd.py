"""What the autograd functions of all schedules share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Of the hidden states' size, converted together: 16 MiB of float32 at H = 4096.
ROWS_AT_ONCE = 1024


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward whose results are constants to autograd, and which must not be taken for more."""

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastpref's gradients have no derivative of their own, so create_graph=True would "
                "give zeros; backend='reference' has second derivatives"
            )
        return backward(ctx, *upstream)

    return checked


@torch.compiler.disable
def keeps_graph() -> bool:
    """Whether the running backward may be followed by another through the same graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def no_autocast(hidden: Tensor) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(hidden.device.type):
        return nullcontext()
    return torch.autocast(hidden.device.type, enabled=False)
