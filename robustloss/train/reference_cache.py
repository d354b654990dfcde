"""Tables of reference log-probabilities on disk: shared between runs, resumed after a kill, verified when read.

A table is `<key>.safetensors`, float32 [rows] by name; the key is the SHA-256 of its settings: all that the numbers
depend on. While it is computed, `<key>.part-<first row>.safetensors` hold what is ready, with an int64 column of their
rows; they go when the table is whole. Each file tells its settings and the SHA-256 of its columns. What does not agree
with them is computed again, never used. The first process alone reads and writes here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustloss._files import replace_file
from robustloss.train.config import MACHINE_ERRORS, DiskError, InputError, RunConfig
from robustloss.train.leftovers import is_abandoned

logger = logging.getLogger(__name__)

Table = dict[str, Tensor]
ROWS = "rows"
SEAL = "robustloss"  # one entry of the file's metadata, as safetensors writes several in any order


def default_folder() -> Path:
    """$ROBUSTLOSS_CACHE/references, or that of the user's cache: $XDG_CACHE_HOME or ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    if given := os.environ.get("ROBUSTLOSS_CACHE"):
        return Path(given).expanduser() / "references"
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "robustloss" / "references"


def digest_of(table: Table) -> str:
    """SHA-256 (hexadecimal) of the columns: names, types, lengths and values."""
    digest = hashlib.sha256()
    for name in sorted(table):
        column = table[name].cpu()
        digest.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
        digest.update(column.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ReferenceCache:
    """The folders that tables are looked for in; they are written to the first that can be.

    Args:
        folders: the last one's failure is the user's to hear of (`DiskError` of a full disk and the like, else
            `InputError`), that of another a warning.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self._target = 0

    @classmethod
    def of(cls, config: RunConfig) -> ReferenceCache:
        if config.reference.cache_dir is not None:
            return cls([Path(config.reference.cache_dir).expanduser()])
        own = Path(config.output_dir) / "reference_cache"
        try:
            return cls([default_folder(), own])
        except RuntimeError:
            return cls([own])

    def load(self, settings: dict[str, Any]) -> Table | None:
        """The whole table, if a file holds it."""
        key = key_of(settings)
        for folder in self.folders:
            found = _read(folder / f"{key}.safetensors", settings, whole=True)
            if found is not None:
                self._remove_leftovers(key, whole=True)
                return found[1]
        self._remove_leftovers(key, whole=False)
        return None

    def load_parts(self, settings: dict[str, Any]) -> list[tuple[Tensor, Table]]:
        """What is ready of a table that is not whole: (rows, columns)."""
        found = [_read(path, settings, whole=False) for path in self._files(key_of(settings)) if _is_part(path)]
        return [part for part in found if part is not None]

    def check_writable(self) -> None:
        """Find the folder to write to before anything is computed."""

        def probe(folder: Path) -> None:
            with tempfile.TemporaryFile(dir=folder):
                pass

        self._in_folder(probe)

    def save_part(self, settings: dict[str, Any], rows: Tensor, table: Table) -> None:
        self._write(f"{key_of(settings)}.part-{int(rows[0]):08d}.safetensors", {ROWS: rows, **table}, settings)

    def save(self, settings: dict[str, Any], table: Table) -> None:
        """Write the whole table, and remove its parts."""
        key = key_of(settings)
        self._write(f"{key}.safetensors", table, settings)
        self._remove_leftovers(key, whole=True)

    def _write(self, name: str, table: Table, settings: dict[str, Any]) -> None:
        seal = {"settings": settings, "sha256": digest_of(table)}
        content = save(table, {SEAL: json.dumps(seal, sort_keys=True)})
        self._in_folder(lambda folder: replace_file(folder / name, content))

    def _in_folder(self, action: Callable[[Path], None]) -> None:
        while True:
            folder = self.folders[self._target]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                action(folder)
                return
            except OSError as error:
                reason = error.strerror or error
                if self._target + 1 == len(self.folders):
                    raise (DiskError if error.errno in MACHINE_ERRORS else InputError)(
                        f"the reference's log-probabilities cannot be kept in {str(folder)!r}: {reason}; make it "
                        "writable, or set reference.cache_dir to another folder"
                    ) from error
                self._target += 1
                instead = self.folders[self._target]
                logger.warning(
                    "the reference's log-probabilities cannot be kept in %s (%s), so no other run will find them: they "
                    "go to %s",
                    folder,
                    reason,
                    instead,
                )

    def _remove_leftovers(self, key: str, *, whole: bool) -> None:
        """What killed writers left, and the parts of a table that is whole."""
        for path in self._files(key):
            # A folder that is read-only, or another run that removes them too, is no harm.
            with suppress(OSError):
                if is_abandoned(path) or (whole and _is_part(path)):
                    path.unlink()

    def _files(self, key: str) -> list[Path]:
        found = []
        for folder in self.folders:
            with suppress(OSError):  # absent, or not to be looked into
                found += [folder / name for name in sorted(os.listdir(folder)) if name.startswith(f"{key}.")]
        return found


def _is_part(path: Path) -> bool:
    return ".part-" in path.name and path.suffix == ".safetensors"


def key_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path, settings: dict[str, Any], *, whole: bool) -> tuple[Tensor, Table] | None:
    """The rows and columns of a file, or None with a warning that says what is wrong with it."""
    if not os.path.isfile(path):  # unlike Path.is_file, of a folder that may not be looked into too
        return None
    try:
        with safe_open(path, framework="pt") as file:
            seal = dict(json.loads((file.metadata() or {}).get(SEAL, "{}")))
            # Copies: a view of the file would die with it.
            table = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- not a dictionary
    except FileNotFoundError:  # a part that another run has just removed
        return None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s) and is computed again", path, error)
        return None
    problem = _problem(table, seal, settings, whole)
    if problem is not None:
        logger.warning("%s %s and is computed again", path, problem)
        return None
    return table.pop(ROWS, torch.arange(settings["rows"])), table


def _problem(table: Table, seal: dict[str, Any], settings: dict[str, Any], whole: bool) -> str | None:
    if seal.get("settings") != settings:
        return "holds the table of other settings"
    if seal.get("sha256") != digest_of(table):
        return "does not hold what was written to it"
    count = settings["rows"]
    rows = torch.arange(count) if whole else table.get(ROWS, torch.empty(0))
    columns = [column for name, column in table.items() if name != ROWS]
    fits = len(rows) > 0 and int(rows.min()) >= 0 and int(rows.max()) < count
    if not (fits and columns and all(len(column) == len(rows) for column in columns)):
        return f"does not hold {'the' if whole else 'some of'} {count} rows"
    if not all(bool(column.isfinite().all()) for column in columns):
        return "holds numbers that are not finite"
    return None
