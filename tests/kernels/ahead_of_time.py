"""Compile every kernel for GPUs that are not there and print what the compiler made of it, as JSON.

Run without TRITON_INTERPRET: `python tests/kernels/ahead_of_time.py`. A new kernel is a new entry of `cases`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robustloss.kernels import token_logps

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2}


@dataclass
class Case:
    """A kernel with the types of its arguments, as Triton finds them at run time; annotated ones need no mention.

    Pointers and strides count as divisible by 16, as they are for a contiguous tensor with such a last dimension;
    sizes may be any number.
    """

    kernel: Any
    label: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int

    def source(self) -> ASTSource:
        signature = {
            parameter.name: parameter.annotation_type or self.arguments.get(parameter.name, "constexpr")
            for parameter in self.kernel.params
        }
        aligned = [
            (index,)
            for index, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name.startswith("stride")
        ]
        attributes = {index: [["tt.divisibility", 16]] for index in aligned}
        return ASTSource(self.kernel, signature, self.constants, attributes)


def cases() -> Iterator[Case]:
    for dtype, itemsize in ITEMSIZE.items():
        statistics = "*fp64" if dtype == "fp64" else "*fp32"
        block, num_warps = token_logps.block_and_warps(151_936, itemsize)
        rows = dict.fromkeys(("n_time", "n_vocabulary", "stride_batch", "stride_time", "ignore_index"), "i32")
        rows |= {"p_logits": f"*{dtype}", "p_labels": "*i64", "p_lse": statistics}
        forward = rows | {"p_logps": statistics, "p_entropy": statistics}
        for return_entropy in (False, True):
            label = f"{dtype} entropy" if return_entropy else dtype
            constants = {"RETURN_ENTROPY": return_entropy, "BLOCK": block}
            yield Case(token_logps.token_logps_fwd_kernel, label, forward, constants, num_warps)
        backward = rows | {"p_grad_logps": statistics, "p_grad_logits": f"*{dtype}"}
        backward |= {"stride_grad_batch": "i32", "stride_grad_time": "i32"}
        yield Case(token_logps.token_logps_bwd_kernel, dtype, backward, {"BLOCK": block}, num_warps)


def compile_case(case: Case, target: GPUTarget) -> dict[str, Any]:
    """Registers of a thread, bytes of spilled or other local memory, bytes of shared memory, and the widest load."""
    binary = triton.compile(case.source(), target=target, options={"num_warps": case.num_warps})
    inspect = _inspect_cuda if target.backend == "cuda" else _inspect_hip
    registers, local_bytes, wide_loads = inspect(binary.asm)
    return {
        "kernel": case.kernel.__name__,
        "registers": registers,
        "local_bytes": local_bytes,
        "shared_bytes": binary.metadata.shared,
        "wide_loads": wide_loads,
    }


def _inspect_cuda(assembly: Any) -> tuple[int, int, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(_only(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL"))
    wide = re.findall(r"\bld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|b128)\b", assembly["ptx"])
    return registers, stack + local, len(wide)


def _inspect_hip(assembly: Any) -> tuple[int, int, int]:
    text = assembly["amdgcn"]
    registers = int(_only(r"\.vgpr_count:\s*(\d+)", text))
    names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    local_bytes = sum(int(_only(rf"\.{name}:\s*(\d+)", text)) for name in names)
    return registers, local_bytes, len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))


def _only(pattern: str, text: str) -> str:
    (value,) = re.findall(pattern, text)
    return value


if __name__ == "__main__":
    report = {
        f"{case.kernel.__name__} [{case.label}] for {name}": {"target": name, **compile_case(case, target)}
        for case in cases()
        for name, target in TARGETS.items()
    }
    print(json.dumps(report, indent=2))
