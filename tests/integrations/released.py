"""Releases of other frameworks, where they are installed; what they import and the test does not call may be absent."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest


class _Absent(ModuleType):
    """A module in which every name is something that can be imported, and every class something to inherit from."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}) if name[0].isupper() else MagicMock(name=name))
        return getattr(self, name)


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: set[str]):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        found = fullname.partition(".")[0] in self.packages
        return ModuleSpec(fullname, self, is_package=True) if found else None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


def import_released(module: str, *, absent: str) -> ModuleType:
    """The module, or skip. Of the packages in `absent` (by spaces) those that are not installed are imitated."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install {package}")
    importlib.import_module("transformers")
    missing = {name for name in absent.split() if importlib.util.find_spec(name) is None}
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return pytest.skip(f"{module} cannot be imported here: {error}")
    finally:
        sys.meta_path.remove(finder)
        # What looks for these packages later must not find the imitations.
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]
