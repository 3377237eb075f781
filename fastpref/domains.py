"""What a number may be: one rule for hyperparameters, the head's scalars and settings.

And how the values of tensors are required to be something.

A number is an `int` or a `float`, finite unless its domain says otherwise, and within its bounds.
Fields of dataclasses declare theirs beside their default:

    beta: float = number(0.1, above=0)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ASYNC_DEVICES = ("cuda", "xpu", "meta")


@dataclass(frozen=True)
class Domain:
    """Bounds of a number; `whole` takes integers alone, `infinite` takes +inf too."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    whole: bool = False
    infinite: bool = False

    def check(self, name: str, value: object) -> None:
        """Raises TypeError for what is no number, ValueError for one outside, naming it."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "an integer" if self.whole else "a number"
            raise TypeError(f"{name} must be {expected}, got {value!r}")
        if not self._holds(float(value)):
            raise ValueError(f"{name} must be {self}, got {value}")

    def _holds(self, value: float) -> bool:
        return (
            (math.isfinite(value) or (self.infinite and value == math.inf))
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (("above", self.above), ("at least", self.at_least), ("below", self.below))
        words = [f"{name} {bound:g}" for name, bound in bounds if bound is not None]
        kind = "an integer" if self.whole else "a number" if self.infinite else "finite"
        return " and ".join([kind, *words])


FINITE = Domain()
POSITIVE = Domain(above=0)


def number(default: float, **bounds: Any) -> Any:
    """A field of a dataclass that `check_fields` holds to `Domain(**bounds)`."""
    return dataclasses.field(default=default, metadata={"domain": Domain(**bounds)})


def check_fields(settings: Any) -> None:
    """Every field of a dataclass that declares a domain; flags, by their type, are flags."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if domain := field.metadata.get("domain"):
            domain.check(field.name, value)
        elif field.type in ("bool", bool) and not isinstance(value, bool):
            raise TypeError(f"{field.name} must be True or False, got {value!r}")


def require(
    condition: Tensor, message: str, tensor: Tensor | None = None, valid: Tensor | None = None
) -> None:
    """Raises on the CPU; elsewhere asserts on the device without waiting for it."""
    if condition.device.type in _ASYNC_DEVICES:
        torch._assert_async(condition, message)
    elif not condition:
        got = "" if tensor is None else f"; got {_offending(tensor, valid)}"
        raise ValueError(message + got)


def all_finite(tensor: Tensor) -> Tensor:
    """`()`, in two launches."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor.isfinite().all()
    return torch.linalg.vector_norm(tensor, torch.inf) < torch.inf


def _offending(tensor: Tensor, valid: Tensor | None) -> object:
    """The first bad entry and its index, or a short tensor whole."""
    if valid is None:
        if tensor.is_floating_point():
            valid = tensor.isfinite()
        else:
            return tensor.tolist()
    index = tuple((~valid).nonzero()[0].tolist())
    return f"{tensor[index].item()} at {index}"
