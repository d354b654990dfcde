"""One schema for every benchmark: JSON lines, one finished (or absent) contestant each.

A line holds

    op, peer, shape (sizes by name), dtype, pass
    ms, ms_spread, rounds    median and interquartile range of `rounds` calls, or of means over many fast ones
    ours_ms                  median of robustloss's rounds between these, by which the ratio goes
    peak_bytes               memory beyond the inputs and the returned gradients, measured (see bench/measure.py)
    gradient_bytes           memory of the returned gradients, which every contestant must deliver
    rate, rate_unit          GB/s or TFLOP/s of the least work that the pass needs (the suite's file says what that is)
    ceiling, fraction_of_ceiling     the ceiling of this pass measured in the same run; 1.0 is as fast as it
    launches                 kernels, copies and fills that one call starts on a GPU
    absent                   the reason why the contestant could not be measured; then the numbers are null
    device, threads, versions, commit, time

A number that a suite does not measure is null. A line is appended by one write, so a killed run leaves at worst one
torn line, which reading ignores, and going on skips what is there. `python -m bench.results` prints the commit as
benchmarks name it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a measurement depends on: a change in one of these makes earlier results another commit's.
SOURCES = ("robustloss", "kernels", "csrc", "bench", "setup.py")
SOURCE_SUFFIXES = (".py", ".cpp", ".h", ".cu")
OURS = "robustloss"
# Contestants that are a ceiling instead.
CEILINGS = READ, COPY, PRODUCTS, SORT = "plain read", "plain copy", "bare matmuls", "torch.sort"
PACKAGES = (
    "torch",
    "triton",
    "robustloss",
    "trl",
    "liger-kernel",
    "flash-attn",
    "cut-cross-entropy",
    "torchsort",
    "transformers",
)


@dataclass(frozen=True)
class Result:
    """One line; see the module's docstring."""

    op: str
    peer: str
    shape: dict[str, int]
    dtype: str
    pass_name: str  # "pass" in JSON, which is a keyword here
    device: str
    commit: str
    threads: int
    ms: float | None = None
    ms_spread: float | None = None
    rounds: int | None = None
    ours_ms: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    rate: float | None = None
    rate_unit: str | None = None
    ceiling: str | None = None
    fraction_of_ceiling: float | None = None
    launches: int | None = None
    absent: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    time: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def key(self) -> tuple:
        """What is measured once."""
        shape = tuple(sorted(self.shape.items()))
        return (self.op, self.peer, shape, self.dtype, self.pass_name, self.commit, self.device, self.threads)

    @property
    def group(self) -> tuple:
        """What contestants must share to be compared."""
        return tuple(part for index, part in enumerate(self.key) if index != 1)

    def ratio_to(self, own: Result) -> float:
        """Of the times; above 1 is slower than `own`."""
        return self.ms / (self.ours_ms if self.ours_ms and own.peer == OURS else own.ms)

    @property
    def is_ceiling(self) -> bool:
        return self.peer in CEILINGS

    def to_line(self) -> str:
        values = asdict(self)
        values["pass"] = values.pop("pass_name")
        return json.dumps(values) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Result:
        values = json.loads(line)
        values["pass_name"] = values.pop("pass")
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def append(path: Path, line: str) -> None:
    """Add a line by one write; a torn line that a killed run left stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (("\n" if torn else "") + line).encode())
    finally:
        os.close(descriptor)


def load(path: Path) -> list[Result]:
    """The latest result of each key, in the order of their first appearance; torn lines are ignored."""
    latest: dict[tuple, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = Result.from_line(line)
        except json.JSONDecodeError:
            continue
        latest[result.key] = result
    return list(latest.values())


def finished(results: Iterable[Result]) -> set[tuple]:
    """Keys that need no other run; an absent contestant may be there the next time."""
    return {result.key for result in results if result.ms is not None}


@cache
def commit() -> str:
    """The short commit; where sources differ from it, or there is no git, also a hash of them. Of an installation, its
    version.

    The environment's ROBUSTLOSS_COMMIT overrides it, for a copy without git.
    """
    if given := os.environ.get("ROBUSTLOSS_COMMIT"):
        return given
    if not (ROOT / "setup.py").exists():  # whatever repository an environment may lie in
        return metadata.version("robustloss")
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *SOURCES], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"tree-{_source_hash()}"
    # Results are no source: the first line written must not make the second one another commit's.
    changed = [line for line in changed.splitlines() if line.endswith((*SOURCE_SUFFIXES, "/"))]
    return f"{head.strip()}-{_source_hash()}" if changed else head.strip()


def _source_hash() -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in SOURCE_SUFFIXES and file.is_file():
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:8]


@cache
def device_name() -> str:
    """The GPU's name, or the processor's with the vector instructions that torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    name = models[0].strip() if models else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def file_name() -> str:
    """<device>.jsonl"""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".jsonl"


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    print(commit())
