"""What is saved, never of NaN, and how a run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOTrainer

from fastpref.trl.faults import (
    check_before_save,
    check_pairs_per_step,
    finite_weights,
    keep_pairs_per_step,
    resumable,
    unfinish,
)


class SavesWholeModels(DPOTrainer):
    """A trainer whose checkpoints are finite, and resumed where they were written to their end."""

    model: Any

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if resume_from_checkpoint:
            found = resumable(resume_from_checkpoint, str(self.args.output_dir))
            if found is not None and not self.args.ignore_data_skip:
                check_pairs_per_step(found, self.get_total_train_batch_size(self.args))
            resume_from_checkpoint = found or resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        check_before_save(self.model, f"the checkpoint of step {step}", self.args.device)
        if self.args.should_save:
            unfinish(Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{step}"))
        self.accelerator.wait_for_everyone()  # nobody writes into one that counts as whole
        keep_pairs_per_step(self.state, self.get_total_train_batch_size(self.args))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state comes last: a checkpoint with it is whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # One process may well save alone: nobody is asked. A checkpoint's weights are looked at.
        if not _internal_call and not finite_weights(self.model):
            place = output_dir or self.args.output_dir
            raise FloatingPointError(
                f"weights of the model are not finite, so it is not saved to {place}"
            )
        super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """FSDP1 reads of sharded checkpoints what the optimizer has: a new one has nothing yet."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if checkpoint is not None and plugin is not None and plugin.fsdp_version == 1:
            optimizer: Any = self.optimizer
            get_optimizer_state_dict(self.model, optimizer)  # steps once, at a rate of 0
        super()._load_optimizer_and_scheduler(checkpoint)
