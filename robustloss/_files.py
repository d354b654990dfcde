"""Files and folders that a kill or a power cut leaves whole or not at all: written beside, then renamed."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`: what comes in between leaves the old file, never half of the new."""
    # On a shared disk other hosts, and other containers with the same process number, may write the same file.
    writer = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f"{path.name}.{writer}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`, where there may be one, which `recover_folder` brings back."""
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    if folder.exists():  # a rename replaces no folder that holds something
        remove_folder(previous_of(folder))
        os.replace(folder, previous_of(folder))
    try:
        os.replace(temporary, folder)
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            recover_folder(folder)
        raise
    sync(folder.parent)
    remove_folder(previous_of(folder))


def recover_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was cut off between its two renames, and remove what one left behind."""
    if previous_of(folder).exists() and not folder.exists():
        os.replace(previous_of(folder), folder)
    remove_folder(previous_of(folder))


def previous_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it; where there is none, that is well too."""
    if folder.exists():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do it for a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
