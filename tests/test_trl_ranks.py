"""A step of several processes and accumulated batches is the step of one process, uneven or not."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from trl_runs import OURS, STOCK, make_trainer, trained

# Gradients of fp32 in another order of sums: a few roundings, of gradients up to 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OBJECTIVES = {
    "dpo": {"objective": "dpo"},
    "unidpo": {"objective": "unidpo"},
    "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5},
}


class Uneven(torch.utils.data.Sampler):
    """Batches of the sizes that are asked for, in the data set's order."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size

    def __len__(self):
        return len(self.sizes)


def gradients(directory, pairs, tmp_path, sizes, options, rank=0):
    """Of the first step over batches of these sizes, this rank's; and the logged loss."""
    start = sum(map(sum, sizes[:rank]))
    trainer = make_trainer(
        OURS,
        directory,
        pairs[start:],
        tmp_path,
        **({"max_grad_norm": 0.0, "max_steps": 1} | options),
        gradient_accumulation_steps=len(sizes[rank]),
    )
    with torch.no_grad():  # away from its reference, where every margin is 0
        trainer.model.lm_head.weight.mul_(1.5)
    loader = torch.utils.data.DataLoader(
        trainer.train_dataset,
        batch_sampler=Uneven(sizes[rank]),
        collate_fn=trainer.data_collator,
    )
    trainer.get_train_dataloader = lambda: loader
    found = {}

    def keep(*_, **__):
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    assert len(sizes) == 1 or isinstance(trainer.model_wrapped, DistributedDataParallel)
    return found, trainer.state.log_history[0]["loss"]


def gradients_of_rank(rank, directory, pairs, tmp_path, sizes, names):
    return [gradients(directory, pairs, tmp_path, sizes, OBJECTIVES[n], rank) for n in names]


def assert_same_step(found, expected):
    (grads, loss), (their_grads, their_loss) = found, expected
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_short_batches_of_an_accumulated_step(name, tiny_llama, pairs, tmp_path):
    def of(sizes):
        return gradients(tiny_llama, pairs, tmp_path, [sizes], OBJECTIVES[name])

    whole = of([6])
    assert max(grad.abs().max() for grad in whole[0].values()) > 0.01
    assert_same_step(of([3, 1, 2]), whole)


def test_ranks_with_different_numbers_of_pairs(ranks, tiny_llama, pairs, tmp_path):
    names = ("mixture", "unidpo")[: 4 // ranks.world]
    sizes = [[1, 2], [3, 1], [1, 1], [2, 1]][: ranks.world]
    doubled = pairs + pairs
    total = sum(map(sum, sizes))
    wholes = [
        gradients(tiny_llama, doubled, tmp_path, [[total]], OBJECTIVES[name]) for name in names
    ]
    arguments = tiny_llama, doubled, tmp_path, sizes, names
    everybody = ranks.run(gradients_of_rank, *arguments, seconds=180)
    for found in everybody:
        for step, whole in zip(found, wholes, strict=True):
            assert_same_step(step, whole)


def test_coupled_pairs_count_batch_by_batch(tiny_llama, pairs, tmp_path):
    """AOT sorts a batch: each keeps its own mean, and weighs as many as its pairs."""

    def of(these, sizes):
        return gradients(tiny_llama, these, tmp_path, [sizes], {"loss_type": "aot"})

    (long, loss), (short, last) = of(pairs[:3], [3]), of(pairs[3:4], [1])
    expected = {name: (3 * long[name] + short[name]) / 4 for name in long}
    assert_same_step(of(pairs[:4], [3, 1]), (expected, (3 * loss + last) / 4))


def test_even_batches_are_those_of_stock(tiny_llama, pairs, tmp_path):
    """A share of exactly 1: what TRL logs of a mixture of pairs and tokens, of equal lengths."""
    same = [pair | {"chosen": pairs[0]["chosen"]} for pair in pairs]
    options = {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "gradient_accumulation_steps": 2,
    }
    runs = [
        trained(make_trainer(kind, tiny_llama, same, tmp_path, **options))[0]
        for kind in (OURS, STOCK)
    ]
    for ours, theirs in zip(*runs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
