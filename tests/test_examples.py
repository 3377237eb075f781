"""The examples run as the README says, and what they train is right."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture
def run(monkeypatch):
    """Runs an example as a script would, in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")

    return run


def weights(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return dict(model.named_parameters())


def assert_same_training(first, second, started):
    """The same steps of gradient descent: changes differ by some hundred roundings of a gradient,
    and a weight of 1 that they are added to rounds by 6e-8."""
    first, second, started = map(weights, (first, second, started))
    for name, parameter in first.items():
        change = parameter - started[name]
        assert change.any(), name
        error = (second[name] - parameter).abs().max()
        assert error <= 5e-5 * change.abs().max() + 2e-7, name


def test_plain_loop_on_one_process_and_two(run, capsys, tiny_llama, pairs_file, tmp_path):
    """The mean of two means of two pairs is the mean of four: the head's gradient too is summed."""
    script, given = EXAMPLES / "pytorch_loop.py", (tiny_llama, pairs_file)
    run(script, *given, tmp_path / "one")
    losses = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    assert losses[0] == f"loss {torch.tensor(2.0).log():.4f}"
    assert len(losses) == 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--standalone", script, *given, tmp_path / "two"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "one", tmp_path / "two", tiny_llama)


def test_transformers_trainer_accumulates(run, tiny_llama, pairs, tmp_path):
    """Four pairs a step at once or in two parts, though the last part is a short one."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:7]))
    steps = "--optim sgd --learning_rate 0.05 --lr_scheduler_type constant --max_grad_norm 0"
    quiet = "--use_cpu true --disable_tqdm true --save_strategy no --report_to none"
    common = f"--num_train_epochs 1 --seed 3 {steps} {quiet}".split()
    for out, parts in (("whole", 1), ("parts", 2)):
        sizes = f"--per_device_train_batch_size {4 // parts} --gradient_accumulation_steps {parts}"
        script = EXAMPLES / "transformers_trainer.py", tiny_llama, data
        run(*script, "--output_dir", tmp_path / out, *common, *sizes.split())
    assert_same_training(tmp_path / "whole", tmp_path / "parts", tiny_llama)
