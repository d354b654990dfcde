"""`robustloss bench`: which suites it finds, how it starts them, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from robustloss.cli import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(monkeypatch):
    """What would have been started: the command and its environment."""
    calls = []

    def run(command, *, check, env):
        calls.append((command, env))
        return SimpleNamespace(returncode=75)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_suites_are_found_and_named_without_importing_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    suites = pytest.importorskip("bench.suites")
    folder = bench.find_suites()
    assert folder is not None
    assert bench.suite_names(folder) == sorted(suites.SUITES)


def test_pytest_is_started_on_the_suites_with_the_options(robustloss, started, monkeypatch, tmp_path):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    options = ["--op", "soft_sort", "--results", "out", "--seconds", "5", "--tiny", "--again"]
    assert robustloss("bench", *options)[0] == 75  # pytest's own
    ((command, environment),) = started
    assert command[:3] == [sys.executable, "-m", "pytest"]
    assert Path(command[3]) == bench.find_suites()
    assert {"--op=soft_sort", "--results=out", "--seconds=5.0", "--tiny", "--again"} <= set(command)
    assert not [name for name in environment if name.startswith("PYTEST_")]
    assert (tmp_path / "out").is_dir()


def test_installed_suites_are_modules_of_robustloss_and_a_trees_are_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "PACKAGE", tmp_path / "robustloss")
    in_tree = tmp_path / "bench"
    in_tree.mkdir()
    (in_tree / "test_suites.py").touch()
    assert bench.find_suites() == in_tree
    assert bench._environment(in_tree)["PYTHONPATH"].split(":")[0] == str(tmp_path)
    installed = tmp_path / "robustloss" / "bench"
    installed.mkdir(parents=True)
    (installed / "test_suites.py").touch()
    assert bench.find_suites() == installed
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "PYTHONPATH" not in bench._environment(installed)


def test_what_keeps_it_from_measuring_is_told_in_a_line(refused, started, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    assert "--op 'nonsense' is unknown; there are coupled_losses, " in refused("bench", "--op", "nonsense")
    monkeypatch.setattr(bench, "find_suites", lambda: None)
    assert "holds no benchmarks" in refused("bench")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else real(name))
    line = refused("bench")
    assert "needs pytest-benchmark, which is not installed: pip install pytest-benchmark (or in the checkout: " in line
    assert line.endswith('pip install --no-build-isolation ".[bench]")')
    assert not started


def test_results_that_can_lie_nowhere_are_told_in_a_line(refused, started, tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "results", "Not a directory")):
        assert refused("bench", "--results", folder).endswith(f"--results '{folder}' cannot be made a folder: {why}")
    assert not started


def test_the_suites_start_wherever_the_user_is(tmp_path):
    """No case is begun in no time, so this is the collection, the configuration and the exit code."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    command = [sys.executable, "-m", "robustloss", "bench", "--op=soft_sort", "--tiny", "--seconds=0"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 75, finished.stdout + finished.stderr
    assert "skipped" in finished.stdout
