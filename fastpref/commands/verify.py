"""Errors of every schedule against float64, and the error that each may have.

Allowed errors are derived, not chosen. Inputs are rounded once, to the dtype under test, and the
truth is `reference` in float64 on those inputs. Let u be the unit roundoff of the accumulators,
u_out that of the result's dtype (at least half its smallest number), z the largest logit, and E the
error of `reference` itself in float32 on the same inputs, carried over to other accumulators in
proportion to u: it measures how the problem amplifies rounding, for whatever computes it. Allowed:

    log-probabilities   δ = 2 E + u (1 + z) n + ε + u max|ℓ|    one rounding of each token's logit
    loss                2 E + Σ |L(ℓ ± δ) − L(ℓ)| + 2 u max|L|  what δ does to the objective
    gradients           2 E + (u (1 + z) + ρ + u_out) max|x|    what δ does to its coefficients: ρ,
                          + 2 ε max Σ |coef| p |w|              and the final rounding; what ε does
                          + 3 u max Σ |coef| (p + 1ₜ) |w|       to p, beside which 1 − p may be
                                                                small; and, under a softcap, three
                                                                roundings of 1 − tanh²

ε = u (1 + z) + 2 E of any logit is what one logit may be off: of a single token's log-probability E
is too small a sample. Logits are computed twice, once for the log-sum-exp and once more for p.

Where products are of half precision, their operands are rounded for them: the gradient G of the
logits and the rows coef·h to float16 (u 2^-11), the frozen head's exponentials to bfloat16 (2^-8)
but for the target's. That adds max u |G|ᵀ|h| to what ∂W may be off, twice that for both operands,
and max u |G||W| to ∂h. Rows of ∂h are kept in 24 bits (2^-17).

Tensor cores are reported to cut their accumulators off after every 16 products, by at most 2^-23 of
what is in them, half of that on average: (H / 16) 2^-24 max|z| of a logit, which is added to ε.

Twice what plain summation loses, because another order of summation is another draw. The truth's
own error is the same with the u of float64, and is allowed on top.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends import accumulate_dtype, compute_dtype
from fastpref.backends.products import multiplies_half
from fastpref.loss import PreferenceOutput, preference_loss
from fastpref.objectives import (
    Balance,
    ListLogps,
    Objective,
    make_objective,
    objective_names,
)

LOGIT_DEVIATION = 6.0
_CUT_OFF_AFTER = 16  # products that a tensor core adds before it cuts its accumulator off
_SCALARS = ("softcap", "logit_scale", "temperature")
_SYMBOLS = {"hidden": "∂h", "weight": "∂W", "bias": "∂b"}


@dataclass(frozen=True)
class Shape:
    """A batch to verify on; `rows` is the budget, in rows of logits."""

    name: str
    pairs: int
    length: int
    hidden_size: int
    vocabulary: int
    rows: int
    packed: bool = False
    weighted: bool = False
    bias: bool = False
    scalars: dict[str, float] = field(default_factory=dict)


SHAPES = (
    Shape("one token, prime V", 1, 1, 48, 1009, rows=3),
    Shape("pairs beyond the budget", 3, 21, 72, 1009, rows=16),
    Shape("packed, weighted", 2, 32, 64, 1009, rows=80, packed=True, weighted=True),
    Shape(
        "bias, softcap, scale, T", 2, 33, 64, 1009, rows=70, bias=True,
        scalars={"softcap": 20.0, "logit_scale": 0.7, "temperature": 1.3},
    ),
    Shape("V 49152", 1, 64, 96, 49152, rows=128),
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Inputs of `preference_loss`, rounded to the dtype under test."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    options: dict[str, Any]  # what else `preference_loss` takes, but for the planner's


@dataclass(frozen=True)
class Result:
    """One quantity of one run: its largest error and the error it may have."""

    quantity: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.error / self.allowed if self.allowed else float(self.error > 0)

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def make_batch(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
    """Random inputs with logits of deviation 6, ragged lengths and an ignored prompt."""
    draw = torch.Generator().manual_seed(seed)
    sequences, length = 2 * shape.pairs, shape.length
    # Never finer than float32, so that the error of float32 arithmetic can be measured on them.
    narrow = torch.float32 if dtype == torch.float64 else dtype

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(narrow).to(device, dtype)

    hidden = normal(sequences, length, shape.hidden_size)
    weight = normal(
        shape.vocabulary, shape.hidden_size, scale=LOGIT_DEVIATION / shape.hidden_size**0.5
    )
    targets = torch.randint(0, shape.vocabulary, (sequences, length), generator=draw)
    prompt = torch.randint(0, max(1, length // 3), (sequences, 1), generator=draw)
    end = length - torch.randint(0, max(1, length // 4), (sequences, 1), generator=draw)
    positions = torch.arange(length)
    targets[(positions < prompt) | (positions >= end)] = -100
    lengths = (targets != -100).sum(1)
    scores = (10 * torch.rand(2, shape.pairs, generator=draw)).sort(0, descending=True).values
    # Near the policy's own log-probabilities, so that no loss is saturated.
    options: dict[str, Any] = {
        "scores": scores.flatten().to(device),
        **shape.scalars,
    }
    if shape.weighted:
        options["token_weights"] = torch.rand(sequences, length, generator=draw).to(device)
    if shape.packed:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        options["cu_seqlens"] = torch.arange(sequences + 1, device=device) * length
        if shape.weighted:
            options["token_weights"] = options["token_weights"].flatten()
    bias = normal(shape.vocabulary) if shape.bias else None
    batch = Batch(hidden, weight, targets.to(device), bias, options)
    wide = _cast(batch, torch.float64)
    near, _ = reference.sequence_logps(wide.hidden, wide.weight, wide.targets, **_of_head(wide))
    shift = torch.randn(sequences, generator=draw) * lengths.sqrt()
    options["ref_logps"] = near.float() + shift.to(device)
    return batch


def verify(
    objective: Objective,
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cpu",
    backend: str = "auto",
    schedules: tuple[str, ...] = ("frozen_head", "pair_groups", "recompute"),
) -> dict[str, list[Result]]:
    """Errors of `preference_loss` by schedule: log-probabilities, loss and gradients.

    With "frozen_head" the head requires no gradient; "pair_groups" takes no objective that couples
    pairs.
    """
    batch = make_batch(shape, dtype, device)
    return verify_batch(objective, batch, shape.rows, backend, schedules)


def verify_batch(
    objective: Objective,
    batch: Batch,
    rows: int,
    backend: str = "auto",
    schedules: tuple[str, ...] = ("frozen_head", "pair_groups", "recompute"),
) -> dict[str, list[Result]]:
    """The same for a batch, with a budget of so many rows of logits."""
    dtype = compute_dtype(batch.hidden, batch.weight)
    truth = _run(_cast(batch, torch.float64), objective, backend="reference")
    plain = _run(_cast(batch, torch.float32), objective, backend="reference")
    allowed = _allowed(batch, objective, plain, truth, dtype)
    budget = rows * len(batch.weight) * accumulate_dtype(dtype).itemsize
    found = {}
    for schedule in schedules:
        if schedule == "pair_groups" and objective.couples_pairs:
            continue
        how = {"backend": backend, "schedule": schedule, "logits_budget": budget}
        ours = _run(batch, objective, frozen=schedule == "frozen_head", **how)
        errors = {name: _distance(value, truth.values[name]) for name, value in ours.values.items()}
        rounded = _of_operands(batch, objective, truth, dtype, frozen=schedule == "frozen_head")
        found[schedule] = [
            Result(name, error, allowed[name] + rounded.get(name, 0.0))
            for name, error in errors.items()
        ]
    return found


@dataclass(frozen=True)
class _Run:
    values: dict[str, Tensor]  # logps, loss and gradients, by their symbols: ℓ, L, ∂h, ∂W, ∂b
    output: PreferenceOutput


def _allowed(
    batch: Batch,
    objective: Objective,
    plain: _Run,
    truth: _Run,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Allowed error of each quantity, by the rules at the head of this module."""
    u_plain, u_truth = _unit(torch.float32), _unit(torch.float64)
    u = _unit(accumulate_dtype(dtype))
    scale = u / u_plain + u_truth / u_plain  # of float32's errors: ours, and the truth's own
    u += u_truth
    amplified = {
        name: 2 * scale * _distance(plain.values[name], value)
        for name, value in truth.values.items()
    }
    wide = _cast(batch, torch.float64)
    scalars = {name: batch.options[name] for name in _SCALARS if name in batch.options}
    z = reference.logits(wide.hidden.flatten(0, -2), wide.weight, bias=wide.bias, **scalars)
    of_logit = u * (1 + z.abs().max().item())
    if _multiplies_half(batch, dtype):
        of_logit += accumulation_error(batch.weight.shape[1], z.abs().max().item())
    single = _cast(batch, torch.float32)
    plain_z = reference.logits(
        single.hidden.flatten(0, -2), single.weight, bias=single.bias, **scalars
    )
    epsilon = of_logit + 2 * scale * _distance(plain_z, z)

    logps = truth.output.logps.detach()
    delta = amplified["ℓ"] + of_logit * truth.output.lengths.max().item()
    delta += epsilon + u * logps.abs().max().item()
    losses, coefs = _weigh(objective, batch, truth, logps)
    of_losses = of_coefs = 0.0
    for sequence in range(len(logps)):
        moved = logps.clone()
        moved[sequence] += delta
        moved_losses, moved_coefs = _weigh(objective, batch, truth, moved)
        of_losses += _largest(moved_losses - losses)
        of_coefs += _largest(moved_coefs - coefs)
    of_losses += 2 * u * _largest(losses)
    of_coefs /= max(_largest(coefs), torch.finfo(torch.float64).tiny)

    allowed = {"ℓ": delta, "L": amplified["L"] + of_losses}
    leaves = {"∂h": batch.hidden, "∂W": batch.weight}
    if batch.bias is not None:
        leaves["∂b"] = batch.bias
    for name in truth.values.keys() - allowed.keys():
        largest = truth.values[name].abs().max().item()
        result = torch.finfo(leaves[name].dtype)
        rounding = max(result.eps / 2 * largest, result.smallest_normal * result.eps / 2)
        allowed[name] = amplified[name] + (of_logit + of_coefs) * largest + rounding
    of_slope = 3 * u if scalars.get("softcap") else 0.0
    for name, error in logit_errors(wide, coefs, scalars, 2 * epsilon, of_slope).items():
        if name in allowed:
            allowed[name] += error
    return allowed


def _multiplies_half(batch: Batch, dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 and multiplies_half(batch.hidden.device.type)


def _of_operands(
    batch: Batch, objective: Objective, truth: _Run, dtype: torch.dtype, *, frozen: bool
) -> dict[str, float]:
    """What rounding the operands of the gradients' products adds to each gradient's error."""
    scalars = {name: batch.options[name] for name in _SCALARS if name in batch.options}
    _, coefs = _weigh(objective, batch, truth, truth.output.logps.detach())
    wide = _cast(batch, torch.float64)
    if not _multiplies_half(batch, dtype):
        return rounded_operand_errors(wide, coefs, scalars, accumulate_dtype(dtype))
    operand = torch.bfloat16 if frozen else torch.float16
    found = rounded_operand_errors(wide, coefs, scalars, operand, exact_target=frozen)
    found["∂W"] *= 2  # the rows as well
    found["∂h"] += 2.0**-17 * _largest(truth.values["∂h"])
    return found


def accumulation_error(hidden_size: int, largest: float) -> float:
    """What accumulators that cut off take from a logit of at most `largest`, nats.

    4.3e-4 at H 4096 for a logit of 28. A log-probability is the difference of two such.
    """
    return hidden_size / _CUT_OFF_AFTER * 2.0**-24 * largest


def rounded_operand_errors(
    batch: Batch,  # in float64
    coefs: Tensor,  # (2, B) ∂ΣL/∂ℓ
    scalars: dict[str, float],
    dtype: torch.dtype,
    exact_target: bool = False,
) -> dict[str, float]:
    """The most that rounding the logits' gradient to `dtype` can do to what it is multiplied to."""
    grad_logits, hidden = (x.abs() for x in logits_gradient(batch, coefs, scalars))
    if exact_target:
        targets = batch.targets.flatten()
        grad_logits.scatter_(1, targets[targets != -100][:, None], 0.0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounding = _unit(dtype) * grad_logits + smallest / 2 * (grad_logits > 0)  # (N, V)
    return {
        "∂h": (rounding @ batch.weight.abs()).max().item(),
        "∂W": (rounding.T @ hidden).max().item(),
        "∂b": rounding.sum(0).max().item(),
    }


def logit_errors(
    batch: Batch,  # in float64
    coefs: Tensor,  # (2, B) ∂ΣL/∂ℓ
    scalars: dict[str, Any],
    of_probability: float,
    of_slope: float,
) -> dict[str, float]:
    """What a relative error of probabilities, and an absolute one of slopes, does to gradients."""
    scored, of_rows = _scored_rows(batch, coefs)
    hidden = batch.hidden.flatten(0, -2)[scored]
    z = reference.logits(hidden, batch.weight, bias=batch.bias, **scalars)
    p = torch.softmax(z, -1)  # (n, V)
    is_target = torch.nn.functional.one_hot(batch.targets.flatten()[scored], p.shape[1])
    scale = scalars.get("logit_scale", 1.0) / scalars.get("temperature", 1.0)
    moved = (scale * of_rows).abs()[:, None] * (of_probability * p + of_slope * (p + is_target))
    return {
        "∂h": _largest(moved @ batch.weight.abs()),
        "∂W": _largest(moved.T @ hidden.abs()),
        "∂b": _largest(moved.sum(0)),
    }


def logits_gradient(
    batch: Batch, coefs: Tensor, scalars: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """∂(mean loss)/∂(W h + b) `(n, V)` of the scored rows, and their hidden states `(n, H)`."""
    scored, of_rows = _scored_rows(batch, coefs)
    hidden = batch.hidden.flatten(0, -2)[scored]
    leaf = hidden.new_zeros(len(hidden), len(batch.weight))
    if batch.bias is not None:
        leaf += batch.bias
    leaf.requires_grad_()
    targets = batch.targets.flatten()[scored]
    logps = reference.linear_logps(hidden, batch.weight, targets, bias=leaf, **scalars)
    (grad,) = torch.autograd.grad(logps, leaf, of_rows)
    return grad, hidden


def _scored_rows(batch: Batch, coefs: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are scored, and ∂(mean loss)/∂ of their log-probabilities."""
    targets = batch.targets.flatten()
    per_sequence = coefs.flatten() / coefs.shape[1]
    of_rows = per_sequence.repeat_interleave(len(targets) // len(per_sequence))
    if "token_weights" in batch.options:
        of_rows = of_rows * batch.options["token_weights"].flatten()
    scored = targets != -100
    return scored, of_rows[scored]


def _weigh(objective: Objective, batch: Batch, truth: _Run, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and ∂ΣL/∂ℓ at given log-probabilities, by the reference's formulas."""
    leaf = logps.view(2, -1).detach().requires_grad_()
    lengths = truth.output.lengths.view(2, -1)
    counted = (lengths > 0).all(0)

    def of(values: Tensor) -> Tensor:
        return values.to(leaf.dtype).view(2, -1)[:, counted]

    def of_pairs(name: str) -> Tensor:
        return batch.options[name].to(leaf.dtype)[counted]

    seen = ListLogps(
        leaf[:, counted],
        of(lengths),
        of(batch.options["ref_logps"]),
        of(batch.options["scores"]),
        betas=of_pairs("betas") if "betas" in batch.options else None,
        mean_lengths=tuple(lengths.double().mean(1).unbind()),
    )
    losses = reference.pair_losses(objective, objective.view(seen))
    if "pair_weights" in batch.options:
        losses = losses * of_pairs("pair_weights")
    (coefs,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), coefs


def _run(batch: Batch, objective: Objective, frozen: bool = False, **how: Any) -> _Run:
    leaves = {
        "hidden": batch.hidden.detach().requires_grad_(),
        "weight": batch.weight.detach().requires_grad_(not frozen),
    }
    if batch.bias is not None:
        leaves["bias"] = batch.bias.detach().requires_grad_(not frozen)
    output = preference_loss(
        leaves["hidden"],
        leaves["weight"],
        batch.targets,
        objective,
        bias=leaves.get("bias"),
        **batch.options,
        **how,
    )
    output.loss.backward()
    gradients = {
        _SYMBOLS[name]: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }
    return _Run({"ℓ": output.logps, "L": output.loss} | gradients, output)


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    bias = None if batch.bias is None else batch.bias.to(dtype)
    return dataclasses.replace(
        batch, hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype), bias=bias
    )


def _of_head(batch: Batch) -> dict[str, Any]:
    names = ("cu_seqlens", "token_weights", *_SCALARS)
    return {n: batch.options[n] for n in names if n in batch.options} | {"bias": batch.bias}


def _unit(dtype: torch.dtype) -> float:
    """Unit roundoff."""
    return torch.finfo(dtype).eps / 2


def _distance(found: Tensor, expected: Tensor) -> float:
    return _largest(found.double() - expected.double())


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def objectives_to_verify() -> dict[str, Objective]:
    """Every built-in objective, and each under a balance that is not its default."""
    found = {name: make_objective(name) for name in objective_names()}
    balance = Balance(chosen_exponent=0.5, rejected_exponent=0.5, ceiling=4.0, floor=0.25)
    for name in ("simpo", "orpo", "unidpo"):
        found[f"{name}+balance"] = make_objective(name, balance=balance)
    return found
