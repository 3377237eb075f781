"""The launchers as torch operators: opaque to torch.compile, with shapes known in advance.

The functions below are what this package offers. Each packs its arguments into what an operator's
schema can hold and calls the operator, which is the launcher of the same name.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import forward, pairs, rows, scale
from .configs import Epilogue, device_of
from .pairs import Formula

# Its own for each copy of this package that a process has loaded.
_NAMESPACE = __package__.replace(".", "_").replace("-", "_")


# --- what holds of every operator ---------------------------------------------------------------


def _operator(
    launch: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    matrices: Sequence[str] = (),
    mutates: str | None = None,
) -> Any:
    """A launcher as an operator: on its tensors' device, each tensor laid out as kernels read it.

    Kernels walk along tensors with a stride of 1. `matrices` may have rows that lie apart; every
    other tensor is dense. What is laid out otherwise is copied, but not what is written to.
    `shapes` gives what the launcher would return, uninitialised.
    """
    parameters = [*inspect.signature(launch).parameters]

    @functools.wraps(launch)
    def on_device(*args: Any) -> Any:
        arguments = dict(zip(parameters, args, strict=True))
        for argument, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[argument] = _laid_out(value, rows_apart=argument in matrices)
                if argument == mutates and arguments[argument] is not value:
                    raise ValueError(
                        f"{argument} is written in place and must be dense, got strides "
                        f"{value.stride()} of shape {tuple(value.shape)}"
                    )
        with device_of(args[0]):
            return launch(**arguments)

    name = f"{_NAMESPACE}::{launch.__name__}"
    operator = custom_op(name, on_device, mutates_args=[mutates] if mutates else [])
    operator.register_fake(shapes)
    return operator


def _laid_out(tensor: Tensor, *, rows_apart: bool) -> Tensor:
    """The tensor itself, or a dense copy."""
    if tensor.is_contiguous() or not (rows_apart and tensor.dim() == 2):
        return tensor.contiguous()
    of_row, of_column = tensor.stride()
    return tensor if of_column == 1 and of_row >= tensor.shape[1] else tensor.contiguous()


# --- projection to log-probability --------------------------------------------------------------


def projection_statistics(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,
    stats: tuple[str, ...] = (),
    index: Tensor | None = None,  # (n,) rows of hidden; None for all
    dtype: torch.dtype | None = None,  # operands are rounded to it; None for hidden's
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probability and log-sum-exp `(n,)` of each row, nats, and the asked-for statistics.

    fp32, or fp64 for fp64 operands. Holds 32 MiB beside its results, besides conversions.
    """
    logps, lse, *extra = projection_op(
        hidden, weight, targets, *_of(epilogue), " ".join(stats), index, dtype or hidden.dtype
    )
    return logps, lse, dict(zip(stats, extra, strict=True))


def _projection_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, *given: Any) -> Any:
    *_, stats, _, dtype = given
    return _like_statistics(targets, forward.wide_dtype(dtype), stats)


projection_op = _operator(
    forward.projection_statistics, _projection_shapes, matrices=("hidden", "weight")
)


# --- rows of materialised products --------------------------------------------------------------


def row_statistics(
    products: Tensor,  # (n, V) W h; fp32 or fp64
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,
    stats: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probability and log-sum-exp `(n,)` of each row, nats, and the asked-for statistics."""
    logps, lse, *extra = row_statistics_op(
        products, targets, *_of(epilogue), " ".join(stats), 0, products.shape[1], None
    )
    return logps, lse, dict(zip(stats, extra, strict=True))


def slice_statistics(
    products: Tensor,  # (n, columns) W h of the vocabulary from `first` on
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,
    stats: tuple[str, ...],
    first: int,
    vocabulary: int,
    state: Tensor,  # (7, n), from `new_state` or the slice before
) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """As `row_statistics` of all columns so far, and the state for the next slice.

    Only the log-sum-exp means something before the last slice.
    """
    logps, lse, *extra, state = row_statistics_op(
        products, targets, *_of(epilogue), " ".join(stats), first, vocabulary, state
    )
    return (logps, lse, dict(zip(stats, extra, strict=True))), state


def _row_statistics_shapes(products: Tensor, targets: Tensor, *given: Any) -> list[Tensor]:
    *_, stats, _, _, state = given
    found = _like_statistics(targets, products.dtype, stats)
    return found if state is None else [*found, torch.empty_like(state)]


row_statistics_op = _operator(rows.row_statistics, _row_statistics_shapes, matrices=("products",))


def row_gradients_(
    products: Tensor,  # (n, columns) W h, consumed
    targets: Tensor,  # (n,) int64
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    epilogue: Epilogue,
    dtype: torch.dtype,
    first: int = 0,
    entropy: tuple[Tensor, Tensor] | None = None,  # entropies (n,) and their coefficients (n,)
    at_target: bool = True,
) -> Tensor:
    """Gradient of Σ coef·ℓ with respect to W h + b: `(n, columns)` of `dtype`, in place.

    `products` are columns `first` and on of the vocabulary. The result lies in their memory; where
    `dtype` is narrower, each row in the front of its old one. Rows of coefficient 0 are not read.
    Without `at_target` a row's target gets 0, for the caller to add what `lse` does not tell yet.
    """
    entropies, entropy_coefs = entropy or (None, None)
    row_gradients_op(
        products,
        targets,
        lse,
        coef,
        *_of(epilogue),
        dtype,
        first,
        entropies,
        entropy_coefs,
        at_target,
    )
    return rows.narrowed(products, dtype)


row_gradients_op = _operator(
    rows.row_gradients_, lambda *args: None, matrices=("products",), mutates="products"
)


# --- pairs --------------------------------------------------------------------------------------


def weigh_pairs(
    logps: Tensor,  # (n,) tokens of the pairs `first:last`
    offsets: Tensor,  # (2B + 1,) int64, of all responses: chosen, rejected, chosen, …
    formula: Formula,
    *,
    first: int,
    last: int,
    divisor: int = 1,
    ref_logps: Tensor | None = None,  # (2, B): chosen and rejected
    scores: Tensor | None = None,  # (2, B)
    token_weights: Tensor | None = None,  # (n,)
    pair_weights: Tensor | None = None,  # (B,) of the losses
    betas: Tensor | None = None,  # (B,) in place of the formula's β
    lengths: Tensor | None = None,  # (2, B) what averages divide by, None for numbers of tokens
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighs the pairs `first:last` by `formula`.

    Returns:
        Sums of the responses `(2·pairs,)` in offsets' order, nats; losses `(pairs,)`; coefficients
        ∂(Σ losses / divisor)/∂logps `(n,)`; and the values `(12, pairs)` of `METRICS`, 0 for pairs
        of which a response is empty, the rows that the formula has nothing for unwritten.
    """
    return weigh_pairs_op(
        logps,
        offsets,
        ref_logps,
        scores,
        token_weights,
        pair_weights,
        betas,
        lengths,
        pairs.numbers_of(formula),
        [int(flag) for flag in pairs.flags_of(formula).values()],
        first,
        last,
        divisor,
    )


def _weigh_pairs_shapes(logps: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *_, first, last, _ = given
    sizes = (2 * (last - first), last - first, logps.shape, (len(pairs.METRICS), last - first))
    return tuple(logps.new_empty(size) for size in sizes)


weigh_pairs_op = _operator(pairs.weigh_pairs, _weigh_pairs_shapes)


# --- scaling ------------------------------------------------------------------------------------


def scaled(
    grad: Tensor,  # dense, fp32 or fp64, consumed
    upstream: Tensor,  # ()
    dtype: torch.dtype,
) -> Tensor:
    """`grad · upstream` in `dtype`, rounded once: in place if that is grad's, else in one pass."""
    if dtype != grad.dtype:
        return scaled_op(grad, upstream, dtype)
    scale_op(grad, upstream)
    return grad


scale_op = _operator(scale.scale_, lambda *args: None, mutates="grad")
scaled_op = _operator(
    scale.scaled, lambda grad, upstream, dtype: grad.new_empty(grad.shape, dtype=dtype)
)

OPERATORS = (
    projection_op,
    row_statistics_op,
    row_gradients_op,
    weigh_pairs_op,
    scale_op,
    scaled_op,
)


def _of(epilogue: Epilogue) -> tuple[Tensor | None, float, float | None, float]:
    return epilogue.bias, epilogue.logit_scale, epilogue.softcap, epilogue.temperature


def _like_statistics(targets: Tensor, dtype: torch.dtype, stats: str) -> list[Tensor]:
    found = rows.new_statistics(stats, targets, len(targets), dtype)
    return rows.finished(found)
