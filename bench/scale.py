"""Time, memory and communication of a large head on many GPUs, from `fastpref plan`'s figures.

python bench/scale.py    renews the figures in SCALE.md
"""

from __future__ import annotations

from pathlib import Path

from fastpref.commands.benchmark.report import insert_tables
from fastpref.commands.plan import GPUS, LINKS, estimates, problem_for
from fastpref.planner import Layout, Problem

PAGE = Path(__file__).with_name("SCALE.md")
HIDDEN, VOCABULARY = 16384, 128256  # of Llama-3-405B
TP, GPUS_IN_ALL = 8, 1024  # of a node, whose links are NVLink, and beyond it InfiniBand
PAIRS, LENGTH = 8, 1024  # of the GPUs of a node together
H100 = GPUS["h100"]
# Where each layout's collectives go: a group of no more than a node's GPUs stays within it.
LAYOUTS = {
    "one GPU, all of the node's pairs": (Layout(), PAIRS),
    f"vocabulary in {TP} parts": (Layout(tp=TP), PAIRS),
    f"head gathered within {TP}, pairs shared out": (Layout(fsdp=TP), PAIRS // TP),
    f"head gathered over {GPUS_IN_ALL:,}, pairs shared out": (
        Layout(fsdp=GPUS_IN_ALL),
        PAIRS // TP,
    ),
    f"vocabulary in {TP} parts, each sharded over {GPUS_IN_ALL // TP}": (
        Layout(tp=TP, fsdp=GPUS_IN_ALL // TP),
        PAIRS,
    ),
}


def problem(pairs: int = PAIRS, *, lora: bool = False) -> Problem:
    return problem_for(HIDDEN, VOCABULARY, pairs=pairs, length=LENGTH, lora=lora)


def link_of(ranks: int) -> str:
    return "nvlink" if ranks <= TP else "infiniband"


def layouts(lora: bool) -> str:
    """A table of one GPU's share, by layout."""
    lines = [
        "| | products | peak | head, between steps | head, gathered | NVLink | InfiniBand |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (layout, pairs) in LAYOUTS.items():
        whole = problem(pairs, lora=lora)
        plan = next(each for each in estimates(layout.of_rank(whole)) if each.automatic)
        held, gathered = layout.head_bytes(whole)
        sent = dict.fromkeys(LINKS, 0)
        for each in layout.exchanges(whole):
            sent[link_of(each.ranks)] += each.sent
        links = (f"{1e3 * sent[link] / rate:.1f} ms" for link, rate in LINKS.items())
        cells = [
            f"{plan.products:g} U, {1e3 * plan.floor_seconds(H100):.1f} ms",
            *(f"{size / 1e9:.2f} GB" for size in (plan.extra_bytes, held, gathered)),
            *links,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def crossover(ranks: int, *, lora: bool) -> int:
    """Rows of a group of ranks from which gathering the head sends no more than its parts do."""
    whole = problem(lora=lora)
    gathering = sum(each.sent for each in Layout(fsdp=ranks).exchanges(whole))
    in_parts = sum(each.sent for each in Layout(tp=ranks).exchanges(whole))
    return -(-gathering * whole.rows // in_parts)


def crossovers() -> str:
    lines = ["| ranks | the head trains | it is frozen |", "| ---: | ---: | ---: |"]
    for ranks in (2, 4, 8, 16):
        rows = (f"{crossover(ranks, lora=lora):,} rows" for lora in (False, True))
        lines.append(f"| {ranks} | {' | '.join(rows)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    return {
        "training": layouts(lora=False),
        "frozen": layouts(lora=True),
        "crossover": crossovers(),
    }


if __name__ == "__main__":
    PAGE.write_text(insert_tables(PAGE.read_text(), tables()))
