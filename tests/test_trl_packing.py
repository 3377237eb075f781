"""Packed batches: loss, gradients and metrics are the padded ones, and no sequence sees another."""

import json

import pytest
import torch
from accelerate import ParallelismConfig
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from trl import DPOConfig
from trl_runs import CPU, OURS, TINY, compare_runs, make_trainer, save_model, trained
from typer.testing import CliRunner

from fastpref import PlackettLuce, preference_loss, shift_targets
from fastpref.commands.cli import app
from fastpref.commands.plan import token_lengths, trunk_tokens
from fastpref.trl import PreferenceConfig, PreferenceTrainer
from fastpref.trl.head import backbone_of
from fastpref.trl.packing import BY_PIECE, Packing, prepare_packing, scored_places

PADDING_FREE, SHARED = {"padding_free": True}, {"share_prompt": True}
PACKED = pytest.mark.parametrize("packed", [PADDING_FREE, SHARED], ids=["free", "shared"])
SGD = {"optim": "sgd", "learning_rate": 0.3, "beta": 0.5}
# Of float64: the same numbers are added up, fewer than 2¹² of them, in another order.
DOUBLE = 2**12 * 2**-53


# --- the trainer --------------------------------------------------------------------------------


def losses_and_gradients(trainer, rows=range(5)):
    """Loss, metrics and gradients of a batch, away from the reference."""
    torch.manual_seed(0)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return metrics | {"loss": loss.item()}, [parameter.grad for parameter in trained]


def assert_equal(ours, theirs, relative):
    (our_metrics, our_grads), (their_metrics, their_grads) = ours, theirs
    assert abs(their_metrics["rewards/margins"]) > 0.01
    # What the trainer logs, it gathers in float32.
    logged = max(relative, 2**-22)
    assert our_metrics == pytest.approx(their_metrics, rel=logged, abs=logged)
    assert our_metrics["loss"] == pytest.approx(their_metrics["loss"], rel=relative)
    assert any(gradient.abs().max() > 0 for gradient in their_grads)
    for ours, expected in zip(our_grads, their_grads, strict=True):
        assert (ours - expected).abs().max() <= relative * max(1, expected.abs().max())


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_llama, tmp_path_factory):
    """Float64 throughout, where Llama's norms and rotations are float32 whatever the model is."""
    return {
        tied: save_model(
            tiny("gpt2", "sdpa", **GPT2, tie_word_embeddings=tied),
            tiny_llama,
            tmp_path_factory.mktemp("gpt2"),
        )
        for tied in (False, True)
    }


@PACKED
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["ipo", "sft"], "loss_weights": [2, 1], "ld_alpha": 0.3},
        {"tied": True, "precompute_ref_log_probs": True},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
        {"objective": "unidpo", "gradient_checkpointing": True},
        {"max_length": 9, "truncation_mode": "keep_end"},
    ],
    ids="-".join,
)
def test_a_step_is_the_padded_one_in_float64(packed, options, tiny_gpt2, pairs, tmp_path):
    options = dict(options)
    directory = tiny_gpt2[options.pop("tied", False)]

    def step(**more):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        return losses_and_gradients(
            make_trainer(OURS, directory, pairs, tmp_path, model=model, **options, **more)
        )

    assert_equal(step(**packed), step(), DOUBLE)


@PACKED
@pytest.mark.parametrize(
    ("options", "relative"),
    [
        ({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 2**-5),  # as beside TRL
    ],
    ids=["float32", "bf16"],
)
def test_two_steps_are_the_padded_ones(packed, options, relative, tiny_llama, pairs, tmp_path):
    ours, theirs = (
        trained(make_trainer(OURS, tiny_llama, pairs, tmp_path, **SGD, **options, **more))
        for more in (packed, {})
    )
    compare_runs(ours, theirs, relative=relative, but=["rewards/accuracies"])


@PACKED
def test_router_loss_counts_every_token_as_often(packed, tiny_llama, pairs, tmp_path):
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    model = MixtralForCausalLM(MixtralConfig(**TINY, **more, initializer_range=0.3))
    directory = save_model(model, tiny_llama, tmp_path / "mixtral")

    def step(**options):
        return losses_and_gradients(make_trainer(OURS, directory, pairs, tmp_path, **options))

    ours, theirs = step(**packed), step()
    assert "aux_loss" in ours[0]
    assert_equal(ours, theirs, relative=1e-5)


@PACKED
def test_an_evaluation_is_the_padded_one(packed, tiny_llama, pairs, tmp_path, monkeypatch):
    def evaluated(**more):
        trainer = make_trainer(
            OURS, tiny_llama, pairs, tmp_path, eval_pairs=pairs[:5], objective="unidpo", **more
        )
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)
        found = trainer.evaluate()
        # Of a batch that was filled up, the first two pairs count.
        monkeypatch.setattr(trainer, "_first_time", lambda pairs: 2)
        batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1, 5)])
        with torch.no_grad():
            found["filled"] = trainer.compute_loss(trainer.model.eval(), batch).item()
        predictions = trainer.predict(trainer.eval_dataset).predictions
        return {
            n: x for n, x in found.items() if "time" not in n and "second" not in n
        }, predictions

    (ours, our_predictions), (theirs, their_predictions) = evaluated(**packed), evaluated()
    assert abs(theirs["eval_rewards/margins"]) > 0.01
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert our_predictions.shape == their_predictions.shape


def test_padding_free_of_trl_itself(tiny_llama, pairs, tmp_path, caplog):
    """A plain DPOConfig has it too, and TRL does not say that it pads."""
    kind = PreferenceTrainer, DPOConfig
    trainer = make_trainer(kind, tiny_llama, pairs, tmp_path, **PADDING_FREE)
    assert trainer.args.padding_free
    assert "unavailable" not in caplog.text
    rows = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trained(trainer)
    assert len(rows) == 2
    assert all(shape[0] == 1 for shape in rows)


def test_a_saved_model_has_its_own_attention(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **SHARED)
    assert trainer.model.config._attn_implementation == BY_PIECE
    trainer.save_model(str(tmp_path / "saved"))
    assert BY_PIECE not in (tmp_path / "saved" / "config.json").read_text()
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for mask in (None, ids.ne(0).long()):
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids, attention_mask=mask).logits for model in (trainer.model, stock)
            )
        assert torch.equal(ours, theirs)


def test_auto_shares_where_it_pays(tiny_llama, pairs, tmp_path):
    long = {"prompt": "why is the sea blue", "chosen": "the sea", "rejected": "a ship"}
    short = {"prompt": "why", "chosen": "the sun " * 8, "rejected": "a ship " * 8}
    trainer = make_trainer(OURS, tiny_llama, [long, short], tmp_path, share_prompt="auto")
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["packing"].pieces.lengths == (4, 3, 3, 17, 17)
    assert batch["packing"].pieces.continued == (None, 0, 0, None, None)


# --- how a batch is packed ----------------------------------------------------------------------


def test_a_row_by_hand():
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [1, 2, 6, 7], [4, 8, 0, 0]])
    completion = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]])
    packing = Packing.of(ids, ids.ne(0), completion, share=True)
    assert ids.flatten()[packing.tokens].tolist() == [1, 2, 3, 6, 7, 4, 5, 8]
    assert packing.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 1]
    assert packing.pieces.lengths == (2, 1, 2, 1, 1, 1)
    assert packing.pieces.continued == (None, 0, 0, None, 3, 3)
    assert packing.uses.tolist() == [2, 2, 1, 1, 1, 2, 1, 1]


@st.composite
def batches(draw):
    """Padded batches on either side, any part empty, responses that begin alike; K."""
    responses, prompts = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    some = st.lists(st.integers(1, 3), max_size=4)
    common = [draw(some) for _ in range(prompts)] * responses
    ends = [draw(some) for _ in common]
    if not any(map(len, common + ends)):
        ends[0] = [1]
    cut = draw(st.integers(0, 1))  # as keep_end cuts the longest ones
    sequences = [(p + e, [0] * len(p) + [1] * len(e)) for p, e in zip(common, ends, strict=True)]
    longest = max(1, max(len(tokens) for tokens, _ in sequences) - cut)
    sequences = [(tokens[-longest:], mask[-longest:]) for tokens, mask in sequences]
    left = draw(st.booleans())

    def padded(values):
        fill = [0] * (longest - len(values))
        return fill + values if left else values + fill

    ids, completion = (
        torch.tensor([padded(x) for x in column]) for column in zip(*sequences, strict=True)
    )
    return ids, ids.ne(0).long(), completion, responses


@given(batches(), st.sampled_from([False, True, "auto"]))
def test_every_sequence_is_in_the_row(batch, share):
    ids, real, completion, responses = batch
    packing = Packing.of(ids, real, completion, share=share, responses=responses)
    pieces = packing.pieces
    assert sum(pieces.lengths) == len(packing.tokens) and min(pieces.lengths) > 0
    assert packing.uses.sum() == real.sum()
    owner = torch.arange(len(pieces.lengths)).repeat_interleave(torch.tensor(pieces.lengths))
    assert (torch.bincount(packing.tokens) <= 1).all()
    for sequence in range(len(ids)):
        mask = real[sequence].bool()
        rows = packing.row_of[sequence][mask]
        assert torch.equal(ids.flatten()[packing.tokens[rows]], ids[sequence][mask])
        assert packing.positions[rows].tolist() == list(range(len(rows)))
        parts = owner[rows].unique_consecutive().tolist()
        assert len(parts) <= 2
        if len(parts) == 2:
            assert pieces.continued[parts[1]] == parts[0]
    assert bool(share) or not pieces.shared


@pytest.mark.parametrize("share", [False, True])
def test_ranked_responses_share_a_prompt(share):
    """Of K = 3, one of them empty: the loss of the row is that of the padded batch."""
    torch.manual_seed(0)
    model = tiny("gpt2", "sdpa", **GPT2)
    prompts, lengths = [4, 2], [[3, 5], [1, 2], [0, 4]]
    ids, real, completion = example(prompts, lengths)
    objective, scores = PlackettLuce(beta=0.1), torch.randn(6, dtype=torch.float64)
    constants = {"ref_logps": -torch.rand(6, dtype=torch.float64), "scores": scores, "responses": 3}
    head, targets = model.lm_head.weight, shift_targets(ids, completion)
    hidden = model.base_model(ids, attention_mask=real).last_hidden_state
    expected = preference_loss(hidden, head, targets, objective, **constants).loss
    prepare_packing(model, share=share)
    packing = Packing.of(ids, real, completion, share=share, responses=3)
    assert packing.pieces.shared == share
    row = model.base_model(**packing.model_inputs(ids, model)).last_hidden_state
    places, cu_seqlens = scored_places(targets)
    rows = packing.hidden_of(row, packing.row_of.flatten()[places])
    loss = preference_loss(
        rows, head, targets.flatten()[places], objective, cu_seqlens=cu_seqlens, **constants
    ).loss
    for value, theirs in zip(gradients(loss, model), gradients(expected, model), strict=True):
        assert (value - theirs).abs().max() <= DOUBLE


# --- what sees what -----------------------------------------------------------------------------

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
FAMILIES = {
    "llama": ({}, "sdpa"),
    "mistral": ({"sliding_window": 3}, "sdpa"),
    "gemma2": ({"head_dim": 8, **WINDOW}, "eager"),
    "gemma3_text": ({"head_dim": 8, **WINDOW}, "sdpa"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "eager"),
    "gpt2": (GPT2, "sdpa"),
    "qwen2_moe": (
        {"sliding_window": 3, "use_sliding_window": True, "num_experts": 4, **EXPERTS},
        "sdpa",
    ),
    "llama4_text": (
        {
            "num_local_experts": 2,
            "attention_chunk_size": 3,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attn_temperature_tuning": False,
        },
        "sdpa",
    ),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8, **WINDOW}, "eager"),
}


def tiny(family, attention, **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**TINY | {"initializer_range": 0.3} | more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval().to(
        torch.float32 if any("experts" in name for name in more) else torch.float64
    )


def example(prompts, lengths):
    """Random tokens of responses `lengths[k][b]` after `prompts[b]`: ids, mask, completions."""
    draw = torch.Generator().manual_seed(0)
    heads = [torch.randint(3, 60, (length,), generator=draw) for length in prompts]
    rows = [
        torch.cat([heads[b], torch.randint(3, 60, (length,), generator=draw)])
        for of_response in lengths
        for b, length in enumerate(of_response)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    position = torch.arange(ids.shape[1])
    return (
        ids,
        ids.ne(0).long(),
        (ids.ne(0) & (position >= torch.tensor(prompts * len(lengths))[:, None])).long(),
    )


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss, *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("share", [False, True], ids=["free", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_sees_itself_alone(family, share):
    more, attention = FAMILIES[family]
    model = tiny(family, attention, **more)
    backbone = backbone_of(model)
    ids, real, completion = example([5, 3], [[6, 4], [2, 7]])
    with torch.no_grad():
        alone = [
            backbone(row[mask.bool()][None], use_cache=False).last_hidden_state[0]
            for row, mask in zip(ids, real, strict=True)
        ]
        prepare_packing(model, share=share)

        def packed(ids):
            packing = Packing.of(ids, real, completion, share=share)
            assert packing.pieces.shared == share
            row = backbone(**packing.model_inputs(ids, model), use_cache=False)
            return [
                packing.hidden_of(row.last_hidden_state, rows[mask.bool()])
                for rows, mask in zip(packing.row_of, real, strict=True)
            ]

        found = packed(ids)
        changed = torch.where(completion.bool(), 63 - ids, ids)
        changed[2:] = ids[2:]  # the chosen responses are others
        after = packed(changed)
    for ours, expected in zip(found, alone, strict=True):
        # Rotations, norms and softmax are float32 in some families, whatever the model is.
        assert (ours - expected).norm() <= 1e-5 * expected.norm()
    for rejected in (2, 3):
        assert (after[rejected] - found[rejected]).norm() <= 1e-5 * found[rejected].norm()
        assert (after[rejected - 2] - found[rejected - 2]).norm() > 0.1 * found[rejected].norm()


def test_flash_attention_is_told_the_sequences(monkeypatch):
    """By the arguments of its variable-length kernels, which stand in for a mask."""
    seen = []

    def varlen(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        if kwargs.get("cu_seq_lens_q") is None:
            return sdpa_attention_forward(module, query, key, value, None)
        seen.append(kwargs)
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        parts = (x.split(lengths, dim=2) for x in (query, key, value))
        outputs = [
            sdpa_attention_forward(module, *each, None)[0] for each in zip(*parts, strict=True)
        ]
        return torch.cat(outputs, 1), None

    name = "flash_attention_2"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, varlen)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    model = tiny("llama", "sdpa").float()
    model.config._attn_implementation_internal = name
    prepare_packing(model, share=False)
    ids, real, completion = example([5, 3], [[6, 4], [2, 7]])
    packing = Packing.of(ids, real, completion)
    inputs = packing.model_inputs(ids, model)
    seen.clear()
    model.base_model(**inputs)
    assert seen[0]["cu_seq_lens_q"].dtype == torch.int32
    assert (
        seen[0]["cu_seq_lens_q"].tolist()
        == seen[0]["cu_seq_lens_k"].tolist()
        == [0, 11, 18, 25, 35]
    )
    assert seen[0]["max_length_q"] == seen[0]["max_length_k"] == 11
    assert inputs["position_ids"].tolist() == [[*range(11), *range(7), *range(7), *range(10)]]
    with pytest.raises(ValueError, match="flash_attention_2 takes none; load the model with"):
        prepare_packing(model, share=True)


# --- what cannot be packed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_prompt": "yes"}, "share_prompt must be True, False or 'auto', got 'yes'"),
        ({"share_prompt": 1}, "share_prompt must be True, False or 'auto', got 1"),
        ({"share_prompt": None}, "share_prompt must be True, False or 'auto', got None"),
        ({"padding_free": "yes"}, "padding_free must be True or False, got 'yes'"),
        ({"pad_to_multiple_of": 8, "share_prompt": "auto"}, "share_prompt='auto' packs rows"),
        ({"pad_to_multiple_of": 8, **PADDING_FREE}, "padding_free=True .* pad_to_multiple_of=8"),
        ({"pad_to_multiple_of": 8, **SHARED}, "share_prompt=True .* pad_to_multiple_of=8"),
    ],
    ids=str,
)
def test_bad_configuration(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(str(tmp_path), **CPU, **options)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("auto", "auto")])
def test_a_command_line_says_it_in_words(text, value, tmp_path):
    config = PreferenceConfig(str(tmp_path), **CPU, share_prompt=text)
    assert config.share_prompt is value or config.share_prompt == value == "auto"
    assert json.loads(config.to_json_string())["share_prompt"] == value


@PACKED
@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_family_that_cannot_is_refused(packed, family):
    """A state runs on from one sequence into the next; positions that nobody can restart."""
    model = tiny(family, "eager", **({"n_head": 4, "n_layer": 2} if family == "bloom" else {}))
    share = packed is SHARED
    option = "share_prompt" if share else "padding_free"
    with pytest.raises(ValueError, match=f"^{option} cannot be had with .*model type '{family}'"):
        prepare_packing(model, share=share)


def test_an_encoder_is_refused():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=101, **sizes))
    with pytest.raises(ValueError, match="^padding_free needs a decoder alone, T5"):
        prepare_packing(model, share=False)


def test_what_few_tokens_do_not_show_is_refused():
    """Beyond some thousand tokens Llama 4's attention is told a token's place in the row."""
    model = tiny(
        "llama4_text", "sdpa", **FAMILIES["llama4_text"][0] | {"attn_temperature_tuning": True}
    )
    with pytest.raises(ValueError, match="in long rows its attn_temperature_tuning looks beyond"):
        prepare_packing(model, share=False)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("mistral", BY_PIECE),
        ("gemma3_text", BY_PIECE),
        ("qwen2_moe", "sdpa"),
        ("llama4_text", "sdpa"),
    ],
)
def test_attention_goes_by_piece_where_layers_say_their_windows(family, implementation):
    model = tiny(family, "sdpa", **FAMILIES[family][0])
    prepare_packing(model, share=True)
    assert model.config._attn_implementation == implementation


@PACKED
def test_virtual_tokens_are_refused(packed, tiny_llama, pairs, tmp_path):
    adapter = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="cannot train a PromptTuningConfig: its virtual"):
        make_trainer(OURS, tiny_llama, pairs, tmp_path, peft_config=adapter, **packed)


def test_images_are_refused(tiny_llama, pairs, tmp_path, monkeypatch):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **SHARED)
    trainer._is_vision_dataset = True
    with pytest.raises(ValueError, match="share_prompt packs tokens, and the data set has images"):
        trainer._prepare_packing(trainer.model)


def test_a_cut_across_a_row_is_refused(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **PADDING_FREE)
    trainer.accelerator.state.parallelism_config = ParallelismConfig(cp_size=2)
    try:
        with pytest.raises(ValueError, match="padding_free packs a row that context parallelism"):
            trainer._prepare_packing(trainer.model)
    finally:
        trainer.accelerator.state.parallelism_config = None


def test_auto_pads_what_cannot_be_packed(tiny_llama, pairs, tmp_path, caplog):
    directory = save_model(tiny("mamba", "eager").float(), tiny_llama, tmp_path / "mamba")
    trainer = make_trainer(OURS, directory, pairs, tmp_path, share_prompt="auto")
    assert (
        "share_prompt='auto' shares no prompts: share_prompt cannot be had with Mamba"
        in caplog.text
    )
    assert "packing" not in trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(ValueError, match="^padding_free cannot be had with Mamba"):
        make_trainer(OURS, directory, pairs, tmp_path, share_prompt="auto", **PADDING_FREE)


def test_auto_leaves_an_attention_to_all_pairs_padded(tiny_llama, pairs, tmp_path, caplog):
    eager = {"model_init_kwargs": {"attn_implementation": "eager"}}
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, share_prompt="auto", **eager)
    assert "shares no prompts: eager attention would look at all pairs" in caplog.text
    assert "packing" not in trainer.data_collator([trainer.train_dataset[0]])


def test_weights_that_are_not_here_yet_are_not_tried(caplog):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**TINY))
    prepare_packing(model, share=True)
    assert "could not try it on packed sequences (RuntimeError: its weights" in caplog.text


# --- the command --------------------------------------------------------------------------------


def test_the_command_packs(tiny_llama, pairs_file, tmp_path):
    def results(name, *options):
        arguments = [
            "train",
            "--model",
            tiny_llama,
            "--data",
            pairs_file,
            "--output",
            tmp_path / name,
        ]
        arguments += ["--max-steps", "2", "--learning-rate", "0.01", "--objective", "dpo"]
        result = CliRunner().invoke(app, [*map(str, arguments), *options])
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / name / "results.json").read_text())

    ours = results("packed", "--padding-free", "--share-prompt", "true")
    theirs = results("padded")
    assert ours["settings"]["padding_free"] and ours["settings"]["share_prompt"] == "true"
    assert ours["after"] == pytest.approx(theirs["after"], rel=1e-4, abs=1e-5)


def test_the_plan_counts_what_is_saved(tiny_llama, pairs_file, pairs, tmp_path):
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = [tuple(len(row[name]) for name in names) for row in trainer.train_dataset]
    assert token_lengths(str(tiny_llama), pairs_file) == lengths
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    found = trunk_tokens(lengths[:4], 4)
    assert found["padded"] == batch["input_ids"].numel()
    for name, share in (("padding_free", False), ("share_prompt", True)):
        arguments = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        assert found[name] == len(Packing.of(*arguments, share=share).tokens)
    arguments = ["plan", "--model", tiny_llama, "--data", pairs_file, "--pairs", "4"]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    for name, count in trunk_tokens(lengths, 4).items():
        lines = result.output.splitlines()
        assert any(name in line and f" {count:,} " in line for line in lines), name
    result = CliRunner().invoke(app, [*map(str, arguments[:3]), "--data", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "none" in result.stderr
