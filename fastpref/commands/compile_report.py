"""Ahead-of-time compilation of every Triton kernel, without a GPU: registers, memory, spills.

Each kernel is compiled in its default configuration for each architecture. It must not spill and
its shared memory must fit; half-precision products must be the architecture's own matrix
instructions. NVIDIA's cubins are read by the `cuobjdump` that ships inside the triton wheel, AMD's
code objects by their own metadata.

Instructions are those of the compiled kernel as it lies in memory, padding too, each once, whether
it runs for every tile, for few of them or for none; beside them, how many of a block's elements a
thread has.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fastpref_kernels
import torch
import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.commands.tables import new_table

KIB = 1024
# The most shared memory that a block may have, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "gfx942": 64 * KIB,
}
ARCHITECTURES = tuple(SHARED_LIMIT)
# What a half-precision product must be made of, in PTX or in GCN assembly.
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "gfx942": "v_mfma",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one architecture; memory in bytes."""

    kernel: str
    variant: str
    architecture: str
    blocks: str
    warps: int
    stages: int
    registers: int  # a thread
    spilled: int  # stack and local memory a thread
    shared: int  # a block
    matrix_instruction: str  # "" if the kernel has none
    instructions: int  # of the whole kernel
    elements: int  # of a block of rows × vocabulary, a thread; 0 for kernels without one

    def faults(self, expects_matrix: bool) -> list[str]:
        """Why this may not ship; empty if it may."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory")
        if expects_matrix and not self.matrix_instruction:
            found.append(f"no {MATRIX_INSTRUCTION[self.architecture]}")
        return found


def compile_case(case: fastpref_kernels.CompileCase, architecture: str) -> Compiled:
    """Compiles one case of `fastpref_kernels.compile_cases`."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, signature, case.constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    binary = triton.compile(source, target=_target(architecture), options=options)
    read = _read_cubin if architecture.startswith("sm_") else _read_code_object
    registers, spilled, instructions = read(binary.asm)
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    instruction = MATRIX_INSTRUCTION[architecture]
    return Compiled(
        kernel=case.kernel.__name__.removesuffix("_kernel"),
        variant=case.variant,
        architecture=architecture,
        blocks="×".join(str(case.constants[b]) for b in names if b.startswith("BLOCK")),
        warps=case.num_warps,
        stages=case.num_stages,
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        matrix_instruction=instruction if instruction in text else "",
        instructions=instructions,
        elements=_elements(case.constants) // (case.num_warps * _target(architecture).warp_size),
    )


def compile_all(
    architectures: tuple[str, ...] = ARCHITECTURES,
) -> Iterator[tuple[Compiled, list[str]]]:
    """Every default configuration, and the faults of each."""
    for architecture in architectures:
        for case in fastpref_kernels.compile_cases(architecture):
            compiled = compile_case(case, architecture)
            yield compiled, compiled.faults(case.multiplies)


def tables_of(found: list[tuple[Compiled, list[str]]]) -> Iterator[Table]:
    """One an architecture."""
    for architecture in dict.fromkeys(compiled.architecture for compiled, _ in found):
        table = new_table(
            f"{architecture}, compiled ahead of time by triton {triton.__version__}, no GPU needed",
            *("kernel", "blocks", "registers", "spilled\nB", "shared\nKiB"),
            *("code", "matrix"),
        )
        for compiled, faults in found:
            if compiled.architecture == architecture:
                name = ": ".join(filter(None, (compiled.kernel, compiled.variant)))
                table.add_row(
                    "\n".join([name, *(f"[bold red]{fault}[/]" for fault in faults)]),
                    compiled.blocks,
                    str(compiled.registers),
                    str(compiled.spilled),
                    f"{compiled.shared / KIB:.1f}",
                    str(compiled.instructions),
                    compiled.matrix_instruction,
                )
        yield table


def write(found: list[tuple[Compiled, list[str]]], path: Path) -> None:
    """The table as JSON: versions, units, and one object a kernel and architecture."""
    content = {
        "triton": triton.__version__,
        "torch": torch.__version__.split("+")[0],
        "units": {
            "registers": "a thread",
            "spilled": "bytes a thread",
            "shared": "bytes a block",
            "instructions": "of the compiled kernel, each once",
            "elements": "rows × vocabulary of a block, a thread",
        },
        "kernels": [dataclasses.asdict(compiled) for compiled, _ in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


def _elements(constants: dict) -> int:
    """Of a block of rows × vocabulary; 0 without one."""
    return constants.get("BLOCK_N", 0) * constants.get("BLOCK_V", 0)


def _read_cubin(asm: dict) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--print-code", file.name)
    registers, stack, local = (_number(f"{name}:", usage) for name in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE)
    return registers, stack + local, len(instructions)


def _tool(name: str, *arguments: str) -> str:
    """What one of the tools inside the triton wheel prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_code_object(asm: dict) -> tuple[int, int, int]:
    # Scalars that do not fit lie in lanes of vector registers, and take no memory.
    names = "vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"
    registers, vector, private = (_number(f".{name}:", asm["amdgcn"]) for name in names)
    instructions = re.findall(r"^\s+(?:v|s|ds|global|buffer|flat)_", asm["amdgcn"], re.MULTILINE)
    return registers, 4 * vector + private, len(instructions)


def _number(label: str, text: str) -> int:
    """What stands behind the label's first occurrence."""
    return int(re.findall(rf"{re.escape(label)}\s*(\d+)", text)[0])
