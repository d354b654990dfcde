"""What a run leaves to look at: metrics.jsonl, TensorBoard events, evaluations/*.json and a progress bar."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from robustloss._files import replace_file


class MetricsWriter:
    """Written by the first process only; the other processes' writers do nothing.

    metrics.jsonl holds one object a line. `offset()` goes into a checkpoint, and a resumed run cuts the file there, so
    that no step is told twice.
    """

    def __init__(self, run_dir: Path, *, active: bool, total_steps: int, step: int = 0, offset: int = 0) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / "metrics.jsonl"
        self._evaluations = run_dir / "evaluations"
        self._evaluations.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        if self._path.stat().st_size >= offset:
            self._file.truncate(offset)
        else:  # somebody has cut it: keep its whole lines
            self._file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
        # Steps from here on that a killed run has already shown are hidden.
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=True)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        if not self.active:
            return
        values = {name: value for name, value in values.items() if value == value}  # an absent class has a NaN mean
        # JSON has no infinity, such as the temperature of a tilt whose radius is 0.
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "split": split, **written}, allow_nan=False)
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if split == "train":
            shown = {"loss": values["loss"], "margin": values.get("rewards/margins")}
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items() if value is not None})

    def evaluation(self, step: int, arrays: dict[str, list[float]], values: dict[str, float]) -> None:
        """An evaluation's rewards, sample by sample, and one line for the reader."""
        if not self.active:
            return
        replace_file(self._evaluations / f"step_{step:08d}.json", json.dumps(arrays))
        names = ("loss", "rewards/margins", "rewards/accuracies")
        told = ", ".join(f"{name} {values[name]:.4f}" for name in names if name in values)
        self._bar.write(f"step {step}: held-out {told}", file=sys.stderr)

    def advance(self) -> None:
        if self.active:
            self._bar.update()

    def offset(self) -> int:
        if not self.active:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU's allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)


def gradient_norm(engine: Any) -> float | None:
    """The global norm of the gradients before clipping, where DeepSpeed does not measure it (fp32 without ZeRO).

    Call it between engine.backward and engine.step. None: `engine.get_global_grad_norm()` has it after the step.
    """
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    if not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
