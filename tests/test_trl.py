"""`PreferenceTrainer` and `use_fastpref_logps` beside plain TRL."""

import copy
import dataclasses
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
)
from trl import DPOConfig, TrlParser
from trl_runs import (
    CPU,
    DEFAULTS,
    OURS,
    STOCK,
    TINY,
    compare_runs,
    make_trainer,
    save_model,
    trained,
)

from fastpref import Balance, Objective, UniDPO, sequence_logps, shift_targets
from fastpref.objectives import DPO, IPO, SFT, WPO, DiscoPOP, Divergence, Hinge, Robust, SimPO
from fastpref.trl import (
    PreferenceConfig,
    PreferenceTrainer,
    head_scalars,
    trl_objective,
)

# --- beside plain TRL ---------------------------------------------------------------------------


# Far enough in one step for margins to be seen; Adam would magnify the rounding of tiny gradients.
SGD = {"optim": "sgd", "learning_rate": 0.3, "beta": 0.5}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (PreferenceConfig, {}),
        (DPOConfig, {}),
        (PreferenceConfig, SGD | {"precompute_ref_log_probs": True}),
        (PreferenceConfig, SGD | {"gradient_accumulation_steps": 2}),
        (PreferenceConfig, SGD | {"gradient_checkpointing": True}),
        (PreferenceConfig, SGD | {"loss_type": "sft", "precompute_ref_log_probs": True}),
        (DPOConfig, SGD | {"loss_type": ["ipo", "sft"], "loss_weights": [2, 1], "ld_alpha": 0.3}),
        (
            DPOConfig,
            {
                "peft_config": LoraConfig(r=4, target_modules="all-linear"),
                "learning_rate": 0.1,
                "beta": 0.5,
            },
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_two_steps_equal_plain_trl(config, options, tiny_llama, pairs, tmp_path):
    """The same fields mean the same, whichever of the two configurations has them."""
    plain = make_trainer(STOCK, tiny_llama, pairs, tmp_path, **options)
    trainer = make_trainer((PreferenceTrainer, config), tiny_llama, pairs, tmp_path, **options)
    assert (trainer.ref_model is None) == (plain.ref_model is None)
    assert type(trainer.args) is config
    ours, theirs = trained(trainer), trained(plain)
    assert abs(ours[0][1]["rewards/margins"]) > 0.1
    # Adam divides by |gradient|: rounding of a tiny gradient is magnified up to the step's size.
    compare_runs(ours, theirs, relative=2e-4)


def test_a_script_with_two_names_swapped(tiny_llama, pairs, tmp_path):
    """Arguments by position, a reference for sft too, metrics of one's own, data sets by name."""

    def run(trainer_class, config_class):
        options = DEFAULTS | CPU | SGD | {"loss_type": "sft", "eval_strategy": "steps"}
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(tiny_llama),
            AutoModelForCausalLM.from_pretrained(tiny_llama),
            config_class(str(tmp_path), **options, eval_steps=2, precompute_ref_log_probs=True),
            None,
            Dataset.from_list(pairs),
            DatasetDict({"a": Dataset.from_list(pairs[:4]), "b": Dataset.from_list(pairs[4:6])}),
            AutoTokenizer.from_pretrained(tiny_llama),
            lambda seen: {"spread": float(seen.predictions.std())},
        )
        trainer.train()
        return [
            {name: x for name, x in entry.items() if "runtime" not in name and "second" not in name}
            for entry in trainer.state.log_history
        ]

    ours, theirs = run(*OURS), run(*STOCK)
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for name, value in their.items():
            assert our[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    (held,) = (entry for entry in theirs if "eval_b_loss" in entry)
    assert abs(held["eval_rewards/margins"]) > 0.1
    assert held["eval_b_spread"] > 0


@pytest.mark.parametrize(
    ("objective", "options"),
    [("dpo", {}), ("hinge", {"loss_type": ["hinge"]}), ("robust", {"loss_type": ["robust"]})],
)
def test_objectives_of_sums_log_what_trl_logs(objective, options, tiny_llama, pairs, tmp_path):
    args = {"objective": objective}
    if objective == "robust":
        options, args["objective_args"] = options | {"label_smoothing": 0.1}, {}
    theirs = trained(make_trainer(STOCK, tiny_llama, pairs, tmp_path, **options, optim="sgd"))
    ours = trained(make_trainer(OURS, tiny_llama, pairs, tmp_path, **args, optim="sgd"))
    compare_runs(ours, theirs, relative=2e-4)


def test_two_steps_equal_plain_trl_on_smollm2(smollm2, pairs, tmp_path):
    options = {"learning_rate": 1e-5, "optim": "sgd", "precompute_ref_log_probs": True}
    ours, theirs = (
        trained(make_trainer(kind, smollm2, pairs[:4], tmp_path, **options))
        for kind in (OURS, STOCK)
    )
    compare_runs(ours, theirs, relative=1e-4)


def test_two_steps_in_bf16(tiny_llama, pairs, tmp_path):
    """Under autocast both round operands to bf16, and TRL its logits as well."""
    ours, theirs = (
        trained(make_trainer(kind, tiny_llama, pairs, tmp_path, bf16=True, optim="sgd"))
        for kind in (OURS, STOCK)
    )
    compare_runs(ours, theirs, relative=2**-5, but=["rewards/accuracies"])
    assert all(parameter.dtype == torch.float32 for parameter in ours[1].values())


def test_softcap_of_a_gemma(tmp_path, tiny_llama, pairs):
    torch.manual_seed(0)
    config = Gemma2Config(
        **TINY,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    model = save_model(Gemma2ForCausalLM(config), tiny_llama, tmp_path / "gemma")
    ours, theirs = (
        trained(make_trainer(kind, model, pairs, tmp_path, optim="sgd")) for kind in (OURS, STOCK)
    )
    compare_runs(ours, theirs, relative=2e-4)


def test_router_loss_of_a_mixture_of_experts(tmp_path, tiny_llama, pairs):
    torch.manual_seed(0)
    config = MixtralConfig(
        **TINY,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    model = save_model(MixtralForCausalLM(config), tiny_llama, tmp_path / "mixtral")
    ours, theirs = (
        trained(make_trainer(kind, model, pairs, tmp_path, optim="sgd")) for kind in (OURS, STOCK)
    )
    assert "aux_loss" in ours[0][0]
    compare_runs(ours, theirs, relative=2e-4)


# --- what TRL has not ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["unidpo", "adadpo", "simpo", "rdpo", "cpo", "orpo"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_objective_trains_and_evaluates(objective, lora, tiny_llama, pairs, tmp_path):
    trainer = make_trainer(
        OURS,
        tiny_llama,
        pairs,
        tmp_path,
        eval_pairs=pairs[:4],
        max_steps=6,
        objective=objective,
        objective_args={"balance": {"ceiling": 4.0}},
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    assert trainer.objective.balance == Balance(ceiling=4.0)
    before = trainer.evaluate()
    logs, _ = trained(trainer)
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert {"entropy", "mean_token_accuracy", "logits/chosen", "balance/clipped"} <= logs[0].keys()
    assert ("weights/quality" in logs[0]) == (objective == "unidpo")
    assert (trainer.ref_model is None) == (lora or not trainer.objective.needs_reference)


def test_scores_reach_the_objective(tiny_llama, pairs, tmp_path):
    """Over one epoch the mean quality weight is what the scores of all pairs say."""
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, objective="unidpo", max_steps=4)
    logs, _ = trained(trainer)
    gaps = torch.tensor([pair["score_chosen"] - pair["score_rejected"] for pair in pairs])
    mean = sum(entry["weights/quality"] for entry in logs) / len(logs)
    assert mean == pytest.approx(torch.sigmoid(0.7 * gaps).mean().item(), rel=1e-5)


def test_scores_are_missed_before_training(tiny_llama, pairs, tmp_path):
    unscored = [{k: v for k, v in pair.items() if "score" not in k} for pair in pairs]
    with pytest.raises(ValueError, match="UniDPO needs the columns score_chosen"):
        make_trainer(OURS, tiny_llama, unscored, tmp_path, objective="unidpo")


def test_objective_of_ones_own(tiny_llama, pairs, tmp_path):
    class Exponential(Objective):
        def __call__(self, pairs):
            chosen, rejected = pairs.log_ratios(normalized=False)
            return torch.exp(-0.1 * (chosen - rejected))

    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, own_objective=Exponential())
    logs, _ = trained(trainer)
    assert logs[0]["loss"] == pytest.approx(1.0, abs=1e-5)  # the policy is its reference
    assert logs[1]["loss"] != logs[0]["loss"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_equals_an_uninterrupted_run(lora, tiny_llama, pairs, tmp_path):
    def trainer(output, steps):
        return make_trainer(
            OURS,
            tiny_llama,
            pairs,
            tmp_path / output,
            objective="unidpo",
            precompute_ref_log_probs=True,
            lr_scheduler_type="constant",
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        )

    _, expected = trained(trainer("whole", 4))
    trained(trainer("parts", 2))
    resumed = trainer("parts", 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name


def test_reference_log_probabilities_are_exact(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    found = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        targets = shift_targets(batch["input_ids"], batch["completion_mask"])
        expected, _ = sequence_logps(hidden, model.lm_head.weight, targets)
    assert torch.equal(found.float(), expected)


# --- configuration ------------------------------------------------------------------------------


def test_configuration_names_the_objective(tmp_path):
    config = PreferenceConfig(
        str(tmp_path),
        objective="Uni-DPO",
        objective_args='{"eta": 0.5, "balance": {"ceiling": 3}}',
        beta=1.5,
        **CPU,
    )
    assert config.make_objective() == UniDPO(beta=1.5, eta=0.5, balance=Balance(ceiling=3))
    again = PreferenceConfig(str(tmp_path), objective="orpo", **CPU)
    assert again.beta == 0.1  # what the logged rewards are scaled by
    json.dumps(config.to_dict())


def test_another_objective_has_its_own_beta(tmp_path):
    simpo = PreferenceConfig(str(tmp_path), objective="simpo", **CPU)
    assert simpo.beta == 2.0
    dpo = dataclasses.replace(simpo, objective="dpo")
    assert dpo.beta == dpo.make_objective().beta == 0.1
    given = PreferenceConfig(str(tmp_path), objective="simpo", beta=2.0, **CPU)
    assert dataclasses.replace(given, objective="dpo").make_objective().beta == 2.0
    with pytest.raises(ValueError, match=r"beta=2\.0 was given, but ORPO"):
        dataclasses.replace(given, objective="orpo")
    by_name = PreferenceConfig(str(tmp_path), objective="dpo", objective_args={"beta": 0.3}, **CPU)
    assert by_name.beta == 0.3
    changed = copy.deepcopy(by_name)
    changed.objective_args = None
    assert changed.make_objective().beta == 0.1
    of_trl = dataclasses.replace(simpo, objective=None)
    assert of_trl.beta == 0.1
    assert of_trl.make_objective() == DPO()
    for config in (by_name, of_trl, dataclasses.replace(simpo, objective="orpo")):
        stored = json.loads(config.to_json_string())
        stored["accelerator_config"] = None
        assert PreferenceConfig(**stored).make_objective() == config.make_objective()


def test_fields_of_trl_name_the_objective(tmp_path):
    def objective(**options):
        config = PreferenceConfig(str(tmp_path), **CPU, bf16=False, **options)
        assert repr(trl_objective(DPOConfig(str(tmp_path), **CPU, **options))) == repr(
            config.make_objective()
        )
        assert config.beta == config.make_objective().reward_scale == options.get("beta", 0.1)
        return config.make_objective()

    assert objective(beta=0.3, label_smoothing=0.2) == DPO(beta=0.3)  # TRL's sigmoid has no noise
    assert objective(loss_type="robust", label_smoothing=0.2) == Robust(label_smoothing=0.2)
    ((ipo, weight),) = objective(loss_type=["ipo"], loss_weights=[0.5], beta=0.2).terms
    assert (ipo, weight) == (IPO(beta=0.2), 0.5)
    js = objective(f_divergence_type="js_divergence", loss_type=["sigmoid_norm", "sft"])
    assert js.parts == (DPO(length_normalized=True, divergence=Divergence("js")), SFT())
    ((weighted, _),) = objective(use_weighting=True, loss_type="discopop", discopop_tau=0.1).terms
    assert weighted == WPO(DiscoPOP(tau=0.1))


def test_fields_on_a_command_line(tmp_path):
    def parsed(*arguments):
        (config,) = TrlParser(PreferenceConfig).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", *arguments]
        )
        return config.make_objective()

    assert parsed() == DPO()
    assert parsed("--loss_type", "hinge", "sft").parts == (Hinge(), SFT())
    fields = "--objective_args", '{"eta": 0.5, "balance": {"ceiling": 3}}'
    expected = UniDPO(eta=0.5, balance=Balance(ceiling=3))
    assert parsed("--objective", "unidpo", *fields) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "unknown objective"),
        ({"objective": "dpo", "objective_args": {"eta": 1}}, "DPO has no hyperparameter 'eta'"),
        ({"objective_args": {"eta": 1}}, "objective_args={'eta': 1} need an objective by its name"),
        ({"objective": "orpo", "beta": 0.3}, r"beta=0.3 was given, but ORPO.* by 0.1"),
        (
            {"objective": "dpo", "beta": 0.2, "objective_args": {"beta": 0.3}},
            r"beta=0.2 was given, .* by 0.3",
        ),
        ({"schedule": "fast"}, "unknown schedule"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"loss_type": "kto"}, "unknown loss_type 'kto'; expected some of .*'sigmoid_norm'"),
        ({"loss_type": []}, "a Mixture needs at least one"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be finite and above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing must be .* below 0.5"),
        ({"loss_weights": [float("nan")]}, "weight must be finite, got nan"),
        ({"beta": 0}, "beta must be finite and above 0"),
        ({"discopop_tau": 0.0, "loss_type": "discopop"}, "tau must be finite and above 0"),
        ({"f_divergence_type": "js"}, "unknown f_divergence_type 'js'; .*'js_divergence'"),
        (
            {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "nca_pair"]},
            "loss_type 'nca_pair' has no form for f_divergence_type='js_divergence'; .*'hinge'",
        ),
        ({"loss_type": "aot", "use_weighting": True}, "loss_type 'aot' sorts"),
        ({"loss_type": "sft", "use_weighting": True}, "'sft' is one number of all chosen tokens"),
    ],
)
def test_bad_configuration(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(str(tmp_path), **CPU, **options)


@pytest.mark.parametrize(
    "field",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": "sigmoid", "loss_weights": [0.5]},
        {"f_divergence_type": "js_divergence"},
        {"f_alpha_divergence_coef": 0.7},
        {"label_smoothing": 0.1},
        {"use_weighting": True},
        {"discopop_tau": 0.1},
    ],
    ids=str,
)
def test_an_objective_and_a_loss_of_trl(field, tiny_llama, pairs, tmp_path):
    *_, name = field
    with pytest.raises(
        ValueError, match=f"^{name}=.* chooses a loss of TRL's, and objective='dpo'"
    ):
        PreferenceConfig(str(tmp_path), **CPU, objective="dpo", **field)
    with pytest.raises(
        ValueError, match=f"^{name}=.* chooses a loss of TRL's, and objective=SimPO"
    ):
        make_trainer(OURS, tiny_llama, pairs, tmp_path, own_objective=SimPO(), **field)


def test_an_objective_twice(tiny_llama, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"objective=SimPO.* is given, and args has 'dpo'"):
        make_trainer(OURS, tiny_llama, pairs, tmp_path, own_objective=SimPO(), objective="dpo")
    for config in (PreferenceConfig, DPOConfig):
        kind = PreferenceTrainer, config
        with pytest.raises(ValueError, match=r"beta=0.3 was given, but SimPO.* by 2.0"):
            make_trainer(kind, tiny_llama, pairs, tmp_path, own_objective=SimPO(), beta=0.3)
        trainer = make_trainer(kind, tiny_llama, pairs, tmp_path, own_objective=SimPO())
        assert (trainer.beta, trainer.ref_model) == (2.0, None)


def test_what_is_no_dpo_config(tiny_llama, pairs, tmp_path):
    with pytest.raises(TypeError, match="args must be a DPOConfig, got TrainingArguments"):
        make_trainer((PreferenceTrainer, TrainingArguments), tiny_llama, pairs, tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"softcap": None, "logit_scale": 1.0}),
        ({"final_logit_softcapping": 30.0}, {"softcap": 30.0, "logit_scale": 1.0}),
        ({"logit_scale": 0.0625}, {"softcap": None, "logit_scale": 0.0625}),
        ({"lm_head_multiplier": 0.5}, {"softcap": None, "logit_scale": 0.5}),
        ({"logits_scaling": 8.0}, {"softcap": None, "logit_scale": 0.125}),
    ],
)
def test_head_scalars(fields, expected):
    assert head_scalars(LlamaConfig(**fields)) == expected
