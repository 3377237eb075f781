"""Every kernel's default configuration, compiled for GPUs that need not be here.

No spills, shared memory within the limit, and the architecture's own matrix instructions.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

import fastpref_kernels
import triton

from fastpref.commands.compile_report import ARCHITECTURES, SHARED_LIMIT, Compiled, compile_all

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)
MINOR = ".".join(triton.__version__.split(".")[:2])
COMMITTED = Path(__file__).parent.parent / "bench" / "results" / f"compile-{MINOR}.json"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request):
    return request.param, list(compile_all((request.param,)))


def test_no_spills_within_shared_memory_with_matrix_instructions(compiled):
    _, found = compiled
    assert [(kernel, faults) for kernel, faults in found if faults] == []
    assert all(kernel.registers > 0 for kernel, _ in found)
    assert all(kernel.instructions > 50 for kernel, _ in found)


def test_every_kernel_is_compiled(compiled):
    kernels = {
        name.removesuffix("_kernel")
        for module in vars(fastpref_kernels).values()
        if getattr(module, "__name__", "").startswith("fastpref_kernels.")
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {kernel.kernel for kernel, _ in compiled[1]}


def test_the_committed_table_is_up_to_date(compiled):
    if not COMMITTED.exists():
        pytest.skip(f"no table of triton {MINOR}")
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"written by triton {committed['triton']}, this is {triton.__version__}")
    architecture, found = compiled
    expected = [k for k in committed["kernels"] if k["architecture"] == architecture]
    assert [Compiled(**kernel) for kernel in expected] == [kernel for kernel, _ in found]


def test_more_work_takes_more_instructions(compiled):
    """Of the same tile, where the architecture has the same for both."""
    found = {
        kernel.variant: kernel for kernel, _ in compiled[1] if kernel.kernel == "row_gradients"
    }
    assert found["fp16"].elements == found["fp16, entropy"].elements > 0
    assert found["fp16"].instructions < found["fp16, entropy"].instructions


def test_a_fault_is_seen():
    fine = Compiled("k", "", "sm_86", "1×1", 4, 1, 255, 0, SHARED_LIMIT["sm_86"], "mma.sync", 9, 1)
    assert fine.faults(expects_matrix=True) == []
    worse = Compiled("k", "", "sm_86", "1×1", 4, 1, 255, 8, SHARED_LIMIT["sm_86"] + 1, "", 9, 1)
    assert len(worse.faults(expects_matrix=True)) == 3
