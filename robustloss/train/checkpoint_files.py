"""The files that DeepSpeed writes and reads: written until they are on the disk, and read without running anything.

DeepSpeed reads its files by torch.load(weights_only=False), so that a checkpoint of a stranger could run what it likes.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from robustloss.train.distributed import quiet_stdout

# What DeepSpeed keeps beside tensors: records of numbers, which do nothing when they are made.
RECORDS = (fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler)

# What torch.save says of a file that it could not write to its end.
WRITER_ERRORS = ("unexpected pos", "PytorchStreamWriter", "iostream error")


class _DurableFiles(TorchCheckpointEngine):
    """Keeps the first error of writing: raised within DeepSpeed, it would leave the other processes at a barrier."""

    error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            with open(path, "wb") as file:  # not by its name: torch then says nothing of a full disk
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            self.error = self.error or _of_the_disk(error)


def _of_the_disk(error: Exception) -> Exception:
    """The error of the disk that torch.save replaced by its own: its archive no longer adds up where a write failed."""
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in WRITER_ERRORS):
        return error
    return error.__context__ if isinstance(error.__context__, OSError) else OSError(errno.EIO, f"torch.save: {error}")


def write(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write the engine's state and the run's into a folder that stands already. All processes call it.

    Raises:
        OSError: this process could not write its part; the others know nothing of it.
    """
    files = engine.checkpoint_engine = _DurableFiles()
    # It would copy scripts beside the checkpoints, which nothing here needs, and raise where the disk is full.
    engine._copy_recovery_script = lambda save_path: None
    engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state={"run": state}, save_latest=False)
    if files.error is not None:
        raise files.error


def read(engine: Any, folder: Path) -> dict[str, Any]:
    """Load what `write` has written into the engine, and return the run's state. All processes call it."""
    with quiet_stdout(), tensors_only():
        return engine.load_checkpoint(str(folder.parent), tag=folder.name)[1]["run"]


def check(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Read the structure of every parts-th file, from `part` on, without the tensors.

    Raises:
        pickle.UnpicklingError, ValueError, OSError: as `load_structure`.
    """
    for file in sorted(folder.rglob("*.pt"))[part::parts]:
        load_structure(file)


def load_structure(file: Path) -> Any:
    """A file's content, whose tensors stay on the disk until they are used.

    Raises:
        pickle.UnpicklingError: it holds something other than tensors and numbers; nothing of it has been run.
        ValueError: it is cut short or overwritten.
        OSError: it cannot be read for a reason that is not in the file, such as too many open files.
    """
    try:
        with tensors_only():
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # invalid: a place before the file's start
            raise
        machine = re.search(r"unable to (?:open|mmap) .*\((\d+)\)", str(error))
        if machine:
            number = int(machine[1])
            raise OSError(number, os.strerror(number), str(file)) from error
        raise ValueError(f"{file.name}: {error}") from error


@contextmanager
def tensors_only() -> Iterator[None]:
    """Let torch.load, in whosever code it is called, build tensors, numbers, their containers and RECORDS only."""
    refuses, allows = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (refuses, allows)}
    os.environ[refuses] = "1"
    try:
        with torch.serialization.safe_globals(list(RECORDS)):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
