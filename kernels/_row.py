"""What the kernels that read rows of logits share: the tile of a program, the soft cap and the online softmax.

A forward program reads its row in blocks [LOADS, LANES, VECTOR]: a thread owns a lane and takes VECTOR neighbours (16
bytes) at a time, LOADS times. Maximum and sums run per lane, so nothing crosses the threads before the row's end, and
the registers go to loads in flight. The online sums are those of Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# AMD's data-centre GPUs have 64; where a warp has 32 after all, each thread takes two lanes.
WARP_SIZE = 64 if torch.version.hip else 32


def is_aligned(logits: Tensor) -> bool:
    """Whether Triton will know, from what it specialises on, that every row begins at a multiple of 16 bytes."""
    return logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0 and logits.stride(1) % 16 == 0


def row_tile(
    n_vocabulary: int, itemsize: int, most_loads: int, aligned: bool = True, warp_size: int = WARP_SIZE
) -> tuple[int, int, int, int]:
    """LOADS, LANES and VECTOR of a block, and the warps of a program.

    Four 16-byte loads in flight a thread hide the memory's latency within the registers of several programs an SM; a
    kernel that computes much on each of them takes two, or it spills. Four warps keep the last block short, and a short
    row gets fewer of both. Rows that are not aligned take as many bytes, one element a load.
    """
    vector = 16 // itemsize
    warp_loads = triton.next_power_of_2(triton.cdiv(n_vocabulary, vector * warp_size))
    loads = min(most_loads, warp_loads)
    num_warps = min(4, warp_loads // loads)
    if not aligned:
        loads, vector = loads * vector, 1
    return loads, num_warps * warp_size, vector, num_warps


@triton.jit
def block_offsets(LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    o_load = tl.arange(0, LOADS)[:, None, None] * (LANES * VECTOR)
    o_lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return o_load + o_lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def lane_max(b_block):
    return tl.max(tl.max(b_block, axis=0), axis=1)


@triton.jit
def lane_sum(b_block):
    return tl.sum(tl.sum(b_block, axis=0), axis=1)


@triton.jit
def soft_cap(b_logits, b_cap, b_inverse_cap, HAS_SOFTCAP: tl.constexpr):
    """s = c tanh(x / c), or x."""
    if HAS_SOFTCAP:
        b_ratio = b_logits * b_inverse_cap
        b_inverse = 1.0 / (1.0 + tl.exp2(b_ratio * (2.0 * LOG2_E)))
        b_tanh = 1.0 - 2.0 * b_inverse
        if b_logits.dtype == tl.float32:
            # The difference loses the digits of a small argument; Taylor's polynomial keeps them.
            b_square = b_ratio * b_ratio
            b_series = -17.0 / 315 + b_square * (62.0 / 2835)
            b_series = b_square * (-1.0 / 3 + b_square * (2.0 / 15 + b_square * b_series))
            b_tanh = tl.where(tl.abs(b_ratio) < 0.25, b_ratio + b_ratio * b_series, b_tanh)
        b_capped = b_cap * b_tanh
    else:
        b_capped = b_logits
    return b_capped


@triton.jit
def _move_sums(b_max, b_sum, b_weighted, b_new_max, scale, RETURN_ENTROPY: tl.constexpr):
    """The sums of e^(z - max) and e^(z - max) (s - max), relative to a larger maximum."""
    # While all logits seen are -inf, any finite shift will do and avoids (-inf) - (-inf).
    b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
    b_rescale = tl.exp2((b_max - b_shift) * scale)
    if RETURN_ENTROPY:
        b_moved = tl.where(b_max == -float("inf"), 0.0, b_max - b_shift)
        b_weighted = b_rescale * (b_weighted + b_moved * b_sum)
    return b_rescale * b_sum, b_weighted, b_shift


@triton.jit
def add_block(b_max, b_sum, b_weighted, b_capped, scale, RETURN_ENTROPY: tl.constexpr):
    """Take a block of s [LOADS, LANES, VECTOR] into the running maximum and sums [LANES]."""
    b_new_max = tl.maximum(b_max, lane_max(b_capped))
    b_sum, b_weighted, b_shift = _move_sums(b_max, b_sum, b_weighted, b_new_max, scale, RETURN_ENTROPY)
    b_centred = b_capped - b_shift[None, :, None]
    b_exp = tl.exp2(b_centred * scale)
    b_sum += lane_sum(b_exp)
    if RETURN_ENTROPY:
        # 0 log 0 = 0: the product would be 0 x (-inf). A NaN reaches the entropy through b_sum.
        b_weighted += lane_sum(tl.where(b_exp > 0.0, b_exp * b_centred, 0.0))
    return b_new_max, b_sum, b_weighted


@triton.jit
def join_lanes(b_max, b_sum, b_weighted, scale, RETURN_ENTROPY: tl.constexpr):
    """The maximum and the sums of the whole row."""
    b_row_max = tl.max(b_max, axis=0)
    b_sum, b_weighted, _ = _move_sums(b_max, b_sum, b_weighted, b_row_max, scale, RETURN_ENTROPY)
    return b_row_max, tl.sum(b_sum, axis=0), tl.sum(b_weighted, axis=0)


@triton.jit
def store_lse(p_lse, i_row, n_rows, b_max, b_log_sum, b_inverse_temperature):
    """lse[0], the largest z rounded, and lse[1], the log of the sum of e^(z - lse[0]), with z exact."""
    b_lse = b_max * b_inverse_temperature
    b_lost = tl.where(b_lse == -float("inf"), 0.0, tl.fma(b_max, b_inverse_temperature, -b_lse))
    tl.store(p_lse + i_row, b_lse)
    tl.store(p_lse + n_rows + i_row, b_log_sum + b_lost)
