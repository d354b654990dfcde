"""DeepSpeed's gradients and parameters of the global batch are those of one giant batch, for ZeRO 0 to 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_batch_worker import CASES, cells

pytestmark = pytest.mark.distributed
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine_batch")
    worker = Path(__file__).with_name("engine_batch_worker.py")
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher in ([], together):
        finished = subprocess.run(
            [sys.executable, *launcher, str(worker), str(folder)],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2], ids=["1 process", "2 processes"])
@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_those_of_one_giant_batch(errors, world, case):
    found = {cell: errors[world]["-".join(map(str, cell))] for cell in cells(world) if cell[0] == case}
    assert found
    for cell, error in found.items():
        assert error["value"] <= FLOAT32, cell
        assert error["gradients"] <= FLOAT32, cell
        assert error["parameters"] <= FLOAT32, cell


def test_every_loss_meets_every_stage_in_microbatches_and_without():
    assert {cell[:2] for cell in cells(2)} == {(case, stage) for case in CASES for stage in range(4)}
    assert {cell[1] for cell in cells(1)} == set(range(4))
    assert {cell[0] for cell in cells(1)} == set(CASES)
