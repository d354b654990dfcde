"""`sequence_logps`: log-probabilities of sequences from their logits; what is measured is in bench/cases.py."""

from __future__ import annotations

from bench.cases import DEVICE, SEQUENCE, cases


def pytest_generate_tests(metafunc):
    every = cases(SEQUENCE, DEVICE, tiny=metafunc.config.getoption("tiny"))
    metafunc.parametrize("case", every, ids=str)


def test_contest(contest, case):
    contest(case)
