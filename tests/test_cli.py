"""The commands, as a user types them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fastpref.commands import cli, verify
from fastpref.commands.cli import app

run = CliRunner().invoke


def train(model, data, output, *more):
    paths = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return run(app, ["train", *paths, *more])


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "objective", "saved"),
    [
        (["--eta", "0.5"], "UniDPO(balance=None, beta=2.0, eta=0.5", "config.json"),
        (
            ["--objective", "adadpo", "--lora", "--balance-clip", "3"],
            "ceiling=3.0",
            "adapter_config.json",
        ),
        (["--objective", "simpo", "--balance"], "SimPO(balance=Balance(", "config.json"),
    ],
    ids=["unidpo", "adadpo-lora", "simpo"],
)
def test_train(more, objective, saved, tiny_llama, pairs_file, tmp_path):
    output = tmp_path / "out"
    result = train(tiny_llama, pairs_file, output, "--learning-rate", "1e-3", *more)
    assert result.exit_code == 0, result.output
    assert "reward margin" in result.output
    assert "curves.png" in result.output.replace("\n", "")
    assert is_png(output / "curves.png")
    assert (output / saved).exists()
    results = json.loads((output / "results.json").read_text())
    assert objective in results["objective"]
    assert results["after"]["rewards/margins"] > results["before"]["rewards/margins"]
    assert len(results["steps"]) == 4
    step = results["steps"][0]
    assert {"loss", "rewards/margins", "logps/chosen", "logps/rejected"} <= step.keys()


def test_train_evaluates_on_held_out_pairs(tiny_llama, pairs_file, tmp_path):
    result = train(tiny_llama, pairs_file, tmp_path / "out", "--holdout", "2", "--max-steps", "1")
    assert result.exit_code == 0, result.output
    assert "on 6 pairs" in result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["evaluated_on"] == "held-out"
    assert results["before"]["rewards/margins"] == 0  # the policy is its reference, bit for bit


def test_train_resumes(tiny_llama, pairs_file, tmp_path):
    more = ["--resume", "--max-steps"]
    assert train(tiny_llama, pairs_file, tmp_path / "o", *more, "4").exit_code == 0
    again = train(tiny_llama, pairs_file, tmp_path / "o", *more, "8", "--epochs", "2")
    assert again.exit_code == 0, again.output
    assert "8/8" in again.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "ppo"], "unknown objective 'ppo'"),
        (["--objective", "dpo", "--eta", "1"], "DPO has no hyperparameter 'eta'"),
        (["--holdout", "8"], "leaves none of 8 pairs"),
        (["--schedule", "fast"], "unknown schedule 'fast'"),
    ],
)
def test_train_refuses_bad_settings(more, message, tiny_llama, pairs_file, tmp_path):
    result = train(tiny_llama, pairs_file, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in result.output


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


@pytest.mark.parametrize("more", [["--objective", "ppo"], ["--dtype", "int8"], ["--backend", "x"]])
def test_verify_refuses_unknown_names(more):
    result = run(app, ["verify", *more])
    assert result.exit_code == 2
    assert "unknown" in result.output
