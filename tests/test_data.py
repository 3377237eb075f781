"""Data files: every format that people have, every problem with file and line number."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from fastpref import DPO, ORPO, Objective, UniDPO
from fastpref.commands.data import DataError, read_pairs
from fastpref.commands.demo import PAIRS

SCORES = {"score_chosen": 2, "score_rejected": 1.5}
GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"} | SCORES


def turn(role, content):
    return {"role": role, "content": content}


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
        (changed(score_rejected=None), "missing field 'score_rejected'"),
        (changed(prompt=[turn("user", "p")]), "all be text or all be messages"),
        (changed(prompt=None), "do not begin alike"),
        (changed(prompt=..., chosen="a ", rejected="a b"), "'chosen' is empty after"),
        (changed(prompt=..., chosen=[turn("user", "a")], rejected=[turn("user", "b")]), "alike"),
        (
            changed(
                prompt="q",
                chosen=[turn("user", "p"), turn("assistant", "c")],
                rejected=[turn("user", "p"), turn("assistant", "r")],
            ),
            "'prompt' is none of the turns",
        ),
        (
            changed(
                prompt=[turn("user", "p")],
                chosen=[turn("user", "p")],
                rejected=[turn("user", "p"), turn("assistant", "r")],
            ),
            "must go on after the prompt",
        ),
    ],
)
def test_problems_are_named_with_their_line(tmp_path, line, problem):
    path = tmp_path / "pairs.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as error:
        read_pairs(path, UniDPO())
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
    path.write_text(json.dumps(GOOD) + "\n" + unscored + "\n")
    with pytest.raises(DataError, match=":2: missing field 'score_chosen'"):
        read_pairs(path, UniDPO())
    path.write_text(json.dumps(GOOD))
    (pair,), unused = read_pairs(path, UniDPO())
    assert pair.numbers == {"score_chosen": 2.0, "score_rejected": 1.5}
    assert unused == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"weight": -0.5}, "'weight' must be a finite number and at least 0, got -0.5"),
        ({"weight": 1e39}, "'weight' must be a finite number and at least 0, got 1e+39"),
        ({"weight": 10**400}, "'weight' must be a finite number and at least 0, got 1000"),
        ({"weight": None}, "missing field 'weight'"),
        ({"weight": ...}, "missing field 'weight'"),
        ({"beta": 0}, "'beta' must be a finite number and above 0, got 0"),
        ({"beta": 1e-60}, "'beta' must be a finite number and above 0, got 1e-60"),
        ({"beta": float("inf")}, "'beta' must be a finite number and above 0, got inf"),
        ({"beta": "0.1"}, "'beta' must be a finite number and above 0, got '0.1'"),
    ],
)
def test_weights_and_betas(tmp_path, row, problem):
    path = tmp_path / "pairs.jsonl"
    good = GOOD | {"weight": 0, "beta": 0.5}
    path.write_text(json.dumps(good))
    (pair,), unused = read_pairs(path, DPO())
    assert pair.numbers == {"weight": 0.0, "beta": 0.5}
    assert unused == ["score_chosen", "score_rejected"]

    bad = {name: value for name, value in (good | row).items() if value is not ...}
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad))
    with pytest.raises(DataError) as error:
        read_pairs(path, DPO())
    assert str(error.value).startswith(f"{path}:2: {problem}")


def test_columns_that_the_objective_lacks_or_refuses(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", "beta": 0.1}))
    with pytest.raises(DataError, match=f"UniDPO needs the columns score_chosen .*; {path} has"):
        read_pairs(path, UniDPO())
    with pytest.raises(DataError, match=f"ORPO takes no betas, and {path} has a column beta"):
        read_pairs(path, ORPO())
    path.write_text("{")
    with pytest.raises(DataError, match=":1: not JSON"):
        read_pairs(path, UniDPO())


class Extra(Objective):
    extras = ("difficulty",)

    def __call__(self, pairs):
        raise AssertionError


@pytest.mark.parametrize("names", [["difficulty"], ["difficulty_chosen", "difficulty_rejected"]])
def test_extras(tmp_path, names):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD | dict.fromkeys(names, -3)))
    (pair,), unused = read_pairs(path, Extra())
    assert pair.numbers == dict.fromkeys(names, -3.0)
    assert unused == ["score_chosen", "score_rejected"]
    path.write_text(json.dumps(GOOD | dict.fromkeys(names, float("nan"))))
    with pytest.raises(DataError, match=f":1: '{names[0]}' must be a finite number, got nan"):
        read_pairs(path, Extra())


def test_extras_that_are_not_there_or_there_twice(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD | {"difficulty_chosen": 1}))
    needs = "Extra needs a column difficulty, or difficulty_chosen and difficulty_rejected"
    with pytest.raises(DataError, match=f"{needs}; {path} has"):
        read_pairs(path, Extra())
    forms = ("difficulty", "difficulty_chosen", "difficulty_rejected")
    path.write_text(json.dumps(GOOD | dict.fromkeys(forms, 1)))
    with pytest.raises(DataError, match=f"{needs}, not both; {path} has"):
        read_pairs(path, Extra())


def test_what_is_not_needed_is_not_used_and_said(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(changed(score_chosen="high", score_rejected=None, prompt_id=7)))
    (pair,), unused = read_pairs(path, DPO())
    assert pair.numbers == {}
    assert unused == ["score_chosen", "score_rejected", "prompt_id"]


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


USER, CHOSEN, REJECTED = turn("user", "p"), turn("assistant", "c"), turn("assistant", "r")


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": [USER], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"prompt": "p", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"prompt": "p", "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    ],
    ids=["explicit", "repeated", "ultrafeedback", "text prompt", "implicit"],
)
def test_conversations(tmp_path, columns):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(columns))
    (pair,), _ = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [CHOSEN], [REJECTED])
    assert not pair.continues


def test_an_implicit_prompt_of_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "Q: why? A: so", "rejected": "Q: why? A: no"}))
    (pair,), _ = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Q: why? A:", " so", " no")
    assert pair.continues


def test_an_implicit_prompt_is_not_made_of_nothing(tmp_path):
    """TRL's rule takes the end of a text that ends in a space for what both begin with."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "b ", "rejected": "a"}))
    with pytest.raises(DataError, match=":1: chosen and rejected do not begin alike"):
        read_pairs(path)


# --- file formats -------------------------------------------------------------------------------


def write_lines(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gz(rows, path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_bom(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")


def write_parquet(rows, path):
    Dataset.from_list(rows).to_parquet(path)


def write_csv(rows, path):
    Dataset.from_list(rows).to_csv(path)


def write_disk(rows, path):
    Dataset.from_list(rows).save_to_disk(path)


def write_parquet_directory(rows, path):
    path.mkdir()
    half = len(rows) // 2
    Dataset.from_list(rows[:half]).to_parquet(path / "train-00000-of-00002.parquet")
    Dataset.from_list(rows[half:]).to_parquet(path / "train-00001-of-00002.parquet")


def write_splits(rows, path):
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path)


FORMATS = [
    ("pairs.jsonl", write_lines, "{}:{}"),
    ("pairs.jsonl.gz", write_gz, "{}:{}"),
    ("bom.jsonl", write_bom, "{}:{}"),
    ("pairs.json", lambda rows, path: path.write_text(json.dumps(rows, indent=1)), "{} row {}"),
    ("pairs.parquet", write_parquet, "{} row {}"),
    ("pairs.csv", write_csv, "{} row {}"),
    ("disk", write_disk, "{} row {}"),
    ("splits", write_splits, "{} row {}"),
    ("parquet", write_parquet_directory, "{} row {}"),
]


@pytest.mark.parametrize(("name", "write", "place"), FORMATS, ids=[name for name, *_ in FORMATS])
def test_formats(tmp_path, name, write, place):
    """The same pairs from each, and the number of a row that cannot be used."""
    path = tmp_path / name
    rows = [GOOD, GOOD | {"chosen": "null", "prompt": "42", "score_chosen": 3}]
    write(rows, path)
    pairs, unused = read_pairs(path, UniDPO())
    assert [pair.place for pair in pairs] == [place.format(path, 1), place.format(path, 2)]
    assert [pair.chosen for pair in pairs] == ["c", "null"]
    assert pairs[1].prompt == "42"
    assert pairs[1].numbers == {"score_chosen": 3.0, "score_rejected": 1.5}
    assert unused == []

    bad = tmp_path / f"bad-{name}"
    write([*rows, changed(rejected=" ")], bad)
    with pytest.raises(DataError) as error:
        read_pairs(bad)
    assert str(error.value) == f"{place.format(bad, 3)}: 'rejected' is empty"


def test_ultrafeedback_as_it_is_published(tmp_path):
    path = tmp_path / "train_prefs.parquet"
    chats = {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "messages": [USER, CHOSEN]}
    write_parquet([{"prompt": "p", "prompt_id": "x", **chats} | SCORES], path)
    (pair,), unused = read_pairs(path, UniDPO())
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [CHOSEN], [REJECTED])
    assert pair.numbers == {"score_chosen": 2.0, "score_rejected": 1.5}
    assert unused == ["prompt_id", "messages"]


def test_several_splits_are_not_mixed(tmp_path):
    rows = Dataset.from_list([GOOD])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="has the splits train, test"):
        read_pairs(tmp_path / "both")
    assert len(read_pairs(tmp_path / "both" / "test")[0]) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"prompt": "p"\xff}', ":1: not UTF-8: byte 0xff at 15"),
        ("a.json", b'[{"prompt": "\xff"}]', ": not UTF-8: byte 0xff at 14"),
        ("a.json", b'[{"prompt": "p"},\n{]', ": not JSON: .* at line 2, column 2"),
        ("a.jsonl.gz", b"\x1f\x8bnot gzip", ": not a whole gzip file"),
        ("a.parquet", b"not parquet", ": .*[Pp]arquet"),
        ("a.csv", b"prompt,chosen,rejected\np,\xff,r\n", ": .*utf-8"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}{problem}"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["no.jsonl", "no.parquet"])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_pairs(tmp_path / name)


def test_a_directory_of_nothing(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        read_pairs(tmp_path)


def test_the_demo_pairs():
    pairs, unused = read_pairs(PAIRS, UniDPO())
    assert len(pairs) >= 48
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert all(p.numbers["score_chosen"] > p.numbers["score_rejected"] for p in pairs)
    assert any(len(pair.rejected) > len(pair.chosen) for pair in pairs)
    assert unused == []
