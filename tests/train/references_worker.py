"""Caches the reference's log-probabilities of a run, without the training; started by test_references.py.

    references_worker.py JOB.json RANK   ({"settings", "folder", "processes", "kill_at", "caches"})

Each process writes what it looks up to <folder>/rank<rank>.safetensors. The last of them kills itself at its forward
number `kill_at`, where one is given, and `caches` are the processes' own cache folders, where they have any.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from robustloss.train import references
from robustloss.train.config import RunConfig, build_loss, load_config
from robustloss.train.engine import load_model
from robustloss.train.inputs import load_inputs
from robustloss.train.loss_module import LossModule

# Small enough that the few rows of a test make several parts.
references.PART_BATCHES, references.PART_ROUNDS = 2, 1


def looked_up(config: RunConfig, before_forward=lambda number: None) -> tuple[dict[str, torch.Tensor], int]:
    """The reference's log-probabilities of all training rows, and how many forwards this process took to get them."""
    inputs = load_inputs(config, build_loss(config.loss))
    policy = LossModule(load_model(config))
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1
        before_forward(forwards)

    policy.register_forward_pre_hook(count)
    reference = references.build_references(config, policy, inputs, torch.device("cpu"))
    batch = inputs.collate("train", list(range(len(inputs.examples["train"]))), torch.device("cpu"))
    found = reference("train", batch)
    return {name: value for name, value in found.items() if name.startswith("ref_")}, forwards


def main(job: dict, rank: int) -> None:
    torch.set_num_threads(1)
    folder, processes = Path(job["folder"]), job["processes"]
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
    if job.get("caches"):
        os.environ["ROBUSTLOSS_CACHE"] = job["caches"][rank]

    def kill(number: int) -> None:
        if rank == processes - 1 and number == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    table, _ = looked_up(load_config(None, base=job["settings"]), kill)
    save_file(table, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
