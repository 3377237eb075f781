"""K responses a prompt, weights and βs from data, extras, and losses on sequence_logps."""

import dataclasses

import pytest
import torch

from fastpref import (
    AOT,
    CPO,
    DPO,
    IPO,
    SFT,
    WPO,
    Balance,
    Hinge,
    ListObjective,
    Mixture,
    Objective,
    PlackettLuce,
    RankedPairs,
    SimPO,
    UniDPO,
    preference_loss,
    reference,
    sequence_logps,
)
from fastpref.commands.verify import Shape, make_batch

SCHEDULES = ("frozen_head", "pair_groups", "recompute")
SHAPE = Shape("", 4, 11, 16, 131, rows=50)


def batch_of(responses, prompts=4, dtype=torch.float64, seed=0):
    """Inputs of `preference_loss`, responses × prompts sequences of ragged length."""
    shape = dataclasses.replace(SHAPE, pairs=responses * prompts)
    batch = make_batch(shape, dtype, "cpu", seed)
    n = responses * prompts
    draw = torch.Generator().manual_seed(seed)
    options = {
        "ref_logps": batch.options["ref_logps"][:n],
        "scores": 10 * torch.rand(n, generator=draw),
    }
    return {
        "hidden": batch.hidden[:n],
        "targets": batch.targets[:n],
        "weight": batch.weight,
    }, options


def run(objective, given, options, *, frozen=False, **how):
    hidden = given["hidden"].clone().requires_grad_()
    weight = given["weight"].clone().requires_grad_(not frozen)
    if how.get("backend") != "reference":
        how = {"logits_budget": 50 * 131 * 8} | how
    out = preference_loss(hidden, weight, given["targets"], objective, **(options | how))
    out.loss.sum().backward()
    return out, hidden.grad, weight.grad


def check(objective, given, options, schedules=SCHEDULES, **how):
    """Every schedule has the loss, gradients, logs and metrics of the definition."""
    truth, of_hidden, of_weight = run(objective, given, options, backend="reference", **how)
    for schedule in schedules:
        frozen = schedule == "frozen_head"
        out, hidden, weight = run(
            objective, given, options, frozen=frozen, schedule=schedule, **how
        )
        assert out.plan.schedule == schedule
        if schedule == "pair_groups":
            assert len(out.plan.groups) > 1
        for name in ("loss", "losses", "logps", "lengths"):
            torch.testing.assert_close(getattr(out, name), getattr(truth, name), msg=name)
        torch.testing.assert_close(hidden, of_hidden)
        if not frozen:
            torch.testing.assert_close(weight, of_weight)
        assert out.metrics.keys() == truth.metrics.keys()
        for name, value in truth.metrics.items():
            torch.testing.assert_close(out.metrics[name], value, msg=name)
    return truth


# --- more than two responses --------------------------------------------------------------------


@pytest.mark.parametrize("responses", [2, 3, 5])
@pytest.mark.parametrize(
    "objective",
    [
        PlackettLuce(beta=0.3),
        PlackettLuce(length_normalized=True),
        RankedPairs(DPO(beta=0.3)),
        RankedPairs(SimPO()),
        RankedPairs(UniDPO(balance=Balance())),
        RankedPairs(WPO(IPO())),
    ],
    ids=repr,
)
def test_rankings(objective, responses):
    given, options = batch_of(responses)
    options["scores"][::responses] = options["scores"][0]  # some scores are equal
    check(objective, given, options, responses=responses)


def test_plackett_luce_written_out():
    """Of three responses, the best against all, then the better of the rest."""
    given, options = batch_of(3, prompts=1)
    options["scores"] = torch.tensor([5.0, 9.0, 1.0])
    out, *_ = run(PlackettLuce(beta=0.2), given, options, responses=3)
    rho = 0.2 * (out.logps - options["ref_logps"])
    best, middle, worst = rho[1].exp(), rho[0].exp(), rho[2].exp()
    expected = -torch.log(best / (best + middle + worst) * middle / (middle + worst))
    torch.testing.assert_close(out.loss, expected)
    assert out.metrics["rewards/chosen"] == rho[1]
    assert out.metrics["rewards/rejected"] == rho[2]


def test_rankings_of_two_are_pairs():
    given, options = batch_of(2)
    options["scores"] = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    expected, grad, _ = run(DPO(beta=0.3), given, options)
    for objective in (PlackettLuce(beta=0.3), RankedPairs(DPO(beta=0.3))):
        out, of_hidden, _ = run(objective, given, options, responses=2)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(of_hidden, grad)
        for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
            torch.testing.assert_close(out.metrics[name], expected.metrics[name])


def test_a_prompt_with_an_empty_response_adds_nothing():
    given, options = batch_of(3)
    given["targets"] = given["targets"].clone()
    given["targets"][5] = -100  # response 1 of prompt 1
    truth = check(PlackettLuce(), given, options, responses=3)
    assert truth.losses[1] == 0
    assert (truth.losses[[0, 2, 3]] > 0).all()


def test_packed_lists():
    given, options = batch_of(3)
    flat = {"weight": given["weight"], "hidden": given["hidden"].flatten(0, 1)}
    flat["targets"] = given["targets"].flatten()
    options["cu_seqlens"] = torch.arange(13) * 11
    check(PlackettLuce(), flat, options, responses=3)


class Spread(ListObjective):
    """One's own: the variance of the rewards, weighted by an extra."""

    extras = ("temper", "of_each")

    def __call__(self, lists):
        rewards = self.rewards(lists) + lists.extras["of_each"]
        return lists.extras["temper"] * rewards.var(0)


def test_a_list_objective_of_ones_own_with_extras():
    given, options = batch_of(3)
    extras = {"temper": torch.rand(4), "of_each": torch.randn(12)}
    check(Spread(), given, options, responses=3, extras=extras)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"objective": DPO(), "responses": 3}, "DPO compares two responses a prompt, got 3"),
        ({"responses": 5}, "5 for each prompt; got 12 sequences"),
        ({"responses": 1}, "responses must be an integer and at least 2, got 1"),
        ({"responses": 3.0}, "responses must be an integer, got 3.0"),
        ({"responses": 3, "scores": None}, r"PlackettLuce needs scores: a tensor \(12,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_lists(how, error, backend):
    given, options = batch_of(3)
    objective = how.get("objective", PlackettLuce())
    how = {name: value for name, value in how.items() if name != "objective"}
    with pytest.raises((ValueError, TypeError), match=error):
        run(objective, given, options | how, backend=backend)


# --- weights, βs and extras from data -----------------------------------------------------------

PAIRWISE = [DPO(), Hinge(beta=1.0), IPO(), SimPO(), CPO(), UniDPO(balance=Balance())]


@pytest.mark.parametrize("objective", PAIRWISE, ids=lambda o: type(o).__name__)
def test_pair_weights_and_betas(objective):
    given, options = batch_of(2)
    options |= {
        "pair_weights": torch.tensor([0.5, 0.0, 2.0, 1.0]),
        "betas": torch.tensor([0.1, 3.0, 0.7, 1.5]),
    }
    truth = check(objective, given, options)
    assert truth.losses[1] == 0
    parts = []
    for pair in range(4):
        which = [pair, pair + 4]
        one = {name: x[which] if name != "weight" else x for name, x in given.items()}
        of_pair = {name: options[name][which] for name in ("ref_logps", "scores")}
        beta = options["betas"][pair].item()
        out, *_ = run(dataclasses.replace(objective, beta=beta), one, of_pair)
        parts.append(options["pair_weights"][pair] * out.loss.detach())
    torch.testing.assert_close(truth.losses.detach(), torch.stack(parts).double())


def test_a_pair_of_weight_0_counts_and_skips_the_backward_products(monkeypatch):
    from fastpref.backends import torch_backend

    given, options = batch_of(2)
    rows = []
    for name in ("group_gradients", "recompute_backward"):
        original = getattr(torch_backend, name)

        def counting(hidden, *args, original=original):
            rows.append(len(hidden))
            return original(hidden, *args)

        monkeypatch.setattr(torch_backend, name, counting)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for schedule in ("pair_groups", "recompute"):
        rows.clear()
        out, grad, _ = run(DPO(), given, options | {"pair_weights": weights}, schedule=schedule)
        scored = (given["targets"] != -100).sum(1).view(2, 4).sum(0)
        assert sum(rows) == scored[[0, 2]].sum()
        assert (grad[[1, 3, 5, 7]] == 0).all()
        assert out.loss == out.losses.sum() / 4


class Offset(Objective):
    """ODPO's idea with offsets from data, and one number a response."""

    extras = ("offset", "bonus")

    def __call__(self, pairs):
        chosen, rejected = pairs.log_ratios(normalized=False)
        bonus = pairs.extras["bonus"]
        margin = 0.1 * (chosen - rejected) + bonus[0] - bonus[1]
        return torch.nn.functional.softplus(pairs.extras["offset"] - margin)


def test_extras_reach_the_objective():
    given, options = batch_of(2)
    given["targets"] = given["targets"].clone()
    given["targets"][2] = -100  # pair 2 is not seen, and its extras with it
    extras = {"offset": torch.randn(4), "bonus": torch.randn(8)}
    check(Offset(), given, options, extras=extras)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"pair_weights": torch.ones(3)}, r"pair_weights must be floating point \(4,\); got"),
        ({"pair_weights": torch.ones(4).long()}, "pair_weights must be floating point"),
        ({"pair_weights": -torch.ones(4)}, "pair_weights must not be negative; got -1.0 at"),
        ({"pair_weights": torch.full((4,), torch.nan)}, "pair_weights must be finite"),
        ({"pair_weights": [1.0]}, "pair_weights must be a tensor"),
        ({"betas": torch.zeros(4)}, r"betas must be positive; got 0.0 at \(0,\)"),
        ({"betas": torch.full((4,), torch.inf)}, "betas must be finite"),
        ({"betas": torch.ones(4, device="meta")}, "betas is on meta"),
        ({"betas": torch.ones(4), "objective": AOT()}, "AOT takes no betas"),
        ({"betas": torch.ones(4), "objective": Offset()}, "Offset takes no betas"),
        ({"objective": Offset()}, r"Offset needs extras\['(bonus|offset)'\]"),
        ({"extras": {"x": torch.ones(4)}}, r"DPO does not look at extras\['x'\]"),
        (
            {"objective": Offset(), "extras": {"offset": torch.ones(5), "bonus": torch.ones(8)}},
            r"extras\['offset'\] must be floating point \(4,\) or \(8,\)",
        ),
        ({"weighted_lengths": True}, "weighted_lengths=True needs token_weights"),
        (
            {"weighted_lengths": True, "token_weights": -torch.ones(8, 11)},
            "token_weights must not be negative where averages divide",
        ),
    ],
)
def test_bad_inputs_of_prompts(how, error, backend):
    given, options = batch_of(2)
    objective = how.get("objective", DPO())
    how = {name: value for name, value in how.items() if name != "objective"}
    with pytest.raises((ValueError, TypeError), match=error):
        run(objective, given, options | how, backend=backend)


@pytest.mark.parametrize(
    "objective", [SimPO(), UniDPO(), IPO(), SFT(), WPO(SimPO())], ids=lambda o: type(o).__name__
)
def test_averages_may_divide_by_the_weights(objective):
    """Step-wise preference: only the tokens of a step count, in sum and in average."""
    given, options = batch_of(2)
    weights = torch.zeros(8, 11)
    weights[:, 5:] = 1.0
    weights[3] = 0.0  # nothing of this response counts: its average is 0
    options |= {"token_weights": weights, "weighted_lengths": True}
    truth = check(objective, given, options)
    assert truth.losses.isfinite().all()
    if isinstance(objective, SimPO):  # the same as scoring those tokens alone
        alone = given | {"targets": given["targets"].where(weights > 0, -100)}
        both = [0, 1, 2]
        out, *_ = run(objective, alone, {"ref_logps": options["ref_logps"]})
        torch.testing.assert_close(truth.losses[both], out.losses[both])


def test_sums_do_not_change_with_what_averages_divide_by():
    given, options = batch_of(2)
    options["token_weights"] = torch.rand(8, 11)
    one, *_ = run(DPO(), given, options)
    other, *_ = run(DPO(), given, options | {"weighted_lengths": True})
    assert torch.equal(one.loss, other.loss)


# --- mixtures, alignments, coupling -------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        Mixture([(DPO(), 0.8), (SFT(), 1.0)]),
        Mixture([(SimPO(), 1.0), (UniDPO(), 0.5), (WPO(Hinge()), 2.0)], beta=0.3),
        WPO(DPO()),
        WPO(UniDPO(balance=Balance())),
        SFT(),
    ],
    ids=repr,
)
def test_independent_mixtures_take_three_products(objective):
    given, options = batch_of(2)
    given["targets"] = given["targets"].clone()
    given["targets"][6] = -100  # an empty rejected response
    options["token_weights"] = torch.rand(8, 11)
    check(objective, given, options)
    assert run(objective, given, options)[0].plan.schedule == "pair_groups"


def test_coupled_mixtures_see_all_pairs():
    given, options = batch_of(2)
    objective = Mixture([(AOT(), 1.0), (SFT(), 0.5)])
    check(objective, given, options, schedules=("frozen_head", "recompute"))
    assert run(objective, given, options)[0].plan.schedule == "recompute"


# --- losses of one's own on sequence_logps ------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_sequence_logps_trains(frozen):
    """KTO's loss on labelled responses, as in the docstring of `sequence_logps`."""
    given, options = batch_of(2)
    desirable = torch.arange(8) % 3 == 0

    def loss_of(logps):
        signs = torch.where(desirable, 1.0, -1.0)
        return (1 - torch.sigmoid(signs * 0.1 * (logps - options["ref_logps"] - 2.0))).mean()

    grads = []
    for function in (sequence_logps, reference.sequence_logps):
        hidden = given["hidden"].clone().requires_grad_()
        weight = given["weight"].clone().requires_grad_(not frozen)
        logps, _ = function(hidden, weight, given["targets"])
        loss_of(logps).backward()
        grads.append((hidden.grad, weight.grad))
    torch.testing.assert_close(grads[0], grads[1])
