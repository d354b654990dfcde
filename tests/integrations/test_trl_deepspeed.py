"""Trainer's own DeepSpeed engine, ZeRO-2 in one process on the CPU, against the same run without it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'robustloss[trl]'")
pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'robustloss[train]'")
from trl_deepspeed_worker import LOSSES, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(gpt2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    finished = subprocess.run(
        [sys.executable, Path(__file__).with_name("trl_deepspeed_worker.py"), gpt2_folder, folder],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        },
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", LOSSES)
def test_deepspeed_takes_the_steps_of_a_run_without_it(results, gpt2_folder, tmp_path, name):
    found, expected = results[name], train(name, gpt2_folder, tmp_path)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    update, plain = torch.tensor(found["update"]), torch.tensor(expected["update"])
    assert (update - plain).norm() < 1e-5 * plain.norm()
    assert plain.norm() > 0
