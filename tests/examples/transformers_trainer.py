"""SimPO in `transformers.Trainer`, by `compute_loss_func`.

python tests/examples/transformers_trainer.py MODEL PAIRS.jsonl --output_dir OUT [more]

The model's forward gives the sum of its pairs' losses. What the trainer counts as items are the
labels: one a pair, so that the loss is the mean over all pairs of a step, accumulated or not.
"""

from functools import partial

import torch
from pairs import collate, read_pairs
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import fastpref


class WithLoss(nn.Module):
    """The loss is in the forward that DDP and FSDP wrap: the head is whole there, and in use."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, input_ids, attention_mask, targets):
        hidden = self.policy.model(input_ids, attention_mask=attention_mask).last_hidden_state
        out = fastpref.preference_loss(
            hidden, self.policy.lm_head.weight, targets, fastpref.SimPO(), reduction="sum"
        )
        return {"summed_loss": out.loss}


def mean_over_pairs(outputs, labels, num_items_in_batch=None):
    return outputs["summed_loss"] / (
        len(labels) if num_items_in_batch is None else num_items_in_batch
    )


def with_labels(pairs, tokenizer):
    return collate(pairs, tokenizer) | {"labels": torch.ones(len(pairs), dtype=torch.int64)}


def main():
    parser = HfArgumentParser(TrainingArguments)
    args, (model, data) = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    args.remove_unused_columns = False
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = Trainer(
        WithLoss(policy),
        args=args,
        train_dataset=read_pairs(data),
        data_collator=partial(with_labels, tokenizer=tokenizer),
        compute_loss_func=mean_over_pairs,
    )
    trainer.train()
    policy.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
