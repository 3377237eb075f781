"""Liger's fused preference losses by their names, call and return, over `preference_loss`.

    - from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    + from fastpref.liger import LigerFusedLinearDPOLoss

As in Liger 0.8.5: loss, returned values and gradients are equal in float32. What differs: the
returned values are constants (Liger's look differentiable, and their gradient is dropped); a
response without a scored token has log-probability 0 where Liger's average is NaN; `compiled` and
`chunk_size` choose nothing here, since prompts and padding are skipped and groups are planned; and
numbers that an objective cannot take (β of 0, label noise of ½) are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.domains import check_fields, number
from fastpref.loss import preference_loss, sequence_logps
from fastpref.objectives import (
    BCO,
    DPO,
    EXO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Mixture,
    Objective,
    PairLogps,
    Robust,
    SimPO,
)
from fastpref.objectives.base import Composite
from fastpref.objectives.margin import log1m_exp
from fastpref.sequences import IGNORED

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

# Liger's names: the objective, and which of Liger's settings it takes, by our names.
_LOSSES: dict[str, tuple[Callable[..., Objective], tuple[tuple[str, str], ...]]] = {
    "sigmoid": (DPO, ()),
    "hinge": (Hinge, ()),
    "exo_pair": (EXO, (("label_smoothing", "label_smoothing"),)),
    "nca_pair": (NCA, ()),
    "robust": (Robust, (("label_smoothing", "label_smoothing"),)),
    "bco_pair": (BCO, ()),
    "sppo_hard": (SPPO, ()),
    "apo_zero": (APOZero, ()),
    "apo_down": (APODown, ()),
    "discopop": (DiscoPOP, (("tau", "discopop_tau"),)),
}

Returned = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Averaged(Composite):
    """Another objective, of log-probabilities per token where it looks at sums."""

    objective: Objective

    @property
    def parts(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.chosen_lengths, pairs.rejected_lengths
        ref_chosen, ref_rejected = pairs.ref_chosen_logps, pairs.ref_rejected_logps
        averages = dataclasses.replace(
            pairs,
            chosen_logps=pairs.chosen_mean_logps,
            rejected_logps=pairs.rejected_mean_logps,
            ref_chosen_logps=None if ref_chosen is None else ref_chosen / chosen,
            ref_rejected_logps=None if ref_rejected is None else ref_rejected / rejected,
        )
        return self.objective(averages)


@dataclass(frozen=True)
class _Contrast(SimPO):
    """SimPO's loss with label noise; CPO's is the one with γ = 0."""

    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    length_normalized: bool = True

    def __call__(self, pairs: PairLogps) -> Tensor:
        margin = self.beta * self.reward_margin(pairs) - self.gamma
        noise = self.label_smoothing
        return -(1 - noise) * logsigmoid(margin) - noise * logsigmoid(-margin)


@dataclass(frozen=True)
class _Odds(ORPO):
    """ORPO without its NLL, which Liger averages over all tokens of the batch."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        return -self.odds_weight * logsigmoid(self.reward_margin(pairs))


@dataclass(eq=False, repr=False)
class _LigerLoss(torch.nn.Module):
    """What the four share. Settings are read at each call, as Liger reads them."""

    ignore_index: int = number(IGNORED, whole=True)
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__init__()
        check_fields(self)
        self.preference()

    def preference(self) -> Objective:
        """The loss without its NLL, with the settings as they are now."""
        raise NotImplementedError

    def run(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        *,
        averaged: bool,
        nll_weight: float | None,
        ref_logps: Tensor | None = None,  # (2B,), sums
        nll_target: Tensor | None = None,
    ) -> Returned:
        """The loss, and what all of Liger's return beside it."""
        if nll_target is not None and nll_weight is None:
            raise ValueError("nll_target is given, and compute_nll_loss is False")
        objective, targets = self.preference(), self.targets(target)
        if nll_weight is not None and nll_target is None:
            objective = Mixture([(objective, 1.0), (SFT(), nll_weight)])
        out = preference_loss(hidden, weight, targets, objective, ref_logps=ref_logps, bias=bias)
        loss, logps, pairs = out.loss, out.logps.detach(), len(out.losses)
        nll = torch.zeros_like(loss)
        if nll_weight is not None and nll_target is not None:
            chosen = self.targets(nll_target)[:pairs]
            sums, lengths = sequence_logps(hidden[:pairs], weight, chosen, bias=bias)
            nll = -sums.sum() / lengths.sum()
            loss = loss + nll_weight * nll
        elif nll_weight is not None:
            nll = -logps[:pairs].sum() / out.lengths[:pairs].sum()
        ratios = logps if ref_logps is None else logps - ref_logps
        if averaged:
            logps, ratios = logps / out.lengths, ratios / out.lengths
        rewards = (self.beta * ratios).chunk(2)
        means = _mean_logits(hidden, weight, bias)
        return loss, (*logps.chunk(2), *means, nll.detach(), *rewards)

    def targets(self, target: Tensor) -> Tensor:
        """Ours ignore -100. Where Liger ignores another, -100 is no token, and an error."""
        if self.ignore_index == IGNORED:
            return target
        marked = target.masked_fill(target == IGNORED, -1)
        return marked.masked_fill(target == self.ignore_index, IGNORED)


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Mean logit of each half of the batch, prompt and padding too; no logits are needed for it."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = torch.stack([half.mean((0, 1), dtype=wide) for half in hidden.chunk(2)])
    means = rows @ weight.mean(0, dtype=wide)
    return (means if bias is None else means + bias.mean(dtype=wide)).unbind()


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_LigerLoss):
    """Liger's DPO and its `loss_type`s.

    Args:
        ignore_index: target of positions that are not scored.
        beta: β > 0.
        alpha: weight of the NLL, where `compute_nll_loss`; it is per token of all chosen responses.
        compiled: without effect.
        use_ref_model: False takes reference log-probabilities of 0.
        average_log_prob: averages per token where the loss has sums.
        chunk_size: without effect.
        loss_type: "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
            "apo_zero", "apo_down" or "discopop".
        label_smoothing: ε of exo_pair, in (0, ½), and of robust, in [0, ½); of no other, as there.
        discopop_tau: τ > 0 of discopop.
    """

    alpha: float = number(1.0)
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = number(1, at_least=1, whole=True)
    loss_type: str = "sigmoid"
    label_smoothing: float = number(0.0)
    discopop_tau: float = number(0.05)

    def preference(self) -> Objective:
        if self.loss_type not in _LOSSES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}; expected one of {[*_LOSSES]}")
        make, taken = _LOSSES[self.loss_type]
        objective = make(beta=self.beta, **{ours: getattr(self, name) for ours, name in taken})
        return _Averaged(objective) if self.average_log_prob else objective

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2B, T, H), chosen first
        target: Tensor,  # (2B, T), int64
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2B, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,
    ) -> Returned:
        """Loss, and (chosen logps `(B,)`, rejected logps, mean chosen logit, mean rejected logit,
        NLL, chosen rewards `(B,)`, rejected rewards), all of them constants, fp32.

        Raises:
            ValueError: `use_ref_model` without its input and weight, or they without it.
        """
        given = [ref_input is not None, ref_weight is not None]
        if not all(given) if self.use_ref_model else any((*given, ref_bias is not None)):
            raise ValueError(
                f"use_ref_model={self.use_ref_model}, and ref_input, ref_weight are "
                f"{['missing', 'given'][given[0]]}, {['missing', 'given'][given[1]]}"
            )
        if ref_input is None or ref_weight is None:
            ref_logps = torch.zeros(len(target), device=_input.device)
        else:
            with torch.no_grad():
                ref_logps, _ = sequence_logps(
                    ref_input, ref_weight, self.targets(target), bias=ref_bias
                )
        return self.run(
            lin_weight,
            _input,
            target,
            bias,
            averaged=self.average_log_prob,
            nll_weight=self.alpha if self.compute_nll_loss else None,
            ref_logps=ref_logps,
        )


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_LigerLoss):
    """Liger's CPO; `label_smoothing`, ε in [0, ½). The other arguments are those of Liger's DPO."""

    alpha: float = number(1.0)
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = number(1, at_least=1, whole=True)

    def preference(self) -> Objective:
        return _Contrast(self.beta, 0.0, self.label_smoothing, self.average_log_prob)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        """As of `LigerFusedLinearDPOLoss`; rewards are β times the log-probabilities."""
        return self.run(
            lin_weight,
            _input,
            target,
            bias,
            averaged=self.average_log_prob,
            nll_weight=self.alpha if self.compute_nll_loss else None,
        )


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_LigerLoss):
    """Liger's SimPO; `gamma` is the target margin. The others are those of Liger's CPO."""

    alpha: float = number(1.0)
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = number(1, at_least=1, whole=True)

    def preference(self) -> Objective:
        return _Contrast(self.beta, self.gamma, self.label_smoothing)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        """As of `LigerFusedLinearCPOLoss`; log-probabilities and rewards are per token."""
        nll_weight = self.alpha if self.compute_nll_loss else None
        return self.run(lin_weight, _input, target, bias, averaged=True, nll_weight=nll_weight)


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_LigerLoss):
    """Liger's ORPO; `beta` is the weight of the odds ratio, not negative."""

    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = number(1, at_least=1, whole=True)

    def preference(self) -> Objective:
        return _Odds(self.beta)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,  # (2B, T)
    ) -> Returned:
        """As of `LigerFusedLinearSimPOLoss`, and two means over the pairs: log σ(m), and m itself.

        Args:
            nll_target: targets of the NLL where they are others, such as with the prompt; the
                chosen half counts. One more pass over the chosen rows.
        """
        loss, values = self.run(
            lin_weight,
            _input,
            target,
            bias,
            averaged=True,
            nll_weight=1.0 if self.compute_nll_loss else None,
            nll_target=nll_target,
        )
        chosen, rejected, *_ = values
        log_odds = (chosen - log1m_exp(chosen)) - (rejected - log1m_exp(rejected))
        return loss, (*values, logsigmoid(log_odds).mean(), log_odds.mean())
