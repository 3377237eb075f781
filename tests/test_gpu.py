"""The Triton backend on a real GPU: `pytest -m gpu`."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
from fastpref_kernels import Epilogue

from fastpref import Balance, UniDPO, linear_logps, preference_loss, reference
from fastpref.backends import choose_backend, triton_backend
from fastpref.backends.products import multiplies_half
from fastpref.commands.verify import (
    SHAPES,
    logits_gradient,
    make_batch,
    objectives_to_verify,
    rounded_operand_errors,
    verify,
)
from fastpref.sequences import copied_to_host

DEVICE = os.environ.get("FASTPREF_TEST_DEVICE", "cuda")  # "cpu" with TRITON_INTERPRET=1
HALF = (torch.bfloat16, torch.float16)
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
VOCABULARY = 128256
gpu = pytest.mark.gpu


def memory():
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def draw(*size, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(size, device=DEVICE, generator=generator) * scale).to(dtype)


@gpu
def test_auto_is_triton():
    assert choose_backend("auto", torch.device(DEVICE)) is triton_backend


@gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_schedules_within_the_error_budget(shape, dtype, poison):
    for schedule, results in verify(UniDPO(balance=Balance()), shape, dtype, DEVICE).items():
        for result in results:
            assert result.passed, (schedule, result)


@gpu
@pytest.mark.parametrize("name", objectives_to_verify())
def test_objectives_within_the_error_budget(name):
    objective = objectives_to_verify()[name]
    for schedule, results in verify(objective, SHAPES[1], torch.bfloat16, DEVICE).items():
        for result in results:
            assert result.passed, (schedule, result)


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("columns", [VOCABULARY, 49152, 1009, 257])
@pytest.mark.parametrize("hidden_size", [4096, 100])  # the second has no aligned rows
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("head", [{}, {"softcap": 30.0, "temperature": 1.3}])
def test_statistics_of_both_kernels(dtype, columns, hidden_size, indexed, head):
    rows = 300
    hidden = draw(2 * rows if indexed else rows, hidden_size, dtype=dtype)
    weight = draw(columns, hidden_size, dtype=dtype, scale=6 / hidden_size**0.5, seed=1)
    index = torch.randperm(2 * rows, device=DEVICE)[:rows] if indexed else None
    targets = torch.randint(0, columns, (rows,), device=DEVICE)
    operand = hidden if index is None else hidden[index]
    truth = reference.token_statistics(operand.double(), weight.double(), targets, **head)

    products = (operand.float() @ weight.float().T) if DEVICE == "cpu" else None
    if products is None:
        products = torch.mm(operand, weight.T, out_dtype=torch.float32)
    epilogue = Epilogue(**head)
    for stats in ((), STATS):
        for logps, lse, extra in (
            kernels.projection_statistics(hidden, weight, targets, epilogue, stats, index),
            kernels.row_statistics(products, targets, epilogue, stats),
        ):
            assert (logps - truth["logps"]).abs().max() <= 5e-5
            assert lse.isfinite().all()
            for name in stats:
                if name == "is_top1":
                    assert torch.equal(extra[name], truth[name])
                else:
                    assert (extra[name] - truth[name]).abs().max() <= 5e-5, name


@gpu
@pytest.mark.skipif(memory() < 40e9, reason="needs 40 GB")
def test_beyond_2_to_the_31_logits():
    """The last rows of a large group are those of a small one, bit for bit."""
    rows, hidden_size = 2**31 // VOCABULARY + 130, 64
    hidden = draw(rows, hidden_size, dtype=torch.bfloat16)
    weight = draw(VOCABULARY, hidden_size, dtype=torch.bfloat16, scale=0.75, seed=1)
    targets = torch.randint(0, VOCABULARY, (rows,), device=DEVICE)
    coef = draw(rows, seed=2)
    assert rows * VOCABULARY > 2**31
    products = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    last = products[-128:].clone()
    found = []
    for part, of_rows in ((products, slice(None)), (last, slice(-128, None))):
        logps, lse, _ = kernels.row_statistics(part, targets[of_rows], Epilogue())
        grad = kernels.row_gradients_(
            part, targets[of_rows], lse, coef[of_rows], Epilogue(), torch.bfloat16
        )
        found.append((logps[-128:], lse[-128:], grad[-128:]))
    for large, small in zip(*found, strict=True):
        assert torch.equal(large, small)
    logps, _, _ = kernels.projection_statistics(hidden, weight, targets, Epilogue())
    assert (logps[-128:] - found[1][0]).abs().max() <= 5e-5


@gpu
@pytest.mark.parametrize("schedule", ["pair_groups", "recompute", "frozen_head"])
def test_two_runs_agree_bit_for_bit(schedule):
    one, two = (run(schedule, torch.bfloat16) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def run(schedule, dtype, call=preference_loss):
    batch = make_batch(SHAPES[1], dtype, DEVICE)
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(schedule != "frozen_head")
    out = call(hidden, weight, batch.targets, UniDPO(), schedule=schedule, **batch.options)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    return [x for x in (loss.detach(), hidden.grad, weight.grad) if x is not None]


@gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA sees synchronisations")
@pytest.mark.parametrize("schedule", ["pair_groups", "recompute", "frozen_head"])
def test_no_step_waits_for_the_device(schedule):
    """With targets where a data loader leaves them."""
    batch = make_batch(SHAPES[1], torch.bfloat16, DEVICE)
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(schedule != "frozen_head")
    targets = batch.targets.cpu()
    options = {k: x.cpu() if k == "cu_seqlens" else x for k, x in batch.options.items()}

    def step():
        how = {"schedule": schedule, "stats": STATS[:3]} | options
        preference_loss(hidden, weight, targets, UniDPO(), **how).loss.backward()

    step()  # compiles, and puts the objective's numbers on the device
    with no_sync():
        step()


@gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="the host has one stream")
def test_a_copy_to_the_host_waits_for_what_makes_it():
    busy = draw(8192, 8192)
    made = torch.zeros(1 << 20, device=DEVICE, dtype=torch.int64)
    for _ in range(20):
        busy = busy @ busy * 1e-4
    made += 7
    wait = copied_to_host(made)
    made += 1
    assert (wait() == 7).all()


class no_sync:
    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("schedule", ["pair_groups", "recompute", "frozen_head"])
def test_compiled_equals_eager(schedule):
    compiled = torch.compile(lambda *args, **how: 2 * preference_loss(*args, **how).loss)
    eager = run(
        schedule, torch.bfloat16, lambda *args, **how: 2 * preference_loss(*args, **how).loss
    )
    for a, b in zip(run(schedule, torch.bfloat16, compiled), eager, strict=True):
        assert torch.equal(a, b)


@gpu
def test_compiled_linear_logps_equal_eager():
    hidden, weight = draw(64, 128, dtype=torch.bfloat16), draw(1009, 128, dtype=torch.bfloat16)
    targets = torch.randint(0, 1009, (64,), device=DEVICE)
    targets[::5] = -100

    def function(hidden, weight):
        return linear_logps(hidden, weight, targets).sum()

    found = []
    for call in (function, torch.compile(function)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        call(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


@gpu
def test_forward_only_holds_no_logits():
    if DEVICE != "cuda":
        pytest.skip("CUDA counts its memory")
    hidden = draw(16384, 4096, dtype=torch.bfloat16)
    weight = draw(VOCABULARY, 4096, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (16384,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.projection_statistics(hidden, weight, targets, Epilogue())
    assert torch.cuda.max_memory_allocated() - before <= 50e6


# --- what the budget of half-precision products rests on; needs no GPU --------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_the_gradient_of_the_logits_stays_in_its_bound(dtype):
    """The bound that verification on GPUs adds, against the rounding itself."""
    assert not multiplies_half("cpu")
    batch = make_batch(SHAPES[3], torch.float64, "cpu")
    coefs = torch.randn(2, 2, dtype=torch.float64)
    grad, hidden = logits_gradient(batch, coefs, SHAPES[3].scalars)
    bound = rounded_operand_errors(batch, coefs, SHAPES[3].scalars, dtype)
    error = grad.to(dtype).double() - grad
    found = {"∂h": error @ batch.weight, "∂W": error.T @ hidden, "∂b": error.sum(0)}
    assert found.keys() == bound.keys()
    for name, value in found.items():
        assert 0 < value.abs().max() <= bound[name]
        assert math.isfinite(bound[name])
