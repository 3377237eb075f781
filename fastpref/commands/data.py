"""Preference pairs from JSON lines, checked before anything is trained.

A line holds `prompt`, `chosen` and `rejected`, each text or a list of chat messages (`role`,
`content`), and optionally `score_chosen` and `score_rejected`, the column names of Uni-DPO's and
UltraFeedback's data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TEXT_FIELDS = ("prompt", "chosen", "rejected")
SCORE_FIELDS = ("score_chosen", "score_rejected")
_SHOWN_PROBLEMS = 10


class DataError(ValueError):
    """Lines of a data file that cannot be used, each with file and line number."""


def read_pairs(path: str | Path, *, needs_scores: bool = False) -> list[dict[str, Any]]:
    """The pairs of a JSONL file; blank lines are skipped.

    Args:
        path: the file.
        needs_scores: missing scores are a problem.

    Raises:
        DataError: naming the file and, for up to ten bad lines, line number and problem.
        FileNotFoundError: there is no such file.
    """
    pairs: list[dict[str, Any]] = []
    problems: list[str] = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair(line, needs_scores))
        except ValueError as problem:
            problems.append(f"{path}:{number}: {problem}")
    if problems:
        rest = len(problems) - _SHOWN_PROBLEMS
        more = [f"… and {rest} more"] if rest > 0 else []
        raise DataError("\n".join(problems[:_SHOWN_PROBLEMS] + more))
    if not pairs:
        raise DataError(f"{path}: no pairs")
    scored = sum(SCORE_FIELDS[0] in pair for pair in pairs)
    if 0 < scored < len(pairs):
        raise DataError(f"{path}: {scored} of {len(pairs)} pairs have scores; all or none must")
    return pairs


def _pair(line: str, needs_scores: bool) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    pair = {name: _text(fields, name) for name in TEXT_FIELDS}
    if len({type(value) for value in pair.values()}) > 1:
        raise ValueError("prompt, chosen and rejected must all be text or all be messages")
    if needs_scores or any(name in fields for name in SCORE_FIELDS):
        pair |= {name: _score(fields, name) for name in SCORE_FIELDS}
    return pair


def _text(fields: dict[str, Any], name: str) -> str | list[dict[str, str]]:
    if name not in fields:
        raise ValueError(f"missing field {name!r}")
    value = fields[name]
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


def _score(fields: dict[str, Any], name: str) -> float:
    if name not in fields:
        raise ValueError(f"missing field {name!r}")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name!r} must be a finite number, got {value!r}")
    return float(value)
