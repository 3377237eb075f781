"""Which rows are scored, and to which sequence and pair they belong.

Padded and packed batches become the same thing here: a list of scored rows, pair after pair, with
offsets. Prompt, padding and ignored positions never reach the projection; where nothing may be read
on the host, as in a CUDA graph, others take their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.sequence_parts import SequenceParts

IGNORED = -100
# Devices that copy from and to page-locked memory while the host goes on.
PINNED_FOR = ("cuda", "xpu")


@dataclass(frozen=True)
class Rows:
    """N rows of M, sequence after sequence; of K responses a prompt, prompt after prompt."""

    index: Tensor  # (N,) positions in the flattened hidden states
    targets: Tensor  # (N,)
    weights: Tensor | None  # (N,) token weights
    offsets: Tensor  # (S + 1,) where each sequence starts among the N rows
    lengths: Tensor  # (S,) scored tokens of each sequence, in the caller's order
    counts: list[int]  # (S,) rows of each sequence, prompt after prompt
    whole: list[int]  # (S,) the same with those of other ranks
    most: list[int]  # (S,) the most that one rank has
    responses: int  # K; 1 where sequences stand alone
    scored: Tensor | None = None  # (N,) bool; None where all rows are
    places: Tensor | None = None  # (N,) positions that get their gradients; None for `index`
    parts: SequenceParts | None = None  # ranks that have other rows of the same sequences

    @classmethod
    def of(
        cls,
        targets: Tensor,  # (S, T), or (total,) with cu_seqlens
        cu_seqlens: Tensor | None,  # (S + 1,)
        token_weights: Tensor | None,  # as targets
        device: torch.device,  # of the hidden states
        responses: int = 1,
        parts: SequenceParts | None = None,
    ) -> Rows:
        """The scored rows alone: prompt, padding and ignored positions are left out.

        This is made on the host. Targets that lie there cost no wait; those of an accelerator are
        brought there first.
        """
        flat = targets.flatten().cpu()
        positions = torch.arange(len(flat), device=flat.device)
        if cu_seqlens is None:
            sequences = targets.shape[0]
            sequence_of = positions // max(1, targets.shape[1])
        else:
            sequences = len(cu_seqlens) - 1
            ends = cu_seqlens[1:].cpu().contiguous()
            sequence_of = torch.searchsorted(ends, positions, right=True)
        index = (flat != IGNORED).nonzero().flatten()
        order_of = sequence_of[index]
        if responses > 1:  # response k of all prompts comes first; those of a prompt adjoin here
            prompts = sequences // responses
            order_of = order_of % prompts * responses + order_of // prompts
            order_of, by_prompt = order_of.sort(stable=True)
            index = index[by_prompt]
        lengths = torch.bincount(order_of, minlength=sequences)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        counts = whole = most = lengths.tolist()
        if parts is not None:
            whole, most = parts.counts(counts, device)
        by_response = torch.tensor(whole, device="cpu").view(-1, responses).T.flatten()
        wanted = flat[index].to(torch.int64)
        host = torch.cat([index, wanted, offsets, by_response])  # one copy to the device
        sizes = [len(index), len(index), len(offsets), sequences]
        there, wanted, offsets, by_response = on_device(host, device).split(sizes)
        weights = None
        if token_weights is not None:
            weights = on_device(token_weights, device).flatten()[there].detach()
        return cls(
            index=there,
            targets=wanted,
            weights=weights,
            offsets=offsets,
            lengths=by_response,
            counts=counts,
            whole=whole,
            most=most,
            responses=responses,
            parts=parts,
        )

    @classmethod
    def of_all(
        cls,
        targets: Tensor,  # (S, T)
        token_weights: Tensor | None,  # (S, T)
        responses: int = 1,
    ) -> Rows:
        """All positions, of which nothing is read on the host.

        One that is not scored is projected as the first of its sequence that is, and weighs 0: what
        stands there is not looked at. Every sequence has a scored position.
        """
        sequences, length = targets.shape

        def by_prompt(values: Tensor) -> Tensor:
            return values.view(responses, -1, length).transpose(0, 1).flatten()

        scored = targets != IGNORED
        counts = [length] * sequences
        places = torch.arange(targets.numel(), device=targets.device).view(targets.shape)
        index = by_prompt(torch.where(scored, places, first_scored(scored) + places[:, :1]))
        weights = scored.to(torch.float32)
        if token_weights is not None:
            weights = torch.where(scored, token_weights.detach(), 0)
        return cls(
            index=index,
            targets=targets.flatten()[index].clamp(min=0),
            weights=by_prompt(weights),
            offsets=torch.arange(sequences + 1, device=targets.device) * length,
            lengths=scored.sum(1),
            counts=counts,
            whole=counts,
            most=counts,
            responses=responses,
            scored=by_prompt(scored),
            places=by_prompt(places),
        )

    def in_batch_order(self, per_sequence: Tensor) -> Tensor:
        """`(S,)` from prompt after prompt to the caller's order, response after response."""
        return per_sequence.view(-1, self.responses).T.flatten()

    def sums(
        self, values: Tensor, first: int = 0, last: int | None = None, *, weighted: bool = True
    ) -> Tensor:
        """Sums over sequences `first:last` of their scored rows' values, times the token weights.

        Added up in float64 where the device has it, one fixed order a sequence; with the rows that
        other ranks have of it.
        """
        offsets = self.offsets[first : None if last is None else last + 1]
        weights = self.weights if weighted else self.scored
        if weights is not None:
            start = sum(self.counts[:first])
            values = values * weights[start : start + len(values)].to(values.dtype)
        wide = values if values.device.type == "mps" else values.double()
        sums = torch.segment_reduce(wide, "sum", offsets=offsets - offsets[0], initial=0)
        if self.parts is not None:
            sums = self.parts.sum(sums)
        return sums.to(values.dtype)

    def repeat(self, per_sequence: Tensor, first: int = 0) -> Tensor:
        """Values of the sequences `first` and on to each of their rows."""
        last = first + len(per_sequence)
        counts = self.offsets[first : last + 1].diff()
        return per_sequence.repeat_interleave(counts, output_size=sum(self.counts[first:last]))

    def spread(self, per_sequence: Tensor, first: int = 0) -> Tensor:
        """Per-sequence coefficients to their rows, times the token weights."""
        rows = self.repeat(per_sequence, first)
        weights = self.weights_of(first, first + len(per_sequence))
        return rows if weights is None else rows * weights.to(rows.dtype)

    def weights_of(self, first: int, last: int) -> Tensor | None:
        """Token weights of the rows of sequences `first:last`."""
        if self.weights is None:
            return None
        start = sum(self.counts[:first])
        return self.weights[start : start + sum(self.counts[first:last])]


def first_scored(scored: Tensor) -> Tensor:
    """The first position along the last dimension that is, and 0 where none is; `(…, 1)`."""
    return scored.int().argmax(-1, keepdim=True)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """There; from the host to an accelerator by a copy that nobody waits for."""
    if tensor.device.type == "cpu" and device.type in PINNED_FOR:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copied_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host; the result waits for it, and for what the device had to do before.

    Called before a model runs and waited for after, so that the device has work meanwhile.
    """
    if tensor.device.type not in PINNED_FOR:
        return tensor.cpu
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    stream = getattr(torch, tensor.device.type).current_stream(tensor.device)
    arrived = stream.record_event()

    def wait() -> Tensor:
        arrived.synchronize()
        return host

    return wait


def shift_targets(input_ids: Tensor, mask: Tensor) -> Tensor:
    """Targets for `preference_loss`: what each position's hidden state predicts.

    Args:
        input_ids: `(…, T)`, int64.
        mask: `(…, T)`, nonzero at tokens to be scored (the completion, not prompt or padding).

    Returns:
        `(…, T)`, int64: `targets[…, t]` is `input_ids[…, t + 1]` where `mask[…, t + 1]` is set, and
        -100 elsewhere, the last position included. Padded batches only: in a packed one the last
        position of a sequence would be given the next one's first token, which a prompt mask hides.

    Raises:
        ValueError: the shapes differ.
    """
    if input_ids.shape != mask.shape:
        raise ValueError(
            f"mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    targets = torch.full_like(input_ids, IGNORED, dtype=torch.int64)
    following = input_ids[..., 1:].to(torch.int64)
    targets[..., :-1] = torch.where(mask[..., 1:].bool(), following, IGNORED)
    return targets
