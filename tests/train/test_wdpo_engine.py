"""WDPO inside DeepSpeed's engine, and why exact WDPO is refused outside of one and under ZeRO-3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("engine") / "results.json"
    finished = subprocess.run(
        [sys.executable, str(HERE / "directional_worker.py"), str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE)))},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("penalty", "tolerance"), [("central", 1e-3), ("one_sided", 1e-2)])
def test_directional_wdpo_in_the_engine_has_the_exact_gradient_and_value(results, stage, penalty, tolerance):
    result = results[f"directional {stage} {penalty}"]
    assert results["without penalty"] > 0.3
    assert result["error"] < tolerance
    assert result["skipped"] == 0
    assert result["value"] == pytest.approx(sum(results["values"]) / 2, rel=1e-4)
    assert result["evaluated"] == pytest.approx(results["values"][0], rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_directional_wdpo_trains_as_one_loss_too(results, stage):
    assert results[f"one loss {stage} central"]["trained"] < 1e-3


@pytest.mark.parametrize("stage", range(3))
def test_exact_wdpo_in_the_engine_passes_and_is_exact_below_zero_3(results, stage):
    result = results[f"one loss {stage} exact"]
    assert result["refused"] is None
    assert result["trained"] < 1e-4


def test_exact_wdpo_in_the_engine_has_no_second_derivative_under_zero_3(results):
    result = results["one loss 3 exact"]
    assert "Error" in result["trained"]
    assert "ValueError: exact WDPO has no second derivative under ZeRO-3" in result["refused"]


@pytest.mark.parametrize("stage", range(4))
def test_a_loss_outside_of_the_engine_is_refused_because_it_raises_or_is_silently_wrong(results, stage):
    result = results[f"outside {stage}"]
    if stage == 1:
        assert result["trained"] > 0.1  # a gradient, and the wrong one
    else:
        assert "Error" in result["trained"]
    assert ("outside of the DeepSpeed engine" if stage < 3 else "under ZeRO-3") in result["refused"]
