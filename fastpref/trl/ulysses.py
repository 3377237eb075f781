"""DeepSpeed's Ulysses, attention in which ranks change positions for heads, for any batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel import ulysses_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class AnyRows(UlyssesSPAttentionHF):
    """DeepSpeed's, which takes as many sequences as its configuration says a batch has.

    A pair is two, and an evaluation's batches have others.
    """

    groups: Any = None
    exchanges = False  # what runs now has its sequences shared out

    def forward(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.batch_size = len(query)
        for shape in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
            length, _, *rest = getattr(self, shape)
            setattr(self, shape, torch.Size([length, len(query), *rest]))
        return super().forward(module, query, *args, **kwargs)

    @classmethod
    def register_with_transformers(cls, *_: Any, **__: Any) -> Any:
        """What accelerate asks for as it prepares a policy: all is registered by then.

        It would have no exchange in evaluation, where its ranks run batches of their own.
        """
        return cls.groups


def exchange_in_attention(model: Any, ranks: int) -> Any:
    """Has attention like the model's exchange among so many neighbours, where sequences are shared.

    Returns their process group. It holds for a process, and DeepSpeed refuses a second time.
    """
    name = model.config.get_text_config()._attn_implementation
    alone = ALL_ATTENTION_FUNCTIONS[name]
    ulysses_sp.UlyssesSPAttentionHF = AnyRows  # looked up there, to be registered
    AnyRows.groups = UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation=name,
        sequence_parallel_size=ranks,
        micro_batch_size=1,
    )
    together = ALL_ATTENTION_FUNCTIONS[name]

    def attention(*args: Any, **kwargs: Any) -> Any:
        return (together if AnyRows.exchanges else alone)(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    return AnyRows.groups.get_sequence_parallel_group()


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Other sequences, of other models and other code, are whole."""
    before, AnyRows.exchanges = AnyRows.exchanges, True
    try:
        yield
    finally:
        AnyRows.exchanges = before
