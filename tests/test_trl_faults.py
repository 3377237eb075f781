"""Faults: a sentence on every rank or the right result, never a hang nor a saved model of NaN."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import TrainerCallback
from trl_runs import OURS, make_trainer

import fastpref
from fastpref.trl.faults import resumable

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}
LIMIT = 240  # seconds for what takes ten


class At(TrainerCallback):
    """Does something once, as a step begins (counted from 1)."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            self.action()


def broken(trainer, step, row=0, value=float("nan"), when=lambda: True):
    """Has the policy's last hidden states be no numbers, of one sequence of one step."""

    def spoil(_, __, output):
        if trainer.model.training and trainer.state.global_step + 1 == step and when():
            hidden = output.last_hidden_state.clone()
            hidden[row] = value
            output.last_hidden_state = hidden
        return output

    trainer.model.model.register_forward_hook(spoil)
    return trainer


def weights(trainer):
    return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def error_of(function, *arguments, **options):
    """What it raises, in words."""
    try:
        function(*arguments, **options)
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}"
    return ""


# --- numbers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_plain_loss_does_not_hide_it(value):
    hidden, weight = torch.randn(4, 3, 8), torch.randn(11, 8)
    hidden[1, 1] = value
    targets = torch.randint(11, (4, 3))
    hidden.requires_grad_()
    out = fastpref.preference_loss(hidden, weight, targets, "simpo")
    assert not out.loss.isfinite()
    assert out.losses.isfinite().tolist() == [True, False]
    out.loss.backward()
    assert not hidden.grad.isfinite().all()
    targets[1, 1] = -100  # of a row that nobody scores it is nothing
    assert fastpref.preference_loss(hidden, weight, targets, "simpo").loss.isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(value, tiny_llama, pairs, tmp_path):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **CHECKPOINTS)
    broken(trainer, step=2, row=3, value=value)
    kept = {}
    trainer.add_callback(At(2, lambda: kept.update(weights(trainer))))
    with pytest.raises(FloatingPointError, match=r"loss of step 2 .*\n  rank 0: pair 1 .*log-prob"):
        trainer.train()
    assert same(weights(trainer), kept)
    assert sorted(path.name for path in Path(tmp_path, "out").glob("check*")) == ["checkpoint-1"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_that_is_skipped(accumulated, tiny_llama, pairs, tmp_path):
    options = {"max_steps": 3, "gradient_accumulation_steps": accumulated}
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, on_nonfinite="skip", **options)
    calls = []
    broken(trainer, step=2, when=lambda: calls.append(0) or len(calls) == 1)  # one batch of it
    kept = {}
    trainer.add_callback(At(2, lambda: kept.update(before=weights(trainer))))
    trainer.add_callback(At(3, lambda: kept.update(after=weights(trainer))))
    trainer.train()
    assert same(kept["after"], kept["before"])
    assert not same(weights(trainer), kept["after"])
    assert all(x.isfinite().all() for x in weights(trainer).values())
    assert [entry.get("skipped_steps") for entry in steps(trainer)][::2] == [None, 1]


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite(norm, tiny_llama, pairs, tmp_path):
    options = {"max_grad_norm": norm, "max_steps": 1}
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **options)
    kept = weights(trainer)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="gradient of step 1 has the norm nan"):
        trainer.train()
    assert same(weights(trainer), kept)
    trainer.args.on_nonfinite, trainer._raises = "skip", False
    trainer.train()
    assert same(weights(trainer), kept)
    assert steps(trainer)[0]["skipped_steps"] == 1


def test_a_model_of_nan_is_not_saved(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(
        OURS, tiny_llama, pairs, tmp_path, on_nonfinite="skip", **CHECKPOINTS, max_steps=1
    )

    def spoil(*_):
        with torch.no_grad():
            trainer.model.lm_head.weight[5, 5] = float("nan")

    trainer.add_callback(At(1, lambda: trainer.optimizer.optimizer.register_step_post_hook(spoil)))
    with pytest.raises(FloatingPointError, match="weights .* checkpoint of step 1 is not written"):
        trainer.train()
    with pytest.raises(FloatingPointError, match="not saved to"):
        trainer.save_model()
    assert not [*Path(tmp_path, "out").rglob("*.safetensors")]
    with pytest.raises(FloatingPointError, match="weights of the model are not finite either"):
        trainer.train()  # whose every step would be skipped


def test_what_to_do_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite 'ignore'; expected one of"):
        fastpref.trl.PreferenceConfig(str(tmp_path), use_cpu=True, on_nonfinite="ignore")


# --- ends and beginnings ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tiny_llama, pairs, tmp_path_factory):
    """A run of four steps, with dropout, and where its checkpoints are."""
    directory = tmp_path_factory.mktemp("whole")
    return run_of(tiny_llama, pairs, directory), directory


@pytest.fixture
def uninterrupted(whole_run, tmp_path):
    """That run, with a copy of its checkpoints in tmp_path / "whole"."""
    trainer, directory = whole_run
    shutil.copytree(directory, tmp_path / "whole")
    return trainer


def run_of(directory, pairs, tmp_path, *, action=None, resume=None, **options):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, **CHECKPOINTS, **options}
    trainer = make_trainer(OURS, directory, pairs, tmp_path, **options)
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.2  # random numbers go on, too
    if action is not None:
        trainer.add_callback(At(2, lambda: action(trainer)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("left", [None, '{"epoch": 0.5, "glob'])
def test_a_checkpoint_that_was_not_finished(left, uninterrupted, tiny_llama, pairs, tmp_path):
    out = tmp_path / "whole" / "out"
    state = out / "checkpoint-4" / "trainer_state.json"
    state.unlink() if left is None else state.write_text(left)
    Path(out, "checkpoint-3", "checkpoint-is-incomplete.txt").touch()
    with pytest.raises(ValueError, match="checkpoint-4 was not written to its end"):
        run_of(tiny_llama, pairs, tmp_path / "whole", resume=str(out / "checkpoint-4"))
    resumed = run_of(tiny_llama, pairs, tmp_path / "whole", resume=True)
    assert [entry["step"] for entry in steps(resumed)] == [1, 2, 3, 4]
    assert same(weights(resumed), weights(uninterrupted))
    for checkpoint in out.glob("checkpoint-*"):
        Path(checkpoint, "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* was written to its end"):
        run_of(tiny_llama, pairs, tmp_path / "whole", resume=True)


def test_resuming_with_other_steps(uninterrupted, tiny_llama, pairs, tmp_path):
    options = {"resume": True, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match="took 4 pairs a step .* takes 2"):
        run_of(tiny_llama, pairs, tmp_path / "whole", **options)
    run_of(tiny_llama, pairs, tmp_path / "whole", ignore_data_skip=True, max_steps=5, **options)


def told_to_end(trainer):
    """SIGTERM, and the seconds that transformers waits for a SIGKILL gone by."""
    os.kill(os.getpid(), signal.SIGTERM)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


@pytest.fixture
def at_once(monkeypatch):
    from transformers.trainer_jit_checkpoint import CheckpointManager

    monkeypatch.setattr(CheckpointManager.__init__, "__defaults__", (0,))


def test_sigterm_saves_and_stops(at_once, uninterrupted, tiny_llama, pairs, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    options = {"enable_jit_checkpoint": True, "save_steps": 100}
    stopped = run_of(tiny_llama, pairs, tmp_path / "cut", action=told_to_end, **options)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert stopped.state.global_step == 2
    resumed = run_of(tiny_llama, pairs, tmp_path / "cut", resume=True)
    assert [entry["step"] for entry in steps(resumed)] == [1, 2, 3, 4]
    assert same(weights(resumed), weights(uninterrupted))


WRITES = ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")


def while_writing(trainer, step, action):
    """Before the checkpoint of a step is begun, and after each of its parts: action(part)."""

    def then(name, stock):
        def write(*args, **kwargs):
            if trainer.state.global_step != step:
                return stock(*args, **kwargs)
            if name == WRITES[0]:
                action("nothing")
            stock(*args, **kwargs)
            return action(name)

        return write

    for name in WRITES:
        setattr(trainer, name, then(name, getattr(trainer, name)))


@pytest.mark.parametrize("left", ["nothing", "an older run's", "an older run's unfinished"])
def test_a_run_that_ends_as_it_writes(left, uninterrupted, tiny_llama, pairs, tmp_path):
    """At each moment of it, the checkpoint before is the one to resume from."""
    out = tmp_path / "whole" / "out"
    for step in range(2 if left == "nothing" else 3, 5):
        shutil.rmtree(out / f"checkpoint-{step}")
    if left.endswith("unfinished"):
        Path(out, "checkpoint-2", "checkpoint-is-incomplete.txt").touch()
    last, found = Path(resumable(True, str(out))).name, []
    assert (last == "checkpoint-2") == (left == "an older run's")
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, **CHECKPOINTS}
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path / "whole", **options)
    while_writing(trainer, 2, lambda _: found.append(Path(resumable(True, str(out))).name))
    trainer.add_callback(At(3, lambda: found.append(Path(resumable(True, str(out))).name)))
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert found == ["checkpoint-1"] * (1 + len(WRITES)) + ["checkpoint-2"]


@pytest.mark.parametrize("part", WRITES)
def test_sigterm_as_a_checkpoint_is_written(
    part, at_once, uninterrupted, tiny_llama, pairs, tmp_path
):
    """It is written to its end; the next step is the last."""

    def write_and_be_told(trainer):
        while_writing(trainer, 2, lambda done: done == part and told_to_end(trainer))

    stopped = run_of(
        tiny_llama, pairs, tmp_path / "cut", action=write_and_be_told, enable_jit_checkpoint=True
    )
    assert stopped.state.global_step == 3
    out = tmp_path / "cut" / "out"
    for step in (3, 2):
        assert resumable(True, str(out)) == str(out / f"checkpoint-{step}")
        resumed = run_of(tiny_llama, pairs, tmp_path / "cut", resume=True)
        assert same(weights(resumed), weights(uninterrupted))
        for later in range(step, 5):
            shutil.rmtree(out / f"checkpoint-{later}")


# --- streams ------------------------------------------------------------------------------------


def stream(pairs, shards=1):
    return Dataset.from_list(pairs).to_iterable_dataset(num_shards=shards)


def test_the_rest_of_a_stream_makes_no_step(tiny_llama, pairs, tmp_path, caplog):
    """Five batches of one pair, two a step: their fifth is not half of the next epoch's first."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    trainer = make_trainer(OURS, tiny_llama, stream(pairs[:5]), tmp_path, max_steps=4, **options)
    seen = []
    inner = trainer.training_step
    trainer.training_step = lambda *args: seen.append(trainer.state.global_step) or inner(*args)
    trainer.train()
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "for which ranks have [1] of 2 batches" in caplog.text


# --- several ranks ------------------------------------------------------------------------------


def of_ranks(rank, directory, pairs, tmp_path):
    """One fault after the other, each on rank 1 alone: what this rank came to."""
    found = {}

    def trainer_of(name, data=pairs, **options):
        return make_trainer(OURS, directory, data, tmp_path / name, **options)

    trainer = broken(trainer_of("nan"), step=1, row=1, when=lambda: rank == 1)
    kept = weights(trainer)
    found["nan"] = error_of(trainer.train), same(weights(trainer), kept)

    trainer = trainer_of("skip", on_nonfinite="skip")
    broken(trainer, step=1, when=lambda: rank == 1).train()
    found["skip"] = weights(trainer), steps(trainer)[-1]["skipped_steps"]

    trainer = trainer_of("collator")
    inner = trainer.data_collator

    def collator(examples):
        if rank == 1 and trainer.state.global_step == 2:
            raise KeyError("a column that is not there")
        return inner(examples)

    trainer.data_collator = collator
    trainer.args.max_steps = 4
    found["collator"] = error_of(trainer.train)

    trainer = trainer_of("lengths", pairs[: 4 + 4 * rank], max_steps=-1, num_train_epochs=1)
    loader = torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=2, collate_fn=trainer.data_collator
    )
    trainer.get_train_dataloader = lambda: loader
    found["lengths"] = error_of(trainer.train)

    # Shards are shared out: this rank's has two pairs, the other's six.
    uneven = concatenate_datasets([stream(pairs[:2]), stream(pairs[2:])])
    assert isinstance(uneven, IterableDataset) and uneven.n_shards == 2
    options = {"max_steps": 3, "per_device_eval_batch_size": 2}
    trainer = trainer_of("stream", uneven, eval_pairs=uneven, **options)
    trainer.train()
    found["stream"] = trainer.state.global_step, weights(trainer)
    found["evaluation"] = error_of(trainer.evaluate)

    from transformers.trainer_jit_checkpoint import CheckpointManager

    CheckpointManager.__init__.__defaults__ = (0,)
    whole = run_of(directory, pairs, tmp_path / "whole", save_steps=100)
    trainer = run_of(
        directory,
        pairs,
        tmp_path / "cut",
        action=lambda trainer: rank == 1 and told_to_end(trainer),
        enable_jit_checkpoint=True,
        save_steps=100,
    )
    found["sigterm"] = trainer.state.global_step
    resumed = run_of(directory, pairs, tmp_path / "cut", resume=True, save_steps=100)
    found["resumed"] = weights(whole), weights(resumed)

    def write_and_be_told(trainer):
        def tell(done):
            if rank == 1 and done == "_save_optimizer_and_scheduler":
                told_to_end(trainer)

        while_writing(trainer, 2, tell)

    options = {"action": write_and_be_told, "enable_jit_checkpoint": True}
    trainer = run_of(directory, pairs, tmp_path / "written", **options)
    found["written"] = trainer.state.global_step
    for step in (2, 3):
        path = tmp_path / "written" / "out" / f"checkpoint-{step}"
        resumable(str(path), "")
    return found


def test_two_ranks(two_ranks, tiny_llama, pairs, tmp_path):
    first, second = two_ranks.run(of_ranks, tiny_llama, pairs, tmp_path, seconds=LIMIT)

    message, kept = first["nan"]
    assert kept and second["nan"] == (message, True)
    assert re.match(r"FloatingPointError: the loss of step 1 .*\n  rank 1: pair 1 \(its", message)
    assert "rank 0" not in message

    (ours, skipped), (theirs, also) = first["skip"], second["skip"]
    assert skipped == also == 1 and same(ours, theirs)
    assert all(x.isfinite().all() for x in ours.values())

    assert second["collator"] == "KeyError: 'a column that is not there'"
    assert "rank 1: KeyError: 'a column that is not there'" in first["collator"]
    assert first["collator"].startswith("RuntimeError: no batch for step 3")

    for found in (first, second):
        assert "ranks 0 to 1 would train [2, 4] steps" in found["lengths"]
        assert found["stream"][0] == 3
        assert "gives ranks [0] 1 batches and the others more" in found["evaluation"]
        assert found["sigterm"] == 2
        assert found["written"] == 3
        whole, resumed = found["resumed"]
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    assert same(first["stream"][1], second["stream"][1])


SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trl_faults import At, CHECKPOINTS
from trl_runs import OURS, make_trainer

pairs = json.loads({pairs!r})
trainer = make_trainer(OURS, Path({model!r}), pairs, Path({out!r}), max_steps=4, **CHECKPOINTS)

def die(*_):
    if trainer.state.global_step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

trainer.model.model.register_forward_hook(die)
trainer.train()
trainer.save_model()
"""


def test_a_rank_killed_in_mid_step_ends_the_others(tiny_llama, pairs, tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(
        SCRIPT.format(
            tests=tests, pairs=json.dumps(pairs), model=str(tiny_llama), out=str(tmp_path)
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode != 0
    assert "exitcode  : -9" in ended.stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
