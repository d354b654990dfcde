"""linear_sequence_logps of a head that two processes hold a part of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.distributed
def test_a_split_head_gives_the_whole_heads_values_and_gradients():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).with_name("split_head.py")
    finished = subprocess.run([*command, worker], capture_output=True, text=True, timeout=120, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
