"""kill -9 in the middle of a run, then the same command: it goes on, and ends with the same parameters to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from robustloss.train.checkpoint import completed_checkpoints

TIMEOUT = 180  # seconds


def command(tiny, run_dir: Path, processes: int, **changes) -> list[str]:
    settings = tiny.settings(
        run_dir,
        loss={"name": "kldpo", "tau": 1.0},
        batch={"effective_batch": 8 * processes, "microbatch": 4},
        max_steps=60,
        save_every=10,
        eval_every=15,
        **changes,
    )
    config = run_dir.with_suffix(".yaml")
    config.write_text(json.dumps(settings))
    alone = [sys.executable]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*(alone if processes == 1 else together), "-m", "robustloss", "train", "--config", str(config)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_whole(arguments: list[str]) -> str:
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, env=environment())
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def last_step(run_dir: Path) -> int:
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    steps = [int(line.split(b'"step": ')[1].split(b",")[0]) for line in lines if b'"step": ' in line]
    return max(steps, default=0)


def run_and_kill_behind(step: int, arguments: list[str], run_dir: Path) -> None:
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + TIMEOUT
    while last_step(run_dir) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    # torchrun gives its workers sessions of their own, and a kill -9 of it leaves them running.
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(victim.pid, signal.SIGKILL)
    process.wait()


def without_time(run_dir: Path) -> list[dict]:
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


@pytest.mark.parametrize(
    ("processes", "changes", "kills"),
    [
        (1, {}, (13, 37)),
        pytest.param(2, {"zero_stage": 2, "precision": "bf16"}, (37,), marks=pytest.mark.distributed),
    ],
    ids=["alone", "two processes, ZeRO-2, bf16"],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tiny, tmp_path, processes, changes, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_whole(command(tiny, whole, processes, **changes))

    arguments = command(tiny, killed, processes, **changes)
    for step in kills:
        run_and_kill_behind(step, arguments, killed)
        assert not (killed / "model").exists()
    # What a kill in the middle of writing leaves behind is not taken for a checkpoint.
    torn = killed / "checkpoints" / "step_00000059"
    torn.mkdir()
    (torn / "mp_rank_00_model_states.pt").write_bytes(b"half")
    told = run_whole(arguments)

    assert "going on from step 30 of 60" in told
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    # No step is missing, and none is told twice.
    assert without_time(killed) == without_time(whole)
    assert not torn.exists()
    kept = completed_checkpoints(killed / "checkpoints")
    assert [folder.name for folder in kept] == ["step_00000030", "step_00000040", "step_00000050"]  # 30 is the best
