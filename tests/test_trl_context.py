"""Training with the positions of every sequence shared out over ranks is training as one process.

accelerate refuses `cp_size` on a CPU, and torch's ring attention has no kernel there: the refusal
is lifted, and attention looks at gathered keys and values. All else is as on a GPU: who gets which
batch, who shares out what, and whose gradients are averaged. With `sp_size` all of it is.
"""

import contextlib

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, PromptTuningConfig
from ranks import Ranks, start_deepspeed
from torch import distributed
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl_runs import OURS, TINY, compare_runs, make_trainer, trained, trained_weights

CASES = {
    "unidpo": {"objective": "unidpo", "gradient_accumulation_steps": 2},
    "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5},
    "precomputed": {"objective": "adadpo", "precompute_ref_log_probs": True},
    "lora": {
        "objective": "simpo",
        "schedule": "recompute",
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"]),
    },
}

# By Adam's own 1e-8 the rounding of a gradient of nothing would be a step.
STEADY = {"max_grad_norm": 0.0, "adam_epsilon": 1e-4}


class Gathered(torch.autograd.Function):
    """All ranks' parts along the sequence; backwards, what all ranks have for this one."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, upstream):
        total, group = upstream.contiguous().clone(), ctx.group
        distributed.all_reduce(total, group=group)
        parts = total.chunk(distributed.get_world_size(group), 2)
        return parts[distributed.get_rank(group)], None


def attention(group_of):
    """Causal attention of this rank's queries to all keys, of which each has head and tail.

    Where accelerate's hook has taken the mask away; references are precomputed before that.
    """

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        given = module, query, key, value, attention_mask
        if attention_mask is not None or not kwargs.get("is_causal"):
            return sdpa_attention_forward(*given, scaling=scaling, **kwargs)
        group = group_of()
        rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
        chunks = torch.arange(query.shape[2] * ranks).chunk(2 * ranks)
        positions = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(ranks)]
        key, value = (Gathered.apply(x, group) for x in (key, value))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        later = positions[rank][:, None] < torch.cat(positions)[None]
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(later, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return attend


def shared_out(directory, pairs, tmp_path, patch, **options):
    """A trainer whose sequences are shared out over two ranks, with others on other batches."""
    parallelism = ParallelismConfig(cp_size=2, dp_shard_size=distributed.get_world_size() // 2)
    patch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
    group = lambda: parallelism.get_device_mesh()["cp"].get_group()  # noqa: E731
    patch.setitem(AttentionInterface._global_mapping, "sdpa", attention(group))
    options = {"parallelism_config": parallelism} | options
    return make_trainer(OURS, directory, pairs, tmp_path, **options)


def run(rank, name, directory, pairs, tmp_path):
    options = {**STEADY, "eval_pairs": pairs[:3], **CASES[name]}
    if distributed.get_world_size() > 2:
        options["per_device_train_batch_size"] = 1  # of two, the same batch of two pairs
    with pytest.MonkeyPatch.context() as patch:
        trainer = shared_out(directory, pairs, tmp_path, patch, **options)
        before = trainer.evaluate()
        return *trained(trainer), before, trainer.evaluate()


def is_as_one_process(ranks, name, directory, pairs, tmp_path):
    options = {**STEADY, "eval_pairs": pairs[:3], **CASES[name]}
    whole = make_trainer(OURS, directory, pairs, tmp_path, **options)
    before = whole.evaluate()
    before.pop("eval_rewards/accuracies")  # the policy is its reference: of rounding
    expected = *trained(whole), before, whole.evaluate()
    for found in ranks.run(run, name, directory, pairs, tmp_path):
        compare(found, expected)


def compare(found, expected):
    """Two runs' logs, weights, and evaluations."""
    compare_runs(found[:2], expected[:2], relative=1e-4)
    for evaluated, theirs in zip(found[2:], expected[2:], strict=True):
        for metric, value in theirs.items():
            if not metric.endswith(("time", "per_second")):
                assert evaluated[metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(name, two_ranks, tiny_llama, pairs, tmp_path):
    is_as_one_process(two_ranks, name, tiny_llama, pairs, tmp_path)


def test_beside_other_batches(four_ranks, tiny_llama, pairs, tmp_path):
    is_as_one_process(four_ranks, "precomputed", tiny_llama, pairs, tmp_path)


def refused(rank, case, directory, pairs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        options = {"objective": "dpo"} | REFUSALS[case][0]
        if case == "ulysses":
            options["parallelism_config"] = ParallelismConfig(sp_size=2)
        try:
            trainer = shared_out(directory, pairs, tmp_path, patch, **options)
            if case == "collator":
                trainer.data_collator.collator.pad_to_multiple_of = 3
            elif case == "left":
                trainer.data_collator = on_the_left(trainer.data_collator)
            elif case == "predictions":
                trainer.predict(trainer.train_dataset)
            trainer.train()
        except ValueError as error:
            return str(error)
    return "went through"


REFUSALS = {
    "virtual tokens": (
        {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")},
        "cp_size=2 does not go with an adapter that puts virtual tokens",
    ),
    "packing": ({"padding_free": True}, "padding_free packs a row that context parallelism"),
    "collator": ({}, "cp_size=2 shares out sequences in 4 equal chunks, and the batch has"),
    "left": ({}, "cp_size=2 shares out sequences that are padded on the right"),
    "predictions": ({}, "predictions are logits, of which cp_size=2 leaves each rank a part"),
    "ulysses": ({}, "sp_size=2 does not go with an engine other than DeepSpeed"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_go_with_it_is_refused(case, two_ranks, tiny_llama, pairs, tmp_path):
    for found in two_ranks.run(refused, case, tiny_llama, pairs, tmp_path):
        assert REFUSALS[case][1] in found


def broken(rank, directory, pairs, tmp_path):
    """A weight that is NaN: every rank says which pair, with its whole text."""
    with pytest.MonkeyPatch.context() as patch:
        trainer = shared_out(directory, pairs, tmp_path, patch, objective="dpo")
        with torch.no_grad():
            trainer.model.lm_head.weight[0] = torch.nan
        try:
            trainer.train()
        except FloatingPointError as error:
            return str(error)
    return "went through"


def test_numbers_that_are_not_finite_are_told_of_whole_pairs(
    two_ranks, tiny_llama, pairs, tmp_path
):
    first, second = two_ranks.run(broken, tiny_llama, pairs, tmp_path)
    assert first == second
    assert "why is the" in first or "how" in first, first


# --- DeepSpeed's Ulysses --------------------------------------------------------------------------

ULYSSES = CASES | {
    "epochs": {
        "objective": "dpo",
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.5,
    }
}
STAGES = {"unidpo": 2, "mixture": 3, "precomputed": 1, "lora": 2, "epochs": 1}  # of ZeRO


@contextlib.contextmanager
def ulysses():
    """What DeepSpeed and transformers keep for a process's life they keep for these lines."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp, ulysses_sp
    from deepspeed.utils import groups

    start_deepspeed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})
        patch.setattr(ulysses_sp, "UlyssesSPAttentionHF", ulysses_sp.UlyssesSPAttentionHF)
        patch.setattr(groups, "mpu", None)
        for name in ("_SEQUENCE_PARALLEL_GROUP", "_SEQUENCE_DATA_PARALLEL_GROUP"):
            patch.setattr(parallel_state_sp, name, None)
        yield
    unset_hf_deepspeed_config()


@pytest.fixture(scope="module")
def deepspeed_ranks():
    """Of their own: what DeepSpeed sets, it sets for a process's life."""
    processes = {"two": Ranks(2), "four": Ranks(4)}
    yield processes
    for each in processes.values():
        each.stop()


def exchanging(stage, directory, pairs, tmp_path, zero=None, **options):
    """A trainer whose sequences are shared out over two ranks of DeepSpeed's."""
    small = {"stage3_param_persistence_threshold": 0}  # tensors are sharded too
    config = {
        "zero_optimization": {"stage": stage, **small, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    batches = distributed.get_world_size() // 2
    parallelism = ParallelismConfig(sp_size=2, dp_shard_size=batches)
    options = {"deepspeed": config, "parallelism_config": parallelism} | options
    options["per_device_train_batch_size"] = 2 // batches
    return make_trainer(OURS, directory, pairs, tmp_path, **options)


def run_ulysses(rank, names, directory, pairs, tmp_path):
    import deepspeed

    runs = []
    for name in names:
        options = {**STEADY, "eval_pairs": pairs[:3], **ULYSSES[name]}
        with ulysses():
            trainer = exchanging(STAGES[name], directory, pairs, tmp_path / name, **options)
            logs, _ = trained(trainer)
            shared_out = [p for p in trainer.model.parameters() if hasattr(p, "ds_id")]
            with deepspeed.zero.GatheredParameters(shared_out):
                weights = trained_weights(trainer)
            runs.append((logs, weights, trainer.evaluate()))
    return runs


@pytest.mark.deepspeed
@pytest.mark.parametrize(("group", "names"), [("two", [*ULYSSES]), ("four", ["precomputed"])])
def test_ulysses_trains_as_one_process(group, names, deepspeed_ranks, tiny_llama, pairs, tmp_path):
    ranks = deepspeed_ranks[group].run(run_ulysses, names, tiny_llama, pairs, tmp_path, seconds=200)
    for name, *found in zip(names, *ranks, strict=True):
        options = {**STEADY, "eval_pairs": pairs[:3], **ULYSSES[name]}
        whole = make_trainer(OURS, tiny_llama, pairs, tmp_path / "one", **options)
        expected = *trained(whole), whole.evaluate()
        for each in found:
            compare(each, expected)


def windows(directory):
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=4))
    return {"model": model, "objective": "simpo"}


def other_attention(directory):
    eager = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return {"ref_model": eager}


def bypassing(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model._supports_attention_backend = False
    return {"model": model}


def sums_and_means(directory):
    return {"zero": {"stage": 3, "reduce_scatter": False}}


def beside_tensors(directory):
    return {"parallelism_config": ParallelismConfig(sp_size=2, tp_size=2)}


REFUSED_BY_ULYSSES = {
    beside_tensors: "sp_size=2 does not go with tp_size",
    sums_and_means: "sp_size=2 does not go with ZeRO-3 without reduce_scatter",
    windows: "sp_size=2 does not go with layers of type sliding_attention",
    other_attention: "sp_size=2 does not go with a reference with another attention",
    bypassing: "sp_size=2 does not go with a model whose attention is not one of transformers'",
}


def refused_by_ulysses(rank, directory, pairs, tmp_path):
    found = []
    for options in REFUSED_BY_ULYSSES:
        with ulysses():
            try:
                given = {"objective": "dpo"} | options(directory)
                exchanging(2, directory, pairs, tmp_path, **given)
            except ValueError as error:
                found.append(str(error))
    with ulysses():
        trainer = exchanging(2, directory, pairs, tmp_path, objective="dpo")
        collator = trainer.data_collator.collator
        collator.pad_to_multiple_of = 3
        try:
            trainer.train()
        except ValueError as error:
            found.append(str(error))
        collator.pad_to_multiple_of, trainer.data_collator = 2, on_the_left(trainer.data_collator)
        try:
            trainer.train()
        except ValueError as error:
            found.append(str(error))
        attends_alone(rank, directory)
    return found


def on_the_left(collator):
    """The same sequences behind their padding."""
    return lambda examples: {
        name: x.flip(1) if name.endswith(("ids", "mask")) else x
        for name, x in collator(examples).items()
    }


def attends_alone(rank, directory):
    """What is no trainer's step has whole sequences, others on each rank, and masks."""
    ids = torch.arange(12).view(2, 6) + 20 * (rank + 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    logits = [
        AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name)(
            ids, attention_mask=mask
        ).logits[mask.bool()]
        for name in ("sdpa", "eager")
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-5


@pytest.mark.deepspeed
def test_what_ulysses_would_get_wrong_is_refused(deepspeed_ranks, tiny_llama, pairs, tmp_path):
    uneven = "sp_size=2 shares out sequences in 2 equal chunks, and the batch has"
    left = "sp_size=2 shares out sequences that are padded on the right"
    expected = [*REFUSED_BY_ULYSSES.values(), uneven, left]
    for found in deepspeed_ranks["two"].run(refused_by_ulysses, tiny_llama, pairs, tmp_path):
        assert len(found) == len(expected)
        for text, beginning in zip(found, expected, strict=True):
            assert text.startswith(beginning)
