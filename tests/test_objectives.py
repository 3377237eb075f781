"""Objectives against the reference in float64, their closed forms and AdaDPO's properties."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    NCA,
    ODPO,
    ORPO,
    RDPO,
    RPO,
    SFT,
    SPPO,
    WPO,
    AdaDPO,
    AOTUnpaired,
    APODown,
    APOZero,
    Balance,
    BetaDPO,
    ChiPO,
    DiscoPOP,
    Divergence,
    Hinge,
    ListLogps,
    Mixture,
    Objective,
    PairLogps,
    PlackettLuce,
    RankedPairs,
    Robust,
    SimPO,
    UniDPO,
    reference,
)
from fastpref.objectives import (
    PUBLISHED_SETTINGS,
    hyperparameters,
    make_objective,
    mean_or_zero,
    objective_names,
)

BALANCES = [
    None,
    Balance(),
    Balance(ceiling=1.05, floor=0.9),
    Balance(chosen_exponent=0.5, rejected_exponent=0.5, ceiling=10.0, floor=0.1),
    Balance(source="implicit_reward", chosen_exponent=0.3, rejected_exponent=0.9),
    Balance(per_token=False, ceiling=3.0),
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
    AdaDPO(beta=0.3, balance=Balance(ceiling=1.5)),
    Robust(),
    Robust(beta=0.7, label_smoothing=0.3),
    EXO(),
    EXO(beta=0.7, label_smoothing=0.2),
    DiscoPOP(),
    DiscoPOP(beta=0.3, tau=0.5),
    RPO(),
    RPO(beta=0.3, nll_weight=0.2, label_smoothing=0.1),
    ODPO(),
    ODPO(beta=0.4, alpha=0.3),
    DPOP(),
    DPOP(beta=0.1, penalty=2.0),
    ChiPO(beta=0.01),
    ChiPO(beta=0.5, largest_reward=0.5),
    BetaDPO(),
    BetaDPO(beta=0.3, alpha=2.0, threshold=0.5),
]
# Objectives that no balance applies to.
OTHERS = [
    NCA(),
    NCA(beta=0.7),
    BCO(),
    SPPO(),
    SPPO(beta=0.5),
    APOZero(),
    APODown(),
    APODown(beta=1.3),
    AOT(),
    AOT(label_smoothing=0.2),
    AOTUnpaired(beta=0.3, label_smoothing=0.1),
    SFT(),
    Mixture([(DPO(beta=0.2), 0.8), (BCO(), 0.2), (SFT(), 1.5)]),
    Mixture([(SimPO(), -0.5), (UniDPO(), 1.0)], beta=0.3),
    WPO(DPO()),
    WPO(Mixture([(IPO(), 1.0), (BCO(), 2.0)])),
]
DIVERGENCES = [
    Divergence(),
    Divergence("forward_kl"),
    Divergence("js"),
    Divergence("alpha", alpha=0.3),
    Divergence("alpha", alpha=1.0 + 1e-4),
]


def metrics_of(objective, pairs):
    with torch.no_grad():
        return {name: mean_or_zero(x) for name, x in objective.report(pairs).items()}


def with_balances(objective):
    for balance in BALANCES:
        try:
            yield dataclasses.replace(objective, balance=balance)
        except ValueError:
            assert isinstance(objective, ORPO)
            assert balance.source == "implicit_reward"


ALL = [variant for objective in VARIANTS for variant in with_balances(objective)] + OTHERS
BALANCED = [name for name in objective_names() if "balance" in hyperparameters(name)]


def make_pairs(count=16, seed=0, dtype=torch.float64, ordered=False):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, count), generator=draw)
    mean = -2.5 * torch.rand(2, count, generator=draw, dtype=torch.float64)
    ref = mean + 0.3 * torch.randn(2, count, generator=draw, dtype=torch.float64)
    scores = 10 * torch.rand(2, count, generator=draw, dtype=torch.float64)
    if ordered:  # the chosen response has the higher score
        scores = scores.sort(0, descending=True).values
    alignments = lengths * torch.rand(2, count, generator=draw, dtype=torch.float64) - 0.5
    parts = [*(mean * lengths), *lengths, *(ref * lengths), *scores]
    return PairLogps(
        *(part.to(dtype) for part in parts),
        chosen_alignments=alignments[0].to(dtype),
        rejected_alignments=alignments[1].to(dtype),
        mean_chosen_length=lengths[0].double().mean().item(),
    )


def losses_and_coefs(losses_of, pairs):
    leaves = [pairs.chosen_logps, pairs.rejected_logps]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    moved = dataclasses.replace(pairs, chosen_logps=leaves[0], rejected_logps=leaves[1])
    losses = losses_of(moved)
    coefs = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    return losses.detach(), *coefs


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_losses_and_coefficients_equal_the_reference(objective):
    pairs = make_pairs(ordered=isinstance(objective, ODPO))
    ours = losses_and_coefs(objective, pairs)
    truth = losses_and_coefs(lambda p: reference.pair_losses(objective, p), pairs)
    for found, expected in zip(ours, truth, strict=True):
        # Both are some tens of float64 operations on numbers of the margins' size.
        size = 1 + expected.abs().max() + pairs.chosen_logps.abs().max()
        assert (found - expected).abs().max() <= 64 * 2**-53 * size
    assert any(coef.abs().max() > 0 for coef in truth[1:])


@pytest.mark.parametrize(
    "objective",
    # A balance, a detached weight and a batch's β are constants to autograd, not to differences.
    [
        o
        for o in [*VARIANTS, *OTHERS]
        if getattr(o, "balance", None) is None
        and not getattr(o, "detach_performance_weight", False)
        and not isinstance(o, BetaDPO)
    ],
    ids=repr,
)
def test_gradcheck(objective):
    pairs = make_pairs(count=6, seed=3, ordered=True)

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


def one_pair(chosen, rejected, n_chosen, n_rejected, ref=(-30.0, -40.0), dtype=torch.float64):
    values = (chosen, rejected, n_chosen, n_rejected, *ref, 0.0, 0.0)
    return PairLogps(*(torch.tensor([float(v)], dtype=dtype) for v in values))


@given(logps, logps, lengths, lengths, st.floats(0, 1))
@settings(deadline=None)
def test_balanced_magnitudes_agree(chosen, rejected, n_chosen, n_rejected, exponent):
    balance = Balance(chosen_exponent=exponent, rejected_exponent=1 - exponent, ceiling=math.inf)
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


@given(logps, logps, lengths, lengths, st.floats(-2, 2))
@settings(deadline=None)
def test_swapping_responses_swaps_coefficients_of_equal_exponents(a, b, n_a, n_b, exponent):
    balance = Balance(chosen_exponent=exponent, rejected_exponent=exponent, floor=0.1)
    forth = balance.coefficients(*balance.log_probs(one_pair(a, b, n_a, n_b)))
    back = balance.coefficients(*balance.log_probs(one_pair(b, a, n_b, n_a)))
    assert forth == back[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BALANCED)
def test_ceiling_and_floor_of_one_are_no_balance_bit_for_bit(name, dtype):
    pairs = make_pairs(dtype=dtype, ordered=True)
    plain = losses_and_coefs(make_objective(name, balance=None), pairs)
    one = Balance(ceiling=1, floor=1, rejected_exponent=0.7)
    for found, expected in zip(
        losses_and_coefs(make_objective(name, balance=one), pairs), plain, strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("source", ["policy", "implicit_reward"])
def test_adadpo_as_published(source, per_token):
    """β_w = β min(sg[P_w / P_l], C), β_l = β; of ratio space P is taken over the reference's."""
    beta, ceiling = 0.05, 2.0
    pairs = make_pairs()
    l_w = pairs.chosen_logps.clone().requires_grad_()
    l_l = pairs.rejected_logps.clone().requires_grad_()
    r_w, r_l = pairs.ref_chosen_logps, pairs.ref_rejected_logps
    over = source == "implicit_reward"
    n_w, n_l = (pairs.chosen_lengths, pairs.rejected_lengths) if per_token else (1, 1)
    p_w = ((l_w - over * r_w) / n_w).detach().exp()
    p_l = ((l_l - over * r_l) / n_l).detach().exp()
    beta_w = beta * torch.minimum(p_w / p_l, torch.tensor(ceiling))
    losses = -torch.log(torch.sigmoid(beta_w * (l_w - r_w) - beta * (l_l - r_l)))
    coefs = torch.autograd.grad(losses.sum(), (l_w, l_l))
    objective = AdaDPO(beta=beta)
    if (source, per_token) != ("policy", True):
        objective = DPO(beta=beta, balance=Balance(source=source, per_token=per_token))
    assert 0 < (beta_w == beta * ceiling).double().mean() < 1  # some are clipped
    for found, expected in zip(
        losses_and_coefs(objective, pairs), (losses.detach(), *coefs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_of_extreme_probabilities(dtype):
    far = torch.tensor([1e6, -1e6, math.nan], dtype=dtype)
    chosen, rejected = Balance().coefficients(far, torch.zeros_like(far))
    assert chosen[:2].tolist() == [2.0, 0.0]
    assert chosen[2].isnan()
    assert rejected.tolist() == [1.0] * 3
    assert Balance(ceiling=0.5).coefficients(far, far)[1].tolist() == [1.0] * 3
    symmetric = Balance(rejected_exponent=1.0, ceiling=3.0, floor=0.2)
    for found, expected in zip(
        symmetric.coefficients(far, torch.zeros_like(far)), ([3.0, 0.2], [0.2, 3.0]), strict=True
    ):
        assert found[:2].tolist() == pytest.approx(expected, rel=1e-7)
    assert symmetric.clipped(far, torch.zeros_like(far))[:2].tolist() == [1.0, 1.0]


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
    objective = ORPO(odds_weight=1.0, balance=Balance(ceiling=math.inf))
    _, of_chosen, of_rejected = losses_and_coefs(objective, pairs)
    of_chosen = of_chosen + 1 / pairs.chosen_lengths  # without the NLL
    by_p_chosen = of_chosen * pairs.chosen_lengths / pairs.chosen_mean_logps.exp()
    by_p_rejected = of_rejected * pairs.rejected_lengths / pairs.rejected_mean_logps.exp()
    torch.testing.assert_close(by_p_chosen, -by_p_rejected)


def test_adadpo_is_dpo_with_a_balance():
    pairs = make_pairs()
    assert torch.equal(AdaDPO(beta=0.2)(pairs), DPO(beta=0.2, balance=Balance())(pairs))


# --- names, metrics, bad settings ---------------------------------------------------------------


@pytest.mark.parametrize("normalized", [True, False])
def test_metrics_are_means_over_pairs(normalized):
    pairs = make_pairs()
    objective = UniDPO(balance=Balance(ceiling=1.2, floor=0.8), length_normalized=normalized)
    metrics = metrics_of(objective, pairs)
    n_w, n_l = (pairs.chosen_lengths, pairs.rejected_lengths) if normalized else (1, 1)
    rewards = 2.0 * (pairs.chosen_logps - pairs.ref_chosen_logps) / n_w
    others = 2.0 * (pairs.rejected_logps - pairs.ref_rejected_logps) / n_l
    torch.testing.assert_close(metrics["rewards/chosen"], rewards.mean())
    torch.testing.assert_close(metrics["rewards/margins"], (rewards - others).mean())
    torch.testing.assert_close(metrics["rewards/accuracies"], (rewards > others).double().mean())
    torch.testing.assert_close(metrics["logps/chosen"], pairs.chosen_logps.mean())
    delta = pairs.chosen_mean_logps - pairs.rejected_mean_logps
    clipped = ((delta > math.log(1.2)) | (delta < math.log(0.8))).double().mean()
    assert 0 < clipped < 1
    torch.testing.assert_close(metrics["balance/clipped"], clipped)
    assert metrics.keys() >= {"weights/quality", "weights/performance", "weights/nll"}
    assert not any(value.requires_grad for value in metrics.values())


def test_rewards_say_what_the_loss_prefers():
    """A short chosen response, likelier per token: its sum is the larger, its average too."""
    pairs = one_pair(-100.0, -40.0, 200, 20)  # averages −0.5 and −2
    metrics = metrics_of(SimPO(), pairs)
    assert metrics["rewards/margins"] == 3.0
    assert metrics["rewards/accuracies"] == 1
    summed = metrics_of(CPO(), pairs)
    assert summed["rewards/margins"] == pytest.approx(-6.0)
    assert summed["rewards/accuracies"] == 0


@pytest.mark.parametrize("given", [True, False], ids=["reference given", "none"])
@pytest.mark.parametrize("objective", [SimPO(), CPO(), ORPO()])
def test_rewards_of_objectives_without_a_reference_do_not_look_at_one(objective, given):
    pairs = make_pairs()
    if not given:
        pairs = dataclasses.replace(pairs, ref_chosen_logps=None, ref_rejected_logps=None)
    metrics = metrics_of(objective, pairs)
    of = pairs.chosen_logps / (pairs.chosen_lengths if objective.length_normalized else 1)
    expected = objective.reward_scale * of.mean()
    torch.testing.assert_close(metrics["rewards/chosen"], expected)


@pytest.mark.parametrize("mean", [-1e-5, -1e-3, -0.7, -5.0, -60.0])
def test_odds_near_certainty_keep_their_gradient_in_float32(mean):
    found, expected = (
        losses_and_coefs(ORPO(odds_weight=1.0), one_pair(mean, -2.0, 1, 1, dtype=dtype))[1]
        for dtype in (torch.float32, torch.float64)
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["Uni-DPO", "uni_dpo", "UNIDPO"])
def test_names_are_forgiving(name):
    assert make_objective(name, beta=1.0) == UniDPO(beta=1.0)


def test_balance_from_settings():
    assert make_objective("dpo", balance={"ceiling": 3.0}) == DPO(balance=Balance(ceiling=3.0))
    assert make_objective("simpo", balance=True) == SimPO(balance=Balance())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_objective("ppo"), "unknown objective 'ppo'.*simpo"),
        (lambda: make_objective("dpo", gamma=1.0), "DPO has no hyperparameter 'gamma'"),
        (lambda: DPO(beta=0), "beta must be finite and above 0, got 0"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing"),
        (lambda: UniDPO(gamma=-1), "gamma"),
        (lambda: Balance(source="oracle"), "source"),
        (lambda: Balance(ceiling=0), "ceiling must be a number and above 0, got 0"),
        (lambda: Balance(floor=-0.1), "floor"),
        (lambda: Balance(floor=3.0), "floor 3.0 must not exceed ceiling 2.0"),
        (lambda: CPO(nll_weight=-1), "nll_weight must be finite and at least 0, got -1"),
        (lambda: UniDPO(nll_weight=-1e-3), "nll_weight"),
        (lambda: ORPO(odds_weight=-1), "odds_weight"),
        (lambda: Divergence("hellinger"), "unknown divergence 'hellinger'.*forward_kl"),
        (lambda: SimPO(divergence=Divergence("js")), "SimPO has no reference to diverge from"),
        (lambda: ChiPO(divergence=Divergence("js")), "ChiPO has a divergence of its own"),
        (lambda: EXO(label_smoothing=0.0), "label_smoothing must be finite and above 0"),
        (lambda: Mixture([]), "at least one"),
        (lambda: Mixture([(DPO(), math.nan)]), "weight must be finite"),
        (lambda: Mixture([(DPO(), 1.0)], beta=0), "beta must be finite and above 0"),
        (lambda: RankedPairs(AOT()), "couples no pairs"),
        (lambda: WPO(AOT()), "must couple no pairs"),
        (lambda: UniDPO.for_model("gpt-2"), "'gpt-2'.*gemma-2-9b-it"),
        (lambda: UniDPO().for_scores((1, 1), (0, 1)), "theirs must increase"),
        (lambda: UniDPO().for_scores((1, 5), (0, math.nan)), "yours must be finite"),
        (lambda: ORPO(balance=Balance(source="implicit_reward")), "ORPO"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SETTINGS = {"balance": Balance, "divergence": Divergence, "plackettluce": PlackettLuce}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1", None, True, 1j])
@pytest.mark.parametrize("owner", [*(n for n in objective_names() if n != "sft"), *SETTINGS])
def test_every_number_must_be_one(owner, bad):
    """No hyperparameter of any objective lets through what would train NaN or nothing."""
    make = SETTINGS.get(owner) or functools.partial(make_objective, owner)
    fields = dataclasses.fields(make())
    names = [field.name for field in fields if isinstance(field.default, float)]
    assert names
    for name in names:
        if (name, bad) == ("ceiling", math.inf):
            continue
        with pytest.raises((ValueError, TypeError), match=name):
            make(**{name: bad})


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize(
    "objective",
    [DPO(), DPO(length_normalized=True), Hinge(), IPO(), RDPO(), UniDPO(), Robust(), EXO(), RPO()],
    ids=lambda objective: type(objective).__name__,
)
def test_divergences_choose_the_reward(objective, divergence):
    pairs = dataclasses.replace(make_pairs(), **SMALL_RATIOS)
    ours = dataclasses.replace(objective, divergence=divergence)
    truth = losses_and_coefs(lambda p: reference.pair_losses(ours, p), pairs)
    for found, expected in zip(losses_and_coefs(ours, pairs), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    plain = objective(pairs)
    same = divergence.name == "reverse_kl" or abs(divergence.alpha - 1) < 1e-3
    assert torch.allclose(ours(pairs), plain, rtol=1e-3) == same
    assert ours.formula() is None


_MEANS = make_pairs()
# Log-ratios within ±3 nats, where no exponential is cut.
SMALL_RATIOS = {
    "ref_chosen_logps": _MEANS.chosen_logps + torch.linspace(-3, 3, 16),
    "ref_rejected_logps": _MEANS.rejected_logps + torch.linspace(2, -3, 16),
}


def test_extreme_divergences_are_finite():
    far = torch.tensor([1e4, -1e4])
    for divergence in (*DIVERGENCES, Divergence("alpha", alpha=3.0)):
        assert divergence.reward(far).isfinite().all(), divergence


def test_needs_of_mixtures_are_those_of_their_terms():
    plain = Mixture([(SimPO(), 1.0), (SFT(), 0.5)])
    assert not (plain.needs_reference or plain.needs_scores or plain.couples_pairs)
    mixed = Mixture([(SimPO(beta=3.0), 1.0), (UniDPO(), 1.0), (WPO(IPO()), 1.0), (AOT(), 1.0)])
    assert mixed.needs_reference
    assert mixed.needs_scores
    assert mixed.couples_pairs
    assert mixed.needs_alignments
    assert not mixed.takes_betas
    assert mixed.reward_scale == 3.0
    assert Mixture([(DPO(), 1.0)], beta=0.7).reward_scale == 0.7


def test_robust_dpo_is_conservative_dpo_of_the_opposite_noise():
    """Its fused formula: −ε/(1−2ε) in place of ε."""
    formula = Robust(label_smoothing=0.2).formula()
    assert formula.label_smoothing == pytest.approx(-0.2 / 0.6)


def test_flags_must_be_flags():
    with pytest.raises(TypeError, match="length_normalized must be True or False, got 'no'"):
        DPO(length_normalized="no")
    with pytest.raises(TypeError, match="per_token"):
        Balance(per_token=1)


def test_published_settings_of_unidpo():
    assert UniDPO.for_model("llama-3-8b-base") == UniDPO()
    assert UniDPO.for_model("google/gemma-2-9b-it") == UniDPO(beta=10.0)
    assert UniDPO.for_model("meta-llama/Meta-Llama-3-8B-Instruct") == UniDPO(tau_ref=1.0)
    assert UniDPO.for_model("Llama-3-8B-Instruct-v2") == UniDPO(beta=10.0, tau_ref=1.0)
    assert UniDPO.for_model("Qwen2.5-14B") == UniDPO(beta=3.5)
    math_run = UniDPO(tau_ref=2.0, nll_weight=0.2, tau_good=8.0)
    assert UniDPO.for_model("Qwen/Qwen2.5-Math-7B") == math_run
    assert UniDPO.for_model("qwen2-vl-2b") == UniDPO(tau_ref=2.0, tau_good=2.5)
    changed = UniDPO.for_model("gemma-2-9b-it", gamma=1.0, balance=Balance())
    assert changed == UniDPO(beta=10.0, gamma=1.0, balance=Balance())
    rates = {name: settings["learning_rate"] for name, settings in PUBLISHED_SETTINGS.items()}
    assert rates.pop("gemma-2-9b-it") == 8e-7
    assert {rates.pop(name) for name in list(rates) if name[8:] in QWEN_SIZES} == {2e-6}
    assert set(rates.values()) == {1e-6}


QWEN_SIZES = ("0.5b", "1.5b", "3b", "7b", "14b")


def test_scores_on_another_scale_weigh_the_same():
    pairs = make_pairs()
    stretched = dataclasses.replace(
        pairs,
        chosen_scores=7 * pairs.chosen_scores - 4,
        rejected_scores=7 * pairs.rejected_scores - 4,
    )
    objective = UniDPO(nll_weight=0.3, tau_good=5.0)
    elsewhere = objective.for_scores((1.0, 5.0), (3.0, 31.0))
    torch.testing.assert_close(elsewhere(stretched), objective(pairs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixture([(PlackettLuce(), 1.0)]),
        lambda: Mixture([("dpo", 1.0)]),
        lambda: WPO(DPO),
        lambda: RankedPairs(PlackettLuce()),
        lambda: DPO(divergence="js"),
    ],
)
def test_parts_must_be_objectives_of_pairs(make):
    with pytest.raises(TypeError, match="objective of pairs|must be a Divergence"):
        make()


def test_odpo_refuses_pairs_out_of_order():
    with pytest.raises(ValueError, match="ODPO needs chosen scores above the rejected ones; got"):
        ODPO()(make_pairs())


def test_balance_must_be_a_balance():
    with pytest.raises(TypeError, match="balance"):
        DPO(balance=0.5)


def test_objective_of_ones_own_must_say_its_losses():
    with pytest.raises(NotImplementedError, match="Mine must implement"):
        type("Mine", (Objective,), {})()(make_pairs())


@pytest.mark.parametrize(
    ("look", "name"),
    [
        (lambda pairs: pairs.log_ratios(normalized=False), "ref_logps"),
        (lambda pairs: pairs.log_ratios(normalized=True), "ref_logps"),
        (lambda pairs: pairs.score_gap(), "scores"),
        (WPO(SimPO()).weight, "alignments"),
    ],
)
def test_what_an_objective_misses_is_named(look, name):
    vector = torch.ones(3)
    with pytest.raises(ValueError, match=f"looks at {name}"):
        look(PairLogps(vector, vector, vector, vector))


def test_a_list_objective_without_scores_names_them():
    with pytest.raises(ValueError, match="looks at scores"):
        PlackettLuce()(ListLogps(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2)))


def test_sft_of_pairs_alone_takes_their_own_mean_length():
    logps, lengths = torch.tensor([-6.0, -4.0]), torch.tensor([2.0, 3.0])
    losses = SFT()(PairLogps(logps, logps, lengths, lengths))
    assert losses.mean().item() == pytest.approx(10 / 5)
