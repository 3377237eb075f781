"""Context parallelism: ranks that share out the positions of every sequence (`cp_size`)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOTrainer

from fastpref.trl.collator import WHOLE, Whole


class SharesPositions(DPOTrainer):
    """A trainer whose batches accelerate may cut along their sequences, in a context of torch's.

    In it `input_ids`, attention mask and positions are this rank's; whatever is made of whole
    sequences is made of a copy that the batch brings along.
    """

    model: Any
    ref_model: Any
    _sequence_group: Any = None  # the ranks that share out each sequence's positions
    _cp_size = 1  # how many they are

    def _share_positions_out(self) -> None:
        """Among ranks, where accelerate's parallelism says so, and nothing speaks against it."""
        parallelism = self.accelerator.parallelism_config
        if parallelism is None or not (parallelism.cp_enabled or parallelism.sp_enabled):
            return
        if parallelism.sp_enabled:
            raise ValueError(
                "sp_size shares positions out by DeepSpeed's Ulysses, whose attention is made for "
                "as many sequences as a batch has rows, and a pair is two; use cp_size, or Ulysses "
                "in a loop of your own with preference_loss(sequence_group=…)"
            )
        reasons = {
            "images, whose tokens stay together": self._is_vision_dataset,
            "a router's loss, which looks at all tokens of a batch": self.aux_loss_enabled,
            "an adapter that puts virtual tokens before a sequence": is_peft_model(self.model)
            and any(adapter.is_prompt_learning for adapter in self.model.peft_config.values()),
        }
        for reason, found in reasons.items():
            if found:
                raise ValueError(f"cp_size={parallelism.cp_size} does not go with {reason}")
        self._cp_size = parallelism.cp_size
        self._sequence_group = self.accelerator.torch_device_mesh["cp"].get_group()
        # Which accelerate does for a policy that it is about to train, and for nobody else.
        self.accelerator._prepare_cp(*(m for m in (self.model, self.ref_model) if m is not None))
        pads: Any = self.data_collator
        if hasattr(pads, "pad_to_multiple_of"):
            pads.pad_to_multiple_of = math.lcm(self._chunks, pads.pad_to_multiple_of or 1)

    @property
    def _chunks(self) -> int:
        """Of a sequence that ranks share out: each has one and its mirror image."""
        return 2 * self._cp_size

    @property
    def _sharing(self) -> int:
        """How many ranks, neighbours, work on one batch."""
        parallelism = self.accelerator.parallelism_config
        return 1 if parallelism is None else parallelism.non_data_parallel_size

    def _whole_of(self, inputs: dict[str, Any]) -> Whole:
        return inputs[WHOLE] if WHOLE in inputs else Whole.of(inputs)

    @contextlib.contextmanager
    def _shared_out(self, model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The inputs with this rank's positions alone, where nobody has shared them out yet."""
        if self._sequence_group is None or WHOLE in inputs:
            yield inputs
            return
        context, inputs = self._prepare_context_parallel_inputs(model, inputs)
        with context():
            yield inputs

    def _prepare_context_parallel_inputs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Before positions are shared out: where each stands, and a copy of the whole."""
        if self._sequence_group is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        ids = inputs["input_ids"]
        length = ids.shape[1]
        if length % self._chunks:
            raise ValueError(
                f"cp_size={self._cp_size} shares out sequences in {self._chunks} equal chunks, and "
                f"the batch has {length} tokens a row; have its collator pad to a multiple of "
                f"{self._chunks}"
            )
        positions = torch.arange(length, device=ids.device).repeat(len(ids), 1)
        more = {"position_ids": positions, WHOLE: Whole.of(inputs).clone()}
        return super()._prepare_context_parallel_inputs(model, inputs | more)

    def _here(self, whole: Tensor, inputs: dict[str, Any]) -> Tensor:
        """This rank's positions of `(S, T)`."""
        if self._sequence_group is None:
            return whole
        positions = inputs["position_ids"]  # the same in every row
        return whole.gather(1, positions[: len(whole)].to(whole.device))

    def _of_whole(self, per_token: Tensor, inputs: dict[str, Any]) -> Tensor:
        """`(S, T)` of all ranks' positions, from those that are here."""
        if self._sequence_group is None:
            return per_token
        whole = per_token.new_zeros(inputs[WHOLE].input_ids.shape)
        whole.scatter_(1, inputs["position_ids"].to(whole.device), per_token)
        torch.distributed.all_reduce(whole, group=self._sequence_group)
        return whole
