"""A head and sequences on several ranks by the Triton kernels, interpreted; in its own process."""

import os

import pytest
import torch

pytest.importorskip("triton")

import test_sequence_parts
from test_vocabulary_shards import PARTS, allowed, cases_of, compare, tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of −inf − −inf


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_schedule_is_as_on_one_rank(two_ranks, dtype):
    """bfloat16's frozen head goes by exponentials relative to the targets' logits."""
    schedules = ("groups", "frozen head") if dtype == torch.bfloat16 else ("groups",)
    cases = [*cases_of(2, schedules=schedules, heads=("all of it",))]
    if dtype == torch.bfloat16:
        cases += cases_of(2, schedules=("frozen head", "recompute"), heads=("far apart",))
    for found in two_ranks.run(compare, dtype, cases, "triton", seconds=120):
        for key, (distance, name) in found.items():
            # Of the frozen head in half precision exponentials themselves are rounded.
            bound = 2**-8 if dtype == torch.bfloat16 else allowed(dtype, key[1])
            assert distance <= bound, (key, name, distance)


@interpreted
def test_tokens_and_all_their_statistics(two_ranks):
    for sizes in PARTS[2]:
        for distance, name in two_ranks.run(tokens, sizes, "all of it", "triton", seconds=120):
            assert distance <= allowed(torch.float64, "all of it"), (sizes, name)


@interpreted
def test_sequences_in_parts(two_ranks):
    """Where the kernel that weighs pairs sees only some of their rows, it is not asked."""
    cases = [
        ("Uni-DPO", "groups", (), "head_and_tail", False),
        ("WPO", "recompute", ("entropy",), "one_has_none", False),
        ("DPO", "frozen head", (), "in_order", True),
    ]
    run = test_sequence_parts.compare
    for found in two_ranks.run(run, torch.float64, cases, "triton", seconds=120):
        for key, (distance, name) in found.items():
            assert distance <= test_sequence_parts.allowed(torch.float64), (key, name)
