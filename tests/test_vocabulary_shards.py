"""A head whose vocabulary lies on several ranks: everything as on one, and no logits on the way."""

import dataclasses
import itertools
import re

import pytest
import torch
from ranks import Sent
from torch import distributed
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastpref
from fastpref import DPO, WPO, AdaDPO, Balance, SimPO, UniDPO
from fastpref.backends import TOKEN_STATS
from fastpref.objectives import AOT
from fastpref.planner import Layout, Problem

V, H, PAIRS, LENGTH = 37, 6, 3, 5
# Parts by number of ranks: uneven, of one token, none at the end, and by default what chunks are.
PARTS = {2: [(19, 18), (36, 1)], 4: [(10, 10, 10, 7), (10, 20, 7, 0)]}
STATS = ("entropy", "mean_logits", "is_top1")
SCHEDULES = {
    "one group": {"schedule": "pair_groups"},
    "groups": {"schedule": "pair_groups", "budget": 2 * 2 * LENGTH},
    "beyond the budget": {"schedule": "pair_groups", "budget": 4},
    "recompute": {"schedule": "recompute"},
    "one by one": {"schedule": "recompute", "reduction": "none"},
    "frozen head": {"schedule": "frozen_head"},
    "forward": {},
}
OBJECTIVES = {
    "DPO": DPO(),
    "Uni-DPO": UniDPO(balance=Balance()),
    "AdaDPO": AdaDPO(),
    "WPO": WPO(SimPO()),  # takes statistics of its own
    "AOT": AOT(),  # couples pairs
}
HEADS = {
    "plain": {},
    "all of it": {"bias": 1.0, "softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3},
    "adapters": {"bias": 1.0, "frozen": True, "logit_scale": 1.2},
    "far apart": {"bias": 300.0},  # most parts have probabilities that underflow
}


def make_batch(dtype, seed=0):
    """Every part's first and last token is a target somewhere, in PARTS."""
    draw = torch.Generator().manual_seed(seed)
    edges = {e for parts in itertools.chain(*PARTS.values()) for e in itertools.accumulate(parts)}
    ids = torch.tensor(sorted({0, *edges, *(edge - 1 for edge in edges)} - {V}))
    more = torch.randint(0, V, (2 * PAIRS * LENGTH - len(ids),), generator=draw)
    targets = torch.cat([ids, more]).view(2 * PAIRS, LENGTH)
    targets[1, 2:] = -100

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(2 * PAIRS, LENGTH, H) * 2,
        "targets": targets,
        "weight": normal(V, H),
        "bias": normal(V),
        "frozen_weight": normal(V, 4),
        "frozen_scale": normal(V),
        "ref_logps": normal(2 * PAIRS).double() - 9,
        "scores": normal(2 * PAIRS).double(),
    }


def head_of(batch, options, part=slice(None), trains=True):
    """Leaves `(weight, options)` of a part of the vocabulary."""
    options = dict(options)
    size, frozen = options.pop("bias", None), options.pop("frozen", False)

    def leaf(x):
        return x[part].clone().requires_grad_(trains)

    weight = leaf(batch["weight"][:, :2] if frozen else batch["weight"])
    if size is not None:
        options["bias"] = leaf(batch["bias"] * size)
    if frozen:
        options |= {"frozen_weight": batch["frozen_weight"][part]}
        options |= {"frozen_scale": leaf(batch["frozen_scale"])}
    return weight, options


def everything(batch, weight, options, objective, stats, how, **group):
    """By name whatever a loss returns and leaves behind, gradients last."""
    how = {"backend": "torch"} | how
    if (rows := how.pop("budget", None)) is not None:
        how["logits_budget"] = rows * len(weight) * 8 if not group else rows * group.pop("most") * 8
    group.pop("most", None)
    hidden = batch["hidden"].clone().requires_grad_("schedule" in how)
    out = fastpref.preference_loss(
        hidden,
        weight,
        batch["targets"],
        objective,
        ref_logps=batch["ref_logps"] if objective.needs_reference else None,
        scores=batch["scores"] if objective.needs_scores else None,
        stats=stats,
        **options,
        **how,
        **group,
    )
    found = {name: getattr(out, name) for name in ("loss", "losses", "logps")} | out.metrics
    if hidden.requires_grad:
        upstream = torch.linspace(1, 2, out.loss.numel()).to(out.loss).view(out.loss.shape)
        out.loss.backward(upstream)
        found["hidden's"] = hidden.grad
    for name, x in [("weight's", weight), *options.items()]:
        if isinstance(x, torch.Tensor) and x.grad is not None:
            found[f"{name} gradient"] = x.grad
    return {name: x.detach() for name, x in found.items()}


def share(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def furthest(found, truth, part):
    """The largest difference, relative to what it is compared to, and where.

    Gradients are compared to all of theirs, numbers to 1 where they are smaller.
    """
    assert found.keys() == truth.keys(), (found.keys(), truth.keys())
    worst = []
    for name, expected in truth.items():
        if name.endswith("gradient"):
            expected = expected[part]
        size = truth[name].double().norm()
        if not name.endswith(("gradient", "'s")):
            size = size.clamp(min=1)
        difference = (found[name].double() - expected.double()).norm()
        worst.append(((difference / size).item(), name))
    return max(worst)


def compare(rank, dtype, cases, backend="torch"):
    """Of each case the furthest difference from one process."""
    distances = {}
    for key, objective, stats, head, how, sizes in cases:
        batch, how = make_batch(dtype), how | {"backend": backend}
        trains = how.get("schedule") not in (None, "frozen_head")
        part, given = share(rank, sizes), HEADS[head]
        objective = OBJECTIVES[objective]
        truth = everything(batch, *head_of(batch, given, trains=trains), objective, stats, how)
        own = head_of(batch, given, part, trains)
        group = {"vocab_group": distributed.group.WORLD, "most": max(sizes)}
        found = everything(batch, *own, objective, stats, how, **group)
        distances[key] = furthest(found, truth, part)
    return distances


def cases_of(world, schedules=SCHEDULES, heads=HEADS, objectives=OBJECTIVES):
    """Every schedule with every head; objectives, statistics and parts in turn."""
    for i, (schedule, head) in enumerate(itertools.product(schedules, heads)):
        names = [*objectives]
        if SCHEDULES[schedule].get("schedule") == "pair_groups":
            names.remove("AOT")
        name, sizes = names[i % len(names)], PARTS[world][i % 2]
        stats = STATS if i % 3 else ()
        yield (schedule, head, name, sizes), name, stats, head, SCHEDULES[schedule], sizes


def allowed(dtype, head):
    """Of two sums of V products of H terms, in another order.

    A softmax's relative error is that of its logits, ε times their size: 800 where they are "far
    apart", less than V + H elsewhere.
    """
    return 2 * (1000 if head == "far apart" else V + H) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_schedule_is_as_on_one_rank(ranks, dtype):
    for found in ranks.run(compare, dtype, [*cases_of(ranks.world)]):
        for key, (distance, name) in found.items():
            assert distance <= allowed(dtype, key[1]), (key, name, distance)


def test_bfloat16_is_rounded_once(ranks):
    """Rows of gradient are summed over ranks before they are rounded.

    The same sum but for float32's errors goes to the neighbour, 2⁻⁸ away, only where it lies that
    near to the middle of two: of one number in so many.
    """
    one_in = 2**-8 / allowed(torch.float32, "plain")
    cases = [*cases_of(ranks.world, heads=("plain", "all of it"))]
    for found in ranks.run(compare, torch.bfloat16, cases):
        for key, (distance, name) in found.items():
            assert distance <= 2**-8 / one_in**0.5, (key, name, distance)


# --- tokens ---------------------------------------------------------------------------------------


def tokens(rank, sizes, head, backend):
    """The furthest difference from one process."""
    batch = make_batch(torch.float64)
    batch["targets"][0, 0] = -100

    def of(part, **group):
        weight, options = head_of(batch, HEADS[head], part)
        hidden = batch["hidden"].clone().requires_grad_()
        given = hidden, weight, batch["targets"]
        logps, stats = fastpref.linear_logps(
            *given, stats=TOKEN_STATS, backend=backend, **options, **group
        )
        (logps + stats["entropy"]).sum().backward()
        sums, _ = fastpref.sequence_logps(*given, backend=backend, **options, **group)
        frozen = {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        again = batch["hidden"].clone().requires_grad_()  # frozen head, and a gradient of entropy
        found = fastpref.linear_logps(
            again,
            weight.detach(),
            batch["targets"],
            stats="entropy",
            backend=backend,
            **frozen,
            **group,
        )
        (found[0].square().sum() + found[1]["entropy"].sum()).backward()
        return {"logps": logps, "sums": sums} | stats | {
            "hidden's": hidden.grad,
            "frozen head's": again.grad,
            "weight's gradient": weight.grad,
        }  # fmt: skip

    part = share(rank, sizes)
    truth, found = of(slice(None)), of(part, vocab_group=distributed.group.WORLD)
    assert torch.equal(found["is_top1"], truth["is_top1"])
    return furthest(found, truth, part)


@pytest.mark.parametrize("head", HEADS)
def test_tokens_and_all_their_statistics(ranks, head):
    for sizes in PARTS[ranks.world]:
        for distance, name in ranks.run(tokens, sizes, head, "torch"):
            assert distance <= allowed(torch.float64, head), (sizes, name)


def special(rank):
    """What a bias masks, equal maxima, and NaN."""
    found = {}
    weight = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(4, 3, dtype=torch.float64)
    part, group = slice(4 * rank, 4 * rank + 4), {"vocab_group": distributed.group.WORLD}
    for name in ("masked", "tied", "NaN"):
        bias, targets = torch.zeros(8, dtype=torch.float64), torch.tensor([1, 5, 0, 7])
        if name == "masked":
            bias[:4], targets = -torch.inf, torch.tensor([4, 5, 6, 7])
        elif name == "tied":
            bias[[1, 5]], weight = 50, torch.zeros_like(weight)
        else:
            hidden[2] = torch.nan
        for schedule in ("recompute", "pair_groups"):
            both = []
            for which, more in ((slice(None), {}), (part, group)):
                w = weight[which].clone().requires_grad_()
                h = hidden[:, None].clone().requires_grad_()
                logps, stats = fastpref.linear_logps(
                    hidden, w.detach(), targets, bias=bias[which], stats=TOKEN_STATS, **more
                )
                out = fastpref.preference_loss(
                    h, w, targets[:, None], SimPO(), bias=bias[which], schedule=schedule, **more
                )
                out.loss.backward()
                both.append([logps, *(stats[x] for x in TOKEN_STATS), h.grad, w.grad])
            *truth, of_weight = both[0]
            found[name, schedule] = both[1], [*truth, of_weight[part]]
    return found


def test_masked_parts_equal_maxima_and_nan(two_ranks):
    for cases in two_ranks.run(special):
        for (name, _), (found, truth) in cases.items():
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-13, atol=1e-13)
            assert name != "tied" or truth[3].tolist() == [True, False, False, False]
            assert name != "masked" or truth[1].isfinite().all()
            assert (name == "NaN") == bool(truth[0].isnan().any())


# --- what is sent -------------------------------------------------------------------------------


def volume(rank, vocabulary, hidden_size):
    sizes = [vocabulary // 2, vocabulary - vocabulary // 2]
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn((4, 7, hidden_size), generator=draw)
    targets = torch.randint(0, vocabulary, (4, 7), generator=draw)
    weight = torch.randn((vocabulary, hidden_size), generator=draw)[share(rank, sizes)]
    found = {}
    for schedule, stats in itertools.product(
        ("pair_groups", "recompute", "frozen_head", "auto"), ((), ("entropy",), STATS)
    ):
        w = weight.clone().requires_grad_(schedule in ("pair_groups", "recompute"))
        h = hidden.clone().requires_grad_(schedule != "auto")
        with pytest.MonkeyPatch.context() as patch:
            sent, group = Sent(patch), distributed.group.WORLD
            out = fastpref.preference_loss(
                h, w, targets, SimPO(), schedule=schedule, stats=stats, vocab_group=group
            )
            if schedule != "auto":
                out.loss.backward()
        found[schedule, stats] = sent.bytes
    return found


def test_the_bytes_a_row_are_those_that_are_documented(two_ranks):
    """And those of the planner, beside the 24 that ranks compare."""
    rows = 4 * 7
    for vocabulary, hidden_size in ((50, 8), (500, 8), (50, 16)):
        for found in two_ranks.run(volume, vocabulary, hidden_size):
            for (schedule, stats), sent in found.items():
                of_row = 8 + 4 * len(stats) + 4 * ("is_top1" in stats)
                assert sent["all_gather"] == 24 + rows * of_row
                wanted = rows * 4 * hidden_size * (schedule != "auto")
                assert sent["all_reduce"] == wanted, schedule
                fp32, wants = torch.float32, schedule != "auto"
                problem = Problem(
                    (7,) * 4, hidden_size, vocabulary, fp32, fp32, "cpu", rows, wants, wants
                )
                asked = len(stats) + ("is_top1" in stats)
                planned = {e.operation: e.bytes for e in Layout(tp=2).exchanges(problem, asked)}
                assert planned["all_gather"] == 2 * (sent["all_gather"] - 24)  # of both ranks
                assert planned.get("all_reduce", 0) == sent["all_reduce"]


# --- DTensors -----------------------------------------------------------------------------------


def as_dtensors(rank):
    """Differences from one process, and what came back as what."""
    world = distributed.get_world_size()
    mesh, batch = init_device_mesh("cpu", (world,)), make_batch(torch.float64)
    truth_weight, truth_options = head_of(batch, HEADS["adapters"])
    truth = everything(batch, truth_weight, truth_options, DPO(), STATS, SCHEDULES["one group"])
    found = {}
    for placement in (Shard(0), Replicate()):
        weight, options = head_of(batch, HEADS["adapters"])
        laid = {}
        for name, x in [("weight", weight), *options.items()]:
            if isinstance(x, torch.Tensor):
                trains, x = x.requires_grad, distribute_tensor(x.detach(), mesh, [placement])
                x = x.requires_grad_(trains)
            laid[name] = x
        hidden = distribute_tensor(batch["hidden"], mesh, [Replicate()]).requires_grad_()
        out = fastpref.preference_loss(
            hidden,
            laid["weight"],
            batch["targets"],
            DPO(),
            ref_logps=batch["ref_logps"],
            stats=STATS,
            schedule="pair_groups",
            **{name: x for name, x in laid.items() if name != "weight"},
        )
        out.loss.backward()
        gradients = {"hidden's": hidden.grad} | {
            f"{name}'s gradient" if name == "weight" else f"{name} gradient": x.grad
            for name, x in laid.items()
            if isinstance(x, torch.Tensor) and x.grad is not None
        }
        for name, x in gradients.items():
            assert x.placements == ((Replicate(),) if name == "hidden's" else (placement,)), name
        every = {name: getattr(out, name).detach() for name in ("loss", "losses", "logps")}
        every |= out.metrics | {name: x.full_tensor() for name, x in gradients.items()}
        found[str(placement)] = furthest(every, truth, slice(None))
    return found


def test_a_dtensor_weight_just_works(ranks):
    for found in ranks.run(as_dtensors):
        for placement, (distance, name) in found.items():
            assert distance <= allowed(torch.float64, "adapters"), (placement, name)


def weight_grads(rank):
    """Into a buffer of one's own, plain and as a DTensor, and by autograd."""
    mesh, batch = init_device_mesh("cpu", (2,)), make_batch(torch.float64)
    placed, found = [Shard(0)], []
    for schedule in ("groups", "recompute"):
        how = {"schedule": SCHEDULES[schedule]["schedule"], "logits_budget": 8 * V * 4}
        plain = batch["weight"].clone().requires_grad_()
        fastpref.preference_loss(
            batch["hidden"], plain, batch["targets"], SimPO(), **how
        ).loss.backward()
        weight = distribute_tensor(batch["weight"], mesh, placed).requires_grad_()
        into = distribute_tensor(torch.ones_like(batch["weight"]), mesh, placed)
        fastpref.preference_loss(
            batch["hidden"], weight, batch["targets"], SimPO(), weight_grad=into, **how
        ).loss.backward()
        assert weight.grad is None
        found.append((into.full_tensor() - 1 - plain.grad).abs().max().item())
    return found


def test_weight_grad_is_a_part_too(two_ranks):
    for found in two_ranks.run(weight_grads):
        assert max(found) <= allowed(torch.float64, "plain")


# --- refusals -----------------------------------------------------------------------------------


def refused(rank, case):
    """What each rank was told."""
    mesh, world = init_device_mesh("cpu", (2,)), distributed.group.WORLD
    batch = make_batch(torch.float32)
    part = share(rank, (19, 18))
    weight, given = batch["weight"][part], {"vocab_group": world}
    hidden, targets = batch["hidden"], batch["targets"]
    sharded = distribute_tensor(batch["weight"], mesh, [Shard(0)])
    if case == "columns":
        weight = weight[:, : H - rank]
    elif case == "dtype":
        weight = weight.to((torch.float32, torch.bfloat16)[rank])
    elif case == "requires_grad":
        weight = weight.clone().requires_grad_(rank == 0)
    elif case == "targets":
        targets = targets.clone()
        targets[0, 0] += rank
    elif case == "range":
        targets = targets.clone()
        targets[0, 0] = V
    elif case == "bias on one":
        given |= {"bias": batch["bias"][part]} if rank else {}
    elif case == "schedule":
        given |= {"schedule": ("recompute", "auto")[rank]}
    elif case == "one refuses":
        given |= {"temperature": float(rank)}
    elif case == "both":
        weight = sharded
    elif case == "no group":
        given["vocab_group"] = "world"
    elif case == "not of the group":
        given["vocab_group"] = distributed.new_group([0])
        weight = batch["weight"]
    elif case == "capturable":
        given["capturable"] = True
    elif case == "reference":
        given["backend"] = "reference"
    elif case == "no tokens":
        weight = weight[:0]
    elif case == "other dimension":
        given, weight = {}, distribute_tensor(batch["weight"], mesh, [Shard(1)])
    elif case == "partial":
        given, weight = {}, DTensor.from_local(batch["weight"], mesh, [Partial()])
    elif case == "twice":
        given, mesh = {}, init_device_mesh("cpu", (2, 1))
        weight = distribute_tensor(batch["weight"], mesh, [Shard(0), Shard(0)])
    elif case == "plain bias":
        given, weight = {"bias": batch["bias"]}, sharded
    elif case == "bias alone":
        given = {"bias": distribute_tensor(batch["bias"], mesh, [Shard(0)])}
    elif case == "hidden":
        given, weight = {}, sharded
        hidden = distribute_tensor(hidden, mesh, [Shard(2)])
    elif case == "weight_grad":
        given |= {"weight_grad": torch.zeros(V, H)}
        weight = weight.clone().requires_grad_()
    try:
        fastpref.preference_loss(hidden, weight, targets, SimPO(), **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went through"


REFUSALS = {
    "columns": ("RuntimeError: rank 1 .* ValueError: hidden has H = 6", "ValueError: hidden has"),
    "dtype": "ValueError: the ranks that share a head .* same weight's dtype.*float32.*bfloat16",
    "requires_grad": "ValueError: the ranks that share a head .* same weight's dtype.*True.*False",
    "targets": "ValueError: the ranks that share a head must be given the same targets",
    "range": r"ValueError: targets must be -100 or lie in \[0, 37\); got 37 at \(0, 0\)",
    "bias on one": "ValueError: the ranks that share a head must be given the same bias",
    "schedule": "ValueError: .* same schedule, got .'recompute', 'auto'.",
    "one refuses": ("ValueError: temperature", "RuntimeError: rank 0 .* ValueError: temperature"),
    "both": "ValueError: vocab_group goes with a plain tensor",
    "no group": "TypeError: vocab_group must be a torch.distributed ProcessGroup .* got 'world'",
    "not of the group": ("went through", "TypeError: vocab_group must be .* this rank is in"),
    "capturable": "ValueError: capturable=True",
    "reference": "ValueError: backend='reference' takes all of the head",
    "no tokens": "ValueError: weight must be .V, H. with V ≥ 1",
    "other dimension": r"ValueError: a DTensor weight must be Shard\(0\).*Shard\(dim=1\)",
    "partial": r"ValueError: a DTensor weight must be Shard\(0\).*Partial",
    "twice": r"ValueError: a DTensor weight must be Shard\(0\) on one dimension",
    "plain bias": "ValueError: bias must be a DTensor on weight's mesh .* plain tensor",
    "bias alone": "ValueError: bias is a DTensor and weight is not",
    "hidden": "ValueError: hidden must be whole on every rank",
    "weight_grad": r"ValueError: weight_grad must be dense",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_every_rank_is_told(two_ranks, case):
    messages = REFUSALS[case] if isinstance(REFUSALS[case], tuple) else (REFUSALS[case],) * 2
    for found, message in zip(two_ranks.run(refused, case, seconds=20), messages, strict=True):
        assert re.match(message, found), found


def alone(rank):
    """A group of one rank, and a mesh of one: the plain path, bit for bit, and nothing is sent."""
    groups = [distributed.new_group([i]) for i in range(2)]
    mesh = init_device_mesh("cpu", (2, 1))
    batch, how = make_batch(torch.float32), SCHEDULES["groups"]
    weight, _ = head_of(batch, {})
    truth = everything(batch, weight, {}, SimPO(), STATS, dict(how))
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(patch)
        own = {"vocab_group": groups[rank], "most": V}
        found = everything(batch, head_of(batch, {})[0], {}, SimPO(), STATS, dict(how), **own)
        laid = distribute_tensor(batch["weight"], mesh, [Replicate(), Shard(0)])
        out = fastpref.preference_loss(batch["hidden"], laid, batch["targets"], SimPO())
        assert sent.bytes == {"all_gather": 0, "all_reduce": 0}
    assert torch.equal(out.loss, truth["loss"])
    return all(torch.equal(found[name], truth[name]) for name in truth)


def test_one_rank_is_the_plain_path(two_ranks):
    assert two_ranks.run(alone) == [True, True]


def plans(rank):
    """The whole plan of a rank, whatever part it has."""
    batch, sizes = make_batch(torch.float32), (30, 7)
    out = fastpref.preference_loss(
        batch["hidden"],
        batch["weight"][share(rank, sizes)].clone().requires_grad_(),
        batch["targets"],
        SimPO(),
        logits_budget=10 * 30 * 4,
        vocab_group=distributed.group.WORLD,
    )
    return dataclasses.asdict(out.plan)


def test_all_ranks_plan_for_the_largest_part(two_ranks):
    first, second = two_ranks.run(plans)
    assert first == second
    assert first["group_rows"] == 10
    assert len(first["groups"]) > 1


# --- models -------------------------------------------------------------------------------------


def tensor_parallel(rank, directory):
    """By how much a model whose head is on two ranks differs from one on one."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    from fastpref.trl import add_loss_head

    ids = torch.randint(3, 25, (4, 9), generator=torch.Generator().manual_seed(0))
    targets = fastpref.shift_targets(ids, torch.ones_like(ids))
    found, kinds = [], []

    def loss_head(hidden, weight, **head):
        kinds.append(type(weight))
        return fastpref.preference_loss(hidden, weight, targets, SimPO(), **head)

    for parallel in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        if parallel:
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            style = model._tp_plan["lm_head"]  # of the hooks, and of the weight
            apply_tensor_parallelism(model, mesh, {"lm_head": style, "lm_head.weight": style})
        add_loss_head(model)
        out = model(input_ids=ids, loss_head=loss_head)
        out.loss.backward()
        found.append({"loss": out.loss.detach(), "logps": out.logps.detach()})
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            of_parts = isinstance(gradient, DTensor)
            assert of_parts == (parallel and name == "lm_head.weight")
            found[-1][f"{name} gradient"] = gradient.full_tensor() if of_parts else gradient
    assert kinds == [torch.nn.Parameter, DTensor]
    return furthest(found[1], found[0], slice(None))


def test_a_tensor_parallel_models_head_is_not_gathered(two_ranks, tiny_llama):
    for distance, name in two_ranks.run(tensor_parallel, tiny_llama):
        # Through two layers of sums of up to 101 terms, in another order.
        assert distance <= 8 * 101 * torch.finfo(torch.float64).eps, name
