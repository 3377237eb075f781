"""Each kernel as its launcher calls it by default, described without a tensor or a device.

What an ahead-of-time compiler needs: argument types, compile-time constants, which arguments are
multiples of 16. The head is that of an 8 B model, H 4096 and V 128256.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from .configs import (
    ProjectionConfig,
    hidden_gradient_config,
    operands_config,
    projection_config,
    projection_depth,
    rows_config,
    trial,
    weight_gradient_config,
)
from .forward import projection_kernel
from .gradients import gradients_kernel
from .hidden_gradient import hidden_gradient_kernel
from .operands import fitted_kernel, keep_kernel, take_kernel
from .pairs import BLOCK_TOKENS, LINKS, pair_weighting_kernel
from .partials import MERGE_N, MERGE_T, merge_kernel
from .rows import row_exponentials_kernel, row_gradients_kernel
from .scale import BLOCK_ELEMENTS, scale_kernel
from .weight_gradient import BLOCK_ELEMENTS as BLOCK_SUMMED
from .weight_gradient import accumulate_kernel, weight_gradient_kernel

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
        _row_exponentials(architecture),
        _row_exponentials(architecture, rich=True),
        _row_exponentials(architecture, rich=True, softcap=True),
        _row_exponentials(architecture, out="fp16"),
        _row_exponentials(architecture, rich=True, out="fp16"),
        _row_exponentials(architecture, rich=True, softcap=True, out="fp16"),
        _row_gradients(architecture, torch.float16),
        _row_gradients(architecture, torch.float16, rich=True),
        _row_gradients(architecture, torch.float16, rich=True, softcap=True),
        _pairs(rich=False),
        _pairs(rich=True),
        _scale(torch.float32),
        _scale(half),
        _scale(half, split=True),
        _gradients(architecture, torch.float16, softcap=False),
        _gradients(architecture, torch.float16, softcap=True),
        _gradients(architecture, torch.float32, softcap=False),
        _weight_gradient(architecture, add=True),
        _weight_gradient(architecture, add=False),
        _weight_gradient(architecture, add=False, dtype=torch.float32),
        _hidden_gradient(architecture, half),
        _hidden_gradient(architecture, half, small=True),
        _hidden_gradient(architecture, half, split=False),
        _hidden_gradient(architecture, torch.float32),
        _hidden_gradient(architecture, torch.float16, split=False),
        _accumulate(),
        _fitted(architecture, rows=True),
        _fitted(architecture, rows=False),
        _keep(architecture),
        _take(architecture, half, split=True),
        _take(architecture, torch.float32, split=False),
    ]
    if projection_config(architecture, half, rich=False, softcap=False).descriptors:
        # Where rows or weight are not 16-byte aligned.
        cases.insert(3, _projection(architecture, half, rich=True, softcap=True, describable=False))
        cases.append(_weight_gradient(architecture, add=True, describable=False))
        cases.append(_hidden_gradient(architecture, half, describable=False))
    with trial({("choices", "depth"): 1024}):
        cases += [
            _projection(architecture, half),
            _projection(architecture, half, rich=True, out="fp16"),
            _projection(architecture, half, rich=True, softcap=True, out="fp16"),
        ]
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
    descriptors, depth = config.descriptors, projection_depth(architecture, dtype)
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
            + [f"depth {depth}"] * (depth > 0)
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
            "DEPTH": depth,
            "BAND": config.band,
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


def _row_exponentials(
    architecture: str, *, rich: bool = False, softcap: bool = False, out: str | None = None
) -> CompileCase:
    config = rows_config(architecture, softcap=softcap)
    return _case(
        row_exponentials_kernel,
        ", ".join(
            ["all statistics"] * rich + ["softcap"] * softcap + ["exponentials"] * (out is not None)
        ),
        _types(row_exponentials_kernel, bias_ptr="*bf16", best_ptr="*i32", out_ptr=f"*{out}"),
        _head(bias=rich, softcap=softcap)
        | _sums(rich)
        | _absent("best_ptr", unless=rich)
        | _absent("out_ptr", unless=out is not None)
        | {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v},
        aligned=("columns", "stride", "out_stride"),
        num_warps=config.num_warps,
    )


def _row_gradients(
    architecture: str, dtype: torch.dtype, *, rich: bool = False, softcap: bool = False
) -> CompileCase:
    config = rows_config(architecture, softcap=softcap)
    return _case(
        row_gradients_kernel,
        ", ".join([_NAMES[dtype]] + ["entropy"] * rich + ["softcap"] * softcap),
        _types(row_gradients_kernel, bias_ptr="*bf16", grad_ptr=f"*{_NAMES[dtype]}"),
        _head(bias=rich, softcap=softcap)
        | _absent("entropy_ptr", "entropy_coef_ptr", unless=rich)
        | {
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
        _types(pair_weighting_kernel, offsets_ptr="*i64"),
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


def _scale(dtype: torch.dtype, *, split: bool = False) -> CompileCase:
    name, in_place = _NAMES[dtype], split or dtype == torch.float32
    return _case(
        scale_kernel,
        "in place, of halves" if split else "in place" if in_place else f"to {name}",
        _types(
            scale_kernel,
            grad_ptr=f"*{name}" if split else "*fp32",
            out_ptr=f"*{name}",
            low_ptr="*i8",
        ),
        {"IN_PLACE": in_place, "BLOCK": BLOCK_ELEMENTS} | _absent("low_ptr", unless=split),
        num_warps=8,
    )


def _gradients(architecture: str, dtype: torch.dtype, *, softcap: bool) -> CompileCase:
    config = rows_config(architecture, softcap=softcap)
    peak_block = 256
    return _case(
        gradients_kernel,
        _NAMES[dtype] + ", softcap" * softcap,
        _types(gradients_kernel, exponentials_ptr=f"*{_NAMES[dtype]}"),
        {
            "PEAK_BLOCK": peak_block,
            "BLOCK_V": config.block_v,
            "WIDTH": min(peak_block, config.block_v),
        }
        | _absent("slopes_ptr", unless=softcap),
        aligned=("columns", "stride"),
        num_warps=config.num_warps,
    )


def _weight_gradient(
    architecture: str,
    *,
    add: bool,
    describable: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> CompileCase:
    config = weight_gradient_config(architecture, describable=describable)
    split = dtype == torch.bfloat16
    types = _types(weight_gradient_kernel, high_ptr=f"*{_NAMES[dtype]}", low_ptr="*i8")
    for operand, width in (("gradient", config.block_v), ("hidden", config.block_h)):
        block = f"tensordesc<fp16[{config.block_n},{width}]>"
        types[operand] = block if config.descriptors else "*fp16"
    return _case(
        weight_gradient_kernel,
        ", ".join(
            ["halves" if split else _NAMES[dtype]]
            + ["added"] * add
            + ["pointers"] * (not config.descriptors)
        ),
        types,
        {
            "ADD": add,
            "HAS_DESCRIPTORS": config.descriptors,
            "UPCAST": False,
            "BAND": config.band,
        }
        | _absent("low_ptr", unless=split)
        | _blocks(config),
        aligned=("columns", "hidden_size", "gradient_stride", "hidden_stride"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        multiplies=True,
    )


def _hidden_gradient(
    architecture: str,
    dtype: torch.dtype,  # of the weight
    *,
    split: bool = True,
    small: bool = False,
    describable: bool = True,
) -> CompileCase:
    config = hidden_gradient_config(architecture, small=small, describable=describable)
    name, fits = _NAMES[dtype], dtype != torch.float16
    types = _types(
        hidden_gradient_kernel,
        high_ptr="*bf16" if split else "*fp32",
        low_ptr="*i8",
        index_ptr="*i64",
        gradient="*fp16",
        weight=f"*{name}",
    )
    if config.descriptors:
        types["gradient"] = f"tensordesc<fp16[{config.block_n},{config.block_v}]>"
        types["weight"] = f"tensordesc<{name}[{config.block_v},{config.block_h}]>"
    return _case(
        hidden_gradient_kernel,
        ", ".join(
            [f"halves of {name}" if split else f"fp32 of {name}"]
            + ["small"] * small
            + ["pointers"] * (not config.descriptors)
        ),
        types,
        {
            "DTYPE": tl.bfloat16 if fits else tl.float16,
            "HAS_DESCRIPTORS": config.descriptors,
            "UPCAST": False,
            "BAND": config.band,
        }
        | _absent("low_ptr", unless=split)
        | _absent("bound_ptr", unless=fits)
        | _blocks(config),
        aligned=("columns", "hidden_size", "high_stride", "gradient_stride", "weight_stride"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        multiplies=True,
    )


def _accumulate() -> CompileCase:
    return _case(
        accumulate_kernel,
        "halves",
        _types(accumulate_kernel, high_ptr="*bf16", low_ptr="*i8"),
        {"ADD": True, "BLOCK": BLOCK_SUMMED},
        num_warps=8,
    )


def _fitted(architecture: str, *, rows: bool) -> CompileCase:
    return _of_operands(
        architecture,
        fitted_kernel,
        "rows with factors" if rows else "the head",
        _types(fitted_kernel, x_ptr="*bf16", out_ptr="*fp16", index_ptr="*i64"),
        _absent("factor_bound_ptr", "index_ptr", "factor_ptr", unless=rows),
        aligned=("columns", "stride"),
    )


def _keep(architecture: str) -> CompileCase:
    types = _types(keep_kernel, high_ptr="*bf16", low_ptr="*i8", index_ptr="*i64")
    return _of_operands(
        architecture, keep_kernel, "", types, {}, aligned=("columns", "high_stride")
    )


def _take(architecture: str, dtype: torch.dtype, *, split: bool) -> CompileCase:
    name = f"*{_NAMES[dtype]}"
    return _of_operands(
        architecture,
        take_kernel,
        "halves" if split else _NAMES[dtype],
        _types(take_kernel, high_ptr=name, out_ptr=name, low_ptr="*i8", index_ptr="*i64"),
        _absent("low_ptr", unless=split),
        aligned=("columns", "high_stride", "out_stride"),
    )


def _of_operands(
    architecture: str,
    kernel: Any,
    variant: str,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    aligned: tuple[str, ...],
) -> CompileCase:
    config = operands_config(architecture)
    blocks = {"BLOCK_N": config.block_n, "BLOCK_H": config.block_v}
    warps = config.num_warps
    return _case(kernel, variant, types, constants | blocks, aligned=aligned, num_warps=warps)


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
    """As annotated; int64 targets, fp32 other pointers, int32 numbers, but for the special ones."""
    found = {}
    for parameter in kernel.params:
        usual = "*fp32" if parameter.name.endswith("_ptr") else "i32"
        found[parameter.name] = parameter.annotation_type or usual
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
    names = "entropy_ptr", "mean_logits_ptr", "is_top1_ptr", "log_sum_sq_ptr", "peak_ptr"
    return _absent(*names, unless=rich)


def _absent(*pointers: str, unless: bool) -> dict[str, None]:
    """A pointer to nothing is None, which is a compile-time constant."""
    return {} if unless else dict.fromkeys(pointers)
