"""The pairs as tokens: which are trained on, which settings are chosen on, which are held out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import UniDPO, shift_targets
from fastpref.commands.data import read_pairs


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair, and its scores."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Split:
    """Disjoint parts of a file: a sweep is judged on `validation`, all else on `heldout`."""

    train: list[TokenPair]
    validation: list[TokenPair]
    heldout: list[TokenPair]


@dataclass(frozen=True)
class Batch:
    """B pairs, chosen first."""

    input_ids: Tensor  # (2B, T)
    attention_mask: Tensor  # (2B, T)
    completion_mask: Tensor  # (2B, T)
    targets: Tensor  # (2B, T), -100 where not scored
    scores: Tensor  # (2B,)


def load(
    path: Path,
    tokenizer: Any,
    *,
    prompt: int,
    response: int,
    train: int,
    validation: int,
    heldout: int,
) -> Split:
    """The pairs whose prompt has at most `prompt` tokens, responses cut off after `response`.

    `heldout` and `validation` of them are kept aside, at most `train` of the others trained on.
    A response that is not cut off ends with the tokenizer's end of a turn. Which pairs are kept
    aside depends on the file and these numbers alone.
    """
    rows, _ = read_pairs(path, UniDPO())
    pairs = []
    for row in rows:
        message = [{"role": "user", "content": row.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > prompt:
            continue
        end = [tokenizer.eos_token_id]
        responses = [
            (tokenizer(answer, add_special_tokens=False)["input_ids"] + end)[:response]
            for answer in (row.chosen, row.rejected)
        ]
        scores = row.numbers["score_chosen"], row.numbers["score_rejected"]
        pairs.append(TokenPair(ids, *responses, scores))
    random.Random(0).shuffle(pairs)
    kept = heldout + validation
    if len(pairs) <= kept:
        raise ValueError(f"{path} has {len(pairs)} pairs with short prompts; {kept} are kept aside")
    return Split(pairs[kept : kept + train], pairs[heldout:kept], pairs[:heldout])


def batches(pairs: Sequence[TokenPair], size: int) -> Iterator[tuple[Sequence[TokenPair], Batch]]:
    for first in range(0, len(pairs), size):
        some = pairs[first : first + size]
        yield some, collate(some)


def collate(pairs: Sequence[TokenPair]) -> Batch:
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt, pair.rejected) for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, real, completion = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for row, (prompt, response) in enumerate(rows):
        whole = torch.tensor(prompt + response)
        ids[row, : len(whole)] = whole
        real[row, : len(whole)] = 1
        completion[row, len(prompt) : len(whole)] = 1
    scores = [pair.scores[side] for side in (0, 1) for pair in pairs]
    targets = shift_targets(ids, completion)
    return Batch(ids, real, completion, targets, torch.tensor(scores))


def order(count: int, wanted: int, seed: int) -> list[int]:
    """Which pairs the steps take, the same for every objective: epochs, each shuffled by `seed`."""
    chance, taken = random.Random(seed), []
    while len(taken) < wanted:
        taken += chance.sample(range(count), count)
    return taken[:wanted]
