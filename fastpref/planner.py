"""Which schedule, how large its groups and tiles, what it will use, and why.

Everything here is arithmetic on shapes; no tensor is touched, so the same formulas answer in
advance what a batch would need. U is one matrix product, 2·N·H·V FLOP for N scored rows.

    schedule      products           holds besides inputs and gradients
    forward       1 U                one tile
    frozen_head   2 U                one tile; in half precision N × H of gradient rows
    pair_groups   3 U                one group of whole prompts × vocabulary
    recompute     4 U (3 U frozen)   one tile
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastpref.domains import check_fields, number

SCHEDULES = ("auto", "frozen_head", "pair_groups", "recompute")

MIB = 2**20
# By default: small beside a model's gradients, and as many rows as let products run at full speed.
_CPU_BUDGET = 128 * MIB
_ENOUGH_ROWS = 2048
# Tiles are folded or consumed at once, so they need no more than keeps the products efficient.
_TILE_SHARE = 8
_MOST_TILE_BYTES = 64 * MIB
_TILE_KERNEL_BYTES = 32 * MIB  # of an accelerator's own kernel: values of tiles, rows of a launch
_SCALE_BYTES = 64 * MIB  # of the head's gradient and the head, where its scale's is made of them
_TILE_COLUMNS = 256  # of its tiles
_JOINED_ROWS = 4096  # of a head whose first columns are frozen, on a CPU
_MIN_TILE_COLUMNS = 512
_MAX_TILE_COLUMNS = 8192
# The frozen head's rows carry a sum of H along every slice: few enough for it to stay in the cache,
# many enough to read the head seldom.
_FROZEN_ROWS = 1024
# MKL has its own way with them; byte predictions for a CPU are for the kind that predicts.
_CPU_INFO = Path("/proc/cpuinfo")
_IS_INTEL = not _CPU_INFO.exists() or "GenuineIntel" in _CPU_INFO.read_text()


@dataclass(frozen=True)
class Plan:
    """What the planner decided.

    Args:
        schedule: "forward", "frozen_head", "pair_groups" or "recompute".
        reason: why this schedule, one sentence.
        groups: ranges of prompts whose logits are held together, with "pair_groups".
        group_rows: the most whole rows of logits held at once.
        tile: rows × vocabulary columns of a tile.
        flop: floating-point operations of all matrix products, forward and backward.
        logits_bytes: bytes of logits held at once; never more than the budget.
        extra_bytes: predicted peak of everything allocated besides inputs and parameters:
            gradients, accumulators, logits and saved rows.
        naive_bytes: the same for materialised logits with their gradient.
    """

    schedule: str
    reason: str
    groups: tuple[tuple[int, int], ...]
    group_rows: int
    tile: tuple[int, int]
    flop: int
    logits_bytes: int
    extra_bytes: int
    naive_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.reason}; {self.flop / 1e12:.2f} TFLOP, "
            f"{self.logits_bytes / MIB:,.0f} MiB of logits at a time, "
            f"{self.extra_bytes / MIB:,.0f} MiB in all (naive {self.naive_bytes / MIB:,.0f} MiB)"
        )


@dataclass(frozen=True)
class Problem:
    """The shapes a plan is made for.

    Args:
        counts: scored rows of each sequence; those of a prompt's responses adjoin.
        hidden_size: H.
        vocabulary: V.
        dtype: of hidden, and of the head unless `head_dtype` says otherwise.
        accumulate_dtype: of logits and log-probabilities.
        device: type of the device, such as "cpu" or "cuda".
        total_rows: rows of hidden, scored or not.
        hidden_grad: hidden requires a gradient.
        head_grad: weight or bias requires a gradient.
        head_dtype: of the head, None for hidden's.
        responses: K, sequences of a prompt, 2 for pairs.
        weight_grad_dtype: of the caller's buffer to which the head's gradient is added; None where
            it is a new tensor.
        kept_dtype: of a group's logits while it waits for its coefficients, None for
            `accumulate_dtype`.
        head_columns: of the head's weight that get a gradient, None for all.
        scales: `frozen_scale` requires a gradient.
    """

    counts: tuple[int, ...]
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype
    accumulate_dtype: torch.dtype
    device: str
    total_rows: int
    hidden_grad: bool
    head_grad: bool
    head_dtype: torch.dtype | None = None
    responses: int = 2
    kept_dtype: torch.dtype | None = None
    head_columns: int | None = None
    scales: bool = False
    weight_grad_dtype: torch.dtype | None = None

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def prompt_rows(self) -> list[int]:
        """Scored rows of each prompt, all of its responses."""
        k = self.responses
        return [sum(self.counts[i : i + k]) for i in range(0, len(self.counts), k)]

    @property
    def trained_columns(self) -> int:
        """Of the head, that get a gradient."""
        columns = self.hidden_size if self.head_columns is None else self.head_columns
        return columns * self.head_grad

    @property
    def element_bytes(self) -> int:
        """Of a logit."""
        return self.accumulate_dtype.itemsize

    @property
    def has_tile_kernel(self) -> bool:
        """`forward` runs in a kernel of its own, from which no logit reaches memory."""
        return self.device in ("cuda", "xpu")

    @property
    def row_bytes(self) -> int:
        """Of a row of logits that a group keeps."""
        return self.vocabulary * (self.kept_dtype or self.accumulate_dtype).itemsize

    @property
    def keeps_half(self) -> bool:
        """Groups are exponentials in half precision: products take it, kernels write it."""
        return self.kept_dtype is not None and self.kept_dtype.itemsize == 2


def make_plan(
    problem: Problem,
    *,
    schedule: str = "auto",
    budget: int | None = None,
    spare: Callable[[], int | None] | None = None,
    pairs: bool = False,
    couples_pairs: bool = False,
    learns: bool = False,
    reduces: bool = True,
) -> Plan:
    """Chooses schedule, groups and tile.

    Args:
        problem: the shapes.
        schedule: one of `SCHEDULES`.
        budget: bytes of logits to hold at once; None for `default_budget`.
        spare: bytes of the device's memory that a default budget may take, asked only where pair
            groups are possible, which alone grow with it; None for as much as the batch needs.
        pairs: the rows are responses under an objective (False: token log-probabilities).
        couples_pairs: the objective looks across pairs.
        learns: the objective has parameters of its own.
        reduces: the losses become one number, so that its gradient is known up to a factor.

    Raises:
        ValueError: an unknown schedule, one that cannot give the gradients asked for, or a budget
            that does not hold one row of logits.
    """
    check_schedule(schedule)
    obstacle = _pair_groups_obstacle(pairs, couples_pairs, learns, reduces)
    if budget is not None:
        tile_budget = budget
    else:
        may_take = spare() if spare and _may_group(problem, schedule, obstacle) else None
        budget = default_budget(problem, may_take)
        # Any accelerator has room for whole tiles, whatever the batch needs.
        tile_budget = budget if problem.device == "cpu" else _TILE_SHARE * _MOST_TILE_BYTES
    if budget < problem.row_bytes:
        raise ValueError(
            f"logits_budget={budget} bytes does not hold one row of logits: "
            f"{problem.vocabulary} × {problem.row_bytes // problem.vocabulary} = "
            f"{problem.row_bytes} bytes"
        )
    group_rows = budget // problem.row_bytes
    chosen, reason = _choose(problem, schedule, group_rows, obstacle)
    groups: tuple[tuple[int, int], ...] = ()
    held = 0
    tile = _tile(problem, tile_budget, problem.rows)
    if chosen == "frozen_head":
        tile = _tile(problem, tile_budget, _FROZEN_ROWS)
    elif chosen == "recompute":
        tile = _tile_of_least_traffic(problem, tile[0] * tile[1])
    elif chosen == "pair_groups":
        of_prompts = problem.prompt_rows
        groups = _prompt_ranges(of_prompts, group_rows)
        rows_of = [sum(of_prompts[a:b]) for a, b in groups]
        # A prompt beyond the budget goes through in even pieces.
        held = max(b - a for rows in rows_of for a, b in even_ranges(rows, group_rows))
    logits_bytes = held * problem.row_bytes or tile[0] * tile[1] * problem.element_bytes
    if chosen == "forward" and problem.has_tile_kernel:
        logits_bytes = 0
    return Plan(
        schedule=chosen,
        reason=reason,
        groups=groups,
        group_rows=held,
        tile=tile,
        flop=_flop(problem, chosen, group_rows),
        logits_bytes=logits_bytes,
        extra_bytes=_extra_bytes(problem, chosen, held, tile),
        naive_bytes=naive_bytes(problem),
    )


def default_budget(problem: Problem, spare: int | None = None) -> int:
    """Bytes of logits to hold at once where nobody says.

    128 MiB on a CPU. Elsewhere what the batch needs, all of its rows or those of its largest
    prompt, if that has more than 2,048; at most `spare`, None for no such bound.
    """
    if problem.device == "cpu":
        return _CPU_BUDGET
    rows = min(problem.rows, max(_ENOUGH_ROWS, *problem.prompt_rows))
    needed = max(1, rows) * problem.row_bytes
    return needed if spare is None else min(needed, spare)


def check_schedule(schedule: str) -> None:
    """Raises a ValueError for a name that is none of `SCHEDULES`."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; expected one of {list(SCHEDULES)}")


def _choose(problem: Problem, schedule: str, group_rows: int, obstacle: str) -> tuple[str, str]:
    """The schedule and why; `obstacle` is what stands in the way of pair groups, if anything."""
    if not (problem.hidden_grad or problem.head_grad):
        return "forward", "no gradient is wanted"
    if schedule == "frozen_head" and problem.head_grad:
        raise ValueError(
            "schedule='frozen_head' gives no gradient to the head, but weight or bias requires "
            "one; use 'auto', 'pair_groups' or 'recompute'"
        )
    if schedule == "pair_groups" and obstacle:
        raise ValueError(f"schedule='pair_groups' is not possible: {obstacle}; use 'recompute'")
    if schedule != "auto":
        return schedule, "asked for"
    if not problem.head_grad:
        return "frozen_head", "the head is frozen"
    if obstacle:
        return "recompute", obstacle
    if min(problem.prompt_rows) > group_rows:
        return "recompute", f"no pair fits the budget of {group_rows} rows of logits"
    return "pair_groups", "the head trains and pairs are independent"


def _may_group(problem: Problem, schedule: str, obstacle: str) -> bool:
    """The budget decides something: "auto" takes pair groups if they fit, or they are asked for."""
    if schedule == "pair_groups":
        return not obstacle and (problem.hidden_grad or problem.head_grad)
    return schedule == "auto" and not obstacle and problem.head_grad


def _pair_groups_obstacle(pairs: bool, couples_pairs: bool, learns: bool, reduces: bool) -> str:
    if not pairs:
        return "token log-probabilities take any upstream gradient"
    if couples_pairs:
        return "the objective couples pairs"
    if learns:
        return "the objective has parameters of its own"
    if not reduces:
        return "reduction='none' takes any upstream gradient"
    return ""


def even_ranges(rows: int, most: int) -> tuple[tuple[int, int], ...]:
    """0..rows in as few ranges of at most `most` as can be, equal but for the last."""
    if not rows:
        return ((0, 0),)
    size = -(-rows // -(-rows // most))
    return tuple((i, min(i + size, rows)) for i in range(0, rows, size))


def _prompt_ranges(of_prompts: list[int], most: int) -> tuple[tuple[int, int], ...]:
    """Consecutive prompts whose rows fit together; one that does not fit stands alone."""
    ranges, first, held = [], 0, 0
    for prompt, rows in enumerate(of_prompts):
        if held and held + rows > most:
            ranges.append((first, prompt))
            first, held = prompt, 0
        held += rows
    ranges.append((first, len(of_prompts)))
    return tuple(ranges)


def _tile(problem: Problem, budget: int, most_rows: int) -> tuple[int, int]:
    """Many rows × some columns: each slice of the weight is read once for as many rows as fit."""
    most_bytes = max(min(budget // _TILE_SHARE, _MOST_TILE_BYTES), problem.row_bytes)
    elements = most_bytes // problem.element_bytes
    columns = min(_MIN_TILE_COLUMNS, problem.vocabulary)
    rows = max(1, min(problem.rows, most_rows, elements // columns))
    return rows, min(problem.vocabulary, elements // rows, _MAX_TILE_COLUMNS)


def _tile_of_least_traffic(problem: Problem, elements: int) -> tuple[int, int]:
    """Rows × columns of so many elements for which recompute moves the fewest bytes.

    A row passes once for each slice of the head, and a slice once for each block of rows: their
    operands are read, their sums read and written. `a·rows·V/columns + b·columns·N/rows`, H times,
    is least where rows / columns = b·N·V / (a·N·V).
    """
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    of_head = (problem.head_dtype or problem.dtype).itemsize
    of_row = 2 * narrow + 2 * wide * problem.hidden_grad
    of_column = 2 * of_head + 2 * wide * problem.head_grad
    rows = max(1, min(problem.rows, round((elements * of_column / of_row) ** 0.5)))
    columns = max(1, min(problem.vocabulary, elements // rows))
    return max(1, min(problem.rows, elements // columns)), columns


def _flop(problem: Problem, schedule: str, group_rows: int) -> int:
    product = 2 * problem.rows * problem.hidden_size * problem.vocabulary
    columns = problem.trained_columns + problem.hidden_size * problem.scales
    of_head = 2 * problem.rows * columns * problem.vocabulary
    if schedule == "forward":
        return product
    if schedule == "recompute":
        return product * (2 + problem.hidden_grad) + of_head
    again = 0
    if schedule == "pair_groups":  # prompts beyond the budget are projected twice
        again = sum(rows for rows in problem.prompt_rows if rows > group_rows)
    return (
        product * (1 + problem.hidden_grad)
        + of_head
        + 2 * again * problem.hidden_size * problem.vocabulary
    )


def _extra_bytes(problem: Problem, schedule: str, held: int, tile: tuple[int, int]) -> int:
    return _bytes_of(problem, schedule, held, tile) + _joined_bytes(problem)


def _joined_bytes(problem: Problem) -> int:
    """Of frozen and trained columns put together: all rows for kernels, else some at a time.

    The gradient of a scale comes from slices of the head's.
    """
    if problem.head_columns is None:
        return 0
    scale = _SCALE_BYTES * problem.scales
    if problem.device != "cpu":
        return scale + problem.vocabulary * problem.hidden_size * problem.dtype.itemsize
    rows = min(problem.vocabulary, _JOINED_ROWS)
    return scale + rows * problem.hidden_size * problem.element_bytes


def _bytes_of(problem: Problem, schedule: str, held: int, tile: tuple[int, int]) -> int:
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    tile_bytes = tile[0] * tile[1] * wide + workspace_bytes(problem, *tile)
    if problem.device == "cpu":  # whose products convert a slice of the head
        tile_bytes += tile[1] * problem.hidden_size * wide * (wide != narrow)
    if schedule == "forward":
        if problem.has_tile_kernel:
            return _TILE_KERNEL_BYTES
        return tile_bytes + problem.rows * problem.hidden_size * narrow
    if schedule == "recompute":
        return _recompute_bytes(problem, tile, tile_bytes)
    if schedule == "frozen_head":
        return _frozen_bytes(problem, tile, tile_bytes)
    return _group_bytes(problem, held)


def _recompute_bytes(problem: Problem, tile: tuple[int, int], tile_bytes: int) -> int:
    """Rows and their wide gradient, which becomes narrower where it lies; slices of the head.

    Where every position is scored, the rows are hidden itself.
    """
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    rows, gathers = problem.rows * problem.hidden_size, problem.rows != problem.total_rows
    is_cpu, converts = problem.device == "cpu", wide != narrow
    running = tile_bytes + rows * (narrow * gathers + wide * converts * is_cpu)
    sums = converts or problem.weight_grad_dtype is not None  # of a slice, beside where it goes
    running += tile[1] * problem.trained_columns * wide * sums
    running += tile[1] * problem.hidden_size * wide * problem.scales
    if problem.keeps_half:  # operands of the gradients' products
        fitted = tile[1] * problem.hidden_grad + tile[0] * problem.head_grad
        running += fitted * problem.hidden_size * narrow
    laid_out = problem.total_rows * problem.hidden_size * narrow * problem.hidden_grad * gathers
    return max(running, laid_out) + rows * wide * problem.hidden_grad + _head_bytes(problem)


def _frozen_bytes(problem: Problem, tile: tuple[int, int], tile_bytes: int) -> int:
    """Kept rows, and the gradient of a tile's beside them."""
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    of_tile = tile[0] * problem.hidden_size * (wide + narrow + wide * (wide != narrow))
    kept, laid_out = _kept_bytes(problem)
    return max(tile_bytes + of_tile + _partial_bytes(problem, tile[0]), laid_out) + kept


def _group_bytes(problem: Problem, held: int) -> int:
    """A group, kept rows, and the head's gradient: summed over groups, or written in the end."""
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    # Operands; beside them what tiles leave, then the same operands once more, fitted; or, where no
    # kernel keeps it as it comes, the gradient of the group's rows.
    of_rows = held * problem.hidden_size * (narrow if problem.keeps_half else wide)
    of_rows = held * problem.hidden_size * narrow + max(of_rows, _partial_bytes(problem, held))
    group = held * problem.row_bytes + workspace_bytes(problem, held, problem.vocabulary) + of_rows
    kept, laid_out = _kept_bytes(problem)
    head = problem.vocabulary * problem.trained_columns
    if problem.weight_grad_dtype is not None:
        splits = held != problem.rows and problem.weight_grad_dtype == torch.bfloat16
        return max(group, laid_out) + kept + head * splits
    if held == problem.rows:
        return max(group + _head_bytes(problem), laid_out) + kept
    if problem.keeps_half and (problem.head_dtype or problem.dtype) == torch.bfloat16:
        return max(group, laid_out) + kept + _head_bytes(problem) + head
    converted = _head_bytes(problem) * (_head_bytes(problem) != head * wide)
    return max(group, laid_out, converted) + kept + head * wide


def _partial_bytes(problem: Problem, rows: int) -> int:
    """Of what the kernels' tiles leave of so many rows: a peak and a sum of each."""
    return rows * -(-problem.vocabulary // _TILE_COLUMNS) * 8 * problem.keeps_half


def _kept_bytes(problem: Problem) -> tuple[int, int]:
    """Of kept rows of gradient, and of what is added when they are laid out at last."""
    wide, narrow = problem.element_bytes, problem.dtype.itemsize
    rows = problem.rows * problem.hidden_size * problem.hidden_grad
    whole = problem.total_rows * problem.hidden_size * problem.hidden_grad
    if wide == narrow:
        return whole * wide, 0
    if problem.dtype == torch.bfloat16:  # with an int8 remainder of each number
        return whole * narrow + rows, 0
    return rows * wide, whole * narrow


def _head_bytes(problem: Problem) -> int:
    """Of the head's gradient, where it is not the caller's."""
    if problem.weight_grad_dtype is not None:
        return 0
    of_head = (problem.head_dtype or problem.dtype).itemsize
    return problem.vocabulary * problem.trained_columns * of_head


def naive_bytes(problem: Problem) -> int:
    """Of materialised logits, all positions in float32.

    First log-softmax, its gradient and the gather's; then the logits' gradient and its products.
    """
    logits = problem.total_rows * problem.vocabulary * problem.element_bytes
    elements = problem.total_rows * problem.hidden_grad + problem.vocabulary * problem.head_grad
    grads = elements * problem.hidden_size * problem.dtype.itemsize
    workspace = workspace_bytes(problem, problem.total_rows, problem.vocabulary)
    return max(3 * logits, logits + grads) + workspace


def workspace_bytes(problem: Problem, rows: int, columns: int) -> int:
    """What libraries allocate for a product of `rows` × `columns`, and at first use.

    cuBLAS keeps 32 MiB. On a CPU it is what MKL was measured to take for packed operands, and some
    MiB of code and threads: on Intel's it packs whole panels, on others blocks.
    """
    if problem.device != "cpu":
        return 32 * MIB
    if not _IS_INTEL:
        return 384 * min(columns, 5120) * problem.element_bytes + 10 * MIB
    packed = max(128 * columns, min(rows, 384) * min(columns, 16384))
    return packed * problem.element_bytes + 12 * MIB


# --- several ranks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """One collective of a step, or several that do the same for parts of it.

    Args:
        what: that is exchanged.
        operation: "all_gather", "reduce_scatter" or "all_reduce".
        ranks: that take part.
        bytes: of the whole: what was gathered, what is scattered, what is reduced.
    """

    what: str
    operation: str
    ranks: int
    bytes: int

    @property
    def sent(self) -> int:
        """Bytes that a rank sends, and receives, around a ring; an all-reduce goes twice."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.bytes * (self.ranks - 1) // self.ranks


@dataclass(frozen=True)
class Layout:
    """How many ranks share a head; their product work on the same pairs, or each on its own.

    Args:
        tp: ranks that hold consecutive tokens of the vocabulary and see the same rows.
        fsdp: ranks that each hold a part of the (tp-th part of the) head, gather it and scatter
            its gradient, and see rows of their own.
        cp: ranks that share out the positions of every sequence.

    Raises:
        TypeError, ValueError: one of them is no integer or less than 1.
    """

    tp: int = number(1, at_least=1, whole=True)
    fsdp: int = number(1, at_least=1, whole=True)
    cp: int = number(1, at_least=1, whole=True)

    def __post_init__(self) -> None:
        check_fields(self)

    def of_rank(self, problem: Problem) -> Problem:
        """What the rank with the largest shard and the most rows has to do.

        Args:
            problem: of the whole head, and the rows of one group of tp × cp ranks.

        Raises:
            ValueError: more ranks than tokens, or than positions of the shortest sequence.
        """
        if self.tp * self.fsdp > problem.vocabulary:
            raise ValueError(
                f"tp={self.tp} × fsdp={self.fsdp} ranks share {problem.vocabulary} rows of the "
                "head: some would have none"
            )
        if self.cp > min(problem.counts):
            raise ValueError(
                f"cp={self.cp} ranks share the scored positions of every sequence, and one has "
                f"{min(problem.counts)}"
            )
        return replace(
            problem,
            vocabulary=-(-problem.vocabulary // self.tp),
            counts=tuple(-(-count // self.cp) for count in problem.counts),
            total_rows=-(-problem.total_rows // self.cp),
        )

    def head_bytes(self, problem: Problem) -> tuple[int, int]:
        """Of the head that a rank holds between steps, and of what it gathers for one."""
        of_row = problem.hidden_size * (problem.head_dtype or problem.dtype).itemsize
        rows = self.of_rank(problem).vocabulary
        gathered = self.fsdp * -(-rows // self.fsdp)  # shards are padded to one size
        return gathered // self.fsdp * of_row, gathered * of_row * (self.fsdp > 1)

    def exchanges(self, problem: Problem, stats: int = 0) -> list[Exchange]:
        """What a rank sends for one loss and its gradients; prompts that are projected once.

        Of a vocabulary in parts, a row's log-sum-exp and its target's logit, in the dtype of
        log-probabilities, and the gradient of its hidden state, a sum over ranks in that dtype;
        of a head in shards, all of it, once, and once its gradient in its own dtype; of sequences
        in parts, their log-probabilities in float64.

        Args:
            stats: statistics of a row that are asked for besides; "is_top1" is two.
        """
        mine = self.of_rank(problem)
        wide, found = problem.element_bytes, []
        if self.fsdp > 1:
            _, whole = self.head_bytes(problem)
            found.append(Exchange("head", "all_gather", self.fsdp, whole))
            if problem.head_grad:
                found.append(Exchange("its gradient", "reduce_scatter", self.fsdp, whole))
        if self.tp > 1:
            of_rows = self.tp * mine.rows * (2 + stats) * wide
            found.append(Exchange("statistics of rows", "all_gather", self.tp, of_rows))
            if problem.hidden_grad:
                of_hidden = mine.rows * problem.hidden_size * wide
                found.append(
                    Exchange("gradient of hidden states", "all_reduce", self.tp, of_hidden)
                )
        if self.cp > 1:
            of_sequences = 8 * len(problem.counts)
            found.append(Exchange("sums of sequences", "all_reduce", self.cp, of_sequences))
        return found
