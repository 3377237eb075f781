"""`PreferenceTrainer`: TRL's `DPOTrainer` with the loss replaced."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import create_model_from_path

from fastpref.loss import preference_loss
from fastpref.objectives import Objective
from fastpref.sequences import copied_to_host, shift_targets
from fastpref.trl.config import PreferenceConfig
from fastpref.trl.head import add_loss_head

_TOKEN_STATS = ("entropy", "mean_logits", "is_top1")
SCORE_COLUMNS = ("score_chosen", "score_rejected")
_NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "scores")


class _WithScores:
    """A collator that also carries `score_chosen` and `score_rejected`, as `scores (2B,)`.

    In all else it is the one that it wraps, whose attributes are read and set through it.
    """

    def __init__(self, collator: Callable[[list[dict]], dict]) -> None:
        vars(self)["collator"] = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        scores = [example[column] for column in SCORE_COLUMNS for example in examples]
        return self.collator(examples) | {"scores": torch.tensor(scores, dtype=torch.float32)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collator, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.collator,)


class PreferenceTrainer(DPOTrainer):
    """TRL's `DPOTrainer` under any fastpref objective, without logits.

    Takes what `DPOTrainer` takes, with a `PreferenceConfig`, which stays as it is given. References
    are live or precomputed; where the objective has none, none is loaded and
    `precompute_ref_log_probs` has nothing to do. Where the objective needs scores, data sets have
    finite numbers in the columns `score_chosen` and `score_rejected`; else such columns are left
    alone, whatever they hold.

    Logs every metric of TRL and those of the objective: in training means of the steps since the
    last log, as TRL; in evaluation, loss included, means over all pairs or tokens of the data set,
    each counted once, however uneven the batches and the processes' shares. (Of a stream on several
    processes nobody knows the length, and what accelerate repeats to fill its last batch counts.)

    Args:
        objective: an `Objective` of your own, in place of the one the configuration names.

    Raises:
        TypeError: `args` is not a `PreferenceConfig`.
        ValueError: the objective needs scores and the data set has none, or some that are no finite
            numbers; the objective has no reference, and `ref_model` or `sync_ref_model` is given;
            the model's own logits are not made by its head (see `add_loss_head`).
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PreferenceConfig | None = None,
        *positional: Any,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PreferenceConfig(f"{name.rstrip('/').split('/')[-1]}-preference")
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"args must be a PreferenceConfig, got {type(args).__name__}")
        self.objective = args.make_objective() if objective is None else objective
        if not self.objective.needs_reference:
            for option, given in (
                ("ref_model", ref_model),
                ("sync_ref_model", args.sync_ref_model),
            ):
                if given:
                    name = type(self.objective).__name__
                    raise ValueError(f"{option} is given, but {name} has no reference model")
        with (
            _replaced(dpo_trainer, "add_fused_lm_head", self._add_head),
            _replaced(dpo_trainer, "create_model_from_path", self._load_model),
        ):
            super().__init__(model, ref_model, args, *positional, **kwargs)
        self.precompute_ref_logps &= self.objective.needs_reference
        self.beta = self.objective.reward_scale
        if self.objective.needs_scores:
            self.data_collator = _WithScores(self.data_collator)
            if self._is_vision_dataset:  # which TRL does not prepare
                self.train_dataset = self._scored(self.train_dataset, "train")
                if isinstance(self.eval_dataset, dict):
                    sets = self.eval_dataset.items()
                    self.eval_dataset = {name: self._scored(each, name) for name, each in sets}
                elif self.eval_dataset is not None:
                    self.eval_dataset = self._scored(self.eval_dataset, "eval")

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for TRL's loading: once the policy is there, what it loads is the reference."""
        if hasattr(self, "model") and not self.objective.needs_reference:
            return None
        return create_model_from_path(*args, **kwargs)

    def _add_head(self, model: Any, **_: Any) -> None:
        """Stands in for TRL's fused head, which is given a PeftModel's inner model."""
        add_loss_head(self.ref_model if model is self.ref_model else self.model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        if self.objective.needs_scores:
            dataset = self._scored(dataset, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _scored(self, dataset: Any, name: str) -> Any:
        """The data set, its scores all finite numbers; a stream is looked at on its way."""
        objective = type(self.objective).__name__
        columns = dataset.column_names or list(next(iter(dataset)))
        if set(SCORE_COLUMNS) - set(columns):
            raise ValueError(
                f"{objective} needs the columns score_chosen and score_rejected; the {name} data "
                f"set has {sorted(columns)}"
            )

        def check(row: dict[str, Any], index: int) -> dict[str, Any]:
            if bad := _bad_scores(row):
                raise _score_error(objective, name, [f"row {index} has {bad}"])
            return row

        if not isinstance(dataset, Dataset):
            return dataset.map(check, with_indices=True)
        scores = dataset.select_columns(list(SCORE_COLUMNS)).with_format(None)[:]
        rows = (dict(zip(scores, row, strict=True)) for row in zip(*scores.values(), strict=True))
        if wrong := [
            f"row {i} has {bad}" for i, row in enumerate(rows) if (bad := _bad_scores(row))
        ]:
            raise _score_error(objective, name, wrong)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.objective.needs_scores:
            have = self._signature_columns
            self._signature_columns = [*have, *(c for c in SCORE_COLUMNS if c not in have)]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.objective.needs_reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in inputs.items() if name != "scores"}
        return super().compute_ref_log_probs(model, inputs)

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """Reference log-probabilities `(2B,)`, chosen first."""
        if not self.objective.needs_reference:
            return None
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        reference = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self.compute_ref_log_probs(reference, inputs))

    def _compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False
    ) -> Tensor | tuple[Tensor, Any]:
        completion_mask = inputs["completion_mask"]
        length = completion_mask.shape[1]
        pairs = len(completion_mask) // 2
        first_time = self._first_time(pairs)
        if first_time < pairs:
            seen = torch.arange(pairs, device=completion_mask.device) >= first_time
            completion_mask = completion_mask.masked_fill(seen.repeat(2)[:, None], 0)
        # Under way while the models run: the loss is planned on the host.
        targets_on_host = copied_to_host(shift_targets(inputs["input_ids"], completion_mask))
        ref_logps = self._ref_logps(inputs)

        def loss_head(hidden: Tensor, weight: Tensor, **head: Any) -> Any:
            # Prompt-learning adapters prepend virtual tokens.
            hidden = hidden[:, hidden.shape[1] - length :]
            on_head = _mover(hidden.device)
            return preference_loss(
                hidden,
                weight,
                targets_on_host(),
                self.objective,
                ref_logps=on_head(ref_logps),
                scores=on_head(inputs.get("scores")),
                token_weights=on_head(_length_weights(completion_mask, self.ld_alpha)),
                schedule=self.args.schedule,
                backend=self.args.backend,
                logits_budget=self.args.logits_budget,
                stats=_TOKEN_STATS,
                **head,
            )

        model_inputs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_MODEL}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        outputs = model(**model_inputs, use_cache=False, loss_head=loss_head)
        # Trainer weights a process's evaluation loss by its pairs, each counted once.
        loss = outputs.loss if first_time == pairs else outputs.loss * (pairs / max(first_time, 1))
        metrics = dict(outputs.metrics)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss.detach()
        self._record(metrics, outputs.lengths, inputs["attention_mask"])
        if return_outputs:
            with torch.no_grad():
                outputs = model(**model_inputs, use_cache=False)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._metrics["eval"].clear()  # predictions leave theirs behind, as nothing logs them
        return super().evaluation_loop(*args, **kwargs)

    def _first_time(self, pairs: int) -> int:
        """How many of this process's pairs are evaluated for the first time: its first ones.

        Where the data set does not divide, accelerate fills the last batches up with its beginning;
        `remainder` counts the others, of all processes in their order.
        """
        state = self.accelerator.gradient_state
        if self.model.training or not state.end_of_dataloader or state.remainder <= 0:
            return pairs
        earlier = self.accelerator.process_index // self._tp_size * pairs
        return min(max(state.remainder - earlier, 0), pairs)

    def _record(self, metrics: dict[str, Tensor], lengths: Tensor, attention_mask: Tensor) -> None:
        """Keeps the metrics, means over the pairs or tokens of all processes.

        Those of a training step as TRL does, to be averaged over steps; those of an evaluation
        over all of it.
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
        mine = torch.cat([values * counts, counts, tokens[None]])
        total = self.accelerator.gather(mine[None]).sum(0).tolist()  # a step's one wait, as in TRL
        recorded = self._metrics[mode]
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


def _bad_scores(row: dict[str, Any]) -> str:
    """The scores of a row that are no finite numbers, "" where all are."""
    bad = (
        f"{column}={row[column]!r}"
        for column in SCORE_COLUMNS
        if isinstance(row[column], bool)
        or not isinstance(row[column], int | float)
        or not math.isfinite(row[column])
    )
    return ", ".join(bad)


def _score_error(objective: str, name: str, wrong: list[str]) -> ValueError:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return ValueError(
        f"{objective} needs scores that are finite numbers; in the {name} data set "
        f"{'; '.join(wrong[:5])}{more}"
    )


def _mover(device: torch.device) -> Callable[[Tensor | None], Tensor | None]:
    """With the model split across devices, the head can be elsewhere than the batch."""
    return lambda tensor: None if tensor is None else tensor.to(device)


def _length_weights(completion_mask: Tensor, ld_alpha: float | None) -> Tensor | None:
    """LD-DPO's token weights `(2B, T)`: 1 up to the shorter length of a pair, α after it."""
    if ld_alpha is None:
        return None
    mask = completion_mask[:, 1:]
    chosen, rejected = mask.sum(1).view(2, -1)
    shared = torch.minimum(chosen, rejected).repeat(2)
    weights = torch.where(mask.cumsum(1) <= shared[:, None], 1.0, ld_alpha)
    return torch.nn.functional.pad(weights, (0, 1))  # as targets: position t predicts t + 1


@contextlib.contextmanager
def _replaced(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
