"""`python -m pytest bench [--op OP]`: every case of every suite, or of one."""

from __future__ import annotations

from .cases import DEVICE
from .suites import SUITES


def pytest_generate_tests(metafunc):
    op, tiny = (metafunc.config.getoption(name, None) for name in ("op", "tiny"))
    suites = [SUITES[op]] if op else SUITES.values()
    metafunc.parametrize("case", [case for suite in suites for case in suite.cases(DEVICE, bool(tiny))], ids=str)


def test_contest(contest, case):
    contest(case)
