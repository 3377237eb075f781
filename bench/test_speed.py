"""How long does a forward and backward take, beside every peer? One group a workload."""

import pytest

from fastpref.commands.benchmark.measure import BASELINE, time_peers
from fastpref.commands.benchmark.peers import PEERS
from fastpref.commands.benchmark.suite import CPU_SPEED, GPU_SPEED
from fastpref.commands.benchmark.workloads import make_inputs
from fastpref.commands.cli import default_device

WORKLOADS = CPU_SPEED if default_device() == "cpu" else GPU_SPEED


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_forward_and_backward(benchmark, workload, peer, device):
    inputs = make_inputs(workload, device)
    obstacle = PEERS[peer].obstacle(inputs)
    if obstacle:
        pytest.skip(obstacle)
    loss = PEERS[peer].prepare(inputs)

    def step():
        inputs.hidden.grad = inputs.weight.grad = None
        loss().backward()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()

    benchmark.group = workload.name
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)


# Of naive's time; 8 pairs × 2 × 256 tokens, H 576, V 49152, float32, two threads.
TARGETS = {"pair groups": 0.95, "frozen head": 0.70, "recompute": 1.35}


@pytest.mark.parametrize("schedule", TARGETS)
def test_targets_on_a_cpu(benchmark, schedule, device):
    """Interleaved with naive, median of ratios."""
    if device != "cpu":
        pytest.skip("the targets are for a CPU")
    workload = CPU_SPEED[1 if schedule == "frozen head" else 0]
    name = f"fastpref {schedule}"

    def measure():
        return time_peers(workload, [BASELINE, name], rounds=3, device=device)

    entries, _ = benchmark.pedantic(measure, rounds=1)
    ratio = next(
        entry["ratio"]["median"]
        for entry in entries
        if entry["peer"] == name and entry["phase"] == "forward + backward"
    )
    benchmark.extra_info["ratio to naive"] = ratio
    assert ratio <= TARGETS[schedule]
