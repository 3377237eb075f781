"""Tiles and groups of logits by torch's own matrix products, on any device.

The elementwise work happens in place, on a few rows at a time so that they stay in the cache. A
materialised group is E = exp(z − max z), and ∂ℓ/∂z = −(E − s·onehot) / s with s = Σ E: the
division by s and every scalar of the head are one factor a row, applied to the small operands of
the products instead of to the logits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastpref.backends import Grads, Head, RowStats, concatenated, elementwise, gradients
from fastpref.backends.gradients import (
    SCALE,
    add_target_rows,
    sliced_gradients,
    target_slopes,
)
from fastpref.backends.products import (
    add_product,
    as_operand,
    gradient_dtype,
    product_dtype,
    product_into,
    weight_slices,
)

# Autograd differentiates the objective.
weigh_pairs = None
put_hidden_gradient = functools.partial(gradients.put_hidden_gradient, elementwise)
add_weight_gradient = functools.partial(gradients.add_weight_gradient, elementwise)

# Elements of a block of logits that elementwise passes work on: 2 MiB of float32 stay in L2.
_BLOCK_ELEMENTS = 2**19
# Its exponential is 0 in float64 too, and its products with coefficients stay finite.
_LOG_OF_ZERO = -1e4
# Nats by which other shards' logits may rise above these, of which e^−40 is left: no number rounds
# to it, and its products stay finite.
_MOST_ABOVE = 40.0


def forward(
    hidden: Tensor,  # (M, H)
    index: Tensor | None,  # (n,)
    targets: Tensor,  # (n,)
    head: Head,
    tile: tuple[int, int],
    stats: tuple[str, ...],
) -> RowStats:
    rows, columns = tile
    vocabulary = head.weight.shape[0]
    buffer = hidden.new_empty(min(rows, len(targets)), columns, dtype=head.accumulate_dtype)
    parts = []
    for start in range(0, max(1, len(targets)), rows):
        part = slice(start, start + rows)
        operand = as_operand(
            hidden[part] if index is None else hidden.index_select(0, index[part]), head
        )
        fold = _Fold(targets[part], head.accumulate_dtype, stats)
        for first, last, weight in weight_slices(head, columns):
            z = buffer[: len(operand), : last - first]
            _project(operand, weight, head, first, last, out=z)
            _softcap_(z, head)
            fold.add(z, first)
        parts.append(fold.finish(vocabulary))
    return RowStats.concatenate(parts)


def kept_dtype(head: Head) -> torch.dtype:
    return head.accumulate_dtype


def group_forward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, V)
    stats: tuple[str, ...],
) -> RowStats:
    operand = as_operand(hidden, head)
    for first, last, weight in weight_slices(head):
        _project(operand, weight, head, first, last, out=buffer[:, first:last])
    rows = max(1, _BLOCK_ELEMENTS // buffer.shape[1])
    parts = [
        _block_forward(buffer[i : i + rows], targets[i : i + rows], head, stats)
        for i in range(0, max(1, len(buffer)), rows)
    ]
    found = RowStats.concatenate(parts)
    found.kept = concatenated([part.kept for part in parts if part.kept is not None])
    return found


def _block_forward(z: Tensor, targets: Tensor, head: Head, stats: tuple[str, ...]) -> RowStats:
    """Statistics of a block; `z (n, V)` becomes E, times 1 − tanh² under a softcap."""
    slope = _softcap_(z, head)
    peak = z.amax(-1, keepdim=True)
    target_z = z.gather(-1, targets.clamp(min=0)[:, None])
    extra = {}
    if "peak" in stats:
        extra["peak"] = peak.squeeze(-1)
    if "mean_logits" in stats:
        extra["mean_logits"] = z.mean(-1)
    if "is_top1" in stats:
        extra["is_top1"] = z.argmax(-1) == targets
    peak = _anchor(peak)
    z.sub_(peak)
    shifted = _finite(z) if "entropy" in stats else None
    z.exp_()
    total = z.sum(-1, keepdim=True)
    log_total = total.log()
    if shifted is not None:
        extra["entropy"] = (log_total - _weighted_sum(z, shifted) / total).squeeze(-1)
    if "log_sum_sq_probs" in stats:
        extra["log_sum_sq_probs"] = (_weighted_sum(z, z).log() - 2 * log_total).squeeze(-1)
    if slope is not None:
        z.mul_(slope)
    logps, lse = target_z - peak - log_total, peak + log_total
    return RowStats(logps.squeeze(-1), lse.squeeze(-1), extra, torch.cat([total, lse], 1))


def group_gradients(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, V)
    rows: RowStats,
    coef: Tensor,  # (n,)
) -> tuple[Tensor, Tensor]:
    assert rows.kept is not None  # `group_forward` gives it
    total, lse = rows.kept.unbind(1)
    total = torch.where(total == 0, 1, total)  # of columns that a bias masks whole
    total = total * (rows.lse - lse).clamp(max=_MOST_ABOVE).exp()
    # (p − 1)·s from the log-probability, so that nothing cancels, before any rounding.
    at_target = torch.expm1(rows.logps) * total
    slopes = target_slopes(as_operand(hidden, head), targets, head)
    if slopes is not None:
        at_target = at_target * slopes
    _put_at_targets(buffer, targets, 0, at_target[:, None])
    dtype = gradient_dtype(head)
    if dtype == buffer.dtype:
        return buffer, -_slope(head) / total
    # A narrower row overwrites the beginning of its own wider one, some of them at a time.
    gradient = buffer.view(dtype)[:, : buffer.shape[1]]
    step = max(1, _BLOCK_ELEMENTS // max(1, buffer.shape[1]))
    for start in range(0, len(buffer), step):
        part = slice(start, start + step)
        gradient[part] = (buffer[part] * (-SCALE / total[part, None])).to(dtype)
    return gradient, torch.full_like(total, _slope(head) / SCALE)


def forward_with_gradients(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    buffer: Tensor,  # (n, columns)
    stats: tuple[str, ...],
) -> tuple[RowStats, Tensor]:
    operand, dtype = as_operand(hidden, head), product_dtype(head)
    grad = hidden.new_zeros(hidden.shape, dtype=head.accumulate_dtype)
    fold = _Fold(targets, head.accumulate_dtype, stats)
    for first, last, weight in weight_slices(head, buffer.shape[1]):
        z = buffer[:, : last - first]
        _project(operand, weight, head, first, last, out=z)
        slope = _softcap_(z, head)
        grad.mul_(fold.add(z, first))  # z is E = exp(z − max z) now
        _put_at_targets(z, targets, first, z.new_zeros(len(z), 1))
        if slope is not None:
            z.mul_(slope)
        add_product(grad, z.to(dtype), weight)
    grad.mul_(-_slope(head) / fold.total)
    rows = fold.finish(len(head.weight))
    add_target_rows(grad, operand, rows.logps, targets, head)
    return rows, grad


def recompute_backward(
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    head: Head,
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    entropy: tuple[Tensor, Tensor] | None,
    tile: tuple[int, int],
    wants: tuple[bool, ...],
) -> Grads:
    dtype, slope_of_all = gradient_dtype(head), _slope(head)

    def gradient_of(
        operand: Tensor,
        weight: Tensor,
        block: slice,
        first: int,
        z: Tensor,
        coef: Tensor,
        entropy: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        _project(operand, weight, head, first, first + len(weight), out=z)
        slope = _softcap_(z, head)
        z.sub_(lse[block, None])
        factor = slope_of_all * coef[block, None]
        if entropy is not None:  # ∂H/∂z = −p (log p + H); of log p = −inf, p log p is 0
            z.clamp_(min=_LOG_OF_ZERO)
            of_row, its_coef = entropy[0][block, None], slope_of_all * entropy[1][block, None]
            spread = (z + of_row).mul_(its_coef).add_(factor)
            z.exp_().mul_(spread).neg_()
            _add_at_targets(z, targets[block], first, factor)
        else:
            z.exp_()
            _add_at_targets(z, targets[block], first, z.new_full((len(z), 1), -1))
            z.mul_(-factor)
        if slope is not None:
            z.mul_(slope)
        return z.to(dtype)

    return sliced_gradients(elementwise, hidden, head, coef, entropy, tile, wants, gradient_of)


class _Fold:
    """Statistics of some rows, folded over vocabulary slices as an online log-sum-exp."""

    def __init__(self, targets: Tensor, dtype: torch.dtype, stats: tuple[str, ...]) -> None:
        def of_rows(value: float) -> Tensor:
            return torch.full(targets.shape, value, dtype=dtype, device=targets.device)[:, None]

        self.targets, self.stats = targets[:, None], stats
        self.peak, self.total, self.target_z = of_rows(-torch.inf), of_rows(0), of_rows(0)
        self.sum_z = of_rows(0) if "mean_logits" in stats else None
        self.sum_ez = of_rows(0) if "entropy" in stats else None
        self.sum_ee = of_rows(0) if "log_sum_sq_probs" in stats else None
        self.best = torch.full_like(self.targets, -1) if "is_top1" in stats else None

    def add(self, z: Tensor, first: int) -> Tensor:
        """Folds logits `z (n, columns)` of the vocabulary from `first` on.

        They become exp(z − peak) in place. Returns `(n, 1)`, by what sums of such exponentials of
        earlier slices shrink.
        """
        local, here = _located(self.targets, first, z)
        self.target_z = torch.where(here, z.gather(-1, local), self.target_z)
        if self.sum_z is not None:
            self.sum_z += z.sum(-1, keepdim=True)
        if self.best is None:
            highest = z.amax(-1, keepdim=True)
        else:  # the first of equal maxima wins, as in argmax
            highest, where = z.max(-1, keepdim=True)
            self.best = torch.where(highest > self.peak, where + first, self.best)
        peak = torch.maximum(self.peak, highest)
        anchor = _anchor(peak)
        shrink = torch.exp(self.peak - anchor)
        shifted = z.sub_(anchor)
        finite = _finite(shifted) if self.sum_ez is not None else None
        e = shifted.exp_()
        if self.sum_ez is not None and finite is not None:
            # Σ e^(z−peak) (z−peak), carried over to the new peak.
            carried = torch.where(self.total > 0, (self.peak - anchor) * self.total, 0)
            self.sum_ez = shrink * (self.sum_ez + carried) + _weighted_sum(e, finite)
        if self.sum_ee is not None:
            self.sum_ee = shrink**2 * self.sum_ee + _weighted_sum(e, e)
        self.total = shrink * self.total + e.sum(-1, keepdim=True)
        self.peak = peak
        return shrink

    def finish(self, vocabulary: int) -> RowStats:
        log_total = self.total.log()
        extra = {}
        if self.sum_z is not None:
            extra["mean_logits"] = self.sum_z / vocabulary
        if self.best is not None:
            extra["is_top1"] = self.best == self.targets
        if "peak" in self.stats:
            extra["peak"] = self.peak
        if self.sum_ez is not None:
            extra["entropy"] = log_total - self.sum_ez / self.total
        if self.sum_ee is not None:
            extra["log_sum_sq_probs"] = self.sum_ee.log() - 2 * log_total
        extra = {name: value.squeeze(-1) for name, value in extra.items()}
        logps = self.target_z - self.peak - log_total
        return RowStats(logps.squeeze(-1), (self.peak + log_total).squeeze(-1), extra)


def _project(
    operand: Tensor, weight: Tensor, head: Head, first: int, last: int, *, out: Tensor
) -> None:
    """`out = scale·(h Wᵀ + b)`, divided by the temperature already where no softcap intervenes."""
    scale = head.logit_scale if head.softcap is not None else head.logit_scale / head.temperature
    product_into(operand, weight.T, out=out, scale=scale)
    if head.bias is not None:
        out.add_(scale * head.bias[first:last].to(out.dtype))


def _softcap_(z: Tensor, head: Head) -> Tensor | None:
    """Caps `z` in place and returns 1 − tanh², the slope of the cap; None where there is none."""
    if head.softcap is None:
        return None
    z.div_(head.softcap).tanh_()
    slope = 1 - z * z
    z.mul_(head.softcap / head.temperature)
    return slope


def _slope(head: Head) -> float:
    """∂z/∂(W h + b), but for the softcap's 1 − tanh²."""
    return head.logit_scale / head.temperature


def _located(targets: Tensor, first: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of `targets (n, 1)` in `z (n, columns)`, clamped, and whether they lie there."""
    local = targets - first
    here = (local >= 0) & (local < z.shape[1])
    return local.clamp(0, z.shape[1] - 1), here


def _add_at_targets(z: Tensor, targets: Tensor, first: int, value: Tensor) -> None:
    """Adds `value (n, 1)` to `z (n, columns)` at each row's target, if it lies in this slice."""
    local, here = _located(targets[:, None], first, z)
    z.scatter_add_(-1, local, torch.where(here, value, 0))


def _put_at_targets(z: Tensor, targets: Tensor, first: int, value: Tensor) -> None:
    """Puts `value (n, 1)` in `z (n, columns)` at each row's target, if it lies in this slice."""
    local, here = _located(targets[:, None], first, z)
    z.scatter_(-1, local, torch.where(here, value, z.gather(-1, local)))


def _anchor(peak: Tensor) -> Tensor:
    """What exponentials are relative to; of columns that a bias masks, −inf − −inf would be NaN."""
    return torch.where(peak == -torch.inf, 0, peak)


def _finite(z: Tensor) -> Tensor:
    """A copy without −inf, so that its product with a probability of 0 is 0."""
    return z.clamp(min=torch.finfo(z.dtype).min)


def _weighted_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[:, None]
