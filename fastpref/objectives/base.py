"""What every objective shares: what it is given, what it must offer, what a step reports.

An objective never sees tokens, logits or weights. It receives the log-probabilities of whole
responses, as `PairLogps` or as `ListLogps`, and returns one loss a prompt by ordinary torch
operations; autograd turns that into one coefficient a response with which the projection scales its
gradients. Log-probabilities are in nats. K responses a prompt, B prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastpref.objectives.balance import Balance


def given(name: str, values: Tensor | None) -> Tensor:
    """What an objective looks at, by the name that the caller knows it by.

    Raises:
        ValueError: it is missing.
    """
    if values is None:
        raise ValueError(f"the objective looks at {name}, of which there are none")
    return values


@dataclass(frozen=True)
class ListLogps:
    """What a list-wise objective may look at: `(K, B)`, response k of prompt b, but for `betas`.

    Args:
        logps: policy log-probability of each response, nats; the sum over its scored tokens, each
            times its token weight. float32, or float64 where the inputs are.
        lengths: number of scored tokens, or the sum of their weights where that was asked for, in
            the dtype of the log-probabilities.
        ref_logps: log-probabilities under the reference model, or None.
        scores: quality scores from the data set, any scale, or None.
        betas: `(B,)`, in place of the objective's β, or None.
        extras: what `extras` of the objective names, each `(K, B)` or `(B,)`.
        alignments: Σ_t (log p(y_t) − log Σ_v p(v)²) of each response under the policy, constants;
            None unless the objective's `needs_alignments` asks for them.
        mean_lengths: K numbers, the average length of response k over all prompts of the batch,
            those of other groups included.
    """

    logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None = None
    scores: Tensor | None = None
    betas: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    alignments: Tensor | None = None
    mean_lengths: tuple[float | Tensor, ...] = ()

    @property
    def responses(self) -> int:
        return len(self.logps)

    def log_probs(self, normalized: bool) -> Tensor:
        """Policy log-probabilities, per token if `normalized`."""
        return self.logps / self.lengths if normalized else self.logps

    def log_ratios(self, normalized: bool) -> Tensor:
        """Policy minus reference log-probabilities, per token if `normalized`."""
        ratios = self.logps - given("ref_logps", self.ref_logps)
        return ratios / self.lengths if normalized else ratios

    def pairs(self, chosen: int = 0, rejected: int = 1) -> PairLogps:
        """Two responses of every prompt as pairs."""

        def of(values: Tensor | None, response: int) -> Tensor | None:
            return None if values is None else values[response]

        of_pairs = {
            name: x if x.dim() == 1 else x[[chosen, rejected]] for name, x in self.extras.items()
        }
        return PairLogps(
            chosen_logps=self.logps[chosen],
            rejected_logps=self.logps[rejected],
            chosen_lengths=self.lengths[chosen],
            rejected_lengths=self.lengths[rejected],
            ref_chosen_logps=of(self.ref_logps, chosen),
            ref_rejected_logps=of(self.ref_logps, rejected),
            chosen_scores=of(self.scores, chosen),
            rejected_scores=of(self.scores, rejected),
            betas=self.betas,
            extras=of_pairs,
            chosen_alignments=of(self.alignments, chosen),
            rejected_alignments=of(self.alignments, rejected),
            mean_chosen_length=self.mean_lengths[chosen] if self.mean_lengths else None,
        )


@dataclass(frozen=True)
class PairLogps:
    """What an objective of pairs may look at: vectors `(B,)`, one entry a pair.

    Args:
        chosen_logps: policy log-probability of the chosen response, nats; the sum over its scored
            tokens, each times its token weight. float32, or float64 where the inputs are.
        rejected_logps: the same for the rejected response.
        chosen_lengths: number of scored tokens, or the sum of their weights where that was asked
            for, in the dtype of the log-probabilities.
        rejected_lengths: the same for the rejected response.
        ref_chosen_logps: log-probability under the reference model, or None.
        ref_rejected_logps: the same for the rejected response.
        chosen_scores: quality score from the data set, any scale, or None.
        rejected_scores: the same for the rejected response.
        betas: in place of the objective's β, or None.
        extras: what `extras` of the objective names, each `(B,)`, or `(2, B)`: chosen, rejected.
        chosen_alignments: Σ_t (log p(y_t) − log Σ_v p(v)²) under the policy, a constant; None
            unless the objective's `needs_alignments` asks for it.
        rejected_alignments: the same for the rejected response.
        mean_chosen_length: average chosen length over all pairs of the batch, those of other groups
            included.

    The `…_mean_logps` properties divide by the lengths: averages per token.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None
    betas: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    chosen_alignments: Tensor | None = None
    rejected_alignments: Tensor | None = None
    mean_chosen_length: float | Tensor | None = None

    @property
    def chosen_mean_logps(self) -> Tensor:
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> Tensor:
        return self.rejected_logps / self.rejected_lengths

    @property
    def ref_chosen_mean_logps(self) -> Tensor:
        return given("ref_logps", self.ref_chosen_logps) / self.chosen_lengths

    @property
    def ref_rejected_mean_logps(self) -> Tensor:
        return given("ref_logps", self.ref_rejected_logps) / self.rejected_lengths

    def logps(self, normalized: bool) -> tuple[Tensor, Tensor]:
        """Policy log-probabilities `(chosen, rejected)`, per token if `normalized`."""
        if normalized:
            return self.chosen_mean_logps, self.rejected_mean_logps
        return self.chosen_logps, self.rejected_logps

    def log_ratios(self, normalized: bool) -> tuple[Tensor, Tensor]:
        """Policy minus reference log-probabilities `(chosen, rejected)`."""
        if normalized:
            chosen = self.chosen_mean_logps - self.ref_chosen_mean_logps
            return chosen, self.rejected_mean_logps - self.ref_rejected_mean_logps
        chosen = self.chosen_logps - given("ref_logps", self.ref_chosen_logps)
        return chosen, self.rejected_logps - given("ref_logps", self.ref_rejected_logps)

    def score_gap(self) -> Tensor:
        """Chosen minus rejected scores."""
        return given("scores", self.chosen_scores) - given("scores", self.rejected_scores)


@dataclass(frozen=True)
class PairFormula:
    """How an objective describes itself to a fused kernel, in general ingredients.

        ρ_y = x_y, or log-odds x_y − log(1 − e^x_y);  x_y = ℓ_y − r_y or ℓ_y, over n_y or not
        m   = scale (a_w ρ_w − a_l ρ_l) + shift + length_weight (n_w − n_l)
        L   = weight · σ(quality (s_w − s_l)) · (1 − σ(u))^γ · f(m) − c ℓ_w
        u   = scale (ℓ_w − ℓ_l) − τ

    Args:
        link: f, one of "log_sigmoid" (−log σ(m), with label noise), "hinge" (max(0, 1 − m)) and
            "square" (m²).
        uses_reference: rewards are log-ratios to the reference.
        normalized: rewards, u and the gate of c are per token.
        log_odds: of the rewards and of the balance's b.
        nll_weight: c, a constant; with `nll_least_score` only where ℓ_w < r_w and
            s_w ≥ nll_least_score.
        nll_normalized: c multiplies ℓ̄_w.
        quality: η, None for no such weight.
        focus: (γ, τ), None for no such weight; `focus_detached` takes it as a constant.
        balance: a_w and a_l, None for 1 and 1.
        reward_scale: times x_y are the logged rewards.
        beta_shifts: a pair's own β replaces `shift` by −1/(2β), and not `scale` by β.
    """

    link: str = "log_sigmoid"
    scale: float = 1.0
    shift: float = 0.0
    length_weight: float = 0.0
    label_smoothing: float = 0.0
    weight: float = 1.0
    uses_reference: bool = True
    normalized: bool = False
    log_odds: bool = False
    nll_weight: float = 0.0
    nll_normalized: bool = True
    nll_least_score: float | None = None
    quality: float | None = None
    focus: tuple[float, float] | None = None
    focus_detached: bool = False
    balance: Balance | None = None
    reward_scale: float = 1.0
    beta_shifts: bool = False


class Objective:
    """Base class of every objective of pairs, and of your own.

    Subclass it, implement `__call__`, and hand an instance to `preference_loss`:

        class Exponential(Objective):
            def __call__(self, pairs):
                chosen, rejected = pairs.log_ratios(normalized=False)
                return torch.exp(-0.1 * (chosen - rejected))

    `couples_pairs` says that a pair's loss depends on other pairs of the batch (a batch mean, a
    sort); the pairs are then seen together, at the cost of one more matrix product. So are they
    where the objective has parameters that train: attributes, or it is an `nn.Module` itself.
    `needs_reference` and `needs_scores` make missing inputs an error that names them, and so do the
    names in `extras`. `takes_betas` says that it looks at `pairs.betas`; `needs_alignments` that it
    looks at the alignments; `uses_mean_length` that it looks at `pairs.mean_chosen_length`, which a
    trainer then takes over all processes and accumulated batches. `rewards` times `reward_scale` (β
    where there is one) are what a step logs.
    """

    couples_pairs = False
    takes_betas = False
    uses_mean_length = False
    extras: tuple[str, ...] = ()
    needs_alignments = False

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_scores(self) -> bool:
        return False

    @property
    def reward_scale(self) -> float:
        return float(getattr(self, "beta", 1.0))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """One loss a pair, `(B,)`, from `PairLogps`."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(pairs)")

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Chosen and rejected rewards `(B,)` before `reward_scale`, nats; summed over tokens here.

        Override it where the loss looks at something else, such as averages.
        """
        has_reference = pairs.ref_chosen_logps is not None
        return pairs.log_ratios(False) if has_reference else pairs.logps(False)

    def diagnostics(self, pairs: PairLogps) -> dict[str, Tensor]:
        """More numbers to log, each `(B,)`; called without gradients."""
        return {}

    def formula(self) -> PairFormula | None:
        """The same loss and diagnostics for a fused kernel; None to differentiate `__call__`."""
        return None

    def view(self, lists: ListLogps) -> PairLogps:
        """What `__call__`, `rewards` and `diagnostics` are given, of what there is.

        Raises:
            ValueError: responses that it has no use for.
        """
        if lists.responses != 2:
            raise ValueError(
                f"{type(self).__name__} compares two responses a prompt, got {lists.responses}; "
                "PlackettLuce and RankedPairs take more"
            )
        return lists.pairs()

    def report(self, pairs: PairLogps) -> dict[str, Tensor]:
        """What a step logs of each pair `(B,)`: rewards, log-probabilities and diagnostics."""
        scale = self.reward_scale if pairs.betas is None else pairs.betas
        chosen, rejected = (scale * x for x in self.rewards(pairs))
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": pairs.chosen_logps,
            "logps/rejected": pairs.rejected_logps,
        } | self.diagnostics(pairs)


class Composite(Objective):
    """An objective made of others, its `parts`: it needs what any of them needs."""

    @property
    def parts(self) -> tuple[Objective, ...]:
        raise NotImplementedError(f"{type(self).__name__} must say its parts")

    # What is an attribute elsewhere follows from the parts here.
    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        return any(part.couples_pairs for part in self.parts)

    @property
    def takes_betas(self) -> bool:  # type: ignore[override]
        return all(part.takes_betas for part in self.parts)

    @property
    def extras(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for part in self.parts for name in part.extras))

    @property
    def needs_alignments(self) -> bool:  # type: ignore[override]
        return any(part.needs_alignments for part in self.parts)

    @property
    def uses_mean_length(self) -> bool:  # type: ignore[override]
        return any(part.uses_mean_length for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        return any(part.needs_reference for part in self.parts)

    @property
    def needs_scores(self) -> bool:
        return any(part.needs_scores for part in self.parts)

    @property
    def reward_scale(self) -> float:
        return self.parts[0].reward_scale


def is_built_in(objective: Objective) -> bool:
    """Whether the class is of this package; a subclass from elsewhere may compute anything."""
    return type(objective).__module__.split(".")[0] == "fastpref"


def own_parameters(objective: Objective) -> list[Tensor]:
    """Tensors of the objective that train: its attributes', and those of modules among them."""
    holders = [objective, *getattr(objective, "__dict__", {}).values()]
    modules = [x for x in holders if isinstance(x, torch.nn.Module)]
    tensors = [x for x in holders if isinstance(x, Tensor)]
    tensors += [parameter for module in modules for parameter in module.parameters()]
    tensors += [x for part in getattr(objective, "parts", ()) for x in own_parameters(part)]
    return [tensor for tensor in tensors if tensor.requires_grad]


def evaluate(objective: Objective, lists: ListLogps) -> Tensor:
    """One floating-point loss a prompt `(B,)`, with a gradient where there can be one.

    Raises:
        ValueError, TypeError: anything else; it would train nothing, or not what was meant.
    """
    losses, name = objective(objective.view(lists)), type(objective).__name__
    shape = tuple(lists.logps.shape[1:])
    if not isinstance(losses, Tensor) or tuple(losses.shape) != shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{name} must return one loss a pair, ({shape[0]},), got {found}")
    if not losses.is_floating_point():
        raise TypeError(f"{name} must return floating-point losses, got {losses.dtype}")
    wants_gradient = torch.is_grad_enabled() and lists.logps.requires_grad
    if wants_gradient and not losses.requires_grad:
        raise ValueError(
            f"{name} returned losses without a gradient, which would train nothing: something in "
            "it is detached, rounded or under torch.no_grad()"
        )
    return losses


def step_metrics(objective: Objective, lists: ListLogps) -> dict[str, Tensor]:
    """What a step reports: scalars, means over the prompts, detached.

    `rewards/*` are the objective's own rewards times its `reward_scale`: β(ℓ − r), or βℓ without a
    reference, per token where the loss is and summed where it is not; `rewards/accuracies` is the
    share of pairs whose chosen reward is the larger; `logps/*` are sums in nats; then the
    objective's own diagnostics.
    """
    with torch.no_grad():
        reported = objective.report(objective.view(lists))
        return {name: mean_or_zero(values) for name, values in reported.items()}


def mean_or_zero(values: Tensor) -> Tensor:
    """Detached mean; 0 of nothing, where `mean` gives NaN."""
    return values.detach().mean() if len(values) else values.new_zeros(())
