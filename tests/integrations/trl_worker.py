"""Trains with TRL's trainers on this process's share; started by test_trl_distributed.py, which also imports it.

    torchrun ... trl_worker.py MODEL FOLDER

What came of every case is written to FOLDER/<rank>.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, KTOConfig

sys.path.append(str(Path(__file__).parents[1] / "train"))

from tiny_models import pair_rows, unpaired_rows
from trl_cases import parameters_of, settings

from robustloss import AOTPairedLoss, AOTUnpairedLoss, KLDPOLoss, KTOLoss, WDPOLoss
from robustloss.integrations.trl import RobustDPOTrainer, RobustKTOTrainer
from robustloss.losses.base import PreferenceLoss

STEPS = 3


@dataclass(frozen=True)
class Case:
    loss: Callable[[], PreferenceLoss]
    whole: tuple[int, int] = (8, 1)  # (microbatch, accumulation) of the one process to compare with


CASES = {
    "kldpo": Case(lambda: KLDPOLoss(0.5, tau=0.2)),
    "aot paired": Case(lambda: AOTPairedLoss(0.5)),
    "wdpo": Case(lambda: WDPOLoss(0.1, 0.01)),
    # Mismatched pairs are made within a microbatch, so these must be the same.
    "kto": Case(lambda: KTOLoss(0.5, 1.3, 0.7), whole=(2, 4)),
    "aot unpaired": Case(lambda: AOTUnpairedLoss(0.5)),
}


def rows_of(paired: bool) -> list[dict[str, Any]]:
    """Unpaired ones are labelled by microbatches of two in turn, so that each of two processes has one class only."""
    if paired:
        return pair_rows(16)
    return [row | {"label": index // 2 % 2 == 0} for index, row in enumerate(unpaired_rows(16))]


def train(name: str, model: str, folder: Path, microbatch: int, accumulation: int) -> dict[str, Any]:
    loss = CASES[name].loss()
    trainer_class, config = (RobustDPOTrainer, DPOConfig) if loss.paired else (RobustKTOTrainer, KTOConfig)
    args = config(
        **settings(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.05,
            train_sampling_strategy="sequential",
        )
    )
    rows = Dataset.from_list(rows_of(loss.paired))
    trainer = trainer_class(model, args=args, train_dataset=rows, loss=loss)
    trainer.train()
    return {
        "parameters": parameters_of(trainer).tolist(),
        "logged": [record for record in trainer.state.log_history if "loss" in record],
    }


def main(model: str, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # Trainer collects garbage before every run
    result = {name: train(name, model, folder, 2, 2) for name in CASES}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
