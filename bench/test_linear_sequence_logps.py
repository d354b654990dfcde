"""`linear_sequence_logps`: the same from hidden states and the output head; what is measured is in bench/cases.py."""

from __future__ import annotations

from bench.cases import DEVICE, LINEAR, cases


def pytest_generate_tests(metafunc):
    every = cases(LINEAR, DEVICE, tiny=metafunc.config.getoption("tiny"))
    metafunc.parametrize("case", every, ids=str)


def test_contest(contest, case):
    contest(case)
