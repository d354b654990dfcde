"""Trains in one process under DeepSpeed; started by test_trl_deepspeed.py, which also imports it.

    python trl_deepspeed_worker.py MODEL FOLDER

What came of every loss is written to FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "train"))

from trl_cases import dpo_trainer, load, moved, parameters_of

from robustloss import DPOLoss, KLDPOLoss, WDPOLoss
from robustloss.integrations.trl import RobustDPOTrainer

LOSSES = {
    "dpo": lambda: DPOLoss(0.5),  # one pass
    "kldpo": lambda: KLDPOLoss(0.5, tau=0.2),  # two
    "wdpo": lambda: WDPOLoss(0.1, 0.5, step=1e-3),  # three, and a backward of each
}
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 0.0,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def train(name: str, model: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Steps of 5 + 5 + 2 pairs."""
    trainer = dpo_trainer(
        RobustDPOTrainer,
        load(model),
        folder,
        options={"loss": LOSSES[name](), "ref_model": moved(model)},
        max_steps=2,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=3,
        learning_rate=0.01,
        **changes,
    )
    before = parameters_of(trainer)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"losses": losses, "update": (parameters_of(trainer) - before).tolist()}


def main(model: str, folder: Path) -> None:
    torch.set_num_threads(1)
    found = {name: train(name, model, folder, deepspeed=ZERO_2) for name in LOSSES}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # without the threads that wait at the interpreter's end
