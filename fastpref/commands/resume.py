"""What a checkpoint was made with, and whether a run may take it up.

What decides where the weights go must stay: model, training pairs, objective with every
hyperparameter, learning rate, batch, adapters, precision, seed. The length may change: the learning
rate then follows the cosine of the new length from the step that was reached. Where files lie,
what is evaluated on, and what only trades memory for time may change too: fewer processes that
accumulate more batches make the same updates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from fastpref.commands.data import Pair
from fastpref.commands.processes import processes
from fastpref.trl.faults import resumable

if TYPE_CHECKING:
    from fastpref.commands.train import TrainSettings

_RUN = "fastpref_run.json"
_SETTINGS = ("learning_rate", "batch_size", "max_length", "lora_rank", "seed")
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """The last checkpoint of a run, and how its first part was evaluated where that still holds."""

    path: Path
    state: TrainerState
    before: dict[str, float]

    def reaches(self, settings: TrainSettings) -> bool:
        """The length asked for is trained already."""
        if settings.max_steps > 0:
            return self.state.global_step >= settings.max_steps
        return self.state.epoch >= settings.epochs


def describe_run(
    settings: TrainSettings, dtype: str, objective: Any, pairs: list[Pair]
) -> dict[str, Any]:
    """What must be the same in every part of a run, by name, as JSON has it."""
    run = {
        "model": _digest_of_model(settings.model),
        "data": f"{len(pairs)} pairs, sha256 {digest_of_pairs(pairs)}",
        "objective": type(objective).__name__,
        **dataclasses.asdict(objective),
        **{name: getattr(settings, name) for name in _SETTINGS},
        "batches_an_update": settings.grad_accum * processes().num_processes,
        "dtype": dtype,
    }
    return json.loads(json.dumps(run))


def find_checkpoint(output: Path, run: dict[str, Any], eval_pairs: list[Pair]) -> Checkpoint | None:
    """The last checkpoint in `output` that was written to its end, None where there is none.

    Raises:
        ValueError: it was made by another run; the message names every difference. Or none of
            those that are there was written to its end.
    """
    found = resumable(True, str(output))
    if found is None:
        return None
    path = Path(found)
    kept = path / _RUN
    if not kept.exists():
        raise ValueError(f"{path} cannot be resumed: it has no {_RUN}, which says what made it")
    was = json.loads(kept.read_text())
    differences = [
        f"  {name}: {was[name]} in the checkpoint, {now} asked for"
        for name, now in run.items()
        if name in was and was[name] != now
    ]
    if differences:
        lines = "\n".join(differences)
        raise ValueError(
            f"{path} is of another run and cannot be continued; give another output, or what was "
            f"given then:\n{lines}"
        )
    same = was.get("evaluated_on") == digest_of_pairs(eval_pairs)
    state = TrainerState.load_from_json(str(path / "trainer_state.json"))
    return Checkpoint(path, state, was["before"] if same else {})


class KeepRun(TrainerCallback):
    """Writes what describes the run beside the weights of every checkpoint.

    Args:
        run: by `describe_run`.
        evaluated_on: by `digest_of_pairs`.
        before: the evaluation before training, which may be filled in until a checkpoint is saved.
    """

    def __init__(self, run: dict[str, Any], evaluated_on: str, before: dict[str, float]) -> None:
        self.run, self.evaluated_on, self.before = run, evaluated_on, before

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            kept = self.run | {"evaluated_on": self.evaluated_on, "before": self.before}
            (directory / _RUN).write_text(json.dumps(kept, indent=2) + "\n")


def _digest_of_model(model: str) -> str:
    """Of weights, config and tokenizer, wherever they lie; a name on a hub stands for itself."""
    directory = Path(model)
    if not directory.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _MODEL_FILES for path in directory.glob(pattern)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"


def digest_of_pairs(pairs: list[Pair]) -> str:
    """Of what is trained on, not of where it stands."""
    content = [dataclasses.asdict(dataclasses.replace(pair, place="")) for pair in pairs]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
