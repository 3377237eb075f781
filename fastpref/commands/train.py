"""`fastpref train`: a preference-tuning run from a checkpoint and a JSONL file to curves."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastpref.commands.data import read_pairs
from fastpref.objectives import make_objective

CURVES = "curves.png"
RESULTS = "results.json"


@dataclass
class TrainSettings:
    """What `fastpref train` takes; hyperparameters not given keep the objective's defaults."""

    model: str
    data: Path
    output: Path
    objective: str = "unidpo"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    eval_data: Path | None = None
    holdout: int = 0
    epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float = 1e-6
    batch_size: int = 2
    grad_accum: int = 1
    max_length: int = 1024
    lora: bool = False
    lora_rank: int = 16
    bf16: bool = False
    gradient_checkpointing: bool = False
    precompute_ref: bool = True
    schedule: str = "auto"
    seed: int = 0
    resume: bool = False


def train(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Trains, evaluates before and after, and writes model, curves and numbers to `output`.

    Returns:
        What `results.json` holds: settings, versions, evaluation before and after, one record a
        step.
    """
    _keep_quiet()
    objective = make_objective(settings.objective, **settings.hyperparameters)
    train_pairs, eval_pairs, eval_name = _read(settings, objective.needs_scores)
    with console.status("loading the model, reference log-probabilities"):
        trainer = _make_trainer(settings, train_pairs, eval_pairs)
    console.print(
        f"[bold]{type(objective).__name__}[/bold] on {len(train_pairs)} pairs, "
        f"{_parameters(trainer.model)}, evaluated on {len(eval_pairs)} {eval_name} pairs"
    )
    with console.status("evaluating before training"):
        before = _evaluate(trainer)
    started = time.monotonic()
    with _progress(console) as progress:
        trainer.add_callback(_progress_callback(progress))
        trainer.train(resume_from_checkpoint=_checkpoint(settings))
    seconds = time.monotonic() - started
    after = _evaluate(trainer)
    trainer.save_model(str(settings.output))

    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    results = {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "objective": repr(objective),
        "versions": {name: version(name) for name in ("fastpref", "torch", "transformers", "trl")},
        "hardware": {"machine": platform.processor() or platform.machine(), "device": _device()},
        "evaluated_on": eval_name,
        "before": before,
        "after": after,
        "train_seconds": seconds,
        "steps": history,
    }
    (settings.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    draw_curves(history, settings.output / CURVES, title=type(objective).__name__)
    console.print(_result_table(before, after, eval_name))
    console.print(f"{len(history)} steps in {seconds:.0f} s")
    console.print(f"curves  {settings.output / CURVES}", soft_wrap=True)
    console.print(f"numbers {settings.output / RESULTS}", soft_wrap=True)
    return results


def _read(
    settings: TrainSettings, needs_scores: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Training pairs, evaluation pairs and what to call those."""
    pairs = read_pairs(settings.data, needs_scores=needs_scores)
    if settings.eval_data is not None:
        held_out = read_pairs(settings.eval_data, needs_scores=needs_scores)
        return pairs, held_out, "held-out"
    if settings.holdout:
        if settings.holdout >= len(pairs):
            raise ValueError(f"holdout={settings.holdout} leaves none of {len(pairs)} pairs")
        return pairs[: -settings.holdout], pairs[-settings.holdout :], "held-out"
    return pairs, pairs, "training"


def _keep_quiet() -> None:
    """One progress bar, ours: libraries keep theirs, and deprecations among themselves, quiet."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar over reference log-probabilities
    for library in ("transformers", "trl", "torch.utils.data"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


def _make_trainer(
    settings: TrainSettings, train_pairs: list[dict[str, Any]], eval_pairs: list[dict[str, Any]]
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback

    from fastpref.trl import PreferenceConfig, PreferenceTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    config = PreferenceConfig(
        output_dir=str(settings.output),
        objective=settings.objective,
        objective_args=settings.hyperparameters,
        schedule=settings.schedule,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        max_length=settings.max_length,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        gradient_checkpointing=settings.gradient_checkpointing,
        precompute_ref_log_probs=settings.precompute_ref,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        save_strategy="epoch" if settings.resume else "no",
    )
    peft_config = None
    if settings.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    conversational = tokenizer.chat_template is not None
    trainer = PreferenceTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list([_example(pair, conversational) for pair in train_pairs]),
        eval_dataset=Dataset.from_list([_example(pair, conversational) for pair in eval_pairs]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _example(pair: dict[str, Any], conversational: bool) -> dict[str, Any]:
    """Text becomes a chat of one turn for a model that has a chat template."""
    if not conversational or not isinstance(pair["prompt"], str):
        return pair
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chat = {name: [{"role": role, "content": pair[name]}] for name, role in roles.items()}
    return pair | chat


def _checkpoint(settings: TrainSettings) -> str | None:
    """Where to continue from, None at the start."""
    from transformers.trainer_utils import get_last_checkpoint

    if not settings.resume or not settings.output.is_dir():
        return None
    return get_last_checkpoint(str(settings.output))


def _evaluate(trainer: Any) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if "/" in name or name == "eval_loss"
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
    )


def _progress_callback(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class ShowProgress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.task = progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, numbers=""
            )

        def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
            if "loss" in logs:
                numbers = f"loss {logs['loss']:.4f}  margin {logs['rewards/margins']:+.3f}"
                progress.update(self.task, completed=state.global_step, numbers=numbers)

    return ShowProgress()


def _result_table(before: dict[str, float], after: dict[str, float], eval_name: str) -> Table:
    table = Table(title=f"{eval_name} pairs")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for label, name in (
        ("loss", "loss"),
        ("reward accuracy", "rewards/accuracies"),
        ("reward margin", "rewards/margins"),
        ("chosen log-probability (nats)", "logps/chosen"),
        ("rejected log-probability (nats)", "logps/rejected"),
    ):
        old, new = before[name], after[name]
        table.add_row(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    return table


def draw_curves(history: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Loss, reward margin with accuracy, and log-probabilities over the steps, as a PNG.

    A batch is small and its pairs differ: steps are drawn thin, means over a tenth of the run bold.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in history]
    window = max(1, len(steps) // 10)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    accuracy = panels[1].twinx()
    for panel, name, label, colour in (
        (panels[0], "loss", "loss", "tab:blue"),
        (panels[1], "rewards/margins", "margin", "tab:blue"),
        (accuracy, "rewards/accuracies", "accuracy (right)", "tab:green"),
        (panels[2], "logps/chosen", "chosen", "tab:blue"),
        (panels[2], "logps/rejected", "rejected", "tab:orange"),
    ):
        values = [entry[name] for entry in history]
        panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        panel.plot(steps, _running_mean(values, window), color=colour, label=label, linewidth=2)
    for panel, heading in (
        (panels[0], "loss"),
        (panels[1], "reward"),
        (panels[2], "log-probability of a response (nats)"),
    ):
        panel.set_title(heading)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    accuracy.set_ylim(0, 1.05)
    lines = panels[1].get_legend_handles_labels()[0] + accuracy.get_legend_handles_labels()[0]
    accuracy.legend(handles=lines)
    panels[2].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Over the last `window` values, fewer at the start."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _parameters(model: Any) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters trained"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
