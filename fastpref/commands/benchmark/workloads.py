"""Heads of real models, batches of real lengths, and their inputs.

Inputs for speed and memory are random with logits of deviation 6 and targets of probability about
one half, as trained models have: never zeros, and no pair so saturated that its gradient vanishes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import accumulate_dtype
from fastpref.planner import Problem

BETA = 0.1
LOGIT_DEVIATION = 6.0

# H, V, softcap of the LM heads, from the models' published configurations.
HEADS: dict[str, tuple[int, int, float | None]] = {
    "smollm2-135m": (576, 49152, None),
    "smollm2-1.7b": (2048, 49152, None),
    "qwen3-0.6b": (1024, 151936, None),
    "llama-3-8b": (4096, 128256, None),
    "gemma-2-9b": (3584, 256000, 30.0),
    "llama-3-70b": (8192, 128256, None),
}

# Prompt, chosen and rejected tokens of a pair: 16 quantiles of public preference data, ordered so
# that every prefix looks like the whole. The median prompt is 0.42 of the median response.
LENGTHS = (
    (77, 183, 175),
    (21, 61, 44),
    (148, 402, 371),
    (40, 110, 137),
    (318, 255, 290),
    (64, 310, 228),
    (104, 28, 96),
    (16, 214, 160),
    (90, 141, 18),
    (29, 86, 70),
    (198, 512, 448),
    (51, 168, 203),
    (124, 233, 121),
    (35, 12, 33),
    (240, 348, 325),
    (12, 197, 251),
)


@dataclass(frozen=True)
class Workload:
    """A batch under a head.

    Args:
        head: a key of `HEADS`.
        pairs: B.
        length: T, scored tokens of each response; 0 for the prompts and lengths of `LENGTHS`.
        dtype: "float32", "bfloat16" or "float16".
        frozen: the head requires no gradient.
        packed: sequences one after the other with offsets instead of padding.
        entries: V, 0 for the head's own.
        backend: what computes fastpref's schedules.
    """

    head: str
    pairs: int
    length: int
    dtype: str = "float32"
    frozen: bool = False
    packed: bool = False
    entries: int = 0
    backend: str = "auto"

    @property
    def name(self) -> str:
        length = f"{self.length} tokens" if self.length else "real lengths"
        batch = f"{self.pairs} pairs, {length}"
        extra = [word for word in ("frozen", "packed") if getattr(self, word)]
        extra += [self.backend] if self.backend != "auto" else []
        vocabulary = [f"V {self.entries}"] if self.entries else []
        return ", ".join([self.head, *vocabulary, batch, self.dtype, *extra])

    @property
    def hidden_size(self) -> int:
        return HEADS[self.head][0]

    @property
    def vocabulary(self) -> int:
        return self.entries or HEADS[self.head][1]

    @property
    def rows(self) -> int:
        """Scored tokens."""
        return sum(response for _, response in self.lengths)

    @property
    def softcap(self) -> float | None:
        return HEADS[self.head][2]

    def problem(self, device: str) -> Problem:
        """What the planner is told of it."""
        lengths, dtype = self.lengths, getattr(torch, self.dtype)
        responses = [response for _, response in lengths]
        longest = max(prompt + response for prompt, response in lengths)
        return Problem(
            counts=tuple(n for i in range(self.pairs) for n in responses[i :: self.pairs]),
            hidden_size=self.hidden_size,
            vocabulary=self.vocabulary,
            dtype=dtype,
            accumulate_dtype=accumulate_dtype(dtype),
            device=device,
            total_rows=sum(map(sum, lengths)) if self.packed else longest * len(lengths),
            hidden_grad=True,
            head_grad=not self.frozen,
        )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Prompt and response tokens of each of the 2B sequences, chosen first."""
        if self.length:
            return [(0, self.length)] * (2 * self.pairs)
        table = [LENGTHS[i % len(LENGTHS)] for i in range(self.pairs)]
        chosen = [(prompt, chosen) for prompt, chosen, _ in table]
        return chosen + [(prompt, rejected) for prompt, _, rejected in table]


@dataclass(frozen=True)
class Inputs:
    """What every peer is given."""

    hidden: Tensor  # (2B, T, H), or (total, H) when packed
    weight: Tensor  # (V, H)
    targets: Tensor  # hidden's leading shape
    softcap: float | None
    cu_seqlens: Tensor | None = None  # (2B + 1,)
    backend: str = "auto"

    def on(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, as fresh leaves that want the same gradients."""
        wants = self.weight.requires_grad
        return dataclasses.replace(
            self,
            hidden=self.hidden.detach().to(dtype, copy=True).requires_grad_(),
            weight=self.weight.detach().to(dtype, copy=True).requires_grad_(wants),
        )


def make_inputs(workload: Workload, device: str, seed: int = 0) -> Inputs:
    """Random inputs, drawn on the device; each target's logit is a little below the log-sum-exp."""
    draw: dict[str, Any] = {
        "generator": torch.Generator(device).manual_seed(seed),
        "device": device,
    }
    dtype = getattr(torch, workload.dtype)
    size, vocabulary = workload.hidden_size, workload.vocabulary
    weight = torch.randn(vocabulary, size, **draw).mul_(LOGIT_DEVIATION / size**0.5)
    longest = max(prompt + response for prompt, response in workload.lengths)
    hidden = torch.randn(2 * workload.pairs, longest, size, **draw)
    targets = torch.full((2 * workload.pairs, longest), -100, device=device)
    used = torch.zeros(2 * workload.pairs, longest, dtype=torch.bool, device=device)
    # The log-sum-exp of V normal logits of deviation s is at most log V + s²/2.
    wanted = math.log(vocabulary) + LOGIT_DEVIATION**2 / 2 - 2
    for row, (prompt, response) in enumerate(workload.lengths):
        drawn = torch.randint(0, vocabulary, (response,), **draw)
        targets[row, prompt : prompt + response] = drawn
        used[row, : prompt + response] = True
        direction = torch.nn.functional.normalize(weight[drawn], dim=-1)
        of_target = hidden[row, prompt : prompt + response]
        along = (of_target * direction).sum(-1, keepdim=True)
        length = wanted / weight[drawn].norm(dim=-1, keepdim=True)
        of_target += (length - along) * direction
    cu_seqlens = None
    if workload.packed:
        hidden, targets = hidden[used], targets[used]
        ends = torch.tensor([prompt + response for prompt, response in workload.lengths]).cumsum(0)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(not workload.frozen),
        targets,
        workload.softcap,
        cu_seqlens,
        workload.backend,
    )


def real_inputs(model_directory: str, pairs: int, dtype: str, device: str = "cpu") -> Inputs:
    """Final hidden states of a real model on the demo's pairs: random ones hide rounding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpref.commands.data import read_pairs
    from fastpref.commands.demo import PAIRS

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    chosen: list[tuple[int, list[int]]] = []
    rejected: list[tuple[int, list[int]]] = []
    for pair in read_pairs(PAIRS)[0][:pairs]:
        for response, into in ((pair.chosen, chosen), (pair.rejected, rejected)):
            prompt = tokenizer(f"{pair.prompt}\n").input_ids
            into.append((len(prompt), prompt + tokenizer(response).input_ids))
    sequences = chosen + rejected
    longest = max(len(ids) for _, ids in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for row, (prompt, tokens) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, prompt - 1 : len(tokens) - 1] = ids[row, prompt : len(tokens)]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
    to = getattr(torch, dtype)
    weight = model.lm_head.weight.detach()
    return Inputs(
        hidden.to(device, to).requires_grad_(),
        weight.to(device, to).requires_grad_(),
        targets.to(device),
        softcap=None,
    )
