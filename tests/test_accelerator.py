"""A step on an accelerator, without one: on meta tensors, which have shapes and no values.

Whatever reads a value of the device raises here; that copies to it do not wait either is seen on a
GPU only. And every allocation is seen, so the peak at the size of an 8 B model's head is known
exactly, but for what libraries and kernels take inside an operator.
"""

import dataclasses

import fastpref_kernels
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import (
    DPO,
    Balance,
    SimPO,
    UniDPO,
    linear_logps,
    loss,
    make_plan,
    preference_loss,
    sequence_logps,
)
from fastpref.backends import products, torch_backend
from fastpref.commands.plan import estimates, problem_for
from fastpref.planner import MIB

BACKENDS = ["torch"] + ["triton"] * fastpref_kernels.HAS_TRITON
STATS = ("entropy", "mean_logits", "is_top1")
# An accelerator's plan is for the kernels written for it.
ON_OWN_KERNELS = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)


class OwnDPO(DPO):
    """Without a formula for the fused kernel: autograd differentiates it."""

    def formula(self):
        return None


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Chosen for meta tensors as it would be for a GPU's, which multiplies half precision."""
    if request.param == "triton":
        from fastpref.backends import triton_backend as chosen
    else:
        chosen = torch_backend
    monkeypatch.setattr(loss, "choose_backend", lambda *_: chosen)
    monkeypatch.setattr(products, "multiplies_half", lambda _: True)
    return request.param


class PeakBytes(TorchDispatchMode):
    """The most bytes of meta storages alive at once, beside those of `inputs`."""

    def __init__(self, *inputs):
        super().__init__()
        self.alive = {}
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.alive = {key: x for key, x in self.alive.items() if not x[0].expired()}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


def batch(pairs, length, hidden_size, vocabulary, *, frozen=False, prompt=0):
    """Everything on the device but the targets, which are where a data loader leaves them."""
    shape = 2 * pairs, prompt + length

    def empty(*size):
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    targets = torch.randint(0, vocabulary, shape)
    targets[:, :prompt] = -100
    hidden = empty(*shape, hidden_size).requires_grad_()
    return hidden, empty(vocabulary, hidden_size).requires_grad_(not frozen), targets


@pytest.mark.parametrize("schedule", ["pair_groups", "frozen_head", "recompute"])
@pytest.mark.parametrize("objective", [UniDPO(), SimPO(balance=Balance()), OwnDPO()])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_reads_nothing_back(schedule, objective, packed, backend):
    hidden, weight, targets = batch(3, 7, 16, 1009, frozen=schedule == "frozen_head", prompt=4)
    targets[1] = -100  # an empty response
    sequences = torch.empty(6, device="meta")
    cu_seqlens, token_weights = None, torch.empty(targets.shape, device="meta")
    if packed:
        hidden, targets = hidden.detach().flatten(0, 1).requires_grad_(), targets.flatten()
        cu_seqlens, token_weights = torch.arange(7) * 11, None
    output = preference_loss(
        hidden,
        weight,
        targets,
        objective,
        ref_logps=sequences,
        scores=sequences,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        schedule=schedule,
        logits_budget=16 * 4036,
        stats=STATS,
    )
    output.loss.backward()
    assert output.plan.schedule == schedule
    assert hidden.grad.shape == hidden.shape
    assert (weight.grad is None) == (schedule == "frozen_head")


def test_log_probabilities_read_nothing_back(backend):
    hidden, weight, targets = batch(2, 5, 16, 1009, prompt=3)
    logps, found = linear_logps(hidden, weight, targets, stats=STATS)
    (logps.sum() + found["entropy"].sum()).backward()
    sums, lengths = sequence_logps(hidden, weight, targets)
    assert sums.shape == lengths.shape == (4,)


def test_targets_on_the_device_are_read_back(backend):
    """What the others would not do: the check above can fail."""
    hidden, weight, targets = batch(2, 5, 16, 1009)
    with pytest.raises((NotImplementedError, RuntimeError)):
        preference_loss(hidden, weight, targets.to("meta"), "simpo")


# Llama-3-8B's head; 8 pairs of 2 × 1,024 scored tokens. The most GB, gradients included.
LARGE = 8, 1024, 4096, 128256


@pytest.mark.parametrize(
    ("schedule", "frozen", "most"),
    [
        ("pair_groups", False, 2.37),
        ("frozen_head", True, 0.31),
        ("recompute", False, 1.53),
        ("recompute", True, 0.40),
    ],
)
@ON_OWN_KERNELS
def test_peak_of_an_8b_models_head(schedule, frozen, most, backend):
    hidden, weight, targets = batch(*LARGE, frozen=frozen)
    references = torch.empty(16, device="meta")
    with PeakBytes(hidden, weight, references) as used:
        output = preference_loss(
            hidden, weight, targets, "dpo", ref_logps=references, schedule=schedule, stats=STATS
        )
        output.loss.backward()
    assert used.peak <= most * 1e9
    # The plan counts the library's workspace too.
    assert output.plan.extra_bytes == pytest.approx(used.peak + 32 * MIB, rel=0.05)


def test_a_backward_leaves_nothing_behind(backend):
    """The rows kept for it go as it ends, though the loss lives on."""
    hidden, weight, targets = batch(2, 64, 512, 1009, frozen=True)
    with PeakBytes(hidden, weight) as used:
        output = preference_loss(hidden, weight, targets, "simpo")
        output.loss.backward()
        gradient = hidden.grad.untyped_storage()
        torch.empty(0, device="meta")  # to look at what is alive now
    (at,) = (size for key, (_, size) in used.alive.items() if key == gradient._cdata)
    assert at == gradient.nbytes()
    others = sum(size for key, (_, size) in used.alive.items() if key != gradient._cdata)
    assert others < gradient.nbytes() / 8


# Kernels of a step of 2 pairs × 2 × 128, whose time is that of launching them.
MOST_LAUNCHES = 25
# These only look at memory elsewhere.
VIEWS = {"view", "_unsafe_view", "empty", "new_empty", "empty_like", "detach", "slice", "select",
         "transpose", "t", "expand", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind",
         "as_strided", "alias", "permute"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of the operators that compute something on meta tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name not in VIEWS and any(x.is_meta for x in tensors):
            self.names.append(name)
        return found


@ON_OWN_KERNELS
def test_launches_of_a_small_step(backend):
    hidden, weight, targets = batch(2, 128, 2048, 49152)
    references = torch.empty(4, device="meta")
    with Launches() as seen:
        output = preference_loss(hidden, weight, targets, "dpo", ref_logps=references)
        output.loss.backward()
    assert output.plan.schedule == "pair_groups"
    assert "projection_exponentials" in seen.names
    assert len(seen.names) <= MOST_LAUNCHES, seen.names


@ON_OWN_KERNELS
def test_peak_of_a_reference(backend):
    """With what the tile kernel takes for itself."""
    hidden, weight, targets = batch(*LARGE)
    with torch.no_grad(), PeakBytes(hidden, weight) as used:
        sequence_logps(hidden, weight, targets)
    problem = problem_for(4096, 128256, pairs=8, length=1024, lora=True)
    plan = make_plan(dataclasses.replace(problem, hidden_grad=False))
    assert used.peak + plan.extra_bytes <= 50e6


def test_peaks_beside_trl():
    """Predicted shares of TRL's peak at that size, as the README gives them."""
    for lora, schedule, share in ((False, "pair_groups", 0.60), (True, "frozen_head", 0.5)):
        problem = problem_for(4096, 128256, pairs=8, length=1024, lora=lora)
        trl = {each.name: each.extra_bytes for each in estimates(problem)}["TRL 1.16"]
        assert make_plan(problem, pairs=True, schedule=schedule).extra_bytes <= share * trl


@pytest.mark.parametrize("prompt", [0, 512])
@pytest.mark.parametrize(
    ("schedule", "frozen"),
    [("pair_groups", False), ("frozen_head", True), ("recompute", False), ("recompute", True)],
)
@ON_OWN_KERNELS
def test_growth_with_the_pairs(schedule, frozen, prompt, backend):
    """By twice the hidden states of a pair, prompts included, which is what Liger grows by."""
    pairs, _, *head = LARGE
    peaks = []
    for count in (pairs, 8 * pairs):
        hidden, weight, targets = batch(count, 512, *head, frozen=frozen, prompt=prompt)
        with PeakBytes(hidden, weight) as used:
            output = preference_loss(hidden, weight, targets, "simpo", schedule=schedule)
            output.loss.backward()
        peaks.append(used.peak)
    of_hidden = hidden.numel() * hidden.itemsize * 7 / 8
    assert (peaks[1] - peaks[0]) / of_hidden <= 2.01  # and some numbers a row


@pytest.mark.parametrize("frozen", [False, True])
def test_recompute_moves_few_bytes(frozen):
    """The planned tile against all others of its size, by counting what each block moves."""
    problem = problem_for(4096, 128256, pairs=8, length=1024, lora=frozen)
    plan = make_plan(problem, pairs=True, schedule="recompute")

    def moved(rows, columns):
        blocks, slices = -(-problem.rows // rows), -(-problem.vocabulary // columns)
        # Rows are read twice, as are the head's; sums in float32 are read and written.
        of_rows = problem.rows * slices * (2 * 2 + 2 * 4)
        of_head = problem.vocabulary * blocks * (2 * 2 + 2 * 4 * (not frozen))
        return (of_rows + of_head) * problem.hidden_size

    rows, columns = plan.tile
    assert rows * columns * 4 <= 64 * MIB
    others = [(2**i, 2**24 // 2**i) for i in range(8, 15)]
    assert moved(rows, columns) <= 1.05 * min(moved(*tile) for tile in others)
    assert moved(rows, columns) < 0.7 * moved(16384, 1024)
