"""Batches of pairs for the examples: chosen sequences first, then the rejected ones."""

import json

import torch
from torch.nn.utils.rnn import pad_sequence

from fastpref import shift_targets


def read_pairs(path):
    """Pairs of a JSONL file with `prompt`, `chosen` and `rejected`, in text."""
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def collate(pairs, tokenizer):
    """`input_ids`, `attention_mask` and `targets`, each `(2B, T)`."""
    rows, masks = [], []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt = tokenizer(pair["prompt"], add_special_tokens=False).input_ids
            answer = tokenizer(pair[side], add_special_tokens=False).input_ids
            answer = [*answer, tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + answer))
            masks.append(torch.tensor([0] * len(prompt) + [1] * len(answer)))
    ids, scored = (pad_sequence(each, batch_first=True) for each in (rows, masks))
    attention = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "targets": shift_targets(ids, scored),
    }
