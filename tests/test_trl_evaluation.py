"""What an evaluation reports: means over the data set, however it is cut into batches."""

import pytest
import torch
from datasets import Dataset
from trl_runs import OURS, make_trainer

# Pair-wise, token-wise, of the objective, and the loss, which Trainer itself averages.
METRICS = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "logps/rejected",
    "weights/quality",
    "entropy",
    "mean_token_accuracy",
    "logits/chosen",
)


def evaluated(directory, pairs, tmp_path, batch_size):
    trainer = make_trainer(
        OURS,
        directory,
        pairs,
        tmp_path,
        eval_pairs=pairs,
        objective="unidpo",
        per_device_eval_batch_size=batch_size,
    )
    with torch.no_grad():  # away from its reference, where every reward is 0
        trainer.model.lm_head.weight.mul_(1.5)
    return trainer.evaluate()


def evaluate_as(rank, directory, sets, tmp_path):
    return [evaluated(directory, pairs, tmp_path, batch_size=2) for pairs in sets]


def assert_same_metrics(found, expected):
    """Sums of fp32 in another order: a few roundings of 2⁻²⁴ each."""
    for name in METRICS:
        value = expected[f"eval_{name}"]
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_uneven_batches_count_every_pair_once(batch_size, tiny_llama, pairs, tmp_path):
    whole = evaluated(tiny_llama, pairs[:5], tmp_path, batch_size=5)
    assert abs(whole["eval_rewards/margins"]) > 0.01
    assert_same_metrics(evaluated(tiny_llama, pairs[:5], tmp_path, batch_size), whole)


@pytest.mark.parametrize("options", [{"loss_type": "sft"}, {"loss_type": ["aot"]}, {}], ids=str)
def test_what_fills_a_batch_up_does_not_count(options, tiny_llama, pairs, tmp_path, monkeypatch):
    """Losses of whole batches too are those of the pairs evaluated for the first time."""
    trainer = make_trainer(OURS, tiny_llama, pairs, tmp_path, **options)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    trainer.model.eval()

    def loss_of(rows, first_time):
        monkeypatch.setattr(trainer, "_first_time", lambda pairs: first_time)
        batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, batch).item()
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        trainer._metrics["eval"].clear()
        return metrics | {"loss": loss}

    alone = loss_of([0, 1], 2)
    assert abs(alone["rewards/margins"]) > 0.01
    assert loss_of([0, 1, 5], 2) == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert loss_of([4, 5], 0)["loss"] == 0


def test_an_evaluation_starts_anew(tiny_llama, pairs, tmp_path):
    trainer = make_trainer(
        OURS,
        tiny_llama,
        pairs,
        tmp_path,
        objective="unidpo",
        eval_pairs={"a": pairs[:3], "b": pairs[3:]},
    )
    alone = trainer.evaluate(trainer.eval_dataset["b"])
    trainer.predict(trainer.eval_dataset["a"])
    assert_same_metrics(trainer.evaluate(trainer.eval_dataset["b"]), alone)


def test_processes_count_every_pair_once(ranks, tiny_llama, pairs, tmp_path):
    """Of 5 pairs, 2 a batch, both processes repeat some at the end; of 7 one does, of 8 none.

    Of four processes one has no pair of 5 for itself. Streams of 8 divide, too.
    """
    stream = Dataset.from_list(pairs).to_iterable_dataset()
    sets = (pairs[:5], pairs[:7], pairs, stream) if ranks.world == 2 else (pairs[:5], stream)
    wholes = [evaluated(tiny_llama, each, tmp_path, batch_size=8) for each in sets]
    for found in ranks.run(evaluate_as, tiny_llama, sets, tmp_path, seconds=180):
        for ours, whole in zip(found, wholes, strict=True):
            assert_same_metrics(ours, whole)
