"""A head that lies on several ranks: what of it is here, and whether all ranks were given the same.

DTensors become the tensors they hold here, in autograd's sight, so that their gradients come back
as DTensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastpref.agreement import agreeing, check_group, of_several, refuse_capturable
from fastpref.backends import HeadOptions
from fastpref.backends.vocabulary_shards import Shards


class LocalHead(NamedTuple):
    """What this rank has, as plain tensors; the process group of the others, None without."""

    hidden: Tensor
    weight: Tensor
    options: HeadOptions
    weight_grad: Tensor | None
    group: Any

    @classmethod
    def of(
        cls,
        hidden: Any,
        weight: Any,
        options: HeadOptions,
        group: Any,
        weight_grad: Tensor | None = None,
    ) -> LocalHead:
        """From DTensors, or from plain tensors and `vocab_group`.

        Raises:
            TypeError, ValueError: a group that is none, or not this rank's; a DTensor that is split
                otherwise than by the vocabulary, or unlike the head's weight.
        """
        if _is_dtensor(hidden):
            if not all(placement.is_replicate() for placement in hidden.placements):
                raise ValueError(
                    "hidden must be whole on every rank, a DTensor of Replicate(), got placements "
                    f"{hidden.placements}; redistribute it"
                )
            hidden = hidden.to_local()
        beside: dict[str, Any] = {
            "bias": options["bias"],
            "frozen_weight": options["frozen_weight"],
            "frozen_scale": options["frozen_scale"],
            "weight_grad": weight_grad,
        }
        if _is_dtensor(weight):
            if group is not None:
                raise ValueError(
                    "vocab_group goes with a plain tensor, this rank's rows of the head; weight is "
                    "a DTensor, which says itself where its others are"
                )
            group = _group_of(weight)
            beside = {name: _local(name, x, weight) for name, x in beside.items()}
            weight = weight.to_local()
        else:
            for name, x in beside.items():
                if _is_dtensor(x):
                    raise ValueError(f"{name} is a DTensor and weight is not: lay them out alike")
            check_group("vocab_group", group, "the head")
        weight_grad = beside.pop("weight_grad")
        options = cast(HeadOptions, {**options, **beside})
        return cls(hidden, weight, options, weight_grad, of_several(group))

    @contextlib.contextmanager
    def agreeing(self, targets: Tensor, **settings: object) -> Iterator[Shards | None]:
        """In it a rank may refuse its arguments; after it, all ranks have the same, or raise.

        The shards' sizes are known after it; None without a group. Raises as `agreement.agreeing`.
        """
        if self.group is None:
            yield None
            return
        shards = Shards(self.group)
        with agreeing(self.group, "a head", self.hidden) as notes:
            refuse_capturable(settings.get("capturable"), "a vocabulary")
            yield shards
            notes.alike = self.alike() | self._same_rows(targets) | settings
            notes.number = len(self.weight)
        shards.sizes = notes.numbers

    def alike(self) -> dict[str, object]:
        """What must not differ between ranks that have parts of the same, whatever it is."""

        def of(x: Tensor) -> tuple[object, ...]:
            return x.dtype, *x.shape[1:], x.requires_grad

        return {
            "hidden's dtype, columns and requires_grad": of(self.hidden.flatten(0, -2)),
            "weight's dtype, columns and requires_grad": of(self.weight),
            **{name: of(x) if isinstance(x, Tensor) else x for name, x in self.options.items()},
            "weight_grad": None if self.weight_grad is None else of(self.weight_grad),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
        }

    def _same_rows(self, targets: Tensor) -> dict[str, object]:
        places = torch.arange(1, 1 + targets.numel(), device=targets.device)
        return {
            "hidden": self.hidden.shape,
            "targets": (targets.shape, (targets.flatten() * places).sum().item()),
        }


def _is_dtensor(x: object) -> bool:
    if type(x) in (Tensor, torch.nn.Parameter) or not isinstance(x, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _group_of(weight: Any) -> Any:
    """Of the mesh dimension that splits the vocabulary, None where all is here."""
    split = [i for i, placement in enumerate(weight.placements) if placement.is_shard(0)]
    rest = [x for i, x in enumerate(weight.placements) if i not in split]
    if len(split) > 1 or not all(placement.is_replicate() for placement in rest):
        raise ValueError(
            "a DTensor weight must be Shard(0) on one dimension of its mesh, parts of the "
            f"vocabulary, and Replicate() on the others, got placements {weight.placements}; "
            "redistribute it, or give full_tensor()"
        )
    return weight.device_mesh.get_group(split[0]) if split else None


def _local(name: str, x: Any, weight: Any) -> Any:
    """What is here of a tensor that must lie as the weight does."""
    if x is None:
        return None
    expected = weight.device_mesh, weight.placements
    found = (x.device_mesh, x.placements) if _is_dtensor(x) else None
    if found != expected:
        raise ValueError(
            f"{name} must be a DTensor on weight's mesh with its placements {weight.placements}, "
            f"got {'a plain tensor' if found is None else f'{found[1]} on {found[0]}'}"
        )
    return x.to_local()
