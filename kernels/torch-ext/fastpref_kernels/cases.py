"""Each kernel as its launcher calls it by default, described without a tensor or a device.

What an ahead-of-time compiler needs: argument types, compile-time constants, which arguments are
multiples of 16. The head is that of an 8 B model, H 4096 and V 128256.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .configs import ProjectionConfig, projection_config, rows_config
from .forward import BAND, projection_kernel
from .pairs import BLOCK_TOKENS, LINKS, pair_weighting_kernel
from .partials import MERGE_N, MERGE_T, merge_kernel
from .rows import row_exponentials_kernel, row_gradients_kernel
from .scale import BLOCK_ELEMENTS, scale_kernel

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_HIDDEN_SIZE = 4096


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration.

    Args:
        kernel: the jitted function.
        variant: what sets it apart from other cases of the kernel.
        types: run-time arguments and their types, as Triton spells them.
        constants: compile-time arguments.
        aligned: pointers and strides that are multiples of 16.
        multiplies: whether half-precision matrix instructions are expected.
    """

    kernel: Any
    variant: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    multiplies: bool = False


def compile_cases(architecture: str) -> list[CompileCase]:
    """Every kernel that a device of this architecture runs by default."""
    half = torch.bfloat16
    cases = [
        _projection(architecture, half),
        _projection(architecture, half, rich=True),
        _projection(architecture, half, rich=True, softcap=True),
        _projection(architecture, half, out="fp16"),
        _projection(architecture, half, rich=True, out="fp16"),
        _projection(architecture, half, softcap=True, out="fp16"),
        _projection(architecture, half, rich=True, softcap=True, out="fp16"),
        _projection(architecture, half, out="bf16", anchored=True),
        _projection(architecture, half, rich=True, out="bf16", anchored=True),
        _projection(architecture, half, softcap=True, out="bf16", anchored=True),
        _projection(architecture, half, rich=True, softcap=True, out="bf16", anchored=True),
        _projection(architecture, torch.float16),
        _projection(architecture, torch.float32, rich=True, softcap=True),
        _projection(
            architecture, torch.float32, rich=True, softcap=True, out="fp32", anchored=True
        ),
        _merge(rich=False),
        _merge(rich=True),
        _row_exponentials(rich=False),
        _row_exponentials(rich=True),
        _row_exponentials(rich=False, out="fp16"),
        _row_exponentials(rich=True, out="fp16"),
        _row_gradients(half, rich=False),
        _row_gradients(half, rich=False, at_target=False),
        _row_gradients(half, rich=True),
        _pairs(rich=False),
        _pairs(rich=True),
        _scale(torch.float32),
        _scale(half),
    ]
    if projection_config(architecture, half, rich=False, softcap=False).descriptors:
        # Where rows or weight are not 16-byte aligned.
        cases.insert(3, _projection(architecture, half, rich=True, softcap=True, describable=False))
    return cases


def _projection(
    architecture: str,
    dtype: torch.dtype,
    *,
    rich: bool = False,
    softcap: bool = False,
    describable: bool = True,
    out: str | None = None,
    anchored: bool = False,
) -> CompileCase:
    config = projection_config(
        architecture, dtype, rich=rich, softcap=softcap, describable=describable
    )
    descriptors = config.descriptors
    name = _NAMES[dtype]
    types = _types(
        projection_kernel,
        bias_ptr=f"*{name}",
        index_ptr="*i64",
        best_ptr="*i32",
        out_ptr=f"*{out}",
    )
    for operand, rows in (("hidden", config.block_n), ("weight", config.block_v)):
        block = f"tensordesc<{name}[{rows},{config.block_h}]>"
        types[operand] = block if descriptors else f"*{name}"
    return _case(
        projection_kernel,
        ", ".join(
            [name]
            + ["all statistics"] * rich
            + ["softcap"] * softcap
            + ["anchored" if anchored else "exponentials"] * (out is not None)
            + ["pointers"] * (not descriptors)
        ),
        types,
        _head(bias=rich, softcap=softcap)
        | _absent("best_ptr", unless=rich)
        | _absent("out_ptr", unless=out is not None)
        | _absent("anchors_ptr", unless=anchored)
        | _absent("index_ptr", unless=not descriptors and out is None)
        | _sums(rich)
        | {
            "HIDDEN_SIZE": _HIDDEN_SIZE,
            "HAS_DESCRIPTORS": descriptors,
            "UPCAST": False,
            "BAND": BAND,
        }
        | _blocks(config),
        aligned=("hidden_stride", "weight_stride", "out_stride", "columns"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        multiplies=dtype.itemsize == 2,
    )


def _merge(*, rich: bool) -> CompileCase:
    return _case(
        merge_kernel,
        "all statistics" if rich else "",
        _types(merge_kernel, best_ptr="*i32", is_top1_ptr="*i8"),
        _statistics(rich)
        | _absent("best_ptr", unless=rich)
        | {"BLOCK_N": MERGE_N, "BLOCK_T": MERGE_T},
        num_warps=4,
    )


def _row_exponentials(*, rich: bool, out: str | None = None) -> CompileCase:
    config = rows_config()
    return _case(
        row_exponentials_kernel,
        ", ".join(["all statistics"] * rich + ["exponentials"] * (out is not None)),
        _types(row_exponentials_kernel, bias_ptr="*bf16", best_ptr="*i32", out_ptr=f"*{out}"),
        _head(bias=rich, softcap=rich)
        | _sums(rich)
        | _absent("best_ptr", unless=rich)
        | _absent("out_ptr", unless=out is not None)
        | {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v},
        aligned=("columns", "stride", "out_stride"),
        num_warps=config.num_warps,
    )


def _row_gradients(dtype: torch.dtype, *, rich: bool, at_target: bool = True) -> CompileCase:
    config = rows_config()
    return _case(
        row_gradients_kernel,
        ", ".join([_NAMES[dtype]] + ["entropy"] * rich + ["without the target"] * (not at_target)),
        _types(row_gradients_kernel, bias_ptr="*bf16", grad_ptr=f"*{_NAMES[dtype]}"),
        _head(bias=rich, softcap=rich)
        | _absent("entropy_ptr", "entropy_coef_ptr", unless=rich)
        | {
            "HAS_TARGET": at_target,
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
        },
        aligned=("columns", "stride", "grad_stride"),
        num_warps=config.num_warps,
    )


def _pairs(*, rich: bool) -> CompileCase:
    names = pair_weighting_kernel.arg_names
    flags = {name: rich for name in names if name.isupper()}
    return _case(
        pair_weighting_kernel,
        "every ingredient" if rich else "log-sigmoid",
        _types(pair_weighting_kernel, offsets_ptr="*i64", numbers_ptr="*fp64"),
        flags
        | _absent(
            "weights_ptr",
            "ref_logps_ptr",
            "scores_ptr",
            "pair_weights_ptr",
            "betas_ptr",
            "lengths_ptr",
            unless=rich,
        )
        | {"LINK": LINKS.index("log_sigmoid"), "BLOCK": BLOCK_TOKENS},
        num_warps=4,
    )


def _scale(dtype: torch.dtype) -> CompileCase:
    name, in_place = _NAMES[dtype], dtype == torch.float32
    return _case(
        scale_kernel,
        "in place" if in_place else f"to {name}",
        _types(scale_kernel, out_ptr=f"*{name}", elements="i64"),
        {"IN_PLACE": in_place, "BLOCK": BLOCK_ELEMENTS},
        num_warps=8,
    )


def _case(
    kernel: Any,
    variant: str,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    aligned: tuple[str, ...] = (),
    num_warps: int,
    num_stages: int = 1,
    multiplies: bool = False,
) -> CompileCase:
    run_time = {name: of for name, of in types.items() if name not in constants}
    for parameter in kernel.params:
        if parameter.annotation_type and parameter.name in run_time:
            run_time[parameter.name] = parameter.annotation_type
    pointers = tuple(
        parameter.name
        for parameter in kernel.params
        if run_time.get(parameter.name, "").startswith("*")
        and not parameter.do_not_specialize_on_alignment
    )
    return CompileCase(
        kernel, variant, run_time, constants, pointers + aligned, num_warps, num_stages, multiplies
    )


def _types(kernel: Any, **special: str) -> dict[str, str]:
    """int64 targets, fp32 other pointers and int32 numbers, but for the special ones."""
    found = {}
    for name in kernel.arg_names:
        found[name] = "*fp32" if name.endswith("_ptr") else "i32"
    if "targets_ptr" in found:
        found["targets_ptr"] = "*i64"
    return found | special


def _blocks(config: ProjectionConfig) -> dict[str, int]:
    return {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_H": config.block_h}


def _head(*, bias: bool, softcap: bool) -> dict[str, Any]:
    return {"HAS_SOFTCAP": softcap} | _absent("bias_ptr", unless=bias)


def _sums(rich: bool) -> dict[str, Any]:
    return {"HAS_ENTROPY": rich, "HAS_MEAN": rich, "HAS_LOG_SUM_SQ": rich}


def _statistics(rich: bool) -> dict[str, None]:
    return _absent("entropy_ptr", "mean_logits_ptr", "is_top1_ptr", "log_sum_sq_ptr", unless=rich)


def _absent(*pointers: str, unless: bool) -> dict[str, None]:
    """A pointer to nothing is None, which is a compile-time constant."""
    return {} if unless else dict.fromkeys(pointers)
