"""What tells one model from another: the bytes of its files, or the commit of a Hub repository.

A local model's digests are remembered in a small file, as reading the 16 GB of an 8B model takes longer than finding
what was computed with it. A file that stands there unchanged (size, times, inode) is not read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from robustloss._files import replace_file
from robustloss.train.leftovers import remove_abandoned

logger = logging.getLogger(__name__)

MEMORY = "model_digests.json"
WEIGHTS = (".safetensors", ".bin")
BLOCK = 2**26  # bytes that one thread hashes: enough to keep a disk busy, few enough that one file keeps all threads so
SETTLED = 2.0  # seconds; a file changed since then may change again within the resolution of its time
TOLD = 2**30  # bytes from which on the user is told why nothing happens


def model_identity(name_or_path: str, memory: Path) -> dict[str, Any]:
    """The SHA-256 of each file that decides a model's numbers (weights, config, code), or a Hub name and its commit.

    Args:
        name_or_path: a folder, or a Hub name, whose files are in the local cache already.
        memory: a folder in which to remember digests (`model_digests.json`), where it can be written.

    Raises:
        OSError: a file cannot be read.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        # A config does not tell its commit in every version of transformers; the local cache's folder is named by it.
        snapshot = Path(str(cached_file(name_or_path, "config.json"))).parent
        return {"name": name_or_path, "commit": snapshot.name}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _decides(file)]
    identity: dict[str, Any] = {"files": file_digests(files, memory)}
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # transformers then loads the model that it names, and the adapter on top
        base = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
        identity["base"] = model_identity(base, memory) if base else None
    return identity


def _decides(file: Path) -> bool:
    named = file.name in ("config.json", "adapter_config.json") or file.name.endswith(".index.json")
    return named or file.suffix in (*WEIGHTS, ".py")


def file_digests(files: list[Path], memory: Path) -> dict[str, str]:
    """{name: SHA-256 of the file's bytes (of the digests of its blocks), hexadecimal}."""
    remove_abandoned(memory / MEMORY)
    remembered = _read_memory(memory)
    # The time of the inode's change is nothing that a program can set back.
    stats = {file: (str(file.resolve()), _stamp(file)) for file in files}
    digests = {
        file: remembered[path][-1]
        for file, (path, stamp) in stats.items()
        if path in remembered and remembered[path][:-1] == stamp
    }
    unknown = [file for file in files if file not in digests]
    size = sum(stats[file][1][0] for file in unknown)
    if size >= TOLD:
        logger.info("hashing %.1f GB of model files, by which the reference's cache is found", size / 1e9)
    for file, digest in _hash(unknown):
        digests[file] = digest
        path, stamp = stats[file]
        if _stamp(file) == stamp and time.time_ns() - max(stamp[1:3]) > SETTLED * 1e9:
            remembered[path] = [*stamp, digest]
            # At once: a kill among a hundred large files loses one of them.
            _write_memory(memory, remembered)
    return {file.name: digests[file] for file in files}


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each file with its digest, in order, as it is ready."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        blocks = {
            file: [pool.submit(_block_digest, file, start) for start in range(0, file.stat().st_size, BLOCK)]
            for file in files
        }
        for file, futures in blocks.items():
            digest = hashlib.sha256()
            for future in futures:
                digest.update(future.result())
            yield file, digest.hexdigest()


def _block_digest(file: Path, start: int) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(min(BLOCK, 2**20))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        left = BLOCK
        while left and (count := opened.readinto(memoryview(buffer)[: min(left, len(buffer))])):
            digest.update(memoryview(buffer)[:count])
            left -= count
    return digest.digest()


def _read_memory(memory: Path) -> dict[str, Any]:
    try:
        remembered = json.loads((memory / MEMORY).read_bytes())
        return {path: entry for path, entry in remembered.items() if len(entry) == 5 and len(entry[-1]) == 64}
    except (OSError, ValueError, AttributeError, TypeError):  # absent, or not ours any more
        return {}


def _write_memory(memory: Path, remembered: dict[str, Any]) -> None:
    """Two runs that write at once lose an entry of one of them, which is then hashed again."""
    try:
        memory.mkdir(parents=True, exist_ok=True)
        replace_file(memory / MEMORY, json.dumps(remembered, indent=1))
    except OSError as error:
        logger.debug("digests are not remembered: %s", error)
