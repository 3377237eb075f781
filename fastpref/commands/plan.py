"""`fastpref plan`: what a batch will take on a GPU, from a model's config alone.

Bytes are the planner's own predictions; peers' are counted from their code. A time floor is the
larger of FLOP over the GPU's dense 16-bit matrix rate and bytes moved over its bandwidth: no
implementation is faster, and real ones are slower. What ranks exchange is counted as sent around a
ring over links at their published rates.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.memory import SHARE, share_of
from fastpref.planner import (
    Layout,
    Plan,
    Problem,
    default_budget,
    make_plan,
    naive_bytes,
    workspace_bytes,
)

TRL_ROWS, TRL_COLUMNS = 4096, 32768
# Of one batch: beyond them lies no GPU, and a plan goes through its pairs one by one.
MOST_PAIRS, MOST_TOKENS = 2**14, 2**26


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense 16-bit matrix FLOP/s, memory bytes/s and bytes."""

    matrix_rate: float
    bandwidth: float
    memory: float


GPUS = {
    "h200": Gpu(989e12, 4.8e12, 141e9),
    "h100": Gpu(989e12, 3.35e12, 80e9),
    "a100": Gpu(312e12, 2.04e12, 80e9),
    "4090": Gpu(165e12, 1.01e12, 24e9),
    "b200": Gpu(2250e12, 8.0e12, 180e9),
    "mi300x": Gpu(1307e12, 5.3e12, 192e9),
}


# Bytes/s that a GPU sends over a link, as vendors publish them: half of the 900 GB/s that an H100's
# NVLink moves in both directions together, and the 400 Gb/s of an NDR InfiniBand port.
LINKS = {"nvlink": 450e9, "infiniband": 50e9}


@dataclass(frozen=True)
class Estimate:
    """One way to compute a batch's loss and gradients.

    Args:
        name: the schedule, or the peer.
        products: matrix products, in units of U = 2·N·H·V FLOP.
        flop: their floating-point operations.
        extra_bytes: peak beyond inputs and parameters.
        moved_bytes: least bytes read and written: logits passes, head, gradients.
        automatic: this is what schedule="auto" takes.
    """

    name: str
    products: float
    flop: int
    extra_bytes: int
    moved_bytes: int
    automatic: bool = False

    def floor_seconds(self, gpu: Gpu) -> float:
        return max(self.flop / gpu.matrix_rate, self.moved_bytes / gpu.bandwidth)


def head_shape(model: str) -> tuple[int, int]:
    """H and V from the config of a checkpoint directory or model name."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return config.hidden_size, config.vocab_size


def problem_for(
    hidden_size: int,
    vocabulary: int,
    *,
    pairs: int,
    length: int,
    lora: bool = False,
    layout: Layout | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Pairs of two responses of `length` scored tokens; of ranks, what the busiest has of them."""
    problem = Problem(
        counts=(length,) * (2 * pairs),
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        dtype=dtype,
        accumulate_dtype=torch.float32,
        device=device,
        total_rows=2 * pairs * length,
        hidden_grad=True,
        head_grad=not lora,
        kept_dtype=torch.float16 if device == "cuda" and dtype.itemsize == 2 else None,
    )
    return problem if layout is None else layout.of_rank(problem)


def planned(
    problem: Problem,
    budget: int | None = None,
    free: int | None = None,
    schedule: str = "auto",
    *,
    whole: bool = True,
) -> Plan:
    """Of pairs; a budget that is not given has its share of `free` bytes, None for no bound.

    Of sequences that are not `whole` on a rank token log-probabilities are planned: their sums, and
    with them the loss, are known when all ranks have theirs.
    """
    spare = None if free is None else functools.partial(share_of, free)
    return make_plan(problem, schedule=schedule, budget=budget, spare=spare, pairs=whole)


def estimates(
    problem: Problem, budget: int | None = None, free: int | None = None, *, whole: bool = True
) -> list[Estimate]:
    """Every schedule that gives the gradients, then naive, TRL and Liger; see `planned`.

    The peers take whole sequences only.
    """
    automatic = planned(problem, budget, free, whole=whole).schedule
    schedules = ["recompute"]
    if whole or not problem.head_grad:
        schedules = ["pair_groups" if problem.head_grad else "frozen_head", *schedules]
    found = []
    for schedule in schedules:
        plan = planned(problem, budget, free, schedule, whole=whole)
        products = plan.flop / _product(problem)
        # Bytes a logit: fp32 written, read for statistics (recompute has them) and for its
        # gradient, that written in 16 bits and read by each product that takes it.
        wanted = problem.hidden_grad + problem.head_grad
        of_logit = 4 + 4 * (schedule != "recompute") + 4 + 2 + 2 * wanted
        if (
            problem.keeps_half and schedule == "pair_groups"
        ):  # written, and made a gradient in place
            of_logit = 2 + 4 + 2 * wanted
        elif problem.keeps_half and schedule == "frozen_head":  # written, and multiplied
            of_logit = 4
        moved = of_logit * problem.rows * problem.vocabulary + _operands(problem, products)
        found.append(
            Estimate(
                schedule,
                products,
                plan.flop,
                plan.extra_bytes,
                moved,
                automatic=schedule == automatic,
            )
        )
    return [*found, _naive(problem), _trl(problem), _liger(problem)] if whole else found


def largest_batch(
    name: str, problem: Problem, free: int, budget: int | None = None, *, whole: bool = True
) -> int:
    """The most pairs whose hidden states and peak fit into `free` bytes; 0 if none does.

    Never more than `MOST_PAIRS`, nor pairs of more than `MOST_TOKENS`.
    """
    of_pair = problem.counts[:2]
    most = min(MOST_PAIRS, MOST_TOKENS // sum(of_pair))

    def fits(pairs: int) -> bool:
        rows = pairs * sum(of_pair)
        many = dataclasses.replace(problem, counts=of_pair * pairs, total_rows=rows)
        hidden = rows * problem.hidden_size * problem.dtype.itemsize
        found = estimates(many, budget, free, whole=whole)
        peak = next(e.extra_bytes for e in found if e.name == name)
        return hidden + peak <= free

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def budget_and_why(problem: Problem, budget: int | None, free: int) -> str:
    """The bytes of logits that a group of pairs may hold, and what decided them, as text."""
    share = share_of(free)
    found = default_budget(problem, share) if budget is None else budget
    if budget is not None:
        why = "as given"
    elif found < share:
        why = "what the batch needs"
    elif share > free // SHARE:
        why = "the least that is taken"
    else:
        why = f"1/{SHARE} of {free / 1e9:.3g} GB"
    return f"logits_budget {found / 1e9:.2f} GB, {why}"


# --- the trunk's tokens -------------------------------------------------------------------------


def token_lengths(model: str, data: Path) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each pair of a file, as training would have them."""
    from trl.data_utils import common_prefix_length

    from fastpref.commands.data import read_pairs
    from fastpref.commands.train import examples, tokenizer_of

    tokenizer = tokenizer_of(model)
    rows = examples(read_pairs(data)[0], tokenizer.chat_template is not None)

    def ids(row: dict[str, Any], response: str | None) -> list[int]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            end = tokenizer.eos_token or ""
            text = prompt if response is None else prompt + row[response].removesuffix(end) + end
            return tokenizer(text)["input_ids"]
        messages = prompt if response is None else prompt + row[response]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=response is None, return_dict=True
        )["input_ids"]

    lengths = []
    for row in rows:
        prompt, chosen, rejected = (ids(row, name) for name in (None, "chosen", "rejected"))
        common = min(common_prefix_length(prompt, each) for each in (chosen, rejected))
        lengths.append((common, len(chosen) - common, len(rejected) - common))
    return lengths


def trunk_tokens(lengths: list[tuple[int, int, int]], pairs: int) -> dict[str, int]:
    """Tokens that the models run over, by how batches of `pairs`, in this order, are laid out."""
    batches = [lengths[first : first + pairs] for first in range(0, len(lengths), pairs)]
    return {
        "padded": sum(2 * len(b) * max(p + max(c, r) for p, c, r in b) for b in batches),
        "padding_free": sum(2 * p + c + r for p, c, r in lengths),
        "share_prompt": sum(p + c + r for p, c, r in lengths),
    }


# --- the parts of an estimate -------------------------------------------------------------------


def _product(problem: Problem) -> int:
    return 2 * problem.rows * problem.hidden_size * problem.vocabulary


def _operands(problem: Problem, products: float) -> int:
    """Each product reads or writes the head and the rows once, at the least."""
    elements = (problem.vocabulary + problem.rows) * problem.hidden_size
    return int(products * elements * problem.dtype.itemsize)


def _gradient_elements(problem: Problem) -> tuple[int, int]:
    """Of hidden and of the head."""
    of_head = problem.vocabulary * problem.hidden_size * problem.head_grad
    return problem.total_rows * problem.hidden_size * problem.hidden_grad, of_head


def _naive(problem: Problem) -> Estimate:
    """bf16 logits, float32 copy, log-softmax and its gradient; every position is projected."""
    products = 1 + problem.hidden_grad + problem.head_grad
    elements = problem.total_rows * problem.vocabulary
    moved = 40 * elements + _operands(problem, products)
    return Estimate("naive", products, products * _product(problem), naive_bytes(problem), moved)


def _trl(problem: Problem) -> Estimate:
    """TRL 1.16: a tile of logits, float32 gradients, one recomputation.

    On a CPU it projects every position, and its fold and gradient are torch expressions over the
    tile: eight of them and a mask at once.
    """
    products = 2 + problem.hidden_grad + problem.head_grad
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    elements = sum(_gradient_elements(problem))
    on_cpu = problem.device == "cpu"
    tile = min(problem.total_rows if on_cpu else problem.rows, TRL_ROWS)
    tile *= min(problem.vocabulary, TRL_COLUMNS)
    tile_bytes = tile * (8 * wide + 1) if on_cpu else tile * narrow
    accumulators = elements * (wide + (narrow if narrow != wide else 0))
    moved = (4 * narrow + 6) * problem.rows * problem.vocabulary + _operands(problem, products)
    compacted = 0 if on_cpu else problem.rows * problem.hidden_size * narrow
    extra = tile_bytes + accumulators + compacted
    return Estimate("TRL 1.16", products, products * _product(problem), extra, moved)


def _liger(problem: Problem) -> Estimate:
    """Liger 0.8.5 DPO: pair by padded pair, with the gradient of one beside their sum."""
    products = 1 + problem.hidden_grad + problem.head_grad
    of_hidden, of_head = _gradient_elements(problem)
    narrow = problem.dtype.itemsize
    of_pair = 2 * problem.total_rows // len(problem.counts)
    extra = (
        of_hidden + 2 * of_head
    ) * narrow + 3 * of_pair * problem.vocabulary * problem.element_bytes
    extra += workspace_bytes(problem, of_pair, problem.vocabulary)
    moved = 40 * problem.rows * problem.vocabulary + _operands(problem, products)
    return Estimate("Liger DPO", products, products * _product(problem), extra, moved)
