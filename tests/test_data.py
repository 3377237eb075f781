"""Data files: every problem with file and line number, before anything is trained."""

import json

import pytest

from fastpref.commands.data import DataError, read_pairs
from fastpref.commands.demo import PAIRS

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 2, "score_rejected": 1.5}


def changed(**changes):
    return {name: value for name, value in (GOOD | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        (changed(chosen=...), "missing field 'chosen'"),
        (changed(rejected="  "), "'rejected' is empty"),
        (changed(prompt=3), "'prompt' must be text or a list of messages"),
        (changed(chosen=[{"role": "assistant", "content": "x"}]), "all be text or all be messages"),
        (changed(prompt=[{"content": "x"}]), "each with a role"),
        (changed(prompt=[{"role": "user", "content": ""}]), "'prompt' is empty"),
        (changed(score_chosen=...), "missing field 'score_chosen'"),
        (changed(score_chosen="high"), "'score_chosen' must be a finite number, got 'high'"),
        (changed(score_rejected=float("nan")), "finite number, got nan"),
        (changed(score_rejected=True), "finite number, got True"),
    ],
)
def test_problems_are_named_with_their_line(tmp_path, line, problem):
    path = tmp_path / "pairs.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert problem in str(error.value)


def test_several_problems_at_once(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(["{"] * 12 + [json.dumps(GOOD)]))
    with pytest.raises(DataError, match=r"(?s):1: .*:10: .*and 2 more"):
        read_pairs(path)


def test_scores_where_they_are_needed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    unscored = json.dumps(changed(score_chosen=..., score_rejected=...))
    path.write_text(unscored + "\n")
    assert "score_chosen" not in read_pairs(path)[0]
    with pytest.raises(DataError, match=":1: missing field 'score_chosen'"):
        read_pairs(path, needs_scores=True)
    path.write_text(unscored + "\n" + json.dumps(GOOD))
    with pytest.raises(DataError, match="1 of 2 pairs have scores"):
        read_pairs(path)


def test_an_empty_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="no pairs"):
        read_pairs(path)


def test_line_separators_inside_text_do_not_shift_line_numbers(tmp_path):
    path = tmp_path / "pairs.jsonl"
    odd = json.dumps(changed(chosen="a\u2028b\x85c"), ensure_ascii=False)
    path.write_text(odd + "\n{\n", encoding="utf-8")
    with pytest.raises(DataError, match=":2: not JSON"):
        read_pairs(path)


def test_messages_pass_through(tmp_path):
    path = tmp_path / "pairs.jsonl"
    chat = changed(
        prompt=[{"role": "user", "content": "p"}],
        chosen=[{"role": "assistant", "content": "c"}],
        rejected=[{"role": "assistant", "content": "r"}],
    )
    path.write_text(json.dumps(chat))
    assert read_pairs(path)[0]["prompt"] == chat["prompt"]


def test_the_demo_pairs():
    pairs = read_pairs(PAIRS, needs_scores=True)
    assert len(pairs) >= 48
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    assert any(len(pair["rejected"]) > len(pair["chosen"]) for pair in pairs)
