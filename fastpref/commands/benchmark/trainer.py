"""Whole training steps on pairs of uneven lengths: `DPOTrainer` beside `PreferenceTrainer`.

Full fine-tuning with a live reference: the policy's forward and backward, the reference's forward
and AdamW. Lengths are those of `LENGTHS`, 16 pairs in four batches, scaled to a ratio of prompts to
completions; what is in them is random.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.commands.benchmark.measure import environment, memory_growth, run_in_fresh_process
from fastpref.commands.benchmark.steps import make_trainer, optimizing
from fastpref.commands.benchmark.timing import Stopwatch, spread_of_ratios
from fastpref.commands.benchmark.workloads import LENGTHS

if TYPE_CHECKING:
    from rich.progress import Progress

STOCK = "DPOTrainer"
WAYS: dict[str, dict[str, Any]] = {
    "PreferenceTrainer": {},
    "padding_free": {"padding_free": True},
    "share_prompt": {"share_prompt": True},
}
# Tokens of prompts to those of completions: UltraFeedback's, and of long prompts.
RATIOS = {"UltraFeedback": 0.42, "long prompts": 4.0}
PAIRS = 4
_QUICK_TOKENS = 24


def lengths_at(ratio: float, tokens: float | None = None) -> list[tuple[int, int, int]]:
    """`LENGTHS` with prompts of `ratio` times the tokens of the completions, both on average.

    Args:
        tokens: of an average sequence, prompt and completion; None for as many as it has.
    """
    prompts = sum(prompt for prompt, _, _ in LENGTHS) / len(LENGTHS)
    completions = sum(chosen + rejected for _, chosen, rejected in LENGTHS) / (2 * len(LENGTHS))
    tokens = prompts + completions if tokens is None else tokens
    of_completion = tokens / (1 + ratio) / completions
    scales = tokens * ratio / (1 + ratio) / prompts, of_completion, of_completion
    return [
        (max(1, round(a * scales[0])), max(1, round(b * scales[1])), max(1, round(c * scales[2])))
        for a, b, c in LENGTHS
    ]


def make_batches(
    trainer: Any, lengths: list[tuple[int, int, int]], seed: int = 0
) -> list[dict[str, Any]]:
    """Batches of four pairs of random tokens, as the trainer's own collator makes them."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = trainer.model.config.vocab_size
    rows = [
        {
            name: torch.randint(0, vocabulary, (length,), generator=draw).tolist()
            for name, length in zip(
                ("prompt_ids", "chosen_ids", "rejected_ids"), of_pair, strict=True
            )
        }
        for of_pair in lengths
    ]
    return [trainer.data_collator(rows[i : i + PAIRS]) for i in range(0, len(rows), PAIRS)]


def tokens_of(batch: dict[str, Any]) -> int:
    """Tokens that run through the trunk."""
    return len(batch["packing"].tokens) if "packing" in batch else batch["input_ids"].numel()


def trainer_of(way: str, model_directory: str, device: str, like: Any = None) -> Any:
    options = {"pairs": PAIRS, "like": like} | WAYS.get(way, {})
    return make_trainer(way != STOCK, model_directory, device, **options)


def time_ways(
    ratio: float, tokens: float | None, model_directory: str, device: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each way's steps, all ways one after the other on each batch, and trunk tokens."""
    lengths, cycles = lengths_at(ratio, tokens), 1 if device == "cpu" else 5
    ways, like = {}, None
    for way in (STOCK, *WAYS):
        trainer = trainer_of(way, model_directory, device, like)
        ways[way] = optimizing(trainer), make_batches(trainer, lengths)
        like = None if way == STOCK else trainer
    for step, batches in ways.values():
        step(min(batches, key=tokens_of))  # warms up
    watch = Stopwatch(device)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in list(range(len(lengths) // PAIRS)) * cycles:
        for way, (step, batches) in ways.items():
            seconds[way].append(watch.seconds(partial(step, batches[index])))
    return seconds, {way: sum(map(tokens_of, batches)) for way, (_, batches) in ways.items()}


def measure_workload(
    ratio: float, tokens: float | None, model_directory: str, device: str
) -> list[dict[str, Any]]:
    """Seconds, ratios to stock TRL's within each batch, tokens of all batches, and peak bytes.

    Bytes are beyond weights and data, of two steps on the largest batch in a fresh process:
    resident ones on a CPU, the allocator's on a GPU.
    """
    given = ratio, tokens, model_directory, device

    def of(task: str, *arguments: Any, **how: bool) -> Any:
        return run_in_fresh_process(__spec__.name, [task, *arguments, *given], **how)

    seconds, trunk_tokens = of("time_ways", frees=False)
    return [
        {
            "peer": way,
            "seconds": values,
            "ratio": spread_of_ratios(values, seconds[STOCK]),
            "bytes": of("peak_of", way),
            "trunk_tokens": trunk_tokens[way],
        }
        for way, values in seconds.items()
    ]


def peak_of(way: str, ratio: float, tokens: float | None, model_directory: str, device: str) -> int:
    """Peak bytes of two steps on the batch with most tokens, beyond weights and data."""
    trainer = trainer_of(way, model_directory, device)
    batch = max(make_batches(trainer, lengths_at(ratio, tokens)), key=tokens_of)
    return memory_growth(partial(optimizing(trainer), batch), device, steps=2)


def run_trainers(
    model_directory: str | None,
    device: str,
    progress: Progress,
    *,
    quick: bool = False,
    save: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Every workload; the result is what `trainer.json` holds.

    Args:
        model_directory: a checkpoint; None, of a tiny random model.
        quick: few tokens, for a look at whether it runs.
        save: gets the results so far after every workload.
    """
    tokens = _QUICK_TOKENS if quick else None
    results: dict[str, Any] = {
        "environment": environment(device),
        "model": "tiny" if model_directory is None else Path(model_directory).name,
        "trainer": [],
    }
    with _checkpoint(model_directory) as directory:
        task = progress.add_task("", total=len(RATIOS))
        for name, ratio in RATIOS.items():
            progress.update(task, description=f"training steps: {name}")
            entries = measure_workload(ratio, tokens, directory, device)
            results["trainer"] += [{"workload": name, "prompts": ratio, **e} for e in entries]
            save(results)
            progress.advance(task)
        progress.remove_task(task)
    return results


@contextmanager
def _checkpoint(model_directory: str | None) -> Iterator[str]:
    """The directory, or one of a tiny random Llama."""
    if model_directory is not None:
        yield model_directory
        return
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="a"
    )
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        yield directory


if __name__ == "__main__":
    task, *arguments, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(json.dumps(peak_of(*arguments) if task == "peak_of" else time_ways(*arguments)))
