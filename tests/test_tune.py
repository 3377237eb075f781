"""`fastpref tune`: what is left out, what wins, and that the file it writes is the one that holds.

The dry run goes through the interpreter, so this file runs itself in a process that interprets.
"""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastpref_kernels import configs
from fastpref_kernels.configs import RowsConfig

from fastpref.commands.cli import app
from fastpref.commands.tune import run as tuning
from fastpref.commands.tune.questions import Question, dry_sizes, questions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of −inf − −inf
invoke = CliRunner().invoke


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


# --- a question, with work that needs no kernel -------------------------------------------------

ROWS = "rows", "plain"
SIZES = dry_sizes("bfloat16")
DEFAULT = RowsConfig(1, 64, 1)


def candidate(columns):
    return RowsConfig(1, columns, 1)


def taken():
    return configs.rows_config("interpreter", softcap=False)


def asked(monkeypatch, seconds, numbers=lambda columns: 1.0, steps=None):
    """An answer of which `seconds[columns]` are the rounds and `numbers(columns)` the results."""

    def check():
        return {"one": (torch.tensor(float(numbers(taken().block_v))), 0.5)}

    def interleaved(watch, calls, rounds):
        for call in calls.values():
            call()
        assert rounds == 4
        return {text: seconds[int(text.split("×")[1].split(",")[0])] for text in calls}

    monkeypatch.setattr(tuning.Stopwatch, "interleaved", interleaved)
    ran = []
    steps = steps or [lambda best: [candidate(columns) for columns in seconds]]
    question = Question(ROWS, tuple(steps), lambda sizes: (lambda: ran.append(taken()), check))
    answer = tuning.ask(question, SIZES, tuning.defaults("cpu") | {ROWS: DEFAULT}, 4)
    assert all(entry in ran for entry in answer.timed)
    return answer


def test_the_fastest_wins_where_it_is_faster_in_three_of_four_rounds(monkeypatch):
    seconds = {64: [4.0] * 4, 32: [3.0, 3.0, 5.0, 5.0], 128: [3.9, 3.9, 3.9, 9.0], 256: [3.8] * 4}
    answer = asked(monkeypatch, seconds)
    assert answer.after == candidate(256) and answer.before == DEFAULT and answer.changed
    assert answer.row_of(answer.after)["of default"]["median"] == pytest.approx(0.95)
    assert tuning.winners([answer]) == {ROWS: candidate(256)}


def test_noise_changes_nothing(monkeypatch):
    answer = asked(monkeypatch, {64: [4.0] * 4, 32: [1.0, 1.0, 4.1, 4.1]})
    assert answer.after == DEFAULT and not answer.changed
    assert tuning.winners([answer]) == {}


@pytest.mark.parametrize("found", [2.0, float("nan"), float("inf")])
def test_a_candidate_with_wrong_numbers_is_not_timed(found, monkeypatch):
    seconds = {64: [4.0] * 4, 32: [0.1] * 4, 128: [3.0] * 4}
    answer = asked(monkeypatch, seconds, lambda columns: found if columns == 32 else 1.4)
    assert answer.after == candidate(128)
    (why,) = answer.left_out.values()
    assert why.startswith("RuntimeError: wrong numbers: one")


def test_a_candidate_that_does_not_run_is_listed(monkeypatch):
    def numbers(columns):
        if columns == 32:
            raise MemoryError("out of resource: shared memory\nRequired: 1, limit: 0")
        return 1.0

    answer = asked(monkeypatch, {64: [4.0] * 4, 32: [0.1] * 4}, numbers)
    assert answer.left_out == {"1×32, 1 warps": "MemoryError: out of resource: shared memory"}
    assert not answer.changed


def test_a_second_step_starts_from_the_best_and_is_still_compared_with_the_default(monkeypatch):
    seen = []
    steps = [
        lambda best: [candidate(32)],
        lambda best: (seen.append(best), [candidate(16)])[1],
    ]
    seconds = {64: [4.0] * 4, 32: [2.0] * 4, 16: [1.0] * 4}
    answer = asked(monkeypatch, seconds, steps=steps)
    assert seen == [candidate(32)]
    ratios = [answer.row_of(candidate(n))["of default"]["median"] for n in (64, 32, 16)]
    assert ratios == [1.0, 0.5, 0.25] and answer.after == candidate(16)


def test_later_questions_are_asked_under_earlier_winners(monkeypatch):
    monkeypatch.setattr(
        tuning.Stopwatch,
        "interleaved",
        lambda watch, calls, rounds: {
            text: [1.0 if "32" in text or text == "library" else 2.0] * 4 for text in calls
        },
    )
    seen = []

    def work(sizes):
        return lambda: None, lambda: (seen.append(taken()), {"one": (torch.ones(1), 0.0)})[1]

    def fails(sizes):
        raise MemoryError("no room")

    forward = "choices", "forward"
    some = [
        Question(ROWS, (lambda best: [candidate(32)],), work),
        Question(("operands", "plain"), (lambda best: [],), fails),
        Question(forward, (lambda best: ["library"],), work),
    ]
    answers, unanswered = tuning.ask_all(some, SIZES, 4)
    assert tuning.winners(answers) == {ROWS: candidate(32), forward: "library"}
    assert unanswered == {"operands, plain": "MemoryError: no room"}
    assert seen[-1] == candidate(32)


def test_every_entry_that_decides_speed_is_asked_about():
    every = {(name, each) for name, (_, variants) in configs.KERNELS.items() for each in variants}
    every |= {("choices", name) for name in configs.CHOICES}
    asked_about = [question.key for question in questions()]
    assert len(set(asked_about)) == len(asked_about)
    # Which are for exactness, not for speed.
    assert every - set(asked_about) == {("projection", "wide"), ("choices", "depth")}
    for question in questions():
        default = configs.entries_of("sm_90")[question.key]
        for step in question.steps:
            assert len(step(default)) > 1
            if question.key[0] == "choices":
                assert default in step(default)


# --- the dry run --------------------------------------------------------------------------------


@interpreted
def test_the_numbers_of_every_question_are_compared(monkeypatch):
    """A result that is off is seen, whatever kernel it comes from."""
    for question in questions(dry=True):
        with configs.trial(tuning.defaults("cpu") | question.under):
            _, check = question.work(SIZES)
            expected = tuning._copied(check())
        assert tuning.differences(expected, expected) == ""
        for name, (value, allowed) in expected.items():
            moved = value.float() + 2 * torch.as_tensor(allowed) + 2.0**-20
            assert name in tuning.differences(expected | {name: (moved, allowed)}, expected)


@interpreted
def test_every_variant_of_the_kernels_agrees_with_itself_under_other_tiles():
    for question in questions():
        if question.key[0] == "projection":
            tiny = configs.ProjectionConfig(32, 32, 16, 1, 1)
            with configs.trial(tuning.defaults("cpu")):
                _, check = question.work(SIZES)
                expected = tuning._copied(check())
            with configs.trial(tuning.defaults("cpu") | {question.key: tiny}):
                assert tuning.differences(check(), expected) == "", question.name


@interpreted
def test_a_candidate_is_what_is_launched(monkeypatch):
    """One that is not would be the default, measured once more."""
    from fastpref_kernels import forward, rows, weight_gradient

    launched = {}

    def seen(module, name, kernel):
        launch = getattr(module, name)

        def note(*args):
            launched.setdefault(kernel, set()).add(args[-1])
            return launch(*args)

        monkeypatch.setattr(module, name, note)

    seen(forward, "_project", "projection")
    seen(weight_gradient, "_multiply", "weight_gradient")
    asked_for = rows.rows_config
    monkeypatch.setattr(
        rows,
        "rows_config",
        lambda device, softcap: launched.setdefault("rows", asked_for(device, softcap=softcap)),
    )
    for question in questions(dry=True):
        if question.key[0] in ("projection", "weight_gradient", "rows"):
            launched.clear()
            (tiny, *_) = question.steps[0](tuning.defaults("cpu")[question.key])
            with configs.trial(tuning.defaults("cpu") | {question.key: tiny}):
                question.work(SIZES)[0]()
            found = launched[question.key[0]]
            assert found == (tiny if question.key[0] == "rows" else {tiny})


@interpreted
@no_gpu
def test_a_dry_run_writes_where_it_is_told_and_what_it_writes_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "new" / "tuned.json"
    result = invoke(app, ["tune", "--output", str(output), "--dtype", "float16"])
    assert result.exit_code == 0, result.output
    assert "dry run" in result.output and "these times mean nothing" in result.output
    for question in questions(dry=True):
        assert question.name in result.output
    assert "frozen_head" in result.output and "left out" not in result.output
    content = json.loads(output.read_text())
    assert (
        content["device"] == "interpreter" and content["measured"]["head"] == "H 32, V 83, float16"
    )
    assert not (tmp_path / "cache").exists()
    output.write_text(json.dumps(content | {"choices": {"forward": "library"}}))
    monkeypatch.setenv("FASTPREF_CONFIGS", str(output))
    configs.entries_of.cache_clear()
    try:
        assert configs.choice("forward", torch.device("cpu")) == "library"
    finally:
        configs.entries_of.cache_clear()


@interpreted
@no_gpu
def test_a_dry_run_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fastpref.commands.tune.questions.questions", lambda dry: iter(()))
    monkeypatch.setattr("fastpref.commands.tune.run.steps", lambda *given: [])
    result = invoke(app, ["tune"])
    assert result.exit_code == 1 and "wrote" not in result.output  # nothing was answered
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "float32"], "must be bfloat16 or float16, got 'float32'"),
        (["--model", "somewhere", "--vocabulary", "83"], "leave out --hidden-size and --vocab"),
        (["--model", "/no/such/model"], "no"),
        (["--hidden-size", "0"], "--hidden-size"),
        (["--vocabulary", "1"], "--vocabulary"),
    ],
)
def test_options_that_make_no_sense_say_so(options, said):
    result = invoke(app, ["tune", *options])
    assert result.exit_code == 2 and said in " ".join(result.output.split())
