"""Bad input: an error that names the argument and what was expected, and nothing changed."""

import math

import pytest
import torch

from fastpref import (
    DPO,
    Objective,
    SimPO,
    UniDPO,
    linear_logps,
    preference_loss,
    sequence_logps,
    validation,
)

H, V, T = 6, 11, 5


def good(**changes):
    torch.manual_seed(0)
    arguments = {
        "hidden": torch.randn(4, T, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "targets": torch.randint(0, V, (4, T)),
        "objective": DPO(),
        "ref_logps": torch.full((4,), -9.0),
    }
    return arguments | changes


def packed(cu_seqlens, **changes):
    return good(
        hidden=torch.randn(20, H),
        targets=torch.randint(0, V, (20,)),
        cu_seqlens=torch.tensor(cu_seqlens),
        **changes,
    )


def with_target(value):
    targets = torch.zeros(4, T, dtype=torch.int64)
    targets[2, 3] = value
    return targets


NESTED = torch.nested.nested_tensor([torch.zeros(3, H)], layout=torch.jagged)
CASES = {
    "odd": (good(hidden=torch.randn(3, T, H), targets=torch.zeros(3, T).long()), "3 sequences"),
    "no sequence": (
        good(hidden=torch.randn(0, T, H), targets=torch.zeros(0, T).long()),
        "0 sequences",
    ),
    "odd packed": (packed([0, 5, 10, 20]), "2 for each prompt; got 3 sequences"),
    "one side longer": (good(ref_logps=torch.zeros(3)), r"ref_logps must be .*\(4,\).*got.*\(3,\)"),
    "target -1": (good(targets=with_target(-1)), r"targets.*\[0, 11\); got -1 at \(2, 3\)"),
    "target V": (good(targets=with_target(V)), r"targets.*\[0, 11\); got 11 at \(2, 3\)"),
    "targets int32": (good(targets=with_target(0).int()), "targets must be int64, got torch.int32"),
    "targets shape": (good(targets=torch.zeros(4, 4).long()), r"targets.*\(4, 5\).*\(4, 4\)"),
    "targets a list": (good(targets=[[1]]), "targets must be a tensor, got list"),
    "hidden int": (
        good(hidden=torch.zeros(4, T, H).long()),
        "hidden must be one of .*float32.*int64",
    ),
    "hidden float8": (good(hidden=torch.zeros(4, T, H).to(torch.float8_e4m3fn)), "hidden.*float8"),
    "hidden sparse": (good(hidden=torch.zeros(4, T, H).to_sparse()), "hidden must be a dense"),
    "weight int": (good(weight=torch.zeros(V, H).long()), "weight must be one of .*int64"),
    "weight bool": (good(weight=torch.zeros(V, H).bool()), "weight must be one of"),
    "weight complex": (good(weight=torch.zeros(V, H).cfloat()), "weight must be one of"),
    "weight sparse": (good(weight=torch.zeros(V, H).to_sparse()), "weight must be a dense"),
    "weight nested": (good(weight=NESTED), "weight must be a dense tensor, got a nested"),
    "no vocabulary": (
        good(weight=torch.zeros(0, H)),
        r"weight must be \(V, H\) with V ≥ 1.*\(0, 6\)",
    ),
    "bias int": (good(bias=torch.zeros(V).long()), "bias must be one of"),
    "targets sparse": (
        good(targets=torch.zeros(4, T).long().to_sparse()),
        "targets must be a dense",
    ),
    "hidden 1d": (good(hidden=torch.zeros(H)), "hidden must be .…, H."),
    "hidden 2d": (
        good(hidden=torch.randn(20, H), targets=torch.zeros(20).long()),
        "hidden must be .*cu_seqlens",
    ),
    "hidden device": (good(hidden=torch.randn(4, T, H, device="meta")), "weight must be on hidden"),
    "weight H": (good(weight=torch.randn(V, 7)), r"H = 6 but weight is \(11, 7\)"),
    "weight 1d": (good(weight=torch.randn(H)), "weight must be .V, H."),
    "bias shape": (good(bias=torch.randn(V + 1)), r"bias must be \(11,\)"),
    "cu start": (packed([1, 5, 10, 15, 20]), "cu_seqlens must start at 0"),
    "cu end": (packed([0, 5, 10, 15, 19]), "cu_seqlens must end at the total of 20"),
    "cu decreases": (packed([0, 10, 5, 15, 20]), "cu_seqlens must increase"),
    "cu stands still": (packed([0, 5, 5, 15, 20]), "cu_seqlens must increase"),
    "cu float": (packed([0.0, 20.0]), "cu_seqlens must be integers"),
    "cu with 3d": (good(cu_seqlens=torch.tensor([0, 20])), r"hidden must be \(total, H\)"),
    "token weights": (good(token_weights=torch.ones(4)), "token_weights must have targets' shape"),
    "token weights nan": (
        good(token_weights=torch.full((4, T), math.nan)),
        "token_weights must be finite",
    ),
    "no reference": (good(ref_logps=None), r"DPO needs ref_logps: a tensor \(4,\)"),
    "reference nan": (
        good(ref_logps=torch.tensor([0.0, math.nan, 0.0, 0.0])),
        r"ref_logps must be finite; got nan at \(1,\)",
    ),
    "no scores": (good(objective=UniDPO()), r"UniDPO needs scores: a tensor \(4,\).*eta=0"),
    "scores length": (good(objective=UniDPO(), scores=torch.zeros(2)), r"scores must be .*\(4,\)"),
    "scores inf": (
        good(objective=UniDPO(), scores=torch.tensor([0.0, 1.0, math.inf, 1.0])),
        "scores must be finite; got inf",
    ),
    "scores int": (good(objective=UniDPO(), scores=torch.zeros(4).long()), "scores must be float"),
    "objective name": (good(objective="ppo"), "unknown objective 'ppo'; expected one of.*unidpo"),
    "objective type": (good(objective=torch.nn.Linear), "objective must be an Objective"),
    "schedule": (good(schedule="fast"), "unknown schedule 'fast'; expected one of.*pair_groups"),
    "frozen head": (good(schedule="frozen_head"), "frozen_head.*weight or bias requires"),
    "backend": (good(backend="cuda"), "unknown backend 'cuda'; expected one of.*triton"),
    "reduction": (good(reduction="max"), "unknown reduction 'max'"),
    "stats": (good(stats=("perplexity",)), "unknown entry 'perplexity' of stats"),
    "stats that have no mean": (
        good(stats=("log_sum_sq_probs",)),
        "unknown entry 'log_sum_sq_probs'",
    ),
    "complex token weights": (
        good(token_weights=torch.ones(4, T).cfloat()),
        "token_weights must be",
    ),
    "budget 0": (good(logits_budget=0), "logits_budget must be an integer and above 0, got 0"),
    "budget nan": (good(logits_budget=math.nan), "logits_budget must be an integer, got nan"),
    "budget inf": (good(logits_budget=math.inf), "logits_budget must be an integer, got inf"),
    "budget": (good(logits_budget=43), "43 bytes does not hold one row.*11 × 4 = 44 bytes"),
    "a scale that trains": (
        good(logit_scale=torch.tensor(2.0, requires_grad=True)),
        "logit_scale gets no gradient: give hidden . logit_scale",
    ),
}
for name, low in (("logit_scale", -math.inf), ("softcap", 0.0), ("temperature", 0.0)):
    for bad in (math.nan, math.inf, low):
        CASES[f"{name} {bad}"] = (good(**{name: bad}), f"{name} must be finite.*, got {bad}")
    CASES[f"{name} a string"] = (good(**{name: "1.0"}), f"{name} must be a number, got '1.0'")


# What only the schedules can say.
SCHEDULED = ("frozen head", "budget")


@pytest.mark.parametrize("case", [case for case in CASES if case not in (*SCHEDULED, "backend")])
def test_the_reference_refuses_the_same(case):
    arguments, message = CASES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        preference_loss(**arguments, backend="reference")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, autocast):
    arguments, message = CASES[case]
    dense = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    dense = {k: v for k, v in dense.items() if not (v.is_nested or v.is_sparse or v.is_complex())}
    before = {k: v.clone() for k, v in dense.items()}
    expected = pytest.raises((ValueError, TypeError), match=message)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), expected:
        preference_loss(**arguments)
    for name, tensor in before.items():
        if tensor.device.type == "cpu":
            assert torch.equal(arguments[name].float().nan_to_num(), tensor.float().nan_to_num())
        assert arguments[name].grad is None


def test_good_input_is_good():
    assert preference_loss(**good()).loss.isfinite()
    assert preference_loss(**packed([0, 5, 6, 15, 20])).loss.isfinite()


def test_a_backend_that_cannot_run_is_an_error():
    with pytest.raises(RuntimeError, match="backend='triton'"):
        preference_loss(**good(backend="triton"))


def test_token_log_probabilities_check_their_input():
    hidden, weight = torch.randn(3, H), torch.randn(V, H)
    with pytest.raises(ValueError, match="targets"):
        linear_logps(hidden, weight, torch.tensor([0, V, 1]))
    with pytest.raises(ValueError, match="pair_groups"):
        linear_logps(
            hidden.requires_grad_(), weight, torch.tensor([0, 1, 2]), schedule="pair_groups"
        )
    with pytest.raises(ValueError, match="hidden must be"):
        sequence_logps(hidden, weight, torch.tensor([0, 1, 2]))


def test_reference_free_objectives_need_nothing_more():
    assert preference_loss(**good(objective=SimPO(), ref_logps=None)).loss.isfinite()
    unscored = UniDPO(eta=0, nll_weight=0)
    assert preference_loss(**good(objective=unscored)).loss.isfinite()


def test_objective_of_ones_own_may_need_scores():
    class Scored(Objective):
        needs_reference = False
        needs_scores = True

        def __call__(self, pairs):
            return pairs.chosen_scores * pairs.rejected_logps

    with pytest.raises(ValueError, match="Scored needs scores"):
        preference_loss(**good(objective=Scored(), ref_logps=None))


def test_values_on_an_accelerator_are_asserted_without_waiting(monkeypatch):
    """Where the device is asynchronous no value is read back: only `_assert_async` is called."""
    asserted = []

    class OnDevice:
        device = torch.device("cuda")

        def __bool__(self):
            raise AssertionError("the check waited for the device")

    monkeypatch.setattr(torch, "_assert_async", lambda ok, message: asserted.append(message))
    validation.require(OnDevice(), "scores must be finite", torch.zeros(1))
    assert asserted == ["scores must be finite"]
