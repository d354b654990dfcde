"""The folder that a run writes into: whose it is, what is cleared from it, and that no two runs share it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from yaml import YAMLError

from robustloss._files import recover_folder, remove_folder, replace_file
from robustloss.train.checkpoint import remove_unfinished
from robustloss.train.config import FREE_KEYS, InputError, RunConfig, flatten, save_config
from robustloss.train.run_folder import links_in

# What makes a folder a run's: the first files it writes, and the last that resume=false removes.
NOTES = ("config.yaml", "environment.json")
# What a run leaves in its folder beside them, and what resume=false removes.
RESULTS = (
    "checkpoints",
    "evaluations",
    "best.old",
    "best.tmp",
    "best",
    "model.old",
    "model.tmp",
    "model",
    "tensorboard",
    "figures",
    "metrics.jsonl",
    "report.html",
    "starts.jsonl",
)
# What a kill leaves of files that were being written.
TEMPORARIES = (
    *(f"{name}.*.tmp" for name in (*NOTES, "starts.jsonl", "metrics.jsonl", "report.html")),
    "evaluations/step_*.json.*.tmp",
    "figures/*.png.*.tmp",
)
# The file systems' ways to say that they hold no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


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
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise refused_folder(run_dir, str(error.strerror)) from error
        logger.warning("%s: its file system holds no locks, so that a second run in it cannot be kept out", run_dir)
    return lock


def open_run(config: RunConfig, environment: dict[str, Any]) -> None:
    """Make the run's folder ready: refuse another run's, clear one that is to start again, note config and versions.

    Called by the first process alone.
    """
    run_dir = Path(config.output_dir)
    if not config.resume:
        _clear(config, run_dir)
    check_same_run(config)
    remove_unfinished(run_dir / "checkpoints")
    for name in ("best", "model"):
        remove_folder(run_dir / f"{name}.tmp")
        recover_folder(run_dir / name)
    for path in [path for pattern in TEMPORARIES for path in run_dir.glob(pattern) if path.is_file()]:
        path.unlink()
    # These two first: what stands in a folder without them is taken for somebody else's.
    save_config(config, run_dir / "config.yaml")
    replace_file(run_dir / "environment.json", json.dumps(environment, indent=2))
    starts = run_dir / "starts.jsonl"  # the environment of every start; the file above is of the newest
    before = starts.read_text() if starts.exists() else ""
    replace_file(starts, before + json.dumps(environment) + "\n")


def is_run(run_dir: Path) -> bool:
    """Whether the folder is a run's, and not just anything that stands there."""
    return all((run_dir / name).is_file() for name in NOTES)


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
    for name in NOTES:  # last: a kill in between leaves what is still a run's folder
        (run_dir / name).unlink(missing_ok=True)


def refused_folder(run_dir: Path, reason: str) -> InputError:
    return InputError(f"output_dir {str(run_dir)!r} cannot be used: {reason}; use another output_dir")


def check_same_run(config: RunConfig) -> None:
    """Refuse to go on with a run that another config began. Another number of processes may go on with it."""
    run_dir = Path(config.output_dir)
    if not is_run(run_dir):
        standing = [name for name in RESULTS if (run_dir / name).exists()]
        if standing:
            raise refused_folder(run_dir, f"it holds {standing[0]!r}, but no run's config.yaml and environment.json")
        return
    try:
        old = flatten(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))
    except (YAMLError, ValueError, TypeError) as error:
        raise refused_folder(run_dir, f"its config.yaml cannot be read ({error})") from error
    new = flatten(OmegaConf.to_container(OmegaConf.structured(config)))
    differing = [
        f"{key} (there {old.get(key)!r}, here {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_KEYS
    ]
    if differing:
        raise InputError(
            f"output_dir {str(run_dir)!r} holds a run with another {', '.join(differing)}; use another output_dir, or "
            "resume=false to start again in this one"
        )
