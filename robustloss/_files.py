"""Files that are whole or not there, through a kill and through a power cut: written beside, then renamed."""

from __future__ import annotations

import errno
import os
import platform
import secrets
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
