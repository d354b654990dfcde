"""Files that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`; a kill leaves the old file, never half of the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process with the same number, or a link that someone laid there
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
