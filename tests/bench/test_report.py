"""The benchmark report, from a handful of results."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from bench.report import latest, main, markdown, tables
from bench.results import Result, append

OURS = Result(
    op="linear_sequence_logps",
    peer="robustloss",
    shape={"B": 2, "T": 512, "V": 32_000, "H": 1024},
    dtype="float32",
    pass_name="forward+backward",
    device="a machine",
    commit="1234567",
    threads=2,
    ms=1000.0,
    ms_spread=5.0,
    peak_bytes=48 * 2**20,
    rate=0.2,
    rate_unit="TFLOP/s",
    ceiling="bare matmuls",
    fraction_of_ceiling=0.9,
    time="2026-01-01T00:00:00+00:00",
)
SLOWER = replace(OURS, peer="eager", ms=2500.0, peak_bytes=256 * 2**20)
ABSENT = replace(OURS, peer="Liger", ms=None, peak_bytes=None, absent="no GPU")


def test_the_table_has_ratios_to_ours_and_who_is_absent():
    text = markdown([OURS, SLOWER, ABSENT], [])
    assert "| eager | 2500.00 | 5.00 | 0.2 | 90% | 256 | 2.50x |" in text
    assert "- Liger: absent, no GPU" in text


def test_a_ratio_goes_by_the_rounds_that_ours_had_in_turn():
    own = replace(SMALL, ms=0.5)  # measured while the machine did something else
    eager = replace(SMALL, peer="eager torch", ms=0.2, ours_ms=0.1)
    assert "| eager torch | 0.2000 | 0.0011 | 1 | 2.00x |" in markdown([own, eager], [])
    assert "| eager torch | 0.2000 | 0.0011 | 1 | 2.00x | 0.10x |" in markdown(
        [own, replace(own, peer="robustloss in place", ms=2.0), eager], []
    )


def test_groups_are_tables_of_their_own():
    titles = [title for title, _ in tables([OURS, SLOWER, replace(OURS, dtype="bfloat16")])]
    assert len(titles) == 2
    assert "float32 [2, 512, 32000] from H = 1024" in titles[0]


SMALL = replace(
    OURS,
    op="coupled_losses",
    shape={"n": 64},
    pass_name="KLDPO(tau), forward+backward",
    ms=0.0512,
    ms_spread=0.0011,
    peak_bytes=None,
    rate=None,
    rate_unit=None,
    ceiling=None,
    fraction_of_ceiling=None,
    launches=1,
)


def test_what_a_suite_does_not_measure_has_no_column():
    eager = replace(SMALL, peer="eager torch", ms=0.512, launches=23)
    text = markdown([SMALL, eager], [])
    assert "### coupled_losses KLDPO(tau), forward+backward, float32 [64]\nno ceiling" in text
    assert "|  | median ms | spread ms | launches | vs robustloss |" in text
    assert "| eager torch | 0.5120 | 0.0011 | 23 | 10.00x |" in text


def test_only_the_latest_commit_of_a_device_is_shown():
    old = replace(OURS, commit="0000000", time="2025-01-01T00:00:00+00:00")
    elsewhere = replace(old, device="another machine")
    assert latest([old, elsewhere, OURS]) == [elsewhere, OURS]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_report_is_written_beside_its_results(tmp_path, capsys):
    for result in (OURS, SLOWER, ABSENT):
        append(tmp_path / "machine.jsonl", result.to_line())
    assert main(["--results", str(tmp_path)]) == 0
    report = tmp_path / "report.md"
    pictures = [tmp_path / f"a-machine-linear-sequence-logps-{what}.png" for what in ("time", "memory")]
    assert capsys.readouterr().out.split() == [str(path) for path in (report, *pictures)]
    for picture in pictures:
        assert picture.stat().st_size > 0
        assert f"({picture.name})" in report.read_text()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_many_sizes_are_drawn_side_by_side_and_an_op_without_results_is_not_drawn(tmp_path):
    compiled = replace(SMALL, peer="torch.compile(eager torch)")
    sort = replace(SMALL, op="soft_sort", shape={"B": 4, "n": 64}, peer="torch.sort")
    absent = replace(ABSENT, op="sequence_logps")
    for result in (SMALL, replace(SMALL, shape={"n": 1024}), compiled, sort, absent):
        append(tmp_path / "machine.jsonl", result.to_line())
    assert main(["--results", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"a-machine-coupled-losses-time.png", "a-machine-soft-sort-time.png"}


def test_a_folder_without_results_is_an_error(tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err
