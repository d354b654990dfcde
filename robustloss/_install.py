"""What to type where something is missing. robustloss is on no package index: it is installed from a checkout."""

from __future__ import annotations

import shlex

PACKAGES = {"yaml": "pyyaml"}  # by module, the package that brings it, where that is called otherwise
REBUILD = "in the checkout: pip install --no-build-isolation --force-reinstall --no-deps ."


def pip_install(*packages: str, extra: str = "") -> str:
    """The command that installs packages (names or requirements), and the one for all that an extra brings."""
    command = f"pip install {' '.join(map(shlex.quote, packages))}"
    return f'{command} (or in the checkout: pip install --no-build-isolation ".[{extra}]")' if extra else command


def package_of(module: str) -> str:
    """The package that a module, of any depth, comes with."""
    top = module.partition(".")[0]
    return PACKAGES.get(top, top.replace("_", "-"))
