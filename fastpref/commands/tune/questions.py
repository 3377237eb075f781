"""What may differ between launches, and the work that each difference shows in.

A question is one entry of `fastpref_kernels.configs`: a kernel's variant or an open choice. Its
work runs under each candidate on the same inputs: a large one that is timed, a small one whose
numbers are compared with those of the default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fastpref_kernels as kernels
import torch
from fastpref_kernels import Epilogue, configs
from torch import Tensor

from fastpref import sequence_logps
from fastpref.backends import Head, Kept, triton_backend
from fastpref.backends.gradients import put_hidden_gradient
from fastpref.backends.products import gradient_dtype
from fastpref.commands.verify import LOGIT_DEVIATION, accumulation_error

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# Numbers, and how far a candidate's may be from the default's.
Numbers = dict[str, tuple[Tensor, Tensor | float]]
_HALF = 2.0**-11  # unit roundoff of float16
_OF_24_BITS = 2.0**-17  # of a sum in two halves


@dataclass(frozen=True)
class Sizes:
    """Args: a head and what is multiplied with it.

    hidden_size, vocabulary: H and V.
    dtype: of hidden states and head, bfloat16 or float16.
    device: "cuda", or "cpu" for the interpreter.
    rows: of the timed work; no multiple of a block, since batches are none either.
    checked_rows: of the work that is compared.
    pairs, length: of whole steps.
    """

    hidden_size: int = 4096
    vocabulary: int = 128256
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    rows: int = 4000
    checked_rows: int = 150
    pairs: int = 8
    length: int = 1024


def sizes_of(hidden_size: int, vocabulary: int, dtype: str) -> Sizes:
    """On a GPU."""
    return Sizes(hidden_size, vocabulary, getattr(torch, dtype))


def dry_sizes(dtype: str) -> Sizes:
    """Of the interpreter."""
    tiny = {"rows": 6, "checked_rows": 5, "pairs": 1, "length": 3}
    return Sizes(32, 83, getattr(torch, dtype), "cpu", **tiny)


# Timed, and compared.
Work = tuple[Callable[[], object], Callable[[], Numbers]]


@dataclass(frozen=True)
class Question:
    """One entry, and what could stand in its place.

    Args:
        key: of `configs.Entries`.
        steps: of each step the candidates, given what is best so far.
        work: makes what runs under them.
        under: entries without which the question would not be asked.
    """

    key: tuple[str, str]
    steps: tuple[Callable[[configs.Entry], list[configs.Entry]], ...]
    work: Callable[[Sizes], Work]
    under: configs.Entries = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(self.key)


def questions(dry: bool = False) -> Iterator[Question]:
    """In order: what comes later is measured under the winners of what came before.

    With `dry` two candidates each, in tiles of the interpreter's size.
    """
    for name, alternatives in (_TINY if dry else _TILES).items():
        kernel, _, variant = name.partition(" ")
        shapes = _replacing(*(_shape(each) for each in alternatives))
        bands = _replacing(*({"band": band} for band in (_BANDS[:1] if dry else _BANDS)))
        # Each band is compiled anew, and what holds of the plain variant holds of the others.
        steps = (shapes, bands) if variant == "plain" else (shapes,)
        work = functools.partial(_WORK_OF_TILES[kernel], variant=variant)
        yield Question((kernel, variant), steps, work)
    work_of_rows: dict[tuple[str, str], Callable[[Sizes], Work]] = {
        ("rows", "plain"): _rows,
        ("rows", "softcap"): functools.partial(_rows, softcap=_SOFTCAP),
        ("operands", "plain"): _operands,
    }
    for key, rows_work in work_of_rows.items():
        blocks = _replacing(*map(_rows_shape, _TINY_ROWS if dry else _ROWS[key[0]]))
        yield Question(key, (blocks,), rows_work)
    library: configs.Entries = {("choices", x): "library" for x in ("forward", "exponentials")}
    yield _choice("columns", _columns, library)
    yield _choice("forward", _forward)
    yield _choice("exponentials", _exponentials)
    yield _choice("weight_gradient", functools.partial(_weight_gradient, variant="plain"))
    yield _choice("hidden_gradient", functools.partial(_hidden_gradient, variant="plain"))


def _choice(
    name: str, work: Callable[[Sizes], Work], under: configs.Entries | None = None
) -> Question:
    values = list(configs.CHOICES[name])
    return Question(("choices", name), (lambda best: list(values),), work, under or {})


# --- candidates ---------------------------------------------------------------------------------

# block_n, block_v, block_h, warps, stages.
_TILES = {
    "projection plain": (
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 256, 32, 8, 4),
        (128, 128, 128, 8, 3),
        (64, 256, 64, 4, 4),
    ),
    "projection rich": (
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (64, 128, 64, 4, 4),
    ),
    "projection softcap": (
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 64, 64, 8, 4),
        (64, 128, 64, 4, 4),
    ),
    "projection rich softcap": ((128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (64, 128, 64, 4, 4)),
    "projection pointers": ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 4)),
    "weight_gradient plain": (
        (64, 128, 256, 8, 3),
        (64, 128, 256, 8, 4),
        (64, 256, 128, 8, 4),
        (64, 128, 128, 8, 4),
        (64, 128, 128, 4, 4),
        (32, 128, 256, 8, 6),
        (128, 128, 128, 8, 3),
    ),
    "weight_gradient pointers": ((64, 128, 128, 8, 3), (32, 128, 128, 8, 4), (64, 64, 128, 8, 4)),
    "hidden_gradient plain": (
        (256, 64, 128, 8, 3),
        (256, 64, 128, 8, 4),
        (128, 64, 256, 8, 4),
        (128, 64, 128, 8, 4),
        (128, 64, 128, 4, 4),
        (256, 32, 128, 8, 6),
        (128, 128, 128, 8, 3),
    ),
    "hidden_gradient small": ((128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4)),
    "hidden_gradient pointers": ((128, 64, 128, 8, 3), (128, 32, 128, 8, 4), (64, 64, 128, 8, 4)),
}
_TINY = dict.fromkeys(
    ("projection plain", "weight_gradient plain", "hidden_gradient plain"), ((32, 32, 16, 1, 1),)
)
_BANDS = (4, 8, 16, 32)
_SOFTCAP = 30.0
# Rows, columns, warps.
_ROWS = {
    "rows": (
        (1, 2048, 4),
        (1, 4096, 4),
        (1, 4096, 8),
        (1, 8192, 4),
        (1, 8192, 8),
        (1, 8192, 16),
        (2, 2048, 8),
        (4, 1024, 8),
    ),
    "operands": ((1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 8), (8, 1024, 8)),
}
_TINY_ROWS = ((8, 128, 1),)


def _shape(numbers: tuple[int, ...]) -> dict[str, int]:
    names = ("block_n", "block_v", "block_h", "num_warps", "num_stages")
    return dict(zip(names, numbers, strict=True))


def _rows_shape(numbers: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("block_n", "block_v", "num_warps"), numbers, strict=True))


def _replacing(*changes: dict[str, int]) -> Callable[[configs.Entry], list[configs.Entry]]:
    """The best so far, changed."""
    return lambda best: [dataclasses.replace(best, **change) for change in changes]  # type: ignore[type-var]


# --- the work -----------------------------------------------------------------------------------


def _normal(sizes: Sizes, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Random fp32 numbers, never zeros, drawn on the device."""
    generator = torch.Generator(sizes.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=sizes.device).mul_(scale)


def _width(size: int, apart: bool) -> int:
    """Of rows that begin at multiples of 16 bytes, as descriptors ask for, or do not."""
    return -(-size // 8) * 8 + apart


def _head_and_rows(sizes: Sizes, rows: int, apart: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `(rows, H)`, head and targets; `apart`: not as descriptors want them."""
    width = _width(sizes.hidden_size, apart)
    scale = LOGIT_DEVIATION / sizes.hidden_size**0.5
    hidden = _normal(sizes, rows, width).to(sizes.dtype)[:, : sizes.hidden_size]
    weight = _normal(sizes, sizes.vocabulary, width, scale=scale, seed=1).to(sizes.dtype)
    return hidden, weight[:, : sizes.hidden_size], _targets(sizes, rows)


def _targets(sizes: Sizes, rows: int) -> Tensor:
    generator = torch.Generator(sizes.device).manual_seed(2)
    size = (rows,)
    return torch.randint(0, sizes.vocabulary, size, generator=generator, device=sizes.device)


def _nats(sizes: Sizes, largest: float) -> float:
    """How far two computations of a log-probability may be apart: each logit cut off both times."""
    return 4 * accumulation_error(sizes.hidden_size, largest) + 2**-20 * (1 + largest)


def _projection(sizes: Sizes, variant: str) -> Work:
    """Statistics alone, exponentials for groups, and anchored ones for a frozen head."""
    stats = STATS if "rich" in variant else ()
    epilogue = Epilogue(softcap=_SOFTCAP if "softcap" in variant else None)
    hidden, weight, targets = _head_and_rows(sizes, sizes.rows, variant == "pointers")
    buffer = hidden.new_empty(sizes.rows, sizes.vocabulary, dtype=torch.float16)

    def launch(n: int) -> tuple[Any, ...]:
        rows, kept, of_rows = hidden[:n], buffer[:n], targets[:n]
        found = kernels.projection_statistics(rows, weight, of_rows, epilogue, stats)
        stored = kernels.projection_exponentials(rows, weight, of_rows, epilogue, kept, stats)
        return found, stored

    def anchored(n: int) -> Tensor:
        rows, of_rows, out = hidden[:n], targets[:n], buffer[:n].view(torch.bfloat16)
        partials = kernels.new_partials(rows, weight, epilogue, stats)
        anchors = (rows.float() * weight[of_rows].float()).sum(1)
        if epilogue.softcap is not None:
            anchors = epilogue.softcap * torch.tanh(anchors / epilogue.softcap)
        kernels.projection_anchored(rows, weight, of_rows, epilogue, anchors, out, partials, 0)
        return out

    def check() -> Numbers:
        n = min(sizes.checked_rows, sizes.rows)
        (logps, lse, extra), (stored_logps, stored_lse, stored, peaks, block) = launch(n)
        largest = lse.abs().max().item()
        nats = _nats(sizes, largest)
        found: Numbers = {
            "log-probabilities": (logps, nats),
            "of stored ones": (stored_logps, nats),
        }
        for name in set(stats) - {"is_top1"}:  # of two logits that round alike either may be first
            spread = nats * (1 + extra[name].abs().max().item())
            found |= {name: (extra[name], spread), f"stored {name}": (stored[name], spread)}
        gradient, coef = buffer[:n].clone(), torch.ones_like(lse)
        given = targets[:n], stored_logps, stored_lse, coef
        kernels.gradients_(gradient, peaks, block, *given)
        size = gradient.float().abs()
        # Exponential and gradient are rounded once each, in both of the two that are compared.
        found["gradients"] = gradient.float(), (4 * _HALF + nats) * size + 2.0**-22
        exponentials = anchored(n).float()
        share = 2 * 2.0**-8 + nats
        smallest = torch.finfo(torch.bfloat16).smallest_normal
        found["anchored"] = exponentials, share * exponentials.abs() + smallest
        return found

    def work() -> None:
        launch(sizes.rows)
        anchored(sizes.rows)

    return work, check


def _weight_gradient(sizes: Sizes, variant: str) -> Work:
    """A group's part of the head's gradient, added to a sum in two halves."""
    apart = variant == "pointers"
    v, h = sizes.vocabulary, sizes.hidden_size
    gradient = _normal(sizes, sizes.rows, _width(v, apart), scale=100.0).half()[:, :v]
    rows = _normal(sizes, sizes.rows, _width(h, apart), seed=1).half()[:, :h]
    high = torch.empty(v, h, dtype=torch.bfloat16, device=sizes.device)
    low = torch.empty(v, h, dtype=torch.int8, device=sizes.device)
    scale = torch.full((), 2.0**-16, device=sizes.device)

    def check() -> Numbers:
        n = min(sizes.checked_rows, sizes.rows)
        part = slice(0, min(v, 1000)), slice(None)
        kernels.add_weight_gradient_(high, low, gradient[:n], rows[:n], scale, add=False)
        kernels.add_weight_gradient_(high, low, gradient[:n], rows[:n], scale, add=True)
        total = high[part].float()
        # The last bit of bf16 may fall either way where the remainder says the rest.
        largest = total.abs().max().item()
        allowed = 2 * accumulation_error(n, largest) + 2 * _OF_24_BITS * largest
        return {"sum": (total + 0, allowed + 2.0**-8 * total.abs())}

    return lambda: kernels.add_weight_gradient_(high, low, gradient, rows, scale, add=True), check


def _hidden_gradient(sizes: Sizes, variant: str) -> Work:
    """A group's gradient of hidden states, put where it is kept; of few rows by small tiles."""
    n = (
        sizes.rows
        if variant != "small"
        else max(1, min(sizes.rows, 512 * 2048 // sizes.hidden_size))
    )
    apart = variant == "pointers"
    _, weight, _ = _head_and_rows(sizes, n, apart)
    v = sizes.vocabulary
    gradient = _normal(sizes, n, _width(v, apart), scale=100.0).half()[:, :v]
    factor, index = _normal(sizes, n, seed=1), torch.arange(n, device=sizes.device)
    high = torch.empty(n, sizes.hidden_size, dtype=torch.bfloat16, device=sizes.device)
    low = torch.empty(n, sizes.hidden_size, dtype=torch.int8, device=sizes.device)
    head = _head(sizes, weight)

    def put(rows: int) -> None:
        kept = high[:rows], low[:rows], index[:rows]
        part, of_rows = gradient[:rows], factor[:rows]
        if kernels.choice("hidden_gradient", weight.device) == "tiles":
            kernels.hidden_gradient_(part, weight, head.bound, of_rows, *kept, sizes.dtype)
        else:
            operand = part.to(gradient_dtype(head))
            put_hidden_gradient(kernels, Kept(*kept), operand, of_rows, head)

    def check() -> Numbers:
        rows = min(sizes.checked_rows, n)
        put(rows)
        found = high[:rows].float()
        # Sums over the vocabulary, in another order; the last bit of bf16 may fall either way.
        largest = found.abs().max().item()
        allowed = 2 * accumulation_error(v, largest) + 2 * _OF_24_BITS * largest
        return {"rows": (found, allowed + 2.0**-8 * found.abs())}

    return lambda: put(n), check


# By kernel, of any of its variants.
_WORK_OF_TILES = {
    "projection": _projection,
    "weight_gradient": _weight_gradient,
    "hidden_gradient": _hidden_gradient,
}


def _rows(sizes: Sizes, softcap: float | None = None) -> Work:
    """Statistics of products, and gradients in the place of products and of exponentials."""
    shape = sizes.rows // 2, sizes.vocabulary
    products, other = (_normal(sizes, *shape, scale=LOGIT_DEVIATION, seed=s) for s in (0, 1))
    exponentials = _normal(sizes, *shape, scale=1e4, seed=3).abs_().half()
    targets, epilogue, peak_block = _targets(sizes, shape[0]), Epilogue(softcap=softcap), 256
    blocks = -(-sizes.vocabulary // peak_block)
    peaks, lse = products.new_zeros(shape[0], blocks), products.new_zeros(shape[0])
    coef, logps = torch.ones_like(lse), torch.full_like(lse, -1.0)
    slopes = None if softcap is None else torch.ones_like(lse)

    def work() -> None:
        kernels.row_statistics(products, targets, epilogue)
        # In place: the next time other numbers are read. Of peaks as large as the log-sum-exp
        # exponentials only change their signs.
        kernels.row_gradients_(other, targets, lse, coef, epilogue, torch.float16)
        kernels.gradients_(exponentials, peaks, peak_block, targets, logps, lse, coef, slopes)

    def check() -> Numbers:
        n = min(sizes.checked_rows, shape[0])
        part = slice(0, n)
        found_logps, found_lse, _ = kernels.row_statistics(products[part], targets[part], epilogue)
        fresh = products[part].clone(), targets[part], found_lse, coef[part], epilogue
        of_products = kernels.row_gradients_(*fresh, torch.float16).float()
        kept = _normal(sizes, n, shape[1], scale=1e4, seed=3).abs_().half()
        of_kept = None if slopes is None else slopes[part]
        given = targets[part], logps[part], lse[part] + 1, coef[part], of_kept
        kernels.gradients_(kept, peaks[part], peak_block, *given)
        nats = 2**-20 * (1 + found_lse.abs().max().item())
        return {
            "log-probabilities": (found_logps, nats),
            "gradients of products": (of_products, (2 * _HALF + nats) * of_products.abs() + 2**-24),
            "gradients of exponentials": (kept.float(), 2 * _HALF * kept.float().abs() + 2**-24),
        }

    return work, check


def _operands(sizes: Sizes) -> Work:
    """Rows and head as operands, rows of gradient kept and taken."""
    n, h = 2 * sizes.rows, sizes.hidden_size
    hidden = _normal(sizes, n, h).to(torch.bfloat16)
    factor, index = _normal(sizes, n, seed=1), torch.arange(n, device=sizes.device).flip(0)
    wide, high = _normal(sizes, n, h, seed=2), torch.empty_like(hidden)
    low = torch.empty(n, h, dtype=torch.int8, device=sizes.device)
    bounds, one = (hidden.abs().max(), factor.abs().max()), torch.ones((), device=sizes.device)

    def work() -> tuple[Tensor, Tensor]:
        fitted = kernels.fitted(hidden, bounds[0], index, factor, bounds[1])
        kernels.keep_(wide, high, low, index)
        kernels.take_(high, low, index, factor, one)
        return fitted

    def check() -> Numbers:
        fitted, inverse = work()
        # No sum, so that no order of one matters: bit for bit.
        return {
            "fitted": (fitted.float(), 0.0),
            "power": (inverse, 0.0),
            "taken": (high.float(), 0.0),
        }

    return work, check


def _head(sizes: Sizes, weight: Tensor, softcap: float | None = None) -> Head:
    return Head(weight, None, 1.0, softcap, 1.0, sizes.dtype)


def _forward(sizes: Sizes) -> Work:
    """Log-probabilities of sequences, as references and evaluation take them."""
    hidden, weight, targets = _head_and_rows(sizes, sizes.rows)

    def logps(n: int) -> Tensor:
        with torch.no_grad():
            of_rows = hidden[:n, None], weight, targets[:n, None]
            return sequence_logps(*of_rows, backend="triton")[0]

    def check() -> Numbers:
        found = logps(min(sizes.checked_rows, sizes.rows))
        return {"log-probabilities": (found, _nats(sizes, found.abs().max().item() + 60.0))}

    return lambda: logps(sizes.rows), check


def _exponentials(sizes: Sizes, softcap: float | None = None) -> Work:
    """A pair group's forward, which keeps what its gradient is made of."""
    hidden, weight, targets = _head_and_rows(sizes, sizes.rows)
    head = _head(sizes, weight, softcap)
    kept = triton_backend.kept_dtype(head)
    buffer = hidden.new_empty(sizes.rows, sizes.vocabulary, dtype=kept)

    def check() -> Numbers:
        n = min(sizes.checked_rows, sizes.rows)
        found = triton_backend.group_forward(hidden[:n], targets[:n], head, buffer[:n], ())
        coef = torch.ones_like(found.lse)
        gradient, _ = triton_backend.group_gradients(
            hidden[:n], targets[:n], head, buffer[:n], found, coef
        )
        nats = _nats(sizes, found.lse.abs().max().item())
        allowed = (4 * _HALF + nats) * gradient.float().abs() + 2.0**-22
        return {"log-probabilities": (found.logps, nats), "gradients": (gradient.float(), allowed)}

    return lambda: triton_backend.group_forward(hidden, targets, head, buffer, ()), check


def _columns(sizes: Sizes) -> Work:
    """All that library products may be taken for."""
    works = [_forward(sizes), _exponentials(sizes), _exponentials(sizes, _SOFTCAP)]

    def check() -> Numbers:
        return {f"{i}: {name}": x for i, (_, of) in enumerate(works) for name, x in of().items()}

    return lambda: [run() for run, _ in works], check
