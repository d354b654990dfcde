"""What the compiler makes of every kernel, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import robustloss.kernels

# The most that one program may have on each device.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What each kernel became on each target; compiled in a process of its own, where nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("ahead_of_time.py")
    process = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_every_kernel_is_compiled_for_every_target(compiled):
    modules = [module.name for module in pkgutil.iter_modules(robustloss.kernels.__path__)]
    kernels = {
        name
        for module in modules
        for name in vars(import_module(f"robustloss.kernels.{module}"))
        if name.endswith("_kernel")
    }
    assert {(result["kernel"], result["target"]) for result in compiled.values()} == {
        (kernel, target) for kernel in kernels for target in SHARED_BYTES
    }


def test_nothing_spills_to_local_memory(compiled):
    assert {name: result["local_bytes"] for name, result in compiled.items() if result["local_bytes"]} == {}


def test_shared_memory_is_within_the_limit(compiled):
    shared = {name: result["shared_bytes"] for name, result in compiled.items()}
    assert {name: used for name, used in shared.items() if used > SHARED_BYTES[compiled[name]["target"]]} == {}


def test_tensors_are_read_sixteen_bytes_at_a_time(compiled):
    assert [name for name, result in compiled.items() if not result["wide_loads"]] == []
