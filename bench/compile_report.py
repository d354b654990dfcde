"""`python -m bench.compile_report`: what the compiler makes of every Triton kernel, for GPUs that need not be there.

Compiles each kernel, dtype and variant that is used for sm_80, sm_90, sm_100 and gfx942, and prints a Markdown table:
registers of a thread, bytes of spilled or other local memory of a thread, bytes of shared memory of a program, and the
widest load and store of global memory in bytes. Each offence is a line on stderr, and any makes the exit status 1:
local memory, more shared memory than the target has, or a row kernel that does not read (and, if it writes rows, write)
16 bytes at a time. `--target sm_90` compiles for that one alone, `--json FILE` writes the rows of the table as well. A
new kernel is a new entry in bench/compile_cases.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from .compile_cases import cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The most that one program may have.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WIDE = 16  # bytes: the widest access that all of these GPUs have


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    kernel: str
    variant: str
    target: str
    registers: int
    local_bytes: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    aligned: bool = True


def compile_case(index: int, target_name: str) -> Row:
    """Compile one of `cases`, which is named by its number because a kernel does not travel between processes."""
    target = TARGETS[target_name]
    case = list(cases(target.warp_size))[index]
    options = {"num_warps": case.num_warps} | (case.cuda_options if target.backend == "cuda" else {})
    binary = triton.compile(case.source(), target=target, options=options)
    inspect = _inspect_cuda if target.backend == "cuda" else _inspect_hip
    registers, local_bytes, load_bytes, store_bytes = inspect(binary.asm)
    shared_bytes = binary.metadata.shared
    usage = (registers, local_bytes, shared_bytes, load_bytes, store_bytes)
    return Row(case.kernel.__name__, case.variant, target_name, *usage, case.aligned)


def _inspect_cuda(assembly: Any) -> tuple[int, int, int, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(_only(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL"))
    # ld.global.L1::evict_first.v4.b32: four registers of 32 bits.
    widths = {"ld": [0], "st": [0]}
    pattern = r"\b(ld|st)\.global(?:\.[a-zA-Z]\w*(?:::\w+)?)*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    for direction, vector, bits in re.findall(pattern, assembly["ptx"]):
        widths[direction].append(int(vector or 1) * int(bits) // 8)
    return registers, stack + local, max(widths["ld"]), max(widths["st"])


def _inspect_hip(assembly: Any) -> tuple[int, int, int, int]:
    text = assembly["amdgcn"]
    registers = int(_only(r"\.vgpr_count:\s*(\d+)", text))
    names = ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    local_bytes, *spilled = (int(_only(rf"\.{name}:\s*(\d+)", text)) for name in names)
    # A scalar register spills into a lane of a vector register and is in no segment.
    local_bytes = max(local_bytes, 4 * sum(spilled))
    widths = {"load": [0], "store": [0]}
    sizes = {"byte": 1, "short": 2, "dword": 4}
    pattern = r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword)(?:x(\d))?"
    for direction, unit, number in re.findall(pattern, text):
        widths[direction].append(sizes[unit] * int(number or 1))
    return registers, local_bytes, max(widths["load"]), max(widths["store"])


def _only(pattern: str, text: str) -> str:
    (value,) = re.findall(pattern, text)
    return value


def offences(rows: Iterable[Row]) -> list[str]:
    """One line for each thing in the table that must not be."""
    lines = []
    for row in rows:
        name = f"{row.kernel} [{row.variant}] for {row.target}"
        if row.local_bytes:
            lines.append(f"{name}: {row.local_bytes} bytes of local memory, none is wanted")
        if row.shared_bytes > SHARED_BYTES[row.target]:
            lines.append(f"{name}: {row.shared_bytes} bytes of shared memory, there are {SHARED_BYTES[row.target]}")
        # Logits pass through the token kernels; hardly any bytes do through the others.
        if not row.kernel.startswith("token_") or not row.aligned:
            continue
        if row.load_bytes < WIDE:
            lines.append(f"{name}: the widest load has {row.load_bytes} bytes, {WIDE} are wanted")
        # A forward kernel writes a few numbers a row.
        if row.kernel.endswith("_bwd_kernel") and row.store_bytes < WIDE:
            lines.append(f"{name}: the widest store has {row.store_bytes} bytes, {WIDE} are wanted")
    return lines


def table(rows: Iterable[Row]) -> str:
    header = ("kernel", "variant", "target", "registers", "local bytes", "shared bytes", "widest load", "widest store")
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 3)]
    for row in rows:
        *values, _ = asdict(row).values()
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)


def report(targets: Iterable[str]) -> list[Row]:
    numbers = [(index, name) for name in targets for index, _ in enumerate(cases(TARGETS[name].warp_size))]
    numbers.sort(key=lambda number: number[0])
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as processes:
        return list(processes.map(compile_case, *zip(*numbers, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description="See the module's docstring.")
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="compile for this one (may be repeated); default: for all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the table here as well")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("under TRITON_INTERPRET nothing is compiled: unset it")
    rows = report(arguments.target or TARGETS)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    lines = offences(rows)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
