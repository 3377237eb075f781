"""`fastpref.liger` beside Liger's own losses: loss, returned values and gradients in float32."""

import inspect

import pytest
import torch
from liger_kernel import chunked_loss

from fastpref import liger

PAIRS, T, H, V = 3, 7, 16, 67
DPO, CPO, SIMPO, ORPO = (f"LigerFusedLinear{name}Loss" for name in ("DPO", "CPO", "SimPO", "ORPO"))


@pytest.fixture(scope="module")
def batch():
    """Hidden states of a policy and its reference, responses of different lengths, two heads."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator)

    target = torch.randint(0, V, (2 * PAIRS, T), generator=generator)
    for row, (start, end) in enumerate([(0, 7), (2, 6), (1, 3), (3, 7), (2, 3), (0, 5)]):
        target[row, :start] = target[row, end:] = -100
    hidden, weight, bias = random(2 * PAIRS, T, H), random(V, H, size=0.5), random(V)
    return {
        "policy": (weight, hidden, bias),
        "reference": tuple(x + random(*x.shape, size=0.2) for x in (weight, hidden, bias)),
        "target": target,
    }


def run(
    module, name, batch, *, with_bias=True, frozen=(), upstream=1.0, nll_target=None, **options
):
    """Loss, returned values and gradients of weight, input and bias."""
    weight, hidden, bias = (x.clone().requires_grad_() for x in batch["policy"])
    bias = bias if with_bias else None
    for index in frozen:
        (weight, hidden, bias)[index].requires_grad_(False)
    arguments = [weight, hidden, batch["target"], bias]
    if name == DPO and options.get("use_ref_model", True):
        ref_weight, ref_hidden, ref_bias = batch["reference"]
        arguments += [ref_hidden, ref_weight, ref_bias if with_bias else None]
    if nll_target is not None:
        arguments.append(nll_target)
    loss, values = getattr(module, name)(**({"compiled": False} | options))(*arguments)
    (upstream * loss).backward()
    leaves = [x for x in (weight, hidden, bias) if x is not None]
    return [loss.detach(), *(x.detach() for x in values)], [x.grad for x in leaves]


def assert_equal(name, batch, **options):
    """Sums of ten log-probabilities of about 5 nats err by some units of 2⁻²⁴ · 50 = 3e-6, and a
    loss that they enter through e^(−βm) or a square by that times its slope, at most 10 here.
    A gradient sums 100 products on either side: its largest entry has as many roundings, 1e-5.
    """
    found, grads = run(liger, name, batch, **options)
    expected, their_grads = run(chunked_loss, name, batch, **options)
    assert len(found) == len(expected)
    assert expected[0].isfinite()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)
    for ours, theirs in zip(grads, their_grads, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
            assert theirs.any()


NOISE = {"exo_pair": 0.02, "robust": 0.1, "sigmoid": 0.3}


@pytest.mark.parametrize("averaged", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize("loss_type", liger._LOSSES)
def test_every_loss_type_of_dpo(loss_type, averaged, batch):
    noise = NOISE.get(loss_type, 0.0)
    options = {"loss_type": loss_type, "label_smoothing": noise, "average_log_prob": averaged}
    assert_equal(DPO, batch, beta=0.3, **options)
    with_nll = {"compute_nll_loss": True, "alpha": 0.7, "discopop_tau": 0.4}
    assert_equal(DPO, batch, beta=0.3, **options, **with_nll)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DPO, {}),
        (DPO, {"use_ref_model": False, "beta": 0.2}),
        (DPO, {"use_ref_model": False, "average_log_prob": True, "compute_nll_loss": True}),
        (DPO, {"with_bias": False, "chunk_size": 2}),
        (DPO, {"upstream": -2.5, "compute_nll_loss": True, "alpha": -0.3}),
        (CPO, {}),
        (CPO, {"average_log_prob": True, "label_smoothing": 0.2, "beta": 1.5}),
        (CPO, {"compute_nll_loss": False, "alpha": 3.0}),
        (CPO, {"alpha": 0.0, "with_bias": False}),
        (SIMPO, {}),
        (SIMPO, {"beta": 2.0, "gamma": -0.4, "label_smoothing": 0.1, "alpha": 0.2}),
        (SIMPO, {"compute_nll_loss": False}),
        (ORPO, {}),
        (ORPO, {"beta": 0.0}),
        (ORPO, {"beta": 1.3, "compute_nll_loss": False, "with_bias": False}),
        *((name, {"frozen": frozen}) for name in (DPO, ORPO) for frozen in ([0], [1], [0, 2])),
    ],
)
def test_constructor_options(name, options, batch):
    assert_equal(name, batch, **options)


def test_orpo_with_targets_of_its_own_for_the_nll(batch):
    prompts = batch["target"].clone()
    prompts[:, :3] = torch.arange(3)
    assert_equal(ORPO, batch, nll_target=prompts, beta=0.4)


@pytest.mark.parametrize("name", [DPO, CPO, SIMPO, ORPO])
def test_another_index_is_ignored(name, batch):
    marked = batch["target"].masked_fill(batch["target"] == -100, 66)
    assert_equal(name, batch | {"target": marked}, ignore_index=66)
    mixed = marked.clone()
    mixed[0, 0] = -100
    with pytest.raises(ValueError, match="targets"):
        run(liger, name, batch | {"target": mixed}, ignore_index=66)


@pytest.mark.parametrize("name", liger.__all__)
def test_signatures_are_ligers(name):
    """Of the constructor names, order and defaults, of the call names and order."""
    ours, theirs = getattr(liger, name), getattr(chunked_loss, name)
    expected = {p.name: p.default for p in list(signature(theirs.__init__))[1:]}
    assert {p.name: p.default for p in list(signature(ours.__init__))[1:]} == expected
    assert list(map(name_of, signature(ours.__init__))) == list(
        map(name_of, signature(theirs.__init__))
    )
    calls = [list(map(name_of, signature(x.forward))) for x in (ours, theirs)]
    assert calls[0] == calls[1]


def signature(function):
    return inspect.signature(function).parameters.values()


def name_of(parameter):
    return parameter.name


def test_settings_may_change_between_calls(batch):
    weight, hidden, bias = batch["policy"]
    loss = liger.LigerFusedLinearSimPOLoss()
    assert isinstance(loss, torch.nn.Module)
    before = loss(weight, hidden, batch["target"])[0]
    loss.gamma = 2.0
    after = loss(weight, hidden, batch["target"])[0]
    expected = chunked_loss.LigerFusedLinearSimPOLoss(gamma=2.0, compiled=False)
    assert before < after
    torch.testing.assert_close(after, expected(weight, hidden, batch["target"])[0])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (DPO, {"loss_type": "ipo"}, ValueError, "loss_type 'ipo'"),
        (DPO, {"loss_type": "exo_pair"}, ValueError, "label_smoothing must be"),
        (DPO, {"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing"),
        (DPO, {"loss_type": "discopop", "discopop_tau": 0.0}, ValueError, "tau must be"),
        (DPO, {"beta": 0.0}, ValueError, "beta must be"),
        (DPO, {"alpha": float("nan")}, ValueError, "alpha must be"),
        (DPO, {"chunk_size": 0}, ValueError, "chunk_size must be"),
        (DPO, {"compute_nll_loss": 1}, TypeError, "compute_nll_loss must be True or False"),
        (DPO, {"ignore_index": None}, TypeError, "ignore_index must be"),
        (CPO, {"label_smoothing": 0.7}, ValueError, "label_smoothing must be"),
        (SIMPO, {"gamma": float("inf")}, ValueError, "gamma must be"),
        (ORPO, {"beta": -0.1}, ValueError, "odds_weight must be"),
    ],
)
def test_what_no_objective_takes_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(liger, name)(**options)


def test_contradictory_calls_are_refused(batch):
    weight, hidden, _ = batch["policy"]
    ref_weight, ref_hidden, _ = batch["reference"]
    target = batch["target"]
    with pytest.raises(ValueError, match="use_ref_model=True.*missing, missing"):
        liger.LigerFusedLinearDPOLoss()(weight, hidden, target)
    with pytest.raises(ValueError, match="use_ref_model=True.*given, missing"):
        liger.LigerFusedLinearDPOLoss()(weight, hidden, target, None, ref_hidden)
    with pytest.raises(ValueError, match="use_ref_model=False.*given, given"):
        loss = liger.LigerFusedLinearDPOLoss(use_ref_model=False)
        loss(weight, hidden, target, None, ref_hidden, ref_weight)
    with pytest.raises(ValueError, match="nll_target"):
        loss = liger.LigerFusedLinearORPOLoss(compute_nll_loss=False)
        loss(weight, hidden, target, None, target)


def test_returned_values_are_constants(batch):
    weight, hidden, _ = (x.clone().requires_grad_() for x in batch["policy"])
    loss, values = liger.LigerFusedLinearORPOLoss()(weight, hidden, batch["target"])
    assert loss.requires_grad
    assert not any(value.requires_grad for value in values)


def test_bfloat16_is_more_exact_than_ligers(batch):
    """Against the same loss of the same bf16 numbers in float32."""
    exact, _ = run(liger, CPO, as_dtype(as_dtype(batch, torch.bfloat16), torch.float32))
    rounded = as_dtype(batch, torch.bfloat16)
    ours, theirs = run(liger, CPO, rounded)[0], run(chunked_loss, CPO, rounded)[0]
    for index in range(3):  # loss and log-probabilities
        mine, other = ((x[index] - exact[index]).abs().max() for x in (ours, theirs))
        assert mine < other


def as_dtype(batch, dtype):
    return {k: v if k == "target" else tuple(x.to(dtype) for x in v) for k, v in batch.items()}
