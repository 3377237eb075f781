"""What the tiles of a row leave, and how they become its statistics.

Tiles are the projection's or those of the row kernel. For each of its rows a tile leaves its
maximum and its sum of exponentials (and on request three more sums and the place of the maximum);
the one tile that holds a row's target also leaves the target's logit. A small kernel merges them.
Each value has one writer, so there are no locks, no atomics, and two runs agree bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import online_argmax_update, online_softmax_update, store_statistics

MERGE_N, MERGE_T = 32, 32  # rows × tiles that the merge holds


@dataclass(frozen=True)
class Partials:
    """Values of a row's tiles, 8 bytes a row and tile where there is only the log-sum-exp."""

    values: Tensor  # (values, tiles, n): peak, total, sum_z, sum_ez, sum_ee; not all of them
    best: Tensor | None  # (tiles, n) int32, column of the peak
    target_z: Tensor  # (n,)
    stats: str  # names with spaces between: what else than the log-sum-exp is held
    block: int  # columns of a tile
    vocabulary: int
    columns: int  # of a slice of the vocabulary: no tile reaches across its multiples

    @property
    def peaks(self) -> Tensor:
        """`(n, tiles)`: the largest logit of each row in each tile, nats."""
        return self.values[0].T

    def tile(self, first: int) -> int:
        """The tile that begins with column `first` of the vocabulary."""
        if first % self.columns:
            raise ValueError(f"first must be a multiple of {self.columns}, got {first}")
        return first // self.columns * triton.cdiv(self.columns, self.block)


def new_partials(
    like: Tensor,  # of the device
    rows: int,
    vocabulary: int,
    stats: str,  # names with spaces between
    dtype: torch.dtype,
    block: int,
    columns: int | None = None,
) -> Partials:
    """Uninitialised, for tiles of `block` columns in slices of `columns` of the vocabulary."""
    columns = vocabulary if columns is None else columns
    slices, rest = divmod(vocabulary, columns)
    tiles = slices * triton.cdiv(columns, block) + triton.cdiv(rest, block)
    names = {*stats.split()}
    values = 5 if {"entropy", "log_sum_sq_probs"} & names else 2 + ("mean_logits" in names)
    best = like.new_empty((tiles, rows), dtype=torch.int32) if "is_top1" in names else None
    return Partials(
        like.new_empty((values, tiles, rows), dtype=dtype),
        best,
        like.new_empty(rows, dtype=dtype),
        stats,
        block,
        vocabulary,
        columns,
    )


@triton.jit(
    do_not_specialize=["rows", "tiles", "partial_stride"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "target_z_ptr",
        "logps_ptr",
        "lse_ptr",
        "entropy_ptr",
        "mean_logits_ptr",
        "is_top1_ptr",
        "log_sum_sq_ptr",
        "peak_ptr",
    ],
)
def merge_kernel(
    partials_ptr,  # (values, tiles, rows)
    best_ptr,  # (tiles, rows)
    targets_ptr,  # (rows,)
    target_z_ptr,  # (rows,)
    logps_ptr,  # (rows,) out, as the six below, of which the last five may be None
    lse_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_ptr,
    peak_ptr,
    rows,
    tiles,
    partial_stride,
    vocabulary,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    target = tl.load(targets_ptr + row, is_row, other=0)
    target_z = tl.load(target_z_ptr + row, is_row, other=0.0)
    zero = tl.zeros((BLOCK_N,), partials_ptr.dtype.element_ty)
    peak, total, sum_ez, sum_ee = zero + float("-inf"), zero, zero, zero
    sum_z, best = zero, tl.full((BLOCK_N,), -1, tl.int32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        there = partials_ptr + tile.to(tl.int64)[None, :] * rows + row[:, None]  # (n, tiles)
        within = is_row[:, None] & (tile < tiles)[None, :]
        tile_peak = tl.load(there, within, other=float("-inf"))
        if is_top1_ptr is not None:
            which = online_argmax_update(zero.to(tl.int32) - 1, peak, tile_peak, start)
            place = best_ptr + which.to(tl.int64) * rows + row
            best = tl.where(which < 0, best, tl.load(place, is_row & (which >= 0), other=-1))
        if mean_logits_ptr is not None:
            sum_z += tl.sum(tl.load(there + 2 * partial_stride, within, other=0.0), 1)
        tile_total = tl.load(there + partial_stride, within, other=0.0)
        tile_ez, tile_ee = None, None
        if entropy_ptr is not None:
            tile_ez = tl.load(there + 3 * partial_stride, within, other=0.0)
        if log_sum_sq_ptr is not None:
            tile_ee = tl.load(there + 4 * partial_stride, within, other=0.0)
        peak, total, sum_ez, sum_ee = online_softmax_update(
            peak, total, sum_ez, sum_ee, tile_peak, tile_total, tile_ez, tile_ee,
            entropy_ptr is not None, log_sum_sq_ptr is not None,
        )  # fmt: skip
    store_statistics(
        (
            logps_ptr, lse_ptr, entropy_ptr, mean_logits_ptr, is_top1_ptr, log_sum_sq_ptr,
            peak_ptr,
        ),
        row, is_row, (peak, total, sum_ez, sum_ee), sum_z / vocabulary, best == target, target_z,
    )  # fmt: skip


def merge_statistics(
    values: Tensor,  # (values, tiles, n)
    best: Tensor | None,  # (tiles, n)
    target_z: Tensor,  # (n,)
    targets: Tensor,  # (n,) int64
    stats: str,  # names with spaces between
    vocabulary: int,
) -> list[Tensor]:
    """Log-probabilities, log-sum-exps and further statistics of all rows."""
    found = new_statistics(stats, values, len(targets), values.dtype)
    merge_into(found, values, best, target_z, targets, vocabulary)
    return finished(found)


def merge_into(
    found: Mapping[str, Tensor],  # (n,) out
    values: Tensor,
    best: Tensor | None,
    target_z: Tensor,
    targets: Tensor,
    vocabulary: int,
) -> None:
    """The same in outputs that are there."""
    _, tiles, rows = values.shape
    if rows:
        merge_kernel[(triton.cdiv(rows, MERGE_N),)](
            values,
            best,
            targets,
            target_z,
            *(found.get(name) for name in STATISTICS),
            rows,
            tiles,
            tiles * rows,
            vocabulary,
            BLOCK_N=MERGE_N,
            BLOCK_T=MERGE_T,
            num_warps=4,
            num_stages=1,
        )


# In the merge's order; the first two are always there.
STATISTICS = (
    "logps",
    "lse",
    "entropy",
    "mean_logits",
    "is_top1",
    "log_sum_sq_probs",
    "peak",  # the largest logit
)


def new_statistics(stats: str, like: Tensor, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised outputs `(rows,)` by name, on the device of `like`."""
    names = *STATISTICS[:2], *stats.split()
    dtypes = {"is_top1": torch.int8}
    return {name: like.new_empty(rows, dtype=dtypes.get(name, dtype)) for name in names}


def finished(found: Mapping[str, Tensor]) -> list[Tensor]:
    """What was asked for, in the caller's order."""
    return [x.view(torch.bool) if name == "is_top1" else x for name, x in found.items()]
