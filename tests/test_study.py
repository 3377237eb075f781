"""The study of objectives: what it trains, looks at and keeps, on a tiny model."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import PAIRS

import fastpref
from fastpref.objectives import PairLogps

sys.path.append(
    str(Path(__file__).parent.parent / "bench")
)  # last: it has modules of names that are here too
import study
from trials import measures, properties
from trials.arms import ARMS, MAIN
from trials.pairs import TokenPair, collate, order
from trials.training import Bench, Sizes

TINY = Sizes(
    prompt=16, response=6, train=4, validation=2, heldout=2, steps=3, sweep_steps=2, batch=2,
    prompts=2, drawn=5, seeds=(1, 2),
)  # fmt: skip
TEMPLATE = "{{ messages[0]['content'] }} is"


@pytest.fixture
def bench(tiny_llama, pairs_file, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return Bench(model, pairs_file, TINY, tmp_path / "references.json")


def test_what_is_kept_aside_is_not_trained_on(bench):
    parts = [{tuple(p.chosen + p.rejected) for p in part} for part in vars(bench.split).values()]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert len(set.union(*parts)) == len(PAIRS)
    assert len(bench.references["train"]) == 4


def test_every_objective_sees_the_same_pairs():
    taken = order(5, 12, seed=3)
    assert taken == order(5, 12, seed=3) != order(5, 12, seed=4)
    assert sorted(taken[:5]) == sorted(taken[5:10]) == [*range(5)]


def test_a_response_is_scored_and_its_prompt_is_not():
    batch = collate([TokenPair([7, 8], [3, 4, 5], [6], (1.0, 0.5))])
    assert batch.input_ids.tolist() == [[7, 8, 3, 4, 5], [7, 8, 6, 0, 0]]
    assert batch.targets.tolist() == [[-100, 3, 4, 5, -100], [-100, 6, -100, -100, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.scores.tolist() == [1.0, 0.5]


def test_a_run_begins_at_the_reference_and_repeats(bench):
    objective = fastpref.AdaDPO()
    options = {"rate": 1e-2, "steps": 3, "judged_on": "heldout"}
    first = bench.run(objective, seed=1, **options)
    assert first["training"]["log_ratio/chosen"][:2] == pytest.approx([0, 0], abs=1e-5)
    assert any(abs(value) > 1e-3 for value in first["heldout"]["log_ratio/chosen"])
    assert first["drawn"]["divergence"] > 0
    other = bench.run(objective, seed=2, **options)  # leaves nothing behind in the model
    again = bench.run(objective, seed=1, **options)
    for found in (first, other, again):
        del found["seconds"]
    assert again == first != other


def test_an_untrained_model_is_its_reference(bench):
    drawn = measures.sample(bench.model, bench.tokenizer, bench.split.heldout, tokens=5, seed=0)
    assert drawn["divergence"] == pytest.approx(0, abs=1e-6)
    assert 1 <= drawn["length"] <= 5


@pytest.mark.parametrize("name", ARMS)
def test_slopes_are_the_gradients_of_the_loss(name):
    """By differences: a step of ρ that the balance, a constant, does not see."""
    objective, pairs = ARMS[name].objective, properties.fixed_pairs()
    found = measures.slopes(objective, pairs)
    assert all(slope.isfinite().all() and slope.any() for slope in found)
    if objective.balance is not None:
        return
    by = 1e-6
    for side, slope in zip(("chosen", "rejected"), found, strict=True):
        unit = getattr(pairs, f"{side}_lengths") if objective.length_normalized else 1.0

        def moved(step, side=side, unit=unit) -> PairLogps:
            logps = getattr(pairs, f"{side}_logps")
            return dataclasses.replace(pairs, **{f"{side}_logps": logps + step * unit})

        expected = (objective(moved(by)) - objective(moved(-by))) / (2 * by)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-9)


def test_balanced_gradients_are_equal():
    report = properties.balance_report()
    assert len(report) == 10
    assert max(report.values()) < 1e-6
    plain = measures.look(fastpref.DPO(), properties.fixed_pairs())
    both = zip(plain["gradient/chosen"], plain["gradient/rejected"], strict=True)
    ratios = [chosen / rejected for chosen, rejected in both]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.1


def test_unidpo_has_the_published_gradient():
    assert max(properties.unidpo_report().values()) < 1e-12


def test_trainings_are_kept_and_go_on(bench, tmp_path, monkeypatch):
    """A sweep of five settings an arm, then every arm and seed; nothing twice."""
    trained = []

    def run(objective, **settings):
        trained.append((repr(objective), settings["rate"], settings["seed"]))
        look = {"margin": [1.0, -1.0 if settings["rate"] == 2e-4 else 1.0]}
        done = {name: settings[name] for name in ("rate", "steps", "seed")}
        return {"objective": repr(objective), **done, settings["judged_on"]: look}

    monkeypatch.setattr(bench, "run", run)
    progress = study.Progress(disable=True)
    trials = study.Trials(bench, tmp_path, progress, ends=float("inf"))
    # The gentlest of the best rates, and of the best βs the largest, which stays nearest.
    assert trials.sweep(ARMS["DPO"]) == (5e-5, 2.0)
    assert len(trained) == 5
    assert trials.sweep(ARMS["DPO"]) == (5e-5, 2.0)
    assert len(trained) == 5
    trials.train(MAIN[0], 5e-5, 2.0, 1)
    trials.train(MAIN[0], 5e-5, 2.0, 1)
    assert len(trained) == 6
    trials.train(MAIN[0], 5e-5, 1.0, 1)  # other settings: not what is kept
    assert len(trained) == 7
    kept = json.loads((tmp_path / "dpo-seed-1.json").read_text())
    assert kept["arm"] == "DPO" and kept["objective"] == repr(fastpref.DPO())
    trials.ends = 0
    with pytest.raises(study.TimeIsUp):
        trials.train(MAIN[0], 5e-5, 2.0, 2)
