"""Trainers on the CPU, what a run of one leaves behind, and tiny models to give them."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fastpref.trl import PreferenceConfig, PreferenceTrainer

OURS, STOCK = (PreferenceTrainer, PreferenceConfig), (DPOTrainer, DPOConfig)
DEFAULTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "seed": 3,
    "learning_rate": 1e-2,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CPU = {"use_cpu": True, "report_to": []}


def as_dataset(pairs):
    """Lists as data sets, alone or by name; what is none stays as it is."""
    if isinstance(pairs, dict):
        return {name: as_dataset(each) for name, each in pairs.items()}
    return Dataset.from_list(pairs) if isinstance(pairs, list) else pairs


def make_trainer(
    kind, directory, pairs, tmp_path, *, model=None, own_objective=None, eval_pairs=None, **options
):
    """A trainer of `kind`, (trainer, configuration); options are the configuration's.

    `directory` holds the tokenizer and, where no `model` is given, the model.
    """
    trainer_class, config_class = kind
    more = {n: options.pop(n) for n in ("peft_config", "ref_model") if n in options}
    if own_objective is not None:
        more["objective"] = own_objective
    return trainer_class(
        str(directory) if model is None else model,
        args=config_class(str(tmp_path / "out"), **(DEFAULTS | CPU | options)),
        train_dataset=as_dataset(pairs),
        eval_dataset=as_dataset(eval_pairs),
        processing_class=AutoTokenizer.from_pretrained(directory),
        **more,
    )


def trained(trainer):
    """Logs and trained weights of a run."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, trained_weights(trainer)


def trained_weights(trainer):
    parameters = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def compare_runs(ours, theirs, *, relative, but=()):
    """Every metric that TRL logs and every trained weight agree to a relative difference."""
    (our_logs, our_state), (their_logs, their_state) = ours, theirs
    assert len(our_logs) == len(their_logs) == 2
    # In the first step the policy is its reference: which reward is larger is rounding.
    our_logs[0].pop("rewards/accuracies", None), their_logs[0].pop("rewards/accuracies", None)
    for our, their in zip(our_logs, their_logs, strict=True):
        for name in their.keys() - set(but):
            value = their[name]
            assert our[name] == pytest.approx(value, rel=relative, abs=relative), name
    assert our_state.keys() == their_state.keys()
    for name, parameter in their_state.items():
        size = parameter.abs().max()
        assert (our_state[name] - parameter).abs().max() <= relative * size, name


def save_model(model, tokenizer_of, directory):
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(directory)
    return directory
