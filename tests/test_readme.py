"""Every table of the README, and of the kernels' notes, is what its result file gives."""

import json
import re
import sys
from pathlib import Path

import pytest

from fastpref.commands.benchmark import trainer
from fastpref.commands.benchmark.report import insert_tables, main, markdown_tables
from fastpref.commands.plan import trunk_tokens
from fastpref.objectives import PUBLISHED_SETTINGS

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))  # last: names are there and here

import families  # noqa: E402


def test_tables_come_from_the_committed_run():
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "bench/results/cpu/bench.json").read_text())
    tables = markdown_tables(results)
    trainers = ROOT / "bench/results/cpu/trainer.json"
    tables |= markdown_tables(json.loads(trainers.read_text()))
    tables["families"] = families.markdown(json.loads(families.RESULTS.read_text()))
    for name in tables:
        assert f"<!-- {name} -->" in text
    assert insert_tables(text, tables) == text


def test_the_kernels_notes_are_of_the_compiled_kernels():
    """Their column sm_90: registers, KiB of shared memory; instructions."""
    compiled = json.loads((ROOT / "bench/results/compile-3.7.json").read_text())["kernels"]
    table = (ROOT / "kernels/NOTES.md").read_text().split("| sm_90 |")[1].split("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    found = {kernel: cell for kernel, *_, cell in lines}
    assert found == {kernel: _sm_90(kernel, compiled) for kernel in found}
    names = {kernel.split("`")[1] for kernel in found}
    assert names == {each["kernel"] for each in compiled}


def _sm_90(kernel, compiled):
    """Of "`name`", all its variants; of "`name`: one; another", those."""
    name, _, variants = kernel.replace("`", "").partition(": ")
    of = [
        each
        for each in compiled
        if (each["architecture"], each["kernel"]) == ("sm_90", name)
        and (not variants or each["variant"] in variants.split("; "))
    ]
    shared = _span([each["shared"] and max(1, round(each["shared"] / 1024)) for each in of])
    shared = "none" if shared == "0" else f"{shared} KiB"
    registers, code = (_span([each[key] for each in of]) for key in ("registers", "instructions"))
    return f"{registers}, {shared}; {code}"


def _span(values):
    return " to ".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def test_tokens_of_the_trunk_are_those_that_are_planned():
    """Padded, padding-free and with shared prompts, of the benchmark's lengths at both ratios."""
    run = json.loads((ROOT / "bench/results/cpu/trainer.json").read_text())["trainer"]
    found = {(each["workload"], each["peer"]): each["trunk_tokens"] for each in run}
    for workload, ratio in trainer.RATIOS.items():
        planned = trunk_tokens(trainer.lengths_at(ratio), trainer.PAIRS).values()
        assert [found[workload, way] for way in trainer.WAYS] == [*planned]


GPU_RUN = {
    "stage": "confirm",
    "environment": {"hardware": "A GPU of nobody", "device": "cuda"},
    "parts": [
        {
            "name": "times, head trains",
            "status": "done",
            "result": {
                "of": [
                    {"what": "naive", "ms": {"median": 100.0}, "of naive": None},
                    {
                        "what": "fastpref pair groups",
                        "ms": {"median": 80.25},
                        "of naive": {"median": 0.8, "low": 0.79, "high": 0.81},
                    },
                    {"what": "fastpref forward only", "ms": {"median": 26.0}, "of naive": ""},
                ],
                "goals": [
                    {
                        "goal": "fastpref pair groups", "than": "Liger DPO", "at most": 0.6,
                        "met": None, "why": "Liger DPO: not installed",
                    },
                    {
                        "goal": "fastpref pair groups", "than": "three bare products",
                        "at most": 1.2, "met": True, "found": {"median": 1.19},
                    },
                    {
                        "goal": "fastpref forward only", "than": "TFLOP/s", "at least": 640.0,
                        "met": False, "found": 639.6,
                    },
                ],
            },
        },
        {
            "name": "peaks, head trains",
            "status": "done",
            "result": {
                "of": [{"what": "fastpref pair groups", "peak MB": 2330.0}],
                "goals": [
                    {
                        "goal": "fastpref pair groups", "than": "TRL 1.16 chunked", "at most": 0.6,
                        "met": True, "found": {"median": 0.59},
                    }
                ],
            },
        },
        {"name": "training step", "status": "failed", "why": "no room"},
    ],
}  # fmt: skip


def test_tables_of_a_gpu_have_the_goals_beside_the_figures(tmp_path):
    """Of a made-up run."""
    source, readme = tmp_path / "confirm.json", tmp_path / "README.md"
    source.write_text(json.dumps(GPU_RUN))
    readme.write_text("before\n<!-- gpu -->\nold\n<!-- end gpu -->\nafter\n")
    main(readme, source)
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == (
        "before", "<!-- gpu -->", "<!-- end gpu -->", "after",
    )  # fmt: skip
    assert lines[2] == "| A GPU of nobody | time | of naive | peak memory | goals |"
    assert lines[4:-2] == [
        "| naive | 100.00 ms |  |  |  |",
        "| **fastpref pair groups** | 80.25 ms | 0.80 [0.79–0.81] | 2,330 MB | "
        "not measured: Liger DPO: not installed; "
        "1.19 of three bare products (met, ≤ 1.2); 0.59 of TRL 1.16 chunked (met, ≤ 0.6) |",
        "| **fastpref forward only** | 26.00 ms |  |  | 639.6 TFLOP/s (missed, ≥ 640) |",
    ]
    assert "| not measured | a step |" in markdown_tables(GPU_RUN)["gpu training"]


def test_tables_without_a_place_and_rehearsals_are_refused(tmp_path):
    source, readme = tmp_path / "confirm.json", tmp_path / "README.md"
    source.write_text(json.dumps(GPU_RUN))
    readme.write_text("nothing\n")
    with pytest.raises(SystemExit, match="<!-- gpu -->"):
        main(readme, source)
    rehearsal = GPU_RUN | {"environment": GPU_RUN["environment"] | {"rehearsal": True}}
    source.write_text(json.dumps(rehearsal))
    with pytest.raises(SystemExit, match="rehearsal"):
        main(readme, source)
    assert readme.read_text() == "nothing\n"


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
        json.loads(path.read_text())
        for name in ("bench", "confirm")
        for path in (ROOT / "bench/results").glob(f"*/{name}.json")
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
