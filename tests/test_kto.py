"""A loss of one's own on `sequence_logps`: KTO, beside TRL's trainer on the same batch."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from fastpref import sequence_logps, shift_targets

BETA = 0.3


def logps_of(model, ids, attention, completion):
    """Log-probabilities of completions `(S,)` under a model."""
    hidden = model.model(ids, attention_mask=attention).last_hidden_state
    return sequence_logps(hidden, model.lm_head.weight, shift_targets(ids, completion))[0]


def kto_loss(model, reference, batch):
    """The five lines of the README, and what feeds them."""
    own = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    others = (batch[f"KL_{x}"] for x in ("input_ids", "attention_mask", "completion_mask"))
    logps = logps_of(model, *own)
    with torch.no_grad():
        ref_logps, others = logps_of(reference, *own), [*others]
        kl = (logps_of(model, *others) - logps_of(reference, *others)).mean().clamp(min=0)
    signs = torch.where(batch["label"].bool(), 1.0, -1.0)
    return (1 - torch.sigmoid(signs * BETA * (logps - ref_logps - kl))).mean()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_kto_equals_trls_trainer(frozen, tiny_llama, pairs, tmp_path):
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs[:4]
        for side in ("chosen", "rejected")
    ]
    config = KTOConfig(
        str(tmp_path), beta=BETA, per_device_train_batch_size=8, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = KTOTrainer(
        str(tiny_llama),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    torch.manual_seed(1)
    with torch.no_grad():  # away from the reference, so that ratios and KL say something
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    trainer.model.lm_head.requires_grad_(not frozen)
    batch = next(iter(trainer.get_train_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.load_state_dict(trainer.model.state_dict())
    model.lm_head.requires_grad_(not frozen)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    theirs = trainer.compute_loss(trainer.model, batch)
    ours = kto_loss(model, reference, batch)
    assert 0.02 < abs(ours.item() - 0.5) < 0.48
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    theirs.backward()
    ours.backward()
    stock = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = stock[name].grad.abs().max()
            assert (parameter.grad - stock[name].grad).abs().max() <= 1e-4 * size, name
