"""A directional step over two processes, and in the first of them the same alone; started by test_penalty.py.

torchrun ... penalty_worker.py FOLDER   (each process writes FOLDER/<rank>.pt)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from test_penalty import BETA, MODELS, RHO, gradient_of_step, make_batch

from robustloss import WDPOLoss
from robustloss.train.loss_module import LossModule

PAIRS = [[3, 1], [2, 4]]  # of each process's microbatches


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = MODELS["gpt2"]().double()
    shares = [
        [make_batch(model, 10 * process + index, pairs) for index, pairs in enumerate(counts)]
        for process, counts in enumerate(PAIRS)
    ]
    module = LossModule(model, WDPOLoss(BETA, RHO, os.environ["SQUARED"] == "1"))

    def result(microbatches, masses=None) -> dict:
        gradient, value, metrics = gradient_of_step(module, microbatches, masses=masses)
        return {"gradient": gradient, "value": value, "metrics": metrics}

    mine = result(shares[rank], masses=PAIRS[rank])
    dist.destroy_process_group()
    torch.save(mine | {"alone": result([*shares[0], *shares[1]])}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
