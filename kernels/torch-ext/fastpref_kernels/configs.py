"""Launch configurations, read from files, and what every launcher needs to know of the head.

Nothing is tuned at run time: batches differ in length at every step, and tuning on N would never
end. `launch/` beside this module has a file for each architecture. What `fastpref tune` has
measured on a GPU is in the same format, in `~/.cache/fastpref` or where FASTPREF_CONFIGS says, and
replaces single entries of it:

    {"device": "NVIDIA H200", "triton": "3.6.0",
     "choices": {"forward": "library"},
     "projection": {"plain": {"block_n": 128, "block_v": 256, "block_h": 64, "num_warps": 8,
                              "num_stages": 4, "descriptors": true, "band": 8}}}

Half-precision types share their entries: tiles of both have the same bytes and instructions.
"""

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import triton
from torch import Tensor

# Kernels that sum exponentials take logits in units of ln 2: what the hardware has is 2^x.
UNIT = math.log(2)
# Decided when the kernels are decorated, at import; so is this.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Epilogue:
    """The head after the product: `z = cap·tanh(scale·(W h + b) / cap) / temperature`."""

    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def sliced(self, first: int, last: int) -> "Epilogue":
        """Of columns `first:last` of the vocabulary."""
        if self.bias is None:
            return self
        bias = self.bias[first:last]
        return Epilogue(bias, self.logit_scale, self.softcap, self.temperature)

    def arguments(self, unit: float = 1.0) -> dict[str, bool | float]:
        """The kernels' arguments of these names; logits come in units of so many nats."""
        if self.softcap is None:
            inner, outer = self.logit_scale / self.temperature, 1.0
        else:
            inner, outer = self.logit_scale / self.softcap, self.softcap / self.temperature
        return {
            "inner": float(inner),
            "outer": float(outer) / unit,
            "HAS_SOFTCAP": self.softcap is not None,
        }


@dataclass(frozen=True)
class ProjectionConfig:
    """Blocks of a kernel that multiplies: rows × vocabulary × hidden."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # operands by tensor descriptors (the bulk copy engine)
    band: int = 8  # blocks that share the other operand's tiles while those are in the L2 cache

    def __post_init__(self) -> None:
        _check_blocks(self, least=16)
        _check_number("num_stages", self.num_stages, 1, 16)
        _check_number("band", self.band, 1, 1024)
        if not isinstance(self.descriptors, bool):
            raise ValueError(f"descriptors must be true or false, got {self.descriptors!r}")


@dataclass(frozen=True)
class RowsConfig:
    """Blocks of the row kernels: rows × vocabulary."""

    block_n: int
    block_v: int
    num_warps: int

    def __post_init__(self) -> None:
        _check_blocks(self, least=1)


def _check_blocks(config: ProjectionConfig | RowsConfig, least: int) -> None:
    """What Triton takes: powers of two, of which a matrix instruction wants 16."""
    blocks = [field.name for field in fields(config) if field.name.startswith("block_")]
    for name, lowest, highest in (*((b, least, 2**16) for b in blocks), ("num_warps", 1, 32)):
        value = getattr(config, name)
        _check_number(name, value, lowest, highest)
        if value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


# --- what a file may hold -----------------------------------------------------------------------

Entry = ProjectionConfig | RowsConfig | str | int
Entries = dict[tuple[str, str], Entry]  # by kernel and variant, or "choices" and name

# Each kernel, what describes a launch of it, and its variants: of all of them every file in
# `launch/` has an entry.
KERNELS: dict[str, tuple[type[ProjectionConfig | RowsConfig], tuple[str, ...]]] = {
    # "rich": statistics beyond log-sum-exp; "pointers": what descriptors cannot point at; "wide":
    # fp32 and fp64.
    "projection": (
        ProjectionConfig,
        ("plain", "rich", "softcap", "rich softcap", "pointers", "wide"),
    ),
    "weight_gradient": (ProjectionConfig, ("plain", "pointers")),
    # "small": where large tiles would leave processors without one.
    "hidden_gradient": (ProjectionConfig, ("plain", "small", "pointers")),
    "rows": (RowsConfig, ("plain", "softcap")),
    "operands": (RowsConfig, ("plain",)),
}
# Who multiplies where either may, the kernel or the library; columns of the library's products that
# row kernels read; and how much of H one accumulator of the projection sums before it is added to
# another, 0 for all: tensor cores are said to cut off what they add, so fewer sums are more exact.
CHOICES: dict[str, tuple[str | int, ...]] = {
    "forward": ("tiles", "library"),
    "exponentials": ("tiles", "library"),
    "weight_gradient": ("tiles", "library"),
    "hidden_gradient": ("tiles", "library"),
    "columns": (8192, 2048, 4096, 16384, 32768),
    "depth": (0, 512, 1024, 2048),
}
_ABOUT = ("device", "triton", "measured", "why")
_LAUNCH = Path(__file__).parent / "launch"


def read_entries(path: Path, device: str | None = None) -> Entries:
    """The entries of a file.

    Args:
        device: name of the GPU that a tuned file must be for; None for a file of `launch/`.

    Raises:
        OSError: it cannot be read.
        ValueError: no JSON object, unknown keys, impossible values, another device or Triton; the
            message says which.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        if device is not None:
            _check_about(content, device)
        return entries_in(content)
    except ValueError as problem:  # of JSON too
        raise ValueError(f"{path}: {problem}") from problem


def entries_in(content: dict[str, Any]) -> Entries:
    """The entries of a file's content; a ValueError of what no file may hold."""
    found: Entries = {}
    for section, values in content.items():
        if section in _ABOUT:
            continue
        _check_keys("sections", {section}, (*KERNELS, "choices", *_ABOUT))
        if not isinstance(values, dict):
            raise ValueError(f"{section} must be an object, got {values!r}")
        known = CHOICES if section == "choices" else KERNELS[section][1]
        _check_keys(section, values, known)
        for name, value in values.items():
            found[section, name] = _entry(section, name, value)
    return found


def _check_about(content: dict[str, Any], device: str) -> None:
    here = {"device": device, "triton": triton.__version__}
    for name, expected in here.items():
        if content.get(name) != expected:
            raise ValueError(
                f"tuned for {name} {content.get(name)!r}, this is {expected!r}; "
                "run `fastpref tune` here"
            )


def _check_keys(where: str, found: Any, known: Any) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(f"unknown {where} {unknown}; expected some of {list(known)}")


def _entry(section: str, name: str, value: Any) -> Entry:
    if section == "choices":
        # True is 1 and 1.0 is 1, and neither is what a file should say.
        if not any(value == each and type(value) is type(each) for each in CHOICES[name]):
            raise ValueError(f"{name} must be one of {list(CHOICES[name])}, got {value!r}")
        return cast(Entry, value)
    kind = KERNELS[section][0]
    names = [field.name for field in fields(kind)]
    if not isinstance(value, dict):
        raise ValueError(f"{section}, {name}: must be an object, got {value!r}")
    _check_keys(f"settings of {section}, {name}:", value, names)
    missing = [each for each in names if each not in value]
    if missing:
        raise ValueError(f"{section}, {name}: {missing} are missing")
    try:
        return kind(**value)
    except ValueError as problem:
        raise ValueError(f"{section}, {name}: {problem}") from problem


# --- which of them hold -------------------------------------------------------------------------

_trial: Entries = {}


@contextmanager
def trial(entries: Mapping[tuple[str, str], Entry]) -> Iterator[None]:
    """Launches within use these entries in place of the files': for measurements and tests.

    Of the whole process: backward passes run in threads of their own.
    """
    global _trial
    before, _trial = _trial, {**_trial, **entries}
    try:
        yield
    finally:
        _trial = before


@functools.cache
def entries_of(where: torch.device | str) -> Entries:
    """Of a device with what was tuned for it, or of an architecture by its name.

    Raises:
        ValueError: FASTPREF_CONFIGS names a file that cannot be used. One in the cache that cannot
            be used is passed over with a warning.
    """
    if isinstance(where, str):
        return read_entries(_LAUNCH / f"{_nearest(where)}.json")
    return _with_tuned(entries_of(architecture(where)), device_name(where))


def _with_tuned(shipped: Entries, device: str) -> Entries:
    asked = os.environ.get("FASTPREF_CONFIGS")
    if asked:
        try:
            return _fitting(shipped | read_entries(Path(asked), device))
        except (OSError, ValueError) as problem:
            raise ValueError(f"FASTPREF_CONFIGS: {problem}") from problem
    path = tuned_path(device)
    try:
        if path.exists():
            return _fitting(shipped | read_entries(path, device))
        for other in path.parent.glob(f"{_slug(device)}-triton-*.json"):
            raise ValueError(f"{other} is of another Triton, this is {triton.__version__}")
    except (OSError, ValueError) as problem:
        warnings.warn(
            f"configurations tuned for {device} are not used: {problem}; "
            "`fastpref tune` writes them anew",
            stacklevel=2,
        )
    return shipped


def _fitting(entries: Entries) -> Entries:
    """What holds between entries.

    Exponentials of a slice have one peak a block: slices end with one. A depth is whole blocks of H
    in our own kernel, in tiles that can be halved.
    """
    columns, depth = (cast(int, entries["choices", name]) for name in ("columns", "depth"))
    for variant in KERNELS["rows"][1]:
        block = cast(RowsConfig, entries["rows", variant]).block_v
        if columns % block:
            wanted = f"a multiple of the rows' block_v, {block}, {variant}"
            raise ValueError(f"columns, {columns}, must be {wanted}")
    if depth:
        _check_depth(entries, depth)
    return entries


def _check_depth(entries: Entries, depth: int) -> None:
    for name in ("forward", "exponentials"):
        if entries["choices", name] != "tiles":
            raise ValueError(f"a depth is of our own kernel: {name} must be 'tiles' beside it")
    for variant in KERNELS["projection"][1]:
        config = cast(ProjectionConfig, entries["projection", variant])
        if depth % config.block_h or config.block_v < 32:
            raise ValueError(
                f"a depth of {depth} must be a multiple of block_h, and block_v at least 32: "
                f"projection, {variant}, has {config.block_h} and {config.block_v}"
            )


def tuned_path(device: str) -> Path:
    """Where `fastpref tune` keeps what it finds for a GPU of this name and this Triton."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path.home() / ".cache"
    return cache / "fastpref" / f"{_slug(device)}-triton-{triton.__version__}.json"


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942`, …; files of `launch/` are called so."""
    if INTERPRETED:
        return "interpreter"
    if device.type == "cuda" and torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return device.type


def device_name(device: torch.device) -> str:
    """As the driver calls it: GPUs of one architecture differ in memory and clocks."""
    if not INTERPRETED and device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    return architecture(device)


def _nearest(name: str) -> str:
    """The file for an architecture: its own, or that of the one that asks least of its kind."""
    if (_LAUNCH / f"{name}.json").exists():
        return name
    if name.startswith("sm_"):
        number = int(name[3:])
        # 12.x has mma.sync and 99 KiB, like 8.6 and 8.9; 10.3 is a 10.0.
        return "sm_100" if 100 <= number < 120 else "sm_86"
    return "gfx942"


def _find(where: torch.device | str, section: str, name: str) -> Any:
    found = _trial.get((section, name))
    return entries_of(where)[section, name] if found is None else found


# --- what launchers ask for ---------------------------------------------------------------------


def projection_config(
    where: torch.device | str,
    dtype: torch.dtype,
    *,
    rich: bool,
    softcap: bool,
    describable: bool = True,
) -> ProjectionConfig:
    """Of a device, or of an architecture by its name.

    Args:
        rich: there are statistics beyond log-sum-exp.
        softcap: the head has one.
        describable: tensor descriptors may point at the operands.
    """
    if dtype.itemsize > 2:
        variant = "wide"
    elif softcap:
        variant = "rich softcap" if rich else "softcap"
    elif not describable:
        variant = "pointers"
    else:
        variant = "rich" if rich else "plain"
    config = _described(_find(where, "projection", variant), describable)
    if projection_depth(where, dtype):  # the other accumulator takes the place of half a tile
        config = replace(config, block_v=config.block_v // 2)
    return config


def projection_depth(where: torch.device | str, dtype: torch.dtype) -> int:
    """Of H, that one accumulator sums; 0 for all, as always beyond half precision."""
    return choice("depth", where) if dtype.itemsize <= 2 else 0


def weight_gradient_config(
    where: torch.device | str, *, describable: bool = True
) -> ProjectionConfig:
    """As `projection_config`; the sum is over rows: `block_n` is the depth of a step."""
    variant = "plain" if describable else "pointers"
    return _described(_find(where, "weight_gradient", variant), describable)


def hidden_gradient_config(
    where: torch.device | str, *, small: bool = False, describable: bool = True
) -> ProjectionConfig:
    """As `projection_config`; the sum is over the vocabulary: `block_v` is the depth of a step."""
    variant = "small" if small else "plain" if describable else "pointers"
    return _described(_find(where, "hidden_gradient", variant), describable)


def _described(config: ProjectionConfig, describable: bool) -> ProjectionConfig:
    return replace(config, descriptors=config.descriptors and describable)


def rows_config(where: torch.device | str, *, softcap: bool) -> RowsConfig:
    """The configuration of the row kernels."""
    return _find(where, "rows", "softcap" if softcap else "plain")


def operands_config(where: torch.device | str) -> RowsConfig:
    """The configuration of the kernels that walk along hidden states."""
    return _find(where, "operands", "plain")


def choice(name: str, where: torch.device | str) -> Any:
    """One of `CHOICES`: what is taken there."""
    return _find(where, "choices", name)


# --- what every launcher needs ------------------------------------------------------------------


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Launches go to this tensor's device, whichever is the current one."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def check_halves(high: Tensor, low: Tensor | None, shape: Sequence[int]) -> None:
    """A remainder belongs to bf16, is int8 and of this shape."""
    if low is not None and (high.dtype, low.dtype) != (torch.bfloat16, torch.int8):
        raise ValueError(f"halves must be bfloat16 and int8, got {high.dtype} and {low.dtype}")
    if low is not None and low.shape != tuple(shape):
        raise ValueError(f"low must have shape {tuple(shape)}, got {tuple(low.shape)}")
