"""Trains a loss with a state on this process's pairs; started by the tests of such losses under torchrun.

    torchrun ... stateful_worker.py FOLDER   (FOLDER holds job.pt: the loss's class and options, and the batches)

What this process has got is written to FOLDER/<rank>.pt: values, gradients of the policy's log-probabilities, metrics
and the state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import robustloss

SIDES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def train(loss: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The loss on one batch after the other, and what came of it."""
    result: dict[str, Any] = {"values": [], "gradients": [], "metrics": []}
    for batch in batches:
        logps = [batch[side] for side in SIDES]
        policy = [value.clone().requires_grad_() for value in logps[:2]]
        options = {key: value for key, value in batch.items() if key not in SIDES}
        value, metrics = loss(*policy, *logps[2:], return_metrics=True, **options)
        result["values"].append(value.detach())
        result["gradients"].append(torch.stack(torch.autograd.grad(value, policy)))
        result["metrics"].append(metrics)
    return {**result, "state": loss.state_dict()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = torch.load(folder / "job.pt")
    rank = dist.get_rank()
    own = [{key: value[batch["rank"] == rank] for key, value in batch.items()} for batch in job["batches"]]
    for batch in own:
        del batch["rank"]
    loss = getattr(robustloss, job["loss"])(**job["options"], process_group=dist.group.WORLD)
    torch.save(train(loss, own), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
