"""Ranks that share out the positions of every sequence: `cp_size`, and DeepSpeed's `sp_size`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils.generic import is_flash_attention_requested
from trl import DPOTrainer

from fastpref.trl.collator import WHOLE, Whole
from fastpref.trl.packing import layer_types


class SharesPositions(DPOTrainer):
    """A trainer whose batches are cut along their sequences where accelerate's parallelism says so.

    Then `input_ids`, attention mask and positions are this rank's; whatever is made of whole
    sequences is made of a copy that the batch brings along. With `cp_size` a context of torch's
    cuts them, and each rank has a chunk and its mirror image; with `sp_size` each has one chunk,
    and for attention DeepSpeed changes them for whole sequences of some of the heads.
    """

    model: Any
    ref_model: Any
    _sequence_group: Any = None  # the ranks that share out each sequence's positions
    _cp_size = _sp_size = 1  # how many they are; one of the two at most is above 1
    _padded_right = False  # a batch has been looked at
    _averages = 1  # over how many of them the engine averages gradients, whose sum is wanted

    def create_accelerator_and_postprocess(self) -> None:
        """With `sp_size`, neighbours load the same batch, as with the other parallelisms."""
        super().create_accelerator_and_postprocess()
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.sp_enabled and self.is_deepspeed_enabled:
            self._sp_size = parallelism.sp_size
            others = self.accelerator.num_processes // self._sp_size
            # "tp" are ranks with one batch to accelerate, which has no name for those of sp_size.
            self.accelerator.state.ds_device_mesh = init_device_mesh(
                self.accelerator.device.type, (others, self._sp_size), mesh_dim_names=("dp", "tp")
            )
            # Which would hand out every neighbour's batch in turn.
            self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader

    def get_sp_size(self) -> int:
        """How many batches Trainer counts for each of the loader's: they are not multiplied."""
        return 1

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self._sp_size

    def _share_positions_out(self) -> None:
        """Among ranks, where accelerate's parallelism says so, and nothing speaks against it."""
        parallelism = self.accelerator.parallelism_config
        if parallelism is None or not (parallelism.cp_enabled or parallelism.sp_enabled):
            return
        self._cp_size = parallelism.cp_size
        reasons = {
            "images, whose tokens stay together": self._is_vision_dataset,
            "a router's loss, which looks at all tokens of a batch": self.aux_loss_enabled,
            "an adapter that puts virtual tokens before a sequence": is_peft_model(self.model)
            and any(adapter.is_prompt_learning for adapter in self.model.peft_config.values()),
        }
        if parallelism.sp_enabled:
            reasons |= self._against_ulysses()
        for reason, found in reasons.items():
            if found:
                raise ValueError(f"{self._option} does not go with {reason}")
        if parallelism.sp_enabled:
            from fastpref.trl.ulysses import exchange_in_attention

            self._sequence_group = exchange_in_attention(self.model, self._sp_size)
            # Other stages add up over them, and average over the others.
            self._averages = self._sp_size if self._is_zero3 else 1
        else:
            self._sequence_group = self.accelerator.torch_device_mesh["cp"].get_group()
            # Which accelerate does for a policy that it is about to train, and for nobody else.
            self.accelerator._prepare_cp(*self._models)
            self._averages = self._cp_size
        pads: Any = self.data_collator
        if hasattr(pads, "pad_to_multiple_of"):
            pads.pad_to_multiple_of = math.lcm(self._chunks, pads.pad_to_multiple_of or 1)

    def _against_ulysses(self) -> dict[str, bool]:
        """It stands in for one of transformers' attentions, by name, and drops its masks."""
        configs = [model.config.get_text_config() for model in self._models]
        attentions = {config._attn_implementation for config in configs}
        flash = all(is_flash_attention_requested(config) for config in configs)
        kept = {"full_attention", "sliding_attention"} if flash else {"full_attention"}
        lost = set().union(*(layer_types(config) for config in configs)) - kept
        scatters = self._zero.get("reduce_scatter", True)
        quantises = self._zero.get("zero_quantized_gradients", False)
        return {
            "an engine other than DeepSpeed": not self.is_deepspeed_enabled,
            "tp_size, which shares out ranks in another way": bool(
                self.accelerator.parallelism_config.tp_enabled
            ),
            "ZeRO-3 without reduce_scatter, or with zero_quantized_gradients: its gradients are "
            "sums in one place, means in another": self._is_zero3 and (not scatters or quantises),
            f"layers of type {', '.join(sorted(lost))}": bool(lost),
            "a model whose attention is not one of transformers'": not all(
                model._supports_attention_backend for model in self._models
            ),
            "a reference with another attention than the policy's": len(attentions) > 1,
        }

    @property
    def _zero(self) -> dict[str, Any]:
        plugin = self.accelerator.state.deepspeed_plugin
        return {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})

    @property
    def _is_zero3(self) -> bool:
        return self._zero.get("stage") == 3

    @property
    def _models(self) -> list[Any]:
        """The policy, and the reference where there is one, out of what an engine makes of it."""
        there = (model for model in (self.model, self.ref_model) if model is not None)
        return [getattr(model, "module", model) for model in there]

    @property
    def _option(self) -> str:
        """Of accelerate's, that has ranks share positions out."""
        parallelism = self.accelerator.parallelism_config
        name = "sp_size" if parallelism.sp_enabled else "cp_size"
        return f"{name}={getattr(parallelism, name)}"

    @property
    def _chunks(self) -> int:
        """Of a sequence that ranks share out."""
        return self._sp_size if self._sp_size > 1 else 2 * self._cp_size

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
                f"{self._option} shares out sequences in {self._chunks} equal chunks, and "
                f"the batch has {length} tokens a row; have its collator pad to a multiple of "
                f"{self._chunks}"
            )
        if not self._padded_right:
            mask = inputs["attention_mask"]
            if (mask[:, 1:] > mask[:, :-1]).any():
                raise ValueError(
                    f"{self._option} shares out sequences that are padded on the right: attention "
                    "is given no mask, and the batch has padding on the left"
                )
            self._padded_right = True  # a collator does as it does
        positions = torch.arange(length, device=ids.device).repeat(len(ids), 1)
        whole = inputs | {"position_ids": positions, WHOLE: Whole.of(inputs).clone()}
        if self._sp_size == 1:
            return super()._prepare_context_parallel_inputs(model, whole)
        rank = torch.distributed.get_rank(self._sequence_group)
        cut = ("input_ids", "attention_mask", "position_ids")
        here = {name: whole[name].chunk(self._sp_size, 1)[rank].contiguous() for name in cut}
        from fastpref.trl.ulysses import exchanging

        return exchanging, whole | here

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
