r"""Kernels of the ops `soft_sort`, `soft_rank`, their backwards and `block_sum`.

Soft sorting and ranking are isotonic regressions of the sorted values (Blondel et al. 2020, arXiv 2002.08871): with the
blocks B that it pools, and b a block's first position, m its size and c its centre,

====  =================================================  ================================================
op    l2                                                 kl
====  =================================================  ================================================
sort  :math:`\sigma (\bar u_B + (i - c) / e)`            :math:`\sigma (u_b - \log (E / Q) + (i - b) / e)`
rank  :math:`(u_i - \bar u_B) / e + c + 1`               :math:`S e^{u_i / e} / \sum_B e^{u_j / e}`
====  =================================================  ================================================

at position i of the values u, which are in non-decreasing order and negated where descending (sigma = -1), with e the
strength, E the sum of e^(u_b - u_j), Q that of e^(-k / e) over k < m, and S that of the ranks i + 1. _isotonic.py finds
the blocks: one launch for a row of at most TILE values, three for a longer one. The sort before it is torch.sort, on
the device: a fast radix sort for long rows, and for short ones a sort within a kernel would save one launch in several.

The backwards need sums over the blocks of g (the gradient by position) and of weights w: 1 (l2), e^-u (sort, kl) or
e^(u / e) (rank, kl), relative to the block's first:

====  =====================================  =================================================================
op    l2                                     kl
====  =====================================  =================================================================
sort  :math:`\sum g / m`                     :math:`w_i \sum g / \sum w`
rank  :math:`\sigma / e (g_i - \sum g / m)`  :math:`\sigma / e \; S w_i / \sum w \; (g_i - \sum w g / \sum w)`
====  =====================================  =================================================================

A tile's part of each block is a segmented scan, kept where the part starts; a block's sum is that of its parts, tile by
tile: work O(n + tiles^2), and no two programs add to one number, so the same input gives the same bits. One launch for
a row of one tile, two for a longer one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._isotonic import isotonic_row_kernel, isotonic_tile_kernel, isotonic_write_kernel

# Positions that one program solves. More would keep a few rows on few of the GPU's processors, and their state out of
# the nearest cache; fewer would leave more to the one program that joins a row's tiles.
TILE = 2048
# Junctions that a program takes at a time, and places where it does no more than read and write.
LANES = 256
BLOCK = 1024
# Junctions of tiles that the program of a row takes at a time.
ROW_LANES = 128
# Positions of a program of the backwards.
SUM_TILE = 1024

# Left alone, NVIDIA's assembler spills a few registers of some kernels to have more programs at a time.
CUDA_OPTIONS = {"maxnreg": 168}
WARP_SIZE = 64 if torch.version.hip else 32
_OPTIONS = {} if torch.version.hip else CUDA_OPTIONS


# ---- forward -----------------------------------------------------------------------------------------------------


def lanes_and_block(n_positions: int) -> tuple[int, int]:
    """LANES and BLOCK of a program: a short row has few junctions, and idle lanes would run along."""
    positions = triton.next_power_of_2(n_positions)
    return min(LANES, max(32, positions // 8)), min(BLOCK, max(32, positions // 2))


def _project(values: Tensor, descending: bool, rank: bool, kl: bool, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_positions = values.shape
    result = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    result_order = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    start = torch.empty_like(result_order)
    if values.numel() == 0:
        return result, result_order, start
    sorted_values, order = values.sort(dim=-1, descending=descending, stable=True)
    sorted_values, order = sorted_values.contiguous(), order.contiguous()

    log2_tile = min(TILE.bit_length() - 1, (n_positions - 1).bit_length())
    n_tiles = triton.cdiv(n_positions, 1 << log2_tile)
    scratch = torch.empty(n_rows, n_positions, 4, dtype=torch.float64, device=values.device)
    pooled = torch.empty(n_rows, n_positions, 2, dtype=torch.int32, device=values.device)
    tile_sums = torch.empty(n_rows, n_tiles, 2, dtype=torch.float64, device=values.device)
    sign = -1.0 if descending else 1.0
    if rank:
        value_step, position_step = -sign / strength, 0.0 if kl else 1.0
    else:
        value_step, position_step = sign, -1.0 / strength
    sum_of_one = (1.0 if rank else -math.expm1(-1.0 / strength)) if kl else 0.0
    lanes, block = lanes_and_block(min(n_positions, TILE))
    constants = {"RANK": rank, "KL": kl}
    num_warps = max(1, lanes // WARP_SIZE)
    with torch.cuda.device_of(values):
        isotonic_tile_kernel[(n_rows * n_tiles,)](
            sorted_values,
            order,
            result,
            result_order,
            start,
            scratch,
            pooled,
            tile_sums,
            n_positions,
            log2_tile,
            log2_tile,
            value_step,
            position_step,
            sum_of_one,
            WHOLE_ROW=n_tiles == 1,
            LANES=lanes,
            BLOCK=block,
            num_warps=num_warps,
            **constants,
        )
        if n_tiles > 1:
            n_sizes = (n_tiles - 1).bit_length()
            steps = (value_step, position_step)
            isotonic_row_kernel[(n_rows,)](
                sorted_values,
                start,
                scratch,
                pooled,
                tile_sums,
                n_positions,
                log2_tile,
                n_sizes,
                *steps,
                LANES=ROW_LANES,
                num_warps=max(1, ROW_LANES // WARP_SIZE),
                **_OPTIONS,
                **constants,
            )
            isotonic_write_kernel[(n_rows * triton.cdiv(n_positions, BLOCK),)](
                sorted_values,
                order,
                result,
                result_order,
                start,
                scratch,
                pooled,
                n_positions,
                log2_tile,
                n_sizes,
                *steps,
                BLOCK=BLOCK,
                num_warps=max(1, BLOCK // (4 * WARP_SIZE)),
                **constants,
            )
    return result, result_order, start


def soft_sort(
    values: Tensor,  # [R, n]
    descending: bool,
    regularization: str,  # "l2" or "kl"
    strength: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted [R, n] in values' dtype, order [R, n] int32, block_start [R, n] int32), all by position."""
    return _project(values, descending, False, regularization == "kl", strength)


def soft_rank(
    values: Tensor,  # [R, n]
    descending: bool,
    regularization: str,
    strength: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ranks [R, n] by index, in values' dtype, and as `soft_sort`, by position: order, block_start)."""
    return _project(values, descending, True, regularization == "kl", strength)


# ---- backward ----------------------------------------------------------------------------------------------------

# Of each block: the sum of g (rank, kl: of w g), the sum of w, and the size (rank, kl).
GRADIENT: tl.constexpr = tl.constexpr(0)
WEIGHT: tl.constexpr = tl.constexpr(1)
SIZE: tl.constexpr = tl.constexpr(2)


@triton.jit
def _add_within_block(b_before, i_before, b_after, i_after):
    return tl.where(i_after > 0, b_after, b_before + b_after), i_before | i_after


@triton.jit
def _store_part(p_part, b_terms, m_first, m_last, o_start):
    """The sums of the terms between the first and the last of each block, where it starts."""
    b_sum, _ = tl.associative_scan((b_terms, m_first.to(tl.int32)), 0, _add_within_block)
    tl.store(p_part + o_start, b_sum, mask=m_last)


@triton.jit
def _later_parts(p_part, p_start, start, n_positions, BLOCK: tl.constexpr):
    """The sum of a block's parts in tiles after the one that it starts in."""
    CHUNK: tl.constexpr = 128
    i_next = start // BLOCK + 1
    crosses = tl.load(p_start + i_next * BLOCK, mask=i_next * BLOCK < n_positions, other=-1) == start
    n_tiles = tl.where(crosses, tl.cdiv(n_positions, BLOCK), 0)
    b_sum = tl.zeros([CHUNK], p_part.dtype.element_ty)
    for i_tile in range(i_next, n_tiles, CHUNK):
        o_first = (i_tile + tl.arange(0, CHUNK)) * BLOCK
        m_part = tl.load(p_start + o_first, mask=o_first < n_positions, other=-1) == start
        b_sum += tl.load(p_part + o_first, mask=m_part, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def _whole(p_part, p_start, o_start, m_position, i_tile, n_positions, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of the blocks of a tile's positions, from their parts."""
    b_sum = tl.load(p_part + o_start, mask=m_position, other=0.0)
    if TILES:
        # Only the tile's first and last block have parts elsewhere.
        first = tl.load(p_start + i_tile * BLOCK)
        last = tl.load(p_start + tl.minimum(i_tile * BLOCK + BLOCK, n_positions) - 1)
        b_later = _later_parts(p_part, p_start, first, n_positions, BLOCK)
        b_sum = tl.where(o_start == first, b_sum + b_later, b_sum)
        if first != last:
            b_later = _later_parts(p_part, p_start, last, n_positions, BLOCK)
            b_sum = tl.where(o_start == last, b_sum + b_later, b_sum)
    return b_sum


@triton.jit(do_not_specialize=["n_positions", "stride_row", "stride_position"])
def block_sum_kernel(
    p_inputs,  # [R, n] any strides; by index for rank, else by position
    p_values,  # [R, n] contiguous as all that follows, by index; None unless KL
    p_order,  # [R, n] int32; None for block_sum
    p_start,  # [R, n] int32
    p_parts,  # [R, 3, n] float32 or float64
    p_outputs,  # [R, n], by index; block_sum: by position
    n_positions,
    stride_row,
    stride_position,
    weight_step: tl.float64,  # of log w, by the value
    scale: tl.float64,
    OP: tl.constexpr,  # "block_sum", "soft_sort" or "soft_rank"
    KL: tl.constexpr,
    SUM: tl.constexpr,  # find the parts of the sums
    APPLY: tl.constexpr,  # add them up and write; in another launch where rows have several tiles
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = p_parts.dtype.element_ty
    n_tiles = tl.cdiv(n_positions, BLOCK)
    i_row = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % n_tiles
    p_inputs += i_row * stride_row
    p_start += i_row * n_positions
    p_outputs += i_row * n_positions
    p_gradient = p_parts + (i_row * 3 + GRADIENT) * n_positions
    p_weight = p_parts + (i_row * 3 + WEIGHT) * n_positions
    p_size = p_parts + (i_row * 3 + SIZE) * n_positions

    o_tile = i_tile * BLOCK
    o_position = o_tile + tl.arange(0, BLOCK)
    m_position = o_position < n_positions
    o_start = tl.load(p_start + o_position, mask=m_position, other=0)
    o_output = o_position
    if OP != "block_sum":
        p_order += i_row * n_positions
        o_output = tl.load(p_order + o_position, mask=m_position, other=0)
    o_input = o_output if OP == "soft_rank" else o_position
    b_input = tl.load(p_inputs + o_input.to(tl.int64) * stride_position, mask=m_position, other=0.0)
    b_gradient = b_input.to(dtype)
    b_one = tl.full([BLOCK], 1.0, dtype)
    b_weight = b_one
    if KL:
        p_values += i_row * n_positions
        b_value = tl.load(p_values + o_output, mask=m_position, other=0.0).to(dtype)
        o_first = tl.load(p_order + o_start, mask=m_position, other=0)
        b_first = tl.load(p_values + o_first, mask=m_position, other=0.0).to(dtype)
        b_weight = tl.exp((b_value - b_first) * tl.full([], weight_step, dtype))

    if SUM:
        m_first = (o_start == o_position) | (o_position == o_tile)
        o_next = o_position + 1
        m_next = (o_next < n_positions) & (o_next < o_tile + BLOCK)
        m_last = m_position & (tl.load(p_start + o_next, mask=m_next, other=-1) != o_start)
        o_part = tl.maximum(o_start, o_tile)
        b_terms = b_gradient * b_weight if OP == "soft_rank" else b_gradient
        _store_part(p_gradient, b_terms, m_first, m_last, o_part)
        if OP != "block_sum":
            _store_part(p_weight, b_weight, m_first, m_last, o_part)
        if OP == "soft_rank" and KL:
            _store_part(p_size, b_one, m_first, m_last, o_part)
    if SUM and APPLY:
        tl.debug_barrier()
    if APPLY:
        b_sum = _whole(p_gradient, p_start, o_start, m_position, i_tile, n_positions, not SUM, BLOCK)
        if OP != "block_sum":
            b_weight_sum = _whole(p_weight, p_start, o_start, m_position, i_tile, n_positions, not SUM, BLOCK)
            # A plain / is not exact in float32, and a block of one must be.
            b_sum = b_sum / b_weight_sum if dtype == tl.float64 else tl.div_rn(b_sum, b_weight_sum)
        if OP == "block_sum":
            b_output = b_sum
        elif OP == "soft_sort":
            b_output = b_weight * b_sum
        else:
            b_output = (b_gradient - b_sum) * tl.full([], scale, dtype)
            if KL:
                b_size = _whole(p_size, p_start, o_start, m_position, i_tile, n_positions, not SUM, BLOCK)
                b_ranks = b_size * (o_start.to(dtype) + (b_size + 1) / 2)
                b_output *= b_ranks * (b_weight / b_weight_sum)
        tl.store(p_outputs + o_output, b_output.to(p_outputs.dtype.element_ty), mask=m_position)


def _reduce(
    op: str,
    inputs: Tensor,  # [R, n] any strides
    values: Tensor | None,
    order: Tensor | None,
    block_start: Tensor,
    weight_step: float,
    scale: float,
) -> Tensor:
    n_rows, n_positions = inputs.shape
    outputs = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    if inputs.numel() == 0:
        return outputs
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    parts = torch.empty(n_rows, 3, n_positions, dtype=dtype, device=inputs.device)
    block = min(SUM_TILE, max(32, triton.next_power_of_2(n_positions)))
    n_tiles = triton.cdiv(n_positions, block)
    passes = [(True, True)] if n_tiles == 1 else [(True, False), (False, True)]
    with torch.cuda.device_of(inputs):
        for find, apply in passes:
            block_sum_kernel[(n_rows * n_tiles,)](
                inputs,
                None if values is None else values.contiguous(),
                order,
                block_start,
                parts,
                outputs,
                n_positions,
                inputs.stride(0),
                inputs.stride(1),
                weight_step,
                scale,
                OP=op,
                KL=values is not None,
                SUM=find,
                APPLY=apply,
                BLOCK=block,
                num_warps=max(1, block // (4 * WARP_SIZE)),
                **_OPTIONS,
            )
    return outputs


def soft_sort_bwd(
    grad_sorted: Tensor,  # [R, n] by position, any strides
    values: Tensor | None,  # [R, n], for kl
    order: Tensor,  # [R, n] int32, contiguous
    block_start: Tensor,  # [R, n] int32, contiguous
    descending: bool,
) -> Tensor:  # [R, n] by index
    return _reduce("soft_sort", grad_sorted, values, order, block_start, 1.0 if descending else -1.0, 1.0)


def soft_rank_bwd(
    grad_ranks: Tensor,  # [R, n] by index, any strides
    values: Tensor | None,  # [R, n], for kl
    order: Tensor,  # [R, n] int32, contiguous
    block_start: Tensor,  # [R, n] int32, contiguous
    descending: bool,
    strength: float,
) -> Tensor:  # [R, n] by index
    step = (-1.0 if descending else 1.0) / strength
    return _reduce("soft_rank", grad_ranks, values, order, block_start, step, step)


def block_sum(
    values: Tensor,  # [R, n] any strides
    block_start: Tensor,  # [R, n] int32, contiguous
) -> Tensor:  # [R, n]
    """The sum over the block that each position is in."""
    return _reduce("block_sum", values, None, None, block_start, 0.0, 1.0)
