"""Adapters on the LM head: loss and all gradients are those of the model's own logits."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput
from trl_runs import OURS, STOCK, TINY, compare_runs, make_trainer, trained

import fastpref
from fastpref import adapters
from fastpref.sequences import shift_targets
from fastpref.trl import add_loss_head

IDS = torch.arange(24).view(4, 6) * 4 % 101
COMPLETION = torch.tensor([[0, 0, 1, 1, 1, 1]] * 4)
REF_LOGPS = torch.tensor([-70.0, -64.0, -66.0, -69.0])
BETA = 0.3


def build(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | fields)))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=1)
    return model.to(dtype)


def on_head(**fields):
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["lm_head", "q_proj"]}
    return LoraConfig(**(options | fields))


def stirred(model):
    """Every trained weight away from where PEFT begins, where an adapter does nothing yet."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.2 * noise).to(parameter.dtype)
    return model


def by_logits(model):
    """DPO by definition from the model's own logits: loss and gradients of what trains."""
    logits = model(input_ids=IDS, use_cache=False).logits
    targets = shift_targets(IDS, COMPLETION)
    token_logps = logits.double().log_softmax(-1)[targets != -100]
    logps = token_logps.gather(-1, targets[targets != -100][:, None]).view(4, -1).sum(1)
    chosen, rejected = (logps - REF_LOGPS).chunk(2)
    loss = -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    return backward(model, loss)


def by_head(model, **options):
    def loss_head(hidden, weight, **head):
        return fastpref.preference_loss(
            hidden,
            weight,
            shift_targets(IDS, COMPLETION),
            fastpref.DPO(beta=BETA),
            ref_logps=REF_LOGPS,
            **head,
            **options,
        )

    return backward(model, model(input_ids=IDS, loss_head=loss_head).loss)


def backward(model, loss):
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().item(), grads


def assert_alike(found, expected, relative):
    assert found[0] == pytest.approx(expected[0], rel=relative)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert grad.any(), name
        error = (found[1][name].double() - grad.double()).norm() / grad.double().norm()
        assert error <= relative, (name, error)


ADAPTERS = {
    "lora": on_head(),
    "rslora": on_head(use_rslora=True),
    "dora": on_head(use_dora=True),
    "lora with a bias": on_head(lora_bias=True),
    "head alone": on_head(target_modules=["lm_head"]),
    "tokens": LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [8, 12, 40]}
    ),
    "tokens, tied": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[8, 12, 40]),
    "tokens alone": TrainableTokensConfig(token_indices=[8, 12, 40], target_modules=["lm_head"]),
    "whole head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def adapted(name, dtype=torch.float32, **options):
    model = build(dtype, tie_word_embeddings="tied" in name)
    return stirred(get_peft_model(model, ADAPTERS[name], **options))


@pytest.mark.parametrize("schedule", ["auto", "recompute"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_and_gradients_are_those_of_logits(name, schedule):
    model = adapted(name)
    expected = by_logits(model)
    add_loss_head(model)
    assert_alike(by_head(model, schedule=schedule), expected, 1e-5)
    # and without the adapter, as references are
    with model.disable_adapter():
        found, expected = by_head(model), by_logits(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora", "tokens", "tokens, tied"])
def test_in_float64_nothing_is_lost(name):
    """By 2^-40 an operand rounded to float32 on the way would show, and sums of 100 terms do not.

    Norms are rounded to float32 by PEFT itself, which keeps its adapters there.
    """
    model = adapted(name, torch.float64).double()
    expected = by_logits(model)
    add_loss_head(model)
    assert_alike(by_head(model), expected, 2**-40)


@pytest.mark.parametrize("setting", ["fp32 adapters", "bf16 adapters", "autocast"])
@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "tokens"])
def test_bf16_is_no_worse_than_logits(name, setting):
    """Of token log-probabilities and of gradients, which the model's rounded logits spoil more.

    The hidden states are the same, and what A makes of them is rounded alike.
    """
    model = adapted(name, torch.bfloat16, autocast_adapter_dtype=setting == "fp32 adapters")
    context = torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast")
    wide = with_wide_head(model)
    with context:
        true_logps, (_, truth) = token_logps(wide), by_logits(wide)
        their_logps, (_, theirs) = token_logps(model), by_logits(model)
        add_loss_head(model)
        targets = shift_targets(IDS, torch.ones_like(IDS))
        our_logps = adapters.token_logps(model, targets, {"input_ids": IDS}).logps[:, :-1]
        _, ours = by_head(model)
    assert (our_logps - true_logps).norm() <= (their_logps - true_logps).norm()
    of_head = [name for name in truth if "lm_head" in name]
    assert of_head
    for name in of_head:
        our_error, their_error = ((x[name] - truth[name]).norm() for x in (ours, theirs))
        assert our_error <= their_error, name


def token_logps(model):
    logps = model(input_ids=IDS, use_cache=False).logits.double().log_softmax(-1)
    return logps[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]


def with_wide_head(model):
    """The head alone in float64, after the trunk as it is."""
    wide = copy.deepcopy(model)
    head = wide.get_base_model().get_output_embeddings().double()
    head.register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))
    return wide


# --- which adapters count -----------------------------------------------------------------------


def several():
    model = get_peft_model(build(), on_head(), adapter_name="first")
    model.add_adapter("second", on_head(r=2, use_dora=True))
    model.add_adapter("third", on_head(r=4, target_modules=["lm_head"], lora_bias=True))
    model.add_adapter("elsewhere", on_head(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return stirred(model)


@pytest.mark.parametrize(
    "active",
    [
        ["first"],
        ["first", "second"],
        ["second", "first"],
        ["third", "second", "first"],
        ["elsewhere"],
        ["elsewhere", "second"],
    ],
    ids=" ".join,
)
def test_several_adapters_count_in_their_order(active):
    model = several()
    model.base_model.set_adapter(active)
    expected = by_logits(model)
    add_loss_head(model)
    assert_alike(by_head(model), expected, 1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "tokens"])
def test_a_merged_adapter_counts_once(name):
    model = adapted(name)
    add_loss_head(model)
    before, with_gradients = by_head(model)
    model.merge_adapter()
    merged, _ = by_head(model)
    assert merged == pytest.approx(by_logits(model)[0], rel=1e-5)
    assert merged == pytest.approx(before, rel=1e-4)
    with model.disable_adapter():  # its own forward takes it out of the weight, and so does ours
        without = by_head(model)[0]
        assert without == pytest.approx(by_logits(model)[0], rel=1e-5)
    assert abs(without - before) > 1e-2
    assert_alike(by_head(model), (before, with_gradients), 1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_is_the_adapters_own(rate):
    model = get_peft_model(build(), on_head(lora_dropout=rate, target_modules=["lm_head"]))
    model = stirred(model).train()
    add_loss_head(model)
    torch.manual_seed(1)
    expected = by_logits(model)
    torch.manual_seed(1)
    found = by_head(model)
    assert_alike(found, expected, 1e-5)
    torch.manual_seed(2)
    assert (by_head(model)[0] == found[0]) == (rate == 0)


def test_many_trained_tokens(monkeypatch):
    monkeypatch.setattr("fastpref.trl.adapted_head._MOST_TOKENS", 2)
    model = adapted("tokens")
    expected = by_logits(model)
    add_loss_head(model)
    assert_alike(by_head(model), expected, 1e-5)


# --- what is refused ----------------------------------------------------------------------------


class Quantised(nn.Linear):
    """A head of whole numbers, as quantisation leaves one."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((100 * linear.weight).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def quantised(config=None):
    model = build()
    model.lm_head = Quantised(model.lm_head)
    return model if config is None else get_peft_model(model, config)


def with_own_weight():
    model = get_peft_model(build(), on_head())
    model.get_output_embeddings().get_base_layer().weight.requires_grad_()
    return model


REFUSED = {
    "another adapter": (
        lambda: get_peft_model(
            build(), IA3Config(target_modules=["lm_head"], feedforward_modules=[])
        ),
        "ia3 Linear is none of them",
    ),
    "dora with dropout": (
        lambda: get_peft_model(build(), on_head(use_dora=True, lora_dropout=0.1)),
        "DoRA with lora_dropout.*use lora_dropout=0",
    ),
    "a variant": (
        lambda: get_peft_model(build(), on_head(alora_invocation_tokens=[3])),
        "'default' on the LM head is LoRA's variant ALora",
    ),
    "a head that trains too": (with_own_weight, "its own weight trains too"),
    "a quantised head": (quantised, "quantised.*int8.*llm_int8_skip_modules"),
    "a quantised head under tokens": (
        lambda: quantised(LoraConfig(target_modules=["q_proj"])),
        "quantised.*int8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_projection_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        add_loss_head(make())


def test_an_adapter_that_comes_later_is_refused_too():
    model = adapted("lora")
    add_loss_head(model)
    model.add_adapter("later", on_head(use_dora=True, lora_dropout=0.1))
    model.set_adapter("later")
    with pytest.raises(ValueError, match="DoRA with lora_dropout"):
        by_head(model)


# --- in the trainer -----------------------------------------------------------------------------


def add_naive_head(model, **_):
    """In place of TRL's fused head, which leaves adapters out: the model's own logits."""
    own = model.forward

    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        out = own(*args, **kwargs)
        if not fused_lm_head:
            return out
        wanted, logits = labels[:, 1:], out.logits[:, :-1].double()
        all_logps = logits.log_softmax(-1)
        logps = all_logps.gather(-1, wanted.clamp(0)[..., None])[..., 0]
        return FusedCausalLMOutput(
            log_probs=logps * (wanted != -100),
            entropy=-(all_logps.exp() * all_logps).sum(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == wanted,
        )

    model.forward = forward


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"padding_free": True, "loss_type": ["sigmoid", "sft"]}),
        ("dora", {"share_prompt": True, "precompute_ref_log_probs": True}),
        ("tokens, tied", {"gradient_accumulation_steps": 2, "loss_type": ["ipo"]}),
    ],
)
def test_a_run_is_that_of_logits(name, options, tiny_llama, pairs, tmp_path, monkeypatch):
    """Loss, metrics and trained weights of stock TRL's trainer, were its head the model's own."""
    monkeypatch.setattr(dpo_trainer, "BaseTunerLayer", ())
    monkeypatch.setattr(dpo_trainer, "add_fused_lm_head", add_naive_head)
    runs = []
    for kind in (OURS, STOCK):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model.config.tie_word_embeddings = "tied" in name
        model.tie_weights()
        given = dict(options)
        if kind is STOCK:
            given.pop("padding_free", None), given.pop("share_prompt", None)
        trainer = make_trainer(
            kind,
            tiny_llama,
            pairs,
            tmp_path,
            model=model,
            peft_config=copy.deepcopy(ADAPTERS[name]),
            optim="sgd",
            **given,
        )
        runs.append(trained(trainer))
    compare_runs(*runs, relative=2e-4)
    assert any("lm_head" in parameter or "tokens" in parameter for parameter in runs[0][1])
    assert runs[0][0][1]["rewards/margins"] != 0


def in_4_bits(directory, dtype):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype),
    )
    assert not model.model.layers[0].self_attn.q_proj.weight.is_floating_point()
    assert model.lm_head.weight.dtype == dtype
    return model


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["trunk", "head"])
def test_a_trunk_in_4_bits(targets, tiny_llama, pairs, tmp_path):
    """QLoRA, with and without an adapter of the head's own."""
    config = on_head(target_modules=targets)
    model = stirred(get_peft_model(in_4_bits(tiny_llama, torch.float32), config)).train()
    expected = by_logits(model)
    add_loss_head(model)
    assert_alike(by_head(model), expected, 1e-5)
    model = in_4_bits(tiny_llama, torch.bfloat16)
    trainer = make_trainer(
        OURS, tiny_llama, pairs, tmp_path, model=model, peft_config=config, optim="sgd"
    )
    logs, state = trained(trainer)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert logs[1]["rewards/margins"] != 0
    assert any("lm_head" in name for name in state) == ("lm_head" in targets)
