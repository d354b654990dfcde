"""What a killed `replace_file` leaves beside its file, and how it is told from what another is writing."""

from __future__ import annotations

import glob
import os
import platform
import re
import time
from contextlib import suppress
from pathlib import Path

STALE = 600  # seconds since the last byte after which a temporary file has no writer any more, on whatever host
_WRITER = re.compile(r"-(\d+)-[0-9a-f]{8}\.tmp$")  # after the file's name and the host's, as `replace_file` writes it


def is_abandoned(path: Path) -> bool:
    """Whether the file is a temporary one of `replace_file` whose writer is gone.

    That is a process of this host that is no more, or of any host where nothing was written for STALE seconds.

    Raises:
        OSError: the file is gone, or not to be looked at.
    """
    writer = _WRITER.search(path.name)
    if writer is None:
        return False
    of_this_host = path.name[: writer.start()].endswith(f".{platform.node()}")
    return (of_this_host and not _is_alive(int(writer[1]))) or time.time() - path.stat().st_mtime > STALE


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` have left, where they can be removed."""
    with suppress(OSError):  # the folder is absent, or not to be looked into
        for temporary in list(path.parent.glob(f"{glob.escape(path.name)}.*.tmp")):
            with suppress(OSError):
                if is_abandoned(temporary):
                    temporary.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
