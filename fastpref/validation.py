"""The one place that looks at input.

Shapes, dtypes and devices are always checked. Values are checked on the CPU at once; on an
accelerator by an asynchronous assertion, which never makes it wait (where a device has none, such
as MPS, values are read back).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastpref.domains import FINITE, POSITIVE, Domain, all_finite, require
from fastpref.objectives import Objective, make_objective, objective_names

REDUCTIONS = ("mean", "sum", "none")
_RESPONSES = Domain(at_least=2, whole=True)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    frozen_weight: Tensor | None = None,
    frozen_scale: Tensor | None = None,
    stats: tuple[str, ...] = (),
    known_stats: tuple[str, ...] = (),
) -> None:
    """Everything about the projection: hidden, weight, bias, targets and the head's scalars."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        _tensor(name, tensor)
    for name, given in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if given is not None and _tensor(name, given).dtype not in _FLOATS:
            raise TypeError(f"{name} must be one of {_FLOATS}, got {_describe(given)}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be (…, H), got {_describe(hidden)}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (V, H), got {_describe(weight)}")
    if frozen_weight is not None or frozen_scale is not None:
        _check_frozen(hidden, weight, frozen_weight, frozen_scale)
    elif hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has H = {hidden.shape[-1]} but weight is {tuple(weight.shape)}; "
            "expected weight (V, H) with the same H"
        )
    _same_device("weight", weight, hidden)
    _here_or_on_host("targets", targets, hidden)
    if bias is not None:
        _same_device("bias", bias, hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({len(weight)},), got {_describe(bias)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's leading shape {tuple(hidden.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    _check_scalars(logit_scale, softcap, temperature)
    for name in stats:
        if name not in known_stats:
            raise ValueError(f"unknown entry {name!r} of stats; expected some of {known_stats}")


def check_vocabulary(weight: Tensor, targets: Tensor, vocabulary: int) -> None:
    """Targets against the number of tokens, of all ranks' parts together."""
    if not vocabulary:
        raise ValueError(f"weight must be (V, H) with V ≥ 1, got {_describe(weight)}")
    in_range = ((targets >= 0) & (targets < vocabulary)) | (targets == -100)
    require(in_range.all(), f"targets must be -100 or lie in [0, {vocabulary})", targets, in_range)


def _check_frozen(
    hidden: Tensor, weight: Tensor, frozen_weight: Tensor | None, frozen_scale: Tensor | None
) -> None:
    if frozen_weight is None:
        raise ValueError("frozen_scale multiplies frozen_weight, which is missing")
    for name, given in (("frozen_weight", frozen_weight), ("frozen_scale", frozen_scale)):
        if given is not None and _tensor(name, given).dtype not in _FLOATS:
            raise TypeError(f"{name} must be one of {_FLOATS}, got {_describe(given)}")
        if given is not None:
            _same_device(name, given, hidden)
    if frozen_weight.dim() != 2 or len(frozen_weight) != len(weight):
        raise ValueError(
            f"frozen_weight must be ({len(weight)}, F), a row for each of weight's, got "
            f"{_describe(frozen_weight)}"
        )
    if frozen_weight.requires_grad:
        raise ValueError("frozen_weight gets no gradient, but requires one; detach it")
    if frozen_scale is not None and frozen_scale.shape != weight.shape[:1]:
        raise ValueError(f"frozen_scale must be ({len(weight)},), got {_describe(frozen_scale)}")
    columns = frozen_weight.shape[1] + weight.shape[1]
    if hidden.shape[-1] != columns:
        raise ValueError(
            f"hidden has H = {hidden.shape[-1]} but frozen_weight {tuple(frozen_weight.shape)} and "
            f"weight {tuple(weight.shape)} have {columns} columns together"
        )


def _check_scalars(logit_scale: float, softcap: float | None, temperature: float) -> None:
    if isinstance(logit_scale, Tensor) and logit_scale.requires_grad:
        raise TypeError(
            "logit_scale gets no gradient: give hidden * logit_scale, which has the same logits "
            "(and divide a bias by it)"
        )
    FINITE.check("logit_scale", logit_scale)
    if softcap is not None:
        POSITIVE.check("softcap", softcap)
    POSITIVE.check("temperature", temperature)


def check_sequences(
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    *,
    responses: int | None = None,
    divides: bool = False,
    in_parts: bool = False,
) -> int:
    """The number of prompts, or of sequences, from `(K·B, T, H)` or from `cu_seqlens`.

    Args:
        responses: K; None where sequences stand alone.
        divides: averages divide by the token weights.
        in_parts: other ranks have the rest of the sequences, of which some may have nothing here.
    """
    if responses is not None:
        _RESPONSES.check("responses", responses)
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden must be (sequences, T, H), or (total, H) with cu_seqlens; got "
                f"{tuple(hidden.shape)} and no cu_seqlens"
            )
        sequences = hidden.shape[0]
    else:
        _tensor("cu_seqlens", cu_seqlens)
        if hidden.dim() != 2:
            raise ValueError(
                f"hidden must be (total, H) when cu_seqlens is given, got {tuple(hidden.shape)}"
            )
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be integers (sequences + 1,), got {_describe(cu_seqlens)}"
            )
        _here_or_on_host("cu_seqlens", cu_seqlens, hidden)
        require(cu_seqlens[0] == 0, "cu_seqlens must start at 0", cu_seqlens)
        total = len(hidden)
        ends = cu_seqlens[-1] == total
        require(ends, f"cu_seqlens must end at the total of {total} rows of hidden", cu_seqlens)
        steps = cu_seqlens.diff()
        if in_parts:
            require((steps >= 0).all(), "cu_seqlens must not decrease", cu_seqlens)
        else:
            require((steps > 0).all(), "cu_seqlens must increase", cu_seqlens)
        sequences = len(cu_seqlens) - 1
    if responses is not None and (sequences == 0 or sequences % responses):
        raise ValueError(
            f"expected chosen sequences followed by as many rejected ones, {responses} for each "
            f"prompt; got {sequences} sequences"
        )
    if token_weights is not None:
        _tensor("token_weights", token_weights)
        _here_or_on_host("token_weights", token_weights, hidden)
        if token_weights.shape != targets.shape:
            raise ValueError(
                f"token_weights must have targets' shape {tuple(targets.shape)}, got "
                f"{tuple(token_weights.shape)}"
            )
        if token_weights.is_complex():
            raise TypeError(f"token_weights must be real, got {token_weights.dtype}")
        require(all_finite(token_weights), "token_weights must be finite", token_weights)
        if divides:
            valid = token_weights >= 0
            message = "token_weights must not be negative where averages divide by them"
            require(valid.all(), message, token_weights, valid)
    elif divides:
        raise ValueError("weighted_lengths=True needs token_weights")
    return sequences // (responses or 1)


def check_capturable(
    hidden: Tensor,
    targets: Tensor,  # (S, T)
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    """What a step needs of a batch of which nothing may be read on the host."""
    if cu_seqlens is not None:
        raise ValueError(
            "capturable=True takes padded batches (sequences, T, H): the lengths that cu_seqlens "
            "packs differ from batch to batch, and those of a graph may not"
        )
    for name, tensor in (("targets", targets), ("token_weights", token_weights)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"capturable=True copies nothing from the host: {name} must be on hidden's device "
                f"{hidden.device}, got {tensor.device}"
            )
    if not targets.shape[1]:
        raise ValueError(f"capturable=True needs positions, got hidden {tuple(hidden.shape)}")
    every = (targets != -100).any(1).all()
    require(every, "capturable=True needs a scored token in each sequence")


def check_weight_grad(
    weight: Tensor, weight_grad: Tensor | None, scale: float, reduction: str
) -> None:
    """The buffer to which the weight's gradient is added."""
    FINITE.check("weight_grad_scale", scale)
    if weight_grad is None:
        if scale != 1:
            raise ValueError("weight_grad_scale needs weight_grad, to which it applies alone")
        return
    _tensor("weight_grad", weight_grad)
    if not weight.requires_grad:
        raise ValueError("weight_grad: weight does not require a gradient, so none is added")
    if weight_grad.requires_grad:
        raise ValueError("weight_grad is written in place and must not require a gradient")
    dtypes = dict.fromkeys((weight.dtype, torch.promote_types(weight.dtype, torch.float32)))
    same = weight_grad.shape == weight.shape and weight_grad.device == weight.device
    if not same or weight_grad.dtype not in dtypes or not weight_grad.is_contiguous():
        names = " or ".join(map(str, dtypes))
        raise ValueError(
            f"weight_grad must be dense {names} {tuple(weight.shape)} on {weight.device}, got "
            f"{_describe(weight_grad)} of strides {weight_grad.stride()} on {weight_grad.device}"
        )
    if reduction == "none":
        raise ValueError(
            "weight_grad takes a loss whose upstream gradient is one number: reduction='none' "
            "gives one a pair"
        )


def check_objective(
    objective: Objective | str,
    prompts: int,
    responses: int,
    device: torch.device,
    *,
    ref_logps: Tensor | None,
    scores: Tensor | None,
    pair_weights: Tensor | None,
    betas: Tensor | None,
    extras: Mapping[str, Tensor] | None,
    reduction: str,
) -> Objective:
    """The objective, by its name too, and the per-sequence and per-prompt inputs it needs."""
    if isinstance(objective, str):
        objective = make_objective(objective)
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an Objective or one of the names {objective_names()}, "
            f"got {objective!r}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {list(REDUCTIONS)}")
    name, sequences = type(objective).__name__, responses * prompts
    for argument, tensor, needed in (
        ("ref_logps", ref_logps, objective.needs_reference),
        ("scores", scores, objective.needs_scores),
    ):
        if tensor is None and needed:
            raise ValueError(
                f"{name} needs {argument}: a tensor ({sequences},), chosen sequences first"
                + _score_hint(objective, argument)
            )
        if tensor is not None:
            _vector(argument, tensor, (sequences,), device, ", chosen sequences first")
    if pair_weights is not None:
        _vector("pair_weights", pair_weights, (prompts,), device)
        valid = pair_weights >= 0
        require(valid.all(), "pair_weights must not be negative", pair_weights, valid)
    if betas is not None:
        if not objective.takes_betas:
            raise ValueError(f"{name} takes no betas")
        _vector("betas", betas, (prompts,), device)
        require((betas > 0).all(), "betas must be positive", betas, betas > 0)
    _check_extras(objective, dict(extras or {}), (prompts, sequences), device)
    return objective


def _check_extras(
    objective: Objective,
    extras: dict[str, Tensor],
    lengths: tuple[int, int],
    device: torch.device,
) -> None:
    name = type(objective).__name__
    for missing in set(objective.extras) - extras.keys():
        raise ValueError(f"{name} needs extras[{missing!r}]: a tensor ({lengths[0]},)")
    for extra, tensor in extras.items():
        if extra not in objective.extras:
            raise ValueError(f"{name} does not look at extras[{extra!r}]; name it in its `extras`")
        _vector(f"extras[{extra!r}]", tensor, lengths, device)


def _vector(
    argument: str, tensor: Tensor, lengths: tuple[int, ...], device: torch.device, order: str = ""
) -> None:
    """A finite floating-point vector of one of these lengths, on hidden's device."""
    _tensor(argument, tensor)
    right_length = tensor.dim() == 1 and len(tensor) in lengths
    if not tensor.is_floating_point() or not right_length:
        shapes = " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        raise ValueError(
            f"{argument} must be floating point {shapes}{order}; got {_describe(tensor)}"
        )
    if tensor.device != device:
        raise ValueError(f"{argument} is on {tensor.device}, hidden on {device}")
    require(all_finite(tensor), f"{argument} must be finite", tensor)


def _score_hint(objective: Objective, argument: str) -> str:
    if argument == "scores" and hasattr(objective, "eta"):
        return "; without scores, set eta=0 and nll_weight=0"
    return ""


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    return value


def _same_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")


def _here_or_on_host(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device.type != "cpu":
        _same_device(name, tensor, hidden)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
