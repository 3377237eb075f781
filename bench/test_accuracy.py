"""How far from float64 are log-probabilities and gradients from bf16 inputs?"""

import dataclasses

import pytest

from fastpref.commands.benchmark.measure import accuracy
from fastpref.commands.benchmark.peers import PEERS
from fastpref.commands.benchmark.suite import CPU_QUICK
from fastpref.commands.benchmark.workloads import make_inputs


@pytest.mark.parametrize("peer", [name for name in PEERS if not PEERS[name].compiles])
@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
def test_from_bf16(benchmark, peer, frozen, device):
    workload = dataclasses.replace(CPU_QUICK[0], length=64, dtype="bfloat16", frozen=frozen)
    inputs = make_inputs(workload, device)
    if obstacle := PEERS[peer].obstacle(inputs):
        pytest.skip(obstacle)
    benchmark.group = f"accuracy, {workload.name}"
    (found,) = benchmark.pedantic(accuracy, (inputs, [peer], "random"), rounds=1)
    benchmark.extra_info.update(found)
    if peer.startswith("fastpref"):
        assert found["token_logps"] <= 5e-5
        for gradient in ("grad_hidden", "grad_weight"):
            assert found.get(gradient, 0) <= 2e-3
