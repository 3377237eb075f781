"""`kernels/` is a Hub kernel project and shadows nobody from the repository root."""

import subprocess
import sys
from pathlib import Path

import fastpref_kernels

ROOT = Path(__file__).parent.parent


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
    package = ROOT / "kernels" / "torch-ext" / "fastpref_kernels"
    assert Path(fastpref_kernels.__file__).parent == package
    for name in fastpref_kernels.__all__:
        assert hasattr(fastpref_kernels, name)
