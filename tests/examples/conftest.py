"""The examples as modules."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

# pytest's importlib mode imports no module that lies beside a test.
sys.path.append(str(Path(__file__).parent))

from example_settings import GIANT, with_large_epsilon


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run():
    """run(name, arguments) -> what the example's main returns."""

    def run_example(name, arguments=()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "__init__", with_large_epsilon)
            return import_module(name).main(list(map(str, arguments)))

    return run_example


@pytest.fixture(scope="session")
def plain(run):
    """One process, a hand-written loop, one giant batch a step: what all others must equal."""
    return run("plain_pytorch", GIANT)


@pytest.fixture(scope="session")
def assert_same():
    """assert_same(history, expected): two runs had the same loss and the same rewards at every step.

    (How many margins are above zero is rounding at the first step, where all are zero.)
    """

    def compare(history, expected):
        names = {"loss", "rewards/margins", "rewards/chosen", "tilt/effective_sample_size", "tilt/max_weight"}
        assert len(history) == len(expected)
        for step, other in zip(history, expected, strict=True):
            for name in names & set(other):
                assert step[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name

    return compare
