"""The reference model's log-probabilities: computed once and kept on disk, or from a live frozen copy, or from the base
model under the LoRA adapter.

The cache's file is named by the SHA-256 of everything the numbers depend on: the model's files, the tokens, the
precision, the way of computing attention. It is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robustloss._files import replace_file
from robustloss.train.config import RunConfig, attention_of, input_errors
from robustloss.train.data import fingerprint
from robustloss.train.distributed import on_first
from robustloss.train.engine import build_reference
from robustloss.train.inputs import Inputs

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Logps = Callable[[Batch], dict[str, Tensor]]


def build_references(
    config: RunConfig, engine: Any, inputs: Inputs, device: torch.device
) -> Callable[[str, Batch], Batch]:
    """A function (split, batch) -> batch with the reference's log-probabilities, as config.reference asks.

    Call it before anything is trained or resumed: where no other model is named, the policy as it is now is the
    reference.
    """
    if config.reference.mode == "base":
        return lambda split, batch: _with_reference(batch, partial(engine, output="base_logps"))
    if config.reference.mode == "live":
        reference = build_reference(config, device)
        return lambda split, batch: _with_reference(batch, partial(reference, output="logps"))

    name = config.reference.name_or_path
    reference = engine if name is None else build_reference(config, device)
    folder = Path(config.reference.cache_dir or Path(config.output_dir) / "reference_cache")
    settings = {
        "model": model_identity(name or config.model.name_or_path),
        "precision": config.precision,
        "attention": attention_of(config),
        "transformers": version("transformers"),
    }
    tables = {}
    reference.eval()
    for split, examples in inputs.examples.items():
        tables[split] = precomputed(
            partial(reference, output="logps"),
            len(examples),
            partial(inputs.collate, split, device=device),
            size=config.batch.microbatch,
            path=cache_path(folder, data=fingerprint(examples), **settings),
            device=device,
        )
    if reference is not engine and hasattr(reference, "destroy"):
        reference.destroy()

    def look_up(split: str, batch: Batch) -> Batch:
        rows = batch["index"].cpu()
        return batch | {column: values[rows].to(device) for column, values in tables[split].items()}

    return look_up


@torch.no_grad()
def _with_reference(batch: Batch, logps: Logps) -> Batch:
    return batch | {f"ref_{name}": value.float() for name, value in logps(batch).items()}


def rounds(count: int, size: int) -> Iterator[tuple[list[int], bool]]:
    """This process's share of the rows 0 .. count - 1 in batches of `size`: (rows, whether they count).

    Every process gets the same number of batches, as ZeRO-3 needs; where they run out, the first is repeated and does
    not count. The batches do not depend on the number of processes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    starts = range(0, count, size)
    for first in range(0, len(starts), world):
        position = first + rank
        start = starts[position] if position < len(starts) else 0
        yield list(range(start, min(start + size, count))), position < len(starts)


@torch.no_grad()
def logps_table(
    columns: Logps, count: int, collate: Callable[[list[int]], Batch], *, size: int, device: torch.device
) -> tuple[dict[str, Tensor], list[bool]]:
    """What `columns(batch)` gives for each of `count` rows, float32 [count] by name, from all processes together; and
    which of this process's batches counted."""
    table: dict[str, Tensor] = {}
    counted = []
    for rows, counts in rounds(count, size):
        counted.append(counts)
        for name, value in columns(collate(rows)).items():
            column = table.setdefault(name, torch.zeros(count, device=device))
            if counts:
                column[rows] = value.float()
    for column in table.values():
        dist.all_reduce(column)
    return table, counted


def precomputed(
    logps: Logps,
    count: int,
    collate: Callable[[list[int]], Batch],
    *,
    size: int,
    path: Path,
    device: torch.device,
) -> dict[str, Tensor]:
    """The table {"ref_...": float32 [rows]} of a dataset, from `path` or computed by all processes together."""
    table = _load(path, count)
    # One process's look at a shared folder may be older than another's: all read it, or none does.
    found = torch.tensor([table is not None], dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    if table is not None and bool(found):
        return table
    computed, _ = logps_table(logps, count, collate, size=size, device=device)
    table = {f"ref_{name}": column.cpu() for name, column in computed.items()}
    for column in table.values():
        if not bool(column.isfinite().all()):
            bad = (~column.isfinite()).nonzero().flatten().tolist()
            raise FloatingPointError(f"the reference's log-probabilities are not finite for the dataset's rows {bad}")
    on_first(partial(_save, path, table))
    return table


def cache_path(folder: Path, **settings: Any) -> Path:
    """Where the table that depends on these settings is kept."""
    key = json.dumps(settings, sort_keys=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def model_identity(name_or_path: str) -> dict[str, Any]:
    """What tells one model from another: the files of its folder (weights, config, code), or a Hub name and its commit.

    Small files count by their content, weights by size and time of change: reading 100 GB to find a cache would cost
    more than it saves.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        # A config does not tell its commit in every version of transformers; the local cache's folder is named by it.
        snapshot = Path(str(cached_file(name_or_path, "config.json"))).parent
        return {"name": name_or_path, "commit": snapshot.name}
    files = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            files[file.name] = [file.stat().st_size, file.stat().st_mtime_ns]
        elif file.name == "config.json" or file.suffix == ".py":
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"files": files}


def _load(path: Path, rows: int) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        table = load_file(path)
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read (%s) and is computed again", path, error)
        return None
    if not all(len(column) == rows and bool(column.isfinite().all()) for column in table.values()):
        logger.warning("%s does not hold %d finite rows and is computed again", path, rows)
        return None
    return table


def _save(path: Path, table: dict[str, Tensor]) -> None:
    with input_errors():  # reference.cache_dir may be no folder, or a full one
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(table))
