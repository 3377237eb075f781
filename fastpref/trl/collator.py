"""What a batch carries besides TRL's tensors: the loss's columns, and how it becomes rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastpref.columns import LossColumns
from fastpref.objectives import Objective
from fastpref.trl.packing import Packing

COLUMNS = "loss_columns"  # arguments of preference_loss that columns give
PACKING = "packing"  # for the model's forward: how its sequences become one row
WHOLE = "whole_batch"  # as it was before ranks shared its positions out
NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", COLUMNS, WHOLE)


@dataclass(frozen=True)
class Whole:
    """What a batch loses where ranks share its positions out, which is done in place."""

    input_ids: Tensor  # (S, T)
    attention_mask: Tensor  # (S, T)
    completion_mask: Tensor  # (S, T)

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Whole:
        return cls(*(batch[field.name] for field in fields(cls)))

    def clone(self) -> Whole:
        return Whole(*(tensor.clone() for tensor in vars(self).values()))

    def to(self, device: torch.device) -> Whole:
        return Whole(*(tensor.to(device) for tensor in vars(self).values()))


class WithMore:
    """A collator that also carries what the loss takes from columns, and how to lay out the batch.

    In all else it is the one that it wraps, whose attributes are read and set through it.

    Args:
        objective: whose columns; None for none.
        share: prompts of a packed batch; None where it is not packed.
    """

    def __init__(
        self,
        collator: Callable[[list[dict]], dict],
        objective: Objective | None,
        share: bool | str | None,
    ) -> None:
        vars(self).update(collator=collator, objective=objective, share=share)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.objective is not None:
            columns = LossColumns(self.objective, examples[0].keys(), "the batch")
            more[COLUMNS] = columns.tensors(examples)
        batch = self.collator(examples) | more
        if self.share is not None:
            batch[PACKING] = packing_of(batch, self.share)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collator, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.collator, self.objective, self.share)


def packing_of(batch: Mapping[str, Any], share: bool | str) -> Packing:
    return Packing.of(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], share=share
    )
