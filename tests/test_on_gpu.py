"""The script for a GPU, rehearsed: nothing in it may run for the first time where time is short."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

from gpu import parts, setup, tables  # noqa: E402
from gpu.parts import AGAIN, Call, NotHereError, Part, supervise, work  # noqa: E402

STAGES = ("truth", "tune", "confirm")
HERE = {"source": "abc", "hardware": "a GPU", "rehearsal": True}


# What may be missing where a GPU is; transformers, where that is there, brings rich and typer.
WITHOUT = """
import sys
optional = ["trl", "datasets", "peft", "matplotlib", "liger_kernel"]
if "confirm" not in sys.argv:
    optional += ["rich", "typer", "transformers"]
sys.modules.update(dict.fromkeys(optional))
"""


def run_together(*commands, **environment):
    """Each call of the script, all at once: what each printed."""
    script = [sys.executable, str(BENCH / "on_gpu.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipes["env"] = os.environ | environment
    running = [subprocess.Popen([*script, *command], **pipes) for command in commands]
    found = [process.communicate()[0] for process in running]
    for process, said in zip(running, found, strict=True):
        assert process.returncode == 0, said[-6000:]
    return found


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Directory of a rehearsal of all stages, without what may be missing."""
    directory = tmp_path_factory.mktemp("on-gpu")
    without = tmp_path_factory.mktemp("without")
    (without / "sitecustomize.py").write_text(WITHOUT)
    commands = ([stage, "--out", str(directory), "--rehearse"] for stage in STAGES)
    run_together(*commands, PYTHONPATH=str(without))
    return directory


def read(directory, stage):
    return json.loads((directory / f"{stage}.json").read_text())


def test_a_rehearsal_measures_every_part(rehearsed):
    names = {path.name for path in rehearsed.iterdir()}
    assert names == {f"{stage}.{kind}" for stage in STAGES for kind in ("json", "txt")} | {
        "tuned.json"
    }
    for stage in STAGES:
        record = read(rehearsed, stage)
        assert record.keys() == {"stage", "environment", "parts"}
        assert record["stage"] == stage and record["environment"]["rehearsal"]
        text = (rehearsed / f"{stage}.txt").read_text()
        assert "REHEARSAL" in text
        for part in record["parts"]:
            assert part["status"] == "done", part
            assert part["result"]
            assert part["source"] == parts.source()
            assert f"== {part['name']}: done" in text


def test_a_rehearsal_finds_the_numbers_right(rehearsed):
    """And no kernel under a candidate's configuration, or in place, gives others."""
    truth = {part["name"]: part["result"] for part in read(rehearsed, "truth")["parts"]}
    assert truth["GPU tests"]["counts"] == {"passed": 1}
    ours = [row for row in truth["errors, bfloat16"]["of"] if "fastpref" in row["peer"]]
    assert {row["peer"] for row in ours} == {
        "fastpref pair groups",
        "fastpref frozen head",
        "fastpref recompute",
    }
    for row in ours:
        assert row["kept"] and 0 < row["token_logps"] <= row["allowed nats"]
    confirm = {part["name"]: part["result"] for part in read(rehearsed, "confirm")["parts"]}
    for row in confirm["in place and not"]:
        assert row["differ"] == {"from out of place": 0, "from the first": 0}
    goals = confirm["times, head trains"]["goals"]
    assert {goal["met"] for goal in goals} <= {True, False, None}
    assert all("why" in goal for goal in goals if goal["met"] is None)
    assert confirm["times, head trains"]["not run"]["CCE"]


def test_another_call_keeps_what_is_done_and_a_clock_at_0_names_the_rest(rehearsed, tmp_path):
    before = read(rehearsed, "tune")
    options = ["--rehearse", "--budget", "0"]
    kept, none = run_together(
        ["tune", "--out", str(rehearsed), *options], ["tune", "--out", str(tmp_path), *options]
    )
    assert kept.count("done already") == len(before["parts"])
    assert read(rehearsed, "tune")["parts"] == before["parts"]
    missing = read(tmp_path, "tune")["parts"]
    assert [part["name"] for part in missing] == [part["name"] for part in before["parts"]]
    for part in missing:
        assert part["status"] == "not run" and "0 s were left" in part["why"]
        assert f"== {part['name']}: not run" in none


# --- parts, without a device --------------------------------------------------------------------


def a_call(directory, seconds=60.0, started="1"):
    return Call("truth", directory, time.monotonic() + seconds, started)


def statuses(record):
    return {part["name"]: part["status"] for part in record["parts"]}


def test_a_part_that_fails_is_kept_and_measured_again_next_time(tmp_path):
    ran = []

    def part(name, run=lambda: {"n": 1}):
        return Part(name, 0, lambda: (ran.append(name), run())[1])

    def fails():
        raise ValueError("no such kernel")

    def absent():
        raise NotHereError("no such binary")

    some = [part("one"), part("two", fails), part("three", absent), part("four")]
    assert work(a_call(tmp_path), some, HERE, lambda: True) == 0
    record = a_call(tmp_path).load()
    expected = {"one": "done", "two": "failed", "three": "skipped", "four": "done"}
    assert statuses(record) == expected
    assert "no such kernel" in record["parts"][1]["why"]
    assert record["parts"][2]["why"] == "no such binary"
    text = tables.report(record)
    assert "no such kernel" in text and "no such binary" in text

    ran.clear()
    again = [part("one"), part("two"), part("three", absent), part("four")]
    work(a_call(tmp_path, started="2"), again, HERE, lambda: True)
    assert ran == ["two", "three"]
    assert statuses(a_call(tmp_path).load())["two"] == "done"

    ran.clear()
    work(a_call(tmp_path, started="3"), again[:1], HERE | {"source": "def"}, lambda: True)
    assert ran == ["one"]  # of other code
    assert statuses(a_call(tmp_path).load()).keys() == expected.keys()  # the others' stay


def test_a_part_that_takes_the_device_with_it_is_not_tried_twice(tmp_path):
    def fails():
        raise RuntimeError("illegal memory access")

    some = [Part("one", 0, fails), Part("two", 0, lambda: {"n": 1})]
    assert work(a_call(tmp_path), some, HERE, lambda: False) == AGAIN
    assert statuses(a_call(tmp_path).load()) == {"one": "failed", "two": "not run"}
    assert work(a_call(tmp_path), some, HERE, lambda: True) == 0
    assert statuses(a_call(tmp_path).load()) == {"one": "failed", "two": "done"}


def test_a_part_that_does_not_fit_leaves_the_clock_to_smaller_ones(tmp_path):
    some = [Part("long", 100, lambda: {"n": 1}), Part("short", 1, lambda: {"n": 1})]
    work(a_call(tmp_path, seconds=50), some, HERE, lambda: True)
    assert statuses(a_call(tmp_path).load()) == {"long": "not run", "short": "done"}


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {bench!r})
from gpu.parts import Call, Part, work
kill = lambda: os.abort()
hang = lambda: time.sleep(60)
some = [Part("one", 0, {first}), Part("two", 0, lambda: {{"n": 1}})]
call = Call("truth", Path({directory!r}), {deadline}, "1")
sys.exit(work(call, some, {here!r}, lambda: True))
"""


def worker(call, first):
    return [
        sys.executable,
        "-c",
        WORKER.format(
            bench=str(BENCH),
            first=first,
            directory=str(call.directory),
            deadline=call.deadline,
            here=HERE,
        ),
    ]


def test_another_worker_goes_on_behind_a_part_that_ends_its_process(tmp_path):
    call = a_call(tmp_path)
    record = supervise(call, worker(call, "kill"))
    assert statuses(record) == {"one": "failed", "two": "done"}
    assert record["parts"][0]["why"] == "the process ended by -6"
    assert "ended" not in record


def test_a_part_that_hangs_is_ended_with_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "GRACE", 1.0)
    call = a_call(tmp_path, seconds=1.0)
    record = supervise(call, worker(call, "hang"))
    assert statuses(record) == {"one": "failed", "two": "not run"}
    assert record["ended"] == record["parts"][0]["why"] == "ran beyond the stage's clock"
    assert call.load() == record


def test_winners_are_kept_in_a_file_that_the_kernels_read(rehearsed):
    pytest.importorskip("triton")
    from fastpref_kernels import configs

    of_parts = {part["name"]: part["result"] for part in read(rehearsed, "tune")["parts"]}
    expected = {}
    for result in of_parts.values():
        if isinstance(result, dict):
            assert len(result["best two"]) == 2
            expected |= configs.entries_in(result["winner"])
    assert configs.read_entries(rehearsed / "tuned.json", "interpreter") == expected
    steps = read(rehearsed, "tuned")["measured"]["steps"]
    assert steps == of_parts["whole steps"] and len(steps) > 5


def test_what_is_measured_includes_its_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTPREF_CONFIGS", raising=False)
    before = parts.source()
    tuned = tmp_path / "tuned.json"
    tuned.write_text("{}")
    monkeypatch.setenv("FASTPREF_CONFIGS", str(tuned))
    assert parts.source() != before
    changed = parts.source()
    tuned.write_text('{"device": "NVIDIA H200"}')
    assert parts.source() not in (before, changed)


def test_counters_are_read_from_what_the_profiler_prints():
    pytest.importorskip("triton")
    from gpu import tune

    said = '==PROF==\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    said += '"0","a","Duration","us","1,812.3"\n"0","a","Rule","",""\n"0","a","","",""\n'
    said += '"1","b","Duration","us","7"\n'
    expected = [
        {"kernel": "a", "Duration, us": "1,812.3", "Rule": ""},
        {"kernel": "b", "Duration, us": "7"},
    ]
    assert tune.of_csv(said) == expected
    with pytest.raises(RuntimeError, match="no table: ==ERROR== no permission"):
        tune.of_csv("==ERROR== no permission")


def test_device_work_is_timed_between_events_behind_a_flush(monkeypatch):
    """In this order; the work of before has ended, and none of the call's is left."""
    from fastpref.commands.benchmark import timing

    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def elapsed_time(self, other):
            assert other is not self
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: seen.append("flush"))
    watch = timing.Stopwatch("meta")
    assert watch.seconds(lambda: seen.append("call")) == 0.002
    assert seen == ["wait", "flush", "event", "call", "event", "wait"]
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "ab"}
    assert watch.interleaved(calls, 2) == {"a": [0.002] * 2, "b": [0.002] * 2}
    assert ran == ["a", "b"] * 3  # the first time untimed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="--rehearse"):
        setup.make_setup(a_call(tmp_path), False)


@pytest.mark.parametrize("budget", ["-1", "nan", "inf", "soon"])
def test_a_clock_has_a_number_of_seconds(budget, tmp_path):
    command = [sys.executable, str(BENCH / "on_gpu.py"), "tune", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--budget", budget], capture_output=True, text=True)
    assert run.returncode == 2 and "--budget" in run.stderr
    assert not list(tmp_path.iterdir())
