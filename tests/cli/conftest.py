"""The folders of runs are those of the training tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from robustloss.cli import main

# pytest's importlib mode imports no module that lies beside a test: run_folders.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))


@pytest.fixture
def robustloss(capsys):
    """Run the command line; returns the exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(robustloss):
    """Run the command line, which must refuse in one line and with code 2; returns the line."""

    def run(*arguments: object) -> str:
        code, out, error = robustloss(*arguments)
        assert (code, out) == (2, "")
        (line,) = error.splitlines()
        assert line.startswith("robustloss: error: ")
        return line

    return run
