"""Every loss of TRL's `DPOConfig`: two steps of plain TRL's trainer, and the same two of ours."""

import copy

import pytest
import torch
from trl_runs import OURS, STOCK, make_trainer

from fastpref.trl import PreferenceTrainer

BATCHES = ((0, 1, 2, 3), (4, 5, 6, 7))
# What DPOTrainer takes over from its configuration, by the names it gives them.
KEPT = {
    "beta": "beta",
    "loss_type": "loss_types",
    "ld_alpha": "ld_alpha",
    "f_divergence_type": "f_divergence_type",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "label_smoothing": "label_smoothing",
    "use_weighting": "use_weighting",
}


@pytest.fixture(scope="module")
def trainers(tiny_llama, pairs, tmp_path_factory):
    """One of each kind; with each what its policy starts at, `away` from its reference."""
    made = []
    for name, kind in (("ours", OURS), ("stock", STOCK)):
        out = tmp_path_factory.mktemp(name)
        # TRL's head makes what weighting needs only where it was asked for at the beginning.
        trainer = make_trainer(kind, tiny_llama, pairs, out, use_weighting=True)
        trainer.given, trainer.args.use_weighting = trainer.args, False
        reference = copy.deepcopy(trainer.model.state_dict())
        made.append((trainer, reference))
    return made


def start(trainer, reference, away):
    """Away from the reference, or margins would be 0 at the first step."""
    generator = torch.Generator().manual_seed(1)
    trainer.model.load_state_dict(reference)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(away * torch.randn(parameter.shape, generator=generator))


def two_steps(trainer, reference, options, *, away, learning_rate):
    """Metrics, loss included, and gradients of two steps of plain gradient descent."""
    trainer.args = copy.copy(trainer.given)
    vars(trainer.args).update(options)
    for field, attribute in KEPT.items():
        setattr(trainer, attribute, getattr(trainer.args, field))
    trainer.loss_weights = trainer.args.loss_weights or [1.0] * len(trainer.loss_types)
    if isinstance(trainer, PreferenceTrainer):
        trainer.objective = trainer.args.make_objective()
    trainer._total_train_tokens = 0
    start(trainer, reference, away)
    trainer.model.train()
    steps = []
    for rows in BATCHES:
        examples = [trainer.train_dataset[row] for row in rows]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        trainer.model.zero_grad()
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        trainer._metrics["train"].clear()
        grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.sub_(learning_rate * parameter.grad)
        steps.append((metrics | {"loss": loss.item()}, grads))
    return steps


def assert_alike(trainers, *, away=0.1, learning_rate=1e-2, relative=5e-6, **options):
    """Metrics and gradients agree in float32.

    A response is a sum of ten log-probabilities of about 4 nats, so it errs by units of 2⁻²⁴ · 40
    = 2e-6, and rewards and losses by no more than that and their own size's rounding. A gradient
    went through two layers of sums of 64 products; its largest entry has a few hundred roundings.
    """
    options = {"beta": 0.5} | options
    found, expected = (
        two_steps(*each, options, away=away, learning_rate=learning_rate) for each in trainers
    )
    for step, (metrics, grads) in enumerate(found):
        their_metrics, their_grads = expected[step]
        assert abs(their_metrics["rewards/margins"]) > 0.1
        assert their_metrics.keys() <= metrics.keys()
        for name, value in their_metrics.items():
            absolute = relative if name != "loss" else 0  # which is tiny under WPO's weights
            assert metrics[name] == pytest.approx(value, rel=relative, abs=absolute), (step, name)
        for name, grad in their_grads.items():
            assert grad.any(), name
            assert (grads[name] - grad).abs().max() <= 10 * relative * grad.abs().max(), (
                step,
                name,
            )


def named(options):
    return "-".join(str(value) for value in options.values())


LOSSES = [
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["hinge"]},
    {"loss_type": ["ipo"]},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.02},
    {"loss_type": ["nca_pair"]},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["bco_pair"]},
    {"loss_type": ["sppo_hard"]},
    {"loss_type": ["aot"], "label_smoothing": 0.1},
    {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    {"loss_type": ["apo_zero"]},
    {"loss_type": ["apo_down"]},
    {"loss_type": ["discopop"], "discopop_tau": 0.2},
    {"loss_type": ["sft"]},
    {"loss_type": ["sigmoid_norm"]},
]
OF_MARGINS = [
    each
    for each in LOSSES
    if each["loss_type"][0]
    in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
]
# TRL 1.16 multiplies weights in place, which autograd forbids of hinge and of sft's one number.
OF_PAIRS = [
    each for each in LOSSES if each["loss_type"][0] not in ("hinge", "aot", "aot_unpaired", "sft")
]


@pytest.mark.parametrize("options", LOSSES, ids=named)
def test_loss_types(options, trainers):
    assert_alike(trainers, **options)


@pytest.mark.parametrize("options", OF_PAIRS, ids=named)
def test_weighting(options, trainers):
    assert_alike(trainers, **options, use_weighting=True)


@pytest.mark.parametrize("options", LOSSES, ids=named)
def test_length_desensitised(options, trainers):
    """TRL's sft alone leaves ld_alpha out."""
    assert_alike(trainers, **options, ld_alpha=0.3)


@pytest.mark.parametrize(
    "divergence",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    ],
    ids=named,
)
@pytest.mark.parametrize("options", [*OF_MARGINS, {"loss_type": ["sft"]}], ids=named)
def test_divergences(options, divergence, trainers):
    """Near the reference: e^(−x) magnifies what a log-ratio x is rounded by, of −3 twentyfold."""
    changes = {"away": 0.03, "learning_rate": 1e-3, "relative": 5e-5}
    assert_alike(trainers, **options, **divergence, **changes)


@pytest.mark.parametrize("schedule", ["pair_groups", "recompute"])
@pytest.mark.parametrize("ld_alpha", [0.3, 1.0])
def test_sft_gets_its_tokens_back(schedule, ld_alpha, trainers, monkeypatch):
    """In every schedule, and where no token was taken."""
    monkeypatch.setattr(trainers[0][0], "_schedule", schedule)
    assert_alike(trainers, loss_type=["hinge", "sft"], loss_weights=[1.0, 0.5], ld_alpha=ld_alpha)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "ld_alpha": 0.3},
        {"loss_type": ["ipo", "sigmoid_norm"], "loss_weights": [-0.5, 2]},
        {"loss_type": ["sigmoid", "sigmoid"]},
        {"loss_type": ["hinge"], "loss_weights": [0.3]},
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.0]},
        {"loss_type": ["robust", "exo_pair", "aot"], "label_smoothing": 0.05},
        {"loss_type": ["sigmoid", "apo_zero"], "use_weighting": True, "ld_alpha": 0.5},
        {"loss_type": ["ipo"], "use_weighting": True, "f_divergence_type": "js_divergence"},
        {"loss_type": ["sft", "sft"], "loss_weights": [0.5, 1.0], "ld_alpha": 0.0},
        {"loss_type": ["sigmoid"], "label_smoothing": 0.4},
    ],
    ids=named,
)
def test_mixtures(options, trainers):
    assert_alike(trainers, **options)
