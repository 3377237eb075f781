"""Other frameworks' trainers, their log-probabilities taken from hidden states and not from logits.

Each adapter is one method or function with the framework's signature and result; loss, data,
references and logs stay the framework's. Mixins go before the framework's own class:

    class Trainer(LlamaFactoryDPO, CustomDPOTrainer): ...

Log-probabilities are exact to fp32, tokens that are not scored never reach the head, and what was
made of whole logits, the logged `logits/*`, is of scored tokens alone. Written for LLaMA-Factory
0.9.5, ms-swift 4.6, OpenRLHF 0.11, torchtune 0.6.1, verl 0.9 and NeMo-RL of 2026. Axolotl needs
none: its `trainer_cls` takes `fastpref.trl.PreferenceTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastpref.loss import linear_logps
from fastpref.sequences import IGNORED, shift_targets

# --- what those of transformers models share ----------------------------------------------------


def token_logps(
    model: Any,
    targets: Tensor,  # (B, T), int64
    inputs: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    stats: Sequence[str] = ("mean_logits",),
) -> Any:
    """Log-probabilities of the targets, computed inside the wrapped model's own forward.

    There DDP sees the head's gradient, and FSDP and ZeRO-3 have gathered it.

    Args:
        model: a model of transformers that `add_loss_head` was given, or whatever wraps it.
        targets: the token that each position predicts, -100 where not scored.
        inputs: the model's own, without labels.
        temperature: divides the logits.
        stats: as in `linear_logps`.

    Returns:
        A `LossHeadOutput` with `logps` `(B, T)`, fp32, 0 where not scored, the statistics in
        `metrics`, and `aux_loss` where router logits were asked for.
    """
    from fastpref.trl.head import LossHeadOutput, uncast

    def loss_head(hidden: Tensor, weight: Tensor, **head: Any) -> LossHeadOutput:
        found = linear_logps(
            hidden, weight, targets, temperature=temperature, stats=tuple(stats), **head
        )
        logps, of_tokens = found if isinstance(found, tuple) else (found, {})
        return LossHeadOutput(logps=logps, metrics=of_tokens)

    return uncast(model(**inputs, loss_head=loss_head))


class _OfTransformers:
    """Gives the policy and its reference their loss head, or refuses them, before training."""

    def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        from fastpref.trl.head import add_loss_head

        for each in {id(each): each for each in (model, ref_model) if each is not None}.values():
            add_loss_head(each)
        super().__init__(model, ref_model, *args, **kwargs)  # type: ignore[call-arg]


# --- LLaMA-Factory ------------------------------------------------------------------------------


class LlamaFactoryDPO(_OfTransformers):
    """Before LLaMA-Factory's `CustomDPOTrainer`."""

    ld_alpha: float | None
    loss_type: str

    def concatenated_forward(
        self, model: Any, batch: Mapping[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Sums of log-probabilities `(B,)`, averages for losses of averages, and mean logits."""
        inputs = dict(batch)
        labels = inputs.pop("labels")
        targets = shift_targets(labels, labels != IGNORED)
        out, scored = token_logps(model, targets, inputs), targets != IGNORED
        lengths = scored.sum(1)
        weights = 1.0 if is_ref_model else _tail_weights(scored, self.ld_alpha)
        logps = (out.logps * weights).sum(1)
        averages = logps / lengths
        if self.loss_type in ("ipo", "orpo", "simpo"):  # as LLaMA-Factory's does
            logps = averages
        (chosen, rejected), mean_logits = logps.chunk(2), out.metrics["mean_logits"]
        pairs = len(chosen)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": mean_logits[:pairs][scored[:pairs]],
            "rejected_logits": mean_logits[pairs:][scored[pairs:]],
            "chosen_logps_avg": averages[:pairs],
        }


def _tail_weights(scored: Tensor, ld_alpha: float | None) -> Tensor | float:
    """LD-DPO's, by LLaMA-Factory's count: α beyond the shorter length from the first token on."""
    if ld_alpha is None:
        return 1.0
    lengths = scored.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    ends = scored.int().argmax(1) + shared
    positions = torch.arange(scored.shape[1], device=scored.device)
    return torch.where(positions < ends[:, None], 1.0, ld_alpha)


class LlamaFactoryKTO(_OfTransformers):
    """Before LLaMA-Factory's `CustomKTOTrainer`, whose `concatenated_forward` calls this."""

    _OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
    _OF_IMAGES = (
        "pixel_values",
        "image_sizes",
        "image_grid_thw",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    )

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], prefix: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean logits `(S, T)`, 0 where not scored, and sums and averages of logps `(S,)`."""
        inputs = {n: batch[prefix + n] for n in self._OF_TEXT if prefix + n in batch}
        inputs |= {n: batch[n] for n in self._OF_IMAGES if n in batch}
        labels = batch[f"{prefix}labels"]
        targets = shift_targets(labels, labels != IGNORED)
        out = token_logps(model, targets, inputs)
        logps = out.logps.sum(1)
        return out.metrics["mean_logits"], logps, logps / (targets != IGNORED).sum(1)


# --- ms-swift -----------------------------------------------------------------------------------


class SwiftDPO(_OfTransformers):
    """Before ms-swift's `DPOTrainer`, padded or padding-free. Everything after them is swift's.

    Raises:
        ValueError: an encoder-decoder, or sequence parallelism.
    """

    def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        template = kwargs["template"]
        if template.is_encoder_decoder or template.sequence_parallel_size > 1:
            raise ValueError("SwiftDPO takes decoders, without sequence parallelism")
        super().__init__(model, ref_model, *args, **kwargs)

    def concatenated_forward(
        self, model: Any, batch: Mapping[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Swift's, of a model whose logits are log-probability and mean logit of each token."""
        targets = torch.roll(batch["labels"], -1, 1)

        def scored(**inputs: Any) -> SimpleNamespace:
            out = token_logps(model, targets, inputs)
            both = torch.stack([out.logps, out.metrics["mean_logits"].to(out.logps)], -1)
            return SimpleNamespace(logits=both, aux_loss=out.aux_loss)

        swift: Any = super()
        return swift.concatenated_forward(scored, batch, is_ref_model)

    def get_per_token_logps(
        self,
        logits: Tensor,
        labels: Tensor,
        label_pad_token_id: int = -100,
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, mean logits and mask `(B, T)` of what `concatenated_forward` gave."""
        if (logits.shape, reduction) != ((*labels.shape, 2), "mean"):
            raise ValueError(
                f"expected log-probability and mean logit of {tuple(labels.shape)} tokens, reduced "
                f"by 'mean', got {tuple(logits.shape)} and {reduction!r}"
            )
        logps, mean_logits = logits.unbind(-1)
        return logps, mean_logits, labels != label_pad_token_id

    def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
        """No: the prompt never reaches the head."""
        return False


# --- OpenRLHF -----------------------------------------------------------------------------------


class OpenRLHFActor:
    """Before OpenRLHF's `Actor`, for all its trainers; calls for logits go to the `Actor`'s own.

    Raises:
        ValueError: a vision model, whose positions `Actor` makes beside its logits.
    """

    model: Any
    packing_samples: bool
    temperature: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from fastpref.trl.head import add_loss_head

        super().__init__(*args, **kwargs)
        if getattr(self, "is_vlm", False):
            raise ValueError("OpenRLHFActor takes causal language models, without images")
        add_loss_head(self.model)
        self._routers = getattr(self.model.config, "output_router_logits", False)

    def forward(
        self,
        sequences: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, A)
        attention_mask: Tensor | None = None,  # (B, T)
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        """Log-probabilities `(B, T − 1)`, or of the actions `(B, A)`; with the model's output."""
        if action_mask is None and not return_logprobs:
            actor: Any = super()
            return actor.forward(
                sequences,
                action_mask,
                attention_mask,
                return_output,
                allgather_logits,
                return_logprobs,
                ring_attn_group,
                packed_seq_lens,
                return_entropy,
                **mm_inputs,
            )
        if attention_mask is None:
            raise ValueError("attention_mask is missing, from which positions are made")

        shape = sequences.shape
        if self.packing_samples:
            from openrlhf.models.ring_attn_utils import (
                gather_and_pad_tensor,
                unpad_and_slice_tensor,
            )

            sequences, positions, targets, pad, indices = unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
            attention_mask = None
        else:
            positions = attention_mask.long().cumsum(-1) - 1
            positions.masked_fill_(attention_mask == 0, 1)
            scored = attention_mask
            if action_mask is not None:
                scored = torch.nn.functional.pad(action_mask, (shape[1] - action_mask.shape[1], 0))
            targets = shift_targets(sequences, scored)

        def by_row(tokens: Tensor) -> Tensor:  # (B, T − 1)
            if self.packing_samples:
                tokens = gather_and_pad_tensor(tokens, ring_attn_group, pad, indices, *shape)
            return tokens[:, :-1]

        inputs: dict[str, Any] = {"input_ids": sequences, "attention_mask": attention_mask}
        inputs |= {"position_ids": positions, **mm_inputs}
        if self._routers:
            inputs["output_router_logits"] = True
        stats = ("entropy",) if return_entropy else ()
        output = token_logps(self.model, targets, inputs, temperature=self.temperature, stats=stats)
        if return_entropy:
            output.entropy = by_row(output.metrics["entropy"])
        logps = by_row(output.logps)
        if action_mask is not None:
            logps = logps[:, -action_mask.shape[1] :] * action_mask.float()
        return (logps, output) if return_output else logps


# --- torchtune ----------------------------------------------------------------------------------


class TorchtuneDPO:
    """Before a DPO recipe of torchtune, of one device or many, full or LoRA."""

    _device: torch.device
    activations_handling_ctx: Any

    def concatenated_forward(
        self, model: Any, batch: tuple[Tensor, Tensor], activations_handling: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities `(B,)` of chosen and rejected, and mean logits of their tokens."""
        ids, labels = (each.to(self._device) for each in batch)
        targets = shift_targets(labels, labels != IGNORED)
        with self.activations_handling_ctx if activations_handling else nullcontext():
            tokens = _decoded(model, ids, targets)
        logps, mean_logits = tokens.unbind(-1)
        chosen, rejected = logps.sum(1).chunk(2)
        pairs, scored = len(chosen), targets != IGNORED
        return (
            chosen,
            rejected,
            mean_logits[:pairs][scored[:pairs]],
            mean_logits[pairs:][scored[pairs:]],
        )


def _decoded(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Log-probability and mean logit of each token `(2B, T, 2)`, in a torchtune model's forward."""
    decoder = getattr(model, "module", model)
    head = getattr(decoder, "output", None)
    weight_of: Any = getattr(head, "tied_module", head)
    if not hasattr(weight_of, "weight") or hasattr(head, "lora_a"):
        raise ValueError(f"torchtune's {type(head).__name__} is no plain head: leave out its LoRA")

    def unembed(hidden: Tensor) -> Tensor:
        weight = weight_of.weight
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        logps, found = linear_logps(decoder.norm(hidden), weight, targets, stats=("mean_logits",))
        return torch.stack([logps, found["mean_logits"].to(logps)], -1)

    decoder.unembed = unembed
    try:
        return model(ids)
    finally:
        del decoder.unembed


# --- verl and NeMo-RL ---------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logps: logps,
    "sum": torch.sum,
    "mean": torch.mean,
}


def linear_cross_entropy(
    hidden: Tensor,  # (N, H) or (B, T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # hidden's leading shape, or flat
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`, on any device.

    Returns:
        Log-probabilities, flat `(N,)` or reduced, and entropies `(N,)`, both differentiable, fp32.

    Raises:
        ValueError: another reduction; a group of several processes, which share out the vocabulary.
    """
    _check_whole(dist_process_group)
    if reduction.lower() not in _REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {[*_REDUCTIONS]}")
    logps, found = linear_logps(
        hidden.flatten(0, -2),
        weight,
        labels.flatten().long(),
        temperature=temperature,
        stats=("entropy",),
    )
    return _REDUCTIONS[reduction.lower()](logps), found["entropy"]


class FusedLinearForPPO(torch.nn.Module):
    """verl's `verl.utils.experimental.torch_functional.FusedLinearForPPO`; options go unused."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,  # (N, H) or (B, T, H)
        vocab_weights: Tensor,  # (V, H)
        input_ids: Tensor,  # hidden_states' leading shape
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities, fp32, and entropies in hidden's dtype, both in input_ids' shape."""
        logps, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return logps.view(input_ids.shape), entropy.view(input_ids.shape).to(hidden_states.dtype)


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,  # (T, B, H)
    output_weight_layer: Tensor,  # (V, H)
    runtime_gather_output: bool | None,
    target: Tensor,  # (B, T)
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """NeMo-RL's `nemo_rl.distributed.model_utils.from_parallel_hidden_states_to_logprobs`.

    Returns:
        Log-probabilities `(B, T − 1)` of each next token, fp32.

    Raises:
        ValueError: a group of several processes, or a part of the vocabulary.
    """
    _check_whole(tp_group)
    _check_whole(cp_group)
    if (vocab_start_index, vocab_end_index) != (0, len(output_weight_layer)):
        raise ValueError(
            f"expected the whole vocabulary, (0, {len(output_weight_layer)}), got "
            f"({vocab_start_index}, {vocab_end_index})"
        )
    hidden = tensor_parallel_hidden_states.transpose(0, 1)[:, :-1]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        logps = linear_logps(hidden, output_weight_layer, target[:, 1:])
    assert isinstance(logps, Tensor)
    return logps


def _check_whole(group: Any) -> None:
    """Of one process, or none: where the vocabulary or the sequence is shared out it is refused."""
    if group is not None and (processes := torch.distributed.get_world_size(group)) > 1:
        raise ValueError(
            f"the head or its rows are shared out over {processes} processes, and fastpref takes "
            "whole ones: use data parallelism, FSDP or ZeRO"
        )
