"""`fastpref train` on several processes, and what is planned for them."""

import io
import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from ranks import Ranks, start_deepspeed
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed, nn
from trl_runs import OURS, make_trainer, trained
from typer.testing import CliRunner

from fastpref import DPO, preference_loss
from fastpref.commands.cli import ENGINES, app
from fastpref.commands.plan import problem_for
from fastpref.commands.train import DATA_SETS, TrainSettings, load_policy, train
from fastpref.planner import Exchange, Layout

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))  # last: names are there and here

import scale  # noqa: E402

# Between one process and two: sums of float32 in another order, some hundred roundings of 6e-8, and
# as many again in weights that AdamW moves by its rate for a gradient of any size.
ROUNDING = 1e-4
STEPS = {"objective": "dpo", "learning_rate": 1e-3, "resume": True}


def start(launcher, *arguments):
    """Runs a launcher of two processes on the command."""
    command = [sys.executable, "-m", *launcher, "-m", "fastpref", "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run(rank, output, lengths, given):
    """What a process prints in parts of one run, and the last part's results."""
    import fastpref.commands.train as module

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # where accelerate would take all cores
    module.draw_curves = lambda *_, **__: None  # takes as long as training a tiny model
    console = Console(file=io.StringIO(), width=200)
    for steps in lengths:
        settings = TrainSettings(output=output, max_steps=steps, **(STEPS | given))
        results = train(settings, console)
    return console.file.getvalue(), results


def assert_same(results, expected, output, other):
    """Two runs trained and logged the same, to rounding."""
    assert [step["step"] for step in results["steps"]] == [
        step["step"] for step in expected["steps"]
    ]
    for mine, theirs in zip(results["steps"], expected["steps"], strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=ROUNDING, abs=ROUNDING), name
    for part in ("before", "after"):
        assert results[part] == pytest.approx(expected[part], rel=ROUNDING, abs=ROUNDING)
    weights, others = (load_file(place / "model.safetensors") for place in (output, other))
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=ROUNDING, atol=ROUNDING)


@pytest.fixture(scope="module")
def alone(tiny_llama, pairs_file, tmp_path_factory):
    """Two updates of four pairs on one process, then two more: where, and its results."""
    output = tmp_path_factory.mktemp("alone") / "out"
    given = {"model": str(tiny_llama), "data": pairs_file, "batch_size": 4}
    return output, run(0, output, (2, 4), given)[1]


def test_two_processes_train_as_one(two_ranks, alone, tiny_llama, pairs_file, tmp_path):
    """The second part takes up the checkpoint of the first, on two processes and on one."""
    output, expected = tmp_path / "out", alone[1]
    given = {"model": str(tiny_llama), "data": pairs_file, "batch_size": 2}
    (said, results), (silence, others) = two_ranks.run(run, output, (2, 4), given, seconds=200)
    assert "2 processes" in said and "continues after step 2" in said and "numbers" in said
    assert silence == ""
    assert json.loads((output / "results.json").read_text()) == results
    assert (others["after"], others["before"]) == (results["after"], results["before"])
    assert not (output / DATA_SETS).exists()
    assert expected["before"]["rewards/margins"] == 0 < expected["after"]["rewards/margins"]
    assert_same(results, expected, output, alone[0])
    said, finished = run(0, output, (4,), given | {"grad_accum": 2})
    assert "this run is finished" in said
    assert finished["after"] == results["after"]
    with pytest.raises(ValueError, match="batches_an_update: 2 in the checkpoint, 1 asked for"):
        run(0, output, (6,), given)


def test_accelerate_launch(alone, tiny_llama, pairs_file, tmp_path):
    """With the configuration that the command names; one process prints."""
    output = tmp_path / "out"
    config = CliRunner().invoke(app, ["launch", "ddp"]).output.strip()
    launcher = ["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    given = ["--model", tiny_llama, "--data", pairs_file, "--output", output, "--max-steps", "2"]
    options = ["--objective", "dpo", "--learning-rate", "1e-3", "--batch-size", "2"]
    done = start(launcher, *given, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1
    assert done.stdout.count("numbers ") == 1
    assert (output / "curves.png").exists()
    results = json.loads((output / "results.json").read_text())
    assert results["hardware"]["processes"] == 2
    for mine, theirs in zip(results["steps"], alone[1]["steps"][:2], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=ROUNDING)


def test_torchrun_says_once_what_is_wrong(tiny_llama, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "why", "chosen": "red"}\n')
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = ["--model", tiny_llama, "--data", data, "--output", tmp_path / "out"]
    done = start(launcher, *given, "--objective", "dpo")
    assert done.returncode != 0
    assert done.stderr.count("error:") == 1
    assert done.stderr.count(f"{data}:1") == 1
    assert "fastpref/commands" not in done.stderr  # no traceback


def disagree(rank, directory):
    from fastpref.commands.processes import on_main, processes, together

    processes()
    found = [on_main(lambda: rank + 7)]
    for failing, problem in ((1, OSError("no room")), (0, TypeError("no number"))):
        try:
            with together():
                if rank >= failing:
                    raise problem
        except (Exception, SystemExit) as raised:
            found.append((type(raised), str(raised)))
    return found


def test_a_problem_of_one_process_ends_all(two_ranks, tmp_path):
    first, second = two_ranks.run(disagree, tmp_path)
    assert first == [7, (ValueError, "process 1: no room"), (TypeError, "no number")]
    assert second == [7, (SystemExit, "2"), (SystemExit, "2")]


def evaluate_then_train(rank, model, pairs, directory):
    options = {"objective": "dpo", "max_steps": 1}
    trainer = make_trainer(
        OURS, model, pairs, directory / str(rank), eval_pairs=pairs[:2], **options
    )
    trainer.evaluate()
    return trained(trainer)[0][0]["grad_norm"]


def test_training_after_an_evaluation_reduces_gradients(two_ranks, tiny_llama, pairs, tmp_path):
    first, second = two_ranks.run(evaluate_then_train, tiny_llama, pairs, tmp_path)
    assert first == second


# --- configurations -----------------------------------------------------------------------------


def environment_of(engine):
    """What accelerate's launcher makes of a configuration, for two processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    found = []
    launch.deepspeed_launcher = launch.multi_gpu_launcher = found.append
    path = ROOT / "fastpref" / "commands" / "launch" / f"{engine}.yaml"
    given = ["--config_file", str(path), "--num_processes", "2", "-m", "fastpref"]
    launch.launch_command(launch.launch_command_parser().parse_args(given))
    (args,) = found
    if args.use_deepspeed:
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


EXPECTED = {
    "cp": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "8"},
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "tp": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "8"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate_reads_every_configuration(engine, monkeypatch):
    from accelerate.commands import launch

    for name in ("deepspeed_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, name, getattr(launch, name))
    found = environment_of(engine)
    expected = EXPECTED[engine]
    assert {name: found.get(name) for name in expected} == expected
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    if found.get("ACCELERATE_USE_FSDP"):
        assert found["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_an_engine_that_is_not_there():
    result = CliRunner().invoke(app, ["launch", "megatron"])
    assert result.exit_code == 2
    assert "unknown engine 'megatron'" in result.output


def train_under_zero(rank, engine, output, steps, given):
    from accelerate import PartialState

    start_deepspeed()
    wanted = ("ACCELERATE", "FSDP")
    os.environ |= {k: v for k, v in environment_of(engine).items() if k.startswith(wanted)}
    PartialState(backend="gloo")  # which accelerate gives DeepSpeed on GPUs alone
    return run(rank, output, (steps,), given)


@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero(engine, alone, tiny_llama, pairs_file, tmp_path):
    given = {"model": str(tiny_llama), "data": pairs_file, "batch_size": 1, "grad_accum": 2}
    processes = Ranks(2)
    try:
        for steps in (2, 4):
            arguments = engine, tmp_path / "o", steps, given
            results = processes.run(train_under_zero, *arguments, seconds=200)
    finally:
        processes.stop()
    assert_same(results[0][1], alone[1], tmp_path / "o", alone[0])


def head_of_a_part(rank, model):
    os.environ["PARALLELISM_CONFIG_TP_SIZE"] = "2"
    try:
        weight = load_policy(TrainSettings(str(model), Path(), Path()), "float32").lm_head.weight
    finally:
        del os.environ["PARALLELISM_CONFIG_TP_SIZE"]
    return str(weight.placements), len(weight.to_local())


def test_a_tensor_parallel_policy(two_ranks, tiny_llama):
    """Of accelerate, which then trains it, nothing runs on a CPU."""
    found = two_ranks.run(head_of_a_part, tiny_llama)
    assert found == [("(Shard(dim=0),)", 51), ("(Shard(dim=0),)", 50)]


# --- planning -----------------------------------------------------------------------------------

WHOLE = problem_for(16, 101, pairs=2, length=6, device="cpu", dtype=torch.float32)


def test_what_a_rank_has_to_do():
    mine = Layout(tp=4, cp=4).of_rank(WHOLE)
    assert (mine.vocabulary, mine.counts, mine.total_rows) == (26, (2,) * 4, 6)
    assert Layout().of_rank(WHOLE) == WHOLE
    assert Layout().exchanges(WHOLE) == []
    assert Layout().head_bytes(WHOLE) == (101 * 16 * 4, 0)
    assert Layout(tp=4, fsdp=4).head_bytes(WHOLE) == (7 * 16 * 4, 28 * 16 * 4)


def test_what_ranks_exchange():
    """By hand: 24 rows, H 16, V 101, in float32."""
    every = Layout(tp=4, fsdp=2, cp=3).exchanges(WHOLE, stats=1)
    assert every == [
        Exchange("head", "all_gather", 2, 26 * 16 * 4),
        Exchange("its gradient", "reduce_scatter", 2, 26 * 16 * 4),
        Exchange("statistics of rows", "all_gather", 4, 4 * 8 * 3 * 4),
        Exchange("gradient of hidden states", "all_reduce", 4, 8 * 16 * 4),
        Exchange("sums of sequences", "all_reduce", 3, 8 * 4),
    ]
    assert [each.sent for each in every[1:4]] == [26 * 16 * 2, 3 * 8 * 3 * 4, 6 * 8 * 16]
    lora = problem_for(16, 101, pairs=2, length=6, lora=True)
    assert [each.operation for each in Layout(fsdp=2).exchanges(lora)] == ["all_gather"]


class Head(nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(problem.vocabulary, problem.hidden_size))

    def forward(self, hidden, targets):
        refs = torch.zeros(len(targets))
        return preference_loss(hidden, self.weight, targets, DPO(), ref_logps=refs).loss


def bytes_of_fsdp(rank, problem):
    """Bytes of the whole, by collective, that a head by itself in FSDP2 exchanges in a step."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    head = Head(problem)
    fully_shard(head, mesh=distributed.init_device_mesh("cpu", (2,)))
    counted = {"all_gather": 0, "reduce_scatter": 0}

    def counting(operation, original):
        def exchange(*given, **named):
            output, sent, *_ = signature(original).bind(*given, **named).arguments.values()
            whole = output if operation == "all_gather" else sent
            counted[operation] += whole.numel() * whole.element_size()
            return original(*given, **named)

        return exchange

    names = {  # torch's, older and newer
        "all_gather_into_tensor": "all_gather",
        "all_gather_single": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_single": "reduce_scatter",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, operation in names.items():
            if original := getattr(distributed, name, None):
                patch.setattr(distributed, name, counting(operation, original))
        hidden = torch.randn(len(problem.counts), problem.counts[0], problem.hidden_size)
        targets = torch.randint(0, problem.vocabulary, hidden.shape[:2])
        head(hidden.requires_grad_(), targets).backward()
    return counted


def test_what_is_planned_is_what_fsdp_sends(two_ranks):
    planned = {each.operation: each.bytes for each in Layout(fsdp=2).exchanges(WHOLE)}
    assert two_ranks.run(bytes_of_fsdp, WHOLE) == [planned] * 2


@pytest.fixture(scope="module")
def plan(tiny_llama):
    def plan(*options):
        return CliRunner().invoke(app, ["plan", "--model", str(tiny_llama), *options])

    return plan


def test_plan_of_ranks(plan):
    alone, of_ranks = plan(), plan("--tp", "3", "--fsdp", "2")
    assert "a rank sends" not in alone.output
    output = " ".join(of_ranks.output.split())
    assert "one of 6 ranks" in output
    assert "101 tokens do not divide by 3: ranks have 34 of them, the last 33" in output
    for what in ("head all-gather 2", "its gradient reduce-scatter 2", "statistics of rows"):
        assert what in output
    parts = plan("--cp", "2")
    assert parts.exit_code == 0, parts.output
    assert "recompute (auto)" in parts.output  # what couples the ranks is known afterwards
    assert "pair_groups" not in parts.output and "TRL" not in parts.output
    frozen = plan("--cp", "2", "--lora")
    assert "frozen_head (auto)" in frozen.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "0"], "--tp"),
        (["--fsdp", "-1"], "--fsdp"),
        (["--cp", "1.5"], "--cp"),
        (["--tp", "102"], "tp=102 × fsdp=1 ranks share 101 rows of the head"),
        (["--tp", "51", "--fsdp", "2"], "tp=51 × fsdp=2 ranks share 101 rows of the head"),
        (["--cp", "5", "--length", "4"], "cp=5 ranks share the scored positions"),
    ],
)
def test_plan_refuses(options, message, plan):
    result = plan(*options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", float("nan")])
def test_a_layout_is_of_whole_numbers(value):
    for name in ("tp", "fsdp", "cp"):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            Layout(**{name: value})


def test_the_page_is_what_the_script_says():
    text = scale.PAGE.read_text()
    for name in scale.tables():
        assert f"<!-- {name} -->" in text
    assert scale.insert_tables(text, scale.tables()) == text


def test_the_crossover_is_where_both_ways_send_the_same():
    rows = scale.crossover(8, lora=False)
    assert rows == pytest.approx(scale.VOCABULARY / 2, rel=1e-3)
    for pairs, dearer in ((rows // 2048 - 1, "tp"), (rows // 2048 + 1, "fsdp")):
        sent = {
            name: sum(e.sent for e in Layout(**{name: 8}).exchanges(scale.problem(pairs)))
            for name in ("tp", "fsdp")
        }
        assert (sent["tp"] < sent["fsdp"]) == (dearer == "tp")
