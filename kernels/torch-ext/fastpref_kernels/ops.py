"""The launchers as torch operators: opaque to torch.compile, with shapes known in advance.

The functions below are what this package offers. Each packs its arguments into what an operator's
schema can hold and calls the operator, whose implementation is the launcher of the same name.
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


def _operator(name: str, *, matrices: Sequence[str] = (), mutates: str | None = None) -> Any:
    """A launcher as an operator: on its tensors' device, each tensor laid out as kernels read it.

    Kernels walk along tensors with a stride of 1. `matrices` may have rows that lie apart; every
    other tensor is dense. What is laid out otherwise is copied, but not what is written to.
    """

    def decorate(launch: Callable[..., Any]) -> Any:
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

        return custom_op(f"{_NAMESPACE}::{name}", on_device, mutates_args=[mutates] * bool(mutates))

    return decorate


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


@_operator("projection", matrices=("hidden", "weight"))
def projection_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
    index: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    found = forward.projection_statistics(
        hidden, weight, targets, epilogue, stats.split(), index, dtype
    )
    return _flat(found)


@projection_op.register_fake
def _(hidden, weight, targets, bias, logit_scale, softcap, temperature, stats, index, dtype):
    return _like_statistics(targets, forward.wide_dtype(dtype), stats.split())


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


@_operator("row_statistics", matrices=("products",))
def row_statistics_op(
    products: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,  # names with spaces between
    first: int,
    vocabulary: int,
    state: Tensor | None,
) -> list[Tensor]:
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    state = [] if state is None else [state.clone()]
    found = rows.row_statistics(
        products, targets, epilogue, stats.split(), first, vocabulary, *state
    )
    return _flat(found) + state


@row_statistics_op.register_fake
def _(products, targets, bias, logit_scale, softcap, temperature, stats, first, vocabulary, state):
    found = _like_statistics(targets, products.dtype, stats.split())
    return found if state is None else [*found, torch.empty_like(state)]


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


@_operator("row_gradients_", matrices=("products",), mutates="products")
def row_gradients_op(
    products: Tensor,
    targets: Tensor,
    lse: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    first: int,
    entropies: Tensor | None,
    entropy_coefs: Tensor | None,
    at_target: bool,
) -> None:
    epilogue = Epilogue(bias, logit_scale, softcap, temperature)
    entropy = None if entropies is None else (entropies, entropy_coefs)
    rows.row_gradients_(products, targets, lse, coef, epilogue, dtype, first, entropy, at_target)


@row_gradients_op.register_fake
def _(products, *args):
    return None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighs the pairs `first:last` by `formula`.

    Returns:
        Sums of the responses `(2·pairs,)` in offsets' order, nats; losses `(pairs,)`; coefficients
        ∂(Σ losses / divisor)/∂logps `(n,)`; and the values `(12, pairs)` of `METRICS`, 0 for pairs
        of which a response is empty, the rows that the formula has nothing for unwritten.
    """
    return tuple(
        weigh_pairs_op(
            logps,
            offsets,
            ref_logps,
            scores,
            token_weights,
            list(pairs.numbers_of(formula)),
            [int(flag) for flag in pairs.flags_of(formula).values()],
            first,
            last,
            divisor,
        )
    )


@_operator("weigh_pairs")
def weigh_pairs_op(
    logps: Tensor,
    offsets: Tensor,
    ref_logps: Tensor | None,
    scores: Tensor | None,
    token_weights: Tensor | None,
    numbers: list[float],
    flags: list[int],
    first: int,
    last: int,
    divisor: int,
) -> list[Tensor]:
    found = pairs.weigh_pairs(
        logps, offsets, ref_logps, scores, token_weights, numbers, flags, first, last, divisor
    )
    return list(found)


@weigh_pairs_op.register_fake
def _(logps, offsets, ref_logps, scores, token_weights, numbers, flags, first, last, divisor):
    sizes = (2 * (last - first), last - first, logps.shape, (len(pairs.METRICS), last - first))
    return [logps.new_empty(size) for size in sizes]


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


@_operator("scale_", mutates="grad")
def scale_op(grad: Tensor, upstream: Tensor) -> None:
    scale.scale_into(grad, grad, upstream)


@scale_op.register_fake
def _(grad, upstream):
    return None


@_operator("scaled")
def scaled_op(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(grad, dtype=dtype)
    scale.scale_into(out, grad, upstream)
    return out


@scaled_op.register_fake
def _(grad, upstream, dtype):
    return torch.empty(grad.shape, dtype=dtype, device=grad.device)


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


def _flat(found: tuple[Tensor, Tensor, dict[str, Tensor]]) -> list[Tensor]:
    logps, lse, extra = found
    return [logps, lse, *extra.values()]


def _like_statistics(targets: Tensor, dtype: torch.dtype, stats: list[str]) -> list[Tensor]:
    dtypes = [dtype, dtype, *(torch.bool if name == "is_top1" else dtype for name in stats)]
    return [targets.new_empty(targets.shape, dtype=dtype) for dtype in dtypes]
