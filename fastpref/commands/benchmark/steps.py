"""Whole training steps: `PreferenceTrainer` beside TRL's `DPOTrainer` on one model and batch.

A step is the policy's forward and backward, the live reference's forward and the optimizer. The
"trunk" is the same step with the head left out of both models: what no loss can save.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastpref.commands.benchmark.measure import memory_growth, run_in_fresh_process
from fastpref.commands.benchmark.timing import spread_of_ratios

PAIRS, PROMPT, RESPONSE = 2, 76, 180
KINDS = ("trunk", "DPOTrainer", "PreferenceTrainer")


def make_step(kind: str, model_directory: str, lora: bool, device: str) -> Callable[[], None]:
    """A function that does one training step of `kind` on 2 pairs of 256 tokens."""
    ours = kind == "PreferenceTrainer"
    trainer = make_trainer(ours, model_directory, device, pairs=PAIRS, lora=lora)
    step = optimizing(trainer, partial(_trunk_step, trainer) if kind == "trunk" else None)
    return partial(step, _batch(trainer))


def make_trainer(
    ours: bool,
    model_directory: str,
    device: str,
    *,
    pairs: int,
    lora: bool = False,
    like: Any = None,
    **options: Any,
) -> Any:
    """`PreferenceTrainer` or `DPOTrainer` with a live reference; options are its configuration's.

    Without LoRA the reference is a frozen copy of the policy.

    Args:
        like: a trainer whose models and optimizer it is to have, that are in memory once then.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from fastpref.trl import PreferenceConfig, PreferenceTrainer

    trainer_class: Any = PreferenceTrainer if ours else DPOTrainer
    config_class: Any = PreferenceConfig if ours else DPOConfig
    config = config_class(
        tempfile.mkdtemp(),
        per_device_train_batch_size=pairs,
        gradient_checkpointing=False,
        bf16=device != "cpu",
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if like is None:
        policy = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
        models = {"model": policy}
    else:
        models = {"model": like.model, "ref_model": like.ref_model}
    return trainer_class(
        **models,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(model_directory),
        peft_config=peft_config,
        optimizers=(None if like is None else like.optimizer, None),
    )


def optimizing(
    trainer: Any, run: Callable[[dict[str, Any]], object] | None = None
) -> Callable[[dict[str, Any]], None]:
    """A function that trains on a batch: `run`, by default the trainer's own step, and AdamW."""
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets before its first step
    model = trainer.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = trainer.optimizer = trainer.optimizer or torch.optim.AdamW(trained, lr=1e-6)
    run = run or partial(trainer.training_step, model)

    def step(batch: dict[str, Any]) -> None:
        run(batch)
        optimizer.step()
        optimizer.zero_grad()
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _batch(trainer: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    vocabulary = trainer.model.config.vocab_size
    ids = torch.randint(0, vocabulary, (2 * PAIRS, PROMPT + RESPONSE), generator=draw)
    completion = torch.zeros_like(ids)
    completion[:, PROMPT:] = 1
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }
    return {name: tensor.to(trainer.accelerator.device) for name, tensor in batch.items()}


def _trunk_step(trainer: Any, batch: dict[str, torch.Tensor]) -> None:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    policy = trainer.model
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    with torch.no_grad():
        (trainer.ref_model or base).base_model(**inputs, use_cache=False)
    with trainer.accelerator.autocast():
        base.base_model(**inputs, use_cache=False).last_hidden_state.float().mean().backward()


def measure_steps(
    model_directory: str, lora: bool, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Seconds of each kind of step, interleaved, and peak bytes of three steps of each.

    Bytes are beyond weights and data: of a fresh process on a CPU, the allocator's on a GPU.
    """
    steps = {kind: make_step(kind, model_directory, lora, device) for kind in KINDS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[kind].append(time.perf_counter() - started)
    del steps, step
    return [
        {
            "peer": kind,
            "method": "LoRA" if lora else "full",
            "seconds": values,
            "ratio": spread_of_ratios(values, seconds["DPOTrainer"]),
            "bytes": run_in_fresh_process(__spec__.name, [kind, model_directory, lora, device]),
        }
        for kind, values in seconds.items()
    ]


if __name__ == "__main__":
    kind, directory, lora, device, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(memory_growth(make_step(kind, directory, lora, device), device))
