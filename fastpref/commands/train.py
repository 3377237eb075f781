"""`fastpref train`: a preference-tuning run from a checkpoint and a file of pairs to curves."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastpref.commands.data import TEXT_FIELDS, Pair, read_pairs, shortened
from fastpref.commands.tables import new_table, show
from fastpref.domains import Domain, check_fields, number
from fastpref.objectives import Objective, make_objective

if TYPE_CHECKING:
    from fastpref.commands.resume import Checkpoint

CURVES = "curves.png"
RESULTS = "results.json"
DATA_SETS = ".data_sets"  # in the output, while a run reads them: one place that all processes see
DTYPES = ("auto", "float32", "bfloat16")
SHARE_PROMPT = ("auto", "true", "false")
LORA_RANK = 16
# Published for full fine-tuning; at 5e-5 adapters moved by 0.1 nats in bench/STUDY.md's sweep.
LEARNING_RATE, LORA_LEARNING_RATE = 1e-6, 2e-4


@dataclass
class TrainSettings:
    """What `fastpref train` takes; hyperparameters not given keep the objective's defaults.

    `dtype` is that of the model's products and of every weight that does not train. Weights that
    train are float32 whatever it is: a bfloat16 has 8 bits, and at a learning rate of 1e-6 hardly
    an update reaches the last of them.

    Raises:
        ValueError, TypeError: a number out of its range, or two settings that contradict each
            other.
    """

    model: str
    data: Path
    output: Path
    objective: str = "unidpo"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    eval_data: Path | None = None
    holdout: int = number(0, at_least=0, whole=True)
    epochs: float = number(1.0, above=0)
    max_steps: int = number(-1, at_least=-1, whole=True)
    learning_rate: float | None = None  # LEARNING_RATE, LORA_LEARNING_RATE where `lora`
    batch_size: int = number(2, at_least=1, whole=True)
    grad_accum: int = number(1, at_least=1, whole=True)
    max_length: int = number(1024, at_least=1, whole=True)
    lora: bool = False
    lora_rank: int | None = None  # LORA_RANK where `lora`
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    padding_free: bool = False
    share_prompt: str = "false"
    precompute_ref: bool = True
    schedule: str = "auto"
    seed: int = number(0, at_least=0, below=2**32, whole=True)
    resume: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_steps == 0:
            raise ValueError("max_steps must be at least 1, or -1 for what epochs says, got 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.share_prompt not in SHARE_PROMPT:
            expected = ", ".join(SHARE_PROMPT)
            raise ValueError(f"share_prompt must be one of {expected}, got {self.share_prompt!r}")
        if self.lora_rank is not None and not self.lora:
            raise ValueError("lora_rank is that of adapters, which only lora trains")
        if self.lora:
            self.lora_rank = LORA_RANK if self.lora_rank is None else self.lora_rank
            Domain(at_least=1, whole=True).check("lora_rank", self.lora_rank)
        if self.learning_rate is None:
            self.learning_rate = LORA_LEARNING_RATE if self.lora else LEARNING_RATE
        Domain(at_least=0).check("learning_rate", self.learning_rate)
        if self.holdout and self.eval_data is not None:
            raise ValueError("holdout and eval_data are two ways to say what to evaluate on")


def train(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Trains, evaluates before and after, and writes model, curves and numbers to `output`.

    A run that is finished is not trained again: what it reached is shown, and nothing is written.

    Returns:
        What `results.json` holds: settings, versions, evaluation before and after, one record a
        step.
    """
    _keep_quiet()
    from fastpref.commands.processes import on_main, processes, together

    if not processes().is_main_process:
        console = Console(quiet=True)
    dtype = _dtype(settings.dtype)
    with together():
        objective = make_objective(settings.objective, **settings.hyperparameters)
    given = on_main(partial(_prepare, settings, objective, dtype, console))
    checkpoint, finished = given.checkpoint, None
    if checkpoint is not None and checkpoint.reaches(settings):
        finished = checkpoint
        if given.results is not None:
            reached = f"{finished.state.global_step} steps, {finished.state.epoch:.3g} epochs"
            console.print(f"this run is finished: {reached} are trained, and no more was asked for")
            _report(settings.output, given.results, console)
            return given.results
    results = _run(settings, objective, dtype, given, finished, console)
    if processes().is_main_process:
        shutil.rmtree(settings.output / DATA_SETS)
    return results


def _run(
    settings: TrainSettings,
    objective: Objective,
    dtype: str,
    given: _Given,
    finished: Checkpoint | None,
    console: Console,
) -> dict[str, Any]:
    from fastpref.commands.processes import processes
    from fastpref.commands.resume import KeepRun

    state, checkpoint = processes(), given.checkpoint
    with console.status("loading the model, reference log-probabilities"):
        trainer = _make_trainer(settings, dtype, given.eval_name, console)
    console.print(f"[bold]{objective!r}[/bold]", highlight=False)
    console.print(
        f"on {len(trainer.train_dataset)} pairs, {_parameters(trainer.model)}, {dtype}, "
        f"evaluated on {len(trainer.eval_dataset)} {given.eval_name} pairs"
        + f", {state.num_processes} processes"
        * (state.num_processes > 1)
    )
    before = {} if checkpoint is None else dict(checkpoint.before)
    started = time.monotonic()
    if finished is not None:  # but was interrupted before its end was evaluated
        before = before or _evaluate(trainer)
        trainer._load_from_checkpoint(str(finished.path))
        trainer.state = finished.state
    else:
        if not before:
            trainer.add_callback(_evaluation_callback(trainer, before))
        if given.run is not None:
            trainer.add_callback(KeepRun(given.run, given.evaluated_on, before))
        _train(trainer, checkpoint, console)
    seconds = time.monotonic() - started
    after = _evaluate(trainer)
    trainer.save_model(str(settings.output))

    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    hardware = {"machine": platform.processor() or platform.machine(), "device": _device()}
    results = {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "run": given.run,
        "objective": repr(objective),
        "dtype": dtype,
        "rewards_per_token": getattr(objective, "length_normalized", False),
        "versions": {name: version(name) for name in ("fastpref", "torch", "transformers", "trl")},
        "hardware": hardware | {"processes": state.num_processes},
        "evaluated_on": given.eval_name,
        "before": before,
        "after": after,
        "resumed_from_step": 0 if checkpoint is None else checkpoint.state.global_step,
        "train_seconds": seconds,
        "steps": history,
    }
    if state.is_main_process:
        draw_curves(
            history,
            settings.output / CURVES,
            title=type(objective).__name__,
            per_token=results["rewards_per_token"],
        )
        (settings.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    _report(settings.output, results, console)
    return results


def _train(trainer: Any, checkpoint: Checkpoint | None, console: Console) -> None:
    if checkpoint is not None:
        console.print(f"continues after step {checkpoint.state.global_step}")
    with _progress(console) as progress:
        trainer.add_callback(_progress_callback(progress))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))


def _results_of(
    output: Path, run: dict[str, Any] | None, checkpoint: Checkpoint
) -> dict[str, Any] | None:
    """What this very run wrote at its end, if it came so far."""
    path = output / RESULTS
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("run") != run or results["steps"][-1]["step"] != checkpoint.state.global_step:
        return None
    return results


# --- what a run needs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """What the main process finds out, before anything is loaded."""

    eval_name: str  # what to call the pairs that are evaluated on
    evaluated_on: str  # their digest
    run: dict[str, Any] | None  # as `describe_run` has it, where the run may be resumed
    checkpoint: Checkpoint | None
    results: dict[str, Any] | None  # of this very run, which is finished


def _prepare(settings: TrainSettings, objective: Objective, dtype: str, console: Console) -> _Given:
    """Reads and checks what was given, and writes the data sets where every process reads them."""
    from datasets import Dataset

    from fastpref.commands.resume import describe_run, digest_of_pairs, find_checkpoint

    train_pairs, eval_pairs, eval_name = _read(settings, objective, console)
    check_directory(settings.output)
    check_model(settings.model)
    run = checkpoint = results = None
    if settings.resume:
        run = describe_run(settings, dtype, objective, train_pairs)
        checkpoint = find_checkpoint(settings.output, run, eval_pairs)
    if checkpoint is not None and checkpoint.reaches(settings):
        results = _results_of(settings.output, run, checkpoint)
    if results is None:
        has_template = tokenizer_of(settings.model).chat_template is not None
        shutil.rmtree(settings.output / DATA_SETS, ignore_errors=True)  # of a run that failed
        for name, pairs in (("train", train_pairs), ("eval", eval_pairs)):
            rows = Dataset.from_list(examples(pairs, has_template))
            rows.save_to_disk(settings.output / DATA_SETS / name)
    return _Given(eval_name, digest_of_pairs(eval_pairs), run, checkpoint, results)


def check_directory(directory: Path) -> None:
    """Makes it, and raises an OSError if nothing can be written there: before hours are spent."""
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()


def check_model(model: str) -> None:
    """Raises a FileNotFoundError for a directory without a model."""
    directory = Path(model)
    configs = ("config.json", "adapter_config.json")
    if directory.is_dir() and not any((directory / name).exists() for name in configs):
        raise FileNotFoundError(f"no model in the directory {model}: it has no config.json")


def _dtype(name: str) -> str:
    from transformers.utils import is_torch_bf16_gpu_available

    if name == "auto":
        return "bfloat16" if is_torch_bf16_gpu_available() else "float32"
    return name


def _read(
    settings: TrainSettings, objective: Objective, console: Console
) -> tuple[list[Pair], list[Pair], str]:
    """Training pairs, evaluation pairs and what to call those."""
    pairs = _read_file(settings.data, objective, console)
    if settings.eval_data is not None:
        return pairs, _read_file(settings.eval_data, objective, console), "held-out"
    if settings.holdout:
        if settings.holdout >= len(pairs):
            raise ValueError(f"holdout={settings.holdout} leaves none of {len(pairs)} pairs")
        return pairs[: -settings.holdout], pairs[-settings.holdout :], "held-out"
    return pairs, pairs, "training"


def _read_file(path: Path, objective: Objective, console: Console) -> list[Pair]:
    pairs, unused = read_pairs(path, objective)
    if unused:
        console.print(
            f"{path}: columns not used: {', '.join(unused)}", soft_wrap=True, markup=False
        )
    return pairs


def _keep_quiet() -> None:
    """One progress bar, ours: libraries keep theirs, and deprecations among themselves, quiet."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs the errors that it raises
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # has no kernel of the hub's: no need
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar over reference log-probabilities
    for library in ("transformers", "trl", "torch.utils.data"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


def _make_trainer(settings: TrainSettings, dtype: str, eval_name: str, console: Console) -> Any:
    from accelerate.state import AcceleratorState
    from datasets import load_from_disk
    from transformers.trainer_callback import PrinterCallback

    from fastpref.trl import PreferenceConfig

    AcceleratorState._reset_state()  # of an earlier run in this process, in another dtype
    config = PreferenceConfig(
        output_dir=str(settings.output),
        objective=settings.objective,
        objective_args=settings.hyperparameters,
        schedule=settings.schedule,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=cast(float, settings.learning_rate),  # said by now
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        max_length=settings.max_length,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        accelerator_config={"use_configured_state": True},  # the processes that are joined already
        dataloader_pin_memory=torch.accelerator.is_available(),
        gradient_checkpointing=settings.gradient_checkpointing,
        padding_free=settings.padding_free,
        share_prompt=settings.share_prompt,
        precompute_ref_log_probs=settings.precompute_ref,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        save_strategy="epoch" if settings.resume else "no",
    )
    peft_config = None
    if settings.lora_rank is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    data_sets = settings.output / DATA_SETS
    if not data_sets.is_dir():
        raise FileNotFoundError(f"{settings.output} must be one directory that all processes see")
    trainer = _trainer_class(eval_name, console)(
        load_policy(settings, dtype),
        args=config,
        train_dataset=load_from_disk(data_sets / "train"),
        eval_dataset=load_from_disk(data_sets / "eval"),
        processing_class=tokenizer_of(settings.model),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_policy(settings: TrainSettings, dtype: str) -> Any:
    """The model, its layers and head shared out where accelerate was given a `tp_size`."""
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = {}
    if (tp_size := int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", 1))) > 1:
        from transformers.distributed import DistributedConfig

        more["distributed_config"] = DistributedConfig(tp_size=tp_size)
    weights = getattr(torch, dtype) if settings.lora else torch.float32
    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=weights, **more)


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (ValueError, OSError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise ValueError(f"no tokenizer at {model}: {reason}") from None


def examples(pairs: list[Pair], has_template: bool) -> list[dict[str, Any]]:
    """Rows for the trainer: messages, or text. A model with a chat template gets a chat of text."""
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        row: dict[str, Any] = {name: getattr(pair, name) for name in TEXT_FIELDS}
        is_text = isinstance(pair.prompt, str)
        if not (is_text or has_template):
            raise ValueError(
                f"{pair.place} holds messages, and the model's tokenizer has no chat template"
            )
        if is_text and has_template and not pair.continues:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {name: [{"role": roles[name], "content": row[name]}] for name in roles}
        if rows and type(row["prompt"]) is not type(rows[0]["prompt"]):
            raise ValueError(
                f"{pair.place} is of another kind than {pairs[0].place}: one holds a conversation, "
                "the other text with an implicit prompt"
            )
        rows.append(row | pair.numbers | {"place": pair.place})
    return rows


def _trainer_class(eval_name: str, console: Console) -> type:
    """A trainer that says which pairs `max_length` cuts, and which it leaves out, as TRL does."""
    from fastpref.trl import PreferenceTrainer

    class SayingTrainer(PreferenceTrainer):
        def _prepare_dataset(
            self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
        ) -> Any:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            name = "training" if dataset_name == "train" else eval_name
            left_out = _left_out(dataset, prepared, name, args.max_length)
            if not len(prepared):
                raise ValueError(left_out)
            if (name == "training") == (dataset_name == "train"):  # pairs of both are named once
                for text in (left_out, _cut(prepared, name, args.max_length)):
                    if text:
                        console.print(text, style="yellow", soft_wrap=True, markup=False)
            return prepared

    return SayingTrainer


def _left_out(dataset: Any, prepared: Any, name: str, max_length: int) -> str:
    """TRL drops a pair whose prompt alone fills `max_length`: nothing to learn would be left."""
    kept = set(prepared["place"])
    places = [place for place in dataset["place"] if place not in kept]
    if not places:
        return ""
    return (
        f"{len(places)} of {len(dataset)} {name} pairs are left out, their prompts have "
        f"max_length={max_length} tokens or more:\n  " + "\n  ".join(shortened(places))
    )


def _cut(prepared: Any, name: str, max_length: int) -> str:
    lengths = zip(
        prepared["prompt_ids"], prepared["chosen_ids"], prepared["rejected_ids"], strict=True
    )
    cut = sum(len(p) + max(len(c), len(r)) > max_length for p, c, r in lengths)
    if not cut:
        return ""
    return f"responses of {cut} {name} pairs are cut, they end beyond max_length={max_length}"


def _evaluation_callback(trainer: Any, metrics: dict[str, float]) -> Any:
    """Evaluates where training begins: only then has every engine wrapped the model as it trains.

    Prepared for an evaluation alone, ZeRO refuses it and DDP would leave its gradients unreduced.
    """
    from transformers import TrainerCallback

    class EvaluateFirst(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            metrics.update(_evaluate(trainer))

    return EvaluateFirst()


def _evaluate(trainer: Any) -> dict[str, float]:
    # Before training, and beside a live reference, the trainer would leave the policy in float32.
    with trainer.accelerator.autocast():
        metrics = trainer.evaluate()
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if "/" in name or name == "eval_loss"
    }


# --- what a run shows ---------------------------------------------------------------------------


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(20),
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

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                numbers = f"loss {logs['loss']:.4f}  margin {logs['rewards/margins']:+.3f}"
                progress.update(self.task, completed=state.global_step, numbers=numbers)

    return ShowProgress()


def _report(output: Path, results: dict[str, Any], console: Console) -> None:
    """Of a run just finished, or finished before."""
    before, after = results["before"], results["after"]
    table = new_table(f"{results['evaluated_on']} pairs", "", "before", "after", "change")
    of_rewards = "reward margin" + " (per token)" * results["rewards_per_token"]
    for label, name in (
        ("loss", "loss"),
        ("reward accuracy", "rewards/accuracies"),
        (of_rewards, "rewards/margins"),
        ("chosen log-probability (nats)", "logps/chosen"),
        ("rejected log-probability (nats)", "logps/rejected"),
    ):
        old, new = before[name], after[name]
        table.add_row(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    show(console, table)
    first = results["resumed_from_step"]
    trained = results["steps"][-1]["step"] - first
    after_first = f", after {first} of an earlier part" if first else ""
    console.print(f"{trained} steps in {results['train_seconds']:.0f} s{after_first}")
    console.print(f"curves  {output / CURVES}", soft_wrap=True)
    console.print(f"numbers {output / RESULTS}", soft_wrap=True)


def draw_curves(
    history: list[dict[str, float]], path: Path, *, title: str, per_token: bool
) -> None:
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
        (panels[1], "reward (per token)" if per_token else "reward"),
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
