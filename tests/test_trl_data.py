"""What the trainer asks of data sets and references: no more than the objective needs."""

import math
import pickle

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl_runs import CPU, DEFAULTS, OURS, TINY, make_trainer, trained

from fastpref import Objective
from fastpref.trl import PreferenceConfig, PreferenceTrainer


def with_scores(pairs, chosen, rejected=1.0):
    return [pair | {"score_chosen": chosen, "score_rejected": rejected} for pair in pairs]


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [None, "good", [1.0, 2.0], math.nan], ids=str)
@pytest.mark.parametrize("keep_columns", [False, True])
def test_scores_that_nobody_needs_may_be_anything(score, keep_columns, tiny_llama, pairs, tmp_path):
    rows = with_scores(pairs, score)
    for row in rows[:4]:
        del row["score_rejected"]
    trainer = make_trainer(OURS, tiny_llama, rows, tmp_path, remove_unused_columns=not keep_columns)
    assert not next(iter(trainer.get_train_dataloader())).get("loss_columns")
    trained(trainer)


@pytest.mark.parametrize("score", [None, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["train", "eval", "named"])
def test_scores_that_are_needed_are_numbers(score, where, tiny_llama, pairs, tmp_path):
    bad = [dict(pair) for pair in pairs]
    bad[2]["score_chosen"] = bad[5]["score_rejected"] = score
    sets = {"pairs": bad} if where == "train" else {"pairs": pairs, "eval_pairs": bad}
    if where == "named":
        sets["eval_pairs"] = {"fine": pairs, "named": bad}
    message = f"{where} data set row 2 has score_chosen={score}; row 5 has score_rejected={score}$"
    with pytest.raises(ValueError, match=message):
        make_trainer(OURS, tiny_llama, **sets, tmp_path=tmp_path, objective="unidpo")


@pytest.mark.parametrize("score", ["9.5", [9.5], True], ids=str)
def test_scores_of_another_type(score, tiny_llama, pairs, tmp_path):
    with pytest.raises(ValueError, match="row 0 has score_chosen=.*row 4 has .* and 3 more"):
        make_trainer(OURS, tiny_llama, with_scores(pairs, score), tmp_path, objective="unidpo")


def test_scores_of_a_stream_are_checked_on_its_way(tiny_llama, pairs, tmp_path):
    rows = [dict(pair) for pair in pairs]
    rows[5]["score_chosen"] = None
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(OURS, tiny_llama, stream, tmp_path, objective="unidpo", max_steps=4)
    with pytest.raises(ValueError, match="train data set row 5 has score_chosen=None"):
        trainer.train()
    stream = Dataset.from_list(pairs).to_iterable_dataset()
    logs, _ = trained(make_trainer(OURS, tiny_llama, stream, tmp_path, objective="unidpo"))
    assert logs[1]["weights/quality"] > 0


def test_scores_of_data_sets_by_name(tiny_llama, pairs, tmp_path):
    sets = {"low": pairs[:3], "high": with_scores(pairs[3:6], 9.0, 0.0)}
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, eval_pairs=sets, objective="unidpo")
    high = trainer.evaluate({"high": trainer.eval_dataset["high"]})
    assert high["eval_weights/quality"] == pytest.approx(1 / (1 + math.exp(-0.7 * 9)), rel=1e-5)
    assert {"eval_low_loss", "eval_high_loss"} <= trainer.evaluate().keys()
    assert trainer.evaluate()["eval_high_loss"] == pytest.approx(high["eval_high_loss"], rel=1e-6)


def test_the_collator_is_still_trls(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, objective="unidpo", max_length=7)
    assert trainer.data_collator.max_length == 7
    trainer.data_collator.max_length = 5
    again = pickle.loads(pickle.dumps(trainer.data_collator))  # as workers get it
    assert again.max_length == 5
    batch = again([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert batch["input_ids"].shape[1] == 5
    assert batch["loss_columns"]["scores"].tolist() == [9.0, 8.0, 2.0, 4.0]
    with pytest.raises(AttributeError, match="max_size"):
        _ = trainer.data_collator.max_size


# --- weights, betas, extras ---------------------------------------------------------------------


class Scaled(Objective):
    """DPO of margins times what the data say."""

    extras = ("scale", "bonus")
    takes_betas = True

    def __call__(self, pairs):
        beta = 0.1 if pairs.betas is None else pairs.betas
        chosen, rejected = pairs.log_ratios(normalized=False)
        bonus_chosen, bonus_rejected = pairs.extras["bonus"]
        margin = beta * (chosen - rejected + bonus_chosen - bonus_rejected)
        return -torch.nn.functional.logsigmoid(pairs.extras["scale"] * margin)


@pytest.fixture(scope="module")
def with_columns(pairs):
    return [
        pair
        | {"weight": i % 3, "beta": 0.1 * (i + 1), "scale": -i, "note": "x"}
        | {"bonus_chosen": 10.0 * i, "bonus_rejected": -i, "scale_chosen": "not asked for"}
        for i, pair in enumerate(pairs)
    ]


def in_order(trainer):
    """The trainer's loss of its first four pairs."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


@pytest.mark.parametrize("kept", [False, True], ids=["unused columns removed", "kept"])
def test_columns_reach_the_loss(kept, tiny_llama, with_columns, tmp_path):
    """The policy is its reference: what is left of the margin is the bonus."""
    trainer = make_trainer(
        OURS,
        tiny_llama,
        with_columns,
        tmp_path,
        own_objective=Scaled(),
        remove_unused_columns=not kept,
        eval_pairs=with_columns[4:],
    )

    def expected(rows):
        margins = [r["scale"] * r["beta"] * (r["bonus_chosen"] - r["bonus_rejected"]) for r in rows]
        losses = [
            r["weight"] * math.log1p(math.exp(-m)) for r, m in zip(rows, margins, strict=True)
        ]
        return sum(losses) / len(rows)

    assert in_order(trainer) == pytest.approx(expected(with_columns[:4]), rel=1e-6)
    found = trainer.evaluate()["eval_loss"]  # by way of the data loader
    assert found == pytest.approx(expected(with_columns[4:]), rel=1e-6)


def test_columns_of_some_data_sets(tiny_llama, pairs, tmp_path):
    """Each has its own; a pair that has no weight counts for 1."""
    weighted = [pair | {"weight": 3.0} for pair in pairs]
    sets = {"weighted": weighted[:4], "plain": pairs[:4]}
    trainer = make_trainer(OURS, tiny_llama, weighted, tmp_path, objective="dpo", eval_pairs=sets)
    found = trainer.evaluate()
    assert found["eval_plain_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert found["eval_weighted_loss"] == pytest.approx(3 * math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("weight", -1.0, "weight finite and at least 0"),
        ("weight", None, "weight finite and at least 0"),
        ("weight", math.inf, "weight finite and at least 0"),
        ("beta", 0.0, "beta finite and above 0"),
        ("beta", math.nan, "beta finite and above 0"),
        ("scale", None, "scale finite"),
        ("bonus_rejected", math.nan, "bonus_rejected finite"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_columns_of_unusable_numbers(
    column, value, expected, stream, tiny_llama, with_columns, tmp_path
):
    rows = [dict(row) for row in with_columns]
    rows[3][column] = value
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if stream else data
    message = f"Scaled needs numbers: .*{expected}.* train data set row 3 has {column}={value}$"
    with pytest.raises(ValueError, match=message):
        make_trainer(OURS, tiny_llama, data, tmp_path, own_objective=Scaled(), max_steps=4).train()


def test_columns_that_the_objective_lacks_or_refuses(tiny_llama, pairs, with_columns, tmp_path):
    with pytest.raises(ValueError, match="Scaled needs a column scale, .* the train data set has"):
        make_trainer(OURS, tiny_llama, pairs, tmp_path, own_objective=Scaled())
    message = "ORPO takes no betas, and the eval data set has a column beta; remove or rename it"
    with pytest.raises(ValueError, match=message):
        make_trainer(OURS, tiny_llama, pairs, tmp_path, objective="orpo", eval_pairs=with_columns)


def test_losses_of_trl_take_no_columns(tiny_llama, pairs, tmp_path, caplog):
    """A stock script trains what it trained, and says what an objective would have taken."""
    rows = [pair | {"weight": "heavy", "beta": None} for pair in pairs]
    trainer = make_trainer(OURS, tiny_llama, rows, tmp_path)
    assert in_order(trainer) == pytest.approx(math.log(2), rel=1e-5)
    assert "the train data set has weight and beta, which TRL's loss types do not" in caplog.text


# --- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "simpo", None])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_configuration_stays_as_it_is_given(objective, precompute, tiny_llama, pairs, tmp_path):
    options = DEFAULTS | CPU | {"precompute_ref_log_probs": precompute}
    if objective is None:
        config = DPOConfig(str(tmp_path), **options, loss_type="ipo")
    else:
        config = PreferenceConfig(str(tmp_path), **options, objective=objective)
    before = config.to_dict()
    trainer = PreferenceTrainer(
        str(tiny_llama),
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    assert trainer.args is config
    assert config.to_dict() == before
    assert (trainer.ref_model is None) == (precompute or objective == "simpo")


def test_a_reference_that_nobody_needs_is_refused(tiny_llama, pairs, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for options in ({"ref_model": reference}, {"sync_ref_model": True}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is given, but SimPO has no reference"):
            make_trainer(OURS, tiny_llama, pairs, tmp_path, objective="simpo", **options)


def test_a_reference_that_follows(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(
        OURS,
        tiny_llama,
        pairs,
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    trained(trainer)
    for ours, theirs in zip(
        trainer.model.parameters(), trainer.ref_model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


# --- images -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_llava(tiny_llama, tmp_path_factory):
    """Directory of a random Llava over the tiny tokenizer, whose word "ship" is the image."""
    directory = tmp_path_factory.mktemp("tiny-llava")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["ship"]})
    image_token = tokenizer.convert_tokens_to_ids("ship")
    content = "{% if c.type == 'image' %}ship {% else %}{{ c.text }} {% endif %}"
    template = (
        "{% for m in messages %}{% for c in m.content %}" + content + "{% endfor %}{% endfor %}"
    )
    size = {"height": 28, "width": 28}
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="ship",
        chat_template=template,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TINY),
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(directory)
    return directory


def train_on_images(directory, tmp_path, *, score=5.0, eval_score=5.0, **options):
    def rows(score):
        image = Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8))
        turns = {"prompt": "why is the sea", "chosen": "the sea is blue", "rejected": "red"}
        role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {name: [{"role": role[name], "content": turns[name]}] for name in turns}
        return Dataset.from_list(with_scores([row | {"images": [image]}] * 2, score))

    trainer = PreferenceTrainer(
        str(directory),
        args=PreferenceConfig(str(tmp_path), **(DEFAULTS | CPU | options), max_length=None),
        train_dataset=rows(score),
        eval_dataset={"held": rows(eval_score)},
        processing_class=transformers.AutoProcessor.from_pretrained(directory),
    )
    return trainer, trained(trainer)[0]


@pytest.mark.parametrize("objective", ["dpo", "simpo", "cpo", "orpo", "unidpo"])
def test_images(objective, tiny_llava, tmp_path):
    trainer, logs = train_on_images(tiny_llava, tmp_path, objective=objective)
    assert (trainer.ref_model is None) == (not trainer.objective.needs_reference)
    assert logs[1]["loss"] < logs[0]["loss"]


def test_scores_of_images(tiny_llava, tmp_path):
    for name, bad in {"train": {"score": None}, "held": {"eval_score": None}}.items():
        with pytest.raises(ValueError, match=f"{name} data set row 0 has score_chosen=None"):
            train_on_images(tiny_llava, tmp_path, objective="unidpo", **bad)
