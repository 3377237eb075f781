"""The trainer where a batch or a model is shared out over processes, beside one process with all.

accelerate refuses FSDP on a CPU (and silently makes DDP of it), so models are sharded here by its
own function, or torch's, and stepped by hand. In float64, where every engine is exact to rounding.
"""

import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import (
    fsdp2_prepare_model,
    load_fsdp_model,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from ranks import Ranks, start_deepspeed
from torch import distributed, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl_runs import OURS, STOCK, make_trainer

from fastpref.trl import use_fastpref_logps

STEPS, RATE = 3, 0.05
COLUMNS = "loss_columns"  # of a batch: what the trainer's loss takes from columns
METRICS = [
    *("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
]


# --- engines ------------------------------------------------------------------------------------


def plugin(version, **options):
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        **options,
    )


def fsdp2(model, policy=None):
    """As accelerate shards: decoder layers, embeddings, and final norm and head together.

    The norm it does not find under PEFT; the head is alone then.
    """
    accelerator = SimpleNamespace(
        state=SimpleNamespace(
            fsdp_plugin=plugin(2, reshard_after_forward=True, mixed_precision_policy=policy)
        ),
        mixed_precision="no" if policy is None else "bf16",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def parts_alone(model):
    """FSDP2 with a group for every module of the head that has parameters, and for each layer."""
    for module in [*model.modules()][::-1]:
        in_head = any(module is part for part in model.get_output_embeddings().modules())
        own = next(module.parameters(recurse=False), None) is not None
        if type(module).__name__ == "LlamaDecoderLayer" or (in_head and own):
            fully_shard(module)
    return fully_shard(model)


def fsdp1(model):
    """With a unit for each layer and one for the head that trains."""

    def alone(module):
        trains = any(p.requires_grad for p in module.parameters())
        in_head = any(module is part for part in model.get_output_embeddings().modules())
        return type(module).__name__ == "LlamaDecoderLayer" or (
            in_head and trains and isinstance(module, nn.Linear)
        )

    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=alone)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


# --- steps --------------------------------------------------------------------------------------


def lora(*modules, **options):
    return {"peft_config": LoraConfig(r=2, lora_alpha=4, target_modules=list(modules), **options)}


def tiny(directory, dtype, tied):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    if tied:  # transformers does not tie what a checkpoint has twice
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def trainer_of(
    directory,
    pairs,
    tmp_path,
    *,
    kind=OURS,
    dtype=torch.float64,
    tied=False,
    away=0.05,
    **options,
):
    """A trainer, `away` from its reference, as every process makes it."""
    model = tiny(directory, dtype, tied)
    if kind is OURS:
        options = {"objective": "unidpo"} | options
    if "peft_config" not in options:
        options = {"ref_model": copy.deepcopy(model)} | options
    trainer = make_trainer(kind, directory, pairs, tmp_path, model=model, **options)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(away * torch.randn(parameter.shape).to(parameter))
    trainer.model.train()
    return trainer


def by_name(model, value_of):
    """Of each parameter that trains, whole, by its name in the unsharded model."""
    of_fsdp1 = isinstance(model, FullyShardedDataParallel)
    with model.summon_full_params(model) if of_fsdp1 else nullcontext():
        found = {
            name.replace("_fsdp_wrapped_module.", ""): value_of(parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in found.items()
            if value is not None
        }


def batch_of(trainer, rows):
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    return trainer._prepare_inputs(batch)


def step(trainer, batch):
    """Loss, the mean over all processes, and gradients."""
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    loss = loss.detach().clone()
    distributed.all_reduce(loss)
    return loss / distributed.get_world_size(), by_name(trainer.model, lambda p: p.grad)


def steps(trainer, batch):
    """Losses, the first step's metrics and gradients, weights after the last."""
    losses, firsts = [], []
    for _ in range(STEPS):
        loss, grads = step(trainer, batch)
        losses.append(loss)
        firsts.append(grads)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
        trainer.model.zero_grad()
    metrics = {name: found[0] for name, found in trainer._metrics["train"].items()}
    weights = by_name(trainer.model, lambda p: p)
    return dict(enumerate(losses)), metrics, firsts[0], weights


def assert_equal(found, expected, *, relative):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= relative * value.abs().max(), name


def mine(rank, rows):
    return [*rows][rank :: distributed.get_world_size()]


# --- FSDP2 and FSDP1 ----------------------------------------------------------------------------

CASES = {
    "untied": (fsdp2, {}),
    "tied": (fsdp2, {"tied": True}),
    "LoRA": (fsdp2, lora("q_proj", "down_proj")),
    "modules_to_save": (fsdp2, lora("q_proj", modules_to_save=["lm_head"])),
    "stock TRL": (fsdp2, {"kind": STOCK}),
    "a head alone": (parts_alone, {"gradient_checkpointing": True}),
    "a head alone, recomputed": (parts_alone, {"schedule": "recompute", "padding_free": True}),
    "LoRA on the head": (parts_alone, lora("q_proj", "lm_head")),
    "DoRA on the head": (parts_alone, lora("q_proj", "lm_head", use_dora=True)),
    "tokens of the head": (fsdp2, lora("q_proj", trainable_token_indices={"lm_head": [4, 9]})),
    "FSDP1": (fsdp1, {"schedule": "recompute"}),
    "FSDP1, modules_to_save": (fsdp1, lora("q_proj", modules_to_save=["lm_head"])),
}


def sharded_beside_whole(rank, name, directory, pairs, tmp_path):
    engine, options = CASES[name]
    expected, found = (trainer_of(directory, pairs, tmp_path, **options) for _ in range(2))
    found.model = engine(found.model)
    rows = range(len(pairs))
    with use_fastpref_logps():
        expected = steps(expected, batch_of(expected, rows))
        found = steps(found, batch_of(found, mine(rank, rows)))
    # 64 bits of sums in another order, after three steps; FSDP1 shows whole weights, no gradients.
    for exact in (0, 3) if engine is fsdp1 else (0, 2, 3):
        assert_equal(found[exact], expected[exact], relative=1e-12)
    for metric in expected[1].keys() - {"num_tokens"}:  # of fp32
        assert found[1][metric] == pytest.approx(expected[1][metric], rel=1e-5, abs=1e-6), metric
    return expected[1]["rewards/margins"], [*expected[2]]


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_trains_as_a_whole_one(name, two_ranks, tiny_llama, pairs, tmp_path):
    """Loss, metrics and gradients of a step, and the weights after three."""
    results = two_ranks.run(sharded_beside_whole, name, tiny_llama, pairs, tmp_path, seconds=150)
    for margin, trained in results:
        assert abs(margin) > 0.01
        assert any("lm_head" in each for each in trained) == (name not in ("LoRA", "tied"))


def one_rank_scores_nothing(rank, directory, pairs, tmp_path):
    trainer = trainer_of(directory, pairs, tmp_path)
    alone = trainer_of(directory, pairs, tmp_path)
    trainer.model = parts_alone(trainer.model)
    batch = batch_of(trainer, range(4))
    _, expected = step(alone, batch)
    if rank == 1:
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    _, grads = step(trainer, batch)
    # How much a process without pairs counts is not at issue here: that the others' gradient comes.
    share = grads["lm_head.weight"].norm() / expected["lm_head.weight"].norm()
    assert share > 0.1
    assert_equal(grads, {n: share * grad for n, grad in expected.items()}, relative=1e-12)


def test_a_rank_may_have_nothing_scored(two_ranks, tiny_llama, pairs, tmp_path):
    two_ranks.run(one_rank_scores_nothing, tiny_llama, pairs, tmp_path)


# --- bfloat16 -----------------------------------------------------------------------------------

BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
PRECISIONS = {
    "accelerate's": (fsdp2, MixedPrecisionPolicy(**BF16, output_dtype=torch.bfloat16)),
    "fp32 outputs": (fsdp2, MixedPrecisionPolicy(**BF16, output_dtype=torch.float32)),
}


def bf16_step(rank, name, options, directory, pairs, tmp_path):
    engine, policy = PRECISIONS[name]
    wide, narrow = (
        trainer_of(directory, pairs, tmp_path, dtype=torch.float32, away=0, **options)
        for _ in range(2)
    )
    wide.model = engine(wide.model, policy)
    for parameter in narrow.model.parameters():
        parameter.data = parameter.bfloat16()
    batches = [batch_of(wide, mine(each, range(len(pairs)))) for each in range(2)]
    references = [
        torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batches[rank]))
        for trainer in (wide, narrow)
    ]
    expected = {}
    for batch in batches:
        narrow.model.zero_grad()
        _, grads = step(narrow, batch)
        for parameter, grad in grads.items():
            expected[parameter] = expected.get(parameter, 0) + grad.float() / 2
    loss, grads = step(wide, batches[rank])
    assert loss.dtype == torch.float32
    moving = {n: grad for n, grad in expected.items() if grad.any()}
    # Both halves' gradients are bfloat16 sums in the same order; their mean is taken in fp32.
    assert_equal({n: grads[n] for n in moving}, moving, relative=1e-6)
    metrics = {name: found[0] for name, found in wide._metrics["train"].items()}
    return loss.item(), metrics["rewards/margins"], references[0].sub(references[1]).abs().max()


@pytest.mark.parametrize("name", PRECISIONS)
def test_lora_in_bf16_starts_at_its_reference(name, two_ranks, tiny_llama, pairs, tmp_path):
    """The model's casts of its output do not reach loss, metrics and references."""
    options = lora("q_proj", "lm_head") | {"objective": "dpo"}
    for loss, margin, difference in two_ranks.run(
        bf16_step, name, options, tiny_llama, pairs, tmp_path, seconds=150
    ):
        assert loss == pytest.approx(0.6931472, abs=1e-7)
        assert margin == 0
        assert difference == 0


def test_deepspeed_leaves_the_losss_numbers_alone(tiny_llama, pairs, tmp_path, monkeypatch):
    """The Trainer gives all floating numbers of a batch the dtype of DeepSpeed's model."""
    trainer = make_trainer(
        OURS, tiny_llama, pairs, tmp_path, objective="unidpo", precompute_ref_log_probs=True
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
    batch["pixel_values"] = torch.rand(2, 3)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    config = SimpleNamespace(dtype=lambda: torch.bfloat16)
    deepspeed = SimpleNamespace(hf_ds_config=config)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", deepspeed)
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    exact = {**batch[COLUMNS], **{n: batch[n] for n in ("ref_chosen_logps", "ref_rejected_logps")}}
    kept = prepared[COLUMNS] | prepared
    assert exact
    for name, value in exact.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)
        assert (value != value.bfloat16()).any() or name == "scores"


# --- DDP ----------------------------------------------------------------------------------------

# Of eight pairs a step, in fp32; what DDP shares out is named beside how the model trains.
RUNS = {
    "accumulation, tied, checkpointing": {
        "tied": True,
        "accumulation": 2,
        "gradient_checkpointing": True,
    },
    "modules_to_save, recomputed": lora("q_proj", modules_to_save=["lm_head"])
    | {"schedule": "recompute"},
    "DoRA on the head": lora("q_proj", "lm_head", use_dora=True),
    "LoRA, SimPO": lora("q_proj", "down_proj") | {"objective": "simpo"},
    "references from disk": {"objective": "dpo", "precompute_ref_log_probs": True},
}


def run(name, world, directory, tmp_path, **engine):
    """Last log and weights of a run, `world` processes of the same eight pairs a step."""
    options = dict(RUNS[name])
    accumulation = options.pop("accumulation", 1)
    model = tiny(directory, torch.float32, options.pop("tied", False))
    trainer = make_trainer(
        OURS,
        directory,
        load_from_disk(tmp_path / "pairs"),  # beside which all processes find its references
        tmp_path,
        model=model,
        **{"objective": "unidpo"} | options | engine,
        per_device_train_batch_size=8 // world // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=RATE,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = by_name(trainer.model, gathered if engine else lambda p: p)
    trainer.model_wrapped = None  # or DDP's reducer would end after the process group
    return logs, weights


def gathered(parameter):
    """Of ZeRO-3, whole."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
        return parameter.detach().clone()


def run_as(rank, names, directory, tmp_path):
    world = distributed.get_world_size()
    return [run(name, world, directory, tmp_path) for name in names]


@pytest.mark.parametrize(("group", "names"), [("two_ranks", [*RUNS]), ("four_ranks", [*RUNS][:1])])
def test_ddp_trains_as_one_process(group, names, request, tiny_llama, pairs, tmp_path):
    processes = request.getfixturevalue(group)
    one, many = tmp_path / "one", tmp_path / "many"
    for directory in (one, many):
        Dataset.from_list(pairs).save_to_disk(directory / "pairs")
    expected = [run(name, 1, tiny_llama, one) for name in names]
    for found in processes.run(run_as, names, tiny_llama, many, seconds=200):
        assert_same_runs(found, expected)


def assert_same_runs(found, expected):
    for (logs, weights), (their_logs, their_weights) in zip(found, expected, strict=True):
        assert_equal(weights, their_weights, relative=1e-5)
        assert len(logs) == STEPS
        for log, theirs in zip(logs, their_logs, strict=True):
            for metric in METRICS:
                assert log[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=2e-6), metric


# --- ZeRO ---------------------------------------------------------------------------------------

ZERO = ["modules_to_save, recomputed", "DoRA on the head"]


def run_zero(rank, names, directory, tmp_path):
    start_deepspeed()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}  # shards small tensors too
    config = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    try:
        return [
            run(name, distributed.get_world_size(), directory, tmp_path, deepspeed=config)
            for name in names
        ]
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.deepspeed
def test_zero3_trains_as_one_process(tiny_llama, pairs, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    for directory in (one, many):
        Dataset.from_list(pairs).save_to_disk(directory / "pairs")
    expected = [run(name, 1, tiny_llama, one) for name in ZERO]
    processes = Ranks(2)  # of its own: what DeepSpeed sets, it sets for a process's life
    try:
        for found in processes.run(run_zero, ZERO, tiny_llama, many, seconds=200):
            assert_same_runs(found, expected)
    finally:
        processes.stop()


# --- resumed runs -------------------------------------------------------------------------------


def test_tokens_are_counted_on_in_a_resumed_run(tiny_llama, pairs, tmp_path):
    options = {"objective": "unidpo", "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(OURS, tiny_llama, pairs, tmp_path, **options)
    whole.train()
    resumed = make_trainer(OURS, tiny_llama, pairs, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    counts = [
        [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
        for trainer in (whole, resumed)
    ]
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1]


def resumed_beside_uninterrupted(rank, directory, pairs, tmp_path):
    """Two steps of AdamW, a sharded checkpoint, and the third step in two ways."""
    third = []
    for resumes in (False, True):
        trainer = trainer_of(directory, pairs, tmp_path)
        trainer.model = fsdp1(trainer.model)
        trainer.is_fsdp_enabled = True
        state = plugin(1, state_dict_type="SHARDED_STATE_DICT")
        trainer.accelerator.state.fsdp_plugin = state
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=RATE)
        trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
        batch = batch_of(trainer, mine(rank, range(len(pairs))))
        of_model = state, trainer.accelerator, trainer.model, str(tmp_path)
        if resumes:
            load_fsdp_model(*of_model)
            trainer._load_optimizer_and_scheduler(str(tmp_path))
        else:
            for _ in range(2):
                step(trainer, batch)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
            save_fsdp_model(*of_model)
            save_fsdp_optimizer(*of_model[:2], trainer.optimizer, *of_model[2:])
            torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
            distributed.barrier()
        step(trainer, batch)
        trainer.optimizer.step()
        third.append(by_name(trainer.model, lambda p: p))
    assert_equal(third[1], third[0], relative=1e-12)


def test_fsdp1_continues_from_a_sharded_checkpoint(two_ranks, tiny_llama, pairs, tmp_path):
    two_ranks.run(resumed_beside_uninterrupted, tiny_llama, pairs, tmp_path, seconds=150)
