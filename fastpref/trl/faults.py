"""Faults that end a run in a sentence, on every process alike, and leave what can be resumed."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastpref.trl.step import gathered, gathered_texts

logger = logging.getLogger(__name__)

ON_NONFINITE = ("raise", "skip")
_STATE = "trainer_state.json"  # the last file of a checkpoint
_UNFINISHED = "checkpoint-is-incomplete.txt"  # of transformers: it had to write fast
_PAIRS_PER_STEP = "pairs_per_step"
_NAMED, _TOKENS = 3, 16  # rows of a rank in a message, and tokens of one


# --- numbers that are none ----------------------------------------------------------------------


def finite_weights(model: torch.nn.Module) -> bool:
    """Whether all that trains of the model is finite; of a sharded one, this process's part."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "ds_tensor", parameter)  # of ZeRO-3
            local = local.to_local() if hasattr(local, "to_local") else local
            of_device.setdefault(local.device, []).append(local.detach().isfinite().all())
    return all(bool(torch.stack(finite).all()) for finite in of_device.values())  # a wait each


def nonfinite_rows(
    losses: Tensor,  # (B,)
    logps: Tensor,  # (2B,), the policy's
    ref_logps: Tensor | None,  # (2B,)
    tokens_of: Callable[[int], list[int]],
    decode: Callable[[list[int]], str],
) -> str:
    """Which pairs of a batch have no finite loss, why, and how their chosen sequences begin.

    Nothing if there are none.
    """
    found = []
    for row in torch.nonzero(~losses.detach().isfinite()).flatten().tolist():
        pair = torch.tensor([row, row + len(losses)], device=logps.device)
        causes = [("its log-probabilities", logps), ("the reference's", ref_logps)]
        wrong = [
            f"{name} {[round(x, 3) for x in values.to(pair.device)[pair].tolist()]}"
            for name, values in causes
            if values is not None and not values.detach().to(pair.device)[pair].isfinite().all()
        ]
        why = ", ".join(wrong) or f"loss {losses[row].item()}"
        found.append(f"pair {row} ({why}): {decode(tokens_of(row)[:_TOKENS])!r} …")
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    return "; ".join(found[:_NAMED] + more)


def say_nonfinite(
    step: int, rows: str, model: torch.nn.Module, device: torch.device
) -> tuple[str, bool]:
    """One message for all processes, and whether the weights are finite everywhere.

    Args:
        rows: this process's, of `nonfinite_rows`.
    """
    finite = gathered([finite_weights(model)], device)
    whole = all(fine for (fine,) in finite)
    ranks = [f"\n  rank {rank}: {text}" for rank, text in enumerate(gathered_texts(rows)) if text]
    state = "" if whole else "; weights of the model are not finite either"
    return f"the loss of step {step} is not finite{state}{''.join(ranks)}", whole


def check_before_save(model: torch.nn.Module, place: str, device: torch.device) -> None:
    """Raises FloatingPointError, on every process, where weights are not finite."""
    fine = gathered([finite_weights(model)], device)
    if wrong := [rank for rank, (each,) in enumerate(fine) if not each]:
        raise FloatingPointError(
            f"weights of the model are not finite (ranks {wrong}), so {place} is not written; "
            "checkpoints before it are as they were"
        )


# --- stopping, together -------------------------------------------------------------------------


class Together(TrainerCallback):
    """Where processes would go different ways, they ask each other first.

    That they are to take as many steps; and, with `enable_jit_checkpoint`, whether any of them was
    told to end (SIGTERM): then all save at the end of that step, as any checkpoint, and stop.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.signals = trainer, None
        if getattr(trainer.args, "enable_jit_checkpoint", False):
            from transformers.trainer_jit_checkpoint import JITCheckpointCallback

            # It would save at once and alone, and before a step that it lets be taken all the same.
            self.signals = trainer.pop_callback(JITCheckpointCallback).jit_manager

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps = [planned for (planned,) in gathered([state.max_steps], args.device)]
        if len(set(steps)) > 1:
            raise ValueError(
                f"ranks 0 to {len(steps) - 1} would train {steps} steps, and each step is one of "
                "all: give every rank a data set of the same length, or max_steps"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A gradient scaler, which has looked at the gradients, skips such a step by itself.
        if self.trainer.skips_step and self.trainer.accelerator.scaler is None:
            self.trainer.accelerator.gradient_state._set_sync_gradients(False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signals is None:
            return
        told = [each for (each,) in gathered([self.signals.is_checkpoint_requested], args.device)]
        if any(told):
            logger.warning("ranks %s were told to end", [r for r, each in enumerate(told) if each])
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # who ends a process waits for seconds, not for that

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signals is not None and self.signals._original_sigterm_handler is not None:
            signal.signal(signal.SIGTERM, self.signals._original_sigterm_handler)


# --- checkpoints --------------------------------------------------------------------------------


def resumable(checkpoint: str | bool, output_dir: str) -> str | None:
    """The checkpoint to resume from: the one given, or of True the last one written to its end.

    Raises:
        ValueError: the one given was not written to its end, or there are such checkpoints alone.
    """
    if checkpoint is not True:
        path = Path(str(checkpoint))
        if path.is_dir() and not _is_complete(path):
            raise ValueError(f"{path} was not written to its end; resume from one before it")
        return str(checkpoint)
    found = sorted(_checkpoints(Path(output_dir)), key=_step_of, reverse=True)
    for path in found:
        if _is_complete(path):
            return str(path)
        logger.warning("%s was not written to its end; looking for one before it", path)
    if found:
        raise ValueError(f"no checkpoint in {output_dir} was written to its end")
    return None


def _checkpoints(output: Path) -> Iterable[Path]:
    return [
        path
        for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    if (checkpoint / _UNFINISHED).exists():
        return False
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def unfinish(checkpoint: Path) -> None:
    """Has an older run's, about to be written over, count as unfinished until that is done."""
    for name in (_STATE, _UNFINISHED):
        (checkpoint / name).unlink(missing_ok=True)


def keep_pairs_per_step(state: TrainerState, pairs: int) -> None:
    """Has the next checkpoint say how many pairs a step takes, of all processes."""
    kept: Any = state.stateful_callbacks
    kept["fastpref"] = {"args": {}, "attributes": {_PAIRS_PER_STEP: pairs}}


def check_pairs_per_step(checkpoint: str, pairs: int) -> None:
    """Raises ValueError where the checkpoint's steps took other numbers of pairs."""
    path = Path(checkpoint) / _STATE
    state: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = state.get("stateful_callbacks", {}).get("fastpref")
    if kept is None or (was := kept["attributes"][_PAIRS_PER_STEP]) == pairs:
        return
    raise ValueError(
        f"{checkpoint} took {was} pairs a step (processes × batch × accumulation) and this run "
        f"takes {pairs}, so that it would train on some pairs twice and leave others out; take as "
        "many, or set ignore_data_skip=True to begin the data anew"
    )
