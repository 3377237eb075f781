"""Fixed launch configurations, and what every launcher needs to know of the head.

Nothing is tuned at run time: batches differ in length at every step, and tuning on N would never
end. Where measurements on a GPU prefer another shape, this file is the one to change; an
environment variable tries one without changing it:

    FASTPREF_PROJECTION=128,256,64,8,3     BLOCK_N,BLOCK_V,BLOCK_H,warps,stages
    FASTPREF_ROWS=1,4096,8                 BLOCK_N,BLOCK_V,warps
    FASTPREF_WEIGHT_GRADIENT=library       or kernel: who multiplies for the head's gradient
    FASTPREF_WEIGHT_TILES=64,128,256,8,3   BLOCK_N,BLOCK_V,BLOCK_H,warps,stages
    FASTPREF_HIDDEN_GRADIENT=library       or kernel: who multiplies for that of hidden states
    FASTPREF_HIDDEN_TILES=256,64,128,8,4   BLOCK_N,BLOCK_V,BLOCK_H,warps,stages
    FASTPREF_FORWARD=library               who multiplies where statistics are all that is wanted
    FASTPREF_EXPONENTIALS=library          and where exponentials are stored
"""

import functools
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
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
    """Blocks of the projection: rows × vocabulary × hidden."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # operands by tensor descriptors (the bulk copy engine)


@dataclass(frozen=True)
class RowsConfig:
    """Blocks of the row kernels: rows × vocabulary."""

    block_n: int
    block_v: int
    num_warps: int


# Half precision. Over 8 warps, 128 × 256 accumulators are 128 registers a thread.
_PROJECTION = {
    # 64 KiB of shared memory: one stage of 128 × 64 and 128 × 64 is 32 KiB.
    "gfx942": ProjectionConfig(128, 128, 64, 8, 2),
    # 163 KiB would hold more stages, but two rounds of registers for 128 × 256 would spill.
    "sm_80": ProjectionConfig(128, 128, 64, 8, 3),
    # 99 KiB: three stages of 128 × 32 and 128 × 32.
    "sm_86": ProjectionConfig(128, 128, 32, 8, 3),
    # wgmma reads both operands from shared memory: 48 KiB a stage.
    "sm_90": ProjectionConfig(128, 256, 64, 8, 3, descriptors=True),
    # Accumulators live in tensor memory.
    "sm_100": ProjectionConfig(128, 256, 64, 8, 3, descriptors=True),
}
# Statistics beyond log-sum-exp at 128 × 256 spill 880 bytes there.
_PROJECTION_RICH = {"sm_100": ProjectionConfig(128, 128, 64, 8, 4, descriptors=True)}
# A softcap keeps more of the tile alive at once than the large tile leaves registers for, the more
# so where its slopes wait to be stored. There is room for another stage instead.
_PROJECTION_SMALL = {
    "sm_80": ProjectionConfig(128, 64, 64, 8, 3),
    "sm_86": ProjectionConfig(128, 64, 32, 8, 3),
    "sm_90": ProjectionConfig(128, 128, 64, 8, 4, descriptors=True),
    "sm_100": ProjectionConfig(128, 64, 64, 8, 4, descriptors=True),
}
# Both at 128 × 128, and exponentials to be stored, spill 24 bytes.
_PROJECTION_SMALLEST = {
    "sm_90": ProjectionConfig(128, 64, 64, 8, 4, descriptors=True),
}
# fp32 multiplies without tensor cores, fp64 with few: small tiles, for exactness and not for speed.
_PROJECTION_WIDE = ProjectionConfig(32, 64, 16, 4, 2)
_PROJECTION_INTERPRETED = ProjectionConfig(16, 64, 32, 1, 1)

# One row a program: 16 bytes a load, 8 loads a thread in flight, and no shared memory to speak of.
_ROWS = RowsConfig(1, 8192, 8)
# The interpreter costs the same for a large block as for a small one.
_ROWS_INTERPRETED = RowsConfig(16, 256, 1)

# The head's gradient: its own kernel, or the library's products slice by slice ("library").
WEIGHT_GRADIENT_BY = "kernel"
# Half precision, the sum is over rows: BLOCK_N is the depth of a step.
_WEIGHT_GRADIENT = {
    "gfx942": ProjectionConfig(64, 128, 128, 8, 2),
    "sm_80": ProjectionConfig(64, 128, 128, 8, 3),
    "sm_86": ProjectionConfig(32, 128, 128, 8, 3),
    # 48 KiB a stage; the halves of the sum pass through the same memory.
    "sm_90": ProjectionConfig(64, 128, 256, 8, 4, descriptors=True),
    "sm_100": ProjectionConfig(64, 128, 256, 8, 4, descriptors=True),
}
# Addresses of pointer loads take registers too: at 128 × 256 they spill.
_WEIGHT_GRADIENT_POINTERS = {
    "sm_90": ProjectionConfig(64, 128, 128, 8, 4),
    "sm_100": ProjectionConfig(64, 128, 128, 8, 4),
}
_WEIGHT_GRADIENT_INTERPRETED = ProjectionConfig(16, 32, 64, 1, 1)

# Gradients of hidden states: likewise.
HIDDEN_GRADIENT_BY = "kernel"
# Half precision, the sum is over the vocabulary: BLOCK_V is the depth of a step.
_HIDDEN_GRADIENT = {
    "gfx942": ProjectionConfig(128, 64, 128, 8, 2),
    "sm_80": ProjectionConfig(128, 64, 128, 8, 3),
    "sm_86": ProjectionConfig(128, 32, 128, 8, 3),
    # 64 rows of hidden a warp group, each of which is converted once; 48 KiB a stage.
    "sm_90": ProjectionConfig(256, 64, 128, 8, 4, descriptors=True),
    # What is converted passes through shared memory once more: of a float32 head 80 KiB a stage.
    "sm_100": ProjectionConfig(256, 64, 128, 8, 3, descriptors=True),
}
# A quarter of the tile, or half of it, for half of the warps.
_HIDDEN_GRADIENT_SMALL = {
    "gfx942": ProjectionConfig(64, 64, 64, 4, 2),
    "sm_80": ProjectionConfig(64, 64, 64, 4, 3),
    "sm_86": ProjectionConfig(64, 32, 64, 4, 3),
    "sm_90": ProjectionConfig(128, 64, 64, 4, 4, descriptors=True),
    "sm_100": ProjectionConfig(128, 64, 64, 4, 4, descriptors=True),
}
# Pointer loads, and what is converted through shared memory.
_HIDDEN_GRADIENT_POINTERS = {
    "sm_90": ProjectionConfig(128, 64, 128, 8, 4),
    "sm_100": ProjectionConfig(128, 64, 128, 8, 4),
}
_HIDDEN_GRADIENT_INTERPRETED = ProjectionConfig(32, 64, 32, 1, 1)
_HIDDEN_GRADIENT_INTERPRETED_SMALL = ProjectionConfig(16, 64, 32, 1, 1)

# Operands: several rows a program, for H is at most a few thousand.
_OPERANDS = RowsConfig(4, 1024, 8)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Launches go to this tensor's device, whichever is the current one."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


@functools.cache
def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942`, …; the key of the tables above."""
    if device.type == "cuda" and torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return device.type


def projection_config(
    name: str, dtype: torch.dtype, *, rich: bool, softcap: bool, describable: bool = True
) -> ProjectionConfig:
    """Of an architecture by its name.

    Args:
        rich: there are statistics beyond log-sum-exp.
        softcap: the head has one.
        describable: tensor descriptors may point at the operands.
    """
    if INTERPRETED:
        found = _PROJECTION_INTERPRETED
    elif dtype.itemsize > 2:
        found = _PROJECTION_WIDE
    else:
        name = _nearest(name)
        found = _PROJECTION[name]
        if rich:
            found = _PROJECTION_RICH.get(name, found)
        # Addresses of pointer loads take registers too.
        if softcap or (found.descriptors and not describable):
            found = _PROJECTION_SMALL.get(name, found)
        if softcap and rich:
            found = _PROJECTION_SMALLEST.get(name, found)
    return _or_asked("FASTPREF_PROJECTION", found, describable)


# Who multiplies where either may: "tiles" is the projection kernel, "library" the library, whose
# products the row kernel reads.
FORWARD_BY = "tiles"
EXPONENTIALS_BY = "tiles"


def forward_by() -> str:
    """Who multiplies where statistics are all that is wanted."""
    return _multiplier("FASTPREF_FORWARD", FORWARD_BY, "tiles")


def exponentials_by() -> str:
    """Who multiplies where exponentials are stored."""
    return _multiplier("FASTPREF_EXPONENTIALS", EXPONENTIALS_BY, "tiles")


def _multiplier(variable: str, default: str, own: str) -> str:
    found = os.environ.get(variable) or default
    if found not in (own, "library"):
        raise ValueError(f"{variable} must be {own!r} or 'library', got {found!r}")
    return found


def rows_config() -> RowsConfig:
    """The configuration of the row kernels."""
    asked = os.environ.get("FASTPREF_ROWS")
    if asked:
        return RowsConfig(*map(int, asked.split(",")))
    return _ROWS_INTERPRETED if INTERPRETED else _ROWS


def weight_gradient_by() -> str:
    """Who multiplies for the head's gradient: "kernel" or "library"."""
    return _multiplier("FASTPREF_WEIGHT_GRADIENT", WEIGHT_GRADIENT_BY, "kernel")


def weight_gradient_config(name: str, *, describable: bool = True) -> ProjectionConfig:
    """Of an architecture by its name, as `projection_config`."""
    if INTERPRETED:
        found = _WEIGHT_GRADIENT_INTERPRETED
    else:
        name = _nearest(name)
        found = _WEIGHT_GRADIENT[name]
        if found.descriptors and not describable:
            found = _WEIGHT_GRADIENT_POINTERS[name]
    return _or_asked("FASTPREF_WEIGHT_TILES", found, describable)


def hidden_gradient_by() -> str:
    """Who multiplies for gradients of hidden states: "kernel" or "library"."""
    return _multiplier("FASTPREF_HIDDEN_GRADIENT", HIDDEN_GRADIENT_BY, "kernel")


def hidden_gradient_config(
    name: str, *, small: bool = False, describable: bool = True
) -> ProjectionConfig:
    """Of an architecture by its name, as `projection_config`.

    Args:
        small: of tiles for few rows.
    """
    if INTERPRETED:
        found = _HIDDEN_GRADIENT_INTERPRETED_SMALL if small else _HIDDEN_GRADIENT_INTERPRETED
    else:
        name = _nearest(name)
        found = (_HIDDEN_GRADIENT_SMALL if small else _HIDDEN_GRADIENT)[name]
        if found.descriptors and not describable:
            found = _HIDDEN_GRADIENT_POINTERS[name]
    return _or_asked("FASTPREF_HIDDEN_TILES", found, describable)


def _or_asked(variable: str, found: ProjectionConfig, describable: bool) -> ProjectionConfig:
    asked = os.environ.get(variable)
    if asked:
        n, v, h, warps, stages = map(int, asked.split(","))
        found = ProjectionConfig(n, v, h, warps, stages, found.descriptors)
    return replace(found, descriptors=found.descriptors and describable)


def operands_config() -> RowsConfig:
    """The configuration of the kernels that walk along hidden states."""
    return _ROWS_INTERPRETED if INTERPRETED else _OPERANDS


def check_halves(high: Tensor, low: Tensor | None, shape: Sequence[int]) -> None:
    """A remainder belongs to bf16, is int8 and of this shape."""
    if low is not None and (high.dtype, low.dtype) != (torch.bfloat16, torch.int8):
        raise ValueError(f"halves must be bfloat16 and int8, got {high.dtype} and {low.dtype}")
    if low is not None and low.shape != tuple(shape):
        raise ValueError(f"low must have shape {tuple(shape)}, got {tuple(low.shape)}")


def _nearest(name: str) -> str:
    """The table's entry for an architecture: itself, or the one that asks least of its kind."""
    if name in _PROJECTION:
        return name
    if name.startswith("sm_"):
        number = int(name[3:])
        # 12.x has mma.sync and 99 KiB, like 8.6 and 8.9; 10.3 is a 10.0.
        return "sm_100" if 100 <= number < 120 else "sm_86"
    return "gfx942"
