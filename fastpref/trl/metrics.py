"""What is logged: means over all pairs or tokens of all processes, each counted once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from fastpref.memory import ranks
from fastpref.trl.context import SharesPositions
from fastpref.trl.step import EvenBatches


class CountsOnce(SharesPositions):
    """A trainer that evaluates every pair once, however uneven batches and processes are."""

    _evaluated: list[float]
    _skipped_steps = 0

    @property
    def _total_train_tokens(self) -> int:
        """In the state that checkpoints keep, so that `num_tokens` goes on in a resumed run."""
        kept: Any = self.state.stateful_callbacks
        return kept.get("num_tokens", {}).get("trained", 0)

    @_total_train_tokens.setter
    def _total_train_tokens(self, count: int) -> None:
        kept: Any = self.state.stateful_callbacks
        kept["num_tokens"] = {"trained": count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._skipped_steps and "loss" in logs:
            logs["skipped_steps"] = self._skipped_steps
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        self._metrics["eval"].clear()  # predictions leave theirs behind, as nothing logs them
        if ranks() > 1 and not has_length(dataloader):
            dataloader = EvenBatches(dataloader, self.args.device)
        found = super().evaluation_loop(dataloader, *args, **kwargs)
        if not (self.is_in_train or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # It has prepared the model without DDP, and training would take it for prepared: each
            # process would follow gradients of its own.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return found

    def _first_time(self, pairs: int) -> int:
        """How many of this process's pairs are evaluated for the first time: its first ones.

        Where the data set does not divide, accelerate fills the last batches up with its beginning;
        `remainder` counts the others, of all processes in their order.
        """
        state = self.accelerator.gradient_state
        if self.model.training or not state.end_of_dataloader or state.remainder <= 0:
            return pairs
        earlier = self.accelerator.process_index // self._sharing * pairs
        return min(max(state.remainder - earlier, 0), pairs)

    def _record(
        self, metrics: dict[str, Tensor], lengths: Tensor, attention_mask: Tensor, broken: Tensor
    ) -> bool:
        """Keeps the metrics, means over the pairs or tokens of all processes.

        Those of a training step as TRL does, to be averaged over steps; those of an evaluation
        over all of it.

        Args:
            broken: how many losses are not finite.

        Returns:
            In training, whether there are such on any process: then no metrics are kept.
        """
        mode = "train" if self.model.training else "eval"
        chosen, rejected = lengths.view(2, -1)
        per_token = {
            "entropy": lengths.sum(),
            "mean_token_accuracy": chosen.sum(),
            "logits/chosen": chosen.sum(),
            "logits/rejected": rejected.sum(),
        }
        pairs = ((chosen > 0) & (rejected > 0)).sum()
        values = torch.stack([value.float() for value in metrics.values()])
        counts = torch.stack([per_token.get(name, pairs) for name in metrics]).to(values)
        tokens = attention_mask.sum().to(values)
        mine = torch.cat([values * counts, counts, torch.stack([tokens, broken.to(values)])])
        total = self.accelerator.gather(mine[None]).sum(0).tolist()  # a step's one wait, as in TRL
        recorded = self._metrics[mode]
        *total, broken_losses = total
        if mode == "train" and broken_losses:
            return True
        if mode == "eval":
            if recorded:
                total = [a + b for a, b in zip(self._evaluated, total, strict=True)]
                recorded.clear()
            self._evaluated = total
        *sums, tokens = total
        for name, value, count in zip(
            metrics, sums[: len(metrics)], sums[len(metrics) :], strict=True
        ):
            recorded[name].append(value / max(count, 1))
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        recorded["num_tokens"] = [self._total_train_tokens]
        return False
