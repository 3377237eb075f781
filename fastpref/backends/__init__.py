"""The one interface between the schedules and whatever computes them.

A backend is a module with the functions of `Backend`. It knows rows, vocabulary and coefficients;
of pairs it knows what `weigh_pairs` is told, and no loss by its name. Row `t` has the
log-probability `ℓ_t` of its target, and every gradient is `Σ_t coef_t ∂ℓ_t` (plus an entropy term
on request). A negative target is none of the columns: nothing of its row is the target's then, and
its log-probability says nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastpref.backends.vocabulary_shards import Shards

BACKENDS = ("auto", "torch", "triton", "reference")
TOKEN_STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class HeadOptions(TypedDict):
    """What the public functions take of the head beside its weight."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    frozen_weight: Tensor | None
    frozen_scale: Tensor | None


@dataclass(frozen=True)
class Head:
    """The LM head: `z = cap·tanh(scale·(W h + b) / cap) / temperature`.

    W is `weight`, or `[frozen_scale ∘ frozen_weight | weight]`, put together some rows at a time,
    or `whole` for kernels that read all of it.

    `compute_dtype` is what the operands of matrix products are rounded to: autocast's dtype, or
    what torch promotes hidden's and weight's to. Accumulation and everything after it is in
    `accumulate_dtype`. `weight_grad` is where the weight's gradient is added, times
    `weight_grad_scale` where that cannot wait for the upstream gradient. V is this rank's part of
    the vocabulary where there are `shards`.
    """

    weight: Tensor  # (V, H), or (V, H − F)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    temperature: float
    compute_dtype: torch.dtype
    frozen_weight: Tensor | None = None  # (V, F)
    frozen_scale: Tensor | None = None  # (V,)
    weight_grad: Tensor | None = None  # as weight; None for a new tensor
    weight_grad_scale: float = 1.0
    shards: Shards | None = None

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.compute_dtype)

    @functools.cached_property
    def bound(self) -> Tensor:
        """At least max |W| `()`, on its device; all of the weight is read once."""
        found = largest(self.weight)
        if self.frozen_weight is None:
            return found
        frozen = largest(self.frozen_weight).float()
        if self.frozen_scale is not None:
            frozen = frozen * largest(self.frozen_scale)
        return torch.maximum(found, frozen)

    @property
    def frozen_columns(self) -> int:
        """F, 0 where all of the head may train."""
        return 0 if self.frozen_weight is None else self.frozen_weight.shape[1]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.frozen_columns + self.weight.shape[1]

    @property
    def most_columns(self) -> int:
        """V; of shards that of the largest, so that all ranks plan alike."""
        return len(self.weight) if self.shards is None else max(self.shards.sizes)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some rows of W, in compute_dtype."""
        trained = self.weight[which].to(self.compute_dtype)
        if self.frozen_weight is None:
            return trained
        frozen = self.frozen_weight[which]
        if self.frozen_scale is not None:
            frozen = frozen * self.frozen_scale[which, None]
        return torch.cat([frozen.to(self.compute_dtype), trained], 1)

    @functools.cached_property
    def whole(self) -> Tensor:
        """W `(V, H)`: `weight` itself, or a copy in compute_dtype, made once."""
        return self.weight if self.frozen_weight is None else self.rows(slice(None))


def compute_dtype(hidden: Tensor, *head: Tensor) -> torch.dtype:
    """As torch would: autocast's dtype, which leaves float64 alone, or the promotion of all."""
    dtype, device_type = hidden.dtype, hidden.device.type
    for parameter in head:
        dtype = torch.promote_types(dtype, parameter.dtype)
    available = torch.amp.is_autocast_available(device_type)
    if dtype != torch.float64 and available and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def accumulate_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def largest(x: Tensor) -> Tensor:
    """max |x| `()`, on its device."""
    if not x.numel():
        return x.new_ones(())
    return torch.linalg.vector_norm(x, torch.inf)


@dataclass
class RowStats:
    """What is known of n rows once their logits have been seen, each `(n,)`.

    `kept` is what a backend's `group_gradients` needs of its `group_forward`: some numbers a row,
    or one for each `block` columns.
    """

    logps: Tensor
    lse: Tensor
    extra: dict[str, Tensor]  # the requested ones of TOKEN_STATS, or "peak", the largest logit
    kept: Tensor | None = None
    block: int = 0

    def __getitem__(self, rows: slice) -> RowStats:
        """Of some of the rows."""
        extra = {name: value[rows] for name, value in self.extra.items()}
        kept = None if self.kept is None else self.kept[rows]
        return RowStats(self.logps[rows], self.lse[rows], extra, kept, self.block)

    @classmethod
    def concatenate(cls, parts: list[RowStats]) -> RowStats:
        """The statistics of consecutive rows as one; what is kept stays with the parts."""
        return cls(
            concatenated([part.logps for part in parts]),
            concatenated([part.lse for part in parts]),
            {name: concatenated([part.extra[name] for part in parts]) for name in parts[0].extra},
        )


def concatenated(parts: list[Tensor]) -> Tensor:
    """Parts as one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class Total:
    """A parameter's gradient, summed over groups.

    `high` is the gradient; where that is too narrow to sum in, `low` is an int8 remainder of each
    number. What has not been `written` is uninitialised: the first to come need not add.
    """

    high: Tensor
    low: Tensor | None = None
    written: bool = False

    def finish(self) -> Total:
        """A gradient to which nothing has been added is 0."""
        if not self.written:
            self.high.zero_()
            if self.low is not None:
                self.low.zero_()
        return self


@dataclass(frozen=True)
class Kept:
    """Where rows of gradient are kept until their coefficients are known."""

    high: Tensor  # (M, H)
    low: Tensor | None  # (n, H) int8 remainder of what bfloat16 is too narrow for
    index: Tensor  # (n,) rows of high


@dataclass
class Grads:
    """Gradients of the parameters and of hidden; None where not wanted."""

    hidden: Tensor | None  # (n, H), rows of this call
    weight: Tensor | None  # (V, H − F)
    bias: Tensor | None  # (V,)
    frozen_scale: Tensor | None = None  # (V,)


class NamedRows(NamedTuple):
    """Values of prompts by name; what has no name is not to be looked at."""

    names: tuple[str | None, ...]
    values: Tensor  # (names, prompts)


@dataclass
class Weighed:
    """What becomes of the token log-probabilities of some prompts, K responses each."""

    logps: Tensor  # (K·prompts,) of the responses, prompt after prompt
    losses: Tensor  # (prompts,)
    coef: Tensor  # (n,) ∂(Σ losses / divisor) / ∂ of each token's log-probability
    metrics: NamedRows | None = None  # 0 where a response is empty
    alignments: Tensor | None = None  # (K·prompts,) where the objective needs them


class Elementwise(Protocol):
    """What surrounds the products: `fastpref.backends.elementwise`, or kernels that do the same."""

    def fitted(
        self,
        x: Tensor,  # (m, H)
        bound: Tensor,  # ()
        index: Tensor | None = None,  # (n,)
        factor: Tensor | None = None,  # (n,)
        factor_bound: Tensor | None = None,  # ()
    ) -> tuple[Tensor, Tensor]: ...

    def accumulate_(
        self,
        high: Tensor,  # (rows, H)
        low: Tensor | None,  # (rows, H)
        product: Tensor,  # (rows, H)
        scale: Tensor,  # ()
        add: bool,
    ) -> None: ...

    def keep_(
        self,
        wide: Tensor,  # (n, H)
        high: Tensor,  # (M, H)
        low: Tensor,  # (n, H)
        index: Tensor,  # (n,)
    ) -> None: ...

    def take_(
        self,
        high: Tensor,  # (M, H)
        low: Tensor | None,  # (n, H)
        index: Tensor,  # (n,)
        coef: Tensor,  # (n,)
        upstream: Tensor,  # ()
    ) -> None: ...

    def scaled(
        self,
        grad: Tensor,
        upstream: Tensor,  # ()
        dtype: torch.dtype,
        low: Tensor | None = None,
    ) -> Tensor: ...


class Backend(Protocol):
    """What every backend has; it may leave the weighing of pairs to autograd (None)."""

    @property
    def elementwise(self) -> Elementwise: ...

    def forward(
        self,
        hidden: Tensor,  # (M, H)
        index: Tensor | None,  # (n,) rows of hidden, None for all
        targets: Tensor,  # (n,)
        head: Head,
        tile: tuple[int, int],  # rows × vocabulary columns held at once
        stats: tuple[str, ...],
    ) -> RowStats:
        """Statistics of every row; no more logits than one tile."""

    def kept_dtype(self, head: Head) -> torch.dtype:
        """Of the buffer of a group."""

    def group_forward(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        buffer: Tensor,  # (n, V), kept_dtype, uninitialised
        stats: tuple[str, ...],
    ) -> RowStats:
        """Statistics of every row; `buffer` keeps what `group_gradients` needs."""

    def group_gradients(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        buffer: Tensor,  # (n, V), consumed
        rows: RowStats,
        coef: Tensor,  # (n,) rows where it is 0 need no gradient
    ) -> tuple[Tensor, Tensor]:
        """`gradient (n, V)` in buffer's memory and `factor (n,)`; `rows` may be of all shards.

        ∂ℓ_t/∂(W h + b) is factor_t · gradient_t: no coefficient in either.
        """

    def put_hidden_gradient(
        self,
        kept: Kept,  # rows of ∂ℓ_t/∂h_t, written
        gradient: Tensor,  # (n, V)
        factor: Tensor,  # (n,)
        head: Head,
    ) -> None:
        """`kept = factor · gradient @ W`, rounded once."""

    def add_weight_gradient(
        self,
        total: Total,  # (V, columns)
        gradient: Tensor,  # (n, V)
        rows: Tensor,  # (n, columns)
        inverse: Tensor | None,  # () of rows, None for 1
    ) -> None:
        """`total (+)= inverse · gradientᵀ @ rows`."""

    def forward_with_gradients(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        buffer: Tensor,  # (n, columns), accumulate_dtype, uninitialised
        stats: tuple[str, ...],
    ) -> tuple[RowStats, Tensor]:
        """Statistics of every row, and ∂ℓ/∂h `(n, H)` in accumulate_dtype.

        Slice after slice of `columns`, as an online softmax whose values are rows of the head. No
        slice is needed twice.
        """

    def recompute_backward(
        self,
        hidden: Tensor,  # (n, H)
        targets: Tensor,  # (n,)
        head: Head,
        lse: Tensor,  # (n,)
        coef: Tensor,  # (n,)
        entropy: tuple[Tensor, Tensor] | None,  # entropies (n,) and their coefficients (n,)
        tile: tuple[int, int],
        wants: tuple[bool, ...],  # hidden, weight, bias, frozen_scale
    ) -> Grads:
        """Gradients from logits computed once more; the head's in the parameters' dtype."""

    @property
    def weigh_pairs(self) -> Callable[..., Weighed] | None:
        """Losses, coefficients and metrics of pairs, as in `fastpref_kernels.weigh_pairs`."""


def choose_backend(name: str, device: torch.device) -> Backend:
    """The module behind a backend's name.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run on this device; never replaced silently.
    """
    from fastpref.backends import torch_backend

    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {list(BACKENDS)}")
    if name == "triton" or (name == "auto" and device.type in ("cuda", "xpu")):
        import fastpref_kernels

        reason = fastpref_kernels.unavailable_reason(device.type)
        if reason is None:
            from fastpref.backends import triton_backend

            return triton_backend
        if name == "triton":
            raise RuntimeError(f"backend='triton': {reason}")
    return torch_backend
