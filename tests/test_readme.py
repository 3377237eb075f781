"""Every table of the README is what its result file gives."""

import json
from pathlib import Path

from fastpref.benchmark.report import insert_tables, markdown_tables

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
    for line in tree.strip().splitlines():
        folder = "fastpref/" if line.startswith("  ") else ""
        for name in line.split():
            if name.endswith((".py", "/")):
                assert (ROOT / folder / name).exists(), name
                continue
            break


def test_no_gpu_figure_without_a_gpu_result_file():
    text = (ROOT / "README.md").read_text()
    measured = [
        json.loads(path.read_text()) for path in (ROOT / "bench/results").glob("*/bench.json")
    ]
    if all(results["environment"]["device"] == "cpu" for results in measured):
        assert "No GPU has been used yet" in text
