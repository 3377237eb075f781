"""`PreferenceTrainer`: TRL's `DPOTrainer` with the loss replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import create_model_from_path

from fastpref.columns import OF_PAIRS, LossColumns, possible_columns
from fastpref.loss import linear_logps, preference_loss
from fastpref.objectives import Objective
from fastpref.sequences import IGNORED, copied_to_host, on_device, shift_targets
from fastpref.trl.config import (
    PreferenceConfig,
    check_beta,
    check_own_objective,
    check_packing,
    trl_objective,
)
from fastpref.trl.head import LossHeadOutput, add_loss_head, uncast
from fastpref.trl.packing import Packing, prepare_packing, scored_places, sees_all_pairs

logger = logging.getLogger(__name__)

_TOKEN_STATS = ("entropy", "mean_logits", "is_top1")
_COLUMNS = "loss_columns"  # of a batch: arguments of preference_loss that columns give
_PACKING = "packing"  # of a batch, and of the model's forward: how its sequences become one row
_NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", _COLUMNS)


class _WithMore:
    """A collator that also carries what the loss takes from columns, and how to pack the batch.

    In all else it is the one that it wraps, whose attributes are read and set through it.
    """

    def __init__(
        self,
        collator: Callable[[list[dict]], dict],
        objective: Objective | None,  # None: no columns
        share: bool | str | None,  # prompts of a packed batch; None: it is not packed
    ) -> None:
        vars(self).update(collator=collator, objective=objective, share=share)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.objective is not None:
            columns = LossColumns(self.objective, examples[0].keys(), "the batch")
            more[_COLUMNS] = columns.tensors(examples)
        batch = self.collator(examples) | more
        if self.share is not None:
            batch[_PACKING] = _packing_of(batch, self.share)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collator, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.collator, self.objective, self.share)


class PreferenceTrainer(DPOTrainer):
    """TRL's `DPOTrainer` under any fastpref objective, without logits.

    Takes what `DPOTrainer` takes, with any `DPOConfig`, which stays as it is given. Where TRL's own
    fields choose the loss (no `objective`), loss, gradients, logged training metrics and what is
    loaded are `DPOTrainer`'s to rounding, for every loss type and mixture; see `trl_objective`.

    With an objective, by name in a `PreferenceConfig` or as an argument:

    - References are live or precomputed; where the objective has none, none is loaded and
      `precompute_ref_log_probs` has nothing to do.
    - Where it needs scores, data sets have the columns `score_chosen` and `score_rejected`; where
      it names `extras`, a column NAME or two, NAME_chosen and NAME_rejected; a column `weight`
      multiplies each pair's loss, a column `beta` replaces the objective's β. All are finite
      numbers, weights at least 0, betas above 0. Other columns are left alone, whatever they hold;
      scores too where the objective needs none. As in TRL, its own loss types take no columns:
      `weight` and `beta` are ignored then, with a warning.
    - The logged rewards are the objective's own, averages per token where its loss is one.

    With `padding_free`, TRL's field, the models run one row of packed sequences in place of the
    padded batch; with a `PreferenceConfig`'s `share_prompt` it has one copy of each prompt. Data,
    collators, metrics and predictions stay those of the padded batch. Which models can is tried on
    a few tokens (see `prepare_packing`).

    Logs every metric of TRL and those of the objective: in training means of the steps since the
    last log, as TRL; in evaluation, loss included, means over all pairs or tokens of the data set,
    each counted once, however uneven the batches and the processes' shares. (Of a stream on several
    processes nobody knows the length, and what accelerate repeats to fill its last batch counts.)

    Args:
        objective: an `Objective` of your own, in place of the one the configuration chooses, which
            must not choose another.

    Raises:
        TypeError: `args` is not a `DPOConfig`.
        ValueError: a column is missing, has something else than such numbers, or is a `beta` that
            the objective does not take; `objective` and `args` contradict each other; the
            objective has no reference, and `ref_model` or `sync_ref_model` is given; the model's
            own logits are not made by its head (see `add_loss_head`); packing was asked for, and
            the model, the adapter, images or context parallelism do not allow it.
    """

    objective: Objective
    model: Any
    ref_model: Any
    _signature_columns: Any
    _evaluated: list[float]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *positional: Any,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PreferenceConfig(f"{name.rstrip('/').split('/')[-1]}-preference")
        if not isinstance(args, DPOConfig):
            raise TypeError(f"args must be a DPOConfig, got {type(args).__name__}")
        named = getattr(args, "objective", None)
        self._as_trl = objective is None and named is None
        self.objective = _objective(args) if objective is None else objective
        if objective is not None:
            if named is not None:
                raise ValueError(f"objective={objective!r} is given, and args has {named!r}")
            check_own_objective(args, f"objective={objective!r}")
            check_beta(args, objective)
        if not self._uses_reference:
            for option, given in (
                ("ref_model", ref_model),
                ("sync_ref_model", args.sync_ref_model),
            ):
                if given:
                    name = type(self.objective).__name__
                    raise ValueError(f"{option} is given, but {name} has no reference model")
        check_packing(args)
        self._share_prompt: bool | str = getattr(args, "share_prompt", False)
        self._padding_free = bool(args.padding_free)
        self._packs = bool(self._padding_free or self._share_prompt)
        with (
            _replaced(dpo_trainer, "add_fused_lm_head", self._add_head),
            _replaced(dpo_trainer, "create_model_from_path", self._load_model),
            _replaced(args, "padding_free", False),  # of which TRL says that it pads nevertheless
            _replaced(dpo_trainer, "BaseTunerLayer", ()),  # an adapter on the head: ours to judge
        ):
            super().__init__(model, ref_model, args, *positional, **kwargs)
        self.precompute_ref_logps &= self._uses_reference
        self.beta = self.objective.reward_scale
        self._schedule = getattr(args, "schedule", "auto")  # which a plain DPOConfig has not
        self._computing: dict[str, Any] = {
            "backend": getattr(args, "backend", "auto"),
            "logits_budget": getattr(args, "logits_budget", None),
        }
        if self._packs or not self._as_trl:
            self.data_collator = _WithMore(
                self.data_collator,
                None if self._as_trl else self.objective,
                self._share_prompt if self._packs else None,
            )
        if self._is_vision_dataset:  # which TRL does not prepare
            self.train_dataset = self._checked(self.train_dataset, "train")
            if isinstance(self.eval_dataset, dict):
                sets = self.eval_dataset.items()
                self.eval_dataset = {name: self._checked(each, name) for name, each in sets}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._checked(self.eval_dataset, "eval")

    @property
    def _uses_reference(self) -> bool:
        """TRL has a reference for every loss type: the logged rewards are of it."""
        return self._as_trl or self.objective.needs_reference

    @property
    def _sft_weight(self) -> float:
        """Of TRL's loss type "sft" among those that were asked for."""
        weights = zip(self.loss_types, self.loss_weights, strict=True)
        return sum(weight for name, weight in weights if name == "sft") * self._as_trl

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for TRL's loading: once the policy is there, what it loads is the reference."""
        if hasattr(self, "model") and not self._uses_reference:
            return None
        return create_model_from_path(*args, **kwargs)

    def _add_head(self, model: Any, **_: Any) -> None:
        """Stands in for TRL's fused head, which is given a PeftModel's inner model."""
        whole = self.ref_model if model is self.ref_model else self.model
        add_loss_head(whole)
        if self._packs:
            self._prepare_packing(whole)

    def _prepare_packing(self, model: Any) -> None:
        """Has the model take packed rows; where it cannot, "auto" shares no prompts."""
        option = "share_prompt" if self._share_prompt else "padding_free"
        try:
            if self._is_vision_dataset:
                raise ValueError(f"{option} packs tokens, and the data set has images")
            parallelism = self.accelerator.parallelism_config
            if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
                raise ValueError(
                    f"{option} packs a row that context parallelism would cut anywhere"
                )
            prepare_packing(model, share=bool(self._share_prompt))
            if self._share_prompt == "auto" and not self._padding_free and sees_all_pairs(model):
                attention = model.config.get_text_config()._attn_implementation
                raise ValueError(f"{attention} attention would look at all pairs of a row's tokens")
        except ValueError as reason:
            if self._share_prompt != "auto":
                raise
            logger.warning("share_prompt='auto' shares no prompts: %s", reason)
            self._share_prompt, self._packs = False, self._padding_free
            if self._packs:
                self._prepare_packing(model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        dataset = self._checked(dataset, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _checked(self, dataset: Any, name: str) -> Any:
        """The data set, all numbers that the loss takes of it usable; a stream on its way."""
        present = dataset.column_names or list(next(iter(dataset)))
        if self._as_trl:
            if ignored := [column for column in OF_PAIRS if column in present]:
                logger.warning(
                    "the %s data set has %s, which TRL's loss types do not take; an objective does",
                    name,
                    " and ".join(ignored),
                )
            return dataset
        columns = LossColumns(self.objective, present, f"the {name} data set")
        if not columns.names:
            return dataset

        def problem(row: Mapping[str, Any], index: int) -> str:
            values = ", ".join(f"{name}={row[name]!r}" for name in columns.unusable(row))
            return values and f"row {index} has {values}"

        def check(row: dict[str, Any], index: int) -> dict[str, Any]:
            if wrong := problem(row, index):
                raise self._column_error(columns, name, [wrong])
            return row

        if not isinstance(dataset, Dataset):
            return dataset.map(check, with_indices=True)
        held = dataset.select_columns(columns.names).with_format(None)[:]
        rows = (dict(zip(held, row, strict=True)) for row in zip(*held.values(), strict=True))
        if wrong := [text for index, row in enumerate(rows) if (text := problem(row, index))]:
            raise self._column_error(columns, name, wrong)
        return dataset

    def _column_error(self, columns: LossColumns, name: str, wrong: list[str]) -> ValueError:
        expected = ", ".join(f"{column} {columns.domain(column)}" for column in columns.names)
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        return ValueError(
            f"{type(self.objective).__name__} needs numbers: {expected}; in the {name} data set "
            f"{'; '.join(wrong[:5])}{more}"
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if not self._as_trl:
            have, ours = self._signature_columns, possible_columns(self.objective)
            self._signature_columns = [*have, *(column for column in ours if column not in have)]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self._uses_reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in self._packed(inputs).items() if name != _COLUMNS}
        trains = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]

        def reference(*, labels: Tensor, fused_lm_head: bool, **kwargs: Any) -> Any:
            for parameter, requires_grad in trains:  # PEFT has just switched adapters off, and the
                parameter.requires_grad_(requires_grad)  # first forward tells FSDP2 what trains
            targets_on_host = copied_to_host(shift_targets(labels, labels.ne(IGNORED)))
            packing = kwargs.get(_PACKING)

            def loss_head(hidden: Tensor, weight: Tensor, **head: Any) -> LossHeadOutput:
                targets = targets_on_host()
                if packing is None:
                    return LossHeadOutput(logps=linear_logps(hidden, weight, targets, **head))
                scored = targets != IGNORED
                rows = packing.hidden_of(hidden, packing.row_of[scored])
                found = linear_logps(rows, weight, targets[scored], **head)
                logps = found.new_zeros(targets.shape)
                return LossHeadOutput(
                    logps=logps.masked_scatter_(on_device(scored, logps.device), found)
                )

            logps = uncast(model(**kwargs, loss_head=loss_head)).logps
            if logps.device.type != "mps":  # TRL adds them up in the dtype it is given
                logps = logps.double()
            return types.SimpleNamespace(log_probs=logps[:, :-1])

        return super().compute_ref_log_probs(reference, inputs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On their device; DeepSpeed casts what the model takes, and the loss's numbers stay."""
        ours = {name: inputs[name] for name in _NOT_FOR_MODEL if name in inputs}
        rest = {name: value for name, value in inputs.items() if name not in ours}
        return super()._prepare_inputs(rest) | _each(_mover(self.args.device), ours)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """FSDP1 reads of sharded checkpoints what the optimizer has: a new one has nothing yet."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if checkpoint is not None and plugin is not None and plugin.fsdp_version == 1:
            get_optimizer_state_dict(self.model, self.optimizer)  # steps once, at a rate of 0
        super()._load_optimizer_and_scheduler(checkpoint)

    @property
    def _total_train_tokens(self) -> int:
        """In the state that checkpoints keep, so that `num_tokens` goes on in a resumed run."""
        return self.state.stateful_callbacks.get("num_tokens", {}).get("trained", 0)

    @_total_train_tokens.setter
    def _total_train_tokens(self, count: int) -> None:
        self.state.stateful_callbacks["num_tokens"] = {"trained": count}

    def _packed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With how to pack them, which our collator says without a wait for the device."""
        if not self._packs or _PACKING in inputs:
            return inputs
        return inputs | {_PACKING: _packing_of(inputs, self._share_prompt)}

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """Reference log-probabilities `(2B,)`, chosen first."""
        if not self._uses_reference:
            return None
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        reference = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self.compute_ref_log_probs(reference, inputs))

    def _compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False
    ) -> Tensor | tuple[Tensor, Any]:
        inputs = self._packed(inputs)
        completion_mask = inputs["completion_mask"]
        length = completion_mask.shape[1]
        pairs = len(completion_mask) // 2
        first_time = self._first_time(pairs)
        seen = max(first_time, 1)  # of none the loss is still wanted, though nobody counts it

        def of_seen(x: Any) -> Any:  # (B, …) or (2B, …)
            if x is None or seen == pairs:
                return x
            return x[:seen] if len(x) == pairs else x.unflatten(0, (2, -1))[:, :seen].flatten(0, 1)

        input_ids, completion_mask = of_seen(inputs["input_ids"]), of_seen(completion_mask)
        if not first_time:
            completion_mask = torch.zeros_like(completion_mask)
        # Under way while the models run: the loss is planned on the host.
        targets_on_host = copied_to_host(shift_targets(input_ids, completion_mask))
        ref_logps = of_seen(self._ref_logps(inputs))
        columns = _each(of_seen, inputs.get(_COLUMNS, {}))
        token_weights = _length_weights(completion_mask, self.ld_alpha)
        untouched = 0.0 if token_weights is None else self._sft_weight
        packing = inputs.get(_PACKING)

        def loss_head(hidden: Tensor, weight: Tensor, **head: Any) -> Any:
            on_head, targets, weights = _mover(hidden.device), targets_on_host(), token_weights
            if packing is None:  # prompt-learning adapters prepend virtual tokens
                hidden = of_seen(hidden[:, hidden.shape[1] - length :])
                cu_seqlens, chosen = None, slice(seen)
            else:
                places, cu_seqlens = scored_places(targets)
                hidden = packing.hidden_of(hidden, of_seen(packing.row_of).flatten()[places])
                targets, chosen = targets.flatten()[places], slice(int(cu_seqlens[seen]))
                if weights is not None:
                    weights = weights.flatten()[on_device(places, weights.device)]
            weights = on_head(weights)
            out = preference_loss(
                hidden,
                weight,
                targets,
                self.objective,
                ref_logps=on_head(ref_logps),
                cu_seqlens=cu_seqlens,
                token_weights=weights,
                schedule=self._schedule,
                stats=_TOKEN_STATS,
                **_each(on_head, columns),
                **head,
                **self._computing,
            )
            if weights is None or not untouched:
                return out
            # TRL's sft leaves ld_alpha out: what the token weights took from it is given back.
            rest = 1 - weights[chosen]
            wanted = targets[chosen].masked_fill((rest == 0).to(targets.device), IGNORED)
            logps = linear_logps(hidden[chosen], weight, wanted, **head, **self._computing)
            nll = -(rest * logps).sum() / out.lengths[:seen].sum().clamp(min=1)
            return dataclasses.replace(out, loss=out.loss + untouched * nll)

        model_inputs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_MODEL}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        outputs = uncast(model(**model_inputs, use_cache=False, loss_head=loss_head))
        loss, metrics = outputs.loss, dict(outputs.metrics)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss.detach()
        self._record(metrics, outputs.lengths, inputs["attention_mask"])
        if return_outputs:
            model_inputs.pop(_PACKING, None)  # predictions are the padded batch's
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


def _objective(args: DPOConfig) -> Objective:
    return args.make_objective() if isinstance(args, PreferenceConfig) else trl_objective(args)


def _packing_of(batch: Mapping[str, Any], share: bool | str) -> Packing:
    return Packing.of(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], share=share
    )


def _each(function: Callable[[Tensor], Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`function` of every tensor, those of extras too."""
    return {
        name: _each(function, value) if isinstance(value, Mapping) else function(value)
        for name, value in values.items()
    }


def _mover(device: torch.device) -> Callable[[Any], Any]:
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
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
