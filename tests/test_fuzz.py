"""Random batches, layouts, dtypes, objectives, schedules and budgets against float64.

The allowed errors are those of `fastpref verify`, derived for each case. `pytest --fuzz N` draws N
new cases in place of the few hundred that are the same in every run. The Triton backend is
interpreted, so it has a process of its own: collected without TRITON_INTERPRET, this file runs
itself once more.
"""

import dataclasses
import os

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastpref import Balance, Objective, reference
from fastpref.backends import torch_backend
from fastpref.commands.verify import Shape, make_batch, verify_batch
from fastpref.objectives import hyperparameters, make_objective, objective_names

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "torch"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_under_the_interpreter(interpreted_run):
    pytest.importorskip("triton")
    status, output = interpreted_run()
    assert status == 0, output[-4000:]


# --- cases --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    shape: Shape
    of_hidden: torch.dtype
    of_weight: torch.dtype
    layouts: dict[str, str]
    empty: int | None  # a response without a scored token
    objective: Objective
    weights_and_betas: bool
    schedule: str
    seed: int

    def batch(self):
        """The batch of `fastpref verify`, laid out and converted."""
        narrow = min(self.of_hidden, self.of_weight, key=lambda dtype: -torch.finfo(dtype).eps)
        batch = make_batch(self.shape, narrow, "cpu", self.seed)
        if self.empty is not None:
            length = len(batch.targets.flatten()) // (2 * self.shape.pairs)
            start = self.empty % (2 * self.shape.pairs) * length
            batch.targets.view(-1)[start : start + length] = -100
        if self.weights_and_betas:
            draw = torch.Generator().manual_seed(self.seed)
            batch.options["pair_weights"] = torch.rand(self.shape.pairs, generator=draw)
            if self.objective.takes_betas:
                batch.options["betas"] = 0.1 + torch.rand(self.shape.pairs, generator=draw)
        bias = None if batch.bias is None else batch.bias.to(self.of_weight)
        tensors = {
            "hidden": batch.hidden.to(self.of_hidden),
            "weight": batch.weight.to(self.of_weight),
            "targets": batch.targets,
            "bias": bias,
        }
        options = {
            name: LAYOUTS[self.layouts["options"]](x) if isinstance(x, torch.Tensor) else x
            for name, x in batch.options.items()
        }
        laid_out = {
            name: x if x is None else LAYOUTS[self.layouts[name]](x) for name, x in tensors.items()
        }
        return dataclasses.replace(batch, **laid_out, options=options)


def between(tensor):
    """Every second entry of a larger tensor."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = {
    "dense": lambda tensor: tensor,
    "strided": between,
    "offset": lambda tensor: torch.cat([tensor[:1], tensor])[1:],
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
}


@st.composite
def objectives(draw):
    name = draw(st.sampled_from(objective_names()))
    known, fields = hyperparameters(name), {}
    for field, default in known.items():
        if isinstance(default, bool):
            fields[field] = draw(st.booleans())
        elif isinstance(default, float):
            fields[field] = default * draw(st.floats(0.3, 1.2)) or draw(st.floats(0, 0.3))
    if "balance" in known and draw(st.booleans()):
        sources = ["policy"] if name == "orpo" else ["policy", "implicit_reward"]
        fields["balance"] = Balance(
            source=draw(st.sampled_from(sources)),
            chosen_exponent=draw(st.floats(-1, 1)),
            rejected_exponent=draw(st.sampled_from([0.0, 0.5, 1.0])),
            ceiling=draw(st.floats(1, 5)),
            floor=draw(st.floats(0, 1)),
            per_token=draw(st.booleans()),
        )
    return make_objective(name, **fields)


@st.composite
def cases(draw, floats=FLOATS):
    pairs, length = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    scalars = {
        "softcap": draw(st.none() | st.floats(0.5, 30)),
        "logit_scale": draw(st.just(1.0) | st.floats(0.05, 2) | st.floats(-2, -0.05)),
        "temperature": draw(st.just(1.0) | st.floats(0.3, 3)),
    }
    objective = draw(objectives())
    schedules = ["frozen_head", "recompute"] + ["pair_groups"] * (not objective.couples_pairs)
    return Case(
        Shape(
            "",
            pairs,
            length,
            hidden_size=draw(st.integers(1, 70)),
            vocabulary=draw(st.integers(1, 300) | st.sampled_from([513, 1009])),
            rows=draw(st.integers(1, 2 * pairs * length + 1)),
            packed=draw(st.booleans()),
            weighted=draw(st.booleans()),
            bias=draw(st.booleans()),
            scalars=scalars,
        ),
        draw(st.sampled_from(floats)),
        draw(st.sampled_from(floats)),
        {
            name: draw(st.sampled_from([*LAYOUTS]))
            for name in ("hidden", "weight", "targets", "bias", "options")
        },
        draw(st.none() | st.integers(0, 5)),
        objective,
        draw(st.booleans()),
        draw(st.sampled_from(schedules)),
        draw(st.integers(0, 2**16)),
    )


def results_of(case):
    how = case.shape.rows, BACKEND, (case.schedule,)
    return verify_batch(case.objective, case.batch(), *how)[case.schedule]


@settings(settings.get_profile("fuzz"))
@given(cases())
def test_any_case_is_within_its_error_budget(case):
    for result in results_of(case):
        note(f"{result}")
        assert result.passed


# --- that the budgets can fail ------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the faults are in the torch backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_scaled_by_1_001_fails(dtype, monkeypatch):
    """In every case whose objective does not magnify the rounding of log-probabilities itself."""
    draw = torch.Generator().manual_seed(0)
    seen = {"frozen_head": 0, "pair_groups": 0, "recompute": 0}
    for seed in range(12):
        n = [int(torch.randint(1, 40, (), generator=draw)) for _ in range(4)]
        shape = Shape("", 1 + n[0] % 3, 2 + n[1] % 20, 8 + n[2], 60 + 20 * n[3], rows=3 + n[1])
        batch = make_batch(shape, dtype, "cpu", seed)
        with monkeypatch.context() as faulty:
            plant_factor(faulty, 1.001)
            found = verify_batch(make_objective("unidpo"), batch, shape.rows, "torch")
        for schedule, results in found.items():
            failed = {result.quantity for result in results if not result.passed}
            assert {"∂h"} | ({"∂W"} if schedule != "frozen_head" else set()) <= failed
            seen[schedule] += 1
    assert min(seen.values()) == 12


def plant_factor(monkeypatch, factor):
    """Gradients of every schedule of the torch backend, times `factor`."""
    group, again, kept = (
        getattr(torch_backend, name)
        for name in ("group_gradients", "recompute_backward", "forward_with_gradients")
    )

    def group_gradients(*args):
        gradient, of_rows = group(*args)
        return gradient, factor * of_rows

    def recompute_backward(hidden, targets, head, lse, coef, *more):
        return again(hidden, targets, head, lse, factor * coef, *more)

    def forward_with_gradients(*args):
        rows, grad = kept(*args)
        return rows, factor * grad

    monkeypatch.setattr(torch_backend, "group_gradients", group_gradients)
    monkeypatch.setattr(torch_backend, "recompute_backward", recompute_backward)
    monkeypatch.setattr(torch_backend, "forward_with_gradients", forward_with_gradients)


def test_what_the_cases_are_measured_by_is_right():
    """The reference's log-probabilities are those of a softmax written out by hand."""
    batch = make_batch(Shape("", 1, 4, 5, 7, rows=3), torch.float64, "cpu")
    targets = batch.targets.flatten()
    z = batch.hidden.flatten(0, 1) @ batch.weight.T
    expected = [
        (z[i, t].exp() / z[i].exp().sum()).log() if t >= 0 else z.new_zeros(())
        for i, t in enumerate(targets.tolist())
    ]
    found = reference.linear_logps(batch.hidden.flatten(0, 1), batch.weight, targets)
    torch.testing.assert_close(found, torch.stack(expected))
