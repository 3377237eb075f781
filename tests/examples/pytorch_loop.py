"""DPO in a plain PyTorch loop, on one process or on several.

python tests/examples/pytorch_loop.py MODEL PAIRS.jsonl OUT
torchrun --nproc-per-node 2 tests/examples/pytorch_loop.py MODEL PAIRS.jsonl OUT
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from pairs import collate, read_pairs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpref

PAIRS_A_STEP = 4


class WithLoss(nn.Module):
    """The loss is in the forward that DDP and FSDP wrap: the head is whole there, and in use."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, input_ids, attention_mask, targets, ref_logps):
        hidden = self.policy.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return fastpref.preference_loss(
            hidden, self.policy.lm_head.weight, targets, fastpref.DPO(beta=0.1), ref_logps=ref_logps
        ).loss


@torch.no_grad()
def log_probabilities(model, input_ids, attention_mask, targets):
    hidden = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
    return fastpref.sequence_logps(hidden, model.lm_head.weight, targets)[0]


def main(model, data, out):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group()
    train(model, data, out, rank, world)
    if world > 1:  # after DDP's hold on the group has gone: it could wait for ever to let go
        dist.destroy_process_group()


def train(model, data, out, rank, world):
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    reference = copy.deepcopy(policy).eval()
    trained = WithLoss(policy)
    if world > 1:
        trained = DistributedDataParallel(trained)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    pairs = read_pairs(data)
    for start in range(0, len(pairs) - PAIRS_A_STEP + 1, PAIRS_A_STEP):
        mine = pairs[start : start + PAIRS_A_STEP][rank::world]
        batch = {name: x.to(device) for name, x in collate(mine, tokenizer).items()}
        loss = trained(**batch, ref_logps=log_probabilities(reference, **batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"loss {loss.item():.4f}")
    if rank == 0:
        policy.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
