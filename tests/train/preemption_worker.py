"""Takes steps until it is asked to stop, then saves for a while; started by test_preemption.py.

python preemption_worker.py FOLDER   (with the environment of a process group)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from robustloss.train.interrupt import Preemption

SAVING = 1.0  # seconds


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Preemption(torch.device("cpu")) as preemption:
        for step in range(1, 6000):
            time.sleep(0.01)
            if step % 2:  # with and without a sum in which the flags travel
                assert preemption.sum_with(torch.tensor(1.0 + rank)) == 3.0
            (folder / f"at_{rank}").write_text(str(step))
            if preemption.requested():
                (folder / f"saving_{rank}").touch()
                time.sleep(SAVING)
                (folder / f"saved_{rank}").write_text(str(step))
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
