"""torch.compile: every public function is one operator of a graph, and what it gives is eager's."""

import gc

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from trl_runs import OURS, compare_runs, make_trainer, trained

from fastpref import (
    DPO,
    Balance,
    PlackettLuce,
    SimPO,
    UniDPO,
    compiled,
    linear_logps,
    preference_loss,
    sequence_logps,
)
from fastpref.objectives import Objective, PairLogps

S, T, H, V = 6, 7, 8, 31


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    compiled._states.clear()
    yield
    torch._dynamo.reset()


def leaves(dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((S, T, H), (V, H), (V,))
    )
    return hidden, weight, bias


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(4)
    targets = torch.randint(0, V, (S, T), generator=draw)
    targets[:, :2] = targets[1, 4:] = -100
    ref_logps = torch.randn(S, generator=draw) - 15
    scores = torch.rand(S, generator=draw) * 10
    return targets, {"ref_logps": ref_logps, "scores": scores}


def numbers(value):
    """Every tensor of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [x for name in sorted(value) for x in numbers(value[name])]
    if isinstance(value, tuple):
        return [x for each in value for x in numbers(each)]
    return numbers((value.loss, value.losses, value.logps, value.lengths, value.metrics))


def assert_alike(function, dtype=torch.float32, **how):
    """Bit for bit: what it returns, and gradients of a total in which nothing is added up."""
    found = []
    for call in (function, torch.compile(function, fullgraph=True, **how)):
        given = leaves(dtype)
        result, total = call(*given)
        total.backward()
        found.append([*numbers(result), total.detach(), *(x.grad for x in given)])
    eager, one_graph = found
    assert len(eager) == len(one_graph)
    for a, b in zip(eager, one_graph, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    return eager


OBJECTIVE = UniDPO(balance=Balance())
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", ["pair_groups", "recompute"])
def test_preference_loss(schedule, dtype, backend, batch):
    targets, of_pairs = batch

    def step(hidden, weight, bias):
        out = preference_loss(
            1.5 * hidden, weight, targets, OBJECTIVE, **of_pairs, bias=bias, temperature=0.7,
            schedule=schedule, stats=("entropy", "is_top1"), logits_budget=2000,
        )  # fmt: skip
        return out, 2 * out.loss

    found = assert_alike(step, dtype, backend=backend)
    assert all(x.isfinite().all() for x in found) and found[-2].any()


@pytest.mark.parametrize("case", ["sum", "none", "capturable", "packed", "lists", "weighted"])
def test_arguments_of_every_kind(case, batch):
    targets, of_pairs = batch
    cu_seqlens = torch.arange(S + 1) * T
    draw = torch.Generator().manual_seed(5)
    token_weights = torch.rand(S, T, generator=draw)
    weights, betas = torch.rand(S // 2, generator=draw), torch.rand(S // 2, generator=draw)
    lists, simpo, dpo = PlackettLuce(), SimPO(), DPO()

    def step(hidden, weight, bias):
        hidden = 1 * hidden
        if case == "packed":
            given = hidden.flatten(0, 1), weight, targets.flatten(), OBJECTIVE
            out = preference_loss(*given, **of_pairs, cu_seqlens=cu_seqlens, bias=bias)
        elif case == "lists":
            given = hidden, weight, targets, lists
            out = preference_loss(*given, **of_pairs, responses=3, bias=bias)
        elif case == "weighted":
            out = preference_loss(
                hidden, weight, targets, objective=dpo, ref_logps=of_pairs["ref_logps"], bias=bias,
                token_weights=token_weights, weighted_lengths=True, pair_weights=weights,
                betas=betas, softcap=3.0, stats="entropy",
            )  # fmt: skip
        elif case == "capturable":
            out = preference_loss(hidden, weight, targets, simpo, bias=bias, capturable=True)
        else:
            out = preference_loss(hidden, weight, targets, "simpo", bias=bias, reduction=case)
        return out, out.loss[1] if case == "none" else out.loss

    if case == "capturable":
        targets[1, 4:] = 5
    assert_alike(step)


@BACKENDS
def test_sequence_logps(backend, batch):
    targets, _ = batch

    def step(hidden, weight, bias):
        strided = hidden.mT.contiguous().mT, weight.T.contiguous().T
        found = sequence_logps(*strided, targets, bias=bias)
        return found, found[0][2]

    assert_alike(step, backend=backend)


@BACKENDS
@pytest.mark.parametrize("stats", [(), "entropy", ["is_top1", "entropy", "log_sum_sq_probs"]])
def test_linear_logps(stats, backend, batch):
    """Entropy has a gradient of its own, whatever stands before it."""
    targets, _ = batch

    def step(hidden, weight, bias):
        found = linear_logps(1 * hidden, weight, targets, bias=bias, stats=stats)
        total = (found[1]["entropy"] if stats else found)[3, 3]
        return found, total

    found = assert_alike(step, backend=backend)
    assert found[-2].any()


class Scaled(Objective):
    beta = 0.1  # which one that is not whole yet has, as a dataclass has its defaults

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, pairs: PairLogps):
        chosen, rejected = pairs.log_ratios(normalized=True)
        return (self.beta * (chosen - rejected) - pairs.extras["shift"]).square()

    extras = ("shift",)

    def diagnostics(self, pairs):
        return {"seen": pairs.extras["both"][1]} if "both" in pairs.extras else {}


HIDDEN = leaves()[0].detach()


def losses_of(batch, objective, weight, **how):
    targets, of_pairs = batch
    return preference_loss(
        1 * HIDDEN, weight, targets, objective, ref_logps=of_pairs["ref_logps"], **how
    )


def test_an_objective_is_the_one_that_is_given(batch):
    """Another one, one that was changed in place, one of equal fields: never one of before."""
    extras = {"shift": torch.rand(S // 2)}
    weight = leaves()[1]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(weight, objective):
        return losses_of(batch, objective, weight, extras=extras).loss

    def eager(weight, objective):
        return losses_of(batch, objective, weight, extras=extras).loss

    objective = Scaled(0.3)
    seen = [one_graph(weight, objective)]
    assert seen[0] == eager(weight, objective)
    objective.beta = 0.7
    seen.append(one_graph(weight, objective))
    assert seen[1] == eager(weight, objective) != seen[0]
    del objective
    gc.collect()
    for beta in (0.3, 0.9):
        objective = Scaled(beta)
        seen.append(one_graph(weight, objective))
        assert seen[-1] == eager(weight, objective)
    assert seen[2] == seen[0] != seen[3]


def test_extras_of_prompts_and_of_responses(batch):
    extras = {"shift": torch.rand(S // 2), "both": torch.rand(S)}
    objective, weight = Scaled(0.4), leaves()[1]
    objective.extras = ("shift", "both")

    def metrics(weight):
        return losses_of(batch, objective, weight, extras=extras).metrics

    found = torch.compile(metrics, fullgraph=True, backend="aot_eager")(weight)
    assert found == metrics(weight) and "seen" in found


class Learned(torch.nn.Module, Objective):
    def __init__(self):
        super().__init__()
        self.beta = torch.nn.Parameter(torch.tensor(0.2))

    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=False)
        return torch.nn.functional.softplus(-self.beta * (chosen - rejected))


def made_inside(batch, weight):
    return losses_of(batch, Scaled(0.6), weight, extras={"shift": torch.ones(S // 2)}).loss


LEARNED = Learned()
ALONE = {
    "an objective made inside": made_inside,
    "parameters": lambda batch, weight: losses_of(batch, LEARNED, weight).loss,
    "weight_grad": lambda batch, weight: (
        losses_of(batch, DPO_OUTSIDE, weight, weight_grad=torch.zeros(V, H)).loss
    ),
}
DPO_OUTSIDE = DPO()


@pytest.mark.parametrize("name", ALONE)
def test_what_no_operator_takes_runs_beside_the_graph_or_says_why(name, batch):
    weight, function = leaves()[1], ALONE[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="made outside of the compiled"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(batch, weight)
    torch._dynamo.reset()
    found = torch.compile(function, backend="aot_eager")(batch, weight)
    assert found == function(batch, weight)


def test_what_is_wrong_is_said_in_the_same_words(batch):
    weight = leaves()[1]

    def wrong(weight, **how):
        return losses_of(batch, DPO_OUTSIDE, weight, **how).loss

    for how, full in (({"temperature": -1.0}, True), ({"schedule": "x"}, True), ({}, False),
                      ({"temperature": float("inf")}, True), ({"betta": 1}, False)):  # fmt: skip
        torch._dynamo.reset()
        given = weight[:, 1:] if how == {} else weight
        with pytest.raises((ValueError, TypeError)) as eager:
            wrong(given, **how)
        with pytest.raises(eager.type) as one_graph:
            torch.compile(wrong, fullgraph=full, backend="aot_eager")(given, **how)
        assert str(one_graph.value) == str(eager.value)


WRONG = {
    "objective": 3,
    "responses": 2.5,
    "stats": (1,),
    "extras": [1],
    "targets": torch.tensor(3),
    "cu_seqlens": torch.tensor(3),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_the_wrong_kind_are_told_of_in_the_same_words(name, batch):
    targets, of_pairs = batch
    weight = leaves()[1]
    given = {"targets": targets, "objective": OBJECTIVE, **of_pairs, name: WRONG[name]}

    def wrong(weight):
        return preference_loss(1 * HIDDEN, weight, **given).loss

    with pytest.raises((ValueError, TypeError)) as eager:
        wrong(weight)
    with pytest.raises(eager.type) as compiled_one:
        torch.compile(wrong, backend="aot_eager")(weight)
    assert str(compiled_one.value) == str(eager.value)


def test_memory_that_the_graph_takes_for_free_may_be_written_over(batch):
    """Of its last use in the graph on, an argument is the compiler's."""
    targets, _ = batch

    class Overwrites(torch.fx.Interpreter):
        def run_node(self, node):
            found = super().run_node(node)
            if "forward" in str(node.target):
                for argument in node.args[4]:
                    if argument.op == "call_function":
                        self.env[argument].fill_(torch.nan)
                        overwritten.append(argument)
            return found

    def overwriting(graph, inputs):
        return make_boxed_func(lambda *args: Overwrites(graph).run(*args))

    def step(hidden, weight, bias):
        states = 1.5 * hidden, 2 * weight
        logps, _ = sequence_logps(*states, targets, bias=bias, schedule="recompute")
        return logps, logps[1] + logps[2]

    overwritten = []
    backend = aot_autograd(
        fw_compiler=overwriting, bw_compiler=lambda graph, _: make_boxed_func(graph)
    )
    assert_alike(step, backend=backend)
    assert len(overwritten) == 2


def test_hidden_states_are_copied_once_and_parameters_never(batch, monkeypatch):
    targets, of_pairs = batch
    weight = torch.nn.Parameter(leaves()[1].detach())
    large, clone = [], torch.Tensor.clone

    def counted(tensor, *args, **how):
        if tensor.numel() >= weight.numel():
            large.append(tuple(tensor.shape))
        return clone(tensor, *args, **how)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(hidden):
        return preference_loss(1 * hidden, weight, targets, OBJECTIVE, **of_pairs).loss

    one_graph(HIDDEN)
    monkeypatch.setattr(torch.Tensor, "clone", counted)
    one_graph(HIDDEN).backward()
    with torch.no_grad():
        one_graph(HIDDEN)
    monkeypatch.undo()
    assert large == [tuple(HIDDEN.shape)]


def test_a_parameter_that_is_written_before_its_backward_is_an_error(batch):
    targets, _ = batch
    weight = torch.nn.Parameter(leaves()[1].detach())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(hidden):
        return sequence_logps(1 * hidden, weight, targets, schedule="recompute")[0].sum()

    total = one_graph(HIDDEN)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_two_calls_that_are_alike_have_two_backwards(batch):
    targets, _ = batch

    def step(hidden, weight, bias):
        first = sequence_logps(2 * hidden, weight, targets, bias=bias)
        second = sequence_logps(2 * hidden, weight, targets, bias=bias)
        return first, first[0][2] + second[0][2] ** 2

    assert_alike(step, backend="aot_eager")


def test_numbers_that_vary(batch):
    targets, of_pairs = batch
    weight = leaves()[1]

    def step(hidden, temperature, budget):
        given = 1 * hidden, weight, targets, OBJECTIVE
        how = {"temperature": temperature, "logits_budget": budget}
        return preference_loss(*given, **of_pairs, **how).loss

    one_graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        numbers = 0.7 + i / 10, 1000 * (i + 1)
        assert one_graph(HIDDEN, *numbers) == step(HIDDEN, *numbers)


def test_extras_of_batches_of_any_size_take_one_graph():
    weight, objective = leaves()[1], Scaled(0.4)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def one_graph(hidden, targets, ref_logps, shift):
        given = 1 * hidden, weight, targets, objective
        return preference_loss(*given, ref_logps=ref_logps, extras={"shift": shift}).loss

    torch._dynamo.utils.counters.clear()
    for prompts in (2, 3, 4, 5):
        hidden, targets = torch.randn(2 * prompts, T, H), torch.randint(0, V, (2 * prompts, T))
        one_graph(hidden, targets, torch.zeros(2 * prompts), torch.rand(prompts))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_objective_that_becomes_another_kind_is_an_error(batch):
    weight = leaves()[1]
    objective, extras = Learned().requires_grad_(False), {"shift": torch.ones(S // 2)}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(weight, objective):
        return losses_of(batch, objective, weight).loss

    one_graph(weight, objective)
    objective.requires_grad_(True)
    with pytest.raises(RuntimeError, match="has something to train now"):
        one_graph(weight, objective)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def logged(weight, objective):
        return losses_of(batch, objective, weight, extras=extras).metrics

    objective = Scaled(0.3)
    logged(weight, objective)
    objective.diagnostics = lambda pairs: {"more": pairs.chosen_logps}
    with pytest.raises(RuntimeError, match="what is logged was"):
        logged(weight, objective)


def test_nothing_is_kept_of_what_has_no_backward(batch):
    weight = leaves()[1]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(weight):
        return losses_of(batch, DPO_OUTSIDE, weight).loss

    with torch.no_grad():
        one_graph(weight)
    assert not compiled._states
    for _ in range(4):
        one_graph(weight)
    assert len(compiled._states) == 1  # until the next one
    one_graph(weight).backward()
    assert not compiled._states


@torch._functorch.config.patch(donated_buffer=False)  # with which torch itself is the first to say
def test_a_second_backward_is_an_error(batch):
    weight = leaves()[1]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(weight):
        return losses_of(batch, DPO_OUTSIDE, weight).loss

    loss = one_graph(weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in the first backward"):
        loss.backward()


def test_under_autocast(batch):
    targets, of_pairs = batch
    weight = leaves()[1]

    def total(hidden, weight):
        given = hidden @ torch.eye(H), weight, targets, OBJECTIVE
        return preference_loss(*given, **of_pairs).loss

    found = []
    for call in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(leaves()[0], weight)
        (grad,) = torch.autograd.grad(loss, weight)
        found.append((loss, grad))
        assert grad.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0] != total(leaves()[0], weight)


def test_batches_of_any_length_take_one_graph(batch):
    targets, of_pairs = batch
    hidden, weight, _ = leaves()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def one_graph(hidden, targets):
        return preference_loss(1 * hidden, weight, targets, OBJECTIVE, **of_pairs).loss

    torch._dynamo.utils.counters.clear()
    for length in (3, 4, 5, 6):
        given = hidden[:, :length], targets[:, :length]
        assert (
            one_graph(*given)
            == preference_loss(given[0], weight, given[1], OBJECTIVE, **of_pairs).loss
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_within_a_checkpoint(batch):
    targets, of_pairs = batch

    def step(hidden, weight, bias):
        def inner(hidden):
            given = 2 * hidden, weight, targets, OBJECTIVE
            return preference_loss(*given, **of_pairs, bias=bias).loss

        total = checkpoint(inner, hidden, use_reentrant=False)
        return total, total

    assert_alike(step, backend="aot_eager")


def test_the_operators_are_what_torch_takes_them_for(batch):
    """Shapes, dtypes and strides said in advance are those that come; nothing given is written."""
    targets, of_pairs = batch
    hidden, weight, bias = leaves()
    seen = {}

    class Seen(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if "fastpref" in str(target):
                seen[str(target).split(".")[1]] = args
            return super().call_function(target, args, kwargs)

    def keep(graph, inputs):
        return lambda *args: Seen(graph).run(*args)

    def step(hidden, weight):
        found = linear_logps(hidden, weight.T, targets, bias=bias, stats=("is_top1", "entropy"))
        out = preference_loss(hidden, weight.T, targets, OBJECTIVE, **of_pairs, bias=bias)
        return out.loss + found[1]["entropy"].sum()

    strided = weight.detach().T.contiguous().requires_grad_()
    torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(hidden, strided)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(compiled.forward, seen["forward"], test_utils=tests)


def test_a_trainer_that_compiles(tiny_llama, pairs, tmp_path):
    compiles = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    eager, one_graph = (
        trained(make_trainer(OURS, tiny_llama, pairs, tmp_path, **options))
        for options in ({}, compiles)
    )
    compare_runs(one_graph, eager, relative=1e-5)
