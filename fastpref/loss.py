"""The public functions: `preference_loss`, `sequence_logps`, `linear_logps`.

Each checks its arguments and hands them to what was chosen to compute it: the schedules over a
backend, or the definition itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from torch import Tensor

from fastpref import reference
from fastpref.backends import TOKEN_STATS, HeadOptions, choose_backend
from fastpref.backends.vocabulary_shards import Shards, VocabularyShards
from fastpref.compiled import one_operator
from fastpref.domains import Domain
from fastpref.objectives import Objective
from fastpref.output import PreferenceOutput
from fastpref.planner import check_schedule
from fastpref.scheduled import Scheduled
from fastpref.sequence_parts import SequenceParts, sharing_sequences
from fastpref.sharded_head import LocalHead
from fastpref.validation import (
    check_capturable,
    check_head,
    check_objective,
    check_sequences,
    check_vocabulary,
    check_weight_grad,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Statistics of tokens that have a mean to report.
_AVERAGED = ("entropy", "mean_logits", "is_top1")
_BYTES = Domain(above=0, whole=True)


class _How(TypedDict):
    """What decides how it is computed."""

    backend: str
    schedule: str
    logits_budget: int | None
    capturable: bool


@one_operator
def preference_loss(
    hidden: Tensor,  # (K·B, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape, int64
    objective: Objective | str,
    *,
    ref_logps: Tensor | None = None,  # (K·B,)
    scores: Tensor | None = None,  # (K·B,)
    pair_weights: Tensor | None = None,  # (B,)
    betas: Tensor | None = None,  # (B,)
    extras: Mapping[str, Tensor] | None = None,  # each (B,) or (K·B,)
    responses: int = 2,  # K
    cu_seqlens: Tensor | None = None,  # (K·B + 1,)
    token_weights: Tensor | None = None,  # as targets
    weighted_lengths: bool = False,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    frozen_weight: Tensor | None = None,  # (V, F)
    frozen_scale: Tensor | None = None,  # (V,)
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    schedule: str = "auto",
    logits_budget: int | None = None,
    capturable: bool = False,
    weight_grad: Tensor | None = None,  # (V, H)
    weight_grad_scale: float = 1.0,
    stats: Sequence[str] = (),
) -> PreferenceOutput:
    """Preference loss of a batch of pairs straight from hidden states; logits are never held.

    Sequences `0..B-1` are the chosen responses, `B..2B-1` the rejected ones, in every argument and
    result; of K responses a prompt, sequence `k·B + b` is response k of prompt b. Logits are
    `softcap·tanh(logit_scale·(W h + bias)/softcap)/temperature`. Prompt and padding positions carry
    the target -100 and are skipped, whatever hidden holds there.

    Args:
        hidden: final hidden states, before the LM head: `(K·B, T, H)`, or packed `(total, H)`.
            bf16, fp16, fp32 or fp64; in autocast operands other than fp64 are rounded to
            autocast's dtype.
        weight: LM head `(V, H)`. Of two dtypes products take what torch promotes them to; no copy
            of the head is made.
        targets: the token that each position predicts, -100 where not scored; `shift_targets`
            makes them from token ids. On hidden's device or on the CPU: the schedule is planned
            from lengths, so targets on an accelerator are read back once, those on the CPU never
            make a step wait. The same holds of cu_seqlens and token_weights.
        objective: `DPO(beta=0.1)`, … or an `Objective` of your own; a name takes its defaults.
            Its own parameters get their gradients, in schedules that see all pairs at once.
        ref_logps: log-probabilities of the responses under the reference, nats; see
            `sequence_logps`. Constants. Needed by every objective with a reference.
        scores: quality of the responses, any scale; needed by Uni-DPO and by rankings.
        pair_weights: multiplies each prompt's loss, 1 by default, not negative. One of 0 still
            counts in the mean; where looking is free its rows skip the backward products.
        betas: positive, each in place of the objective's β; an error if it has none.
        extras: what else the objective names in `extras`; it finds them in `pairs.extras`.
        responses: K; 2 for objectives of pairs, any for list-wise ones.
        cu_seqlens: integer offsets of the packed sequences, from 0 to `total`.
        token_weights: constant weight of each token's log-probability, 1 by default.
        weighted_lengths: averages divide by a response's sum of token weights, which must not be
            negative then, and not by its number of tokens.
        bias: bias of the LM head.
        frozen_weight: first columns `(V, F)` of a head `[frozen_weight | weight]`, which get no
            gradient and are put together with weight's `(V, H − F)` some rows at a time. LoRA on
            the head, without its effective weight, is hidden `[h | s·A h]`, weight B and this: 2 U
            in place of 3.
        frozen_scale: multiplies frozen_weight's rows and gets its gradient, at 1 U more.
        vocab_group: the ranks on which the head lies. On each, weight, bias, frozen_weight,
            frozen_scale and weight_grad are its part of the vocabulary's rows `(V_r, …)`, in the
            order of the ranks, of any sizes, 0 too; a DTensor weight of placement Shard(0) says all
            that itself, and the others are DTensors like it. All else is the same on every rank,
            hidden too (or a DTensor of Replicate()). So are then results and hidden's gradient; the
            head's stays with its part. Nothing of size V is sent: of a scored row an all-gather of
            8 bytes in the forward (4 more for each statistic, 8 for "is_top1", 4 for the alignments
            that some objectives need; with backend="triton" and a frozen head in half precision an
            all-reduce of 4), and in forward or backward, where hidden requires a gradient, an
            all-reduce of 4 H; twice that in float64. A pair beyond the budget is projected twice
            and gathered twice. Before, all ranks compare what they were given, 24 bytes. Each must
            run the backward. capturable=True and backend="reference" are errors.
        reduction: "mean" over prompts (one of weight 0 counts), "sum" or "none".
        backend: "auto", "torch", "triton" or "reference"; one that cannot run is an error.
        schedule: "auto", "frozen_head" (2 U), "pair_groups" (3 U) or "recompute" (4 U), where U is
            one matrix product of all scored tokens; see `planner`. Without gradients 1 U.
        logits_budget: bytes of logits to hold at once. Default: 128 MiB on a CPU; elsewhere what
            the batch needs (all scored rows, at most 2,048 or those of its largest prompt) within
            1/8 of the memory that is free, or 256 MiB if that is less. That is looked at once a
            process, at the first step that could take "pair_groups", and with `torch.distributed`
            initialised the smallest of all ranks holds: each must come to such a step, since one
            alone waits for the others. Give a number where some ranks have no loss (pipelines), in
            a CUDA graph with no step before it, and to repeat a run bit by bit on a device that
            others use too.
        capturable: nothing of the batch is read on the host, copied from it or waited for: for CUDA
            graphs. All K·B·T positions are projected then, scored or not. Every tensor is on
            hidden's device, the batch padded, and each response has a scored token; which of them
            are scored may change from replay to replay. A graph keeps the objective's numbers and
            the budget that it was captured with; see `logits_budget`.
        weight_grad: buffer `(V, H)` to which weight's gradient is added, in weight's dtype or fp32:
            `weight.grad`, or a `main_grad` of the optimizer's. Autograd gives weight no gradient
            then, so that its hooks do not fire, and no tensor of that size is made: of several
            groups of prompts into bf16 an int8 remainder, so that the step is rounded once. With
            several groups the forward adds already: a loss without a backward leaves its gradient
            there. Not with reduction="none". Without gradients nothing is added.
        weight_grad_scale: the upstream gradient that the loss will get, such as 1 / accumulation
            steps, times a loss scale if there is one; the backward checks it in every schedule.
        stats: any of "entropy", "mean_logits", "is_top1", to be averaged into `metrics`.

    On an accelerator half-precision operands are multiplied as they are: gradients from bf16 are
    within 2e-3 of float64's on the same inputs, in norm, 1.66e-3 of it their own rounding; a
    token's log-probability is within (H / 16)·2⁻²⁴ of twice the largest logit. Elsewhere, and for
    float32, products are float32: see `fastpref.commands.verify`, which derives both.

    A response with no scored token has log-probability 0 and length 0; its prompt adds loss 0 and
    no gradient. NaN or infinity in a scored row makes the loss non-finite. With "pair_groups" the
    gradients are handed over in the first backward, and a second one is an error. Gradients have
    no derivative of their own: `create_graph=True` is an error.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and says what
            was expected. Values (targets in range, finite scores) raise at once on a CPU and by an
            asynchronous assertion on an accelerator. So does an objective that couples pairs
            and does not say so, where its groups' losses are not those of all pairs together.
    """
    head = HeadOptions(
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        frozen_weight=frozen_weight,
        frozen_scale=frozen_scale,
    )
    stats = _names(stats)
    how = _How(
        backend=backend, schedule=schedule, logits_budget=logits_budget, capturable=capturable
    )
    with sharing_sequences(sequence_group, hidden, capturable) as sequences:
        local = LocalHead.of(hidden, weight, head, vocab_group, weight_grad)
        hidden, weight, head, weight_grad, _ = local
        settings = {**how, "stats": stats, "reduction": reduction, "responses": responses}
        with local.agreeing(targets, **settings) as shards:
            check_head(hidden, weight, targets, **head, stats=stats, known_stats=_AVERAGED)
            prompts = check_sequences(
                hidden,
                targets,
                cu_seqlens,
                token_weights,
                responses=responses,
                divides=weighted_lengths,
                in_parts=sequences.parts is not None,
            )
            if capturable:
                check_capturable(hidden, targets, cu_seqlens, token_weights)
            check_weight_grad(weight, weight_grad, weight_grad_scale, reduction)
            objective = check_objective(
                objective,
                prompts,
                responses,
                hidden.device,
                ref_logps=ref_logps,
                scores=scores,
                pair_weights=pair_weights,
                betas=betas,
                extras=extras,
                reduction=reduction,
            )
            computing = _computing(
                hidden, shards, sequences.parts, weight_grad, weight_grad_scale, **how
            )
        check_vocabulary(weight, targets, len(weight) if shards is None else shards.vocabulary)
        sequences.notes.alike = (
            local.alike()
            | settings
            | {
                "number of prompts": prompts,
                "objective": type(objective).__name__,
                "rows of weight": len(weight),
                "weighted_lengths": weighted_lengths,
                "choice of arguments": _given(
                    ref_logps=ref_logps,
                    scores=scores,
                    pair_weights=pair_weights,
                    betas=betas,
                    token_weights=token_weights,
                ),
                "extras": sorted(extras or {}),
            }
        )
    return computing.preference_loss(
        hidden,
        weight,
        targets,
        objective,
        ref_logps=ref_logps,
        scores=scores,
        pair_weights=pair_weights,
        betas=betas,
        extras=extras,
        responses=responses,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        weighted_lengths=weighted_lengths,
        reduction=reduction,
        stats=stats,
        **head,
    )


@one_operator
def sequence_logps(
    hidden: Tensor,  # (S, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape, int64
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    frozen_weight: Tensor | None = None,  # (V, F)
    frozen_scale: Tensor | None = None,  # (V,)
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    backend: str = "auto",
    schedule: str = "auto",
    logits_budget: int | None = None,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole responses: what a reference model is asked for, or any loss.

    Arguments as in `preference_loss`, for any number of sequences S; nothing of size tokens ×
    vocabulary is held. Differentiable with any upstream gradient: "frozen_head" (2 U) or
    "recompute" (4 U), as in `linear_logps`. Under `torch.no_grad()`, or where nothing requires a
    gradient, one matrix product. A loss of one's own on top, here KTO's on labelled responses:

        logps, _ = sequence_logps(hidden, weight, targets)
        ratios = logps - ref_logps                                   # (S,)
        signs = torch.where(desirable, 1.0, -1.0)
        loss = (1 - torch.sigmoid(signs * beta * (ratios - kl))).mean()

    Returns:
        Sums of (weighted) token log-probabilities `(S,)`, nats, fp32, and numbers of scored tokens
        `(S,)`, int64. In batches of pairs, `ref_logps` is the first of the two.
    """
    head = HeadOptions(
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        frozen_weight=frozen_weight,
        frozen_scale=frozen_scale,
    )
    how = _How(
        backend=backend, schedule=schedule, logits_budget=logits_budget, capturable=capturable
    )
    with sharing_sequences(sequence_group, hidden, capturable) as sequences:
        local = LocalHead.of(hidden, weight, head, vocab_group)
        hidden, weight, head, *_ = local
        with local.agreeing(targets, **how) as shards:
            check_head(hidden, weight, targets, **head)
            in_parts = sequences.parts is not None
            count = check_sequences(hidden, targets, cu_seqlens, token_weights, in_parts=in_parts)
            if capturable:
                check_capturable(hidden, targets, cu_seqlens, token_weights)
            computing = _computing(hidden, shards, sequences.parts, **how)
        check_vocabulary(weight, targets, len(weight) if shards is None else shards.vocabulary)
        sequences.notes.alike = (
            local.alike()
            | how
            | {
                "number of sequences": count,
                "rows of weight": len(weight),
                "choice of arguments": _given(token_weights=token_weights),
            }
        )
    return computing.sequence_logps(
        hidden, weight, targets, cu_seqlens=cu_seqlens, token_weights=token_weights, **head
    )


class _Options(TypedDict, total=False):
    """Of `linear_logps`, whatever it returns."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    frozen_weight: Tensor | None
    frozen_scale: Tensor | None
    vocab_group: ProcessGroup | None
    backend: str
    schedule: str
    logits_budget: int | None
    capturable: bool


# An empty tuple is a sequence too: the first that fits is meant.
@overload
def linear_logps(  # type: ignore[overload-overlap]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    stats: tuple[()] = (),
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    stats: Sequence[str],
    **options: Unpack[_Options],
) -> tuple[Tensor, dict[str, Tensor]]: ...
@one_operator
def linear_logps(
    hidden: Tensor,  # (N, H), or any leading shape
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    frozen_weight: Tensor | None = None,  # (V, F)
    frozen_scale: Tensor | None = None,  # (V,)
    vocab_group: ProcessGroup | None = None,
    backend: str = "auto",
    schedule: str = "auto",
    logits_budget: int | None = None,
    capturable: bool = False,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each target, differentiable with any upstream gradient.

    Arguments as in `preference_loss`; `schedule` is "auto", "frozen_head" (2 U) or "recompute"
    (4 U). Entropy is differentiable too (its gradient recomputes the logits once).

    Args:
        stats: any of "entropy" (nats), "mean_logits", "is_top1" (bool) and "log_sum_sq_probs"
            (log Σ p²), to be returned for each token.

        capturable: as in `preference_loss`; at least one target is scored.

    Returns:
        Log-probabilities in targets' shape, nats, fp32, 0 where the target is -100; with `stats`
        a pair of them and a dictionary of further tensors of that shape.
    """
    head = HeadOptions(
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        frozen_weight=frozen_weight,
        frozen_scale=frozen_scale,
    )
    stats = _names(stats)
    local = LocalHead.of(hidden, weight, head, vocab_group)
    hidden, weight, head, *_ = local
    how = _How(
        backend=backend, schedule=schedule, logits_budget=logits_budget, capturable=capturable
    )
    with local.agreeing(targets, **how, stats=stats) as shards:
        check_head(hidden, weight, targets, **head, stats=stats, known_stats=TOKEN_STATS)
        if capturable:
            check_capturable(hidden, targets.flatten()[None], None, None)
        computing = _computing(hidden, shards, None, **how)
    check_vocabulary(weight, targets, len(weight) if shards is None else shards.vocabulary)
    found = computing.token_statistics(
        hidden.flatten(0, -2), weight, targets.flatten(), stats=stats, **head
    )
    found = {name: value.view(targets.shape) for name, value in found.items()}
    logps = found.pop("logps")
    return (logps, found) if stats else logps


def _computing(
    hidden: Tensor,
    shards: Shards | None,
    parts: SequenceParts | None,
    weight_grad: Tensor | None = None,
    weight_grad_scale: float = 1.0,
    *,
    backend: str,
    schedule: str,
    logits_budget: int | None,
    capturable: bool,
) -> Any:
    """What has the three functions: the definition where that is asked for, else the schedules."""
    check_schedule(schedule)
    if logits_budget is not None:
        _BYTES.check("logits_budget", logits_budget)
    chosen = choose_backend(backend, hidden.device)
    if backend == "reference":
        if capturable:
            raise ValueError("backend='reference' reads the batch on the host: not capturable")
        if weight_grad is not None:
            raise ValueError("backend='reference' leaves gradients to autograd: no weight_grad")
        if shards is not None:
            raise ValueError(
                "backend='reference' takes all of the head on one rank: gather it, full_tensor() "
                "of a DTensor, or use another backend"
            )
        if parts is not None:
            raise ValueError(
                "backend='reference' takes whole sequences: gather them, or use another backend"
            )
        return reference
    if shards is not None:
        chosen = VocabularyShards(chosen)
    into = weight_grad, weight_grad_scale
    return Scheduled(chosen, schedule, logits_budget, capturable, *into, shards, parts)


def _given(**arguments: object) -> list[str]:
    """Names of those that are not None."""
    return [name for name, value in arguments.items() if value is not None]


def _names(stats: Sequence[str]) -> tuple[str, ...]:
    return (stats,) if isinstance(stats, str) else tuple(stats)
