"""The planner: what it chooses, says and predicts."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref import Problem, make_plan
from fastpref.planner import MIB, default_budget, even_ranges

PROBLEM = Problem(
    counts=(256,) * 16,
    hidden_size=576,
    vocabulary=49152,
    dtype=torch.float32,
    accumulate_dtype=torch.float32,
    device="cpu",
    total_rows=4096,
    hidden_grad=True,
    head_grad=True,
)
U = 2 * 4096 * 576 * 49152


def changed(**changes):
    return dataclasses.replace(PROBLEM, **changes)


@pytest.mark.parametrize(
    ("problem", "how", "schedule", "products", "reason"),
    [
        (PROBLEM, {"pairs": True}, "pair_groups", 3, "pairs are independent"),
        (PROBLEM, {"pairs": True, "couples_pairs": True}, "recompute", 4, "couples pairs"),
        (PROBLEM, {"pairs": True, "reduces": False}, "recompute", 4, "reduction='none'"),
        (PROBLEM, {}, "recompute", 4, "any upstream gradient"),
        (PROBLEM, {"pairs": True, "budget": 100 * 196608}, "recompute", 4, "no pair fits"),
        (PROBLEM, {"pairs": True, "schedule": "recompute"}, "recompute", 4, "asked for"),
        (changed(head_grad=False), {"pairs": True}, "frozen_head", 2, "head is frozen"),
        (changed(head_grad=False), {}, "frozen_head", 2, "head is frozen"),
        (changed(head_grad=False), {"schedule": "recompute"}, "recompute", 3, "asked for"),
        (changed(head_grad=False, hidden_grad=False), {}, "forward", 1, "no gradient"),
    ],
)
def test_choice(problem, how, schedule, products, reason):
    plan = make_plan(problem, **how)
    assert plan.schedule == schedule
    assert plan.flop == products * U
    assert reason in plan.reason
    assert schedule in str(plan)
    assert reason in str(plan)


def test_groups_hold_whole_pairs_within_the_budget():
    problem = changed(counts=(10, 20, 30, 5, 200, 200, 1, 1, 0, 7), total_rows=500)
    plan = make_plan(problem, pairs=True, budget=70 * problem.row_bytes)
    # The third pair is larger than the budget: alone, and projected twice.
    assert plan.groups == ((0, 2), (2, 3), (3, 5))
    assert plan.group_rows == 67  # 400 rows in even pieces
    again = 2 * 400 * problem.hidden_size * problem.vocabulary
    assert (
        plan.flop == 3 * 2 * sum(problem.counts) * problem.hidden_size * problem.vocabulary + again
    )


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=20).filter(lambda c: len(c) % 2 == 0),
    st.integers(1, 100),
    st.sampled_from(["pair_groups", "recompute"]),
)
def test_logits_never_exceed_the_budget(counts, rows, schedule):
    problem = changed(counts=tuple(counts), total_rows=sum(counts), vocabulary=1009)
    plan = make_plan(problem, pairs=True, budget=rows * problem.row_bytes, schedule=schedule)
    assert plan.logits_bytes <= rows * problem.row_bytes
    assert plan.tile[0] * plan.tile[1] * 4 <= rows * problem.row_bytes
    if schedule == "pair_groups":
        covered = [pair for a, b in plan.groups for pair in range(a, b)]
        assert covered == list(range(len(counts) // 2))


@given(st.integers(0, 1000), st.integers(1, 300))
def test_even_ranges_cover(rows, most):
    ranges = even_ranges(rows, most)
    assert [i for a, b in ranges for i in range(a, b)] == list(range(rows))
    assert all(b - a <= most for a, b in ranges)
    assert len(ranges) == max(1, -(-rows // most))


def test_memory_grows_with_inputs_and_gradients_only():
    for schedule in ("pair_groups", "recompute"):
        small, large = (
            make_plan(
                changed(counts=(256,) * 2 * pairs, total_rows=512 * pairs),
                pairs=True,
                schedule=schedule,
            )
            for pairs in (8, 32)
        )
        per_row = 576 * 4
        grown = (large.extra_bytes - small.extra_bytes) / (24 * 512)
        assert grown <= 3 * per_row
        assert large.naive_bytes > 3 * small.naive_bytes


ON_GPU = changed(device="cuda")


@pytest.mark.parametrize(
    ("counts", "spare", "rows"),
    [
        ((256,) * 16, None, 2048),  # as many as keep products fast
        ((64,) * 4, None, 256),  # all there are
        ((256,) * 14 + (1500, 1000), None, 2500),  # the largest prompt stays whole
        ((256,) * 16, 700, 700),  # all that may be taken
        ((64,) * 4, 700, 256),
        ((0,) * 4, None, 1),
    ],
)
def test_the_default_budget(counts, spare, rows):
    problem = changed(device="cuda", counts=counts)
    spare = spare and spare * problem.row_bytes
    budget = rows * problem.row_bytes
    assert default_budget(problem, spare) == budget
    plan = make_plan(problem, pairs=True, schedule="pair_groups", spare=lambda: spare)
    given = make_plan(problem, pairs=True, schedule="pair_groups", budget=budget)
    assert (plan.groups, plan.logits_bytes) == (given.groups, given.logits_bytes)


def test_the_default_budget_of_a_cpu():
    assert default_budget(PROBLEM) == default_budget(PROBLEM, 10**12) == 128 * MIB
    by_default = make_plan(PROBLEM, pairs=True, spare=lambda: 10**12)
    assert by_default == make_plan(PROBLEM, pairs=True, budget=128 * MIB)


@pytest.mark.parametrize(
    ("problem", "how", "asks"),
    [
        (ON_GPU, {}, True),
        (changed(device="cuda", hidden_grad=False), {}, True),
        (changed(device="cuda", head_grad=False), {"schedule": "pair_groups"}, True),
        (ON_GPU, {"budget": 10**9}, False),
        (ON_GPU, {"schedule": "recompute"}, False),
        (ON_GPU, {"couples_pairs": True}, False),
        (ON_GPU, {"learns": True}, False),
        (ON_GPU, {"reduces": False}, False),
        (ON_GPU, {"pairs": False}, False),
        (changed(device="cuda", head_grad=False), {}, False),
        (changed(device="cuda", head_grad=False, hidden_grad=False), {}, False),
    ],
)
def test_memory_is_asked_for_only_where_it_decides(problem, how, asks):
    asked = []
    plan = make_plan(problem, **{"pairs": True, "spare": lambda: asked.append(1)} | how)
    assert bool(asked) == asks
    if not asks:  # and what is not asked for does not shrink the tiles
        large = make_plan(problem, **{"pairs": True, "budget": 1024 * MIB} | how)
        assert plan.tile == large.tile
