"""The commands, as a user types them."""

import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from fastpref.commands import cli, tables, verify
from fastpref.commands.cli import app
from fastpref.commands.train import TrainSettings
from fastpref.objectives import make_objective

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def curves(request, monkeypatch):
    """Pictures take as long as training a tiny model: drawn where they are looked at."""
    if request.node.originalname != "test_train":
        monkeypatch.setattr("fastpref.commands.train.draw_curves", lambda *_, **__: None)


def train(model, data, output, *more):
    paths = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return run(app, ["train", *paths, *more])


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "objective", "per_token", "saved"),
    [
        (
            ["--eta", "0.5"],
            "UniDPO(balance=None, divergence=None, beta=2.0, eta=0.5",
            True,
            "config.json",
        ),
        (
            ["--objective", "adadpo", "--lora", "--balance-ceiling", "3"],
            "ceiling=3.0",
            False,
            "adapter_config.json",
        ),
        (["--objective", "simpo", "--balance"], "SimPO(balance=Balance(", True, "config.json"),
        (
            ["--objective", "dpop", "--set", "penalty=2.5", "--set", "divergence=js"],
            "divergence=Divergence(name='js', alpha=0.5), beta=0.3, penalty=2.5)",
            False,
            "config.json",
        ),
    ],
    ids=["unidpo", "adadpo-lora", "simpo", "dpop"],
)
def test_train(more, objective, per_token, saved, tiny_llama, pairs_file, tmp_path):
    output = tmp_path / "out"
    result = train(tiny_llama, pairs_file, output, "--learning-rate", "1e-3", *more)
    assert result.exit_code == 0, result.output
    assert objective in result.output.replace("\n", "")  # what was trained, with every number
    assert ("reward margin (per token)" in result.output) == per_token
    assert "…" not in result.output
    assert "curves.png" in result.output.replace("\n", "")
    assert is_png(output / "curves.png")
    assert (output / saved).exists()
    results = json.loads((output / "results.json").read_text())
    assert objective in results["objective"]
    assert results["after"]["rewards/margins"] > results["before"]["rewards/margins"]
    assert len(results["steps"]) == 4
    step = results["steps"][0]
    assert {"loss", "rewards/margins", "logps/chosen", "logps/rejected"} <= step.keys()


def test_train_on_weights_and_betas(tiny_llama, pairs, tmp_path):
    """Before training a pair's DPO loss is log 2, times its weight; β scales the rewards after."""
    data = tmp_path / "pairs.jsonl"

    def run(name, objective, **columns):
        data.write_text("".join(json.dumps(pair | columns) + "\n" for pair in pairs))
        more = "--objective", objective, "--learning-rate", "0.01", "--max-steps", "2"
        result = train(tiny_llama, data, tmp_path / name, *more)
        path = tmp_path / name / "results.json"
        return result, json.loads(path.read_text()) if path.exists() else None

    result, plain = run("plain", "dpo")
    assert "columns not used: score_chosen, score_rejected" in " ".join(result.output.split())
    result, weighted = run("weighted", "dpo", weight=3)
    assert "columns not used: score_chosen, score_rejected\n" in result.output
    assert weighted["before"]["loss"] == pytest.approx(3 * plain["before"]["loss"])
    _, scaled = run("scaled", "dpo", beta=0.4)
    assert scaled["before"]["loss"] == pytest.approx(plain["before"]["loss"])
    assert scaled["after"]["rewards/margins"] > 2 * plain["after"]["rewards/margins"] > 0.01
    result, _ = run("refused", "orpo", beta=0.4)
    assert result.exit_code == 2
    assert "ORPO takes no betas" in " ".join(result.output.split())
    result, _ = run("refused", "dpo", weight=-1)
    assert "'weight' must be a finite number and at least 0, got -1" in result.output


def test_train_evaluates_on_held_out_pairs(tiny_llama, pairs_file, tmp_path):
    more = ["--holdout", "2", "--max-steps", "1", "--objective", "dpo", "--max-length", "8"]
    result = train(tiny_llama, pairs_file, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "columns not used: score_chosen, score_rejected" in result.output
    assert "training pairs are cut, they end beyond max_length=8" in result.output
    assert "on 6 pairs" in result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["evaluated_on"] == "held-out"
    assert results["before"]["rewards/margins"] == 0  # the policy is its reference, bit for bit


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tiny_llama, pairs_file, tmp_path_factory):
    """Four steps of DPO, an epoch, with a checkpoint."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert resume(tiny_llama, pairs_file, output).exit_code == 0
    return output


@pytest.fixture
def run_directory(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "out")


def resume(model, data, output, *more):
    return train(model, data, output, "--resume", "--objective", "dpo", *more)


def test_train_resumes(tiny_llama, pairs_file, tmp_path):
    more = ["--resume", "--max-steps"]
    assert train(tiny_llama, pairs_file, tmp_path / "o", *more, "4").exit_code == 0
    again = train(tiny_llama, pairs_file, tmp_path / "o", *more, "8", "--epochs", "2")
    assert again.exit_code == 0, again.output
    assert "8/8" in again.output
    assert "continues after step 4" in again.output
    assert "4 steps in" in again.output
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [entry["step"] for entry in results["steps"]] == list(range(1, 9))


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--objective", "simpo"], "objective: DPO in the checkpoint, SimPO asked for"),
        (["--beta", "0.3"], "beta: 0.1 in the checkpoint, 0.3 asked for"),
        (["--balance"], "balance: None in the checkpoint, {'source': 'policy'"),
        (["--learning-rate", "1e-3"], "learning_rate: 1e-06 in the checkpoint, 0.001 asked for"),
        (["--batch-size", "1"], "batch_size: 2 in the checkpoint, 1 asked for"),
        (["--grad-accum", "2"], "batches_an_update: 1 in the checkpoint, 2 asked for"),
        (["--max-length", "64"], "max_length: 1024 in the checkpoint, 64 asked for"),
        (["--lora"], "lora_rank: None in the checkpoint, 16 asked for"),
        (["--dtype", "bfloat16"], "dtype: float32 in the checkpoint, bfloat16 asked for"),
        (["--seed", "1"], "seed: 0 in the checkpoint, 1 asked for"),
        (["--holdout", "2"], "data: 8 pairs, sha256 "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_is_not_resumed(more, difference, tiny_llama, pairs_file, finished_run):
    before = (finished_run / "results.json").read_bytes()
    result = resume(tiny_llama, pairs_file, finished_run, "--epochs", "2", *more)
    assert result.exit_code == 2, result.output
    assert difference in result.output
    assert (finished_run / "results.json").read_bytes() == before


def test_other_pairs_or_weights_in_the_same_place_are_not_resumed(
    tiny_llama, pairs, finished_run, tmp_path
):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair | {"chosen": "red"}) + "\n" for pair in pairs))
    result = resume(tiny_llama, data, finished_run)
    assert result.exit_code == 2
    assert "data: 8 pairs, sha256 " in result.output
    data.write_text("".join(json.dumps(pair | {"weight": 2}) + "\n" for pair in pairs))
    result = resume(tiny_llama, data, finished_run)
    assert result.exit_code == 2
    assert "data: 8 pairs, sha256 " in result.output
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    trained = shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copy(finished_run / "model.safetensors", trained)
    result = resume(trained, data, finished_run)
    assert result.exit_code == 2
    assert "model: sha256 " in result.output
    assert "data:" not in result.output.split("given then")[1]


def test_a_checkpoint_that_does_not_say_what_made_it(tiny_llama, pairs_file, run_directory):
    (run_directory / "checkpoint-4" / "fastpref_run.json").unlink()
    result = resume(tiny_llama, pairs_file, run_directory)
    assert result.exit_code == 2
    assert "fastpref_run.json, which says what made it" in result.output.replace("\n", " ")


@pytest.mark.parametrize("length", [["--epochs", "1"], ["--epochs", "0.5"], ["--max-steps", "3"]])
def test_a_finished_run_says_so(length, tiny_llama, pairs, run_directory, tmp_path):
    """Wherever model and pairs lie now."""
    model = shutil.copytree(tiny_llama, tmp_path / "moved")
    data = tmp_path / "moved.jsonl"
    data.write_text("\n\n".join(json.dumps(pair) for pair in pairs))
    before = {path: path.stat().st_mtime_ns for path in run_directory.rglob("*")}
    result = resume(model, data, run_directory, *length)
    assert result.exit_code == 0, result.output
    assert "this run is finished: 4 steps, 1 epochs are trained" in result.output
    assert "reward accuracy" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in run_directory.rglob("*")}


def test_a_run_interrupted_before_its_end_was_evaluated(tiny_llama, pairs_file, run_directory):
    was = json.loads((run_directory / "results.json").read_text())
    (run_directory / "results.json").unlink()
    (run_directory / "model.safetensors").unlink()
    result = resume(tiny_llama, pairs_file, run_directory, "--max-steps", "3")
    assert result.exit_code == 0, result.output
    assert "0 steps in" in result.output
    results = json.loads((run_directory / "results.json").read_text())
    assert {name: results[name] for name in ("before", "after", "steps")} == {
        name: was[name] for name in ("before", "after", "steps")
    }
    assert (run_directory / "model.safetensors").exists()


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "ppo"], "unknown objective 'ppo'"),
        (["--objective", "dpo", "--eta", "1"], "DPO has no hyperparameter 'eta'"),
        (["--beta", "nan"], "beta must be"),
        (["--objective", "discopop", "--set", "tau"], "--set takes NAME=VALUE, got 'tau'"),
        (["--objective", "discopop", "--set", "tau=x"], "tau must be a number, got 'x'"),
        (["--objective", "discopop", "--set", "sigma=1"], "no hyperparameter 'sigma'"),
        (["--beta", "1", "--set", "beta=2"], "beta is given twice"),
        (["--objective", "sft", "--balance"], "no hyperparameter 'balance'"),
        (["--holdout", "8"], "leaves none of 8 pairs"),
        (["--schedule", "fast"], "unknown schedule 'fast'"),
        (["--output", "/proc/out"], "/proc/out"),
    ],
)
def test_train_refuses_bad_settings(more, message, tiny_llama, pairs_file, tmp_path):
    result = train(tiny_llama, pairs_file, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("holdout", [-3]),
        ("epochs", [0.0, -1.0, math.nan, math.inf]),
        ("max_steps", [0, -2]),
        ("learning_rate", [-1e-6, math.nan, math.inf]),
        ("batch_size", [0, -1]),
        ("grad_accum", [0, -1]),
        ("max_length", [0, -1]),
        ("seed", [-1, 2**32]),
        ("dtype", ["float16", "", "int8"]),
    ],
)
def test_every_number_of_a_run_has_its_bounds(name, values, tiny_llama, pairs_file, tmp_path):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be"):
            TrainSettings("model", pairs_file, tmp_path, **{name: value})
    option = f"--{name.replace('_', '-')}={values[0]}"
    result = train(tiny_llama, pairs_file, tmp_path / "out", option)
    assert result.exit_code == 2
    assert f"{name} must be" in result.output


def test_adapters_have_a_learning_rate_of_their_own(pairs_file, tmp_path):
    given = "model", pairs_file, tmp_path
    assert TrainSettings(*given).learning_rate == 1e-6
    assert TrainSettings(*given, lora=True).learning_rate == 2e-4
    assert TrainSettings(*given, lora=True, learning_rate=1e-5).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-rank", "8"], "lora_rank is that of adapters"),
        (["--lora", "--lora-rank", "0"], "lora_rank must be"),
        (["--holdout", "2", "--eval-data", "x"], "holdout and eval_data"),
        (["--no-balance", "--balance-ceiling", "4"], "contradicts --balance-ceiling"),
        (["--no-balance", "--balance-source", "policy"], "contradicts --balance-source"),
        (["--objective", "adadpo", "--no-balance"], "contradicts --objective adadpo"),
        (["--balance-source", "chosen"], "source must be"),
        (["--balance-ceiling", "nan"], "ceiling must be"),
    ],
)
def test_settings_that_contradict_each_other(more, message, tiny_llama, pairs_file, tmp_path):
    result = train(tiny_llama, pairs_file, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ((None, None, None), None),
        ((False, None, None), None),
        ((True, None, None), {}),
        ((None, 1.5, None), {"ceiling": 1.5}),
        ((True, None, "implicit_reward"), {"source": "implicit_reward"}),
        ((None, 3.0, "policy"), {"ceiling": 3.0, "source": "policy"}),
    ],
)
def test_balance_options(options, fields):
    expected = None if fields is None else make_objective("dpo", balance=fields or True)
    found = make_objective("dpo", balance=cli._balance("dpo", *options))
    assert found == (expected or make_objective("dpo"))


def test_pairs_that_max_length_leaves_out_are_named(tiny_llama, pairs, tmp_path):
    data, longer = tmp_path / "pairs.jsonl", tmp_path / "longer.jsonl"
    long = {"prompt": "the sea " * 20}
    rows = [pair | (long if number in (2, 5) else {}) for number, pair in enumerate(pairs)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer.write_text(json.dumps(pairs[0] | long) + "\n" + json.dumps(pairs[0]))
    more = ["--max-length", "16", "--eval-data", str(longer)]
    result = train(tiny_llama, data, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    output = result.output.replace("\n", "")
    assert "2 of 8 training pairs are left out, their prompts have max_length=16 tokens" in output
    assert f"{data}:3  {data}:6" in output
    assert "1 of 2 held-out pairs are left out" in output
    assert f"{longer}:1" in output
    assert "on 6 pairs" in output
    assert "evaluated on 1 held-out" in output


def test_max_length_that_leaves_no_pair(tiny_llama, pairs_file, tmp_path):
    result = train(tiny_llama, pairs_file, tmp_path / "out", "--max-length", "2")
    assert result.exit_code == 2
    assert "8 of 8 training pairs are left out" in result.output


@pytest.mark.parametrize("reference", ["--precompute-ref", "--no-precompute-ref"])
@pytest.mark.parametrize("adapters", [[], ["--lora"]], ids=["full", "lora"])
def test_bfloat16(adapters, reference, tiny_llama, pairs_file, finished_run, tmp_path, monkeypatch):
    """Of products and frozen weights; what trains is float32, and the policy is its reference."""
    from transformers import AutoModelForCausalLM

    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        loaded.append(kwargs["dtype"])
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    output = tmp_path / "out"
    more = ["--dtype", "bfloat16", "--objective", "dpo", "--max-steps", "1", reference, *adapters]
    result = train(tiny_llama, pairs_file, output, *more)
    assert result.exit_code == 0, result.output
    assert loaded == [torch.bfloat16 if adapters else torch.float32]
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    with safe_open(output / name, "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float32}  # noqa: SIM118
    results = json.loads((output / "results.json").read_text())
    assert results["dtype"] == "bfloat16"
    assert results["before"]["rewards/margins"] == 0
    in_float32 = json.loads((finished_run / "results.json").read_text())
    assert results["before"]["logps/chosen"] != in_float32["before"]["logps/chosen"]


def test_dtype_of_the_machine(monkeypatch):
    from fastpref.commands import train as command

    for has_it, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda x=has_it: x)
        assert command._dtype("auto") == expected
        assert command._dtype("float32") == "float32"


# --- data ---------------------------------------------------------------------------------------


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture
def chat_llama(tiny_llama, tmp_path):
    directory = shutil.copytree(tiny_llama, tmp_path / "chat-llama")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def conversation(pair, name):
    return [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": pair[name]},
    ]


def test_train_on_conversations(chat_llama, pairs, tmp_path):
    """The same pairs as text, explicit, and as conversations, implicit, train the same."""
    as_text, as_chat = tmp_path / "text.jsonl", tmp_path / "chat.json"
    as_text.write_text("\n".join(json.dumps(pair) for pair in pairs))
    names = ("chosen", "rejected")
    as_chat.write_text(
        json.dumps([pair | {name: conversation(pair, name) for name in names} for pair in pairs])
    )
    found = []
    for data in (as_text, as_chat):
        result = train(chat_llama, data, tmp_path / data.stem, "--max-steps", "1")
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / data.stem / "results.json").read_text())["after"])
    assert found[0] == found[1]


def test_text_that_breaks_off_is_no_turn(chat_llama, tmp_path):
    from fastpref.commands.data import Pair
    from fastpref.commands.train import examples

    pair = Pair("f:1", "Q: why? A:", " so", " no", continues=True)
    (row,) = examples([pair], has_template=True)
    assert row["prompt"] == "Q: why? A:"
    turns = Pair("f:2", [{"role": "user", "content": "p"}], *[[{"role": "assistant"}]] * 2)
    with pytest.raises(ValueError, match="f:2 is of another kind than f:1"):
        examples([pair, turns], has_template=True)


def test_conversations_need_a_chat_template(tiny_llama, pairs, tmp_path):
    data = tmp_path / "chat.jsonl"
    row = {name: conversation(pairs[0], name) for name in ("chosen", "rejected")}
    data.write_text(json.dumps(row))
    result = train(tiny_llama, data, tmp_path / "out", "--objective", "dpo")
    assert result.exit_code == 2
    assert f"{data}:1 holds messages" in result.output.replace("\n", "")
    assert "no chat template" in result.output


def test_train_reports_bad_data_before_the_model_is_loaded(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "p", "chosen": "c", "rejected": ""}\n')
    result = train(tmp_path / "no-model", data, tmp_path / "out", "--objective", "dpo")
    assert result.exit_code == 2
    assert f"{data}:1: 'rejected' is empty" in result.output.replace("\n", "")
    missing = train(tmp_path / "no-model", tmp_path / "no.jsonl", tmp_path / "out")
    assert missing.exit_code == 2
    assert "no.jsonl" in missing.output


def test_verify_passes_here(monkeypatch):
    monkeypatch.setattr(cli, "SHAPES", verify.SHAPES[:2])
    result = run(app, ["verify", "--objective", "unidpo", "--dtype", "float32", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "all within the allowed error" in result.output


def test_verify_fails_where_a_number_is_wrong(monkeypatch):
    """A factor of 1 + 1e-5 on the log-sum-exp is more than float32 may lose."""
    from fastpref.backends import torch_backend

    original = torch_backend.group_forward

    def wrong(*args):
        found = original(*args)
        found.logps *= 1 + 1e-5
        return found

    monkeypatch.setattr(torch_backend, "group_forward", wrong)
    monkeypatch.setattr(cli, "SHAPES", verify.SHAPES[1:2])
    result = run(app, ["verify", "--objective", "dpo", "--dtype", "float32", "--device", "cpu"])
    assert result.exit_code == 1, result.output
    assert "beyond" in result.output


@pytest.mark.gpu
def test_verify_on_a_gpu():
    device = torch.accelerator.current_accelerator().type
    result = run(app, ["verify", "--device", device])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "ppo"], "unknown objective"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--dtype", "float8_e4m3fn"], "unknown dtype"),
        (["--backend", "x"], "unknown backend"),
        (["--device", "nonsense"], "no device 'nonsense'"),
        (["--device", "meta"], "no device 'meta'"),
        (["--device", "cpu:"], "no device 'cpu:'"),
        (["--output", "table.json"], "--compile"),
        (["--compile", "--dtype", "float32"], "--compile takes --output only"),
        (["--compile", "--output", "/proc/x/y.json"], "/proc/x"),
    ],
)
def test_verify_refuses(more, message):
    result = run(app, ["verify", *more])
    assert result.exit_code == 2
    assert message in result.output


def test_verify_refuses_a_backend_that_cannot_run(monkeypatch):
    import fastpref_kernels

    monkeypatch.setattr(fastpref_kernels, "unavailable_reason", lambda device: "not here")
    result = run(app, ["verify", "--device", "cpu", "--backend", "triton"])
    assert result.exit_code == 2
    assert "backend='triton': not here" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_verify_refuses_a_device_that_is_not_there():
    result = run(app, ["verify", "--device", "cuda"])
    assert result.exit_code == 2
    assert "no device 'cuda' here" in result.output


def test_a_directory_without_a_model(pairs_file, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    found = [
        train(empty, pairs_file, tmp_path / "out"),
        run(app, ["plan", "--model", str(empty)]),
        run(app, ["bench", "--model", str(empty)]),
    ]
    for result in found:
        assert result.exit_code == 2
        assert f"no model in the directory {empty}" in result.output.replace("\n", "")


def test_a_model_without_a_tokenizer(tiny_llama, pairs_file, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    result = train(model, pairs_file, tmp_path / "out")
    assert result.exit_code == 2
    assert f"no tokenizer at {model}" in result.output.replace("\n", "")


# --- what is printed ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 40])
def test_tables_keep_their_figures(width):
    """Words wrap; figures stand, if need be beyond the edge."""
    table = tables.new_table("title", "", *(f"column {i}" for i in range(6)))
    figures = [f"{i}23,456.789{i}" for i in range(6)]
    table.add_row("a name of several words and then some", *figures)
    console = Console(width=width, file=io.StringIO())
    tables.show(console, table)
    text = console.file.getvalue()
    assert "…" not in text
    assert all(figure in text for figure in figures)


def test_verify_table_is_whole_where_errors_are_huge(monkeypatch):
    from fastpref.commands.verify import Result

    monkeypatch.setattr(cli, "SHAPES", verify.SHAPES[:1])
    results = [Result("∂W", 123456789.0, 1.0)]
    monkeypatch.setattr(cli, "verify", lambda *_: {"pair_groups": results, "recompute": results})
    result = run(app, ["verify", "--device", "cpu"])
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if "pair_groups" in line]
    assert lines and all(line.count("1.2e+08 ∂W") == 4 for line in lines)
    assert max(len(line) for line in lines) <= 80


def test_errors_keep_their_brackets_and_go_to_standard_error(tmp_path):
    result = run(app, ["plan", "--model", str(tmp_path), "--gpu", "[red]x[/red]"])
    assert "unknown GPU '[red]x[/red]'" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["train", "verify", "bench", "plan"])
def test_help_is_whole_at_80_columns(command):
    result = run(app, [command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert "…" not in result.output
