"""`python -m bench.compile_report`: what the compiler makes of every Triton kernel, for GPUs that need not be there.

Compiles each kernel, dtype and variant that is used for sm_80, sm_90, sm_100 and gfx942, and prints a Markdown table:
registers of a thread, bytes of spilled or other local memory of a thread, bytes of shared memory of a program, and the
widest load and store of global memory in bytes. Each offence is a line on stderr, and any makes the exit status 1:
local memory, more shared memory than the target has, or a row kernel that does not read (and, if it writes rows, write)
16 bytes at a time. `--json FILE` writes the rows of the table as well. A new kernel is a new entry of `cases`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robustloss.kernels import preference_loss, sequence_sum, sorted_transport, token_logps, token_logratios
from robustloss.kernels._row import row_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The most that one program may have.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WIDE = 16  # bytes: the widest access that all of these GPUs have
VOCABULARY = 151_936

ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
# Hardly any bytes pass through these: a token's or a pair's share is a few numbers, of which there may be any number.
NARROW_KERNELS = (
    "sequence_sum_kernel",
    "sequence_repeat_kernel",
    "preference_loss_kernel",
    "preference_loss_margin_kernel",
    "preference_loss_shape_kernel",
    "preference_loss_gradient_kernel",
    "sorted_transport_row_kernel",
    "sorted_transport_cell_kernel",
    "sorted_transport_join_kernel",
)


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments, as Triton finds them at run time; annotated ones need no mention.

    Pointers count as divisible by 16, and so do strides unless the rows are not aligned; sizes may be any number.
    """

    kernel: Any
    variant: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    aligned: bool = True

    def source(self) -> ASTSource:
        signature, attributes = {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            kind = parameter.annotation_type or self.arguments.get(name, "constexpr")
            signature[name] = kind
            known_stride = self.aligned and name.startswith("stride") and not parameter.do_not_specialize
            if kind.startswith("*") or known_stride:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, self.constants, attributes)


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


def cases(warp_size: int) -> Iterator[Case]:
    yield from _token_logps(warp_size)
    yield from _token_logratios(warp_size)
    yield from _sequence_sum()
    yield from _preference_loss(warp_size)
    yield from _sorted_transport(warp_size)


def _rows(dtype: str, *names: str) -> dict[str, str]:
    """Types of a row kernel's arguments: integers, and the pointers that all of them have."""
    sums = "*fp64" if dtype == "fp64" else "*fp32"
    integers = dict.fromkeys(("n_time", "n_vocabulary", "ignore_index", *names), "i32")
    return integers | {"p_labels": "*i64", "p_lse": sums, "p_logps": sums, "p_statistics": sums, "p_grad_logps": sums}


def _token_logps(warp_size: int) -> Iterator[Case]:
    plain_and_capped = product(ITEMSIZE, (None, 30.0), (True,))
    not_aligned = product(("fp32", "bf16"), (None,), (False,))
    for dtype, softcap, aligned in (*plain_and_capped, *not_aligned):
        logits = {"p_logits": f"*{dtype}", "p_grad_logits": f"*{dtype}"}
        name = f"{dtype}{', softcap' if softcap else ''}{'' if aligned else ', rows not aligned'}"
        most_loads = token_logps.most_loads(softcap)
        loads, lanes, vector, num_warps = row_tile(VOCABULARY, ITEMSIZE[dtype], most_loads, aligned, warp_size)
        constants = {"HAS_SOFTCAP": softcap is not None}
        tile = {"LOADS": loads, "LANES": lanes, "VECTOR": vector}
        forward = _rows(dtype, "stride_batch", "stride_time") | logits
        for n_statistics in (0, 1, 3):
            variant = f"{name}, {n_statistics} statistics" if n_statistics else name
            statistics = {"N_STATISTICS": n_statistics}
            kernel = token_logps.token_logps_fwd_kernel
            yield Case(kernel, variant, forward, constants | statistics | tile, num_warps, aligned)
        strides = [f"stride_{name}{axis}" for name in ("", "grad_", "grad_logps_") for axis in ("batch", "time")]
        backward = _rows(dtype, "vocabulary_start", *strides) | logits
        block = {"BLOCK": loads * lanes * vector}
        yield Case(token_logps.token_logps_bwd_kernel, name, backward, constants | block, num_warps, aligned)


def _token_logratios(warp_size: int) -> Iterator[Case]:
    mixed = [("bf16", "fp32"), ("fp32", "bf16")]
    for dtype, ref_dtype in [*zip(ITEMSIZE, ITEMSIZE, strict=True), *mixed]:
        loads, lanes, vector, num_warps = row_tile(VOCABULARY, ITEMSIZE[dtype], 2, True, warp_size)
        strides = [f"stride_{name}_{axis}" for name in ("policy", "ref") for axis in ("batch", "time")]
        arguments = _rows(dtype, *strides)
        arguments |= {"p_policy_logits": f"*{dtype}", "p_ref_logits": f"*{ref_dtype}"}
        arguments["p_logratios"] = arguments["p_lse"]
        variant = dtype if dtype == ref_dtype else f"{dtype}, reference {ref_dtype}"
        tile = {"LOADS": loads, "LANES": lanes, "VECTOR": vector}
        yield Case(token_logratios.token_logratios_fwd_kernel, variant, arguments, tile, num_warps)


def _sequence_sum() -> Iterator[Case]:
    numbers = ("n_time", "n_tokens", "n_sequences", "n_steps", "ignore_index", "stride_sequence", "stride_time")
    integers = dict.fromkeys((*numbers, "stride_labels_sequence", "stride_labels_time"), "i32") | {"p_labels": "*i64"}
    for dtype, average, offsets in product(("fp32", "fp64"), (False, True), (None, "i32", "i64")):
        arguments = integers | dict.fromkeys(("p_values", "p_sums", "p_counts"), f"*{dtype}")
        constants: dict[str, Any] = {"PACKED": offsets is not None, "AVERAGE": average, "BLOCK": 4096}
        if offsets:
            arguments["p_cu_seqlens"] = f"*{offsets}"
        else:
            constants["p_cu_seqlens"] = None
        variant = f"{dtype}, {f'packed {offsets}' if offsets else 'padded'}{', average' if average else ''}"
        yield Case(sequence_sum.sequence_sum_kernel, variant, arguments, constants, 8)
    for dtype, offsets in product(("fp32", "fp64"), ("i32", "i64")):
        arguments = integers | {"p_values": f"*{dtype}", "p_tokens": f"*{dtype}", "p_cu_seqlens": f"*{offsets}"}
        yield Case(sequence_sum.sequence_repeat_kernel, f"{dtype}, {offsets}", arguments, {"BLOCK": 1024}, 4)


def _preference_loss(warp_size: int) -> Iterator[Case]:
    links = ("robust", "logistic", "hinge", "squared_hinge", "least_squares", "ipo", "identity")
    kinds = ("kl_ball", "chi_square", "cvar")  # of solvers, the longest of each
    aggregates = (*kinds, "mean", "kl_tilt", "kl_tilt_unnormalized", "soft_min", "total_variation")
    parallel = preference_loss.PARALLEL_BLOCK
    inputs = ("p_chosen", "p_rejected", "p_ref_chosen", "p_ref_rejected", "p_weights")
    outputs = ("p_losses", "p_slopes", "p_value", "p_gradient", "p_worst_case", "p_statistics")
    for dtype in ("fp32", "fp64"):
        block, num_warps = preference_loss.block_and_warps(preference_loss.MOST_AT_ONCE, ITEMSIZE[dtype], warp_size)
        arguments = {"n_pairs": "i32", "n_sums": "i32", "p_sums": "*fp64", "p_shape": "*fp64"}
        arguments |= dict.fromkeys(inputs, "*bf16") | dict.fromkeys(outputs, f"*{dtype}")
        kernel = preference_loss.preference_loss_kernel
        for aggregate in aggregates if dtype == "fp32" else kinds:
            constants = {"AGGREGATE": aggregate, "BLOCK": block}
            shape_kernel = preference_loss.preference_loss_shape_kernel
            yield Case(shape_kernel, f"{dtype}, {aggregate}", arguments, constants, num_warps)
            yield Case(kernel, f"{dtype}, robust, {aggregate}", arguments, constants | {"LINK": "robust"}, num_warps)
        chosen_only = {name: kind for name, kind in arguments.items() if name not in inputs[1:]}
        constants = _absent(kernel, chosen_only) | {"LINK": "identity", "AGGREGATE": "mean", "BLOCK": block}
        yield Case(kernel, f"{dtype}, identity, mean, chosen only", chosen_only, constants, num_warps)
        for aggregate in (*kinds, "mean"):
            gradient_kernel, constants = preference_loss.preference_loss_gradient_kernel, {"AGGREGATE": aggregate}
            yield Case(gradient_kernel, f"{dtype}, {aggregate}", arguments, constants | {"BLOCK": parallel}, 4)
        for link in links if dtype == "fp32" else links[:1]:
            margin_kernel, constants = preference_loss.preference_loss_margin_kernel, {"LINK": link, "BLOCK": parallel}
            yield Case(margin_kernel, f"{dtype}, {link}", arguments, constants, 4)


def _sorted_transport(warp_size: int) -> Iterator[Case]:
    sizes = dict.fromkeys(("n_u", "n_v", "n_steps", "n_blocks"), "i32")
    first, second = dict.fromkeys(("p_u", "p_u_ref"), "*bf16"), dict.fromkeys(("p_v", "p_v_ref"), "*bf16")
    desirable, weights = {"p_desirable": "*i1"}, {"p_u_weights": "*fp32"}
    levels = {"p_u_levels": "*fp64", "p_v_levels": "*fp64", "p_counts": "*i64"}
    outputs = ("p_value", "p_u_gradient", "p_v_gradient", "p_statistics", "p_sorted", "p_runs")

    kernel, most = sorted_transport.sorted_transport_row_kernel, sorted_transport.MOST_AT_ONCE
    variants: dict[str, tuple[dict[str, str], int]] = {
        "equal sizes": (first | second, 2 * most),
        "any sizes": (first | second, 2 * most),
        "weights": (first | second | weights | {"p_v_weights": "*fp32"} | levels, 2 * most),
        "desirable": (first | desirable, most),
        "desirable, weights": (first | desirable | weights | levels, most),
    }
    for name, (inputs, n_samples) in variants.items():
        block, num_warps = sorted_transport.block_and_warps(n_samples, warp_size)
        arguments = sizes | inputs | dict.fromkeys(outputs, "*fp32") | {"p_order": "*i32"}
        constants = _absent(kernel, arguments) | {"LINK": "robust", "EQUAL": name == "equal sizes"}
        constants |= {"BLOCK": block, "CELLS": sorted_transport.ROW_CELLS}
        yield Case(kernel, f"fp32, {name}", arguments, constants, num_warps)

    found = {"p_sums": "*fp64", "p_samples": "*i32", "p_u_order": "*i64", "p_v_order": "*i64"}
    for dtype, name in product(("fp32", "fp64"), ("equal sizes", "any sizes", "weights")):
        arguments = sizes | found | dict.fromkeys((*outputs, "p_u", "p_v"), f"*{dtype}")
        arguments |= levels if name == "weights" else {}
        kernel, equal = sorted_transport.sorted_transport_cell_kernel, {"EQUAL": name == "equal sizes"}
        constants = _absent(kernel, arguments) | equal | {"LINK": "robust", "BLOCK": sorted_transport.CELL_BLOCK}
        yield Case(kernel, f"{dtype}, {name}", arguments, constants, 4)
        if name != "weights":
            kernel, constants = sorted_transport.sorted_transport_join_kernel, equal | {"BLOCK": 256}
            yield Case(kernel, f"{dtype}, {name}", arguments, constants, 4)


def _absent(kernel: Any, arguments: dict[str, str]) -> dict[str, None]:
    """The pointers that are None."""
    return {x.name: None for x in kernel.params if x.name.startswith("p_") and x.name not in arguments}


def compile_case(index: int, target_name: str) -> Row:
    """Compile one of `cases`, which is named by its number because a kernel does not travel between processes."""
    target = TARGETS[target_name]
    case = list(cases(target.warp_size))[index]
    binary = triton.compile(case.source(), target=target, options={"num_warps": case.num_warps})
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
        if row.kernel in NARROW_KERNELS or not row.aligned:
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


def report() -> list[Row]:
    numbers = [(index, target) for index, _ in enumerate(cases(32)) for target in TARGETS]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as processes:
        return list(processes.map(compile_case, *zip(*numbers, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description="See the module's docstring.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the table here as well")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("under TRITON_INTERPRET nothing is compiled: unset it")
    rows = report()
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    lines = offences(rows)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
