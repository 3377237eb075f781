"""The study of objectives: what it trains, looks at and keeps, on a tiny model."""

import dataclasses
import json
import re
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
from trials import claims, measures, page, properties, summary
from trials.arms import ARMS, MAIN
from trials.pairs import TokenPair, collate, order
from trials.training import Bench, Sizes, rounded

from fastpref.commands.benchmark.report import insert_tables

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
    assert batch.completion_mask.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]
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


# --- the page -----------------------------------------------------------------------------------

MADE_UP = Sizes(steps=10, sweep_steps=2, batch=2, heldout=20, validation=4, seeds=(1, 2, 3))


def made_up_run(arm: str, seed: int, *, steps: int, judged_on: str, shift: float = 0.0) -> dict:
    """What a run's file holds: all pairs gain a margin, of which `shift` is the chosen side's."""
    objective, chance = ARMS[arm].objective, torch.Generator().manual_seed(seed)

    def drawn(count: int) -> torch.Tensor:
        return torch.rand(count, generator=chance, dtype=torch.float64)

    def table(count: int) -> dict[str, list[float]]:
        lengths = torch.arange(2 * count) % 5 + 4.0
        references = -lengths * (1.0 + torch.arange(2 * count) % 3)
        logps = references + 0.1 * drawn(2 * count)
        logps[:count] += shift
        scores = torch.cat([5 + 3 * drawn(count), 4 * drawn(count)])
        return measures.look(
            objective, measures.pair_logps(logps, lengths, references, scores.sort()[0].flip(0))
        )

    judged = MADE_UP.heldout if judged_on == "heldout" else MADE_UP.validation
    run = {"name": f"{arm}, {seed}", "arm": arm, "objective": repr(objective), "rate": 2e-4}
    run |= {"steps": steps, "seed": seed, "seconds": 60.0}
    run |= {"training": table(steps * MADE_UP.batch), judged_on: table(judged)}
    if judged_on == "heldout":
        held = run["heldout"]
        held |= {name: table(judged)[name] for name in ("length/chosen", "length/rejected")}
        held["gap"] = [1.0] * judged
        run["drawn"] = {"length": 20.0 + seed, "divergence": 0.01}
    return rounded(run)


def write_runs(directory: Path, arms, seeds=(1, 2), **shifts: float) -> Path:
    """`directory`/runs and the references beside; the page's command is given the former."""
    runs = directory / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    parts = {"train": 30, "validation": MADE_UP.validation, "heldout": MADE_UP.heldout}
    references = {name: [[-20.0, -21.0]] * count for name, count in parts.items()}
    (directory / "references.json").write_text(json.dumps(references))
    for arm in arms:
        shift = shifts.get(arm, 0.0)
        made = [
            made_up_run(arm, seed, steps=MADE_UP.steps, judged_on="heldout", shift=shift)
            for seed in seeds
        ]
        if ARMS[arm].like == arm:
            made.append(made_up_run(arm, 1, steps=MADE_UP.sweep_steps, judged_on="validation"))
        for number, run in enumerate(made):
            (runs / f"{arm} {number}.json").write_text(json.dumps(run))
    return runs


def test_what_shows_is_larger_than_seeds_and_pairs_leave_open():
    def found(*seeds: float, pairs=(0.0, 0.0)) -> summary.Estimate:
        return summary.estimate({str(s): [v + by for by in pairs] for s, v in enumerate(seeds)})

    assert found(1.0, 1.1, 1.2).shows == 1
    assert found(-1.0, -1.1, -1.2).shows == -1
    assert found(0.1, 1.0, 1.2).shows == 0  # one sign, but they spread
    assert found(-0.1, 1.0, 1.2).shows == 0
    assert found(1.0).shows == 0
    # A standard error of 3 / √2 · √2 / √2 = 1.5 on either side of the mean: two of them hide 2.9.
    assert found(2.9, 2.9, pairs=(-1.5, 1.5)).error == pytest.approx(1.5)
    assert found(2.9, 2.9, pairs=(-1.5, 1.5)).shows == 0
    assert found(3.1, 3.1, pairs=(-1.5, 1.5)).shows == 1


def test_arms_are_compared_pair_by_pair_and_seed_by_seed():
    """What pairs or seeds have in common is no uncertainty of a difference."""
    first = {"1": [1.0, 9.0], "2": [101.0, 109.0], "3": [7.0, 7.0]}
    second = {"2": [100.0, 108.0], "1": [0.0, 8.0]}
    by = summary.difference(first, second)
    assert by == summary.Estimate((1.0, 1.0), 0.0)
    assert by.shows == 1


def test_a_run_in_numbers():
    def run(**late) -> dict:
        table = {
            "log_ratio/chosen": [9, 9, 1, -3], "log_ratio/rejected": [9, 9, 0, -5],
            "length/chosen": [9, 9, 2, 1], "length/rejected": [9, 9, 1, 1],
            "gap": [9, 9, 1, 2], "margin": [9, 9, 1, -2],
            "gradient/chosen": [9, 9, 2, 4], "gradient/rejected": [9, 9, 1, 16], **late,
        }  # fmt: skip
        drawn = {"length": 7.0, "divergence": 0.5}
        return {"training": table, "heldout": table, "drawn": drawn, "seconds": 90}

    plain = summary.summarise(run(), Sizes(batch=2))
    assert plain["minutes"] == 1.5
    ratio, apart = (2 * 4 / 16) ** 0.5, (2 * 4) ** 0.5  # 2 and 1/4: 2 and 4 times apart
    assert plain["numbers"] == {
        "KL": 0.5, "drawn length": 7.0,
        "gradient ratio": pytest.approx(ratio), "imbalance": pytest.approx(apart),
    }  # fmt: skip
    assert plain["curves"]["log_ratio/chosen"] == [9, -1]
    assert plain["curves"]["gradient/rejected"] == pytest.approx([9, 4])
    balanced = {
        "balance/chosen": [0, 0, 1, 2], "balance/rejected": [1] * 4, "balance/clipped": [0, 0, 0, 1]
    }  # fmt: skip
    numbers = summary.summarise(run(**balanced), Sizes(batch=2))["numbers"]
    assert numbers["largest imbalance, unclipped"] == pytest.approx(2)
    assert numbers["share clipped"] == 0.5 and numbers["chosen coefficient"] == 1.5
    weighted = {"weights/quality": [9, 9, 0.6, 0.7], "weights/performance": [9, 9, 0.1, 0.9]}
    weights = summary.summarise(run(**weighted), Sizes(batch=2))["weights"]
    assert weights["quality by score gap"] == [[1, 0.6], [2, 0.7]]
    assert weights["performance by margin"] == [[-2, 0.9], [1, 0.1]]


def test_fifths_of_the_pairs():
    found = summary.in_bins([*range(10)][::-1], [x**2 for x in range(10)][::-1])
    assert found == [[x + 0.5, (x**2 + (x + 1) ** 2) / 2] for x in range(0, 10, 2)]


def test_metrics_of_held_out_pairs():
    run = {"margin": [1.0, -1.0, 0.0], "chosen": [2.0, -1.0, 0.0], "rejected": [1.0, 3.0, 0.0]}
    pairs = {
        "chosen length": [4, 1, 1],
        "rejected length": [1, 1, 2],
        "reference's margin of averages": [0.0, 5.0, 0.1],
    }
    study_json = {
        "heldout": pairs,
        "arms": {"DPO": {"seeds": {"1": {"heldout": run, "numbers": {"KL": 0.2}}}}},
    }
    expected = {
        "chosen": [2, -1, 0], "both": [3, 2, 0], "margin": [1, -4, 0], "accuracy": [1, 0, 0],
        "accuracy of sums": [1, 0, 0], "accuracy of averages": [0, 0, 0],
        "accuracy without reference": [0, 1, 1], "KL": [0.2],
    }  # fmt: skip
    for name, values in expected.items():
        assert summary.seeds_of(study_json, "DPO", name) == {"1": values}
    assert [summary.longer(study_json, sign) for sign in (1, 0, -1)] == [[0], [1], [2]]


def test_verdicts_of_made_up_runs(tmp_path):
    arms = ("DPO", "AdaDPO", "AdaDPO, ratio space", "AdaDPO, ceiling 1.5", "Uni-DPO")
    shifts = {"DPO": -3.0, "AdaDPO": 2.0, "AdaDPO, ratio space": 2.0, "AdaDPO, ceiling 1.5": -2.0}
    found = summary.study_of(write_runs(tmp_path, arms, (1, 2, 3), **shifts), MADE_UP)
    verdicts = {
        claim.text: claim.judged(found)[1] for some in claims.CLAIMS.values() for claim in some
    }
    for text, verdict in {
        "Under DPO even the chosen ones fall": claims.HOLDS,
        "AdaDPO lifts chosen responses above DPO's": claims.HOLDS,
        "AdaDPO makes the two gradients of a pair equal where nothing is clipped": claims.HOLDS,
        "With its clipping too they are closer than DPO's": claims.HOLDS,
        "Policy space and ratio space do alike": claims.HOLDS,
        "Ceilings from 1.5 to 2.5 do alike (here 2 and 1.5)": claims.CONTRADICTS,
        "A ceiling of 5 hurts (beside 2)": claims.NOT_RUN,
        "Pairs of a large score gap weigh more": claims.HOLDS,
        "And better than SimPO": claims.NOT_RUN,
    }.items():
        assert verdicts[text] == verdict, text
    swapped = {"DPO": 3.0, "AdaDPO": 2.0}
    other = summary.study_of(write_runs(tmp_path / "2", swapped, (1, 2, 3), **swapped), MADE_UP)
    claimed = {claim.text: claim.judged(other) for claim in claims.CLAIMS["AdaDPO"]}
    assert claimed["AdaDPO lifts chosen responses above DPO's"][1] == claims.CONTRADICTS
    assert claimed["Under DPO even the chosen ones fall"][1] == claims.CONTRADICTS
    one = summary.study_of(write_runs(tmp_path / "3", ["DPO"], (1,)), MADE_UP)
    assert claims.CLAIMS["AdaDPO"][0].judged(one)[1] == "one seed"


def test_what_a_run_keeps_is_what_the_page_reads(bench, tmp_path, monkeypatch):
    """Real files of a tiny model; the references lie beside them."""
    (tmp_path / "runs").mkdir()
    progress = study.Progress(disable=True)
    trials = study.Trials(bench, tmp_path / "runs", progress, ends=float("inf"))
    for name in ("AdaDPO", "Uni-DPO"):
        trials.train(ARMS[name], 2e-4, 2.0, 1)
    monkeypatch.setattr(study, "Sizes", lambda: TINY)
    text = shutil.copy(study.PAGE, tmp_path / "STUDY.md")
    study.page(runs=tmp_path / "runs", out=tmp_path, text=text)
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["pairs"] == {"train": 4, "validation": 2, "heldout": 2}
    assert found["arms"]["AdaDPO"]["factor"] == 2 and found["arms"]["AdaDPO"]["rate"] == 2e-4
    run = json.loads((tmp_path / "runs" / "uni-dpo-seed-1.json").read_text())
    of_seed = found["arms"]["Uni-DPO"]["seeds"]["1"]
    assert of_seed["heldout"]["chosen"] == run["heldout"]["log_ratio/chosen"]
    assert of_seed["numbers"]["KL"] == run["drawn"]["divergence"]
    assert len(of_seed["curves"]["weights/performance"]) == TINY.steps
    held = bench.split.heldout[0]  # the first pair's margin of averages, before training
    chosen, rejected = bench.references["heldout"][0]
    assert found["heldout"]["reference's margin of averages"][0] == pytest.approx(
        chosen / len(held.chosen) - rejected / len(held.rejected), rel=1e-3
    )


def test_arms_that_share_no_seed_or_no_settings_say_so(tmp_path):
    def cells(text: str) -> list[str]:
        table = page.tables(summary.study_of(tmp_path / "runs", MADE_UP))["claims: AdaDPO"]
        return next(line for line in table.split("\n") if text in line).split(" | ")[1:]

    write_runs(tmp_path, ["DPO"], (1, 2))
    runs = write_runs(tmp_path, ["AdaDPO"], (3, 4))
    assert cells("above DPO's |")[1] == f"**{claims.NOT_RUN}** |"
    write_runs(tmp_path, ["AdaDPO"], (1, 2))
    assert "settings differ" not in cells("lifts")[1]
    for path in runs.glob("AdaDPO*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rate": 8e-4}))
    assert cells("lifts")[1].endswith("**, settings differ |")
    assert "settings differ" not in cells("Under DPO")[1]


def test_claims_are_of_arms_and_metrics_that_exist(tmp_path):
    found = summary.study_of(write_runs(tmp_path, ARMS), MADE_UP)
    for claim in (claim for some in claims.CLAIMS.values() for claim in some):
        assert set(claim.arms) <= set(ARMS)
        seen, verdict = claim.judged(found)
        assert seen and verdict in (claims.HOLDS, claims.CONTRADICTS, claims.UNCLEAR)


@pytest.mark.parametrize("arms", [[*ARMS], ["DPO", "AdaDPO"], ["SimPO"]], ids=len)
def test_the_page_is_written(tmp_path, monkeypatch, arms):
    runs, text = write_runs(tmp_path, arms), tmp_path / "STUDY.md"
    shutil.copy(study.PAGE, text)
    monkeypatch.setattr(study, "Sizes", lambda: MADE_UP)
    study.page(runs=runs, out=tmp_path, text=text)
    found = json.loads((tmp_path / "study.json").read_text())
    assert [*found["arms"]] == [arm for arm in ARMS if arm in arms]
    written = text.read_text()
    for name, table in page.tables(found).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end {name} -->" in written
        widths = {line.replace("\\|", "").count("|") for line in table.split("\n") if "|" in line}
        assert len(widths) == 1, name
    for arm in ARMS:
        assert (arm in written.split("Not run yet: ")[-1].split("\n")[0]) or arm in arms
    charts = {path.name for path in tmp_path.glob("study-*.png")}
    assert {"study-logps.png", "study-gradients.png", "study-heldout.png"} <= charts
    if len(arms) == len(ARMS):
        assert charts == {Path(chart).name for chart in re.findall(r"results/(\S+png)", written)}
        assert "Not run yet" not in written
    for chart in tmp_path.glob("*.png"):
        assert chart.read_bytes()[:4] == b"\x89PNG" and chart.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.0}, "seeds of different settings"),
        ({"steps": 3}, "3 steps, where 10 are looked for"),
        ({"arm": "PPO"}, "no arm of the study"),
        ({"objective": "DPO(beta=7)"}, "different settings"),
    ],
)
def test_runs_that_do_not_belong_together_are_named(tmp_path, changes, message):
    runs = write_runs(tmp_path, ["DPO"])
    path = runs / "DPO 0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        summary.study_of(runs, MADE_UP)


def test_runs_of_other_pairs_are_named(tmp_path):
    runs = write_runs(tmp_path, ["DPO"])
    run = json.loads((runs / "DPO 0.json").read_text())
    run["heldout"]["gap"][0] += 1
    (runs / "DPO 0.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="different held-out pairs"):
        summary.study_of(runs, MADE_UP)


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(study.typer.BadParameter, match="no run of an arm that has ended"):
        study.page(runs=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_without_their_references_are_an_error(tmp_path, monkeypatch):
    runs = write_runs(tmp_path, ["DPO"])
    (tmp_path / "references.json").unlink()
    monkeypatch.setattr(study, "Sizes", lambda: MADE_UP)
    with pytest.raises(study.typer.BadParameter, match="references.json"):
        study.page(runs=runs, out=tmp_path / "out")


def test_the_page_has_the_figures_of_the_file():
    path, text = study.PAGE.parent / "results" / "study.json", study.PAGE.read_text()
    tables = page.tables(json.loads(path.read_text()))
    assert insert_tables(text, tables) == text
    rows = [line.split("|")[2:5] for line in tables["verdicts"].splitlines()[2:4]]
    counts = tuple(sum(int(row[i]) for row in rows) for i in range(3))  # of the two papers
    readme = " ".join((study.PAGE.parent.parent / "README.md").read_text().split())
    said = "{} of {} hold, {} do not show at that size, {} is contradicted"
    assert said.format(counts[0], sum(counts), *counts[1:]) in readme
    charts = re.findall(r"results/(study-\S+png)", text)
    assert charts and all((path.parent / chart).exists() for chart in charts)


def test_what_chance_alone_shows_is_as_the_page_says():
    """By the seeds' rule, of numbers that are alike but for the seeds."""
    text = " ".join(study.PAGE.read_text().split())
    sentence = re.search(r"the seeds alone would show one in (\d+) % .*? in (\d+) %", text)
    three, two = (int(percent) / 100 for percent in sentence.groups())
    draws = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).double()
    for seeds, expected in ((3, three), (2, two)):
        of = draws[:, :seeds]
        shows = of.mean(1).abs() > of.amax(1) - of.amin(1)
        # Rounded to whole percents; 200,000 draws leave 3 standard errors of 0.3.
        assert shows.double().mean().item() == pytest.approx(expected, abs=0.005 + 0.003)
        few = [summary.Estimate(tuple(row), 0.0).shows != 0 for row in of[:500].tolist()]
        assert few == shows[:500].tolist()
