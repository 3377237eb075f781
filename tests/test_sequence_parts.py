"""Sequences whose positions lie on several ranks: all as on one, and nothing sent backwards."""

import itertools
import re

import pytest
import torch
from ranks import Sent
from torch import distributed
from torch.distributed import init_device_mesh

import fastpref
from fastpref import DPO, ORPO, WPO, AdaDPO, Balance, SimPO, UniDPO
from fastpref.objectives import AOT, PlackettLuce
from fastpref.planner import Layout, Problem

V, H, PROMPTS, LENGTH = 23, 6, 3, 16
STATS = ("entropy", "mean_logits", "is_top1")
SCHEDULES = {
    "one group": {"schedule": "pair_groups"},
    "groups": {"schedule": "pair_groups", "logits_budget": 12 * V * 8},
    "beyond the budget": {"schedule": "pair_groups", "logits_budget": 3 * V * 8},
    "recompute": {"schedule": "recompute"},
    "one by one": {"schedule": "recompute", "reduction": "none"},
    "frozen head": {"schedule": "frozen_head"},
    "forward": {},
}
OBJECTIVES = {
    "DPO": (DPO(), {}),
    "AdaDPO": (AdaDPO(), {}),
    "Uni-DPO": (UniDPO(balance=Balance()), {"pair_weights": "of the batch"}),
    "ORPO": (ORPO(), {"token_weights": "of the batch"}),  # of averages
    "weighted lengths": (SimPO(), {"token_weights": "of the batch", "weighted_lengths": True}),
    "WPO": (WPO(SimPO()), {}),  # takes statistics of its own
    "AOT": (AOT(), {}),  # couples pairs
    "lists": (PlackettLuce(), {"responses": 3}),
}


def head_and_tail(ranks, rank):
    """As torch's context parallelism has it: of 2 R chunks the r-th and its mirror image."""
    chunks = torch.arange(LENGTH).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def in_order(ranks, rank):
    return torch.arange(LENGTH).tensor_split(ranks)[rank]


def all_but_one(ranks, rank):
    """The first rank has one position, the others the rest."""
    if rank == 0:
        return torch.tensor([LENGTH // 2])
    rest = [*range(LENGTH // 2), *range(LENGTH // 2 + 1, LENGTH)]
    return torch.tensor(rest).tensor_split(ranks - 1)[rank - 1]


def one_has_none(ranks, rank):
    if rank == ranks - 1:
        return torch.arange(0)
    return torch.arange(LENGTH).tensor_split(ranks - 1)[rank]


LAYOUTS = {f.__name__: f for f in (head_and_tail, in_order, all_but_one, one_has_none)}


def make_batch(dtype, responses=2):
    """Of prompts and ends that lie anywhere; one response has nothing to score."""
    draw = torch.Generator().manual_seed(0)
    sequences = responses * PROMPTS

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, V, (sequences, LENGTH), generator=draw)
    first = torch.randint(1, LENGTH - 4, (sequences, 1), generator=draw)
    last = first + torch.randint(3, LENGTH, (sequences, 1), generator=draw)
    places = torch.arange(LENGTH)
    targets[(places < first) | (places > last)] = -100
    targets[1] = -100
    return {
        "hidden": normal(sequences, LENGTH, H) * 2,
        "weight": normal(V, H),
        "bias": normal(V),
        "targets": targets,
        "token_weights": torch.rand(targets.shape, generator=draw, dtype=torch.float64) + 0.5,
        "ref_logps": normal(sequences).double() - 9,
        "scores": normal(sequences).double(),
        "pair_weights": torch.rand(PROMPTS, generator=draw, dtype=torch.float64),
    }


def run(batch, name, schedule, stats, places, *, packed=False, **groups):
    """By name whatever a loss returns and leaves behind, of the positions `places`."""
    objective, more = OBJECTIVES[name]
    given = {key: batch[key] if value == "of the batch" else value for key, value in more.items()}
    if "token_weights" in given:
        given["token_weights"] = given["token_weights"][:, places]
    hidden = batch["hidden"][:, places].clone().requires_grad_(schedule != "forward")
    trains = schedule not in ("forward", "frozen head")
    weight, bias = (batch[key].clone().requires_grad_(trains) for key in ("weight", "bias"))
    rows, targets = hidden, batch["targets"][:, places]
    if packed:  # without what is ignored, of which every sequence has as much as it has
        scored = targets != -100
        rows, targets = hidden[scored], targets[scored]
        given["cu_seqlens"] = torch.cat([torch.zeros(1).long(), scored.sum(1).cumsum(0)])
        if "token_weights" in given:
            given["token_weights"] = given["token_weights"][scored]
    out = fastpref.preference_loss(
        rows,
        weight,
        targets,
        objective,
        bias=bias,
        ref_logps=batch["ref_logps"] if objective.needs_reference else None,
        scores=batch["scores"] if objective.needs_scores else None,
        stats=stats,
        **{"backend": "torch"} | SCHEDULES[schedule] | given | groups,
    )
    found = {name: getattr(out, name) for name in ("loss", "losses", "logps", "lengths")}
    found |= out.metrics
    if hidden.requires_grad:
        upstream = torch.linspace(1, 2, out.loss.numel()).to(out.loss).view(out.loss.shape)
        out.loss.backward(upstream)
        found["of hidden"] = hidden.grad
    if trains:
        found |= {"of weight": weight.grad, "of bias": bias.grad}
    return {name: x.detach() for name, x in found.items()}


def furthest(found, truth, places, group=None):
    """The largest difference in norm, relative; the head's gradients summed over ranks."""
    assert found.keys() == truth.keys()
    worst = []
    for name, expected in truth.items():
        mine, size = found[name].double(), expected.double().norm()
        if name in ("of weight", "of bias"):
            distributed.all_reduce(mine, group=group)
        elif name == "of hidden":
            expected = expected[:, places]
        else:
            size = size.clamp(min=1)
        worst.append((((mine - expected.double()).norm() / size).item(), name))
    return max(worst)


def compare(rank, dtype, cases, backend="torch"):
    ranks, distances = distributed.get_world_size(), {}
    for key in cases:
        name, schedule, stats, layout, packed = key
        batch = make_batch(dtype, OBJECTIVES[name][1].get("responses", 2))
        places = LAYOUTS[layout](ranks, rank)
        truth = run(batch, name, schedule, stats, torch.arange(LENGTH), backend=backend)
        group = {"sequence_group": distributed.group.WORLD, "backend": backend}
        found = run(batch, name, schedule, stats, places, packed=packed, **group)
        distances[key] = furthest(found, truth, places)
    return distances


def cases():
    """Every schedule with every objective that it takes; layouts and statistics in turn."""
    for i, (schedule, name) in enumerate(itertools.product(SCHEDULES, OBJECTIVES)):
        if name == "AOT" and SCHEDULES[schedule].get("schedule") == "pair_groups":
            continue
        layout = [*LAYOUTS][i % len(LAYOUTS)]
        yield name, schedule, STATS[: i % 4], layout, i % 3 == 0


def allowed(dtype):
    """Of sums of V products of H terms, and of up to T rows, in another order."""
    return 2 * (V + H + LENGTH) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_schedule_is_as_on_one_rank(ranks, dtype):
    for found in ranks.run(compare, dtype, [*cases()]):
        for key, (distance, name) in found.items():
            assert distance <= allowed(dtype), (key, name, distance)


def test_bfloat16(ranks):
    """The head's gradient is rounded once a rank, then summed: R + 1 roundings of 2⁻⁸."""
    some = [key for key in cases() if key[0] in ("DPO", "Uni-DPO")]
    for found in ranks.run(compare, torch.bfloat16, some):
        for key, (distance, name) in found.items():
            assert distance <= (ranks.world + 1) * 2**-8, (key, name, distance)


def crossing(rank):
    """Two ranks share the vocabulary, and two the sequences."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "vocabulary"))
    across, tensor = mesh["sequence"], mesh["vocabulary"]
    groups = {"sequence_group": across.get_group(), "vocab_group": tensor.get_group()}
    places = head_and_tail(2, across.get_local_rank())
    part = (slice(0, 10), slice(10, V))[tensor.get_local_rank()]
    distances = {}
    for schedule, name in itertools.product(SCHEDULES, ("DPO", "Uni-DPO", "WPO")):
        batch = make_batch(torch.float64)
        truth = run(batch, name, schedule, STATS, torch.arange(LENGTH))
        own = batch | {key: batch[key][part] for key in ("weight", "bias")}
        found = run(own, name, schedule, STATS, places, **groups)
        truth |= {key: truth[key][part] for key in ("of weight", "of bias") if key in truth}
        distances[schedule, name] = furthest(found, truth, places, groups["sequence_group"])
    return distances


def test_a_head_and_sequences_in_parts(four_ranks):
    for found in four_ranks.run(crossing):
        for key, (distance, name) in found.items():
            assert distance <= allowed(torch.float64), (key, name, distance)


def of_responses(rank):
    """`sequence_logps`, its gradients under a loss of one's own, and NaN."""
    ranks, group = distributed.get_world_size(), {"sequence_group": distributed.group.WORLD}
    batch, places, found = make_batch(torch.float64), head_and_tail(ranks, rank), []
    for schedule, spoilt in itertools.product(("recompute", "frozen_head"), (False, True)):
        both = []
        for which, more in ((torch.arange(LENGTH), {}), (places, group)):
            hidden = batch["hidden"].clone()
            if spoilt:
                hidden[0, int((batch["targets"][0] != -100).nonzero()[0])] = torch.nan
            hidden = hidden[:, which].requires_grad_()
            weight = batch["weight"].clone().requires_grad_(schedule == "recompute")
            logps, lengths = fastpref.sequence_logps(
                hidden, weight, batch["targets"][:, which], schedule=schedule, **more
            )
            (logps.sigmoid() * torch.arange(len(logps))).sum().backward()
            both.append([logps.detach(), lengths, hidden.grad, weight.grad])
        truth, mine = both
        truth[2] = truth[2][:, places]
        if schedule == "recompute":
            distributed.all_reduce(mine[3])
        found.append((spoilt, truth, mine))
    return found


def test_log_probabilities_of_responses(ranks):
    for cases_of_rank in ranks.run(of_responses):
        for spoilt, truth, found in cases_of_rank:
            assert bool(truth[0].isnan().any()) == spoilt
            for a, b in zip(found, truth, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-12, atol=1e-13)


# --- what is sent ---------------------------------------------------------------------------------


def volume(rank):
    """Bytes given to collectives."""
    batch, places, found = make_batch(torch.float32), in_order(2, rank), {}
    for schedule in SCHEDULES:
        with pytest.MonkeyPatch.context() as patch:
            sent = Sent(patch)
            run(batch, "DPO", schedule, (), places, sequence_group=distributed.group.WORLD)
        found[schedule] = sent.bytes
    return found


def test_the_bytes_are_those_that_are_documented(two_ranks):
    """And those of the planner, which counts what goes through the device's group."""
    sequences = 2 * PROMPTS
    for found in two_ranks.run(volume):
        for schedule, sent in found.items():
            assert sent == {"all_gather": 24 + 8 * sequences, "all_reduce": 8 * sequences}, schedule
    problem = Problem(
        (LENGTH,) * sequences, H, V, torch.float32, torch.float32, "cuda", sequences * LENGTH,
        True, True,
    )  # fmt: skip
    (exchange,) = Layout(cp=2).exchanges(problem)
    assert exchange.bytes == 8 * sequences


# --- what is refused ------------------------------------------------------------------------------


def refused(rank, case):
    batch, places = make_batch(torch.float32), in_order(2, rank)
    hidden, targets = batch["hidden"][:, places], batch["targets"][:, places].clone()
    weight, objective = batch["weight"], SimPO()
    given = {"sequence_group": distributed.group.WORLD}
    if case == "prompts" and rank:
        hidden, targets = hidden[:-2], targets[:-2]
    elif case == "range" and rank:
        targets[0, 0] = V
    elif case == "columns" and rank:
        weight = weight[:, :3]
    elif case == "vocabulary" and rank:
        weight = torch.cat([weight, weight[:1]])
    elif case == "objective":
        objective = (SimPO(), ORPO())[rank]
    elif case == "schedule":
        given["schedule"] = ("recompute", "auto")[rank]
    elif case == "requires_grad" and rank:
        hidden = hidden.clone().requires_grad_()
    elif case == "token_weights" and rank:
        given["token_weights"] = torch.ones(targets.shape)
    elif case == "pair_weights" and not rank:
        given["pair_weights"] = batch["pair_weights"]
    elif case == "missing" and rank:
        objective = DPO()
    elif case == "capturable":
        given["capturable"] = True
    elif case == "reference":
        given["backend"] = "reference"
    elif case == "no group":
        given["sequence_group"] = 2
    elif case == "not of the group":
        given["sequence_group"] = distributed.new_group([0])
    try:
        fastpref.preference_loss(hidden, weight, targets, objective, **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went through"


REFUSALS = {
    "prompts": "ValueError: the ranks that share sequences .* number of prompts, got .3, 2.",
    "range": (
        "RuntimeError: rank 1 of those that share sequences has refused: ValueError: targets must",
        "ValueError: targets must",
    ),
    "columns": ("RuntimeError: rank 1 .* has refused: ValueError: hidden", "ValueError: hidden"),
    "vocabulary": "ValueError: the ranks .* same rows of weight, got .23, 24.",
    "objective": "ValueError: the ranks .* same objective, got .'SimPO', 'ORPO'.",
    "schedule": "ValueError: the ranks .* same schedule, got .'recompute', 'auto'.",
    "requires_grad": "ValueError: the ranks .* same hidden's dtype.*False.*True",
    "token_weights": "ValueError: the ranks .* same choice of arguments.*.., .'token_weights'..",
    "pair_weights": "ValueError: the ranks .* same choice of arguments.*'pair_weights'.*..",
    "missing": ("RuntimeError: rank 1 .* ref_logps", "ValueError: .*ref_logps"),
    "capturable": "ValueError: capturable=True reads nothing on the host",
    "reference": "ValueError: backend='reference' takes whole sequences",
    "no group": "TypeError: sequence_group must be a torch.distributed ProcessGroup .* got 2",
    "not of the group": ("went through", "TypeError: sequence_group must be .* this rank is in"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_every_rank_is_told(two_ranks, case):
    messages = REFUSALS[case] if isinstance(REFUSALS[case], tuple) else (REFUSALS[case],) * 2
    for found, message in zip(two_ranks.run(refused, case, seconds=20), messages, strict=True):
        assert re.match(message, found), found


def alone(rank):
    """A group of one rank is none: bit for bit, and nothing is sent."""
    groups = [distributed.new_group([i]) for i in range(2)]
    batch, every = make_batch(torch.float32), torch.arange(LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(distributed, name, None)
        truth = run(batch, "DPO", "groups", STATS, every)
        found = run(batch, "DPO", "groups", STATS, every, sequence_group=groups[rank])
    return all(torch.equal(found[name], truth[name]) for name in truth)


def test_a_group_of_one_rank_is_none(two_ranks):
    assert two_ranks.run(alone) == [True, True]
