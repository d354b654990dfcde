"""`python -m pytest bench [--op OP]`: every case of every suite, or of one."""

from __future__ import annotations

from bench.cases import DEVICE
from bench.suites import SUITES


def pytest_generate_tests(metafunc):
    op, tiny = (metafunc.config.getoption(name) for name in ("op", "tiny"))
    suites = [SUITES[op]] if op else SUITES.values()
    metafunc.parametrize("case", [case for suite in suites for case in suite.cases(DEVICE, tiny)], ids=str)


def test_contest(contest, case):
    contest(case)
