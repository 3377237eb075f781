"""The TRL part of the suite under other releases: python tests/trl_versions.py [VERSION …]

Without versions, the oldest and the newest that pip has in the range of pyproject.toml. Each gets
an environment of its own, in which that TRL stands before the one installed here.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def in_range():
    """Oldest and newest release that pyproject.toml allows."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, extras["optional-dependencies"]["train"])
    allowed = next(each.specifier for each in requirements if each.name == "trl")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "trl"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed = re.search(r"Available versions: (.*)", pip.stdout).group(1).split(", ")
    fitting = sorted(filter(allowed.contains, listed), key=Version)
    return dict.fromkeys((fitting[0], fitting[-1]))


def passes(version):
    """Whether the tests of fastpref.trl pass under a release."""
    with tempfile.TemporaryDirectory() as directory:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            directory,
        ]
        subprocess.run([*pip, f"trl=={version}"], check=True)
        path = os.pathsep.join(filter(None, [directory, os.environ.get("PYTHONPATH")]))
        found = [sys.executable, "-c", "import trl; print(trl.__version__, trl.__file__)"]
        environment = os.environ | {"PYTHONPATH": path}
        print(f"--- {version}:", end=" ", flush=True)
        subprocess.run(found, env=environment, check=True)
        tests = map(str, sorted((ROOT / "tests").glob("test_trl*.py")))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, env=environment, cwd=ROOT).returncode == 0


if __name__ == "__main__":
    results = {version: passes(version) for version in sys.argv[1:] or in_range()}
    print(*(f"trl {version}: {'passed' if ok else 'FAILED'}" for version, ok in results.items()))
    sys.exit(not all(results.values()))
