"""What every objective shares: what it is given, what it must offer, what a step reports.

An objective never sees tokens, logits or weights. It receives a `PairLogps` and returns one loss a
pair by ordinary torch operations; autograd turns that into the two coefficients a pair with which
the projection scales its gradients. Log-probabilities are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastpref.objectives.balance import Balance


@dataclass(frozen=True)
class PairLogps:
    """What an objective may look at: eight vectors `(B,)`, one entry a pair.

    Args:
        chosen_logps: policy log-probability of the chosen response, nats; the sum over its scored
            tokens, each times its token weight. float32, or float64 where the inputs are.
        rejected_logps: the same for the rejected response.
        chosen_lengths: number of scored tokens, in the dtype of the log-probabilities.
        rejected_lengths: the same for the rejected response.
        ref_chosen_logps: log-probability under the reference model, or None.
        ref_rejected_logps: the same for the rejected response.
        chosen_scores: quality score from the data set, any scale, or None.
        rejected_scores: the same for the rejected response.

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

    @property
    def chosen_mean_logps(self) -> Tensor:
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> Tensor:
        return self.rejected_logps / self.rejected_lengths

    @property
    def ref_chosen_mean_logps(self) -> Tensor:
        return self.ref_chosen_logps / self.chosen_lengths

    @property
    def ref_rejected_mean_logps(self) -> Tensor:
        return self.ref_rejected_logps / self.rejected_lengths

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
        chosen = self.chosen_logps - self.ref_chosen_logps
        return chosen, self.rejected_logps - self.ref_rejected_logps


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


class Objective:
    """Base class of every objective, and of your own.

    Subclass it, implement `__call__`, and hand an instance to `preference_loss`:

        class Exponential(Objective):
            def __call__(self, pairs):
                chosen, rejected = pairs.log_ratios(normalized=False)
                return torch.exp(-0.1 * (chosen - rejected))

    `couples_pairs` says that a pair's loss depends on other pairs of the batch (a batch mean, a
    sort); the pairs are then seen together, at the cost of one more matrix product. So are they
    where the objective has parameters that train: attributes, or it is an `nn.Module` itself.
    `needs_reference` and `needs_scores` make missing inputs an error that names them.
    `rewards` times `reward_scale` (β where there is one) are what a step logs.
    """

    couples_pairs: ClassVar[bool] = False

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


def is_built_in(objective: Objective) -> bool:
    """Whether the class is of this package; a subclass from elsewhere may compute anything."""
    return type(objective).__module__.split(".")[0] == "fastpref"


def own_parameters(objective: Objective) -> list[Tensor]:
    """Tensors of the objective that train: its attributes', and those of modules among them."""
    holders = [objective, *getattr(objective, "__dict__", {}).values()]
    modules = [x for x in holders if isinstance(x, torch.nn.Module)]
    tensors = [x for x in holders if isinstance(x, Tensor)]
    tensors += [parameter for module in modules for parameter in module.parameters()]
    return [tensor for tensor in tensors if tensor.requires_grad]


def evaluate(objective: Objective, pairs: PairLogps) -> Tensor:
    """`objective(pairs)`: one floating-point loss a pair, with a gradient where there can be one.

    Raises:
        ValueError, TypeError: anything else; it would train nothing, or not what was meant.
    """
    losses, name = objective(pairs), type(objective).__name__
    shape = tuple(pairs.chosen_logps.shape)
    if not isinstance(losses, Tensor) or tuple(losses.shape) != shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{name} must return one loss a pair, ({shape[0]},), got {found}")
    if not losses.is_floating_point():
        raise TypeError(f"{name} must return floating-point losses, got {losses.dtype}")
    wants_gradient = torch.is_grad_enabled() and pairs.chosen_logps.requires_grad
    if wants_gradient and not losses.requires_grad:
        raise ValueError(
            f"{name} returned losses without a gradient, which would train nothing: something in "
            "it is detached, rounded or under torch.no_grad()"
        )
    return losses


def pair_metrics(objective: Objective, pairs: PairLogps) -> dict[str, Tensor]:
    """What a step reports: scalars, means over the pairs, detached.

    `rewards/*` are the objective's own rewards times its `reward_scale`: β(ℓ − r), or βℓ without a
    reference, per token where the loss is and summed where it is not; `rewards/accuracies` is the
    share of pairs whose chosen reward is the larger; `logps/*` are sums in nats; then the
    objective's own diagnostics.
    """
    with torch.no_grad():
        chosen, rejected = (objective.reward_scale * x for x in objective.rewards(pairs))
        per_pair = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": pairs.chosen_logps,
            "logps/rejected": pairs.rejected_logps,
        } | objective.diagnostics(pairs)
        return {name: mean_or_zero(values) for name, values in per_pair.items()}


def mean_or_zero(values: Tensor) -> Tensor:
    """Detached mean; 0 of nothing, where `mean` gives NaN."""
    return values.detach().mean() if len(values) else values.new_zeros(())
