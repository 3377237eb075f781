"""The head's scalars are those of the model's own forward, or the model is refused."""

import copy

import pytest
import torch
import transformers
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl_runs import OURS, STOCK, TINY, compare_runs, make_trainer, trained

from fastpref.adapters import token_logps
from fastpref.sequences import shift_targets
from fastpref.trl import add_loss_head, use_fastpref_logps

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IDS = torch.tensor([[17, 42, 5, 61, 33]])
TARGETS = shift_targets(IDS, torch.ones_like(IDS))


def build(name, **fields):
    """A tiny model with logits large enough for a scale or a softcap to show."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**fields))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=3)
    return model.eval()


def text(name, **fields):
    return build(f"{name}ForCausalLM", **(TINY | fields))


def vision(name, text_config, vision_config="SiglipVisionConfig", **fields):
    text_config = getattr(transformers, text_config.pop("config"))(**(TINY | text_config))
    vision_config = getattr(transformers, vision_config)(**VISION)
    return build(
        f"{name}ForConditionalGeneration",
        text_config=text_config,
        vision_config=vision_config,
        **fields,
    )


def own_logps(model):
    logps = model(IDS, use_cache=False).logits.double().log_softmax(-1)
    return logps[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]


def head_logps(model):
    return token_logps(model, TARGETS, {"input_ids": IDS}).logps[:, :-1].double()


def assert_head_is_the_models_own(model):
    """Log-probabilities through the head are those of the logits, within rounding in fp32.

    Target and log-sum-exp err by at most H roundings of the largest logit each, before a softcap
    that only shrinks them: the largest product of row and hidden state bounds all.
    """
    expected = own_logps(model)
    add_loss_head(model)
    found = head_logps(model)
    head = model.get_output_embeddings()
    hidden = model(IDS, loss_head=lambda hidden, *_, **__: Seen(hidden)).loss
    largest = hidden.abs().max() * head.weight.abs().sum(1).max()
    assert (found - expected).abs().max() <= 2 * 2**-23 * largest
    assert found.std() > 1  # an untrained head's uniform guess would hide a wrong scale


class Seen:
    """A loss that gives the hidden states back."""

    losses = logps = lengths = metrics = None

    def __init__(self, hidden):
        self.loss = hidden


FAMILIES = {
    "llama": lambda: text("Llama"),
    "llama4": lambda: text("Llama4", head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
    "gemma2": lambda: text("Gemma2", head_dim=8, final_logit_softcapping=2.0),
    "gemma3": lambda: text("Gemma3", head_dim=8),
    "recurrent_gemma": lambda: text("RecurrentGemma", logits_soft_cap=2.0, num_hidden_layers=3),
    "cohere": lambda: text("Cohere", logit_scale=0.25),
    "granite": lambda: text("Granite", logits_scaling=8.0),
    "hyperclovax": lambda: text("HyperCLOVAX", logits_scaling=0.25),
    "inkling": lambda: text("Inkling", logits_mup_width_multiplier=4.0, unpadded_vocab_size=None),
    "falcon_h1": lambda: text("FalconH1", lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4),
    "mamba": lambda: text("Mamba"),
    "gpt2": lambda: build("GPT2LMHeadModel", **TINY, n_embd=32, n_layer=2, n_head=4),
    "opt": lambda: text("OPT", ffn_dim=48, word_embed_proj_dim=16, init_std=1.0),
    "mpt": lambda: text("Mpt", d_model=32, n_heads=4, n_layers=2, logit_scale="inv_sqrt_d_model"),
    # Their text configs have scalars that their own forward leaves out.
    "gemma3_vision": lambda: vision(
        "Gemma3",
        {"config": "Gemma3TextConfig", "head_dim": 8, "final_logit_softcapping": 2.0},
        mm_tokens_per_image=4,
        image_token_id=100,
        boi_token_id=99,
        eoi_token_id=98,
    ),
    "cohere2_vision": lambda: vision(
        "Cohere2Vision", {"config": "Cohere2Config", "logit_scale": 0.25}, image_token_id=100
    ),
    "aya_vision": lambda: vision(
        "AyaVision", {"config": "Cohere2Config", "logit_scale": 0.25}, image_token_index=100
    ),
    "llava_next_granite": lambda: vision(
        "LlavaNext",
        {"config": "GraniteConfig", "logits_scaling": 8.0},
        "CLIPVisionConfig",
        image_token_index=100,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_models_own(family):
    assert_head_is_the_models_own(FAMILIES[family]())


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1", "mamba", "cohere2_vision"])
def test_rounding_in_bf16_is_no_difference(family, caplog):
    add_loss_head(FAMILIES[family]().bfloat16())
    assert "fastpref" not in {record.name.split(".")[0] for record in caplog.records}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: text("ModernBertDecoder", bos_token_id=2, cls_token_id=2, sep_token_id=3),
            "ModernBertDecoderForCausalLM .*'modernbert-decoder'.* of the last hidden state",
        ),
        (lambda: build("BertLMHeadModel", **TINY, is_decoder=True), "'bert'.*its own forward dif"),
        (
            lambda: text("Electra", is_decoder=True, embedding_size=16),
            r"'electra'.* hidden states \(…, 32\) and a head \(101, 16\)",
        ),
        (lambda: text("Inkling", unpadded_vocab_size=90), r"logits \(…, 101\).*gives \(1, 2, 90\)"),
    ],
    ids=["modernbert-decoder", "bert", "electra", "padded vocabulary"],
)
def test_a_model_that_does_more_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        add_loss_head(model())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 1.1)])
def test_a_slightly_wrong_scale_is_seen(dtype, factor):
    model = FAMILIES["cohere"]().to(dtype)
    model.config.logit_scale *= factor  # which the model has read already
    with pytest.raises(ValueError, match="rounding explains"):
        add_loss_head(model)


def test_a_model_that_cannot_run_two_tokens_is_left_alone(caplog):
    with torch.device("meta"):
        model = text("Cohere", logit_scale=0.25)
    add_loss_head(model)
    assert "CohereForCausalLM" in caplog.text and "could not compare" in caplog.text
    model.to_empty(device="cpu")
    seen = {}
    model(IDS, loss_head=lambda hidden, *_, **head: seen.update(head) or Seen(hidden))
    assert seen == {"bias": None, "softcap": None, "logit_scale": 0.25}


def test_comparing_leaves_modes_and_random_numbers_alone():
    model = build("GPT2LMHeadModel", **TINY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    add_loss_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_of_a_head(tied):
    """An adapter that replaces rows of embedding and head: its values, gradients and absence."""
    model = text("Llama", tie_word_embeddings=tied)
    original = own_logps(model).detach()
    tokens = {"embed_tokens": [17, 42]} if tied else {"embed_tokens": [17], "lm_head": [42]}
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    model = get_peft_model(model, config).eval()
    added = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    with torch.no_grad():
        for parameter in added.values():
            parameter.add_(torch.randn_like(parameter))
    expected = own_logps(model)
    expected.sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in added.items()}
    model.zero_grad()
    add_loss_head(model)
    found = head_logps(model)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (expected - original).abs().max() > 1
    for name, parameter in added.items():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-3)
    with model.disable_adapter():
        found = head_logps(model)
    torch.testing.assert_close(found, original, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("adapter", ["tokens", "adaption prompt"])
def test_adapters_train(adapter, tiny_llama, pairs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    if adapter == "tokens":
        model.config.tie_word_embeddings = True
        model.tie_weights()
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4, 5])
    else:
        config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    trainer = make_trainer(
        OURS, tiny_llama, pairs, tmp_path, model=model, peft_config=config, learning_rate=0.1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    logs, _ = trained(trainer)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert logs[1]["rewards/margins"] != 0
    for ours, expected in zip(
        trainer.compute_ref_log_probs(trainer.model, batch), before, strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_peft_model_as_reference(tiny_llama, pairs, tmp_path):
    """Its adapter counts: the run is one whose reference has that adapter merged."""

    def adapted():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(model, config)

    runs = [
        trained(make_trainer(OURS, tiny_llama, pairs, tmp_path, ref_model=reference, optim="sgd"))
        for reference in (adapted(), adapted().merge_and_unload())
    ]
    assert abs(runs[0][0][0]["rewards/margins"]) > 1e-3
    compare_runs(*runs, relative=2e-4)


# --- dtypes -------------------------------------------------------------------------------------


def test_head_and_hidden_of_two_dtypes():
    model = FAMILIES["llama"]().bfloat16()
    model.lm_head.float()
    add_loss_head(model)
    found = head_logps(model)
    logits = model.model(IDS).last_hidden_state.double() @ model.lm_head.weight.double().T
    expected = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [OURS, STOCK], ids=["ours", "stock"])
def test_mamba_in_bf16_trains(kind, tiny_llama, pairs, tmp_path):
    """Its residual stream is fp32, its head bf16."""
    model = FAMILIES["mamba"]().bfloat16()
    reference = copy.deepcopy(model)
    with use_fastpref_logps():
        trainer = make_trainer(
            kind, tiny_llama, pairs, tmp_path, model=model, ref_model=reference, optim="sgd"
        )
        logs, _ = trained(trainer)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
