"""Every table of the README is what its result file gives."""

import json
from pathlib import Path

from fastpref.commands.benchmark.report import insert_tables, markdown_tables

ROOT = Path(__file__).parent.parent


def test_tables_come_from_the_committed_run():
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "bench/results/cpu/bench.json").read_text())
    tables = markdown_tables(results)
    for name in tables:
        assert f"<!-- {name} -->" in text
    assert insert_tables(text, tables) == text


def test_files_of_the_tree_exist():
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("```")[1]
    folders = [ROOT]  # of each depth of indentation
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split():
            if not name.endswith((".py", "/")):
                break
            path = folders[depth] / name
            assert path.exists(), name
            folders[depth + 1 :] = [path]


def test_no_gpu_figure_without_a_gpu_result_file():
    text = (ROOT / "README.md").read_text()
    measured = [
        json.loads(path.read_text()) for path in (ROOT / "bench/results").glob("*/bench.json")
    ]
    if all(results["environment"]["device"] == "cpu" for results in measured):
        assert "No GPU has been used yet" in text
