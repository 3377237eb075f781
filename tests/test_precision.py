"""Products stay float32 where the process allows TF32 or bf16, and its settings stay its own."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import SimPO, linear_logps, preference_loss
from fastpref.backends import products
from fastpref.scheduled import Scheduled

VERSION = tuple(int(x) for x in torch.__version__.split(".")[:2])
BACKENDS = torch.backends


def together(precision):
    torch.set_float32_matmul_precision(precision)


def allow_tf32():
    BACKENDS.cuda.matmul.allow_tf32 = True


def apart(cuda, mkldnn):
    BACKENDS.cuda.matmul.fp32_precision = cuda
    BACKENDS.mkldnn.matmul.fp32_precision = mkldnn


def everywhere():
    apart("none", "none")
    BACKENDS.fp32_precision = "tf32"


def legacy_then_apart():
    together("high")
    apart("ieee", "bf16")


SINCE_2_9 = {
    "cuda": lambda: apart("tf32", "none"),
    "mkldnn": lambda: apart("none", "bf16"),
    "everywhere": everywhere,
    "legacy, then apart": legacy_then_apart,
}
ALLOWED = {
    "untouched": lambda: None,
    "high": lambda: together("high"),
    "medium": lambda: together("medium"),
    "allow_tf32": allow_tf32,
} | (SINCE_2_9 if VERSION >= (2, 9) else {})


def settings():
    """All that can be asked; what refuses to answer is a setting too."""
    found = []
    asked = [torch.get_float32_matmul_precision, lambda: BACKENDS.cuda.matmul.allow_tf32]
    if VERSION >= (2, 9):
        holders = (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)
        asked += [lambda holder=holder: holder.fp32_precision for holder in holders]
    for ask in asked:
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


def is_full():
    if VERSION < (2, 9):
        return torch.get_float32_matmul_precision() == "highest"
    holders = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul
    return all(holder.fp32_precision in ("ieee", "none") for holder in holders)


@pytest.fixture(params=ALLOWED)
def allowed(request):
    reset()
    ALLOWED[request.param]()
    yield settings()
    reset()


def reset():
    together("highest")
    if VERSION >= (2, 9):
        BACKENDS.fp32_precision = "none"
        apart("none", "none")


class Watch(TorchDispatchMode):
    """Whether each product ran at full precision."""

    def __init__(self):
        super().__init__()
        self.full = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "addmv", "addmv_", "bmm"):
            self.full.append(is_full())
        return function(*args, **(kwargs or {}))


def step(schedule, watch, call=preference_loss):
    torch.manual_seed(7)
    hidden, weight, bias = torch.randn(4, 9, 64), torch.randn(131, 64), torch.randn(131)
    leaves = [hidden, weight, bias]
    for leaf in leaves[: 1 if schedule == "frozen_head" else 3]:
        leaf.requires_grad_()
    targets = torch.randint(0, 131, (4, 9))
    how = {"bias": bias, "logit_scale": 0.7, "schedule": schedule, "backend": "torch"}
    with watch:
        loss = call(hidden, weight, targets, SimPO(), **how).loss
        loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("schedule", ["pair_groups", "recompute", "frozen_head"])
def test_products_are_float32_whatever_is_allowed(schedule, allowed):
    watch = Watch()
    found = step(schedule, watch)
    assert len(watch.full) >= 2
    assert all(watch.full)
    assert settings() == allowed
    reset()
    for value, expected in zip(found, step(schedule, contextlib.nullcontext()), strict=True):
        assert torch.equal(value, expected)


def test_the_watch_sees_what_is_allowed():
    """The check above can fail."""
    reset()
    try:
        together("high")
        with Watch() as watch:
            torch.ones(2, 2) @ torch.ones(2, 2)
        assert watch.full == [False]
    finally:
        reset()


def test_settings_outlive_an_error(allowed):
    with pytest.raises(RuntimeError):
        products.product_into(torch.ones(2, 3), torch.ones(2, 3), out=torch.ones(2, 3))
    assert settings() == allowed
    products.product_into(torch.ones(2, 3), torch.ones(3, 2), out=torch.ones(2, 2))  # no lock held


@pytest.mark.skipif(VERSION < (2, 9), reason="torch has one setting for all before 2.9")
def test_what_is_inherited_stays_inherited():
    reset()
    try:
        BACKENDS.fp32_precision = "tf32"
        products.product_into(torch.ones(2, 3), torch.ones(3, 2), out=torch.ones(2, 2))
        assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
        BACKENDS.fp32_precision = "ieee"
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
    finally:
        reset()


def test_an_objective_sees_the_settings_of_its_caller(allowed):
    """The logits of a group are held while it runs, the settings are not."""
    seen = []

    class Looks(SimPO):
        def __call__(self, pairs):
            seen.append(settings())
            return super().__call__(pairs)

    hidden, weight = torch.randn(4, 3, 8).requires_grad_(), torch.randn(31, 8).requires_grad_()
    preference_loss(hidden, weight, torch.randint(0, 31, (4, 3)), Looks(), schedule="pair_groups")
    assert seen
    assert all(found == allowed for found in seen)


@pytest.mark.parametrize("schedule", ["pair_groups", "logps"])
def test_no_product_is_compiled(schedule):
    """In a graph it would run later, at whatever precision is allowed by then."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    if schedule == "logps":
        weight = torch.randn(31, 8).requires_grad_()
        targets = torch.randint(0, 31, (6,))

        def log_probabilities(x):
            return linear_logps(2 * x, weight, targets, backend="torch").sum()

        torch.compile(log_probabilities, backend=keep)(torch.randn(6, 8)).backward()
    else:

        @torch.compile(backend=keep)
        def compiled(hidden, *args, **how):
            return preference_loss(1 * hidden, *args, **how)

        found = step(schedule, contextlib.nullcontext(), compiled)
        for value, expected in zip(found, step(schedule, contextlib.nullcontext()), strict=True):
            assert torch.equal(value, expected)
    assert graphs
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert not [name for name in called if "mm" in name or "matmul" in name]


@pytest.mark.parametrize("schedule", ["pair_groups", "frozen_head", "recompute"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_compiled_step_allocates_what_the_eager_one_does(schedule, capturable, monkeypatch):
    """The same operators on the same sizes, of all that is as large as the hidden states or the
    head: none is decomposed, and none put together."""
    taken, inner, gradients = [], Scheduled.preference_loss, torch.autograd.grad

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)]
            views = function.is_view or "fastpref" in str(function)
            if any(x.numel() >= 36 * 64 for x in tensors) and not views:
                taken.append((str(function), *(tuple(x.shape) for x in tensors)))
            return found

    def watched(function):  # a mode around the call would keep torch.compile from compiling
        def within(*args, **how):
            with Operators():
                return function(*args, **how)

        return within

    monkeypatch.setattr(Scheduled, "preference_loss", watched(inner))
    monkeypatch.setattr(torch.autograd, "grad", watched(gradients))
    graphs, runs = [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def total(hidden, *args):
        how = {"schedule": schedule, "backend": "torch", "capturable": capturable}
        return preference_loss(2 * hidden, *args, **how).loss

    torch._dynamo.reset()
    weight = torch.randn(131, 64).requires_grad_(schedule != "frozen_head")
    given = weight, torch.randint(0, 131, (4, 9)), SimPO()
    for run in (total, torch.compile(total, backend=keep)):
        run(torch.ones(4, 9, 64).requires_grad_(), *given)
        taken.clear()
        weight.grad = None
        loss = run(torch.ones(4, 9, 64).requires_grad_(), *given)
        with Operators():
            loss.backward()
        runs.append(taken.copy())
    assert graphs
    assert any("mm" in name for name, *_ in runs[0])
    assert runs[0] == runs[1]
