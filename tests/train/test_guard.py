"""A step that is not finite leaves no trace, and a run of them ends the run."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from guard_worker import CELLS

from robustloss import cli
from robustloss.train.guard import TOLD_ROWS, Guard, TooManySkippedSteps

TIMEOUT = 300  # seconds


class NotFinite(FloatingPointError):
    """As robustloss.global_batch raises it."""

    def __init__(self, positions):
        super().__init__("policy_chosen_logps are not finite")
        self.positions = positions


def rows_of(process, microbatch):
    return [100 * process + 10 * microbatch + row for row in range(4)]


def test_steps_in_a_row_end_the_run_and_others_do_not():
    guard = Guard(max_skipped=3)
    for step in (1, 2, 4, 5):
        guard.skip(step, "the gradient is not finite")
        if step == 2:
            guard.accept()
    assert guard.skipped == 4
    with pytest.raises(TooManySkippedSteps, match=r"^step 6: the gradient is not finite; 3 steps in a row"):
        guard.skip(6, "the gradient is not finite")


def test_one_allowed_step_ends_the_run_at_the_first():
    told = "step 7: the loss is nan; the step was left out, and the run ends; start again"
    with pytest.raises(FloatingPointError, match=told):
        Guard(max_skipped=1).skip(7, "the loss is nan")


def test_the_rows_of_the_data_are_told(caplog):
    guard = Guard(max_skipped=2)
    with caplog.at_level(logging.WARNING, logger="robustloss"):
        guard.skip(1, NotFinite([(1, 0, 3), (0, 2, 1), (1, 0, 3)]), rows_of)
    assert caplog.messages == [
        "step 1: policy_chosen_logps are not finite, rows [21, 103] of data.train (counted from 0); the step is left "
        "out (1 in a row)"
    ]
    with pytest.raises(TooManySkippedSteps, match=r"^step 2: .*, rows \[0\] of data\.train") as raised:
        guard.skip(2, NotFinite([(0, 0, 0)]), rows_of)
    assert "\n" not in str(raised.value)


def test_no_more_rows_are_told_than_anybody_reads():
    every = [(process, microbatch, row) for process in range(9) for microbatch in range(9) for row in range(4)]
    with pytest.raises(TooManySkippedSteps, match=f"and {len(every) - TOLD_ROWS} more of data.train"):
        Guard(max_skipped=1).skip(1, NotFinite(every), rows_of)


def test_a_resumed_run_counts_on():
    guard, resumed = Guard(max_skipped=2), Guard(max_skipped=2)
    guard.skip(1, "the gradient is not finite")
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.skipped == 1
    with pytest.raises(TooManySkippedSteps):
        resumed.skip(2, "the gradient is not finite")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """What holds of each cell in each of two processes, one of which meets the NaN."""
    result = tmp_path_factory.mktemp("guard") / "held.json"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    arguments = [sys.executable, str(Path(__file__).with_name("guard_worker.py")), str(result)]
    group = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(arguments, env={**group, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=TIMEOUT)
        assert worker.returncode == 0, said
    return json.loads(result.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "ZeRO-{}, {}, accumulation {}".format(*cell))
def test_a_step_that_is_left_out_leaves_no_trace(held, cell):
    for of_process in held:
        checks = of_process[str(cell)]
        assert len(checks) > 10
        assert [name for name, holds in checks.items() if not holds] == []


@pytest.fixture
def little_disk():
    """No file may grow beyond 64 KiB, which writers are told as they are told of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("little_disk", "without_report")
def test_a_full_disk_is_one_line_and_code_1(tiny, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(tiny.settings(tmp_path / "run", max_steps=3, save_every=1)))
    assert cli.main(["train", "--config", str(config)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("robustloss: error: ")
    assert last.endswith("the same command goes on from the last checkpoint")
    assert not list((tmp_path / "run").glob("checkpoints/*/COMPLETED"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "No space left on device: 'runs/x'"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "is the disk full?"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "is the disk full?"),
        (type("SafetensorError", (Exception,), {})("I/O error: gone (os error 28)"), "No space left on device"),
    ],
    ids=["an ordinary file", "torch's zip", "torch's writer", "safetensors"],
)
def test_whatever_finds_the_disk_full_it_is_told_as_such(monkeypatch, capsys, tiny, error, told):
    def fail(_):
        raise error

    monkeypatch.setattr("robustloss.train.loop.run", fail)
    arguments = [f"model.name_or_path={tiny.gpt2}", f"data.train={tiny.pairs}", "loss.name=dpo"]
    assert cli.main(["train", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_an_error_that_is_no_machines_keeps_its_traceback(monkeypatch, tiny):
    def fail(_):
        raise FileNotFoundError(errno.ENOENT, "a bug")

    monkeypatch.setattr("robustloss.train.loop.run", fail)
    with pytest.raises(FileNotFoundError, match="a bug"):
        cli.main(["train", f"model.name_or_path={tiny.gpt2}", f"data.train={tiny.pairs}", "loss.name=dpo"])
