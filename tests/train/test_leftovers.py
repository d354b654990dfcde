"""Temporary files of killed writers go, and those of living ones stay."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time

import pytest

from robustloss.train.leftovers import STALE, remove_abandoned
from robustloss.train.model_identity import MEMORY, file_digests

KILLED_WRITER = """
import os, pathlib, signal, sys
from robustloss import _files
_files.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
_files.replace_file(pathlib.Path(sys.argv[1]), "new")
"""


@pytest.fixture
def left(tmp_path):
    """What a killed process has left beside tmp_path/cache/model_digests.json."""
    folder = tmp_path / "cache"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(folder / MEMORY)])
    (temporary,) = folder.iterdir()
    assert temporary.name.startswith(f"{MEMORY}.{platform.node()}-")
    return temporary


def test_what_a_killed_writer_left_goes_at_the_next_use(left, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file_digests([tmp_path / "config.json"], left.parent)
    assert not left.exists()


def test_what_a_living_process_another_host_or_another_file_may_need_stays_until_it_is_stale(left):
    pid, other = left.name.split("-")[-2], os.getpid()
    kept = [
        left.with_name(left.name.replace(f"-{pid}-", f"-{other}-")),
        left.with_name(left.name.replace(f".{platform.node()}-", ".another-host-1.example-")),
    ]
    foreign = [left.with_name(f"another_{left.name}"), left.with_name(f"{MEMORY}.tmp")]
    for path in (*kept, *foreign):
        path.write_text("half")
    remove_abandoned(left.with_name(MEMORY))
    assert sorted(left.parent.iterdir()) == sorted([*kept, *foreign])
    for path in (*kept, *foreign):
        os.utime(path, (0, time.time() - STALE - 60))
    remove_abandoned(left.with_name(MEMORY))
    assert sorted(left.parent.iterdir()) == sorted(foreign)


def test_a_folder_that_is_absent_holds_nothing_to_remove(tmp_path):
    remove_abandoned(tmp_path / "absent" / MEMORY)
    assert not list(tmp_path.iterdir())
