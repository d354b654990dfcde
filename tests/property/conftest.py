"""How many cases a property is tried on, and a line at the end that says how many there were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# pytest's importlib mode imports no module that lies beside a test: property_cases.
sys.path.insert(0, str(Path(__file__).parent))

COMMON = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
# The quick cases are the same on every run; the many are new ones each time, and a failure prints how to repeat it.
settings.register_profile("quick", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("many", max_examples=1000, **COMMON)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter, config):
    """After `pytest -m slow` in one process: xdist's workers would each count their own."""
    from property_cases import tried

    if tried and config.getoption("markexpr") == "slow":
        terminalreporter.write_line(f"{sum(tried.values()):,} cases of {len(tried)} properties were tried")
