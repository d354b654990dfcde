"""Checkpoints that a killed run goes on from, and what a run's folder says about the run in it.

A checkpoint counts once its COMPLETED file is on the disk, which is written last; whatever a kill leaves half-written
is removed by the next run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from robustloss.train.config import FREE_KEYS, InputError, RunConfig, flatten, save_config
from robustloss.train.distributed import gather, is_first, quiet_stdout, random_state, set_random_state
from robustloss.train.files import replace_file

MARKER = "COMPLETED"


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
    if not completed:
        return None
    with quiet_stdout():
        _, state = engine.load_checkpoint(str(folder), tag=completed[-1].name)
    set_random_state(state.pop("random_states")[dist.get_rank()])
    return state


def completed_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    return sorted(marker.parent for marker in folder.glob(f"step_*/{MARKER}"))


def open_run(config: RunConfig, environment: dict[str, Any]) -> None:
    """Make the run's folder ready: refuse another run's, clear one that is to start again, note config and versions.

    Called by the first process alone.
    """
    run_dir = Path(config.output_dir)
    if not config.resume:
        for name in ("metrics.jsonl", "environment.json", "config.yaml", "report.html"):
            (run_dir / name).unlink(missing_ok=True)
        for name in ("checkpoints", "evaluations", "model", "tensorboard", "figures"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if not (folder / MARKER).is_file():
            shutil.rmtree(folder)
    check_same_run(config, environment["world_size"])
    replace_file(run_dir / "environment.json", json.dumps(environment, indent=2))
    save_config(config, run_dir / "config.yaml")


def check_same_run(config: RunConfig, world_size: int | None = None) -> None:
    """Refuse to go on with a run that another config, or another number of processes (None: any will do), began."""
    run_dir = Path(config.output_dir)
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        return
    instead = "use another output_dir, or resume=false to start again in this one"
    old = flatten(OmegaConf.to_container(OmegaConf.load(saved)))
    new = flatten(OmegaConf.to_container(OmegaConf.structured(config)))
    differing = [
        f"{key} (there {old.get(key)!r}, here {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_KEYS
    ]
    if differing:
        raise InputError(f"output_dir {str(run_dir)!r} holds a run with another {', '.join(differing)}; {instead}")
    environment = run_dir / "environment.json"
    if world_size is not None and completed_checkpoints(run_dir / "checkpoints") and environment.is_file():
        saved_size = json.loads(environment.read_text())["world_size"]
        if saved_size != world_size:
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
