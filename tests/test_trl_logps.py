"""`use_fastpref_logps` under stock TRL trainers, and what of TRL is looked up."""

import random
import sys

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils
from trl_runs import (
    CPU,
    DEFAULTS,
    STOCK,
    as_dataset,
    compare_runs,
    make_trainer,
    trained,
)

import fastpref.trl
from fastpref.trl import PreferenceTrainer, stock, use_fastpref_logps
from fastpref.trl.logps import _FastprefLogps

# --- two steps beside plain TRL -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["aot"]},
        {"loss_type": ["discopop"], "use_weighting": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ],
    ids=str,
)
def test_stock_dpo_with_fastpref_logps(options, tiny_llama, pairs, tmp_path):
    def run():
        return trained(make_trainer(STOCK, tiny_llama, pairs, tmp_path, optim="sgd", **options))

    plain = run()
    with use_fastpref_logps():
        ours = run()
    compare_runs(ours, plain, relative=1e-5)


def assert_same_steps(run, *, relative=1e-5):
    plain = run()
    with use_fastpref_logps():
        ours = run()
    compare_runs(ours, plain, relative=relative)


def test_stock_sft(tiny_llama, pairs, tmp_path):
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    kind, options = (SFTTrainer, SFTConfig), {"optim": "sgd"}
    assert_same_steps(lambda: trained(make_trainer(kind, tiny_llama, rows, tmp_path, **options)))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_stock_kto(loss_type, tiny_llama, pairs, tmp_path):
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    kind, options = (KTOTrainer, KTOConfig), {"optim": "sgd", "loss_type": loss_type, "beta": 0.5}
    assert_same_steps(lambda: trained(make_trainer(kind, tiny_llama, rows, tmp_path, **options)))


def test_experimental_bema_dpo(tiny_llama, pairs, tmp_path):
    from trl.experimental.bema_for_ref_model import DPOTrainer

    kind = DPOTrainer, STOCK[1]
    assert_same_steps(lambda: trained(make_trainer(kind, tiny_llama, pairs, tmp_path, optim="sgd")))


def online(kind, directory, pairs, tmp_path, **options):
    """Two steps of a trainer that samples: the same tokens, as long as their logits agree."""
    trainer_class, config_class = kind
    sampling = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.8, "beta": 0.1}
    settings = DEFAULTS | CPU | sampling | {"per_device_train_batch_size": 4, "optim": "sgd"}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float(len(set(each))) for each in completions],
        args=config_class(str(tmp_path), **(settings | options)),
        train_dataset=as_dataset([{"prompt": pair["prompt"]} for pair in pairs]),
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    logs, state = trained(trainer)
    assert any(entry["reward_std"] > 0 for entry in logs)
    timed = {"step_time", "time"}
    return [{k: v for k, v in entry.items() if k not in timed} for entry in logs], state


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ((GRPOTrainer, GRPOConfig), {}),
        ((GRPOTrainer, GRPOConfig), {"top_entropy_quantile": 0.5, "num_iterations": 2}),
        ((RLOOTrainer, RLOOConfig), {}),
        ("gmpo", {}),
    ],
    ids=str,
)
def test_stock_trainers_that_sample(kind, options, tiny_llama, pairs, tmp_path):
    if kind == "gmpo":
        from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

        kind = GMPOTrainer, GMPOConfig
    assert_same_steps(lambda: online(kind, tiny_llama, pairs, tmp_path, **options))


def test_packed_labels_of_async_grpo(tiny_llama):
    """Its trainer needs a vLLM server; this is its call of the fused head, loss and gradients."""
    ids = torch.tensor([[5, 9, 7, 3, 8, 4, 6]])
    call = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        "shift_labels": torch.tensor([[-100, 7, -100, 8, 4, 6, -100]]),
        "fused_lm_head": True,
    }

    def run():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        out = model(**call)
        (out.log_probs.sum() + 0.3 * out.entropy.sum()).backward()
        return out, {name: p.grad for name, p in model.named_parameters()}

    plain, their_grads = run()
    with use_fastpref_logps():
        ours, grads = run()
    for name in ("log_probs", "entropy"):
        assert plain[name].any()
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-5)
    for name, grad in their_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


# --- the handle ---------------------------------------------------------------------------------


def test_use_fastpref_logps_is_undone():
    stock = trl_utils._ChunkedLogProbFunction
    handle = use_fastpref_logps()
    assert trl_utils._ChunkedLogProbFunction is not stock
    handle.undo()
    assert trl_utils._ChunkedLogProbFunction is stock
    handle.undo()
    with pytest.raises(KeyError), use_fastpref_logps():
        raise KeyError
    assert trl_utils._ChunkedLogProbFunction is stock


def test_entropy_keeps_its_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, requires_grad=True)
    weight = torch.randn(101, 16, requires_grad=True)
    targets = torch.randint(0, 101, (7,))
    arguments = (hidden, weight, None, targets, 1.3, 32, 5.0, 0.8)
    grads = []
    for apply in (trl_utils._ChunkedLogProbFunction.apply, _FastprefLogps.apply):
        logps, entropy, squares, mean, top1 = apply(*arguments)
        (logps.sum() + (entropy**2).sum()).backward()
        grads.append((hidden.grad, weight.grad, squares, mean, top1))
        hidden.grad = weight.grad = None
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


# --- what is looked up --------------------------------------------------------------------------


def test_another_signature_is_refused(monkeypatch):
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            return hidden

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(RuntimeError, match=r"with \(ctx, hidden, weight, targets\); install trl=="):
        use_fastpref_logps()
    assert trl_utils._ChunkedLogProbFunction is Changed
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction.* has it not: .*install trl=="):
        use_fastpref_logps()


def test_another_trainer_is_refused_when_asked_for(monkeypatch):
    """Only what needs it: the loss head and `use_fastpref_logps` go on."""

    def _compute_loss(self, model, inputs):
        return None

    monkeypatch.setattr(dpo_trainer.DPOTrainer, "_compute_loss", _compute_loss)
    for name in ("PreferenceTrainer", "PreferenceConfig"):
        with pytest.raises(RuntimeError, match=r"_compute_loss\(self, model, inputs, return_out"):
            getattr(fastpref.trl, name)
    use_fastpref_logps().undo()
    assert fastpref.trl.add_loss_head
    monkeypatch.undo()
    monkeypatch.delattr(dpo_trainer, "add_fused_lm_head")
    with pytest.raises(RuntimeError, match=f"TRL {trl.__version__} has it not"):
        fastpref.trl.PreferenceTrainer  # noqa: B018


def test_an_older_trl_is_refused(monkeypatch):
    """Its names may be the same, its metrics are others; log-probabilities are what they were."""
    monkeypatch.setattr(stock, "version", lambda name: "1.15.0")
    with pytest.raises(RuntimeError, match="TRL 1.15.0 is installed: install trl>=1.16"):
        fastpref.trl.PreferenceTrainer  # noqa: B018
    use_fastpref_logps().undo()
    monkeypatch.setattr(stock, "version", lambda name: "2.0.0")
    assert fastpref.trl.PreferenceTrainer is PreferenceTrainer


def test_no_trl_at_all(monkeypatch):
    def missing(name):
        raise stock.PackageNotFoundError(name)

    monkeypatch.setattr(stock, "version", missing)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RuntimeError, match="TRL is not installed: install trl>=1.16"):
        stock.stock("trl:DPOTrainer")


def test_more_parameters_are_welcome_where_we_only_call():
    assert stock.stock("random:Random.choices", "population k") is random.Random.choices
    with pytest.raises(RuntimeError, match="population, weights"):
        stock.stock("random:Random.choices", "self population", exactly=True)


def test_every_overridden_method_is_looked_up():
    """Methods of TRL's own that `PreferenceTrainer` replaces are all in the table."""
    parts = [each for each in PreferenceTrainer.__mro__ if each.__module__.startswith("fastpref.")]
    ours = {name for part in parts for name in vars(part) if not name.startswith("__")}
    theirs = {name for name in vars(dpo_trainer.DPOTrainer) if not name.startswith("__")}
    listed = {path.rpartition(".")[2] for path, _ in stock._OVERRIDDEN}
    assert ours & theirs - {"_tag_names"} == listed


def test_exports_are_what_they_say():
    assert all(getattr(fastpref.trl, name).__name__ == name for name in fastpref.trl.__all__)
    assert [*fastpref.trl._MODULES] == fastpref.trl.__all__
    with pytest.raises(AttributeError, match="no attribute 'PreferenceTrainr'"):
        fastpref.trl.PreferenceTrainr  # noqa: B018
