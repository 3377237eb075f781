"""How much memory does a step take beyond its inputs, and does it grow with the pairs?"""

import dataclasses

import pytest

from fastpref.commands.benchmark.measure import peak_memory, predicted_memory, runnable
from fastpref.commands.benchmark.peers import PEERS
from fastpref.commands.benchmark.report import MB
from fastpref.commands.benchmark.suite import CPU_QUICK, CPU_SPEED
from fastpref.commands.benchmark.workloads import make_inputs

# Peak MB; 8 pairs × 2 × 256 tokens, H 576, V 49152, float32, gradients included.
TARGETS = {"pair groups": 450, "frozen head": 250, "recompute": 300}


def measured(schedule, pairs, device):
    frozen = schedule == "frozen head"
    workload = dataclasses.replace(CPU_SPEED[0], pairs=pairs, frozen=frozen)
    return peak_memory(workload, f"fastpref {schedule}", device, repeats=1)["bytes"] / MB


@pytest.mark.parametrize("schedule", TARGETS)
def test_targets_on_a_cpu(benchmark, schedule, device):
    if device != "cpu":
        pytest.skip("the targets are for a CPU")
    peak = benchmark.pedantic(measured, (schedule, 8, device), rounds=1)
    benchmark.extra_info["peak MB"] = peak
    assert peak <= TARGETS[schedule]


@pytest.mark.parametrize("schedule", TARGETS)
def test_growth_with_the_pairs(benchmark, schedule, device):
    """From 8 to 32 pairs no more than rows of hidden size: gradients, compacted inputs."""
    few = measured(schedule, 8, device)
    many = benchmark.pedantic(measured, (schedule, 32, device), rounds=1)
    benchmark.extra_info.update({"MB at 8 pairs": few, "MB at 32 pairs": many})
    rows = 24 * 2 * 256
    of_hidden_size = rows * 576 * 4 / MB  # one (N, H)
    assert many - few <= 4 * of_hidden_size
    assert rows * 49152 * 4 / MB > 50 * of_hidden_size  # what logits would add


@pytest.mark.parametrize("name", [name for name in PEERS if not PEERS[name].compiles])
@pytest.mark.parametrize("workload", [*CPU_QUICK, *CPU_SPEED], ids=lambda workload: workload.name)
def test_predictions_of_plan(benchmark, workload, name, device):
    """Predicted bytes within a tenth of the measured ones."""
    if device != "cpu":
        pytest.skip("the workloads are for a CPU")
    predicted = predicted_memory(workload, name, device)
    _, skipped = runnable([name], make_inputs(workload, device))
    if skipped or predicted is None:
        pytest.skip(skipped.get(name, "fastpref plan does not know this peer"))
    measured = benchmark.pedantic(peak_memory, (workload, name, device, 1), rounds=1)["bytes"]
    benchmark.extra_info.update({"measured MB": measured / MB, "predicted MB": predicted / MB})
    assert predicted == pytest.approx(measured, rel=0.1)
