"""A stage's record as text."""

from __future__ import annotations

from typing import Any

_WIDEST = 72


def report(record: dict[str, Any]) -> str:
    """Every part: its tables where it is done, its reason where it is not."""
    environment = record.get("environment", {})
    lines = [
        f"{record.get('stage')} on {environment.get('hardware')}, source "
        f"{environment.get('source')}, {environment.get('date')}"
    ]
    if environment.get("rehearsal"):
        lines.append("REHEARSAL: sizes and times mean nothing")
    if "ended" in record:
        lines.append(f"ended early: {record['ended']}")
    for part in record["parts"]:
        took = f", {part['seconds']:.1f} s" if "seconds" in part else ""
        lines += ["", f"== {part['name']}: {part['status']}{took}"]
        lines += _lines(part["result"]) if part["status"] == "done" else [f"   {part['why']}"]
    for what, candidates in _ranked(record["parts"]).items():
        lines += ["", f"== best first: {what}", *_table(candidates)]
    return "\n".join(lines) + "\n"


def _ranked(parts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Candidates that do the same, the fastest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        result = part["result"] if part["status"] == "done" else {}
        for row in result.get("of", []) if isinstance(result, dict) else []:
            if "candidate" in row:
                found.setdefault(row["what"], []).append(row)
    # Of the default in the same rounds: not all were timed in the same minute.
    return {
        what: sorted(rows, key=lambda row: row["of default"]["median"])
        for what, rows in found.items()
    }


def _lines(value: Any, name: str = "") -> list[str]:
    """Lists of dictionaries become tables, other values a line each."""
    if isinstance(value, dict):
        return [line for key, each in value.items() for line in _lines(each, f"{name} {key}")]
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        title = [f"  {name}:"] if name else []
        return title + _table(value)
    return [f"  {name}: {_cell(value)}"]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    flat = [_flat(row) for row in rows]
    headings = list(dict.fromkeys(key for row in flat for key in row))
    cells = [headings, *([_cell(row.get(key, "")) for key in headings] for row in flat)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Inner dictionaries by the names of both; tables within rows stand in the JSON file only."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key} ")
        elif not isinstance(value, list):
            found[prefix + key] = value
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value).strip()
    return text if len(text) <= _WIDEST or "\n" in text else text[: _WIDEST - 1] + "…"
