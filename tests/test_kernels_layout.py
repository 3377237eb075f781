"""`kernels/` is a Hub kernel project and shadows nobody from the repository root."""

import ast
import json
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


def test_nothing_is_compiled_into_the_build():
    from kernels._rust import Build

    assert Build.open(ROOT / "kernels").general is not None  # valid to Hugging Face's builder
    build = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())
    assert "torch-noarch" in build
    assert not any("kernel" in key for key in build)
    assert (ROOT / "kernels" / "CARD.md").exists()


def test_hugging_faces_kernels_loads_it(tmp_path):
    """As the Hub's builder would lay it out: one variant without an architecture."""
    pytest.importorskip("triton")
    from kernels import get_local_kernel

    general = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())["general"]
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
    loaded = get_local_kernel(tmp_path, backend="cpu")
    assert Path(loaded.__file__).parent == variant
    assert loaded.__all__ == fastpref_kernels.__all__
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
    # A second copy in one process keeps its operators to itself.
    for ours, theirs in zip(fastpref_kernels.OPERATORS, loaded.OPERATORS, strict=True):
        assert ours._qualname != theirs._qualname


def test_a_wheel_would_hold_every_folder():
    """An editable install finds them all, so nothing else would notice one that is missing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "fastpref").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(settings["packages"]) == sorted(names | {"fastpref_kernels"})
