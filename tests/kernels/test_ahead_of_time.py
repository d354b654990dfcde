"""What the compiler makes of every kernel, for GPUs that need not be there, and what would be held against it."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import robustloss.kernels

ROOT = Path(__file__).parents[2]


# All of them, as without --target, take minutes.
ALL = ("sm_80", "sm_90", "sm_100", "gfx942")
TARGETS = [pytest.param(("sm_90",), id="sm_90"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TARGETS)
def targets(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(request, targets, tmp_path_factory):
    """The process that wrote the report, and the report; a process of its own, where nothing is interpreted."""
    report = tmp_path_factory.mktemp("compile_report") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))  # compiles only what has changed
    command = [sys.executable, "-m", "bench.compile_report", "--json", str(report)]
    command += [] if targets == ALL else [f"--target={target}" for target in targets]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert report.exists(), process.stderr
    return process, json.loads(report.read_text())


@pytest.fixture
def compile_report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("bench.compile_report")


def test_every_kernel_is_compiled_for_every_target(compiled, targets):
    modules = [module.name for module in pkgutil.iter_modules(robustloss.kernels.__path__)]
    kernels = {
        name
        for module in modules
        for name in vars(import_module(f"robustloss.kernels.{module}"))
        if name.endswith("_kernel")
    }
    assert {(row["kernel"], row["target"]) for row in compiled[1]} == {
        (kernel, target) for kernel in kernels for target in targets
    }


def test_nothing_spills_or_takes_too_much_shared_memory_or_reads_narrowly(compiled):
    process, _ = compiled
    assert process.stderr.splitlines() == []
    assert process.returncode == 0


def test_the_table_has_a_line_for_each_row_of_the_report(compiled):
    process, rows = compiled
    lines = process.stdout.splitlines()
    assert len(lines) == len(rows) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)


FINE = {"registers": 64, "local_bytes": 0, "shared_bytes": 16, "load_bytes": 16, "store_bytes": 16}


@pytest.mark.parametrize(
    ("kernel", "change", "complaint"),
    [
        ("token_logps_fwd_kernel", {"local_bytes": 8}, "8 bytes of local memory"),
        ("sequence_sum_kernel", {"local_bytes": 8}, "8 bytes of local memory"),
        ("token_logps_fwd_kernel", {"shared_bytes": 65 * 1024}, "66560 bytes of shared memory"),
        ("token_logps_fwd_kernel", {"load_bytes": 8}, "the widest load has 8 bytes"),
        ("token_logratios_fwd_kernel", {"load_bytes": 8}, "the widest load has 8 bytes"),
        ("token_logps_bwd_kernel", {"store_bytes": 2}, "the widest store has 2 bytes"),
    ],
)
def test_an_offence_is_told_and_makes_the_exit_status_one(
    compile_report, monkeypatch, capsys, kernel, change, complaint
):
    row = compile_report.Row(kernel=kernel, variant="made up", target="gfx942", **FINE)
    compiled_for = []

    def report(targets):
        compiled_for.extend(targets)
        return [row, replace(row, **change)]

    monkeypatch.setattr(compile_report, "report", report)
    monkeypatch.setattr(sys, "argv", ["compile_report"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compile_report.main() == 1
    assert tuple(compiled_for) == ALL
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{kernel} [made up] for gfx942: {complaint}")


@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        ("token_logps_fwd_kernel", {"store_bytes": 4}),  # a few numbers a row
        ("token_logps_bwd_kernel", {"load_bytes": 2, "store_bytes": 2, "aligned": False}),
        ("sequence_sum_kernel", {"load_bytes": 4, "store_bytes": 4}),
        ("sequence_repeat_kernel", {"load_bytes": 4, "store_bytes": 4}),
    ],
)
def test_what_may_be_narrow(compile_report, kernel, change):
    row = compile_report.Row(kernel=kernel, variant="made up", target="sm_90", **FINE)
    assert compile_report.offences([replace(row, **change)]) == []


def test_nothing_is_reported_where_nothing_would_be_compiled(compile_report, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_report"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        compile_report.main()
    assert "TRITON_INTERPRET" in capsys.readouterr().err
