"""A run killed at random moments, in the middle of writing checkpoints and caches too, ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

KILLS = 20
SEED = 20
TIMEOUT = 300  # seconds that a run of a second or two may take on a slow machine


@pytest.fixture
def attempt(tiny, tmp_path):
    """Trains in a folder of this name, until killed or done: what the worker tells."""
    settings = tiny.settings(
        tmp_path / "unused",
        loss={"name": "beta_dpo"},  # with a state of its own
        batch={"effective_batch": 6, "microbatch": 2},
        max_steps=8,
        save_every=2,
        eval_every=3,
    )
    for key in ("output_dir", "reference"):
        settings.pop(key, None)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fault_worker.py")), str(tmp_path / "settings.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def call(name: str, kill_at: int = 0, seconds: float = 0.0) -> dict:
        (tmp_path / name).mkdir(exist_ok=True)
        worker.stdin.write(f"{tmp_path / name} {kill_at} {seconds}\n")
        worker.stdin.flush()
        watchdog = threading.Timer(TIMEOUT, worker.kill)
        watchdog.start()
        try:
            line = worker.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, f"the worker ended, or was killed after {TIMEOUT} seconds without an answer"
        answer = json.loads(line)
        assert answer["killed"] or answer["exit_code"] == 0
        return answer

    yield call
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0


def content_of(folder: Path) -> dict[str, object]:
    """Every file that is to be the same in both runs, and the names of all others."""
    content: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard"):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            content[name] = [{key: value for key, value in row.items() if key not in measured} for row in rows]
        elif "checkpoints" in path.parts or path.name in ("model_digests.json", "starts.jsonl"):
            content[name] = None  # they hold times and the number of starts
        elif path.name == "config.yaml":
            content[name] = path.read_text().replace(str(folder), "")
        else:
            content[name] = path.read_bytes()
    return content


@pytest.mark.distributed
def test_a_run_killed_at_random_moments_ends_with_the_same_bits_and_leaves_nothing_half_written(attempt, tmp_path):
    whole = attempt("whole")
    expected = content_of(tmp_path / "whole")
    draw = random.Random(SEED)
    kills, runs, killed_at = 0, 0, []
    while kills < KILLS:
        runs += 1
        done = False
        while not done:
            # By turns before a change to a file, in caches and checkpoints above all, and at any time.
            if kills >= KILLS:
                answer = attempt(f"killed{runs}")
            elif kills % 2:
                answer = attempt(f"killed{runs}", seconds=draw.uniform(0.2, whole["seconds"]))
            else:
                answer = attempt(f"killed{runs}", kill_at=draw.randint(1, whole["changes"] // 2))
            kills += answer["killed"]
            killed_at += [answer["changes"]] if answer["killed"] else []
            done = not answer["killed"]
        assert content_of(tmp_path / f"killed{runs}") == expected
    assert kills == KILLS
    assert len(set(killed_at)) > 3  # at many places, though a slow machine comes less far in the same seconds
