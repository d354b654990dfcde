"""Folders as training runs leave them, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np


def write_run(run_dir: Path, *, loss: str = "name: dpo", steps: int = 3, every_row=None, evaluations=None) -> Path:
    """A run of `steps` steps with an evaluation before and after; `every_row` is merged into each line of metrics."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(f"loss: {{{loss}}}\nmodel: {{name_or_path: tiny}}\n")
    (run_dir / "environment.json").write_text(json.dumps({"torch": "2.13.0", "world_size": 1, "extension": True}))
    rows = []
    for step in range(steps + 1):
        row = {"step": step, "seconds": 30.0 * step, "loss": math.log(2) - 0.1 * step, "rewards/chosen": 0.2 * step}
        row |= {"rewards/rejected": -0.3 * step, "rewards/margins": 0.5 * step} | (every_row or {})
        if step:
            machine = {"tokens_per_second": 1234.0, "peak_memory_bytes": 2**30}
            rows.append({"split": "train", **row, "learning_rate": 1e-6, "gradient_norm": 1.0, **machine})
        if step in (0, steps) and evaluations != {}:
            rows.append({"split": "eval", **row})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "evaluations").mkdir(exist_ok=True)
    values = list(np.linspace(-1, 1, 9))
    if evaluations is None:
        sides = dict.fromkeys(("chosen_rewards", "rejected_rewards", "policy_margins", "ref_margins"), values)
        evaluations = {0: sides, steps: sides}
    for step, arrays in evaluations.items():
        (run_dir / "evaluations" / f"step_{step:08d}.json").write_text(json.dumps(arrays))
    return run_dir
