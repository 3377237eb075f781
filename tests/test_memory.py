"""The default budget on an accelerator: a share of what is free, the same at every step."""

import logging
import types
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from fastpref import linear_logps, loss, make_plan, memory, preference_loss, scheduled
from fastpref.backends import products, torch_backend
from fastpref.commands.cli import app
from fastpref.commands.plan import planned, problem_for
from fastpref.memory import GIB, spare_bytes

GPU = torch.device("cuda", 0)


class FakeGpu:
    """What torch says of a device: bytes free, and those its allocator holds and uses."""

    def __init__(self, free, reserved=0, allocated=0):
        self.free, self.reserved, self.allocated = free, reserved, allocated
        self.asked = 0
        self.capturing = False

    def mem_get_info(self, device):
        self.asked += 1
        return self.free, 10**12

    def memory_reserved(self, device):
        return self.reserved

    def memory_allocated(self, device):
        return self.allocated

    def is_current_stream_capturing(self):
        return self.capturing


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for every device; nothing is decided yet."""
    fake = FakeGpu(40 * GIB)
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    monkeypatch.setattr(memory, "_spare", {})
    return fake


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "spare"),
    [
        (40 * GIB, 0, 0, 5 * GIB),
        (40 * GIB, 14 * GIB, 6 * GIB, 6 * GIB),  # what torch holds and does not use is free too
        (GIB, 0, 0, GIB // 4),
        (0, GIB, GIB, GIB // 4),
    ],
)
def test_a_share_of_what_is_free(free, reserved, allocated, spare, gpu):
    gpu.free, gpu.reserved, gpu.allocated = free, reserved, allocated
    assert spare_bytes(GPU) == spare


def test_decided_once_for_a_device(gpu, caplog):
    with caplog.at_level(logging.INFO, logger="fastpref.memory"):
        assert spare_bytes(GPU) == 5 * GIB
        gpu.free = 16 * GIB
        assert spare_bytes(GPU) == 5 * GIB
    assert gpu.asked == 1
    assert [record.getMessage() for record in caplog.records] == [
        "cuda:0: 40.00 GiB are free; logits may take 5.00 GiB of them (1/8, at least 0.25 GiB)"
    ]
    assert spare_bytes(torch.device("cuda", 1)) == 2 * GIB


@pytest.mark.parametrize("module", [types.SimpleNamespace(), FakeGpu(0)], ids=["none", "refuses"])
def test_a_device_that_does_not_say(module, gpu, monkeypatch, caplog):
    def refuses(device):
        raise RuntimeError("this device doesn't support querying the available free memory")

    if isinstance(module, FakeGpu):
        module.mem_get_info = refuses
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with caplog.at_level(logging.INFO, logger="fastpref.memory"):
        assert spare_bytes(GPU) == GIB
    assert "cuda:0 does not say what is free: 8 GiB, for want of it" in caplog.text


def test_nothing_is_decided_while_a_graph_is_captured(gpu):
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="run one step before, or pass logits_budget"):
        spare_bytes(GPU)
    gpu.capturing = False
    decided = spare_bytes(GPU)
    gpu.capturing = True
    assert spare_bytes(GPU) == decided


def test_batches_of_any_lengths_find_the_same_share(gpu):
    """A step that leaves less free changes no later one's schedule or groups."""
    batches = [(8, 2048), (2, 64), (8, 1024), (1, 2048), (8, 2048)]

    def plan(pairs, length):
        problem = problem_for(4096, 128256, pairs=pairs, length=length)
        return make_plan(problem, pairs=True, spare=lambda: spare_bytes(GPU))

    first = plan(*batches[0])
    for batch in batches[1:]:
        gpu.free = GIB
        last = plan(*batch)
        assert last.schedule == "pair_groups"
    assert last == first
    assert gpu.asked == 1


def test_a_usual_run_of_llama_3_8b_takes_three_products():
    """8 pairs × 2 × 2,048 tokens, with 10 GiB free for every two bytes of a logit."""
    problem = problem_for(4096, 128256, pairs=8, length=2048)
    of_logit = problem.row_bytes // 128256
    for free in (5 * of_logit * GIB, 80 * GIB, None):
        plan = planned(problem, free=free)
        assert plan.schedule == "pair_groups"
        assert plan.flop == 3 * 2 * 32768 * 4096 * 128256
    a_pair = 4096 * problem.row_bytes
    assert planned(problem, free=8 * a_pair).schedule == "pair_groups"
    assert planned(problem, free=8 * a_pair - 8).schedule == "recompute"


# --- in the public functions --------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Devices whose memory was asked for; logits may take 10 rows of 1009 float32."""
    devices = []

    def few(device):
        devices.append(device.type)
        return 10 * 4036

    monkeypatch.setattr(scheduled, "spare_bytes", few)
    monkeypatch.setattr(loss, "choose_backend", lambda *_: torch_backend)
    monkeypatch.setattr(products, "multiplies_half", lambda _: True)
    return devices


def batch(device, *, frozen=False):
    """3 pairs of 2 × 4 tokens."""
    hidden = torch.zeros(6, 4, 8, device=device).requires_grad_()
    weight = torch.zeros(1009, 8, device=device).requires_grad_(not frozen)
    return hidden, weight, torch.zeros(6, 4, dtype=torch.long)


def test_a_step_is_planned_for_the_memory_there_is(asked):
    plan = preference_loss(*batch("meta"), "simpo").plan
    assert asked == ["meta"]
    assert plan.schedule == "pair_groups"
    assert len(plan.groups) == 3  # a pair has 8 rows
    assert preference_loss(*batch("meta"), "simpo", logits_budget=10**6).plan.group_rows == 24


def test_who_needs_no_memory_does_not_ask(asked):
    preference_loss(*batch("meta"), "simpo", logits_budget=10**6)
    preference_loss(*batch("meta", frozen=True), "simpo")
    preference_loss(*batch("meta"), "simpo", reduction="none")
    linear_logps(*batch("meta"))
    with torch.no_grad():
        preference_loss(*batch("meta"), "simpo")
    assert asked == []


def test_a_cpu_is_not_asked(monkeypatch):
    """Nor are other ranks."""
    for owner, name in ((torch, "get_device_module"), (torch.distributed, "is_initialized")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("asked"))
    assert spare_bytes(torch.device("cpu")) is spare_bytes(torch.device("meta")) is None
    preference_loss(*batch("cpu"), "simpo").loss.backward()


# --- ranks --------------------------------------------------------------------------------------


def decide(rank):
    """Rank r finds 16 (r + 1) GiB free."""
    memory._spare.clear()
    with mock.patch("torch.get_device_module", lambda device: FakeGpu(16 * (rank + 1) * GIB)):
        found = [spare_bytes(GPU)]
        if rank == 0:  # what is decided is not asked for again
            found.append(spare_bytes(GPU))
    return found[-1]


def test_ranks_agree_on_the_smallest(ranks):
    assert ranks.run(decide) == [2 * GIB] * ranks.world


@pytest.mark.parametrize(("backend", "where"), [("gloo", "cpu"), ("nccl", GPU), ("xccl", GPU)])
def test_the_ranks_number_is_where_their_backend_reduces(backend, where, gpu, monkeypatch, caplog):
    on_host, devices = torch.tensor, []

    def tensor(value, device):
        devices.append(device)
        return on_host(value)

    def all_reduce(least, how):
        assert how == torch.distributed.ReduceOp.MIN
        least.fill_(24 * GIB)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with caplog.at_level(logging.INFO, logger="fastpref.memory"):
        assert spare_bytes(GPU) == 3 * GIB
    assert devices == [where]
    assert "24.00 GiB are free on the fullest of 4 ranks" in caplog.text


def test_a_rank_without_others_asks_nobody(gpu, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: pytest.fail("asked"))
    assert spare_bytes(GPU) == 5 * GIB


# --- fastpref plan ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "logits_budget {needed:.2f} GB, what the batch needs"),
        (["--free", "8"], "logits_budget 1.00 GB, 1/8 of 8 GB"),
        (["--free", "1"], "logits_budget 0.27 GB, the least that is taken"),
        (["--free", "1", "--budget", "600"], "logits_budget 0.63 GB, as given"),
        (["--lora"], None),
    ],
)
def test_plan_says_the_budget_and_why(more, said, monkeypatch, tmp_path):
    monkeypatch.setattr("fastpref.commands.cli.head_shape", lambda _: (4096, 128256))
    (tmp_path / "config.json").write_text("{}")
    command = ["plan", "--model", str(tmp_path), "--length", "2048", "--pairs", "2", *more]
    output = CliRunner().invoke(app, command, env={"COLUMNS": "200"}).output
    if said is None:
        assert "frozen_head (auto)" in output and "logits_budget" not in output
    else:
        needed = 4096 * problem_for(4096, 128256, pairs=2, length=2048).row_bytes / 1e9
        assert said.format(needed=needed) in output
