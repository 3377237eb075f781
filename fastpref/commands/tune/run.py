"""Asks the questions, keeps the winners, and writes them as `fastpref_kernels` reads them."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastpref_kernels import configs

from fastpref.commands.benchmark.schedules import SCHEDULES, schedule_step
from fastpref.commands.benchmark.timing import Stopwatch, spread
from fastpref.commands.benchmark.workloads import Inputs
from fastpref.commands.tune.questions import Numbers, Question, Sizes
from fastpref.commands.verify import LOGIT_DEVIATION

MIB = 2**20
BUDGETS = (512, 1024, 2048)  # MiB of logits that a pair group may take


@dataclass(frozen=True)
class Answer:
    """What a question's candidates took.

    Args:
        name: of the question.
        rows: of each candidate that was timed its text, milliseconds (median and middle half) and
            ratio to the default, formed within each round; the default's ratio is 1.
        timed: the candidates of `rows`, in their order.
        left_out: why each other candidate was not timed.
        before, after: the default and the winner, which may be the same.
    """

    name: str
    key: tuple[str, str]
    rows: list[dict[str, Any]]
    timed: list[configs.Entry]
    left_out: dict[str, str]
    before: configs.Entry
    after: configs.Entry

    @property
    def changed(self) -> bool:
        return self.after != self.before

    def row_of(self, entry: configs.Entry) -> dict[str, Any]:
        """What was measured of a candidate, the last time."""
        return self.rows[self.timed.index(entry)]


def defaults(device: str) -> configs.Entries:
    """What ships for this device's architecture: the base of everything measured here."""
    return configs.entries_of(configs.architecture(torch.device(device)))


def ask(question: Question, sizes: Sizes, entries: configs.Entries, rounds: int = 5) -> Answer:
    """Checks and times a question's candidates; the winner is faster in three of four rounds.

    Args:
        entries: all that hold besides; the question's own is the default.

    Raises:
        Exception: whatever the default's own work raises.
    """
    entries = entries | question.under
    before = best = entries[question.key]
    timed: dict[str, dict[str, Any]] = {}
    entry_of: dict[str, configs.Entry] = {}
    left_out: dict[str, str] = {}
    with configs.trial(entries):
        work, check = question.work(sizes)
        expected = _copied(check())
    watch = Stopwatch(sizes.device)
    for step in question.steps:
        running = {text_of(each): each for each in (before, best)}
        for candidate in step(best):
            text = text_of(candidate)
            if text in timed or text in running or text in left_out:
                continue
            try:
                with configs.trial(entries | {question.key: candidate}):
                    if wrong := differences(check(), expected):
                        raise RuntimeError(f"wrong numbers: {wrong}")
                    work()
                running[text] = candidate
            # Triton's kinds of failure are many: no room, no such instruction, no such layout.
            except Exception as failure:
                left_out[text] = first_line(failure)
        calls = {
            text: _under(entries | {question.key: candidate}, work)
            for text, candidate in running.items()
        }
        seconds = watch.interleaved(calls, rounds)
        entry_of |= running
        for text, values in seconds.items():
            ms = {name: 1e3 * value for name, value in spread(values).items()}
            ratio = _ratio(values, seconds[text_of(before)])
            timed[text] = {"what": question.name, "candidate": text, "ms": ms, "of default": ratio}
        of_best = {text: _ratio(of, seconds[text_of(best)]) for text, of in seconds.items()}
        faster = [text for text, ratio in of_best.items() if ratio["high"] < 1]
        if faster:
            best = running[min(faster, key=lambda text: of_best[text]["median"])]
    measured = [entry_of[text] for text in timed]
    rows = [*timed.values()]
    return Answer(question.name, question.key, rows, measured, left_out, before, best)


def _ratio(values: list[float], baseline: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(values, baseline, strict=True)])


def ask_all(
    asked: Iterable[Question],
    sizes: Sizes,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[Answer], dict[str, str]]:
    """Every question's answer, later ones under the winners of earlier ones.

    Returns:
        The answers, and why each question without one has none: a small GPU has no room for it.
    """
    entries, answers, unanswered = defaults(sizes.device), [], {}
    for question in asked:
        progress(question.name)
        try:
            answer = ask(question, sizes, entries, rounds)
        except Exception as failure:
            unanswered[question.name] = first_line(failure)
        else:
            answers.append(answer)
            entries = entries | {answer.key: answer.after}
        settle(sizes.device)
    return answers, unanswered


def steps(sizes: Sizes, entries: configs.Entries, rounds: int = 5) -> list[dict[str, Any]]:
    """Whole steps before and after, interleaved; and pair groups by the memory they may take."""
    watch, rows = Stopwatch(sizes.device), []
    shipped = defaults(sizes.device)
    cases: list[tuple[str, str, int | None]] = [(name, name, None) for name in SCHEDULES]
    cases += [(f"pair_groups, {n} MiB of logits", "pair_groups", n * MIB) for n in BUDGETS]
    for name, schedule, budget in cases:
        try:
            step = schedule_step(schedule, _inputs(sizes, SCHEDULES[schedule][1]), budget)
            calls = {"before": _under(shipped, step), "after": _under(shipped | entries, step)}
            seconds = watch.interleaved(calls, rounds)
        except torch.OutOfMemoryError as failure:
            rows.append({"step": name, "why": first_line(failure)})
        else:
            row: dict[str, Any] = {"step": name}
            row |= {f"{k} ms": 1e3 * statistics.median(v) for k, v in seconds.items()}
            rows.append(row | {"ratio": _ratio(seconds["after"], seconds["before"])})
        settle(sizes.device)
    return rows


def _inputs(sizes: Sizes, frozen: bool) -> Inputs:
    draw: dict[str, Any] = {
        "generator": torch.Generator(sizes.device).manual_seed(0),
        "device": sizes.device,
    }
    shape = 2 * sizes.pairs, sizes.length
    hidden = torch.randn(*shape, sizes.hidden_size, **draw).to(sizes.dtype)
    weight = torch.randn(sizes.vocabulary, sizes.hidden_size, **draw)
    weight = weight.mul_(LOGIT_DEVIATION / sizes.hidden_size**0.5).to(sizes.dtype)
    targets = torch.randint(0, sizes.vocabulary, shape, **draw)
    leaf = weight.requires_grad_(not frozen)
    return Inputs(hidden.requires_grad_(), leaf, targets, None, backend="triton")


def _under(entries: configs.Entries, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with configs.trial(entries):
            return call()

    return run


def settle(device: str) -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# --- numbers ------------------------------------------------------------------------------------


def _copied(numbers: Numbers) -> Numbers:
    """Not where the next candidate will write."""
    return {name: (value.clone(), allowed) for name, (value, allowed) in numbers.items()}


def differences(found: Numbers, expected: Numbers) -> str:
    """What is further from the default's than it may be; nothing if all is well."""
    wrong = []
    for name, (value, allowed) in expected.items():
        off = (found[name][0].double() - value.double()).abs()
        if not bool((off <= allowed).all()):  # NaN neither
            share = (off / torch.as_tensor(allowed)).max().item()
            wrong.append(f"{name} {share:.3g} × what is allowed")
    return ", ".join(wrong)


def first_line(failure: Exception) -> str:
    """Kind of a failure and the first line of what it says."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:200]}"


def text_of(entry: configs.Entry) -> str:
    """A candidate in few characters."""
    if not dataclasses.is_dataclass(entry):
        return str(entry)
    values = dataclasses.asdict(entry)
    blocks = "×".join(str(value) for name, value in values.items() if name.startswith("block"))
    named = {"num_warps": "{} warps", "num_stages": "{} stages", "band": "band {}"}
    others = [text.format(values[name]) for name, text in named.items() if name in values]
    return ", ".join([blocks, *others, *["descriptors"] * values.get("descriptors", False)])


# --- files --------------------------------------------------------------------------------------


def winners(answers: Iterable[Answer]) -> configs.Entries:
    """Entries that replace the shipped ones."""
    return {answer.key: answer.after for answer in answers if answer.changed}


def write(path: Path, entries: configs.Entries, sizes: Sizes, found: list[dict[str, Any]]) -> None:
    """A file that the kernels read.

    Args:
        entries: the winners; none is a file as well, so that an older one no longer holds.
        found: whole steps before and after, for whoever reads it.
    """
    device = torch.device(sizes.device)
    content: dict[str, Any] = {
        "device": configs.device_name(device),
        "triton": triton.__version__,
        "measured": {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "head": f"H {sizes.hidden_size}, V {sizes.vocabulary}, "
            + str(sizes.dtype).removeprefix("torch."),
            "steps": found,
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file_text(content | nested(entries)))


def nested(entries: configs.Entries) -> dict[str, Any]:
    """As files have them: sections of names."""
    found: dict[str, Any] = {}
    for (section, name), entry in entries.items():
        value = dataclasses.asdict(entry) if dataclasses.is_dataclass(entry) else entry
        found.setdefault(section, {})[name] = value
    return found


def file_text(content: dict[str, Any]) -> str:
    """JSON with an entry a line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    of_numbers = r"\{\n\s+(\"block_n\"[^{}]*?)\n\s+\}"
    return re.sub(of_numbers, lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n"
