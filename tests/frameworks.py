"""Real classes of other frameworks without what else those import: everything missing is a mock."""

import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest


class _Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, after all others, whatever lies under the given names."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names or name in self.names:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __name__=spec.name, __version__="999")

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def mocked(*names):
    """Imports of these, and of what lies in them, give mocks where nothing of the name is there."""
    before = set(sys.modules)
    finder = _Mocks(names)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], MagicMock):
                del sys.modules[name]


def real(module, name, *, mocks=()):
    """Of a framework in FASTPREF_FRAMEWORKS, by module or by the path of a script in there."""
    directory = os.environ.get("FASTPREF_FRAMEWORKS")
    if not directory:
        pytest.skip("FASTPREF_FRAMEWORKS names no directory of frameworks; see `make frameworks`")
    if directory not in sys.path:
        sys.path.append(directory)
    with mocked(*mocks):
        if not module.endswith(".py"):
            return getattr(importlib.import_module(module), name)
        spec = importlib.util.spec_from_file_location(Path(module).stem, Path(directory, module))
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return getattr(script, name)
