"""`kernels/` is a Hub kernel project and shadows nobody from the repository root."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import fastpref_kernels
import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels" / "torch-ext" / "fastpref_kernels"
BUILD = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())


def run_at_root(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_hugging_faces_kernels_is_not_shadowed():
    result = run_at_root(
        "import sys; sys.path.insert(0, ''); import kernels;"
        "from kernels import get_local_kernel; print(kernels.__file__)"
    )
    assert result.returncode == 0, result.stderr
    assert ROOT not in Path(result.stdout.strip()).parents or ".venv" in result.stdout
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_use_of_it_is_not_shadowed():
    """Transformers looks the package up by name and version, and then imports from it."""
    result = run_at_root(
        "import sys; sys.path.insert(0, '');"
        "from transformers.utils.import_utils import is_kernels_available;"
        "assert is_kernels_available('0', '99'), 'kernels is not seen';"
        "import transformers.integrations.hub_kernels;"
        "from kernels import LayerRepository, kernelize, use_kernel_forward_from_hub"
    )
    assert result.returncode == 0, result.stderr


def test_its_import_name_needs_no_path():
    assert Path(fastpref_kernels.__file__).parent == PACKAGE
    for name in fastpref_kernels.__all__:
        assert hasattr(fastpref_kernels, name)


def test_where_the_kernels_cannot_run_they_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "'mps'" in fastpref_kernels.unavailable_reason("mps")
    assert "TRITON_INTERPRET" in fastpref_kernels.unavailable_reason("cpu")
    if not torch.cuda.is_available():
        assert "no 'cuda' device" in fastpref_kernels.unavailable_reason("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fastpref_kernels.unavailable_reason("cpu") is None


def test_only_relative_imports_torch_triton_and_the_standard_library():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in modules:
                root = module.split(".")[0]
                assert root in {"torch", "triton"} | sys.stdlib_module_names, (path.name, module)


def test_hugging_faces_builder_takes_the_project(capfd):
    from kernels._rust import Build

    assert Build.open(ROOT / "kernels").general is not None
    assert "legacy" not in capfd.readouterr().err


def test_nothing_is_compiled_into_the_build():
    assert "torch-noarch" in BUILD
    assert not any("kernel" in key for key in BUILD)


def test_the_build_takes_every_file_of_the_package():
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    suffixes = {path.suffix[1:] for path in files if path.parent.name != "__pycache__"}
    assert "py" in suffixes
    assert suffixes <= {*BUILD["torch-noarch"]["pyext"]}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0)])
def test_capabilities_of_the_build_are_those_that_the_kernels_take(capability, monkeypatch):
    from kernels.archs import _supports_cuda_capability

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    declared = _supports_cuda_capability(BUILD["torch-noarch"]["cuda_capabilities"], capability)
    assert declared == (fastpref_kernels.unavailable_reason("cuda") is None)


@pytest.fixture
def built(tmp_path):
    """As the Hub's builder would lay it out: one variant without an architecture."""
    pytest.importorskip("triton")
    general = BUILD["general"]
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": "_fastpref_kernels_under_test",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


def test_hugging_faces_kernels_loads_it(built):
    from kernels import get_local_kernel

    loaded = get_local_kernel(built, backend="cpu")
    assert Path(loaded.__file__).parent == built / "build" / "torch-cpu"
    assert loaded.__all__ == fastpref_kernels.__all__
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
    # A second copy in one process keeps its operators to itself.
    for ours, theirs in zip(fastpref_kernels.OPERATORS, loaded.OPERATORS, strict=True):
        assert ours._qualname != theirs._qualname


def interpreted(built, *command):
    """The output of `python …` with the kernels interpreted and found in `built`."""
    local = f"{BUILD['general']['hub']['repo-id']}={built}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "LOCAL_KERNELS": local}
    run = subprocess.run(
        [sys.executable, *command],
        cwd=built,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_hubs_tests_pass(built):
    options = ["-q", "-p", "no:cacheprovider", "-o", "markers=kernels_ci", "-m", "kernels_ci"]
    tests = shutil.copytree(ROOT / "kernels" / "tests", built / "tests")
    said = interpreted(built, "-m", "pytest", *options, str(tests))
    assert "passed" in said and "skipped" not in said


BENCHMARK = """
from pathlib import Path
from kernels.cli.benchmark import discover_benchmark_classes, run_benchmark_class

here = Path.cwd()
for found in discover_benchmark_classes(here / "benchmarks" / "benchmark.py", here):
    results, _ = run_benchmark_class(found, 1, 0, str(here), True, "local")
    print(*(name for name, result in results.items() if result.verified))
"""


def test_the_hubs_benchmark_runs(built):
    """Its numbers mean nothing here, but the runner has compared the results."""
    shutil.copytree(ROOT / "kernels" / "benchmarks", built / "benchmarks")
    assert interpreted(built, "-c", BENCHMARK).split() == ["projection", "rows"]


def test_a_wheel_would_hold_every_folder():
    """An editable install finds them all, so nothing else would notice one that is missing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "fastpref").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(settings["packages"]) == sorted(names | {"fastpref_kernels"})


def test_a_wheel_would_hold_every_launch_configuration():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = data["package-data"]["fastpref_kernels"]
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files == {*PACKAGE.glob("*.py"), *PACKAGE.glob(pattern)}
    assert pattern.endswith(".json")
