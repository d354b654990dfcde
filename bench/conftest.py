"""What every benchmark shares: one way to measure, and the ratios printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# group -> contestant -> (median seconds, bytes that the task must move at least)
RESULTS = pytest.StashKey[dict[str, dict[str, tuple[float, int]]]]()
WARMUP_ROUNDS = 3  # the first rounds pay for memory that the machine has never touched
ROUNDS = 9


def pytest_configure(config):
    config.stash[RESULTS] = {}


@pytest.fixture
def measure(benchmark, request) -> Callable[..., None]:
    """`measure(group, contestant, function, setup=..., least_bytes=...)`: the median time of function(*setup()).

    Every contestant of a group gets fresh arguments from the same untimed `setup`, and the same number of rounds.
    """

    def run(group: str, contestant: str, function: Callable, *, setup: Callable[[], tuple], least_bytes: int) -> None:
        def arguments() -> tuple[tuple, dict[str, Any]]:
            return setup(), {}

        benchmark.group = group
        benchmark.pedantic(function, setup=arguments, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        if benchmark.stats is None:  # --benchmark-disable
            return
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {"least_bytes": least_bytes, "gigabytes_per_second": least_bytes / median / 1e9}
        request.config.stash[RESULTS].setdefault(group, {})[contestant] = (median, least_bytes)

    return run


def pytest_terminal_summary(terminalreporter, config):
    for group, results in config.stash[RESULTS].items():
        terminalreporter.section(f"{group} ({torch.get_num_threads()} threads)")
        ours = [name for name in results if name.startswith("robustloss")]
        header = f"{'':28}{'median ms':>11}{'GB/s':>8}" + "".join(f"{'vs ' + name:>24}" for name in ours)
        terminalreporter.write_line(header)
        for name, (median, least_bytes) in results.items():
            ratios = "".join(f"{median / results[own][0]:>23.2f}x" for own in ours)
            terminalreporter.write_line(f"{name:28}{median * 1e3:>11.2f}{least_bytes / median / 1e9:>8.1f}{ratios}")
