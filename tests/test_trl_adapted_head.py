"""Adapters on the LM head: loss and all gradients are those of the model's own logits."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput
from trl_runs import OURS, STOCK, TINY, compare_runs, make_trainer, trained

import fastpref
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
    if any(parameter.requires_grad for parameter in model.parameters()):
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
    "tokens, tied": LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[8, 12, 40]
    ),
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
