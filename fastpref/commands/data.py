"""Preference pairs from files, checked before anything is trained.

A pair has `prompt`, `chosen` and `rejected`, each text or a list of chat messages (`role`,
`content`), and the columns of numbers that the loss takes (see `fastpref.columns`): `score_chosen`
and `score_rejected`, as Uni-DPO's and UltraFeedback's data call them, `weight` and `beta`. The
prompt may also be implicit: chosen and rejected are then whole conversations or texts, and the
prompt is what both begin with, by TRL's rule.

JSON lines and JSON arrays are read here, gzipped or not, so that a bad line has its number;
Parquet, Arrow, CSV and directories of any of them by the library `datasets`.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpref.columns import LossColumns
from fastpref.objectives import Objective

TEXT_FIELDS = ("prompt", "chosen", "rejected")
_SHOWN = 10
# By the end of a file's name: the builder of `datasets`, and its options. In a CSV file "null" is
# an answer like any other.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {"keep_default_na": False, "converters": dict.fromkeys(TEXT_FIELDS, str)}),
}

Text = str | list[dict[str, Any]]


class DataError(ValueError):
    """Rows of a data file that cannot be used, each with file and line or row number."""


@dataclass(frozen=True)
class Pair:
    """One pair, checked.

    Args:
        place: where it stands: "FILE:LINE" in JSON lines, "FILE row N" in any other file.
        prompt: text, or a list of messages; chosen and rejected are of the same kind.
        chosen: the preferred response, without the prompt.
        rejected: the other response.
        numbers: what the loss takes, by column.
        continues: chosen and rejected are text that goes on where the prompt breaks off, in the
            middle of a turn or even of a word.
    """

    place: str
    prompt: Text
    chosen: Text
    rejected: Text
    numbers: dict[str, float] = field(default_factory=dict)
    continues: bool = False


def read_pairs(
    path: str | Path, objective: Objective | None = None
) -> tuple[list[Pair], list[str]]:
    """The pairs of a file or directory, and the names of columns that were not used.

    Args:
        path: JSON lines (blank lines are skipped), a JSON array, either of them gzipped, Parquet,
            Arrow, CSV, a directory of one split of such files, or one that `save_to_disk` wrote.
        objective: whose columns of numbers are read, in every row or it is a problem; None for
            texts alone.

    Raises:
        DataError: naming the file and, for up to ten bad rows, line or row number and problem; or
            columns that the objective needs or does not take.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    rows = [(place, _fields(row)) for place, row in _rows(path)]
    parsed = [fields for _, fields in rows if isinstance(fields, dict)]
    present = list(dict.fromkeys(name for fields in parsed for name in fields))
    columns = None
    if objective is not None and parsed:
        try:
            columns = LossColumns(objective, present, str(path))
        except ValueError as problem:
            raise DataError(str(problem)) from None
    pairs: list[Pair] = []
    problems: list[str] = []
    for place, fields in rows:
        try:
            if isinstance(fields, ValueError):
                raise fields
            pairs.append(_pair(fields, place, columns))
        except ValueError as problem:
            problems.append(f"{place}: {problem}")
    if problems:
        raise DataError("\n".join(shortened(problems)))
    if not pairs:
        raise DataError(f"{path}: no pairs")
    used = {*TEXT_FIELDS, *(columns.names if columns else ())}
    return pairs, [name for name in present if name not in used]


def shortened(lines: list[str]) -> list[str]:
    """The first ten, and how many more there are."""
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


# --- rows of files ------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of every row: fields, or the bytes of a line of JSON."""
    if path.is_dir() or path.suffix.lower() in _BUILDERS:
        rows: Iterable[Any] = _dataset(path)
    else:
        content = _content(path)
        if not content.lstrip().startswith(b"["):
            for number, line in enumerate(content.split(b"\n"), start=1):
                if line.strip():
                    yield f"{path}:{number}", line
            return
        try:
            rows = _parsed(content)
        except ValueError as problem:
            raise DataError(f"{path}: {problem}") from None
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{path} row {number}", row
    except (ValueError, OSError) as problem:
        raise DataError(f"{path}: {_first_line(problem)}") from None


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as problem:
            raise DataError(f"{path}: not a whole gzip file: {problem}") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _fields(row: Any) -> dict[str, Any] | ValueError:
    """Of one row, or what is wrong with it."""
    try:
        fields = _parsed(row) if isinstance(row, bytes) else row
    except ValueError as problem:
        return problem
    if not isinstance(fields, dict):
        return ValueError(f"expected a JSON object, got {type(fields).__name__}")
    return fields


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"not UTF-8: byte 0x{byte:02x} at {error.start + 1}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from None


def _dataset(path: Path) -> Iterable[dict[str, Any]]:
    """Rows by way of `datasets`, which streams: nothing is copied into its cache."""
    import datasets

    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path), streaming=True)
        else:
            builder, options = _BUILDERS[path.suffix.lower()]
            found = datasets.load_dataset(builder, data_files=str(path), streaming=True, **options)
    except (ValueError, OSError) as problem:
        raise DataError(f"{path}: {_first_line(problem)}") from None
    if not isinstance(found, dict):
        return found
    if len(found) > 1:
        raise DataError(f"{path}: has the splits {', '.join(found)}; give file or directory of one")
    return next(iter(found.values()))


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


# --- a pair of a row ----------------------------------------------------------------------------


def _pair(fields: dict[str, Any], place: str, columns: LossColumns | None) -> Pair:
    chosen: Any = _text(fields, "chosen")  # text or messages, all three
    rejected: Any = _text(fields, "rejected")
    prompt: Any = None if fields.get("prompt") is None else _text(fields, "prompt")
    of_messages = isinstance(chosen, list)
    prompt_fits = of_messages or not isinstance(prompt, list)
    if isinstance(rejected, list) != of_messages or not prompt_fits:
        raise ValueError("prompt, chosen and rejected must all be text or all be messages")
    continues = prompt is None and not of_messages
    if isinstance(prompt, list):
        chosen, rejected = _without(prompt, chosen, rejected)
    elif prompt is None or (of_messages and chosen[0]["role"] != "assistant"):
        prompt, chosen, rejected = _extracted(prompt, chosen, rejected)
    elif of_messages:
        prompt = [{"role": "user", "content": prompt}]
    numbers = {} if columns is None else _numbers(fields, columns)
    return Pair(place, prompt, chosen, rejected, numbers, continues)


def _without(prompt: list, chosen: list, rejected: list) -> tuple[list, list]:
    """The responses of conversations that repeat their prompt."""
    turns = len(prompt)
    if chosen[:turns] == prompt == rejected[:turns]:
        chosen, rejected = chosen[turns:], rejected[turns:]
        if not (chosen and rejected):
            raise ValueError("chosen and rejected must go on after the prompt")
    return chosen, rejected


def _extracted(prompt: str | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt and responses of two texts or conversations that begin alike."""
    from trl import extract_prompt

    parts: dict[str, Any] = dict.fromkeys(TEXT_FIELDS, "")
    if chosen[0] == rejected[0]:
        parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    shared = parts["prompt"]
    if not shared:
        raise ValueError("chosen and rejected do not begin alike, so there is no prompt")
    for name in ("chosen", "rejected"):
        if isinstance(parts[name], str) and not parts[name].strip():
            raise ValueError(f"{name!r} is empty after what both begin with")
    if prompt is not None and not any(prompt.strip() in str(turn["content"]) for turn in shared):
        raise ValueError("'prompt' is none of the turns that chosen and rejected begin with")
    return shared, parts["chosen"], parts["rejected"]


def _text(fields: dict[str, Any], name: str) -> Text:
    value = fields.get(name)
    if value is None:
        raise ValueError(f"missing field {name!r}")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name!r} is empty")
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{name!r} must be text or a list of messages")
    if not value or not all(message.get("role") for message in value):
        raise ValueError(f"{name!r} must have messages, each with a role")
    if not str(value[-1].get("content") or "").strip():
        raise ValueError(f"{name!r} is empty")
    return value


def _numbers(fields: dict[str, Any], columns: LossColumns) -> dict[str, float]:
    for name in columns.unusable(fields):
        value = fields.get(name)
        if value is None:
            raise ValueError(f"missing field {name!r}")
        expected = str(columns.domain(name)).replace("finite", "a finite number")
        raise ValueError(f"{name!r} must be {expected}, got {value!r}")
    return {name: float(fields[name]) for name in columns.names}
