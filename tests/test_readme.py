"""Every table of the README is what its result file gives."""

import json
import re
import sys
from pathlib import Path

from fastpref.commands.benchmark.report import insert_tables, markdown_tables
from fastpref.objectives import PUBLISHED_SETTINGS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import families  # noqa: E402


def test_tables_come_from_the_committed_run():
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "bench/results/cpu/bench.json").read_text())
    tables = markdown_tables(results)
    trainers = ROOT / "bench/results/cpu/trainer.json"
    if trainers.exists():
        tables |= markdown_tables(json.loads(trainers.read_text()))
    tables["families"] = families.markdown(json.loads(families.RESULTS.read_text()))
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


def test_published_settings_of_unidpo():
    """The table's figures, blanks taken from its first line, are `PUBLISHED_SETTINGS`."""
    section = (
        (ROOT / "README.md").read_text().split("Its published settings")[1].split("τ_good and η")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    found, base = {}, None
    for line in lines:
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        base = base or cells
        values = [float(cell or default) for cell, default in zip(cells, base, strict=True)]
        first, *others = re.findall(r"`([^`]+)`", names)
        stem = first.rsplit("-", 1)[0]
        for name in (first, *(stem + other for other in others)):
            found[name] = values
    keys = ("beta", "tau_ref", "nll_weight", "tau_good", "learning_rate")
    expected = {name: [x[key] for key in keys] for name, x in PUBLISHED_SETTINGS.items()}
    assert found == expected
