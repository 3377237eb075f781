"""The Triton backend on a real GPU: `pytest -m gpu`."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

import fastpref_kernels as kernels
from fastpref_kernels import Epilogue, configs

from fastpref import Balance, UniDPO, linear_logps, preference_loss, reference
from fastpref.backends import choose_backend, elementwise, triton_backend
from fastpref.backends.elementwise import joined
from fastpref.backends.products import multiplies_half
from fastpref.commands.verify import (
    SHAPES,
    accumulation_error,
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


def of_logit(products, hidden_size):
    """How far a logit may be off: cut off in its accumulator, and rounded a few times in fp32."""
    largest = products.abs().max().item()
    return accumulation_error(hidden_size, largest) + 2.0**-21 * (1 + largest)


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
    epilogue, eps = Epilogue(**head), of_logit(products, hidden_size)
    # What moving every logit by ε can do; of an entropy H, Σ p |log p + H| ≤ 2 log V.
    allowed = {
        "entropy": 4 * math.log(columns) * eps,
        "mean_logits": eps,
        "log_sum_sq_probs": 4 * eps,
    }
    largest = reference.logits(operand.double(), weight.double(), **head).topk(2, dim=1).values
    clear = largest[:, 0] - largest[:, 1] > 2 * eps  # of two that are closer either may be first
    assert clear.float().mean() > 0.9
    for stats in ((), STATS):
        for logps, lse, extra in (
            kernels.projection_statistics(hidden, weight, targets, epilogue, stats, index),
            kernels.row_statistics(products, targets, epilogue, stats),
        ):
            assert (logps - truth["logps"]).abs().max() <= 2 * eps
            assert lse.isfinite().all()
            for name in stats:
                if name == "is_top1":
                    assert torch.equal(extra[name][clear], truth[name][clear])
                else:
                    assert (extra[name] - truth[name]).abs().max() <= allowed[name], name


# --- what gradients are made of -----------------------------------------------------------------

HEADS = [{}, {"softcap": 30.0, "temperature": 1.3}]


def head_of(dtype, columns, hidden_size, rows=300):
    """Operands, targets, and products in float64."""
    hidden = draw(rows, hidden_size, dtype=dtype)
    weight = draw(columns, hidden_size, dtype=dtype, scale=6 / hidden_size**0.5, seed=1)
    targets = torch.randint(0, columns, (rows,), device=DEVICE)
    return hidden, weight, targets, hidden.double() @ weight.double().T


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("columns", "hidden_size"), [(VOCABULARY, 4096), (1009, 100), (257, 64)])
@pytest.mark.parametrize("head", HEADS)
def test_stored_exponentials_become_gradients(dtype, columns, hidden_size, head, poison):
    """SCALE·(onehot − p)·slope in float16, rounded as exponentials and once more."""
    hidden, weight, targets, products = head_of(dtype, columns, hidden_size)
    z = reference.logits(hidden.double(), weight.double(), **head)
    slope = 1 - (products / head["softcap"]).tanh() ** 2 if head else torch.ones_like(z)
    p = z.softmax(-1)
    truth = -p
    truth.scatter_add_(1, targets[:, None], torch.ones_like(truth[:, :1]))
    truth *= kernels.SCALE * slope
    eps = of_logit(products, hidden_size)

    gradient = torch.empty(len(hidden), columns, dtype=torch.float16, device=DEVICE)
    logps, lse, _, peaks, block = kernels.projection_exponentials(
        hidden, weight, targets, Epilogue(**head), gradient
    )
    of_target = slope.gather(1, targets[:, None])[:, 0].float() if head else None
    coef = torch.ones_like(lse)
    kernels.gradients_(gradient, peaks, block, targets, logps, lse, coef, of_target)
    # A slope moves by at most twice what its argument does; 2^-24 is half float16's smallest.
    share = 2 * 2.0**-11 + 2 * eps + (2 * eps / 30.0 + 2.0**-20 if head else 0.0)
    tiny = 2 * 2.0**-24 + kernels.SCALE * p * (2 * eps + 2.0**-20)
    assert ((gradient - truth).abs() <= share * truth.abs() + tiny).all()


@gpu
@pytest.mark.parametrize("columns", [VOCABULARY, 1009])
@pytest.mark.parametrize("head", HEADS)
def test_anchored_exponentials(columns, head, poison):
    hidden_size = 4096 if columns == VOCABULARY else 72
    hidden, weight, targets, products = head_of(torch.bfloat16, columns, hidden_size)
    z = reference.logits(hidden.double(), weight.double(), **head)
    slope = 1 - (products / head["softcap"]).tanh() ** 2 if head else torch.ones_like(z)
    anchors = z.gather(1, targets[:, None])
    truth = (z - anchors).exp() * slope * kernels.ANCHORED_SCALE
    truth.scatter_(1, targets[:, None], 0.0)
    eps = of_logit(products, hidden_size)

    out = torch.empty(len(hidden), columns, dtype=torch.bfloat16, device=DEVICE)
    partials = kernels.new_partials(hidden, weight, Epilogue(**head))
    given = hidden, weight, targets, Epilogue(**head), anchors[:, 0].float(), out, partials, 0
    kernels.projection_anchored(*given)
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    # The anchor itself is rounded; what is smaller than bf16's normal numbers may vanish.
    share = 2.0**-8 + eps + 2.0**-23 * anchors.abs() + 2.0**-20
    share = share + (4 * eps / 30.0) / slope.clamp(min=1e-6) if head else share
    assert ((out.double() - truth).abs() <= share * truth + smallest).all()
    logps, _, _ = kernels.merge_statistics(partials, targets)
    assert (logps - z.log_softmax(-1).gather(1, targets[:, None])[:, 0]).abs().max() <= 2 * eps


@gpu
@pytest.mark.parametrize("by", ["tiles", "library"])
@pytest.mark.parametrize("dtype", ["halves", torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("v", "h"), [(VOCABULARY, 4096), (1009, 100), (130, 257)])
def test_the_heads_gradient_of_groups(v, h, dtype, by):
    """Two groups, the second added; the second shape has no aligned rows."""
    n, halves = 300, dtype == "halves"
    high = draw(v, h, dtype=torch.bfloat16 if halves else dtype)  # what is there is not read
    low = torch.full((v, h), 77, dtype=torch.int8, device=DEVICE) if halves else None
    scale = torch.tensor(2.0**-16, device=DEVICE)
    part = slice(None, 1000)  # float64 of all of it would take minutes
    truth, sizes = 0.0, 0.0
    with configs.trial({("choices", "weight_gradient"): by}):
        for group in range(2):
            gradient = draw(n, v, dtype=torch.float16, scale=100.0, seed=group)
            rows = draw(n, h, dtype=torch.float16, seed=2 + group)
            kernels.add_weight_gradient_(high, low, gradient, rows, scale, add=group > 0)
            operands = gradient[:, part].double().T, rows.double()
            truth = truth + scale.double() * operands[0] @ operands[1]
            sizes = sizes + scale.double() * operands[0].abs() @ operands[1].abs()
    found = high[part].double()
    if halves:
        found = joined(high[part], low[part]).double()
    # 24 bits, 8 or those of fp32; each group is rounded once.
    unit = {"halves": 2.0**-17, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[dtype]
    cut = accumulation_error(n, 1.0) + n * 2.0**-24
    assert ((found - truth).abs() <= 2 * cut * sizes + 2 * unit * sizes).all()


@gpu
def test_operands_and_kept_rows_are_torchs_bit_for_bit():
    n, h = 300, 4096
    hidden, factor = draw(2 * n, h, dtype=torch.bfloat16), draw(n, seed=1)
    index = torch.randperm(2 * n, device=DEVICE)[:n]
    bounds = hidden.abs().max(), factor.abs().max()
    given = hidden, bounds[0], index, factor, bounds[1]
    for ours, theirs in zip(kernels.fitted(*given), elementwise.fitted(*given), strict=True):
        assert torch.equal(ours, theirs)
    # A power of two, so that the order of factors rounds nothing.
    wide, half = draw(n, h, seed=2), torch.full((), 0.5, device=DEVICE)
    kept = []
    for by in (kernels, elementwise):
        high = torch.zeros(2 * n, h, dtype=torch.bfloat16, device=DEVICE)
        low = torch.zeros(n, h, dtype=torch.int8, device=DEVICE)
        by.keep_(wide, high, low, index)
        before = high.clone(), low.clone()
        by.take_(high, low, index, factor, half)
        kept.append((*before, high))
    for ours, theirs in zip(*kept, strict=True):
        assert torch.equal(ours, theirs)


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
    allowed = 4 * accumulation_error(hidden_size, 60.0) + 2.0**-20 * 60
    assert (logps[-128:] - found[1][0]).abs().max() <= allowed


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
