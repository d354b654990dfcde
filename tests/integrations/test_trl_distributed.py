"""TRL's trainers in two processes x two accumulation steps against one process, whose batch is the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'robustloss[trl]'")
from tiny_models import save_tiny, tiny_llama
from trl_worker import CASES, STEPS, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), tiny_llama())


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """What the two processes have written, the first's first."""
    folder = tmp_path_factory.mktemp("two")
    worker = Path(__file__).with_name("trl_worker.py")
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, model, folder],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return cache(lambda name: train(name, model, tmp_path_factory.mktemp("one"), *CASES[name].whole))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_of_two_microbatches_train_as_one_process_does(results, whole, name):
    expected = whole(name)
    for process in results:
        torch.testing.assert_close(
            torch.tensor(process[name]["parameters"]), torch.tensor(expected["parameters"]), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("name", CASES)
def test_the_logged_loss_is_that_of_the_global_batch(results, whole, name):
    logged, expected = results[0][name]["logged"], whole(name)["logged"]
    assert len(logged) == STEPS
    losses = [record["loss"] for record in expected]
    assert [record["loss"] for record in logged] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert len({round(loss, 4) for loss in losses}) == STEPS


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("kldpo", "tilt/effective_sample_size"),
        ("aot paired", "dominance/violation_w1"),
        ("aot unpaired", "dominance/violation_w1"),
        ("wdpo", "penalty/gradient_norm"),
        ("kto", "kl"),
    ],
)
def test_the_losss_own_metrics_are_those_of_the_global_batch(results, whole, name, metric):
    expected = [record[metric] for record in whole(name)["logged"]]
    assert [record[metric] for record in results[0][name]["logged"]] == pytest.approx(expected, rel=1e-3, abs=1e-4)
