"""`fastpref.adapters` beside the real classes of other frameworks: `make frameworks`.

Those patch what they import, so this file runs in a process of its own.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import trl
from frameworks import apart, assert_alike, gradients, parameters, random_head, real
from transformers import TrainingArguments
from trl_runs import CPU, as_dataset

from fastpref import adapters

PAIRS, T, V = 2, 9, 24
# Prompt and padding of each of the 2B sequences; the tiny model's vocabulary is larger.
SPANS = [(3, 9), (2, 6), (3, 5), (2, 9)]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (2 * PAIRS, T), generator=generator)
    attention, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, (start, end) in enumerate(SPANS):
        labels[row, start:end] = ids[row, start:end]
        attention[row, end:] = 0
        ids[row, end:] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


@pytest.fixture
def models(tiny_llama):
    return apart(tiny_llama)


def grads_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- LLaMA-Factory ------------------------------------------------------------------------------


def llama_factory(method, mixin, models, tmp_path, **settings):
    """A real trainer of theirs, with or without our mixin before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_VERSION_CHECK", "1")
        patch.setattr("trl.AutoModelForCausalLMWithValueHead", object, raising=False)
        module = f"llamafactory.train.{method.lower()}.trainer"
        base = real(module, f"Custom{method}Trainer")
    kind = type("Trainer", (mixin, base), {}) if mixin else base
    finetuning = {
        "pref_beta": 0.4, "pref_loss": "sigmoid", "pref_ftx": 0.0, "pref_bco_weight": 0.0,
        "dpo_label_smoothing": 0.0, "simpo_gamma": 0.5, "ld_alpha": None, "use_badam": False,
        "use_ref_model": False, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0,
    }  # fmt: skip
    model, reference = map(copy.deepcopy, models)
    return kind(
        model=model,
        ref_model=reference,
        finetuning_args=SimpleNamespace(**(finetuning | settings)),
        processor=None,
        args=TrainingArguments(str(tmp_path), **CPU),
        data_collator=lambda rows: rows,
        train_dataset=as_dataset([{"text": "the sea"}]),
        tokenizer=None,
    )


@pytest.mark.parametrize("loss_type", ["orpo", "simpo"])
def test_llama_factorys_losses(loss_type, models, batch, tmp_path):
    """Those of its own that need nothing of the old TRL which it is made for."""
    found = []
    for mixin in (adapters.LlamaFactoryDPO, None):
        trainer = llama_factory("DPO", mixin, models, tmp_path, pref_loss=loss_type, pref_ftx=0.2)
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, dict(batch))
        found.append(([loss], grads_of(loss, trainer.model), metrics))
    (ours, grads, metrics), (theirs, their_grads, their_metrics) = found
    assert_alike(ours, theirs, grads, their_grads)
    assert metrics.keys() == their_metrics.keys()
    for name in metrics:
        if "logits" not in name:
            assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_llama_factorys_log_probabilities(loss_type, ld_alpha, models, batch, tmp_path):
    gap = batch["labels"].clone()
    gap[0, 5] = -100  # of several turns, of which one is not trained on
    batch = batch | {"labels": gap}
    names, found = ("chosen_logps", "rejected_logps", "chosen_logps_avg"), []
    for mixin in (adapters.LlamaFactoryDPO, None):
        settings = {"pref_loss": loss_type, "ld_alpha": ld_alpha, "use_ref_model": True}
        trainer = llama_factory("DPO", mixin, models, tmp_path, **settings)
        out = trainer.concatenated_forward(trainer.model, batch)
        reference = trainer.compute_reference_log_probs(trainer.model, batch)
        loss = (torch.cat([out[name] for name in names]) ** 2).sum()
        values = [*(out[name] for name in names), *reference]
        found.append((values, grads_of(loss, trainer.model)))
        assert out["chosen_logits"].mean().isfinite()
    assert batch["labels"] is gap
    (ours, grads), (theirs, their_grads) = found
    assert_alike(ours, theirs, grads, their_grads)


def test_llama_factorys_kto(models, batch, tmp_path):
    tags = torch.tensor([True, False, False, True])
    batch = batch | {"kto_tags": tags}
    batch |= {
        f"kl_{name}": batch[name].flip(0) for name in ("input_ids", "attention_mask", "labels")
    }
    found = []
    for mixin in (adapters.LlamaFactoryKTO, None):
        trainer = llama_factory("KTO", mixin, models, tmp_path)
        chosen, rejected, *logits, kl, average = trainer.concatenated_forward(trainer.model, batch)
        reference = trainer.compute_reference_log_probs(trainer.model, batch)
        loss = (chosen**2).sum() + rejected.sum() - average.sum()
        found.append(([chosen, rejected, kl, average, *reference], grads_of(loss, trainer.model)))
        assert [len(x) for x in logits] == [2, 2]
    (ours, grads), (theirs, their_grads) = found
    assert_alike(ours, theirs, grads, their_grads)


# --- ms-swift -----------------------------------------------------------------------------------


def swift(mixin, models, *, padding_free=False, ld_alpha=None, loss_type="sigmoid", **template):
    """Its trainer without its constructor, which wants a model of its own registry."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DPOTrainer", "KTOTrainer"):  # swift deletes their constructors
            patch.setattr(f"trl.{name}.__init__", getattr(trl, name).__init__)
        base = real("swift.rlhf_trainers.dpo_trainer", "DPOTrainer")
    options = {
        "is_encoder_decoder": False,
        "sequence_parallel_size": 1,
        "padding_free": padding_free,
    }

    class Bare(base):
        def __init__(self, model, ref_model, *, template):
            self.model, self.ref_model, self.template = model, ref_model, template

        get_use_logits_to_keep = lambda self, default: False  # noqa: E731
        null_ref_context = contextlib.nullcontext

    kind = type("Trainer", (mixin, Bare), {}) if mixin else Bare
    trainer = kind(*map(copy.deepcopy, models), template=SimpleNamespace(**(options | template)))
    trainer.args = SimpleNamespace(ld_alpha=ld_alpha, rpo_alpha=0.1)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda values: values
    )
    trainer.loss_type, trainer.loss_weights, trainer.label_smoothing = [loss_type], None, 0.1
    trainer.beta, trainer.f_divergence_type, trainer.reference_free = 0.4, "reverse_kl", False
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer._peft_has_been_casted_to_bf16, trainer.label_pad_token_id = False, -100
    trainer.get_cu_seqlens = lambda position_ids, _: torch.cat(
        [(position_ids[0] == 0).nonzero().flatten(), torch.tensor([position_ids.shape[1]])]
    )
    return trainer


def packed(batch):
    """One row of all sequences, their positions restarting."""
    lengths = batch["attention_mask"].sum(1).tolist()
    row = {
        name: torch.cat([x[:n] for x, n in zip(batch[name], lengths, strict=True)])[None]
        for name in ("input_ids", "labels")
    }
    return row | {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("padding_free", [False, True])
def test_swifts_loss(padding_free, ld_alpha, loss_type, models, batch):
    batch, found = packed(batch) if padding_free else batch, []
    for mixin in (adapters.SwiftDPO, None):
        options = {"padding_free": padding_free, "ld_alpha": ld_alpha, "loss_type": loss_type}
        trainer = swift(mixin, models, **options)
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        found.append(([loss], grads_of(loss, trainer.model), metrics))
    (ours, grads, metrics), (theirs, their_grads, their_metrics) = found
    assert_alike(ours, theirs, grads, their_grads)
    assert metrics == pytest.approx(their_metrics, rel=1e-5, abs=1e-5)


def test_what_swift_shares_out_is_refused(models):
    for options in ({"sequence_parallel_size": 2}, {"is_encoder_decoder": True}):
        with pytest.raises(ValueError, match="decoders, without sequence parallelism"):
            swift(adapters.SwiftDPO, models, **options)
    trainer = swift(adapters.SwiftDPO, models)
    with pytest.raises(ValueError, match="got .2, 5, 101. and 'mean'"):
        trainer.get_per_token_logps(torch.zeros(2, 5, 101), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="and 'sum'"):
        trainer.get_per_token_logps(torch.zeros(2, 5, 2), torch.zeros(2, 5), reduction="sum")


# --- OpenRLHF -----------------------------------------------------------------------------------


def actor(mixin, models, *, packing=False, temperature=1.0):
    base = real("openrlhf.models.actor", "Actor")
    kind = type("Actor", (mixin, base), {}) if mixin else base
    made = kind(copy.deepcopy(models[0]), temperature=temperature)
    made.packing_samples, made.model.config.use_cache = packing, False  # as of a model by name
    return made


@pytest.fixture
def unpadding(monkeypatch):
    """What OpenRLHF takes of flash-attention to pack a batch, in torch."""
    utils = real("openrlhf.models", "ring_attn_utils")

    def unpad_input(x, mask):
        indices = mask.flatten().nonzero().flatten()
        return x.flatten(0, 1)[indices], indices, None, None, None

    def pad_input(x, indices, batch, seqlen):
        out = x.new_zeros(batch * seqlen, *x.shape[1:])
        return out.index_put((indices,), x).unflatten(0, (batch, seqlen))

    monkeypatch.setattr(utils, "unpad_input", unpad_input)
    monkeypatch.setattr(utils, "pad_input", pad_input)
    monkeypatch.setattr(utils, "index_first_axis", lambda x, indices: x[indices])
    monkeypatch.setattr(utils, "rearrange", lambda x, pattern: x.flatten(0, 1))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhfs_actor(packing, temperature, models, batch, unpadding):
    sequences, attention = batch["input_ids"], batch["attention_mask"]
    actions = (batch["labels"] != -100)[:, 2:].long()
    scored, found = attention[:, 1:], []
    for mixin in (adapters.OpenRLHFActor, None):
        model = actor(mixin, models, packing=packing, temperature=temperature)
        with_output = {"attention_mask": attention, "return_output": True, "return_entropy": True}
        of_actions, output = model(sequences, actions, **with_output)
        logps, _ = model(sequences, **with_output, return_logprobs=True)
        entropy = output.entropy[:, -actions.shape[1] :] * actions
        loss = (of_actions**2).sum() + 0.3 * entropy.sum()
        grads = grads_of(loss + (logps * scored).sum(), model)
        logits = model(sequences, attention_mask=attention, return_output=True).logits
        found.append(([of_actions, logps * scored, entropy, logits], grads))
        assert "aux_loss" not in output
    (ours, grads), (theirs, their_grads) = found
    assert_alike(ours, theirs, grads, their_grads)
    assert parameters(adapters.OpenRLHFActor.forward) == parameters(type(model).forward)


def test_openrlhf_without_a_mask(models, batch):
    model = actor(adapters.OpenRLHFActor, models)
    with pytest.raises(ValueError, match="attention_mask is missing"):
        model(batch["input_ids"], return_logprobs=True)


# --- torchtune ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "recipe", ["lora_dpo_single_device", "lora_dpo_distributed", "full_dpo_distributed"]
)
def test_torchtunes_recipes(recipe, tied, batch):
    names = {
        "lora_dpo_single_device": "LoRADPORecipeSingleDevice",
        "lora_dpo_distributed": "LoRADPORecipeDistributed",
        "full_dpo_distributed": "FullDPORecipeDistributed",
    }
    size = {"vocab_size": V, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16,
            "max_seq_len": 16, "intermediate_dim": 24}  # fmt: skip
    qwen = real("torchtune.models.qwen2", "qwen2")
    base = real(f"recipes/{recipe}.py", names[recipe])
    dpo = real("torchtune.rlhf.loss", "DPOLoss")
    torch.manual_seed(0)
    decoder = qwen(**size, tie_word_embeddings=tied)
    found = []
    for bases in ((adapters.TorchtuneDPO, base), (base,)):
        kind = type("Recipe", bases, {"__init__": lambda self: None})
        trainer, model = kind(), copy.deepcopy(decoder)
        if tied:
            model.output.tied_module = model.tok_embeddings
        trainer._device = torch.device("cpu")
        trainer.activations_handling_ctx = contextlib.nullcontext()
        both = batch["input_ids"], batch["labels"]
        chosen, rejected, *logits = trainer.concatenated_forward(model, both)
        losses, *_ = dpo(beta=0.3)(chosen, rejected, chosen.detach() + 1, rejected.detach() - 1)
        found.append(([chosen, rejected, losses], grads_of(losses.mean(), model)))
        assert all(each.detach().mean().isfinite() for each in logits)
        assert "unembed" not in vars(model)
    (ours, grads), (theirs, their_grads) = found
    assert_alike(ours, theirs, grads, their_grads)


def test_torchtunes_lora_on_the_head_is_refused():
    head = SimpleNamespace(weight=torch.zeros(3, 2), lora_a=None)
    trainer = adapters.TorchtuneDPO()
    trainer._device, trainer.activations_handling_ctx = "cpu", contextlib.nullcontext()
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="no plain head: leave out its LoRA"):
        trainer.concatenated_forward(SimpleNamespace(output=head), (ids, ids))


# --- verl ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_verls_module(flat, temperature):
    hidden, weight, ids = head = random_head()
    rows = (hidden.flatten(0, 1), weight, ids.flatten()) if flat else head
    name = "FusedLinearForPPO"
    theirs = real("verl.utils.experimental.torch_functional", name)
    found = []
    for kind in (adapters.FusedLinearForPPO, theirs):
        logps, entropy = kind(chunk_size=4)(*rows, temperature=temperature)
        assert logps.shape == entropy.shape == rows[2].shape
        loss = (logps**2).sum() + (entropy**2).sum()
        found.append(([logps, entropy], gradients(loss, hidden, weight)))
    (ours, grads), (expected, their_grads) = found
    assert_alike(ours, expected, grads, their_grads)
    assert parameters(adapters.FusedLinearForPPO) == parameters(theirs)
    assert parameters(adapters.FusedLinearForPPO.forward) == parameters(theirs.forward)


def test_verls_function_takes_what_theirs_takes():
    """Theirs runs on a GPU alone."""
    kernel = real("verl.utils.kernel.linear_cross_entropy", "LinearCrossEntropy")
    assert parameters(adapters.linear_cross_entropy) == parameters(kernel.forward)[1:]
