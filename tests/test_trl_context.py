"""Training with the positions of every sequence shared out over ranks is training as one process.

accelerate refuses context parallelism on a CPU, and torch's ring attention has no kernel there: the
refusal is lifted, and attention looks at gathered keys and values. All else is as on a GPU: who
gets which batch, who shares out what, and whose gradients are averaged.
"""

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, PromptTuningConfig
from torch import distributed
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl_runs import OURS, compare_runs, make_trainer, trained

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
    options = {"max_grad_norm": 0.0, "eval_pairs": pairs[:3], **CASES[name]}
    if distributed.get_world_size() > 2:
        options["per_device_train_batch_size"] = 1  # of two, the same batch of two pairs
    with pytest.MonkeyPatch.context() as patch:
        trainer = shared_out(directory, pairs, tmp_path, patch, **options)
        before = trainer.evaluate()
        return *trained(trainer), before, trainer.evaluate()


def is_as_one_process(ranks, name, directory, pairs, tmp_path):
    options = {"max_grad_norm": 0.0, "eval_pairs": pairs[:3], **CASES[name]}
    whole = make_trainer(OURS, directory, pairs, tmp_path, **options)
    before = whole.evaluate()
    before.pop("eval_rewards/accuracies")  # the policy is its reference: of rounding
    *expected, evaluated = *trained(whole), [before, whole.evaluate()]
    for *found, their_before, theirs in ranks.run(run, name, directory, pairs, tmp_path):
        compare_runs(found, expected, relative=1e-4)
        for mine, other in zip((their_before, theirs), evaluated, strict=True):
            for metric, value in other.items():
                if not metric.endswith(("time", "per_second")):
                    assert mine[metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


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
    "predictions": ({}, "predictions are logits, of which cp_size=2 leaves each rank a part"),
    "ulysses": ({}, "sp_size shares positions out by DeepSpeed's Ulysses"),
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
