"""The examples of several processes, in two of them, against the plain loop in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_settings import GIANT, SHORT

for package in ("transformers", "accelerate", "deepspeed", "lightning"):
    pytest.importorskip(package, reason="pip install 'robustloss[train]' lightning")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the examples have returned in the two processes, the first's first."""
    folder = tmp_path_factory.mktemp("examples")
    worker = Path(__file__).with_name("examples_worker.py")
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            worker,
            folder,
            *SHORT,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "name", ["distributed_data_parallel", "deepspeed_loop", "lightning_module", "accelerate_fsdp2"]
)
def test_two_processes_train_as_the_plain_loop_in_one(results, plain, name, assert_same):
    for process in results:
        assert_same(process[name], plain)


def test_two_processes_of_trainer_train_as_one(results, run, assert_same):
    expected = run("transformers_trainer", GIANT)
    assert_same(results[0]["transformers_trainer"], expected)


def test_fsdp2_has_sharded_the_layers_and_the_rest(results):
    for process in results:
        assert process["shards"] >= 3
