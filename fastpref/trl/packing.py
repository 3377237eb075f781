"""A batch as one row of pieces: without padding, and with one copy of each prompt."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from fastpref.sequences import IGNORED, on_device
from fastpref.trl.head import agreed, backbone_of, family_of, ordinary_tokens, trying_out

logger = logging.getLogger(__name__)

BY_PIECE = "sdpa_by_piece"
# Of a prompt's tokens, from which on "auto" shares. Trunk of SmolLM2's size on a CPU, shared by
# separate: 0.90 to 1.02 of the time where 0 to 3 % are saved, 0.94 at 6, 0.89 at 10, 0.57 at 40.
LEAST_SAVED = 0.03


@dataclass(frozen=True)
class Pieces:
    """What of a row sees what: a piece is causal in itself, and may continue an earlier one.

    Its tokens then see all of that too, as responses see their prompt.
    """

    lengths: tuple[int, ...]
    continued: tuple[int | None, ...]  # the piece that each one continues
    # What layers said of themselves when they attended by piece.
    windows: set[int | None] = field(default_factory=set, compare=False, repr=False)
    _masks: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shared(self) -> bool:
        return any(piece is not None for piece in self.continued)

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Any:
        """What the last `queries` of `keys` see, `(1, 1, queries, keys)`; None if plainly causal.

        Kept: every layer asks for the same few.
        """
        if window is None or window > keys:
            window = keys
        if queries == keys == window:
            return None
        key = queries, keys, window, device
        if key not in self._masks:
            first = keys - queries  # where the first query stands
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
            self._masks[key] = mask.tril(first).triu(first - window + 1)
        return self._masks[key]


@dataclass(frozen=True)
class Packing:
    """One row of T tokens in place of S padded sequences of L; made and kept on the host."""

    tokens: Tensor  # (T,) where each token stands in the flattened padded batch
    positions: Tensor  # (T,) in its sequence
    row_of: Tensor  # (S, L) where each padded token stands in the row; 0 for padding
    uses: Tensor  # (T,) of how many sequences each token is a part
    pieces: Pieces

    @classmethod
    def of(
        cls,
        input_ids: Tensor,  # (S, L)
        attention_mask: Tensor,  # (S, L), 0 at padding, on whichever side
        completion_mask: Tensor,  # (S, L), 0 at prompts
        *,
        share: bool | str = False,
        responses: int = 2,
    ) -> Packing:
        """Packs sequences, of which `k·B + b` is response k of prompt b.

        Args:
            share: True to have one copy of what the responses of a prompt begin with; "auto" where
                that saves `LEAST_SAVED` of their tokens or more. What is shared are equal tokens of
                the prompt, so one that truncation cut in two ways is not.
        """
        ids, real, scored = (x.cpu() for x in (input_ids, attention_mask, completion_mask))
        places = torch.arange(ids.numel()).view(ids.shape)
        sequences = [place[mask.bool()] for place, mask in zip(places, real, strict=True)]
        is_prompt = scored.flatten() == 0
        row_of = torch.zeros(ids.numel(), dtype=torch.int64)
        tokens: list[Tensor] = []
        positions: list[Tensor] = []
        lengths: list[int] = []
        continued: list[int | None] = []

        def add(piece: Tensor, start: int, prompt: int | None) -> Tensor:
            """Its rows."""
            rows = sum(lengths) + torch.arange(len(piece))
            row_of[piece] = rows
            tokens.append(piece)
            positions.append(start + torch.arange(len(piece)))
            lengths.append(len(piece))
            continued.append(prompt)
            return rows

        prompts = len(sequences) // responses
        for first in range(prompts):
            group = sequences[first::prompts]
            common = _common_prompt(group, ids.flatten(), is_prompt) if share else 0
            saved = common * (responses - 1)
            if share == "auto" and saved < LEAST_SAVED * sum(map(len, group)):
                common = 0
            prompt = len(lengths) if common else None
            if common:
                rows = add(group[0][:common], 0, None)
                for sequence in group[1:]:
                    row_of[sequence[:common]] = rows
            for sequence in group:
                if len(sequence) > common:
                    add(sequence[common:], common, prompt)
        return cls(
            tokens=torch.cat(tokens),
            positions=torch.cat(positions),
            row_of=row_of.view(ids.shape),
            uses=torch.bincount(row_of[torch.cat(sequences)], minlength=sum(lengths)),
            pieces=Pieces(tuple(lengths), tuple(continued)),
        )

    def model_inputs(self, input_ids: Tensor, model: Any) -> dict[str, Any]:
        """What the model is given in place of padded `input_ids` and their attention mask.

        Without shared prompts also the arguments of transformers' `DataCollatorWithFlattening`,
        by which flash attention keeps sequences apart.
        """
        device, config = input_ids.device, model.config.get_text_config()
        positions = on_device(self.positions, device)
        inputs: dict[str, Any] = {
            "input_ids": input_ids.flatten()[on_device(self.tokens, device)][None],
            "position_ids": positions[None],
        }
        if not self.pieces.shared:
            ends = torch.tensor((0, *self.pieces.lengths)).cumsum(0).to(torch.int32)
            starts, longest = on_device(ends, device), max(self.pieces.lengths)
            inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        if is_flash_attention_requested(config):
            inputs["attention_mask"] = None
        elif config._attn_implementation == BY_PIECE:
            # Four dimensions, and transformers makes no mask of T × T, which nobody would read.
            unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
            inputs |= {"pieces": self.pieces, "attention_mask": unread}
        else:
            inputs["attention_mask"] = self._masks(config, positions, model.dtype)
        return inputs

    def _masks(self, config: Any, positions: Tensor, dtype: torch.dtype) -> Any:
        """The attention mask in the form of the model's attention; by layer type if it has such."""
        device = positions.device
        lengths = torch.tensor(self.pieces.lengths)
        prompt_of = torch.tensor([-1 if p is None else p for p in self.pieces.continued])
        piece = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        prompt = prompt_of.repeat_interleave(lengths).to(device)
        kinds = layer_types(config)

        def mask(kind: str) -> Any:
            near = _NEAR[kind](config)

            def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
                related = (piece[query] == piece[key]) | (prompt[query] == piece[key])
                return (key <= query) & related & near(positions[query], positions[key])

            return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
                batch_size=1,
                q_length=len(positions),
                kv_length=len(positions),
                mask_function=visible,
                allow_is_causal_skip=False,
                dtype=dtype,
                config=config,
                device=device,
            )

        masks = {kind: mask(kind) for kind in kinds}
        return masks if hasattr(config, "layer_types") else masks.popitem()[1]

    def hidden_of(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """`(N, H)` of the row's hidden states `(1, T, H)`; rows `(N,)` of `row_of`, on the host."""
        return hidden[0].index_select(0, on_device(rows, hidden.device))


def _common_prompt(sequences: list[Tensor], ids: Tensor, is_prompt: Tensor) -> int:
    """How many tokens of the prompt all the sequences, places in `ids`, begin with."""
    shortest = min(len(sequence) for sequence in sequences)
    begin = torch.stack([sequence[:shortest] for sequence in sequences])
    same = (ids[begin] == ids[begin[0]]) & is_prompt[begin]
    return int(same.all(0).cumprod(0).sum())


def scored_places(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where flattened targets `(S, L)` are scored, `(N,)`, and `cu_seqlens` `(S + 1,)` of that.

    Of a sequence with nothing to score it has the first place, whose target is ignored.
    """
    scored = targets != IGNORED
    scored[:, 0] |= ~scored.any(1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), scored.sum(1).cumsum(0)])
    return scored.flatten().nonzero().flatten(), cu_seqlens


# --- attention ----------------------------------------------------------------------------------


def attend_by_piece(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pieces: Pieces | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention, piece by piece where there are such: Σ L², not (Σ L)²."""
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    pieces.windows.add(window)
    queries, keys, values = (x.split(pieces.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for q, k, v, prompt in zip(queries, keys, values, pieces.continued, strict=True):
        if prompt is not None:
            k, v = torch.cat([keys[prompt], k], 2), torch.cat([values[prompt], v], 2)
        mask = pieces.mask(q.shape[2], k.shape[2], window, q.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, 1), None


AttentionInterface.register(BY_PIECE, attend_by_piece)
AttentionMaskInterface.register(BY_PIECE, sdpa_mask)

# Layer types of configs, and which keys are near enough for a query, by their positions.
_NEAR: dict[str, Callable[[Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "full_attention": lambda config: lambda query, key: query >= key,
    "sliding_attention": lambda config: (
        lambda query, key: key > query - config.sliding_window  # as in transformers
    ),
    "chunked_attention": lambda config: (
        lambda query, key: (
            query // config.attention_chunk_size == key // config.attention_chunk_size
        )
    ),
}


def layer_types(config: Any) -> set[str]:
    if types := getattr(config, "layer_types", None):
        return set(types)
    if getattr(config, "sliding_window", None) is not None:
        return {"sliding_attention"}
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return {"chunked_attention" if chunked else "full_attention"}


# --- which models -------------------------------------------------------------------------------


def prepare_packing(model: PreTrainedModel | PeftModel, *, share: bool) -> None:
    """Lets the model take packed rows, or says why it cannot.

    A few tokens are run, once as sequences alone and once packed: hidden states must agree to half
    their digits. A wrong mask or position changes what a token sees, rounding its last digits.
    Where the model attends by SDPA, it is set to do so piece by piece, which changes nothing else,
    if that agrees, and if its layers say the sliding windows that its config has.

    Args:
        share: prompts are to be shared too.

    Raises:
        ValueError: the model cannot. Where it cannot be tried (its weights are not here yet), a
            warning is logged instead.
    """
    wrapper: Any = model
    if isinstance(wrapper, PeftModel):
        for adapter in wrapper.peft_config.values():
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"{_options(share)} cannot train a {type(adapter).__name__}: its "
                    "virtual tokens would stand before the row, not before each sequence of it"
                )
    inner: Any = wrapper.get_base_model() if isinstance(wrapper, PeftModel) else wrapper
    config = inner.config.get_text_config()
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{_options(share)} needs a decoder alone, {family_of(inner)} has two")
    flash = is_flash_attention_requested(config)
    if share and flash:
        raise ValueError(
            f"share_prompt needs an attention that takes masks, and {config._attn_implementation} "
            "takes none; load the model with attn_implementation='sdpa' or 'flex_attention'"
        )
    refusal = f"{_options(share)} cannot be had with {family_of(inner)}"
    if not flash and (unknown := layer_types(config) - _NEAR.keys()):
        raise ValueError(
            f"{refusal}: no attention mask keeps sequences apart in its layers of type "
            f"{', '.join(sorted(unknown))}"
        )
    for name in _OF_LONG_ROWS:
        if getattr(config, name, None):
            raise ValueError(f"{refusal}: in long rows its {name} looks beyond a sequence")
    if config._attn_implementation == "sdpa" and inner._supports_attention_backend:
        inner.set_attn_implementation(BY_PIECE)
        with contextlib.suppress(ValueError):
            if agreed(lambda: _windows_of_packed(inner, share)) == _windows(config):
                return
        inner.set_attn_implementation("sdpa")  # by masks
    agreed(lambda: _windows_of_packed(inner, share))


# Of configs: what changes attention only in rows longer than those that are tried.
_OF_LONG_ROWS = ("attn_temperature_tuning", "index_topk")


def _windows(config: Any) -> set[int | None]:
    """Sliding windows of the layers, None of one without; empty if some attend in another way."""
    kinds = layer_types(config)
    if not kinds <= {"full_attention", "sliding_attention"}:
        return set()
    return {config.sliding_window if kind == "sliding_attention" else None for kind in kinds}


def sees_all_pairs(model: Any) -> bool:
    """Its attention looks at all T × T pairs of a row's tokens, though most are masked."""
    implementation = model.config.get_text_config()._attn_implementation
    return implementation not in (BY_PIECE, "flex_attention")


def _options(share: bool) -> str:
    return "share_prompt" if share else "padding_free"


# Of two prompts, chosen responses first: which of eight tokens, and how many are the prompt's.
_EXAMPLE = ([0, 1, 2, 3, 4], [5, 6, 7, 0, 1], [0, 1, 2, 6, 5, 4, 7], [5, 6, 3])
_PROMPTS = (3, 2, 3, 2)


@torch.no_grad()
def _windows_of_packed(model: Any, share: bool) -> set[int | None]:
    """Tries packed tokens; what its layers, if they attend by piece, said of their windows.

    Of a model that could not be tried, that none has one.
    """
    try:
        with trying_out(model):
            tokens = torch.tensor(ordinary_tokens(model, 8), device=model.device)
            sequences = [tokens[example] for example in _EXAMPLE]
            expected = torch.cat(
                [
                    backbone_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                    for ids in sequences
                ]
            ).double()
    except Exception as reason:  # whatever it makes of a few tokens, it may well train
        logger.warning(
            "%s: could not try it on packed sequences (%s: %s)",
            family_of(model),
            type(reason).__name__,
            reason,
        )
        return {None}
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1)
    is_real = ids >= 0
    is_completion = is_real.cumsum(1).cpu() > torch.tensor(_PROMPTS)[:, None]
    packing = Packing.of(ids, is_real, is_completion, share=share)
    refusal = f"{_options(share)} cannot be had with {family_of(model)}"
    try:
        with trying_out(model):
            inputs = packing.model_inputs(ids, model)
            packed = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
    except Exception as reason:
        raise ValueError(f"{refusal}: {type(reason).__name__}: {reason}") from reason
    found = packing.hidden_of(packed, packing.row_of[is_real.cpu()]).double()
    # Softmax and rotations are float32 in many a float64 model.
    flash = is_flash_attention_requested(model.config.get_text_config())
    dtypes = torch.float32, torch.bfloat16 if flash else packed.dtype
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not error <= eps**0.5:
        raise ValueError(
            f"{refusal}: its hidden states of packed tokens differ from those of the same "
            f"sequences alone by {error:.2g} of their size, where rounding explains {eps**0.5:.1g}"
        )
    return packing.pieces.windows
