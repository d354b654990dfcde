"""Trains each config of a folder on two processes, then goes on from its first checkpoint in a copy of the run.

    torchrun ... shared_state_worker.py FOLDER   (FOLDER holds <name>.json, whose output_dir is FOLDER/<name>)

The copy is FOLDER/<name>-cut.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch


def cut_back(run_dir: Path, to: Path) -> Path:
    """A copy of the run as a kill would have left it behind its first checkpoint."""
    from robustloss.train.checkpoint import completed_checkpoints

    shutil.copytree(run_dir, to)
    shutil.rmtree(to / "model")
    for newer in completed_checkpoints(to / "checkpoints")[1:]:
        shutil.rmtree(newer)
    return to


def main(folder: Path) -> None:
    from robustloss.train import distributed, report
    from robustloss.train.config import load_config
    from robustloss.train.loop import run

    report.write_report = lambda run_dir: run_dir / "report.html"  # it has tests of its own
    torch.set_num_threads(1)
    distributed.start()
    for file in sorted(folder.glob("*.json")):
        settings = json.loads(file.read_text())
        whole = run(load_config(None, base=settings))
        cut = whole.with_name(f"{whole.name}-cut")
        if distributed.is_first():
            cut_back(whole, cut)
        torch.distributed.barrier()
        run(load_config(None, base={**settings, "output_dir": str(cut)}))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
