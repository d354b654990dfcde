"""Checkpoints that a killed run goes on from, and what a run's folder says about the run in it.

A checkpoint counts once its COMPLETED file is on the disk, which is written last; whatever a kill leaves half-written
is removed by the next run.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from omegaconf import OmegaConf
from yaml import YAMLError

from robustloss._files import replace_file
from robustloss.train.config import FREE_KEYS, InputError, RunConfig, flatten, save_config
from robustloss.train.distributed import gather, is_first, quiet_stdout, random_state, set_random_state
from robustloss.train.run_folder import links_in

MARKER = "COMPLETED"
# What a run leaves in its folder, and what resume=false removes.
RESULTS = (
    "checkpoints",
    "evaluations",
    "model",
    "tensorboard",
    "figures",
    "metrics.jsonl",
    "report.html",
)


def save_checkpoint(engine: Any, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write checkpoint `step`, then remove all but the newest `keep`. All processes call it."""
    tag = f"step_{step:08d}"
    client_state = {**state, "step": step, "random_states": gather(random_state())}
    engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    dist.barrier()
    if is_first():
        for file in (folder / tag).rglob("*"):
            if file.is_file():
                _sync(file)
        marker = folder / tag / MARKER
        marker.touch()
        _sync(marker)
        _sync(marker.parent)
        for old in completed_checkpoints(folder)[:-keep]:
            (old / MARKER).unlink()  # first, so that a kill in between leaves no checkpoint that only looks whole
            shutil.rmtree(old)


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Load the newest completed checkpoint into the engine, and the random states; None if there is none."""
    completed = completed_checkpoints(folder)
    # One process's look at a shared folder may be older than another's: the first one's counts.
    newest = [completed[-1].name if completed else None]
    dist.broadcast_object_list(newest)
    if newest[0] is None:
        return None
    with quiet_stdout(), _unreadable(folder / newest[0]):
        _, state = engine.load_checkpoint(str(folder), tag=newest[0])
    set_random_state(state.pop("random_states")[dist.get_rank()])
    return state


def completed_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    return sorted(marker.parent for marker in folder.glob(f"step_*/{MARKER}"))


def prepare_folder(run_dir: Path) -> IO[str]:
    """Make the run's folder and hold it for as long as the returned file is open, against a second run in it.

    A kill lets go of it too. Called by the first process alone.
    """
    linked = links_in(run_dir)
    if linked:
        raise refused_folder(
            run_dir, f"{linked[0]!r} in it is a link, and a run writes and deletes in its own folder only"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise refused_folder(run_dir, str(error.strerror)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise refused_folder(run_dir, "another run is at work in it") from error
    return lock


def open_run(config: RunConfig, environment: dict[str, Any]) -> None:
    """Make the run's folder ready: refuse another run's, clear one that is to start again, note config and versions.

    Called by the first process alone.
    """
    run_dir = Path(config.output_dir)
    if not config.resume:
        _clear(config, run_dir)
    check_same_run(config, environment["world_size"])
    for folder in (run_dir / "checkpoints").glob("step_" + 8 * "[0-9]"):
        if not (folder / MARKER).is_file():
            shutil.rmtree(folder)
    replace_file(run_dir / "environment.json", json.dumps(environment, indent=2))
    save_config(config, run_dir / "config.yaml")


def is_run(run_dir: Path) -> bool:
    """Whether the folder is a run's, and not just anything that stands there."""
    return (run_dir / "config.yaml").is_file() and (run_dir / "environment.json").is_file()


def _clear(config: RunConfig, run_dir: Path) -> None:
    """Remove what a run has written, and only that: not the folder of somebody else, nor what this run is to read."""
    written = [run_dir / name for name in RESULTS if (run_dir / name).exists()]
    if written and not is_run(run_dir):
        raise refused_folder(run_dir, f"resume=false would delete {written[0].name!r} in it, but it is no run's folder")
    for key in ("model.name_or_path", "reference.name_or_path", "data.train", "data.eval"):
        section, name = key.split(".")
        source = getattr(getattr(config, section), name)
        if source is not None and any(Path(source).resolve().is_relative_to(path.resolve()) for path in written):
            raise refused_folder(run_dir, f"resume=false would delete {key} {source!r} in it")
    for path in written:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name in ("config.yaml", "environment.json"):  # last: a kill in between leaves what is still a run's folder
        (run_dir / name).unlink(missing_ok=True)


def refused_folder(run_dir: Path, reason: str) -> InputError:
    return InputError(f"output_dir {str(run_dir)!r} cannot be used: {reason}; use another output_dir")


@contextmanager
def _unreadable(checkpoint: Path) -> Iterator[None]:
    """A file that is cut short or overwritten is told by its folder, with what to do about it."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        raise InputError(
            f"checkpoint {checkpoint} cannot be read ({' '.join(str(error).split())[:200]}); remove that folder, and "
            "the run goes on from the one before it"
        ) from error


def check_same_run(config: RunConfig, world_size: int | None = None) -> None:
    """Refuse to go on with a run that another config, or another number of processes (None: any will do), began."""
    run_dir = Path(config.output_dir)
    if not is_run(run_dir):
        standing = [name for name in RESULTS if (run_dir / name).exists()]
        if standing:
            raise refused_folder(run_dir, f"it holds {standing[0]!r}, but no run's config.yaml and environment.json")
        return
    instead = "use another output_dir, or resume=false to start again in this one"
    try:
        old = flatten(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))
        saved_size = json.loads((run_dir / "environment.json").read_text())["world_size"]
    except (YAMLError, ValueError, KeyError, TypeError) as error:
        raise refused_folder(run_dir, f"its config.yaml or environment.json cannot be read ({error})") from error
    new = flatten(OmegaConf.to_container(OmegaConf.structured(config)))
    differing = [
        f"{key} (there {old.get(key)!r}, here {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_KEYS
    ]
    if differing:
        raise InputError(f"output_dir {str(run_dir)!r} holds a run with another {', '.join(differing)}; {instead}")
    if world_size is not None and saved_size != world_size and completed_checkpoints(run_dir / "checkpoints"):
        raise InputError(
            f"output_dir {str(run_dir)!r} holds a run of {saved_size} process(es), and this one has {world_size}; "
            f"run it on as many, or {instead}"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
