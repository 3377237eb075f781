"""A head whose vocabulary lies on several ranks: any backend on each, and what they exchange.

Every rank has all hidden states and targets, and its own rows of the head. What a backend finds on
one of them are statistics of a softmax over its part, and those of the parts make up the whole, as
slices of the vocabulary do within a backend: of rank r with the log-sum-exp lse_r

    lse = log Σ_r e^lse_r        w_r = e^(lse_r − lse)        p_j = w_r p_rj
    log p(y) = log p_r(y) + log w_r        where y is one of its tokens
    H = Σ_r w_r (H_r − log w_r)            log Σ p² = log Σ_r w_r² Σ_j p_rj²

One all-gather of these numbers follows each forward; from then on rows have the statistics of all
of the vocabulary, so that schedules and objectives are as on one rank, and the same everywhere. Of
gradients only the hidden states' is a sum over ranks: one all-reduce of rows, before they are
rounded. Nothing else is sent, and nothing of the vocabulary's length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, distributed

from fastpref.backends import Backend, Elementwise, Grads, Head, Kept, RowStats, Total, Weighed
from fastpref.backends.gradients import add_target_rows, keep
from fastpref.backends.products import as_operand

_NONE_OF_THE_COLUMNS = -100


@dataclass(eq=False)
class Shards:
    """Which tokens are whose: consecutive ones, in the order of the ranks of `group`."""

    group: Any  # ProcessGroup
    sizes: tuple[int, ...] = field(default=())  # of each rank's part; some may be 0

    @property
    def vocabulary(self) -> int:
        """Of all ranks together."""
        return sum(self.sizes)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as columns of this rank's part."""
        rank = distributed.get_rank(self.group)
        first, size = sum(self.sizes[:rank]), self.sizes[rank]
        is_here = (targets >= first) & (targets < first + size)
        return torch.where(is_here, targets - first, _NONE_OF_THE_COLUMNS)

    def owners(self, targets: Tensor) -> Tensor:
        """The rank in the group that each target's column is on."""
        ends = torch.tensor([*itertools.accumulate(self.sizes)], device=targets.device)
        return torch.searchsorted(ends, targets, right=True)

    def gather(self, values: Tensor) -> Tensor:
        """`(ranks, …)` of every rank."""
        found = values.new_empty((len(self.sizes), *values.shape))
        if values.numel():
            distributed.all_gather([*found], values, group=self.group)
        return found

    def sum_(self, values: Tensor) -> Tensor:
        """Over ranks, in place."""
        if values.numel():
            distributed.all_reduce(values, group=self.group)
        return values


@dataclass(frozen=True)
class VocabularyShards:
    """A backend for heads with `shards`, by one that does each rank's part, which may be empty."""

    inner: Backend

    @property
    def elementwise(self) -> Elementwise:
        return self.inner.elementwise

    @property
    def weigh_pairs(self) -> Callable[..., Weighed] | None:
        return self.inner.weigh_pairs

    def kept_dtype(self, head: Head) -> torch.dtype:
        return self.inner.kept_dtype(head)

    def forward(
        self,
        hidden: Tensor,  # (M, H)
        index: Tensor | None,  # (n,)
        targets: Tensor,  # (n,)
        head: Head,
        tile: tuple[int, int],
        stats: tuple[str, ...],
    ) -> RowStats:
        shards, asked = _shards(head), _of_part(stats)
        if len(head.weight):
            own = self.inner.forward(hidden, index, shards.local(targets), head, tile, asked)
        else:
            own = _of_nothing(targets, head, asked)
        return _merged(own, targets, shards, stats)[0]

    def group_forward(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        buffer: Tensor,  # (n, V)
        stats: tuple[str, ...],
    ) -> RowStats:
        shards, asked = _shards(head), _of_part(stats)
        if len(head.weight):
            own = self.inner.group_forward(hidden, shards.local(targets), head, buffer, asked)
        else:
            own = _of_nothing(targets, head, asked)
        return _merged(own, targets, shards, stats)[0]

    def group_gradients(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        buffer: Tensor,  # (n, V)
        rows: RowStats,
        coef: Tensor,  # (n,)
    ) -> tuple[Tensor, Tensor]:
        if not len(head.weight):
            return buffer, torch.zeros_like(coef)
        local = _shards(head).local(targets)
        return self.inner.group_gradients(hidden, local, head, buffer, rows, coef)

    def put_hidden_gradient(
        self,
        kept: Kept,
        gradient: Tensor,  # (n, V)
        factor: Tensor,  # (n,)
        head: Head,
    ) -> None:
        wide = factor.new_zeros((len(factor), head.hidden_size), dtype=head.accumulate_dtype)
        if len(head.weight):
            every = torch.arange(len(wide), device=wide.device)
            self.inner.put_hidden_gradient(Kept(wide, None, every), gradient, factor, head)
        keep(self.elementwise, _shards(head).sum_(wide), kept)

    def add_weight_gradient(
        self,
        total: Total,  # (V, columns)
        gradient: Tensor,  # (n, V)
        rows: Tensor,  # (n, columns)
        inverse: Tensor | None,  # () of rows
    ) -> None:
        if len(total.high):
            self.inner.add_weight_gradient(total, gradient, rows, inverse)

    def forward_with_gradients(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        buffer: Tensor,  # (n, columns)
        stats: tuple[str, ...],
    ) -> tuple[RowStats, Tensor]:
        """∂ℓ/∂h is Σ_r w_r ∂ log p_r/∂h, and (1 − w_y) ∂z_y/∂h of the rank y that the target is on.

        Where it is not, ∂ log p_r/∂h has no target in it.
        """
        shards, asked = _shards(head), _of_part(stats)
        local = shards.local(targets)
        if len(head.weight):
            own, grad = self.inner.forward_with_gradients(hidden, local, head, buffer, asked)
        else:
            own = _of_nothing(targets, head, asked)
            grad = hidden.new_zeros(hidden.shape, dtype=head.accumulate_dtype)
        rows, log_share = _merged(own, targets, shards, stats)
        grad.mul_(log_share.exp()[:, None])
        if len(head.weight):
            add_target_rows(grad, as_operand(hidden, head), log_share, local, head)
        return rows, shards.sum_(grad)

    def recompute_backward(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        lse: Tensor,  # (n,)
        coef: Tensor,  # (n,)
        entropy: tuple[Tensor, Tensor] | None,
        tile: tuple[int, int],
        wants: tuple[bool, ...],
    ) -> Grads:
        shards = _shards(head)
        given = hidden, shards.local(targets), head, lse, coef, entropy, tile, wants
        found = self.inner.recompute_backward(*given)
        if found.hidden is not None:
            shards.sum_(found.hidden)
        return found


def _shards(head: Head) -> Shards:
    assert head.shards is not None  # else another backend
    return head.shards


def _of_part(stats: tuple[str, ...]) -> tuple[str, ...]:
    """What `_merged` needs of a part for these statistics of all."""
    return (*stats, *("peak",) * ("is_top1" in stats))


def _of_nothing(targets: Tensor, head: Head, stats: tuple[str, ...]) -> RowStats:
    """Statistics of a part without tokens."""

    def of_rows(value: float) -> Tensor:
        return torch.full(targets.shape, value, dtype=head.accumulate_dtype, device=targets.device)

    nothing, zero = of_rows(-torch.inf), of_rows(0)
    extra = {name: nothing if name == "peak" else zero for name in stats}
    return RowStats(zero, nothing, extra)


def _merged(
    own: RowStats, targets: Tensor, shards: Shards, stats: tuple[str, ...]
) -> tuple[RowStats, Tensor]:
    """Statistics over all parts, and log w of this one `(n,)`."""
    names = _of_part(stats)  # in one order, whatever a backend's is
    sent = [own.lse, own.logps, *(own.extra[name].to(own.lse.dtype) for name in names)]
    lses, logps, *extra = shards.gather(torch.stack(sent)).unbind(1)  # each (ranks, n)
    of = dict(zip(names, extra, strict=True))
    peak = lses.amax(0)
    log_total = (lses - peak).exp().sum(0).log()
    log_share = lses - peak - log_total
    share = log_share.exp()

    def mean(values: Tensor) -> Tensor:  # where there is nothing, 0 · inf is 0
        return torch.where(share == 0, 0, share * values).sum(0)

    found = {}
    for name in stats:
        if name == "entropy":
            found[name] = mean(of[name] - log_share)
        elif name == "mean_logits":
            sizes = torch.tensor(shards.sizes, dtype=peak.dtype, device=peak.device)
            found[name] = (sizes / shards.vocabulary) @ of[name]
        elif name == "is_top1":  # of equal peaks the first rank's, as in argmax
            best = of["peak"].argmax(0, keepdim=True)
            found[name] = of[name].gather(0, best).squeeze(0).bool()
        elif name == "log_sum_sq_probs":
            squares = torch.where(share == 0, -torch.inf, 2 * log_share + of[name])
            found[name] = squares.logsumexp(0)
    logps = (logps + log_share).gather(0, shards.owners(targets)[None]).squeeze(0)
    merged = replace(own, logps=logps, lse=peak + log_total, extra=found)
    return merged, log_share[distributed.get_rank(shards.group)]
