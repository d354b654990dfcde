"""What a run leaves to look at: nothing twice, nothing of steps that were undone, and a full disk told by everyone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from robustloss.train.metrics import MetricsWriter


def writer(folder, **options) -> MetricsWriter:
    return MetricsWriter(folder, active=True, total_steps=9, **options)


def test_the_offset_of_a_resumed_run_is_that_of_the_cut_file_before_anything_is_written(tmp_path):
    first = writer(tmp_path)
    first.write(1, "train", {"loss": 0.5})
    kept = first.offset()
    first.write(2, "train", {"loss": 0.25})
    assert first.offset() > kept
    first.close()
    resumed = writer(tmp_path, step=1, offset=kept)
    assert resumed.offset() == kept
    resumed.write(2, "train", {"loss": 0.125})
    resumed.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [0.5, 0.125]


def test_a_resumed_run_removes_the_evaluations_of_the_steps_that_were_undone(tmp_path):
    first = writer(tmp_path)
    for step in (0, 2, 3, 6):
        first.evaluation(step, {"margins": [1.0]}, {"loss": 0.5})
    written = first.offset()
    first.close()
    (tmp_path / "evaluations" / "step_notes.json").write_text("somebody's own")
    writer(tmp_path, step=2, offset=written).close()
    left = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert left == ["step_00000000.json", "step_00000002.json", "step_notes.json"]


FULL_DISK = """
import errno, os, sys
from pathlib import Path
import torch.distributed as dist
from robustloss.train import metrics
from robustloss.train.config import DiskError

folder, rank, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)

def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

if where == "open":
    Path.open = full
writer = metrics.MetricsWriter(folder / "run", active=rank == 0, total_steps=9)
if where != "open":
    writer.check()
if where == "write" and rank == 0:
    writer._file.close()
    writer._file = open("/dev/full", "ab")
if where == "evaluation":
    metrics.replace_file = full
if where == "offset":
    os.fsync = full
writer.write(1, "train", {"loss": 0.5})
if where != "offset":
    writer.evaluation(1, {"margins": [1.0]}, {"loss": 0.5})
writer.advance()
writer.offset()
writer.write(2, "train", {"loss": 0.5})
writer.close()
try:
    writer.check()
except DiskError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["open", "write", "evaluation", "offset"])
def test_what_the_first_process_cannot_write_all_of_them_raise(tmp_path, where):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(rank), where], env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    told = (
        f"metrics in '{tmp_path / 'run'}' cannot be written (No space left on device); the same command goes on from "
        "the last checkpoint\n"
    )
    assert [answer for answer, _ in answers] == [told, told], answers
    lines = tmp_path / "run" / "metrics.jsonl"
    assert not lines.exists() or len(lines.read_text().splitlines()) < 2  # nothing more is written then
