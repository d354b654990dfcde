"""Checkpoints that a killed run goes on from, and the best model so far.

A checkpoint is written into step_00000010.tmp and renamed when all of it is on the disk, so that a kill, a power cut or
a full disk leaves it whole or not at all. Its COMPLETED file holds what is to be known before anything is loaded.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from robustloss._files import recover_folder, remove_folder, replace_folder, sync
from robustloss.train.config import DiskError, InputError, RunConfig
from robustloss.train.distributed import gather, on_first, random_state, seed_anew, set_random_state, together

MARKER = "COMPLETED"
_NAME = "step_" + 8 * "[0-9]"


def save_checkpoint(
    engine: Any, folder: Path, step: int, state: dict[str, Any], keep: int, held_out_loss: float | None = None
) -> None:
    """Write checkpoint `step`, whole or not at all, then remove all but the newest `keep` and the best.

    All processes call it, and all raise if one of them cannot write.

    Args:
        state: of the run, to come back from `load_checkpoint`: tensors, numbers, strings, and lists and dicts of them.
        held_out_loss: of an evaluation at this very step. The checkpoint with the lowest is the best.

    Raises:
        DiskError: the disk is full, or the folder cannot be written to. The checkpoints before are untouched.
    """
    from robustloss.train import checkpoint_files

    checkpoint = folder / f"step_{step:08d}"
    temporary = checkpoint.with_name(checkpoint.name + ".tmp")
    content = {**state, "step": step, "random_states": gather(random_state())}
    marker = {"processes": dist.get_world_size(), "held_out_loss": held_out_loss}

    def start() -> None:
        remove_folder(temporary)
        temporary.mkdir(parents=True)

    def complete() -> None:
        (temporary / MARKER).write_text(json.dumps(marker))
        replace_folder(temporary, checkpoint)
        for old in _superseded(completed_checkpoints(folder), keep):
            # First, so that a kill in between leaves no checkpoint that only looks whole.
            os.replace(old, old.with_name(old.name + ".tmp"))
            sync(folder)
            shutil.rmtree(old.with_name(old.name + ".tmp"))

    with _unwritable(f"checkpoint {checkpoint}", temporary):
        on_first(start)
        together(partial(checkpoint_files.write, engine, temporary, content))
        on_first(complete)


def load_checkpoint(engine: Any, folder: Path, seed: int) -> dict[str, Any] | None:
    """Load the newest completed checkpoint into the engine and set the random states; None if there is none.

    One of another number of processes is taken apart and put together anew, and the random generators are seeded from
    `seed`, the step and the rank. All processes call it, and all raise if one of them cannot read.

    Raises:
        InputError: a file is cut short, or holds anything but tensors and numbers: nothing of it has been run.
        DiskError: the files cannot be read, or not be converted, for a reason that is not in them.
    """
    from robustloss.train import checkpoint_files, universal

    completed = completed_checkpoints(folder)
    # One process's look at a shared folder may be older than another's: the first one's counts.
    checkpoint = gather(completed[-1] if completed else None)[0]
    if checkpoint is None:
        return None
    rank, processes = dist.get_rank(), dist.get_world_size()
    with _unreadable(checkpoint):
        together(partial(checkpoint_files.check, checkpoint, rank, processes))
        if _marker(checkpoint)["processes"] == processes:
            state = together(partial(checkpoint_files.read, engine, checkpoint))
        else:
            state = universal.read(engine, checkpoint)
    random_states = state.pop("random_states")
    if len(random_states) == processes:
        set_random_state(random_states[rank])
    else:
        seed_anew(seed, state["step"])
    return state


def completed_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    return sorted(marker.parent for marker in folder.glob(f"{_NAME}/{MARKER}"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill has left of checkpoints that were being written, converted or removed."""
    for path in folder.glob(f"{_NAME}.old"):
        recover_folder(path.with_suffix(""))
    for path in [*folder.glob(f"{_NAME}*.tmp"), *folder.glob(_NAME)]:
        if path.suffix or not (path / MARKER).is_file():
            shutil.rmtree(path)


def save_model(engine: Any, config: RunConfig, tokenizer: Any, folder: Path, card: str = "") -> None:
    """Write the model and its card as an ordinary Hugging Face folder, whole or not at all. All processes call it.

    Raises:
        DiskError: in all processes, where one cannot write. A folder of that name is as it was.
    """
    from safetensors import SafetensorError

    from robustloss.train import engine as engines

    with _unwritable(f"model folder {folder}", folder.with_name(folder.name + ".tmp"), SafetensorError):
        together(partial(engines.save_model, engine, config, tokenizer, folder, card))


def save_best(
    engine: Any, config: RunConfig, tokenizer: Any, run_dir: Path, loss: float, lowest: float, card: str = ""
) -> float:
    """Keep `best/`, a Hugging Face folder of the model with the lowest held-out loss; the lowest so far is returned.

    All processes call it after each evaluation, with what it returned the time before (infinity at first), which
    belongs into the state of a checkpoint.
    """
    loss = gather(loss)[0]  # other processors may round another way, and all must do the same
    if not loss < lowest:
        return lowest
    save_model(engine, config, tokenizer, run_dir / "best", card)
    return loss


def _marker(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARKER).read_text())


def _superseded(completed: list[Path], keep: int) -> list[Path]:
    """All but the newest `keep` and the one with the lowest held-out loss, the earliest of equals."""
    losses = {path: _marker(path)["held_out_loss"] for path in completed}
    evaluated = [path for path in completed if losses[path] is not None and math.isfinite(losses[path])]
    best = min(evaluated, key=lambda path: losses[path], default=None)
    return [path for path in completed[:-keep] if path != best]


@contextmanager
def _unwritable(what: str, temporary: Path, *others: type[Exception]) -> Iterator[None]:
    """Tell what could not be written and remove the part that was; entered and left by all processes alike."""
    try:
        yield
    except (OSError, *others) as error:
        on_first(partial(shutil.rmtree, temporary, ignore_errors=True))
        reason = getattr(error, "strerror", None) or error
        raise DiskError(
            f"{what} cannot be written ({reason}); what was written before is whole, and the same command goes on "
            "from the last checkpoint"
        ) from error


@contextmanager
def _unreadable(checkpoint: Path) -> Iterator[None]:
    """A file that is cut short, overwritten or not to be trusted is told by its folder, with what to do about it.

    A lost process and a lack of memory pass: there is nothing wrong with the files.
    """
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {checkpoint} holds other things than tensors and numbers, which could run code, and is not "
            "loaded; remove that folder, and the run goes on from the one before it"
        ) from error
    except OSError as error:
        raise DiskError(
            f"checkpoint {checkpoint} cannot be read ({error}); it may well be whole, and the same command tries again"
        ) from error
    except (RuntimeError, EOFError, AssertionError, LookupError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and not _of_the_content(error):
            raise
        raise InputError(
            f"checkpoint {checkpoint} cannot be read ({' '.join(str(error).split())[:200]}); remove that folder, and "
            "the run goes on from the one before it"
        ) from error


def _of_the_content(error: RuntimeError) -> bool:
    """Whether it is about keys, shapes or archives, and not of a lost process or a lack of memory."""
    if isinstance(error, dist.DistError | torch.OutOfMemoryError):
        return False
    return any(sign in str(error) for sign in ("state_dict", "size of tensor", "shape", "PytorchStreamReader"))
