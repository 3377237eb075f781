"""The planner: what it chooses, says and predicts."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref import Problem, make_plan
from fastpref.planner import MIB, even_ranges

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


def test_the_default_budget():
    assert make_plan(PROBLEM, pairs=True).logits_bytes <= 128 * MIB
    on_gpu = make_plan(changed(device="cuda"), pairs=True)
    assert 128 * MIB < on_gpu.logits_bytes <= 1024 * MIB
