"""Runs a config again and again in children of one warm process, and kills each where it is told to.

    fault_worker.py CONFIG.json   then on stdin, a line each: FOLDER EVENT SECONDS

A child trains in FOLDER until it is about to do its EVENT-th (from 1; 0: never) change to a file of FOLDER or of the
reference cache, or SECONDS (0: never) have passed; then it is killed by SIGKILL. The answer is one line of JSON:
whether it was killed, how many changes it came to, and the seconds it took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from robustloss.train import distributed, report
from robustloss.train.config import load_config
from robustloss.train.loop import run

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def train(settings: dict, folder: str, kill_at: int, counter: int) -> None:
    """In the child. `counter`: where the number of changes so far is told."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        os.pwrite(counter, seen.to_bytes(8, "little"), 0)
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(
        load_config(
            None, base={**settings, "output_dir": f"{folder}/run", "reference": {"cache_dir": f"{folder}/cache"}}
        )
    )


def main(path: Path) -> None:
    settings = json.loads(path.read_text())
    report.write_report = lambda run_dir: run_dir / "report.html"  # it takes longer than all else
    torch.set_num_threads(1)
    distributed.prepare_libraries()
    # What a run imports by and by, once for all children.
    import deepspeed  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    from robustloss.train import engine, references  # noqa: F401

    counter = os.memfd_create("counter")
    for line in sys.stdin:
        folder, kill_at, seconds = line.split()
        os.pwrite(counter, bytes(8), 0)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                train(settings, folder, int(kill_at), counter)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)  # of a child that has ended but not been waited for, nothing
        _, status = os.waitpid(child, 0)
        answer = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "exit_code": os.waitstatus_to_exitcode(status),
            "changes": int.from_bytes(os.pread(counter, 8, 0), "little"),
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
