"""What a run leaves to look at: metrics.jsonl, TensorBoard events, evaluations/*.json and a progress bar."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from robustloss._files import replace_file
from robustloss.train.config import DiskError
from robustloss.train.distributed import on_first


class MetricsWriter:
    """Written by the first process only; the other processes' writers do nothing but `check`.

    metrics.jsonl holds one object a line. `offset()` goes into a checkpoint, and a resumed run cuts the file there and
    removes the evaluations after it, so that no step is told twice and none that was undone.

    An OSError, such as that of a full disk, is kept, and nothing is written after it: raised at once, it would leave
    the other processes to wait for the first one. `check` raises it in all of them.
    """

    def __init__(self, run_dir: Path, *, active: bool, total_steps: int, step: int = 0, offset: int = 0) -> None:
        self._active = active
        self._run_dir = run_dir
        self._error: OSError | None = None
        self._open = ExitStack()
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._evaluations = run_dir / "evaluations"
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=True)
        self._open.callback(self._bar.close)
        with self._keeping_errors():
            self._evaluations.mkdir(parents=True, exist_ok=True)
            for path in self._evaluations.glob("step_*.json"):
                number = path.stem.removeprefix("step_")
                if number.isdecimal() and int(number) > step:
                    path.unlink()
            path = run_dir / "metrics.jsonl"
            self._file = self._open.enter_context(path.open("ab"))
            if path.stat().st_size >= offset:
                self._file.truncate(offset)
            else:  # somebody has cut it: keep its whole lines
                self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
            self._file.seek(0, os.SEEK_END)
            # Steps from here on that a killed run has already shown are hidden.
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)
            self._open.callback(self._tensorboard.close)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        if not self._writes:
            return
        values = {name: value for name, value in values.items() if value == value}  # an absent class has a NaN mean
        # JSON has no infinity, such as the temperature of a tilt whose radius is 0.
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "split": split, **written}, allow_nan=False)
        with self._keeping_errors():
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if split == "train":
            shown = {"loss": values["loss"], "margin": values.get("rewards/margins")}
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items() if value is not None})

    def evaluation(self, step: int, arrays: dict[str, list[float]], values: dict[str, float]) -> None:
        """An evaluation's rewards, sample by sample, and one line for the reader."""
        if not self._writes:
            return
        with self._keeping_errors():
            replace_file(self._evaluations / f"step_{step:08d}.json", json.dumps(arrays))
            names = ("loss", "rewards/margins", "rewards/accuracies")
            told = ", ".join(f"{name} {values[name]:.4f}" for name in names if name in values)
            self._bar.write(f"step {step}: held-out {told}", file=sys.stderr)

    def advance(self) -> None:
        if self._active:
            self._bar.update()

    def offset(self) -> int:
        """The length of metrics.jsonl, in bytes, which is on the disk then; of no meaning where `check` raises."""
        if not self._writes:
            return 0
        with self._keeping_errors():
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        with self._keeping_errors():
            self._open.close()

    def check(self) -> None:
        """All processes call it, after what is written and before a checkpoint that tells how far that is.

        Raises:
            DiskError: in all processes, what the first could not write.
        """

        def raise_kept() -> None:
            if self._error is not None:
                raise DiskError(
                    f"metrics in {str(self._run_dir)!r} cannot be written ({self._error.strerror or self._error}); the "
                    "same command goes on from the last checkpoint"
                ) from self._error

        on_first(raise_kept)

    @property
    def _writes(self) -> bool:
        return self._active and self._error is None

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU's allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)
