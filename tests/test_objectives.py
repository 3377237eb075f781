"""Objectives against the reference in float64, their closed forms and AdaDPO's properties."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import (
    CPO,
    DPO,
    IPO,
    ORPO,
    RDPO,
    AdaDPO,
    Balance,
    Hinge,
    Objective,
    PairLogps,
    SimPO,
    UniDPO,
    reference,
)
from fastpref.objectives import make_objective, objective_names, pair_metrics

BALANCES = [
    None,
    Balance(),
    Balance(clip=1.05),
    Balance(source="implicit_reward", chosen_exponent=0.3, rejected_exponent=0.9),
    Balance(per_token=False, clip=3.0),
]
VARIANTS = [
    DPO(),
    DPO(beta=0.5, label_smoothing=0.1),
    DPO(length_normalized=True),
    Hinge(),
    Hinge(beta=1.5, length_normalized=True),
    IPO(),
    IPO(beta=0.7),
    SimPO(),
    SimPO(beta=1.0, gamma=1.2),
    RDPO(alpha=0.05),
    RDPO(length_normalized=True),
    CPO(),
    CPO(nll_weight=0.3, length_normalized=True),
    ORPO(),
    ORPO(odds_weight=0.7),
    UniDPO(),
    UniDPO(tau_ref=2.0, nll_weight=0.2, tau_good=8.0),
    UniDPO(eta=0, nll_weight=0),
    UniDPO(length_normalized=False, beta=0.1),
    UniDPO(gamma=0.0),
    UniDPO(detach_performance_weight=True),
    AdaDPO(),
    AdaDPO(beta=0.3, balance=Balance(clip=2.0)),
]


def with_balances(objective):
    for balance in BALANCES:
        try:
            yield dataclasses.replace(objective, balance=balance)
        except ValueError:
            assert isinstance(objective, ORPO)
            assert balance.source == "implicit_reward"


ALL = [variant for objective in VARIANTS for variant in with_balances(objective)]


def make_pairs(count=16, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, count), generator=draw)
    mean = -2.5 * torch.rand(2, count, generator=draw, dtype=torch.float64)
    ref = mean + 0.3 * torch.randn(2, count, generator=draw, dtype=torch.float64)
    scores = 10 * torch.rand(2, count, generator=draw, dtype=torch.float64)
    parts = [*(mean * lengths), *lengths, *(ref * lengths), *scores]
    return PairLogps(*(part.to(dtype) for part in parts))


def losses_and_coefs(losses_of, pairs):
    leaves = [pairs.chosen_logps, pairs.rejected_logps]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    moved = dataclasses.replace(pairs, chosen_logps=leaves[0], rejected_logps=leaves[1])
    losses = losses_of(moved)
    coefs = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    return losses.detach(), *coefs


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_losses_and_coefficients_equal_the_reference(objective):
    pairs = make_pairs()
    ours = losses_and_coefs(objective, pairs)
    truth = losses_and_coefs(lambda p: reference.pair_losses(objective, p), pairs)
    for found, expected in zip(ours, truth, strict=True):
        # Both are some tens of float64 operations on numbers of the margins' size.
        size = 1 + expected.abs().max() + pairs.chosen_logps.abs().max()
        assert (found - expected).abs().max() <= 64 * 2**-53 * size
    assert any(coef.abs().max() > 0 for coef in truth[1:])


@pytest.mark.parametrize(
    "objective",
    # A balance and a detached weight are constants to autograd, not to finite differences.
    [o for o in VARIANTS if o.balance is None and not getattr(o, "detach_performance_weight", 0)],
    ids=repr,
)
def test_gradcheck(objective):
    pairs = make_pairs(count=6, seed=3)

    def losses(chosen, rejected):
        moved = dataclasses.replace(pairs, chosen_logps=chosen, rejected_logps=rejected)
        return objective(moved), reference.pair_losses(objective, moved)

    leaves = [x.clone().requires_grad_() for x in (pairs.chosen_logps, pairs.rejected_logps)]
    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("settings_", [{}, {"tau_ref": 2.0, "nll_weight": 0.2, "tau_good": 8.0}])
def test_unidpo_closed_form(settings_):
    objective, pairs = UniDPO(**settings_), make_pairs(count=64)
    losses, of_chosen, of_rejected = losses_and_coefs(objective, pairs)
    mean_w, mean_l = pairs.chosen_mean_logps, pairs.rejected_mean_logps
    ref_w, ref_l = pairs.ref_chosen_mean_logps, pairs.ref_rejected_mean_logps
    beta = objective.beta
    m = beta * ((mean_w - ref_w) - (mean_l - ref_l))
    u = beta * (mean_w - mean_l) - objective.tau_ref
    quality = torch.sigmoid(objective.eta * (pairs.chosen_scores - pairs.rejected_scores))
    performance = (1 - torch.sigmoid(u)) ** objective.gamma
    nlls = torch.log1p(torch.exp(-m))
    good = pairs.chosen_scores >= objective.tau_good
    nll = objective.nll_weight * ((ref_w > mean_w) & good).double()
    slope = (1 - torch.sigmoid(m)) + objective.gamma * torch.sigmoid(u) * nlls
    slope = beta * quality * performance * slope
    assert 0 < (nll > 0).sum() < 64
    torch.testing.assert_close(losses, quality * performance * nlls - nll * mean_w)
    torch.testing.assert_close(of_chosen * pairs.chosen_lengths, -slope - nll)
    torch.testing.assert_close(of_rejected * pairs.rejected_lengths, slope)


def test_unidpo_detached_weight_drops_its_gradient():
    pairs = make_pairs()
    _, through, _ = losses_and_coefs(UniDPO(nll_weight=0), pairs)
    _, detached, _ = losses_and_coefs(UniDPO(nll_weight=0, detach_performance_weight=True), pairs)
    assert (through.abs() > detached.abs()).all()


def test_unidpo_is_finite_where_the_weight_vanishes():
    pairs = make_pairs()
    far = dataclasses.replace(pairs, chosen_logps=pairs.chosen_lengths * 500.0)
    losses, of_chosen, of_rejected = losses_and_coefs(UniDPO(), far)
    for values in (losses, of_chosen, of_rejected):
        assert values.isfinite().all()


def test_orpo_is_finite_for_a_perfectly_predicted_response():
    pairs = make_pairs()
    perfect = dataclasses.replace(pairs, chosen_logps=torch.zeros_like(pairs.chosen_logps))
    for objective in (ORPO(), ORPO(balance=Balance())):
        for values in losses_and_coefs(objective, perfect):
            assert values.isfinite().all()


# --- AdaDPO -------------------------------------------------------------------------------------

logps = st.floats(-400, -0.01)
lengths = st.integers(1, 300)


def one_pair(chosen, rejected, n_chosen, n_rejected, ref=(-30.0, -40.0)):
    values = (chosen, rejected, n_chosen, n_rejected, *ref, 0.0, 0.0)
    return PairLogps(*(torch.tensor([float(v)], dtype=torch.float64) for v in values))


@given(logps, logps, lengths, lengths, st.floats(0, 1))
@settings(deadline=None)
def test_balanced_magnitudes_agree(chosen, rejected, n_chosen, n_rejected, exponent):
    balance = Balance(chosen_exponent=exponent, rejected_exponent=1 - exponent, clip=math.inf)
    pairs = one_pair(chosen, rejected, n_chosen, n_rejected)
    log_p = chosen / n_chosen, rejected / n_rejected
    if abs(log_p[0] - log_p[1]) > 300:
        return  # e^δ leaves float64
    _, of_chosen, of_rejected = losses_and_coefs(AdaDPO(balance=balance), pairs)
    if of_chosen == 0:
        return  # saturated
    # |c_w| / p̄_w = |c_l| / p̄_l, in logarithms: the probabilities themselves may underflow.
    left = of_chosen.abs().log() - log_p[0]
    right = of_rejected.abs().log() - log_p[1]
    assert (left - right).abs() <= 1e-6


@given(logps, logps, lengths, lengths, st.floats(-5, 5))
@settings(deadline=None)
def test_scaling_all_probabilities_changes_no_coefficient(a, b, n_a, n_b, log_scale):
    pairs = one_pair(a, b, n_a, n_b)
    scaled = one_pair(a + n_a * log_scale, b + n_b * log_scale, n_a, n_b)
    for found, expected in zip(
        Balance().coefficients(*Balance().log_probs(scaled)),
        Balance().coefficients(*Balance().log_probs(pairs)),
        strict=True,
    ):
        # δ moves by rounding of numbers of this size only.
        size = abs(a) / n_a + abs(b) / n_b + abs(log_scale)
        assert abs(found / expected - 1) <= 8 * 2**-53 * (1 + size)


@given(logps, logps, lengths, lengths)
@settings(deadline=None)
def test_swapping_responses_swaps_coefficients(a, b, n_a, n_b):
    balance = Balance()
    forth = balance.coefficients(*balance.log_probs(one_pair(a, b, n_a, n_b)))
    back = balance.coefficients(*balance.log_probs(one_pair(b, a, n_b, n_a)))
    assert forth == back[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", objective_names())
def test_clip_of_one_is_no_balance_bit_for_bit(name, dtype):
    pairs = make_pairs(dtype=dtype)
    plain = losses_and_coefs(make_objective(name, balance=None), pairs)
    clipped = losses_and_coefs(make_objective(name, balance=Balance(clip=1)), pairs)
    for found, expected in zip(clipped, plain, strict=True):
        assert torch.equal(found, expected)


def test_no_gradient_flows_through_the_coefficients():
    pairs, objective = make_pairs(), AdaDPO()
    a_w, a_l = objective.balance.coefficients(*objective.balance.log_probs(pairs))
    _, of_chosen, of_rejected = losses_and_coefs(objective, pairs)
    m = objective.beta * (
        a_w * (pairs.chosen_logps - pairs.ref_chosen_logps)
        - a_l * (pairs.rejected_logps - pairs.ref_rejected_logps)
    )
    slope = objective.beta * torch.sigmoid(-m)
    torch.testing.assert_close(of_chosen, -slope * a_w)
    torch.testing.assert_close(of_rejected, slope * a_l)


def test_orpo_balances_the_log_odds():
    """a_w / a_l = ρ'(p̄_l) / ρ'(p̄_w) for ρ = log odds, so |∂L/∂p̄| of the odds term agree."""
    pairs = make_pairs()
    objective = ORPO(odds_weight=1.0, balance=Balance(clip=math.inf))
    _, of_chosen, of_rejected = losses_and_coefs(objective, pairs)
    of_chosen = of_chosen + 1 / pairs.chosen_lengths  # without the NLL
    by_p_chosen = of_chosen * pairs.chosen_lengths / pairs.chosen_mean_logps.exp()
    by_p_rejected = of_rejected * pairs.rejected_lengths / pairs.rejected_mean_logps.exp()
    torch.testing.assert_close(by_p_chosen, -by_p_rejected)


def test_adadpo_is_dpo_with_a_balance():
    pairs = make_pairs()
    assert torch.equal(AdaDPO(beta=0.2)(pairs), DPO(beta=0.2, balance=Balance())(pairs))


# --- names, metrics, bad settings ---------------------------------------------------------------


def test_metrics_are_means_over_pairs():
    pairs = make_pairs()
    metrics = pair_metrics(UniDPO(balance=Balance(clip=1.2)), pairs)
    rewards = 2.0 * (pairs.chosen_logps - pairs.ref_chosen_logps)
    others = 2.0 * (pairs.rejected_logps - pairs.ref_rejected_logps)
    torch.testing.assert_close(metrics["rewards/chosen"], rewards.mean())
    torch.testing.assert_close(metrics["rewards/margins"], (rewards - others).mean())
    torch.testing.assert_close(metrics["rewards/accuracies"], (rewards > others).double().mean())
    delta = pairs.chosen_mean_logps - pairs.rejected_mean_logps
    clipped = (0.5 * delta.abs() > math.log(1.2)).double().mean()
    assert 0 < clipped < 1
    torch.testing.assert_close(metrics["balance/clipped"], clipped)
    assert metrics.keys() >= {"weights/quality", "weights/performance", "weights/nll"}
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_without_reference_scale_log_probabilities():
    pairs = dataclasses.replace(make_pairs(), ref_chosen_logps=None, ref_rejected_logps=None)
    metrics = pair_metrics(SimPO(), pairs)
    torch.testing.assert_close(metrics["rewards/chosen"], 2.0 * pairs.chosen_logps.mean())


@pytest.mark.parametrize("name", ["Uni-DPO", "uni_dpo", "UNIDPO"])
def test_names_are_forgiving(name):
    assert make_objective(name, beta=1.0) == UniDPO(beta=1.0)


def test_balance_from_settings():
    assert make_objective("dpo", balance={"clip": 3.0}) == DPO(balance=Balance(clip=3.0))
    assert make_objective("simpo", balance=True) == SimPO(balance=Balance())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_objective("ppo"), "unknown objective 'ppo'.*simpo"),
        (lambda: make_objective("dpo", gamma=1.0), "DPO has no hyperparameter 'gamma'"),
        (lambda: DPO(beta=0), "beta must be positive"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing"),
        (lambda: UniDPO(gamma=-1), "gamma"),
        (lambda: Balance(source="oracle"), "source"),
        (lambda: Balance(clip=0.9), "clip"),
        (lambda: ORPO(balance=Balance(source="implicit_reward")), "ORPO"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_balance_must_be_a_balance():
    with pytest.raises(TypeError, match="balance"):
        DPO(balance=0.5)


def test_objective_of_ones_own_must_say_its_losses():
    with pytest.raises(NotImplementedError, match="Mine must implement"):
        type("Mine", (Objective,), {})()(make_pairs())
