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

from . import (
    forward,
    gradients,
    hidden_gradient,
    operands,
    pairs,
    partials,
    rows,
    scale,
    weight_gradient,
)
from .configs import Epilogue, device_of, rows_config
from .pairs import Formula
from .partials import Partials

# Its own for each copy of this package that a process has loaded.
_NAMESPACE = __package__.replace(".", "_").replace("-", "_")


# --- what holds of every operator ---------------------------------------------------------------


def _operator(
    launch: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    matrices: Sequence[str] = (),
    strided: Sequence[str] = (),
    mutates: Sequence[str] = (),
) -> Any:
    """A launcher as an operator: on its tensors' device, each tensor laid out as kernels read it.

    Kernels walk along tensors with a stride of 1. `matrices` may have rows that lie apart; every
    other tensor is dense, but for the `strided`, which are taken as they are. What is laid out
    otherwise is copied, but not what is written to: `mutates`, names with spaces between.
    `shapes` gives what the launcher would return, uninitialised.
    """
    parameters = [*inspect.signature(launch).parameters]

    @functools.wraps(launch)
    def on_device(*args: Any) -> Any:
        arguments = dict(zip(parameters, args, strict=True))
        for argument, value in arguments.items():
            if isinstance(value, Tensor) and argument not in strided:
                arguments[argument] = _laid_out(value, rows_apart=argument in matrices)
                if argument in mutates and arguments[argument] is not value:
                    raise ValueError(
                        f"{argument} is written in place and must be dense, got strides "
                        f"{value.stride()} of shape {tuple(value.shape)}"
                    )
        with device_of(args[0]):
            return launch(**arguments)

    name = f"{_NAMESPACE}::{launch.__name__}"
    operator = custom_op(name, on_device, mutates_args=mutates)
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

    fp32, or fp64 for fp64 operands. Holds 32 MiB beside its results; where the weight is converted,
    128 MiB and 64 MiB of the weight.
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


# --- exponentials, and statistics slice after slice of the vocabulary ---------------------------


def new_partials(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    epilogue: Epilogue,
    stats: tuple[str, ...] = (),
    columns: int | None = None,  # of each slice but the last; None for all
    dtype: torch.dtype | None = None,  # of the operands; None for hidden's
    by: str = "tiles",  # or "library": `slice_statistics` of products instead
) -> Partials:
    """For the values of all slices, uninitialised: each slice fills its own, in any order.

    Raises:
        ValueError: slices without a column; an unknown `by`.
    """
    dtype, vocabulary, names = dtype or hidden.dtype, len(weight), " ".join(stats)
    if columns is not None and columns < 1:
        raise ValueError(f"slices have at least one column, got {columns}")
    if by == "tiles":
        block = forward.configuration(hidden, weight, dtype, epilogue.softcap, names).block_v
    elif by == "library":
        block = rows_config(hidden.device, softcap=epilogue.softcap is not None).block_v
    else:
        raise ValueError(f"by must be 'tiles' or 'library', got {by!r}")
    wide = forward.wide_dtype(dtype)
    return partials.new_partials(hidden, len(hidden), vocabulary, names, wide, block, columns)


def projection_exponentials(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,
    out: Tensor,  # (n, V) out, of any floating dtype; rows may lie apart
    stats: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,  # operands are rounded to it; None for hidden's
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor, int]:
    """As `projection_statistics`, and of each logit its exponential in `out`.

    Returns:
        Log-probabilities, log-sum-exps `(n,)` and statistics; the peaks `(n, ceil(V / block))`, the
        largest logit of each row in each `block` columns, nats, −inf where a bias masks them all;
        and `block`. `out[t, j]` is SCALE·e^(z_tj − peaks[t, j // block])·s_tj, where s is 1, or
        1 − tanh² under a softcap. The sums that the statistics are made of have no s.
    """
    partials = new_partials(hidden, weight, epilogue, stats, dtype=dtype)
    arguments = hidden, weight, targets, *_of(epilogue), partials.stats, dtype or hidden.dtype
    projection_exponentials_op(*arguments, None, out, *_filled(partials, 0))
    return *merge_statistics(partials, targets), partials.peaks, partials.block


def projection_anchored(
    hidden: Tensor,  # (n, H), as it is multiplied
    weight: Tensor,  # (columns, H) of the vocabulary from `first` on, of the same dtype
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,  # of these columns
    anchors: Tensor,  # (n,) nats, in the partials' dtype
    out: Tensor,  # (n, columns) out, bf16, fp32 or fp64; rows may lie apart
    partials: Partials,
    first: int,  # a multiple of the partials' columns
) -> None:
    """Exponentials of a slice of the vocabulary relative to anchors, and its partial statistics.

    `out[t, j]` is ANCHORED_SCALE·e^(z_tj − anchors[t])·s_tj, s as in `projection_exponentials`; the
    target's is 0, for the caller to add. Anchors are such that a row's largest logit is at most 148
    nats above: beyond, exponentials are finite, but less than they should be. Below 27 nats under
    the anchor they vanish.

    Raises:
        ValueError: float16, which has no such range; partials of other blocks or of other slices.
    """
    if out.dtype == torch.float16:
        raise ValueError("exponentials relative to an anchor do not fit into float16")
    arguments = hidden, weight, targets, *_of(epilogue), partials.stats, hidden.dtype
    projection_exponentials_op(*arguments, anchors, out, *_filled(partials, first))


_SLICE_WRITES = ("out", "values", "best", "target_z")
projection_exponentials_op = _operator(
    forward.projection_exponentials,
    lambda *args: None,
    matrices=("hidden", "weight", "out"),
    mutates=_SLICE_WRITES,
)


def slice_statistics(
    products: Tensor,  # (n, columns) W h of the vocabulary from `first` on; fp32 or fp64
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,  # of these columns
    partials: Partials,
    first: int,  # a multiple of the partials' columns
    out: Tensor | None = None,  # (n, columns) out; rows may lie apart
) -> None:
    """Partial statistics of library products, and in `out` exponentials relative to their peaks.

    As in `projection_exponentials`: where there are several slices, each must end with a block.

    Raises:
        ValueError: exponentials of slices that end within a block, or partials of other blocks.
    """
    several = partials.columns < partials.vocabulary
    if out is not None and several and partials.columns % partials.block:
        raise ValueError(
            f"slices of {partials.columns} columns do not end with a block of {partials.block}"
        )
    row_exponentials_op(
        products, targets, *_of(epilogue), partials.stats, out, *_filled(partials, first)
    )


row_exponentials_op = _operator(
    rows.row_exponentials,
    lambda *args: None,
    matrices=("products", "out"),
    mutates=_SLICE_WRITES,
)


def merge_statistics(
    partials: Partials,  # of all slices
    targets: Tensor,  # (n,) int64
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probability and log-sum-exp `(n,)` of each row, nats, and the partials' statistics."""
    logps, lse, *extra = merge_op(
        partials.values, partials.best, partials.target_z, targets, partials.stats,
        partials.vocabulary,
    )  # fmt: skip
    return logps, lse, dict(zip(partials.stats.split(), extra, strict=True))


def _merge_shapes(values: Tensor, best: Any, target_z: Any, targets: Tensor, *given: Any) -> Any:
    stats, _ = given
    return _like_statistics(targets, values.dtype, stats)


merge_op = _operator(partials.merge_statistics, _merge_shapes)


def _filled(partials: Partials, first: int) -> tuple[Any, ...]:
    of_slice = partials.block, partials.tile(first), first
    return partials.values, partials.best, partials.target_z, *of_slice


# --- rows of materialised products --------------------------------------------------------------


def row_statistics(
    products: Tensor,  # (n, V) W h; fp32 or fp64
    targets: Tensor,  # (n,) int64
    epilogue: Epilogue,
    stats: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probability and log-sum-exp `(n,)` of each row, nats, and the asked-for statistics."""
    logps, lse, *extra = row_statistics_op(products, targets, *_of(epilogue), " ".join(stats))
    return logps, lse, dict(zip(stats, extra, strict=True))


def _row_statistics_shapes(products: Tensor, targets: Tensor, *given: Any) -> list[Tensor]:
    return _like_statistics(targets, products.dtype, given[-1])


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
) -> Tensor:
    """Gradient of Σ coef·ℓ with respect to W h + b: `(n, columns)` of `dtype`, in place.

    `products` are columns `first` and on of the vocabulary. The result lies in their memory; where
    `dtype` is narrower, each row in the front of its old one. Rows of coefficient 0 are not read.
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
    )
    return rows.narrowed(products, dtype)


row_gradients_op = _operator(
    rows.row_gradients_, lambda *args: None, matrices=("products",), mutates=("products",)
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
    grad: Tensor,  # dense, consumed
    upstream: Tensor,  # ()
    dtype: torch.dtype,
    low: Tensor | None = None,  # dense int8: what bf16 left of grad, see `split`
) -> Tensor:
    """`(grad + low) · upstream` in `dtype`, rounded once.

    In place if that is grad's, and then nothing is read or written when `upstream` is 1; else in
    one pass.
    """
    if dtype != grad.dtype:
        return scaled_op(grad, upstream, dtype, low)
    scale_op(grad, upstream, low)
    return grad


scale_op = _operator(scale.scale_, lambda *args: None, mutates=("grad",))
scaled_op = _operator(
    scale.scaled, lambda grad, upstream, dtype, low: grad.new_empty(grad.shape, dtype=dtype)
)


# --- gradients in place of exponentials ---------------------------------------------------------


def gradients_(
    exponentials: Tensor,  # (n, V) fp16, fp32 or fp64; consumed
    peaks: Tensor,  # (n, ceil(V / block)) fp32, or fp64; of any strides
    block: int,
    targets: Tensor,  # (n,) int64
    logps: Tensor,  # (n,)
    lse: Tensor,  # (n,)
    coef: Tensor,  # (n,)
    slopes: Tensor | None = None,  # (n,) of the softcap at the targets; None for 1
) -> None:
    """`S·(onehot − p)·s` in place of `S·e^(z − peak)·s`, with S of `SCALE`.

    `coef` is not multiplied in: rows of coefficient 0 become 0 and are not read. A block whose peak
    is −inf becomes 0. A target that is none of the columns is none of the row's.

    Raises:
        ValueError: if `block` is no power of two or `peaks` are not one a row and block.
    """
    gradients_op(exponentials, peaks, block, targets, logps, lse, coef, slopes)


gradients_op = _operator(
    gradients.gradients_,
    lambda *args: None,
    matrices=("exponentials",),
    strided=("peaks",),
    mutates=("exponentials",),
)


# --- the head's gradient ------------------------------------------------------------------------


def add_weight_gradient_(
    high: Tensor,  # (V, H) bf16 if there is a low, else bf16, fp16 or fp32
    low: Tensor | None,  # (V, H) int8: what bf16 leaves of a number kept in 24 bits
    gradient: Tensor,  # (n, V) fp16, of rows that may lie apart
    rows: Tensor,  # (n, H) fp16
    scale: Tensor,  # () fp32
    add: bool,
) -> None:
    """`high + low (+)= scale · gradientᵀ @ rows`, rounded once from fp32.

    Without `add` what `high` and `low` hold is not read.

    Raises:
        ValueError: if the halves are not bf16 and int8 of one shape.
    """
    add_weight_gradient_op(high, low, gradient, rows, scale, add)


add_weight_gradient_op = _operator(
    weight_gradient.add_weight_gradient_,
    lambda *args: None,
    matrices=("gradient", "rows"),
    mutates=("high", "low"),
)


def accumulate_(
    high: Tensor,  # (rows, H), as above: a slice of the gradient's rows
    low: Tensor | None,  # (rows, H) int8
    product: Tensor,  # (rows, H) fp32
    scale: Tensor,  # () fp32
    add: bool,
) -> None:
    """`high + low (+)= scale · product`, rounded once from fp32."""
    accumulate_op(high, low, product, scale, add)


accumulate_op = _operator(weight_gradient.accumulate_, lambda *args: None, mutates=("high", "low"))


# --- operands, and gradients of hidden states ---------------------------------------------------


def fitted(
    x: Tensor,  # (m, H) of any float dtype
    bound: Tensor,  # () at least max|x|
    index: Tensor | None = None,  # (n,) int64, rows of x; None for all
    factor: Tensor | None = None,  # (n,)
    factor_bound: Tensor | None = None,  # () at least max|factor|, with a factor
) -> tuple[Tensor, Tensor]:
    """`x[index]·factor·power` `(n, H)` in fp16, rounded once, and `1 / power` `()` in fp32.

    The power of two lifts `bound·factor_bound` into [2^14, 2^15), within 2^±100; 0 counts as 1.
    Numbers beyond twice the bounds become infinite; of bounds that are NaN, infinite or negative
    everything becomes NaN.

    Raises:
        ValueError: if one of `factor` and `factor_bound` is given without the other.
    """
    return fitted_op(x, bound, index, factor, factor_bound)


fitted_op = _operator(operands.fitted, operands.new_fitted, matrices=("x",))


def keep_(
    wide: Tensor,  # (n, H) fp32
    high: Tensor,  # (M, H) bf16, of which rows `index` are written
    low: Tensor,  # (n, H) int8, written
    index: Tensor,  # (n,) int64, no two alike
) -> None:
    """Keeps fp32 in 24 bits: `high[index]` is `wide` rounded to bf16, `low` the next 8 bits."""
    keep_op(wide, high, low, index)


keep_op = _operator(operands.keep_, lambda *args: None, matrices=("high",), mutates=("high", "low"))


def take_(
    high: Tensor,  # (M, H) bf16 if there is a low, else of any float dtype
    low: Tensor | None,  # (n, H) int8, from `keep_`
    index: Tensor,  # (n,) int64, no two alike
    coef: Tensor,  # (n,)
    upstream: Tensor,  # ()
    out: Tensor | None = None,  # (M, H), of which rows `index` are written; None for high
) -> None:
    """`out[index] = (high[index] + low)·coef·upstream`, rounded once.

    With an `out`, `high` stays as it is and can be taken again.
    """
    if out is None:
        take_op(high, low, index, coef, upstream)
    else:
        taken_op(out, high, low, index, coef, upstream)


take_op = _operator(operands.take_, lambda *args: None, matrices=("high",), mutates=("high",))
taken_op = _operator(
    operands.taken_, lambda *args: None, matrices=("out", "high"), mutates=("out",)
)


def hidden_gradient_(
    gradient: Tensor,  # (n, V) fp16, of rows that may lie apart
    weight: Tensor,  # (V, H) bf16, fp16 or fp32
    bound: Tensor | None,  # () at least max|weight|; None for an fp16 weight as it is
    factor: Tensor,  # (n,)
    high: Tensor,  # (M, H) bf16 if there is a low, else bf16, fp16 or fp32
    low: Tensor | None,  # (n, H) int8, written
    index: Tensor,  # (n,) int64, rows of high that are written, no two alike
    dtype: torch.dtype,  # bf16 or fp16, that weight is rounded to first
) -> None:
    """`high[index] (+ low) = factor · gradient @ weight`, in one launch, without a copy of weight.

    The weight becomes fp16 as by `fitted`, by the power of two of its bound, while it is read; a
    bound that is NaN, infinite or negative makes everything NaN. Sums are fp32, and kept as by
    `keep_`, or rounded once to high's dtype without a `low`.

    Raises:
        ValueError: a gradient that is not float16, another `dtype`, bfloat16 without a bound, rows
            that differ in number, or halves that are not bf16 and int8 of one shape.
    """
    hidden_gradient_op(high, low, index, gradient, factor, weight, bound, dtype)


hidden_gradient_op = _operator(
    hidden_gradient.hidden_gradient_,
    lambda *args: None,
    matrices=("high", "gradient", "weight"),
    mutates=("high", "low"),
)

OPERATORS = (
    projection_op,
    projection_exponentials_op,
    row_exponentials_op,
    merge_op,
    row_statistics_op,
    row_gradients_op,
    weigh_pairs_op,
    scale_op,
    scaled_op,
    gradients_op,
    add_weight_gradient_op,
    accumulate_op,
    fitted_op,
    keep_op,
    take_op,
    taken_op,
    hidden_gradient_op,
)


def _of(epilogue: Epilogue) -> tuple[Tensor | None, float, float | None, float]:
    return epilogue.bias, epilogue.logit_scale, epilogue.softcap, epilogue.temperature


def _like_statistics(targets: Tensor, dtype: torch.dtype, stats: str) -> list[Tensor]:
    found = partials.new_statistics(stats, targets, len(targets), dtype)
    return partials.finished(found)
