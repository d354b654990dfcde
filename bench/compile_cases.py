"""The Triton kernels that bench/compile_report.py compiles, each with the types and constants that are used.

A new kernel is a new entry of `cases`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from triton.compiler import ASTSource

from robustloss.kernels import (
    _isotonic,
    preference_loss,
    sequence_sum,
    sinkhorn_sort,
    soft_sort,
    sorted_transport,
    token_logps,
    token_logratios,
)
from robustloss.kernels._row import row_tile

VOCABULARY = 151_936
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


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
    cuda_options: dict[str, Any] = field(default_factory=dict)

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


def cases(warp_size: int) -> Iterator[Case]:
    yield from _token_logps(warp_size)
    yield from _token_logratios(warp_size)
    yield from _sequence_sum()
    yield from _preference_loss(warp_size)
    yield from _sorted_transport(warp_size)
    yield from _soft_sort(warp_size)
    yield from _block_sum(warp_size)
    yield from _sinkhorn_sort(warp_size)


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


def _soft_sort(warp_size: int) -> Iterator[Case]:
    integers = dict.fromkeys(("n_positions", "log2_tile", "n_sizes"), "i32")
    pointers = {"p_order": "*i64", "p_result_order": "*i32", "p_start": "*i32", "p_pooled": "*i32"}
    pointers |= dict.fromkeys(("p_scratch", "p_tile_sums"), "*fp64")
    lanes, block = soft_sort.lanes_and_block(soft_sort.TILE)
    # All is float64 but what is read and written: other types differ there only.
    for dtype, rank, kl in [
        *product(("fp32",), (False, True), (False, True)),
        *product(("bf16", "fp64"), (False,), (False,)),
    ]:
        arguments = integers | pointers | dict.fromkeys(("p_values", "p_result"), f"*{dtype}")
        name = f"{dtype}, {'rank' if rank else 'sort'}, {'kl' if kl else 'l2'}"
        constants: dict[str, Any] = {"RANK": rank, "KL": kl}
        tile = constants | {"LANES": lanes, "BLOCK": block}
        for whole_row in (True, False):
            variant = name if whole_row else f"{name}, several tiles"
            kernel, warps = _isotonic.isotonic_tile_kernel, lanes // warp_size
            yield Case(kernel, variant, arguments, tile | {"WHOLE_ROW": whole_row}, warps)
        row, warps = constants | {"LANES": soft_sort.ROW_LANES}, soft_sort.ROW_LANES // warp_size
        options = soft_sort.CUDA_OPTIONS
        yield Case(_isotonic.isotonic_row_kernel, name, arguments, row, warps, cuda_options=options)
        write = constants | {"BLOCK": soft_sort.BLOCK}
        yield Case(_isotonic.isotonic_write_kernel, name, arguments, write, soft_sort.BLOCK // (4 * warp_size))


def _block_sum(warp_size: int) -> Iterator[Case]:
    integers = dict.fromkeys(("n_positions", "stride_row", "stride_position"), "i32")
    ops = (("block_sum", False), *product(("soft_sort", "soft_rank"), (False, True)))
    passes = {"": (True, True), ", parts": (True, False), ", whole": (False, True)}
    # float64 has all that float32 has, in twice the registers: the op that needs most of them stands for it.
    wanted = [("fp64", ("soft_rank", True), ("", (True, True))), *product(("fp32",), ops, passes.items())]
    for dtype, (op, kl), (part, (find, apply)) in wanted:
        arguments = integers | {"p_order": "*i32", "p_start": "*i32", "p_parts": f"*{dtype}"}
        arguments |= dict.fromkeys(("p_inputs", "p_values", "p_outputs"), f"*{dtype}")
        constants = {"OP": op, "KL": kl, "SUM": find, "APPLY": apply, "BLOCK": soft_sort.SUM_TILE}
        for name in (*(() if kl else ("p_values",)), *(("p_order",) if op == "block_sum" else ())):
            constants[name] = None
            del arguments[name]
        variant = f"{dtype}, {op}{', kl' if kl else ''}{part}"
        warps = soft_sort.SUM_TILE // (4 * warp_size)
        options = soft_sort.CUDA_OPTIONS
        yield Case(soft_sort.block_sum_kernel, variant, arguments, constants, warps, cuda_options=options)


def _sinkhorn_sort(warp_size: int) -> Iterator[Case]:
    arguments = dict.fromkeys(("p_state", "p_scalars"), "*fp64") | {"n": "i32"}
    for n, double in product((256, 512, 1024, 4096), (False, True)):
        tile = sinkhorn_sort.tile(n, double)
        num_warps, constants = tile.pop("num_warps"), {"DOUBLE": double, **tile}
        variant = f"{'fp64' if double else 'fp32'}, n = {n}"
        yield Case(sinkhorn_sort.sinkhorn_sort_pass_kernel, variant, arguments, constants, num_warps)
        for adjoint in (False, True):
            name, every = f"{variant}{', adjoint' if adjoint else ''}", {"ADJOINT": adjoint, **constants}
            if sinkhorn_sort.in_one_program(n, double, warp_size):
                yield Case(sinkhorn_sort.sinkhorn_sort_kernel, name, arguments, every, num_warps)
    for n, adjoint in product((1024, 4096), (False, True)):
        tile = sinkhorn_sort.tile(n, False)
        constants = {"ADJOINT": adjoint, "BLOCK": tile["BLOCK"]}
        name = f"n = {n}{', adjoint' if adjoint else ''}"
        yield Case(sinkhorn_sort.sinkhorn_sort_advance_kernel, name, arguments, constants, tile["num_warps"])
