"""Runs the matrix of losses, ZeRO stages and precisions in one process group; started by test_distributed_matrix.py.

    torchrun ... distributed_worker.py FOLDER   (FOLDER holds preference.jsonl and unpaired.jsonl)

Each cell is a whole `robustloss.train.loop.run`; what the tests ask about it is written to FOLDER/<world>/<cell>.json.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path

LOSSES = {
    "dpo": {"beta": 0.1},
    "kldpo": {"beta": 0.1, "tau": 1.0},
    "wdpo": {"beta": 0.1, "rho": 0.01},
    "aot_paired": {"beta": 0.1},
    "aot_unpaired": {"beta": 0.1},
    "kto": {"beta": 0.1},
}
UNPAIRED = ("aot_unpaired", "kto")
PRECISIONS = ("fp32", "bf16")
WORLDS = (1, 2)


def cells() -> list[tuple[str, int, str, str]]:
    """(loss, ZeRO stage, precision, model); the models alternate, so that each meets every loss and every stage."""
    return [
        (loss, stage, precision, ("gpt2", "llama")[(index + stage) % 2])
        for index, loss in enumerate(LOSSES)
        for stage in range(4)
        for precision in PRECISIONS
    ]


def cell_name(loss: str, stage: int, precision: str, model: str) -> str:
    return f"{loss}-zero{stage}-{precision}-{model}"


def cell_config(folder: Path, world: int, loss: str, stage: int, precision: str, model: str) -> dict:
    data = str(folder / ("unpaired.jsonl" if loss in UNPAIRED else "preference.jsonl"))
    return {
        "output_dir": str(folder / str(world) / cell_name(loss, stage, precision, model)),
        "model": {"name_or_path": str(folder / model)},
        "data": {"train": data, "eval": data, "max_length": 96},  # it is fitting that is looked at
        "loss": {"name": loss, **LOSSES[loss]},
        "reference": {"cache_dir": str(folder / f"cache{world}")},
        "optimizer": {"learning_rate": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"},
        "batch": {"effective_batch": 8 * (1 + stage % 2), "microbatch": 8 // world},
        "precision": precision,
        "zero_stage": stage,
        "max_steps": 6,
        "save_every": 0,
        "log_every": 3,
    }


def logps_of_saved_model(config) -> float:
    """The mean log-probability of the chosen (desirable) completions under the model that the run has written."""
    import torch
    from transformers import AutoModelForCausalLM

    from robustloss.train.config import build_loss
    from robustloss.train.inputs import load_inputs
    from robustloss.train.loss_module import LossModule

    inputs = load_inputs(config, build_loss(config.loss))
    batch = inputs.collate("eval", list(range(len(inputs.examples["eval"]))), torch.device("cpu"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    model = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "model", dtype=dtype).eval()
    with torch.no_grad():
        logps = LossModule(model)(batch, output="logps")
    chosen = logps["chosen_logps"] if "chosen_logps" in logps else logps["logps"][batch["desirable"]]
    return float(chosen.mean())


class Listener(logging.Handler):
    """Collects what any logger says at warning level or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(f"{record.name}: {record.getMessage()}")


def main(folder: Path) -> None:
    import torch

    from robustloss.train import distributed, report

    report.write_report = lambda run_dir: run_dir / "report.html"  # half of a cell's time; it has tests of its own
    torch.set_num_threads(1)
    distributed.start()
    world = torch.distributed.get_world_size()
    from robustloss.train.config import load_config
    from robustloss.train.loop import run

    listener = Listener()
    for name in (None, "DeepSpeed", "transformers"):
        logging.getLogger(name).addHandler(listener)
    for cell in cells():
        listener.heard = []
        result: dict = {}
        began = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            try:
                config = load_config(None, base=cell_config(folder, world, *cell))
                run_dir = run(config)
                lines = (run_dir / "metrics.jsonl").read_text().splitlines()
                result["metrics"] = [json.loads(line) for line in lines]
                result["saved_logps"] = logps_of_saved_model(config)
            except Exception:
                result["error"] = traceback.format_exc()
        result["seconds"] = time.monotonic() - began
        result["warnings"] = listener.heard + [f"{item.filename}: {item.message}" for item in caught]
        if torch.distributed.get_rank() == 0:
            (folder / str(world) / f"{cell_name(*cell)}.json").write_text(json.dumps(result))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
