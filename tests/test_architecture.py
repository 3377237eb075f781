"""The arrow: commands, trl → the core → the kernels; the definition and the objectives below it."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADAPTERS = ("fastpref.commands", "fastpref.trl", "fastpref.adapters")
ENTRY = "fastpref.__main__"  # python -m fastpref: the commands


@dataclass(frozen=True)
class Import:
    """One imported module: absolute, whatever the statement looked like."""

    file: Path
    line: int
    of: str  # the importing module
    what: str
    runs: bool  # at import, neither in a function nor for type checkers alone


@dataclass(frozen=True)
class Rule:
    """Modules under `of` (but not under `but`) import of fastpref only `ours`, else `others`.

    None allows everything, but what another rule forbids.
    """

    text: str
    of: tuple[str, ...]
    but: tuple[str, ...] = ()
    ours: tuple[str, ...] | None = None
    others: tuple[str, ...] | None = None
    forbidden: tuple[str, ...] = ()

    def allows(self, found: Import) -> bool:
        if not under(found.of, self.of) or under(found.of, self.but):
            return True
        if under(found.what, self.forbidden):
            return False
        is_ours = under(found.what, ("fastpref",))
        allowed = self.ours if is_ours else self.others
        if allowed is None or (not is_ours and found.what.split(".")[0] in sys.stdlib_module_names):
            return True
        return under(found.what, allowed)


RULES = (
    Rule(
        "the core imports torch, the standard library, fastpref_kernels and itself",
        of=("fastpref",),
        but=(*ADAPTERS, ENTRY),
        others=("torch", "fastpref_kernels"),
        forbidden=ADAPTERS,
    ),
    Rule(
        "objectives are pure functions: of fastpref they import domains alone",
        of=("fastpref.objectives",),
        ours=("fastpref.objectives", "fastpref.domains"),
        others=("torch",),
    ),
    Rule(
        "the definition imports of fastpref only objectives, output, planner and domains",
        of=("fastpref.reference",),
        ours=(
            "fastpref.reference",
            "fastpref.objectives",
            "fastpref.output",
            "fastpref.planner",
            "fastpref.domains",
        ),
        others=("torch",),
    ),
    Rule(
        "backends know no schedules and nothing above them",
        of=("fastpref.backends",),
        ours=("fastpref.backends", "fastpref.objectives"),
    ),
    Rule(
        "schedules know nothing above them, and no backend but through its interface",
        of=("fastpref.schedules",),
        forbidden=(
            "fastpref.loss",
            "fastpref.scheduled",
            "fastpref.reference",
            "fastpref.validation",
            "fastpref.backends.torch_backend",
            "fastpref.backends.triton_backend",
        ),
    ),
    Rule(
        "nobody but the commands imports the commands",
        of=("fastpref",),
        but=("fastpref.commands", ENTRY),
        forbidden=("fastpref.commands",),
    ),
    Rule(
        "the loss head needs no TRL: frameworks bring an older one, or none",
        of=("fastpref.trl.head", "fastpref.trl.stock"),
        others=("torch", "transformers", "peft", "packaging"),
    ),
    Rule(
        "other frameworks get the public functions and the loss head, and nothing of TRL's trainer",
        of=("fastpref.adapters",),
        ours=("fastpref.loss", "fastpref.sequences", "fastpref.trl.head"),
        others=("torch", "openrlhf"),
    ),
    Rule(
        "trl is an adapter: it imports the core and what TRL stands on",
        of=("fastpref.trl",),
        but=("fastpref.trl.ulysses",),
        others=("torch", "transformers", "trl", "accelerate", "datasets", "peft", "packaging"),
    ),
    Rule(
        "DeepSpeed, which need not be there, is imported where its attention is",
        of=("fastpref.trl.ulysses",),
        ours=(),
        others=("torch", "transformers", "deepspeed"),
    ),
)


def under(module, packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


def modules_of(root):
    """File of each module of `root/fastpref` by its name."""
    files = {}
    for file in sorted((root / "fastpref").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports_of(root):
    """Every import in `root/fastpref`, those inside functions too."""
    files = modules_of(root)
    found = []
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        pending = [(node, True) for node in ast.parse(file.read_text()).body]
        while pending:
            node, runs = pending.pop()
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *filter(None, [base])])
                # `from package import module` names a module, `from module import name` none.
                names = [f"{base}.{alias.name}" for alias in node.names]
                names = [name if name in files else base for name in names]
            found += [
                Import(file, node.lineno, module, name, runs) for name in dict.fromkeys(names)
            ]
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            inside = runs and not is_function
            orelse = node.orelse if for_types else []
            for child in ast.iter_child_nodes(node):
                pending.append((child, inside and not (for_types and child not in orelse)))
    return found


def violations(root):
    return [
        f"{found.file.relative_to(root)}:{found.line}: imports {found.what}, but {rule.text}"
        for found in imports_of(root)
        for rule in RULES
        if not rule.allows(found)
    ]


def cycle(root):
    """Modules whose imports at import lead back to themselves, [] if there are none."""
    files = modules_of(root)
    graph = {module: set() for module in files}
    for found in imports_of(root):
        if found.runs and found.what in files and found.what != found.of:
            graph[found.of].add(found.what)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_against_the_arrow():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_no_cycle_of_imports():
    found = cycle(ROOT)
    assert not found, " imports ".join(reversed(found))


def plant(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("loss.py", "import torch\nimport transformers.utils\n", "loss.py:2: imports transformers"),
        ("sequences.py", "def f():\n    import numpy as np\n", "sequences.py:2: imports numpy"),
        ("planner.py", "from . import trl\n", "planner.py:1: imports fastpref.trl,"),
        ("domains.py", "from fastpref.commands import cli\n", "fastpref.commands.cli, but nobody"),
        ("trl/head.py", "if 1:\n    from ..commands.cli import app\n", "head.py:2: imports"),
        ("trl/head.py", "import rich\n", "imports rich, but trl is an adapter"),
        ("objectives/base.py", "from fastpref.loss import preference_loss\n", "pure functions"),
        ("objectives/base.py", "from ..schedules import Prompts\n", "fastpref.schedules, but obj"),
        ("reference/head.py", "from fastpref import sequences\n", "but the definition imports"),
        ("reference/head.py", "import fastpref_kernels\n", "fastpref_kernels, but the definition"),
        ("backends/products.py", "from fastpref import schedules\n", "but backends know no sch"),
        ("schedules/recompute.py", "from fastpref.loss import x\n", "but schedules know nothing"),
        ("schedules/recompute.py", "import fastpref.backends.torch_backend\n", "its interface"),
    ],
)  # fmt: skip
def test_each_rule_finds_what_it_forbids(name, text, message, tmp_path):
    packages = ("", "backends/", "commands/", "objectives/", "reference/", "schedules/", "trl/")
    plant(tmp_path, {f"fastpref/{package}__init__.py": "" for package in packages})
    plant(tmp_path, {"fastpref/sequences.py": "", "fastpref/commands/cli.py": "import typer\n"})
    assert not violations(tmp_path)
    plant(tmp_path, {f"fastpref/{name}": text})
    found = violations(tmp_path)
    assert any(message in line for line in found), found
    assert all(line.startswith(f"fastpref/{name}:") for line in found)


@pytest.mark.parametrize(
    ("text", "is_cycle"),
    [
        ("from fastpref import b", True),
        ("from fastpref.b import x", True),
        ("try:\n    from . import b\nexcept ImportError:\n    pass", True),
        ("class A:\n    from . import b", True),
        ("def f():\n    from . import b", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b", False),
        ("if not TYPE_CHECKING:\n    from . import b", True),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from . import b", True),
    ],
)
def test_a_cycle_is_found(text, is_cycle, tmp_path):
    plant(tmp_path, {"fastpref/__init__.py": "", "fastpref/a.py": text})
    plant(
        tmp_path, {"fastpref/b.py": "from fastpref.c import x", "fastpref/c.py": "from . import a"}
    )
    assert bool(cycle(tmp_path)) == is_cycle


WITHOUT = """
import sys

ABSENT = ("accelerate", "datasets", "matplotlib", "peft", "rich", "transformers", "trl", "typer")

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuses())
import torch
from fastpref import UniDPO, preference_loss

hidden, weight = torch.randn(4, 3, 8).requires_grad_(), torch.randn(31, 8).requires_grad_()
vectors = torch.randn(4)
targets = torch.randint(0, 31, (4, 3))
loss = preference_loss(hidden, weight, targets, UniDPO(), ref_logps=vectors, scores=vectors).loss
loss.backward()
assert hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0
assert not [name for name in sys.modules if name.split(".")[0] in ABSENT]
"""


def test_the_losses_need_torch_alone():
    command = [sys.executable, "-c", WITHOUT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
