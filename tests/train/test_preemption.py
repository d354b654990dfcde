"""SIGTERM is a request to stop after the step, which all processes follow at the same step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from robustloss.train.interrupt import SIGNALS, Preemption

TIMEOUT = 60  # seconds
CPU = torch.device("cpu")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_once_entered_and_not_after(number):
    heard = []
    previous = signal.signal(number, lambda *_: heard.append(number))
    try:
        with Preemption(CPU) as preemption:
            assert not preemption.requested()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a second one changes nothing
            assert preemption.requested()
            assert preemption.requested()
        assert heard == []
        os.kill(os.getpid(), number)
        assert heard == [number]
    finally:
        signal.signal(number, previous)


def test_an_interrupt_from_the_keyboard_stays_one():
    with pytest.raises(KeyboardInterrupt), Preemption(CPU):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored_when_the_run_fails():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), Preemption(CPU):
        _ = 1 / 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_outside_of_the_main_thread_takes_no_signals():
    answers = []

    def run():
        with Preemption(CPU) as preemption:
            answers.append(preemption.requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.5])
def test_a_sum_carries_the_flags_whatever_its_value(value):
    with Preemption(CPU) as preemption:
        assert preemption.sum_with(torch.tensor(value)) == pytest.approx(value, nan_ok=True)
        assert not preemption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.sum_with(torch.tensor(value))
        assert preemption.requested()


def wait_for(file: Path, least: int | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not file.exists() or (least is not None and int(file.read_text() or 0) < least):
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_further_ones_do_not_hurt(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    arguments = [sys.executable, str(Path(__file__).with_name("preemption_worker.py")), str(tmp_path)]
    group = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(arguments, env={**group, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    wait_for(tmp_path / "at_1", least=10)
    workers[1].send_signal(signal.SIGTERM)
    for rank, worker in enumerate(workers):
        wait_for(tmp_path / f"saving_{rank}")
        worker.send_signal(signal.SIGTERM)
    for worker in workers:
        _, said = worker.communicate(timeout=TIMEOUT)
        assert (worker.returncode, said) == (0, "")
    saved = [int((tmp_path / f"saved_{rank}").read_text()) for rank in range(2)]
    assert saved[0] == saved[1] >= 10
