"""The line at the end counts the cases of this process, which are all of them where they are asked for alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import property_cases
import pytest


@pytest.mark.parametrize(
    ("marks", "count", "told"),
    [
        ("slow", {"one": 1200, "other": 34}, ["1,234 cases of 2 properties were tried"]),
        ("slow", {}, []),
        ("not slow", {"one": 5}, []),
    ],
)
def test_the_cases_are_told_where_the_slow_ones_are_asked_for(pytestconfig, monkeypatch, marks, count, told):
    plugin = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    monkeypatch.setattr(property_cases, "tried", Counter(count))
    lines: list[str] = []
    reporter = SimpleNamespace(write_line=lines.append)
    plugin.pytest_terminal_summary(reporter, SimpleNamespace(getoption={"markexpr": marks}.get))
    assert lines == told
