"""What two processes do for test_checkpoint.py.

    torchrun ... checkpoint_worker.py FOLDER   (FOLDER holds <name>.json, settings of runs for one process)

For each file: trains it on two processes, to FOLDER/two/<name>, and goes on with FOLDER/one-cut/<name>, which one
process has begun. Then a run in which only the second process has no room on its disk; what each raised is in
FOLDER/<rank>.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import torch


def main(folder: Path) -> None:
    from robustloss.train import distributed, report
    from robustloss.train.config import InputError, load_config
    from robustloss.train.loop import run

    report.write_report = lambda run_dir: run_dir / "report.html"  # it has tests of its own
    torch.set_num_threads(1)
    distributed.start()
    files = sorted(folder.glob("*.json"))
    for file in files:
        settings = json.loads(file.read_text())
        for kind in ("two", "one-cut"):
            run(load_config(None, base={**settings, "output_dir": str(folder / kind / file.stem)}))

    if not distributed.is_first():

        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = fsync
    try:
        run(load_config(None, base={**settings, "output_dir": str(folder / "full"), "zero_stage": 1}))
    except InputError as error:
        (folder / str(torch.distributed.get_rank())).write_text(str(error))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
