"""`python -m pytest bench`: measure every case, print the ratios, and write them down where --results says.

Installed, `python -m robustloss.bench` takes the options below; `pytest --pyargs robustloss.bench` knows none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from . import results
from .cases import DEVICE, Absent, Case
from .measure import (
    MemoryUnknown,
    launches,
    memory_on_cpu,
    memory_on_gpu,
    result_of,
    timing_of_calls,
    timing_on_gpu,
)
from .report import tables
from .results import OURS, Result
from .suites import SUITES

MEASURED = pytest.StashKey[dict[tuple, Result]]()
OUT_OF_TIME = pytest.StashKey[bool]()
UNFINISHED = 75  # exit status when --seconds ran out: try again
START = time.monotonic()


def pytest_addoption(parser):
    group = parser.getgroup("robustloss benchmarks")
    group.addoption("--op", choices=SUITES, help="measure one suite only")
    group.addoption("--results", type=Path, metavar="FOLDER", help="append to FOLDER/<device>.jsonl, go on from there")
    group.addoption("--again", action="store_true", help="measure also what --results holds already")
    group.addoption("--seconds", type=float, metavar="S", help="start no case after S seconds")
    group.addoption("--tiny", action="store_true", help="tiny shapes: tries the suite, measures nothing of use")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # its own table of everything by everything says less than the summary below
    folder = config.getoption("results", None)
    held = results.load(folder / results.file_name()) if folder else []
    current = (results.commit(), results.device_name(), torch.get_num_threads())
    config.stash[MEASURED] = {
        result.key: result for result in held if (result.commit, result.device, result.threads) == current
    }


@pytest.fixture
def contest(request) -> Iterator[Callable[[Case], None]]:
    """`contest(case)`: measure it and write it down, or write down why it is absent."""
    config = request.config
    measured = config.stash[MEASURED]
    folder, seconds = config.getoption("results", None), config.getoption("seconds", None)

    def note(result: Result) -> None:
        measured[result.key] = result
        if folder:
            results.append(folder / results.file_name(), result.to_line())

    def run(case: Case) -> None:
        blank = result_of(case)
        if blank.key in results.finished(measured.values()) and not config.getoption("again", None):
            pytest.skip("measured already")
        if seconds is not None and time.monotonic() - START > seconds:
            config.stash[OUT_OF_TIME] = True
            pytest.skip(f"no time left after {seconds:.0f} s; run again with --results to go on")
        try:
            if not case.is_compiled:
                case.suite.check_agreement(case, DEVICE)
            problem = case.suite.build(case, DEVICE)
            if case.is_compiled:
                problem.run()  # compiles: no measure of a call
            if DEVICE.type == "cuda" and not case.suite.small_calls:
                timing = timing_on_gpu(problem)
            else:
                ours = case.suite.build(replace(case, peer=OURS), DEVICE) if case.is_held_against_ours else None
                benchmark = request.getfixturevalue("benchmark")
                timing = timing_of_calls(problem, benchmark, DEVICE, case.suite.seconds, ours)
                del ours
            memory = memory_on_gpu(case, problem) if DEVICE.type == "cuda" else memory_on_cpu(case)
            launched = launches(case, problem, DEVICE)
        except MemoryUnknown as error:
            note(result_of(case, absent=f"memory not measured: {error}"))
            pytest.fail(f"memory not measured: {error}")
        except Exception as error:
            # Whatever a peer raises is its reason; the suite goes on.
            reason = _one_line(error)
            note(result_of(case, absent=reason))
            if case.is_ceiling or (case.is_ours and not isinstance(error, Absent)):
                raise
            pytest.skip(f"absent: {reason}")
        note(result_of(case, timing, memory, launched, ceilings=_ceilings(case, measured)))

    yield run
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _ceilings(case: Case, measured: dict[tuple, Result]) -> list[Result]:
    """What this case is held against: its group's ceilings, if not one of them."""
    if case.is_ceiling:
        return []
    group = result_of(case).group
    return [
        result for result in measured.values() if result.group == group and result.is_ceiling and result.ms is not None
    ]


def _one_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    first = text.splitlines()[0]
    return first if isinstance(error, Absent) else f"{type(error).__name__}: {first[:200]}"


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and session.config.stash.get(OUT_OF_TIME, False):
        session.exitstatus = UNFINISHED


def pytest_terminal_summary(terminalreporter, config):
    for title, lines in tables(config.stash[MEASURED].values()):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
