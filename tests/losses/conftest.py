"""What the tests of losses with a state share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest's importlib mode imports no module that lies beside a test: stateful_worker.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def two_processes(tmp_path):
    """Runs stateful_worker.py on two processes: (class name, options, batches) -> what each process has got.

    Every batch has `rank` [B]: which process holds each pair.
    """

    def run(loss: str, options: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        torch.save({"loss": loss, "options": options, "batches": batches}, tmp_path / "job.pt")
        worker = Path(__file__).with_name("stateful_worker.py")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        finished = subprocess.run(
            [sys.executable, *launcher, str(worker), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    return run
