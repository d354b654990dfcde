"""Reading preference data: a local file, a folder of files or a dataset of the Hugging Face Hub, as a list of rows.

Every row remembers where it stands, so that an error about it can say so: `pairs.jsonl:12` is a line (from 1), as an
editor counts it; `pairs.parquet[11]` is an index (from 0), as Python and `datasets` count it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
PREFERENCE_COLUMNS = ("chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")


class Row(dict[str, Any]):
    """One record of the data (column -> value) with its `location`, which survives slicing and shuffling of lists."""

    def __init__(self, values: dict[str, Any], location: str) -> None:
        super().__init__(values)
        self.location = location


def load_rows(source: str, split: str) -> list[Row]:
    """Read all rows of `source`.

    Args:
        source: a file ending in .jsonl, .json (a list of objects, or one object a line), .parquet or .csv; a folder,
            of which the files named `<split>*` with one of those endings are read in the order of their names; or the
            name of a dataset on the Hugging Face Hub.
        split: the split of a folder or of a Hub dataset; a single file has none, and is read whole.

    Raises:
        FileNotFoundError: a local file, or a folder's files of that split, do not exist.
        ValueError: something cannot be read (naming the file and the line), or there are no rows.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = [row for file in _files_of_split(path, split) for row in _read_file(file)]
    elif path.is_file():
        rows = list(_read_file(path))
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data: no file or folder {source!r} (looked at {path.absolute()})")
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise ValueError(f"{source}: no rows, want at least one")
    return rows


def detect_kind(rows: list[Row], source: str) -> str:
    """Tell by the first row's columns: "preference" (chosen, rejected, and prompt or an implicit one) or "unpaired"
    (prompt, completion, label). ValueError names the missing columns and those present."""
    present = [str(column) for column in rows[0]]
    preference_missing = [column for column in PREFERENCE_COLUMNS if column not in present]
    unpaired_missing = [column for column in UNPAIRED_COLUMNS if column not in present]
    if not preference_missing and not unpaired_missing:
        raise ValueError(f"{source}: holds preference and unpaired columns at once; set data.kind to the one you mean")
    if not preference_missing:
        return "preference"
    if not unpaired_missing:
        return "unpaired"
    missing = preference_missing if len(preference_missing) == 1 else unpaired_missing
    names = ", ".join(map(repr, present)) or "none"
    raise ValueError(
        f"{source}: missing column {', '.join(map(repr, missing))}; present: {names}; want (prompt,) chosen, rejected "
        "for preference data or prompt, completion, label for unpaired data"
    )


def _files_of_split(folder: Path, split: str) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    files = [file for file in found if file.name.startswith(split)]
    if not files:
        names = ", ".join(file.name for file in found[:8]) or "none"
        endings = ", ".join(SUFFIXES)
        raise FileNotFoundError(f"data: no file named {split}* ({endings}) in folder {folder}; it holds: {names}")
    return files


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: got a file ending in {path.suffix!r}, want one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".csv":
            yield from _read_csv(path)
        else:
            yield from _read_json(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _read_json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        is_list = path.suffix == ".json" and file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if is_list:
            try:
                records = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
            for index, record in enumerate(records):
                yield _json_row(record, f"{path}[{index}]")
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            yield _json_row(record, f"{path}:{number}")


def _json_row(record: Any, location: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{location}: got a JSON {type(record).__name__}, want an object with named columns")
    return Row(record, location)


def _read_csv(path: Path) -> Iterator[Row]:
    """Texts in every column, by Python's own reader: those that guess types turn a completion "NA" into a null."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                location = f"{path}:{reader.line_num}"
                if None in record:
                    raise ValueError(f"{location}: got more cells than the {len(reader.fieldnames or [])} columns")
                yield Row(record, location)
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    for index, record in enumerate(table.to_pylist()):
        yield Row(record, f"{path}[{index}]")


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (
        Exception
    ) as error:  # the Hub, the network and the dataset's own script each have their own families of errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"data: cannot load {name!r}, split {split!r}, from the Hugging Face Hub: {reason} "
            f"(a local file would end in one of {', '.join(SUFFIXES)})"
        ) from error
    return [Row(dict(record), f"{name}[{index}]") for index, record in enumerate(dataset)]
