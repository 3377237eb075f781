"""`PreferenceTrainer`: TRL's `DPOTrainer` with the loss replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig
from trl.trainer import dpo_trainer
from trl.trainer.utils import create_model_from_path

from fastpref.columns import OF_PAIRS, LossColumns, possible_columns
from fastpref.loss import linear_logps, preference_loss, sequence_logps
from fastpref.memory import ranks
from fastpref.objectives import Objective
from fastpref.sequences import IGNORED, copied_to_host, on_device, shift_targets
from fastpref.trl.checkpoints import SavesWholeModels
from fastpref.trl.collator import (
    COLUMNS,
    NOT_FOR_MODEL,
    PACKING,
    WithMore,
    packing_of,
)
from fastpref.trl.config import (
    PreferenceConfig,
    check_beta,
    check_own_objective,
    check_packing,
    sft_weight,
    trl_objective,
)
from fastpref.trl.faults import (
    Together,
    finite_weights,
    nonfinite_rows,
    say_nonfinite,
)
from fastpref.trl.head import LossHeadOutput, add_loss_head, uncast
from fastpref.trl.metrics import CountsOnce
from fastpref.trl.packing import prepare_packing, scored_places, sees_all_pairs
from fastpref.trl.step import OfStep, gathered, gathered_texts

logger = logging.getLogger(__name__)

_TOKEN_STATS = ("entropy", "mean_logits", "is_top1")


class PreferenceTrainer(SavesWholeModels, CountsOnce):
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

    A step's loss is one mean over all its pairs, of every process and accumulated batch, however
    uneven: its gradient is that of one process with the whole batch. Losses of tokens (sft) are one
    mean over all its tokens; where pairs are coupled (AOT, BetaDPO, a router's loss) each batch
    keeps its own, and counts as often as it has pairs. TRL takes the mean of the batches' means,
    which is the same where they are equally large.

    With accelerate's `cp_size`, or its `sp_size` under DeepSpeed, each rank has a part of every
    sequence's positions, a live reference's too; numbers are those of whole sequences.

    Of each step the processes agree on what it takes, and on what stops it:

    - A loss that is NaN or infinite ends the run before its gradients are made, or has the step
      skipped (`on_nonfinite`), on every process; so does such a gradient, before the step. In fp16
      gradients are left to the scaler. A model of NaN is never saved.
    - Where one has no batch because of an error, all end with it. Where a stream ends on one, the
      epoch ends on all, what makes no whole step left out. Other numbers of steps are refused
      before the first.
    - With `enable_jit_checkpoint` a SIGTERM to any of them has all save after that step and stop.
    - `train(resume_from_checkpoint=True)` takes the last checkpoint that was written to its end,
      and refuses one whose steps had other numbers of pairs, unless data are not skipped.

    Who dies, or fails in its forward, is noticed by those who wait for it: a launcher (torchrun,
    `accelerate launch`) ends them within seconds, without one `ddp_timeout` does.

    Logs every metric of TRL and those of the objective: in training means of the steps since the
    last log, as TRL; in evaluation, loss included, means over all pairs or tokens of the data set,
    each counted once, however uneven the batches and the processes' shares. (Of a stream on several
    processes nobody knows the length, and what accelerate repeats to fill its last batch counts;
    one whose shards give them different numbers of batches is refused where the first has ended.)

    Args:
        objective: an `Objective` of your own, in place of the one the configuration chooses, which
            must not choose another.

    Raises:
        TypeError: `args` is not a `DPOConfig`.
        ValueError: a column is missing, has something else than such numbers, or is a `beta` that
            the objective does not take; `objective` and `args` contradict each other; the
            objective has no reference, and `ref_model` or `sync_ref_model` is given; the model's
            own logits are not made by its head (see `add_loss_head`); packing was asked for, and
            the model, the adapter, images or context parallelism do not allow it; `cp_size` or
            `sp_size` with images, a router's loss, virtual tokens or predictions; `sp_size` with
            another engine than DeepSpeed or attention that its Ulysses would change; DeepSpeed is
            to skip steps.
        FloatingPointError: in training, of numbers that are not finite.
        RuntimeError: in training, of another process's batches.
    """

    args: DPOConfig
    objective: Objective
    model: Any
    ref_model: Any
    _signature_columns: Any
    _mean_chosen_length: float | None = None  # over the pairs of this step
    skips_step = False  # this one, on all processes

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
        self._raises = getattr(args, "on_nonfinite", "raise") == "raise"
        if not self._raises and self.is_deepspeed_enabled:
            raise ValueError(
                "on_nonfinite='skip' is given, and DeepSpeed takes its steps by itself"
            )
        self.add_callback(Together(self))
        self.precompute_ref_logps &= self._uses_reference
        self.beta = self.objective.reward_scale
        self._schedule = getattr(args, "schedule", "auto")  # which a plain DPOConfig has not
        self._computing: dict[str, Any] = {
            "backend": getattr(args, "backend", "auto"),
            "logits_budget": getattr(args, "logits_budget", None),
        }
        self._share_positions_out()
        if self._packs or not self._as_trl:
            self.data_collator = WithMore(
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
        if ranks() == 1 or not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        path_of, gather = dataset._get_cache_file_path, self.accelerator.gather

        def same_path(fingerprint: str) -> str:  # of a data set in memory each process has its own
            return gathered_texts(path_of(fingerprint))[0]

        def gather_once(values: Any) -> Any:  # from one of the ranks that share a batch
            found = [x.view(ranks(), -1)[:: self._sharing] for x in gather(values)]
            return tuple(x.flatten() for x in found)

        with (
            _replaced(dataset, "_get_cache_file_path", same_path),
            _replaced(self.accelerator, "gather", gather_once),
        ):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = self._packed(inputs)
        with self._shared_out(model, inputs) as here:
            return self._reference_logps(model, here)

    def _reference_logps(self, model: Any, here: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's of whole sequences; what of them is `here` goes through the model."""
        whole = self._whole_of(here)
        given = {"input_ids": whole.input_ids, "completion_mask": whole.completion_mask}
        inputs = {k: v for k, v in here.items() if k not in NOT_FOR_MODEL} | given
        trains = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]

        def reference(*, labels: Tensor, fused_lm_head: bool, **kwargs: Any) -> Any:
            for parameter, requires_grad in trains:  # PEFT has just switched adapters off, and the
                parameter.requires_grad_(requires_grad)  # first forward tells FSDP2 what trains
            kwargs["input_ids"] = here["input_ids"]
            targets = shift_targets(labels, labels.ne(IGNORED))
            targets_on_host = copied_to_host(self._here(targets, here))
            packing = kwargs.get(PACKING)

            def loss_head(hidden: Tensor, weight: Tensor, **head: Any) -> LossHeadOutput:
                targets = targets_on_host()
                if packing is None:
                    found = linear_logps(hidden, weight, targets, **head)
                    return LossHeadOutput(logps=self._of_whole(found, here))
                scored = targets != IGNORED
                rows = packing.hidden_of(hidden, packing.row_of[scored])
                found = linear_logps(rows, weight, targets[scored], **head)
                logps = found.new_zeros(targets.shape)
                return LossHeadOutput(
                    logps=logps.masked_scatter_(on_device(scored, logps.device), found)
                )

            logps: Any = uncast(model(**kwargs, loss_head=loss_head)).logps
            if logps.device.type != "mps":  # TRL adds them up in the dtype it is given
                logps = logps.double()
            return types.SimpleNamespace(log_probs=logps[:, :-1])

        return super().compute_ref_log_probs(reference, inputs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On their device; DeepSpeed casts what the model takes, and the loss's numbers stay."""
        ours = {name: inputs[name] for name in NOT_FOR_MODEL if name in inputs}
        rest = {name: value for name, value in inputs.items() if name not in ours}
        return super()._prepare_inputs(rest) | _each(_mover(self.args.device), ours)

    def _packed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With how to pack them, which our collator says without a wait for the device."""
        if not self._packs or PACKING in inputs:
            return inputs
        return inputs | {PACKING: packing_of(inputs, self._share_prompt)}

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """Reference log-probabilities `(2B,)`, chosen first."""
        if not self._uses_reference:
            return None
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        reference = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self.compute_ref_log_probs(reference, inputs))

    # --- a step, of all processes and accumulated batches ---------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int | None]:
        """A step's batches, and how many pairs they are with those of the other processes.

        Every process has as many batches, or none: a stream's last batches that make no whole step
        of all are left out, and an error on one process is one on all.
        """
        failure: Exception | None = None
        batches: list[Any] = []
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except Exception as error:
            if isinstance(self.callback_handler.train_dataloader, DataLoaderDispatcher):
                raise  # the others wait for the batch itself: whoever started them ends them
            failure = error
        masks = [batch["completion_mask"] for batch in batches]
        tokens = 0
        if self.objective.uses_mean_length and len(masks) * ranks() > 1:
            tokens = int(sum(mask[: len(mask) // 2, 1:].sum() for mask in masks))
        mine = [num_batches, len(masks), sum(len(mask) // 2 for mask in masks), tokens]
        everybody = gathered([failure is not None, *mine], device)
        failed, wanted, found, pairs, lengths = zip(*everybody, strict=True)
        step = self.state.global_step + 1
        if any(failed):
            reason = "" if failure is None else f"{type(failure).__name__}: {failure}"
            texts = gathered_texts(reason)
            if failure is not None:
                raise failure
            who = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
            raise RuntimeError(f"no batch for step {step}: {who}")
        if len(set(wanted)) > 1:
            raise RuntimeError(
                f"ranks accumulate {list(wanted)} batches in step {step}: give every rank a data "
                "set of the same length"
            )
        if min(found) < num_batches:
            if any(found):
                logger.warning(
                    "the epoch ends before step %d, for which ranks have %s of %d batches",
                    step,
                    list(found),
                    num_batches,
                )
            self.control.should_epoch_stop = True
            return [], None
        self._mean_chosen_length = sum(lengths) / sum(pairs) if any(lengths) else None
        self.skips_step = False
        return batches, sum(pairs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss; in training times the batch's share of the step's pairs, 1 if all are equal.

        Trainer divides it by the accumulated batches, and gradients are averaged over processes.
        """
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            return found
        batches = self.current_gradient_accumulation_steps * ranks()
        share = len(inputs["completion_mask"]) // 2 * batches / num_items_in_batch
        loss = found[0] if return_outputs else found
        loss = loss * share
        if self._averages > 1:
            loss = loss * self._averages - (loss * (self._averages - 1)).detach()
        return (loss, found[1]) if return_outputs else loss

    def _objective_of_step(self) -> Objective:
        if self._mean_chosen_length is None or not self.model.training:
            return self.objective
        return OfStep(self.objective, (self._mean_chosen_length,) * 2)

    def _compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False
    ) -> Tensor | tuple[Tensor, Any]:
        with self._shared_out(model, self._packed(inputs)) as here:
            return self._loss_of(model, here, return_outputs)

    def _loss_of(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool
    ) -> Tensor | tuple[Tensor, Any]:
        whole = self._whole_of(inputs)
        length = inputs["input_ids"].shape[1]
        pairs = len(whole.input_ids) // 2
        first_time = self._first_time(pairs)
        seen = max(first_time, 1)  # of none the loss is still wanted, though nobody counts it

        def of_seen(x: Any) -> Any:  # (B, …) or (2B, …)
            if x is None or seen == pairs:
                return x
            return x[:seen] if len(x) == pairs else x.unflatten(0, (2, -1))[:, :seen].flatten(0, 1)

        input_ids, completion_mask = of_seen(whole.input_ids), of_seen(whole.completion_mask)
        if not first_time:
            completion_mask = torch.zeros_like(completion_mask)
        targets = self._here(shift_targets(input_ids, completion_mask), inputs)
        token_weights = _length_weights(completion_mask, self.ld_alpha)
        if token_weights is not None:
            token_weights = self._here(token_weights, inputs)
        # Under way while the models run: the loss is planned on the host.
        targets_on_host = copied_to_host(targets)
        ref_logps = of_seen(self._ref_logps(inputs))
        columns = _each(of_seen, inputs.get(COLUMNS, {}))
        objective = self._objective_of_step()
        untouched = 0.0 if token_weights is None else sft_weight(self.args)
        packing = inputs.get(PACKING)

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
                objective,
                ref_logps=on_head(ref_logps),
                cu_seqlens=cu_seqlens,
                token_weights=weights,
                sequence_group=self._sequence_group,
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
            logps, _ = sequence_logps(
                hidden[chosen],
                weight,
                wanted,
                cu_seqlens=None if cu_seqlens is None else cu_seqlens[: seen + 1],
                token_weights=rest,
                sequence_group=self._sequence_group,
                **head,
                **self._computing,
            )
            tokens: Any = self._mean_chosen_length if isinstance(objective, OfStep) else None
            tokens = out.lengths[:seen].sum().clamp(min=1) if tokens is None else tokens * seen
            nll = -logps.sum() / tokens
            return dataclasses.replace(out, loss=out.loss + untouched * nll)

        model_inputs = {k: v for k, v in inputs.items() if k not in NOT_FOR_MODEL}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        outputs: Any = uncast(model(**model_inputs, use_cache=False, loss_head=loss_head))
        loss, metrics = outputs.loss, dict(outputs.metrics)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss.detach()
        broken = (~outputs.losses.detach().isfinite()).sum() + ~loss.detach().isfinite()
        if self._record(metrics, outputs.lengths, inputs["attention_mask"], broken):
            self._refuse(outputs, ref_logps, inputs)
        if return_outputs:
            if self._sequence_group is not None:
                raise ValueError(
                    f"predictions are logits, of which {self._option} leaves each rank a "
                    "part; evaluate with prediction_loss_only=True"
                )
            model_inputs.pop(PACKING, None)  # predictions are the padded batch's
            with torch.no_grad():
                outputs = model(**model_inputs, use_cache=False)
        return (loss, outputs) if return_outputs else loss

    def _refuse(self, outputs: Any, ref_logps: Tensor | None, inputs: dict[str, Any]) -> None:
        """Ends the run where a loss is not finite, or has this step skipped; on all processes."""
        whole = self._whole_of(inputs)

        def tokens_of(pair: int) -> list[int]:
            return whole.input_ids[pair][whole.attention_mask[pair].bool()].tolist()

        decode = getattr(self.processing_class, "decode", str)
        mine = nonfinite_rows(outputs.losses, outputs.logps, ref_logps, tokens_of, decode)
        step, device = self.state.global_step + 1, self.args.device
        text, weights_are_finite = say_nonfinite(step, mine, self.model, device)
        if self._raises or not weights_are_finite:
            raise FloatingPointError(text)
        self._skip(text)

    def _skip(self, why: str) -> None:
        logger.warning("%s\nthe step is skipped", why)
        self._skipped_steps += not self.skips_step
        self.skips_step = True

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm that Trainer logs, looked at before the step is taken.

        In fp16 one that is not finite is as it should be: a scaler looks for the largest scale.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if hasattr(grad_norm, "full_tensor"):
            grad_norm = grad_norm.full_tensor()
        if self.accelerator.mixed_precision != "fp16" and not self.skips_step:
            size = float(grad_norm)
            if not math.isfinite(size):
                step = self.state.global_step + 1
                text = f"the gradient of step {step} has the norm {size}, though its loss is finite"
                if self._raises or not finite_weights(self.model):
                    raise FloatingPointError(text)
                self._skip(text)
        return grad_norm


def _objective(args: DPOConfig) -> Objective:
    return args.make_objective() if isinstance(args, PreferenceConfig) else trl_objective(args)


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
    original, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
