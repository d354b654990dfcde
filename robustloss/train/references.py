"""The reference model's log-probabilities: computed once and kept on disk, or from a live frozen copy, or from the base
model under the LoRA adapter.

What is kept is found again by everything that the numbers depend on (see `reference_cache`). It is computed in parts,
and a kill loses one of them at most. The batches depend neither on where it was cut nor on the number of processes, so
the numbers are the same to the bit.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from robustloss._version import __version__
from robustloss.train.config import RunConfig, attention_of, input_errors
from robustloss.train.data import fingerprint
from robustloss.train.distributed import gather, is_first, on_first
from robustloss.train.engine import build_reference
from robustloss.train.inputs import Inputs
from robustloss.train.model_identity import model_identity
from robustloss.train.reference_cache import ReferenceCache, Table, digest_of, key_of

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Logps = Callable[[Batch], dict[str, Tensor]]

# A part of the table: one in 50 of its batches, but enough of them that writing one costs nothing beside.
PARTS = 50
PART_BATCHES = 64
PART_ROUNDS = 8  # batches for each process


def build_references(
    config: RunConfig, engine: Any, inputs: Inputs, device: torch.device
) -> Callable[[str, Batch], Batch]:
    """A function (split, batch) -> batch with the reference's log-probabilities, as config.reference asks.

    Call it before anything is trained or resumed: where no other model is named, the policy as it is now is the
    reference. A model that is named is loaded only where a table is missing. All processes call it.

    Raises:
        InputError: no folder can be written to.
        FloatingPointError: log-probabilities that are not finite; names the rows.
    """
    if config.reference.mode == "base":
        return lambda split, batch: _with_reference(batch, partial(engine, output="base_logps"))
    if config.reference.mode == "live":
        reference = build_reference(config, device)
        return lambda split, batch: _with_reference(batch, partial(reference, output="logps"))

    cache = ReferenceCache.of(config)
    with input_errors():
        # The first process's: hosts whose libraries differ must still agree on what is missing.
        settings = _from_first(partial(_settings, config, inputs, cache))
    keys = {split: key_of(given) for split, given in settings.items()}
    tables: dict[str, Table] = {}  # by key: two splits may hold the same rows
    for split, key in keys.items():
        if key not in tables:
            table = _shared(on_first(partial(cache.load, settings[split])), device)
            if table is not None:
                tables[key] = table
    missing = {key: split for split, key in keys.items() if key not in tables}
    if missing:
        on_first(cache.check_writable)
        name = config.reference.name_or_path
        reference = engine if name is None else build_reference(config, device)
        reference.eval()
        for key, split in missing.items():
            collate = partial(inputs.collate, split, device=device)
            logps = partial(reference, output="logps")
            tables[key] = compute_table(logps, collate, cache, settings[split], device=device, title=split)
        if reference is not engine and hasattr(reference, "destroy"):
            reference.destroy()

    def look_up(split: str, batch: Batch) -> Batch:
        rows = batch["index"].cpu()
        return batch | {column: values[rows].to(device) for column, values in tables[keys[split]].items()}

    return look_up


@torch.no_grad()
def _with_reference(batch: Batch, logps: Logps) -> Batch:
    return batch | {f"ref_{name}": value.float() for name, value in logps(batch).items()}


def _settings(config: RunConfig, inputs: Inputs, cache: ReferenceCache) -> dict[str, dict[str, Any]]:
    """For each split that has rows, all that its numbers depend on, down to their last bit on the same hardware."""
    name = config.reference.name_or_path or config.model.name_or_path
    common = {
        "model": model_identity(name, cache.folders[0]),
        "remote_code": config.model.trust_remote_code,
        "precision": config.precision,
        "attention": attention_of(config),
        "batch": config.batch.microbatch,  # sums of another shape round in another way
        "versions": {package: version(package) for package in ("torch", "transformers")} | {"robustloss": __version__},
    }
    return {
        split: {**common, "data": fingerprint(examples), "rows": len(examples)}
        for split, examples in inputs.examples.items()
        if examples
    }


def batches_of(count: int, size: int) -> list[range]:
    """The rows 0 .. count - 1 in batches of `size`, the last one shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def rounds(batches: Sequence[range]) -> Iterator[tuple[int, range, bool]]:
    """This process's share of the batches: (the first's place among all their rows, a batch, whether it counts).

    Every process gets the same number of batches, as ZeRO-3 needs; where they run out, the first is repeated and does
    not count.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    places = [0]
    for batch in batches:
        places.append(places[-1] + len(batch))
    for first in range(0, len(batches), world):
        position = first + rank if first + rank < len(batches) else 0
        yield places[position], batches[position], position == first + rank


@torch.no_grad()
def _logps_of(
    columns: Logps,
    batches: Sequence[range],
    collate: Callable[[list[int]], Batch],
    device: torch.device,
    progress: Callable[[int], Any] = lambda rows: None,
) -> tuple[Table, list[bool]]:
    """What `columns(batch)` gives for each row of the batches, in their order, from all processes together; and which
    of this process's batches counted."""
    count = sum(len(batch) for batch in batches)
    table: Table = {}
    counted = []
    for place, batch, counts in rounds(batches):
        counted.append(counts)
        for name, value in columns(collate(list(batch))).items():
            column = table.setdefault(name, torch.zeros(count, device=device))
            if counts:
                column[place : place + len(batch)] = value.float()
        progress(dist.get_world_size() * len(batch))
    for column in table.values():
        dist.all_reduce(column)
    return table, counted


def logps_table(
    columns: Logps, count: int, collate: Callable[[list[int]], Batch], *, size: int, device: torch.device
) -> tuple[Table, list[bool]]:
    """What `columns(batch)` gives for each of `count` rows, float32 [count] by name, from all processes together; and
    which of this process's batches counted."""
    return _logps_of(columns, batches_of(count, size), collate, device)


def compute_table(
    logps: Logps,
    collate: Callable[[list[int]], Batch],
    cache: ReferenceCache,
    settings: dict[str, Any],
    *,
    device: torch.device,
    title: str,
) -> Table:
    """The table {"ref_...": float32 [rows]} from all processes together: the parts in the cache, and what is missing.

    `settings` hold "rows" and "batch", the numbers of rows in all and in a batch.
    """
    count, batches = settings["rows"], batches_of(settings["rows"], settings["batch"])
    parts = on_first(partial(cache.load_parts, settings)) or []  # the first process's alone
    ready = torch.zeros(count, dtype=torch.bool)
    for rows, _ in parts:
        ready[rows] = True
    unready = [i for i, batch in enumerate(batches) if not bool(ready[batch.start : batch.stop].all())]
    todo = _from_first(lambda: unready)

    told = False
    length = max(PART_BATCHES, PART_ROUNDS * dist.get_world_size(), len(batches) // PARTS)
    silent = not (is_first() and sys.stderr.isatty())
    described = f"reference of {title}"
    with tqdm(desc=described, total=count, initial=int(ready.sum()), unit="row", delay=2, disable=silent) as bar:
        for first in range(0, len(todo), length):
            chosen = [batches[i] for i in todo[first : first + length]]
            columns, _ = _logps_of(logps, chosen, collate, device, lambda rows: bar.update(min(rows, count - bar.n)))
            part = {f"ref_{name}": column.cpu() for name, column in columns.items()}
            rows = torch.tensor([row for batch in chosen for row in batch])
            parts.append((rows, part))
            if all(bool(column.isfinite().all()) for column in part.values()):
                on_first(partial(cache.save_part, settings, rows, part))
            elif is_first() and not told:
                logger.warning("the reference's log-probabilities are not finite; the run stops when all are known")
                told = True

    table = _shared(on_first(partial(_joined, parts, count)), device)
    assert table is not None
    bad = sorted({row for column in table.values() for row in (~column.isfinite()).nonzero().flatten().tolist()})
    if bad:
        raise FloatingPointError(f"the reference's log-probabilities are not finite for the dataset's rows {bad}")
    on_first(partial(cache.save, settings, table))
    return table


def _joined(parts: list[tuple[Tensor, Table]], count: int) -> Table:
    table = {name: torch.full((count,), torch.nan) for name in parts[0][1]}
    for rows, part in parts:
        for name, column in part.items():
            table[name][rows] = column
    return table


def _from_first(action: Callable[[], Any]) -> Any:
    """What the action gives on the first process, on all of them."""
    result = [on_first(action)]
    dist.broadcast_object_list(result)
    return result[0]


def _shared(table: Table | None, device: torch.device) -> Table | None:
    """The first process's table on all processes, which all see to it that they hold the same: another one's look at a
    shared folder may be older, and its disk another."""
    names, count, digest = _from_first(
        lambda: ([], 0, "") if table is None else (list(table), len(next(iter(table.values()))), digest_of(table))
    )
    if not names:
        return None
    columns = torch.stack([table[name] for name in names]) if table is not None else torch.empty(len(names), count)
    columns = columns.to(device)
    dist.broadcast(columns, 0)
    received = dict(zip(names, columns.cpu(), strict=True))
    wrong = [rank for rank, found in enumerate(gather(digest_of(received))) if found != digest]
    if wrong:
        raise RuntimeError(f"the reference's log-probabilities did not arrive whole at the processes of rank {wrong}")
    return received
