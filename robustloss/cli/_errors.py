"""How the command line tells what went wrong."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from robustloss._install import package_of, pip_install


class Parser(argparse.ArgumentParser):
    """Tells an error in one line, and which command's help to look at; so do the parsers of the commands."""

    def parse_known_args(self, *given: Any, **options: Any) -> Any:
        namespace, unknown = super().parse_known_args(*given, **options)
        if unknown:  # a command would hand them to the parser above it, which knows no more of them
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message} (see {self.prog} --help)"))


def fail(message: str, code: int = 2) -> int:
    """Tell an error in one line of stderr, with the process where that is not the first; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    where = f"[process {rank}] " if rank != "0" else ""
    print(f"robustloss: error: {where}{' '.join(message.split())}", file=sys.stderr)
    return code


def fail_missing(purpose: str, error: ModuleNotFoundError, extra: str) -> int:
    """Tell which package is missing, and how to get it and all of the extra; a module of our own is a bug."""
    if error.name is None or error.name.startswith("robustloss"):
        raise error
    package = package_of(error.name)
    return fail(f"{purpose} needs {package}, which is not installed: {pip_install(package, extra=extra)}")
