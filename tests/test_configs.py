"""Launch configurations: the files that ship, and what may replace single entries of them."""

import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from fastpref_kernels import choice, configs
from fastpref_kernels.configs import ProjectionConfig, RowsConfig

from fastpref.commands.tune.run import file_text, nested

LAUNCH = Path(configs.__file__).parent / "launch"
SHIPPED = sorted(path.stem for path in LAUNCH.iterdir())
GPU = "NVIDIA H200"
DEVICE = torch.device("cuda")  # which need not be here
PLAIN = {
    "block_n": 64, "block_v": 128, "block_h": 32, "num_warps": 4, "num_stages": 2,
    "descriptors": False, "band": 4,
}  # fmt: skip
EVERY_KEY = {(name, each) for name, (_, variants) in configs.KERNELS.items() for each in variants}
EVERY_KEY |= {("choices", name) for name in configs.CHOICES}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The path of a tuned file for a GPU that is not here; nothing is kept from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTPREF_CONFIGS", raising=False)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(configs, "device_name", lambda device: GPU)
    configs.entries_of.cache_clear()
    path = configs.tuned_path(GPU)
    path.parent.mkdir()
    yield path
    configs.entries_of.cache_clear()


def tuned(**sections):
    return {"device": GPU, "triton": triton.__version__} | sections


def projection(where):
    return configs.projection_config(where, torch.bfloat16, rich=False, softcap=False)


# --- what ships ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_has_every_entry_in_the_format_of_tuned_ones(name):
    path = LAUNCH / f"{name}.json"
    entries, content = configs.read_entries(path), json.loads(path.read_text())
    assert entries.keys() == EVERY_KEY
    assert content["device"] == name
    about = {key: content[key] for key in ("device", "why")}
    assert nested(entries) | about == content
    assert file_text(content) == path.read_text()
    keys = {" ".join(key) for key in EVERY_KEY}
    assert content["why"].keys() <= keys | {"device"}
    for variant in configs.KERNELS["rows"][1]:
        assert entries["choices", "columns"] % entries["rows", variant].block_v == 0


@pytest.mark.parametrize(
    ("asked", "found"),
    [("sm_90", "sm_90"), ("sm_89", "sm_86"), ("sm_103", "sm_100"), ("sm_120", "sm_86"),
     ("gfx90a", "gfx942"), ("xpu", "gfx942")],
)  # fmt: skip
def test_an_architecture_without_a_file_takes_that_of_its_kind(asked, found):
    assert configs.entries_of(asked) == configs.entries_of(found)


def test_of_several_variants_one_holds():
    def named(**how):
        entries = {("projection", v): i for i, v in enumerate(configs.KERNELS["projection"][1])}
        configs._described, kept = (lambda found, describable: found), configs._described
        try:
            with configs.trial(entries):
                dtype = how.pop("dtype", torch.float16)
                number = configs.projection_config("sm_90", dtype, **how)
        finally:
            configs._described = kept
        return configs.KERNELS["projection"][1][number]

    flags = {"rich": False, "softcap": False}
    assert named(**flags) == "plain"
    assert named(**flags | {"rich": True}) == "rich"
    assert named(**flags | {"softcap": True}) == "softcap"
    assert named(rich=True, softcap=True) == "rich softcap"
    assert named(**flags, describable=False) == "pointers"
    assert named(rich=True, softcap=True, describable=False) == "rich softcap"
    assert named(**flags, dtype=torch.float32) == "wide"


def test_what_cannot_be_described_has_no_descriptors():
    for describable in (True, False):
        for softcap in (True, False):
            found = configs.projection_config(
                "sm_90", torch.bfloat16, rich=False, softcap=softcap, describable=describable
            )
            assert found.descriptors == describable
        found = configs.weight_gradient_config("sm_90", describable=describable)
        assert found.descriptors == describable


def test_a_depth_halves_the_tiles_of_half_precision():
    flags = {"rich": False, "softcap": False}
    of = lambda dtype: configs.projection_config("sm_90", dtype, **flags)  # noqa: E731
    before = {dtype: of(dtype) for dtype in (torch.bfloat16, torch.float32)}
    with configs.trial({("choices", "depth"): 1024}):
        assert of(torch.float32) == before[torch.float32]
        assert configs.projection_depth("sm_90", torch.float32) == 0
        assert of(torch.bfloat16).block_v == before[torch.bfloat16].block_v // 2
        assert configs.projection_depth("sm_90", torch.bfloat16) == 1024


# --- what replaces it ---------------------------------------------------------------------------


def test_a_tuned_file_replaces_single_entries(cache):
    shipped = configs.entries_of("sm_90")
    assert configs.entries_of(DEVICE) == shipped
    configs.entries_of.cache_clear()
    content = tuned(projection={"plain": PLAIN}, choices={"forward": "library"}, measured={"a": 1})
    cache.write_text(json.dumps(content))
    assert projection(DEVICE) == ProjectionConfig(**PLAIN) != projection("sm_90")
    assert choice("forward", DEVICE) == "library" and choice("forward", "sm_90") == "tiles"
    changed = {("projection", "plain"), ("choices", "forward")}
    entries = configs.entries_of(DEVICE)
    assert {key for key, entry in entries.items() if entry != shipped[key]} == changed


def test_a_file_by_name_goes_before_the_caches(cache, tmp_path, monkeypatch):
    cache.write_text(json.dumps(tuned(choices={"forward": "library"})))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tuned(choices={"exponentials": "library"})))
    monkeypatch.setenv("FASTPREF_CONFIGS", str(other))
    found = [choice(name, DEVICE) for name in ("forward", "exponentials")]
    assert found == ["tiles", "library"]


BAD = {
    "not JSON": ("{", "Expecting"),
    "no object": ("[]", "no JSON object"),
    "another GPU": (tuned() | {"device": "NVIDIA H100"}, "device 'NVIDIA H100', this is 'NVIDIA H"),
    "no GPU": ({"triton": triton.__version__}, "device None"),
    "another Triton": (tuned() | {"triton": "3.1.0"}, "triton '3.1.0', this is"),
    "unknown section": (tuned(projections={}), r"unknown sections \['projections'\]"),
    "unknown variant": (tuned(rows={"rich": {}}), r"unknown rows \['rich'\]"),
    "no variants": (tuned(rows=[]), r"rows must be an object, got \[\]"),
    "no settings": (tuned(rows={"plain": 8}), "rows, plain: must be an object, got 8"),
    "unknown setting": (tuned(projection={"plain": PLAIN | {"warps": 8}}), r"\['warps'\]"),
    "missing setting": (tuned(rows={"plain": {"block_n": 1}}), r"\['block_v', 'num_warps'\] are"),
    "unknown choice": (tuned(choices={"backward": "tiles"}), r"unknown choices \['backward'\]"),
    "impossible choice": (tuned(choices={"forward": "libary"}), r"one of \['tiles', 'library'\]"),
    "choice of another type": (tuned(choices={"columns": 8192.0}), "got 8192.0"),
    "columns within a block": (tuned(choices={"columns": 2048}), "rows' block_v, 8192, plain"),
    "under a softcap": (
        tuned(
            choices={"columns": 2048},
            rows={"plain": {"block_n": 1, "block_v": 2048, "num_warps": 4}},
        ),
        "rows' block_v, 8192, softcap",
    ),
    "depth within a block": (
        tuned(projection={"plain": PLAIN | {"block_h": 1024}}, choices={"depth": 512}),
        "a depth of 512 must be .* projection, plain, has 1024",
    ),
    "half of no tile": (
        tuned(projection={"plain": PLAIN | {"block_v": 16}}, choices={"depth": 512}),
        "block_v at least 32",
    ),
    "depth of the library": (
        tuned(choices={"depth": 512, "exponentials": "library"}), "exponentials must be 'tiles'"
    ),
}  # fmt: skip
NUMBERS = {
    "block_v": [100, 8, 0, -16, 2**17, 64.0, True, "64", None],
    "num_warps": [3, 0, 64],
    "num_stages": [0, -1, 2.5],
    "band": [0, False],
    "descriptors": [1, "true", None],
}
BAD |= {
    f"{name} {value!r}": (
        tuned(projection={"plain": PLAIN | {name: value}}),
        f"projection, plain: {name} must be .*, got {value!r}",
    )
    for name, values in NUMBERS.items()
    for value in values
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used_says_why(case, cache, monkeypatch):
    """An error where it was asked for by name; else a warning, and what ships holds."""
    content, why = BAD[case]
    text = content if isinstance(content, str) else json.dumps(content)
    cache.write_text(text)
    with pytest.warns(UserWarning, match=f"(?s){GPU} are not used: .*{why}.*fastpref tune"):
        assert configs.entries_of(DEVICE) == configs.entries_of("sm_90")
    configs.entries_of.cache_clear()
    monkeypatch.setenv("FASTPREF_CONFIGS", str(cache))
    with pytest.raises(ValueError, match=f"(?s)FASTPREF_CONFIGS: .*{why}"):
        configs.entries_of(DEVICE)


def test_a_file_that_is_not_there_says_so(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPREF_CONFIGS", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="FASTPREF_CONFIGS: .*none.json"):
        configs.entries_of(DEVICE)


def test_what_was_tuned_with_another_triton_is_missed(cache):
    (cache.parent / "nvidia-h200-triton-3.1.0.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"h200-triton-3.1.0.json is of another Triton, this is"):
        configs.entries_of(DEVICE)
    configs.entries_of.cache_clear()
    (cache.parent / "nvidia-h200-triton-3.1.0.json").rename(
        cache.parent / "nvidia-h100-triton-3.1.0.json"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configs.entries_of(DEVICE)  # another GPU's is nobody's concern


def test_a_relative_cache_is_the_users_own(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for given in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        expected = f"nvidia-h200-triton-{triton.__version__}.json"
        assert configs.tuned_path(GPU) == Path("/home/someone/.cache/fastpref") / expected


def test_a_trial_ends_with_its_block():
    key, tried = ("rows", "plain"), RowsConfig(2, 512, 4)
    before = configs.rows_config("sm_90", softcap=False)
    with pytest.raises(KeyError), configs.trial({key: tried}):
        with configs.trial({("choices", "forward"): "library"}):
            assert configs.rows_config("sm_90", softcap=False) == tried
            assert choice("forward", "sm_90") == "library"
        assert choice("forward", "sm_90") == "tiles"
        raise KeyError
    assert configs.rows_config("sm_90", softcap=False) == before
