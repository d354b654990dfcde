"""How the command line tells what went wrong."""

from __future__ import annotations

import os
import sys


def fail(message: str, code: int = 2) -> int:
    """Tell an error in one line of stderr, with the process where that is not the first; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    where = f"[process {rank}] " if rank != "0" else ""
    print(f"robustloss: error: {where}{' '.join(message.split())}", file=sys.stderr)
    return code


def fail_missing(purpose: str, error: ModuleNotFoundError, extra: str) -> int:
    """Tell which package is missing, and the extra of robustloss that brings it; a module of our own is a bug."""
    if (error.name or "").startswith("robustloss"):
        raise error
    return fail(f'{purpose} needs {error.name}, which is not installed: pip install "robustloss[{extra}]"')
