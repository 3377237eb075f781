"""fastpref inside TRL 1.16.

`PreferenceTrainer` is TRL's `DPOTrainer` with the loss replaced: data, references, adapters,
checkpoints and evaluation stay TRL's. `use_fastpref_logps` changes nothing but the function by
which every stock TRL trainer computes log-probabilities.

The head is used inside the model's forward, where DDP sees its gradient and FSDP has gathered it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils

from fastpref.backends import BACKENDS
from fastpref.loss import linear_logps, preference_loss
from fastpref.objectives import Objective, hyperparameters, make_objective
from fastpref.planner import SCHEDULES
from fastpref.sequences import IGNORED, copied_to_host, shift_targets

_SUPPORTED_TRL = "1.16"
_CHUNKED_APPLY = (
    "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
)
_TOKEN_STATS = ("entropy", "mean_logits", "is_top1")
_NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "scores")


# --- every stock trainer ------------------------------------------------------------------------


class LogpsHandle(contextlib.AbstractContextManager):
    """Undoes `use_fastpref_logps`: by `.undo()`, or at the end of a `with` block."""

    def __init__(self, replaced: type) -> None:
        self._replaced: type | None = replaced

    def undo(self) -> None:
        """Gives TRL its own function back; calling it again does nothing."""
        if self._replaced is not None:
            trl_utils._ChunkedLogProbFunction = self._replaced
            self._replaced = None

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_fastpref_logps() -> LogpsHandle:
    """Makes every stock TRL trainer compute its log-probabilities through `linear_logps`.

    Loss types, metrics and data stay TRL's; log-probabilities become exact to fp32.

    Returns:
        A handle whose `undo()` restores TRL's function; also a context manager.

    Raises:
        RuntimeError: a TRL version, or a signature of the replaced function, not known to fit.
    """
    release = Version(trl.__version__)
    if f"{release.major}.{release.minor}" != _SUPPORTED_TRL:
        raise RuntimeError(
            f"use_fastpref_logps replaces a private function of TRL {_SUPPORTED_TRL} and TRL is "
            f"{trl.__version__}; install trl=={_SUPPORTED_TRL}.* or call fastpref.linear_logps"
        )
    replaced = getattr(trl_utils, "_ChunkedLogProbFunction", None)
    if replaced is not _FastprefLogps:
        forward = getattr(replaced, "forward", None)
        found = " ".join(list(inspect.signature(forward).parameters)[1:]) if forward else "nothing"
        if found != _CHUNKED_APPLY:
            raise RuntimeError(
                f"TRL's _ChunkedLogProbFunction takes ({found}), expected ({_CHUNKED_APPLY})"
            )
    trl_utils._ChunkedLogProbFunction = _FastprefLogps
    return LogpsHandle(replaced)


class _FastprefLogps:
    """Stands where TRL's autograd function stood; called as `_ChunkedLogProbFunction.apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        wanted = tuple(name for name in names if name in outputs)
        result = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            stats=wanted,
        )
        logps, found = result if wanted else (result, {})
        return logps, *(found.get(name) for name in names)


# --- configuration ------------------------------------------------------------------------------


@dataclass
class PreferenceConfig(DPOConfig):
    """`DPOConfig` with an objective of fastpref in place of `loss_type`.

    Args:
        objective: name of a built-in objective ("dpo", "unidpo", "adadpo", …).
        objective_args: its hyperparameters by field name; `balance` may be a dictionary of
            `Balance` fields or True. On a command line, JSON.
        beta: the objective's β; None for its own default. Also scales the logged rewards.
        schedule: as in `preference_loss`.
        backend: as in `preference_loss`.
        logits_budget: bytes of logits to hold at once, as in `preference_loss`.

    `label_smoothing` reaches an objective that has it. `ld_alpha` becomes token weights. TRL's
    `loss_type`, `loss_weights`, `f_divergence_type` and `use_weighting` have no meaning here and
    are refused when changed.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective_args"]

    objective: str = field(default="dpo", metadata={"help": "Name of the objective."})
    objective_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the objective, by field name."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "The objective's beta; None for its own default."}
    )
    schedule: str = field(default="auto", metadata={"help": f"One of {SCHEDULES}."})
    backend: str = field(default="auto", metadata={"help": f"One of {BACKENDS}."})
    logits_budget: int | None = field(
        default=None, metadata={"help": "Bytes of logits to hold at once."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, neutral in (
            ("loss_type", ["sigmoid"]),
            ("loss_weights", None),
            ("f_divergence_type", "reverse_kl"),
            ("use_weighting", False),
        ):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to TRL's own losses; "
                    "PreferenceConfig takes objective and objective_args"
                )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; expected one of {SCHEDULES}")
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; expected one of {BACKENDS}")
        self.beta = self.make_objective().reward_scale

    def make_objective(self) -> Objective:
        """The objective that the configuration names."""
        known = hyperparameters(self.objective)
        fields = dict(self.objective_args or {})
        if "beta" in known and self.beta is not None:
            fields.setdefault("beta", self.beta)
        if self.label_smoothing and "label_smoothing" not in known:
            raise ValueError(f"{self.objective} has no label_smoothing")
        if self.label_smoothing:
            fields.setdefault("label_smoothing", self.label_smoothing)
        return make_objective(self.objective, **fields)


# --- the head in the model's forward ------------------------------------------------------------


@dataclass
class LossHeadOutput(ModelOutput):
    """What a model returns for `loss_head=…`: the fields of `PreferenceOutput`, and aux loss."""

    loss: Tensor | None = None
    losses: Tensor | None = None
    logps: Tensor | None = None
    lengths: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None


def head_scalars(config: Any) -> dict[str, float | None]:
    """`softcap` and `logit_scale` of a causal language model, from its text config.

    Cohere and Command multiply logits by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, others
    by `output_multiplier`; Granite and MiniCPM divide by `logits_scaling`, HyperCLOVA X multiplies.
    """
    config = config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"softcap": softcap, "logit_scale": 1.0 if scale is None else scale}


def add_loss_head(model: PreTrainedModel, **fused_head_options: Any) -> None:
    """Adds TRL's fused head, then answers both of its questions by fastpref, inside the forward.

    `model(…, loss_head=f)` returns `f(hidden, weight, bias=…, softcap=…, logit_scale=…)`, a
    `PreferenceOutput`, as a `LossHeadOutput`; `model(…, labels=labels, fused_lm_head=True)`, which
    TRL asks of reference models, returns log-probabilities exact to fp32. Any other call is the
    model's own.
    """
    trl_utils.add_fused_lm_head(model, **fused_head_options)
    stock_forward = model.forward
    scalars = head_scalars(model.config)

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        loss_head: Callable[..., Any] | None = None,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if loss_head is None and not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return stock_forward(*args, **kwargs)
        kwargs["use_cache"] = False
        if loss_head is None:
            targets_on_host = copied_to_host(shift_targets(labels, labels != IGNORED))
        backbone = self.base_model(*args, **kwargs)
        head = self.get_output_embeddings()
        hidden = backbone.last_hidden_state.to(head.weight.device)
        with trl_utils.maybe_gather_lm_head_ctx(head.weight, head.bias):
            weight, bias = _whole(head.weight), _whole(head.bias)
            if loss_head is not None:
                out = loss_head(hidden, weight, bias=bias, **scalars)
                aux_loss = _router_loss(self, backbone, kwargs)
                return LossHeadOutput(
                    out.loss, out.losses, out.logps, out.lengths, out.metrics, aux_loss
                )
            logps = linear_logps(hidden, weight, targets_on_host(), bias=bias, **scalars)
            if logps.device.type != "mps":  # TRL adds them up in the dtype it is given
                logps = logps.double()
            return trl_utils.FusedCausalLMOutput(log_probs=logps[:, :-1])

    model.forward = types.MethodType(forward, model)


def _whole(parameter: Tensor | None) -> Tensor | None:
    """FSDP2 shards parameters as DTensors; the projection needs all of the head."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _router_loss(model: PreTrainedModel, backbone: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, where router logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(
        backbone.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )


# --- the trainer --------------------------------------------------------------------------------


class _WithScores:
    """A collator that also carries `score_chosen` and `score_rejected`, as `scores (2B,)`."""

    def __init__(self, collator: Callable[[list[dict]], dict]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if "score_chosen" in examples[0]:
            scores = [x["score_chosen"] for x in examples] + [x["score_rejected"] for x in examples]
            batch["scores"] = torch.tensor(scores, dtype=torch.float32)
        return batch


class PreferenceTrainer(DPOTrainer):
    """TRL's `DPOTrainer` under any fastpref objective, without logits.

    Takes what `DPOTrainer` takes, with a `PreferenceConfig`. Data sets may have the columns
    `score_chosen` and `score_rejected`. References are live or precomputed, or none where the
    objective has none. Logs every metric of TRL and those of the objective.

    Args:
        objective: an `Objective` of your own, in place of the one the configuration names.

    Raises:
        TypeError: `args` is not a `PreferenceConfig`.
        ValueError: the objective needs scores and the data set has none.
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
        asked_to_precompute = args.precompute_ref_log_probs
        if not self.objective.needs_reference:
            # TRL loads no reference model where log-probabilities are precomputed, and ours has
            # nothing to precompute.
            args.precompute_ref_log_probs = True
        try:
            with _replaced(dpo_trainer, "add_fused_lm_head", add_loss_head):
                super().__init__(model, ref_model, args, *positional, **kwargs)
        finally:
            args.precompute_ref_log_probs = asked_to_precompute
        self.precompute_ref_logps = asked_to_precompute and self.objective.needs_reference
        self.beta = self.objective.reward_scale
        self.data_collator = _WithScores(self.data_collator)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        columns = next(iter(dataset))
        missing = {"score_chosen", "score_rejected"} - set(columns)
        if self.objective.needs_scores and missing:
            raise ValueError(
                f"{type(self.objective).__name__} needs the columns score_chosen and "
                f"score_rejected; the data set has {sorted(columns)}"
            )
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in ("score_chosen", "score_rejected"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

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
        loss = outputs.loss
        metrics = dict(outputs.metrics)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss.detach()
        self._record(metrics, outputs.lengths, inputs["attention_mask"])
        if return_outputs:
            with torch.no_grad():
                outputs = model(**model_inputs, use_cache=False)
        return (loss, outputs) if return_outputs else loss

    def _record(self, metrics: dict[str, Tensor], lengths: Tensor, attention_mask: Tensor) -> None:
        """Keeps the step's metrics as TRL does: means over the pairs or tokens of all processes."""
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
        total = self.accelerator.gather_for_metrics(mine[None]).sum(0)
        *sums, tokens = total.tolist()  # the one wait of a step, as in TRL
        for name, value, count in zip(
            metrics, sums[: len(metrics)], sums[len(metrics) :], strict=True
        ):
            self._metrics[mode][name].append(value / max(count, 1))
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


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
