"""The model families of the README's table: loss and gradients of each, or why it is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import families  # noqa: E402

COMMITTED = {
    found["family"]: found for found in json.loads(families.RESULTS.read_text())["families"]
}


@pytest.fixture(autouse=True)
def one_thread():
    """Of models as small as these, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_is_what_the_table_says(family):
    found, committed = families.compare(family), COMMITTED[family]
    assert ("without TRL" in found) == ("without TRL" in committed)
    for column in families.COLUMNS:
        if "refused" in committed[column]:
            assert found[column] == committed[column]
        else:
            assert found[column]["difference"] <= families.ALLOWED, found


def test_thirty_families_are_in_the_table():
    assert list(COMMITTED) == list(families.FAMILIES)
    assert len(COMMITTED) == 30


def test_a_difference_is_seen():
    """Of one gradient among large ones, of the loss, and one that is no number."""
    step = 2.0, {"large": torch.full((4,), 100.0), "small": torch.ones(4)}
    assert families.difference(step, step) == 0

    def changed(loss=2.0, small=1.0):
        return loss, step[1] | {"small": torch.full((4,), small)}

    for other in (changed(loss=2.002), changed(small=1.001), changed(small=torch.nan)):
        assert not families.difference(other, step) <= families.ALLOWED
    with pytest.raises(RuntimeError, match=r"other parameters: \['small'\]"):
        families.difference((2.0, {"large": step[1]["large"]}), step)


def test_what_does_not_work_is_not_said_to():
    found = COMMITTED["Gemma 2"] | {"padded": {"difference": 1e-2}}
    line = families.markdown({"families": [found]}).splitlines()[-1]
    assert line == "| Gemma 2 | differs | works | works | 1e-02 |  |"


def test_a_family_that_is_refused_altogether(monkeypatch):
    decoder = families.text("modernbert-decoder", bos_token_id=2, cls_token_id=2, sep_token_id=3)
    monkeypatch.setitem(families.FAMILIES, "ModernBERT", decoder)
    found = families.compare("ModernBERT")
    line = families.markdown({"families": [found]}).splitlines()[-1]
    assert line.startswith("| ModernBERT | refused | refused | refused |  | expected logits")


def test_without_trl_the_models_own_logits_are_compared_with(monkeypatch):
    """A TRL whose numbers are others is not taken for the truth."""
    make_trainer = families.make_trainer

    def wrong(kind, *args, **options):
        more = {"label_smoothing": 0.3, "loss_type": "robust"} if kind is families.STOCK else {}
        return make_trainer(kind, *args, **options, **more)

    monkeypatch.setattr(families, "make_trainer", wrong)
    found = families.compare("Cohere 2")
    assert "from the model's own logits" in found["without TRL"]
    assert found["share_prompt"]["difference"] <= families.ALLOWED
