r"""Kernels of the op `sorted_transport`: two samples coupled by sorting, a link of the margins between equal quantiles.

.. math:: L = \int_0^1 \ell\left(F_u^{-1}(s) - F_v^{-1}(s)\right) ds

Both quantile functions are steps, so the integral is a sum over the cells of their merged grids, one for each sample.
The k-th cell ends at the k-th of the merged levels (at ties those of u come first); a binary search finds how many of
the levels before it are u's, and with them the pair (i, j) that the cell couples. The gradient of a sample is the sum
over the run of cells that ends at its own level: a segmented scan. Two samples of equal size without weights have n
cells, (i, i) of mass 1 / n.

A sample of weight zero, and in the form with `desirable` one of the other side, is absent: sorted last, it has no
level. Levels are integers, multiples of 1 / (n m), or sums of weights in float64, compared without a division.

A row of up to `MOST_AT_ONCE` samples a side is one program, in one launch: a sort of integers that hold side, value and
index, in this order, and the cells. Longer rows, and float64, whose bits leave no room, are sorted by torch; their
cells are spread over programs, and a second launch gives each run that spans several what the earlier ones have of it.
Nothing waits for the device, and sums have a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._link import from_ordered_bits, link_loss_and_slope, ordered_bits

MOST_AT_ONCE = 4096  # samples of a side in one launch: both are sorted within the registers of the largest program
CELL_BLOCK = 1024  # cells of a program beside others
ROW_CELLS = 512  # cells at a time of a program that has sorted: with more, AMD's masks outgrow the scalar registers

_U: tl.constexpr = tl.constexpr(0)  # the sides, in the order of the sort
_V: tl.constexpr = tl.constexpr(1)
_ABSENT: tl.constexpr = tl.constexpr(2)
_BEYOND: tl.constexpr = tl.constexpr(3)


def block_and_warps(n_samples: int, warp_size: int = 64 if torch.version.hip else 32) -> tuple[int, int]:
    """The samples of both sides that a program sorts, and its warps.

    Eight samples a thread, and at most 16 warps, which leave a thread the 128 registers that a sort of 64-bit integers
    and its masks need.
    """
    block = triton.next_power_of_2(n_samples)
    return block, max(1, min(block // (8 * warp_size), 16))


# --- Cells -----------------------------------------------------------------------------------------------------------


@triton.jit
def _level(p_levels, o_sample, m_sample, scale):
    """The mass of the sorted samples up to and including o_sample, times the other side's."""
    if p_levels is None:
        b_level = (o_sample + 1).to(tl.int64) * scale
    else:
        b_level = tl.load(p_levels + o_sample, mask=m_sample & (o_sample >= 0), other=0.0) * scale
    return b_level


@triton.jit
def _total(p_levels, n_samples, EXACT: tl.constexpr):
    """The mass of a side: an integer (EXACT) where neither has weights."""
    if p_levels is not None:
        total = tl.load(p_levels + n_samples - 1, mask=n_samples > 0, other=0.0)
    elif EXACT:
        total = tl.full([], n_samples, tl.int64)
    else:
        total = tl.full([], n_samples, tl.int64).to(tl.float64)
    return total


@triton.jit
def _sum_runs(i_left, j_left, u_left, v_left, i_right, j_right, u_right, v_right):
    u_sum = tl.where(i_left == i_right, u_left + u_right, u_right)
    v_sum = tl.where(j_left == j_right, v_left + v_right, v_right)
    return i_right, j_right, u_sum, v_sum


@triton.jit
def _cells(
    o_cell,  # of the block
    n,  # samples of u present
    m,
    n_steps,  # of the binary search: the bits of the longer side
    sorted_samples,
    gradients,
    before,
    beta,
    label_smoothing,
    LINK: tl.constexpr,
    EQUAL: tl.constexpr,
):
    """Store the gradients of the samples whose runs end in these cells, and return (value, area, w1, first, after).

    `first` is the samples (i, j) of the first cell, `after` those of the last with the sums of their runs, 0 where they
    end; `before` is what the cells before these returned.
    """
    p_u, p_u_order, p_u_levels, p_v, p_v_order, p_v_levels = sorted_samples
    p_u_gradient, p_v_gradient = gradients
    dtype: tl.constexpr = p_u_gradient.dtype.element_ty
    if EQUAL:
        b_i, b_j = o_cell, o_cell
        m_cell = o_cell < n
        m_u, m_v = m_cell, m_cell
        b_mass = tl.where(m_cell, 1.0 / tl.full([], n, tl.int32).to(tl.float64), 0.0)
    else:
        EXACT: tl.constexpr = (p_u_levels is None) and (p_v_levels is None)
        u_total, v_total = _total(p_u_levels, n, EXACT), _total(p_v_levels, m, EXACT)
        m_cell = o_cell < n + m
        b_cell = tl.minimum(o_cell, n + m)  # beyond the last, both sides are used up
        b_i, b_high = tl.maximum(b_cell - m, 0), tl.minimum(b_cell, n)
        for _ in range(n_steps):
            m_open = b_i < b_high
            b_middle = (b_i + b_high) >> 1
            b_u_level = _level(p_u_levels, b_middle, m_open, v_total)
            b_v_level = _level(p_v_levels, b_cell - 1 - b_middle, m_open, u_total)
            m_before = b_u_level <= b_v_level
            b_i = tl.where(m_open & m_before, b_middle + 1, b_i)
            b_high = tl.where(m_open & ~m_before, b_middle, b_high)
        b_j = b_cell - b_i
        m_i, m_j = m_cell & (b_i < n), m_cell & (b_j < m)
        b_u_level = _level(p_u_levels, b_i, m_i, v_total)
        b_v_level = _level(p_v_levels, b_j, m_j, u_total)
        m_u = m_i & ((b_u_level <= b_v_level) | ~m_j)  # the cell ends at a level of u
        m_v = m_cell & ~m_u
        b_end = tl.where(m_u, b_u_level, b_v_level)
        b_start_u = _level(p_u_levels, b_i - 1, m_cell, v_total)
        b_start_v = _level(p_v_levels, b_j - 1, m_cell, u_total)
        b_difference = b_end - tl.maximum(b_start_u, b_start_v)
        b_mass = tl.where(m_i & m_j, b_difference.to(tl.float64) / (u_total * v_total).to(tl.float64), 0.0)

    b_u = tl.load(p_u + tl.minimum(b_i, n - 1), mask=m_cell, other=0.0)
    b_v = tl.load(p_v + tl.minimum(b_j, m - 1), mask=m_cell, other=0.0)
    b_margins = b_u - b_v
    b_losses, b_slopes = link_loss_and_slope(b_margins, beta, label_smoothing, LINK)
    # Cells without mass, between equal levels, couple what may be far apart.
    m_mass = b_mass > 0.0
    b_wide_margins = b_margins.to(tl.float64)
    value = tl.sum(tl.where(m_mass, b_mass * b_losses.to(tl.float64), 0.0), axis=0)
    area = tl.sum(tl.where(m_mass & (b_margins < 0.0), b_mass, 0.0), axis=0)
    w1 = tl.sum(tl.where(m_mass & (b_margins < 0.0), -b_mass * b_wide_margins, 0.0), axis=0)

    b_u_run = tl.where(m_mass, (b_mass * b_slopes.to(tl.float64)).to(dtype), 0.0)
    b_v_run = b_u_run
    if not EQUAL:
        _, _, b_u_run, b_v_run = tl.associative_scan((b_i, b_j, b_u_run, b_v_run), 0, _sum_runs)
        i_before, j_before, u_before, v_before = before
        b_u_run += tl.where(b_i == i_before, u_before, 0.0)
        b_v_run += tl.where(b_j == j_before, v_before, 0.0)
    tl.store(p_u_gradient + tl.load(p_u_order + b_i, mask=m_u, other=0), b_u_run, mask=m_u)
    tl.store(p_v_gradient + tl.load(p_v_order + b_j, mask=m_v, other=0), -b_v_run, mask=m_v)
    m_last = o_cell == tl.max(o_cell, axis=0)
    u_after = tl.sum(tl.where(m_last & ~m_u, b_u_run, 0.0), axis=0)
    v_after = tl.sum(tl.where(m_last & ~m_v, b_v_run, 0.0), axis=0)
    after = (tl.max(b_i, axis=0), tl.max(b_j, axis=0), u_after, v_after)
    return value, area, w1, (tl.min(b_i, axis=0), tl.min(b_j, axis=0)), after


# --- Rows within a program -------------------------------------------------------------------------------------------


@triton.jit
def _maximum(left, right):
    return tl.maximum(left, right)


@triton.jit
def _store_levels(p_levels, p_weights, p_order, n_samples, BLOCK: tl.constexpr):
    """The weights up to and including each sorted sample."""
    total = tl.full([], 0.0, tl.float64)
    for i_sample in range(0, n_samples, BLOCK):
        o_sample = i_sample + tl.arange(0, BLOCK)
        m_sample = o_sample < n_samples
        b_order = tl.load(p_order + o_sample, mask=m_sample, other=0)
        b_weights = tl.load(p_weights + b_order, mask=m_sample, other=0.0).to(tl.float64)
        # A parallel sum adds in another order for each of them; levels must never fall.
        b_levels = tl.associative_scan(total + tl.cumsum(b_weights, axis=0), 0, _maximum)
        tl.store(p_levels + o_sample, b_levels, mask=m_sample)
        total = tl.max(b_levels, axis=0)


@triton.jit
def _difference(p_values, p_refs, i_start, o_sample, m_sample):
    b_values = tl.load(p_values + i_start + o_sample, mask=m_sample, other=0.0).to(tl.float32)
    if p_refs is not None:
        b_values -= tl.load(p_refs + i_start + o_sample, mask=m_sample, other=0.0).to(tl.float32)
    return b_values


@triton.jit(do_not_specialize=["n_u", "n_v", "n_steps"])
def sorted_transport_row_kernel(
    p_u,  # [R, n_u] contiguous, like all that follow
    p_u_ref,  # [R, n_u] or None, and so every input below
    p_v,  # [R, n_v]
    p_v_ref,  # [R, n_v]
    p_desirable,  # [R, n_u] bool; with it, no v
    p_u_weights,  # [R, n_u]
    p_v_weights,  # [R, n_v]
    p_value,  # [R] float32, and so the next three
    p_u_gradient,  # [R, n_u]
    p_v_gradient,  # [R, n_v]; with p_desirable, p_u_gradient
    p_statistics,  # [R, 2]
    p_sorted,  # [R, n_u + n_v] float32: room for what the sort has found
    p_order,  # [R, n_u + n_v] int32
    p_u_levels,  # [R, n_u + n_v] float64, or None without weights of u
    p_v_levels,  # as p_u_levels, of v
    n_u,
    n_v,  # 0 with p_desirable
    n_steps,
    beta: tl.float64,
    label_smoothing: tl.float64,
    LINK: tl.constexpr,
    EQUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_u, o_v, o_both = i_row * n_u, i_row * n_v, i_row * (n_u + n_v)
    p_u_gradient += o_u
    p_v_gradient += o_v if p_desirable is None else o_u
    p_sorted += o_both
    p_order += o_both
    o_sample = tl.arange(0, BLOCK)
    m_u = o_sample < n_u
    m_v = (o_sample >= n_u) & (o_sample < n_u + n_v)
    b_values = _difference(p_u, p_u_ref, o_u, o_sample, m_u)
    b_side = tl.where(m_u, _U, tl.where(m_v, _V, _BEYOND))
    if p_desirable is None:
        b_values = tl.where(m_u, b_values, _difference(p_v, p_v_ref, o_v - n_u, o_sample, m_v))
    else:
        b_desirable = tl.load(p_desirable + o_u + o_sample, mask=m_u, other=0)
        b_side = tl.where(m_u & (b_desirable == 0), _V, b_side)
    if p_u_weights is not None:
        b_weights = tl.load(p_u_weights + o_u + o_sample, mask=m_u, other=1.0)
        b_side = tl.where(m_u & (b_weights == 0.0), _ABSENT, b_side)
    if p_v_weights is not None:
        b_weights = tl.load(p_v_weights + (o_v - n_u) + o_sample, mask=m_v, other=1.0)
        b_side = tl.where(m_v & (b_weights == 0.0), _ABSENT, b_side)

    # The index makes the sort stable; it takes the lowest bits, and the value the 32 above.
    b_key = (b_side.to(tl.int64) << 32) + (ordered_bits(b_values).to(tl.int64) + 2147483648)
    b_key = tl.sort(b_key * BLOCK + o_sample)
    b_index = (b_key & (BLOCK - 1)).to(tl.int32)
    b_key = b_key // BLOCK
    b_side = (b_key >> 32).to(tl.int32)
    b_order = b_index
    if p_desirable is None:
        b_order = tl.where(b_side == _V, b_index - n_u, b_index)
    m_both = o_sample < n_u + n_v
    b_values = from_ordered_bits(((b_key & 0xFFFFFFFF) - 2147483648).to(tl.int32))
    tl.store(p_sorted + o_sample, b_values, mask=m_both)
    tl.store(p_order + o_sample, b_order, mask=m_both)
    n, m = tl.sum((b_side == _U).to(tl.int32), axis=0), tl.sum((b_side == _V).to(tl.int32), axis=0)
    empty = (n == 0) | (m == 0)
    if not EQUAL:
        m_absent = (empty | (b_side == _ABSENT)) & m_both
        b_zero = tl.zeros([BLOCK], tl.float32)
        tl.store(p_u_gradient + b_index, b_zero, mask=m_absent & (b_index < n_u))
        if p_desirable is None:
            tl.store(p_v_gradient - n_u + b_index, b_zero, mask=m_absent & (b_index >= n_u))
    tl.debug_barrier()  # from here threads read what others wrote

    if p_u_levels is not None:
        p_u_levels += o_both
        _store_levels(p_u_levels, p_u_weights + o_u, p_order, n, CELLS)
    if p_v_levels is not None:
        p_v_levels += o_both
        p_weights = p_v_weights + o_v if p_desirable is None else p_u_weights + o_u
        _store_levels(p_v_levels, p_weights, p_order + n, m, CELLS)
    if p_u_levels is not None or p_v_levels is not None:
        tl.debug_barrier()

    n, m = tl.where(empty, 0, n), tl.where(empty, 0, m)
    sorted_samples = (p_sorted, p_order, p_u_levels, p_sorted + n, p_order + n, p_v_levels)
    beta, label_smoothing = tl.full([], beta, tl.float32), tl.full([], label_smoothing, tl.float32)
    gradients = (p_u_gradient, p_v_gradient)
    value, area, w1 = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    i_last, j_last = tl.full([], -1, tl.int32), tl.full([], -1, tl.int32)
    u_run, v_run = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for i_cell in range(0, n if EQUAL else n + m, CELLS):
        o_cell = i_cell + tl.arange(0, CELLS)
        before = (i_last, j_last, u_run, v_run)
        add_value, add_area, add_w1, _, after = _cells(
            o_cell, n, m, n_steps, sorted_samples, gradients, before, beta, label_smoothing, LINK, EQUAL
        )
        value += add_value
        area += add_area
        w1 += add_w1
        i_last, j_last, u_run, v_run = after
    tl.store(p_value + i_row, value)
    tl.store(p_statistics + 2 * i_row, area)
    tl.store(p_statistics + 2 * i_row + 1, w1)


# --- Rows over many programs -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_u", "n_v", "n_blocks", "n_steps"])
def sorted_transport_cell_kernel(
    p_u,  # [R, n_u] float32 or float64, sorted; contiguous, like all that follow
    p_u_order,  # [R, n_u] int64
    p_u_levels,  # [R, n_u] float64, or None
    p_v,  # [R, n_v], and so the next two
    p_v_order,
    p_v_levels,
    p_counts,  # [R, 2] int64, the samples present on each side; or None, all
    p_u_gradient,  # [R, n_u]
    p_v_gradient,  # [R, n_v]; may be p_u_gradient
    p_sums,  # [R, blocks, 3] float64: value, area, w1
    p_samples,  # [R, blocks + 1, 2] int32: the samples of u and v in the first cell; not touched if EQUAL
    p_runs,  # [R, blocks, 2], as u: the sums of the runs that the block leaves unfinished; not touched if EQUAL
    n_u,
    n_v,
    n_blocks,
    n_steps,
    beta: tl.float64,
    label_smoothing: tl.float64,
    LINK: tl.constexpr,
    EQUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = p_u.dtype.element_ty
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_block = tl.program_id(0) % n_blocks
    o_u, o_v = i_row * n_u, i_row * n_v
    n, m = tl.full([], n_u, tl.int32), tl.full([], n_v, tl.int32)
    if p_counts is not None:
        n, m = tl.load(p_counts + 2 * i_row).to(tl.int32), tl.load(p_counts + 2 * i_row + 1).to(tl.int32)
        empty = (n == 0) | (m == 0)
        n, m = tl.where(empty, 0, n), tl.where(empty, 0, m)
    if p_u_levels is not None:
        p_u_levels += o_u
    if p_v_levels is not None:
        p_v_levels += o_v
    o_cell = i_block * BLOCK + tl.arange(0, BLOCK)
    sorted_samples = (p_u + o_u, p_u_order + o_u, p_u_levels, p_v + o_v, p_v_order + o_v, p_v_levels)
    gradients = (p_u_gradient + o_u, p_v_gradient + o_v)
    beta, label_smoothing = tl.full([], beta, dtype), tl.full([], label_smoothing, dtype)
    before = (-1, -1, 0.0, 0.0)  # the join kernel adds it
    value, area, w1, first, after = _cells(
        o_cell, n, m, n_steps, sorted_samples, gradients, before, beta, label_smoothing, LINK, EQUAL
    )
    i_out = i_row * n_blocks + i_block
    tl.store(p_sums + 3 * i_out, value)
    tl.store(p_sums + 3 * i_out + 1, area)
    tl.store(p_sums + 3 * i_out + 2, w1)
    if not EQUAL:
        p_samples += 2 * (i_row * (n_blocks + 1) + i_block)
        tl.store(p_samples, first[0])
        tl.store(p_samples + 1, first[1])
        tl.store(p_runs + 2 * i_out, after[2])
        tl.store(p_runs + 2 * i_out + 1, after[3])
        if i_block == n_blocks - 1:
            tl.store(p_samples + 2, n)
            tl.store(p_samples + 3, m)


@triton.jit
def _join(p_samples, p_runs, p_order, p_gradient, i_block, sign, BLOCK: tl.constexpr):
    """Add to the gradient of the run that i_block finishes what the blocks before have of it."""
    sample = tl.load(p_samples + 2 * i_block)
    b_sum = tl.zeros([BLOCK], p_runs.dtype.element_ty)
    for i_earlier in range(0, i_block, BLOCK):
        o_block = i_earlier + tl.arange(0, BLOCK)
        m_block = o_block < i_block
        b_next = tl.load(p_samples + 2 * (o_block + 1), mask=m_block, other=-1)
        b_sum += tl.load(p_runs + 2 * o_block, mask=m_block & (b_next == sample), other=0.0)
    if tl.load(p_samples + 2 * (i_block + 1)) > sample:
        p_gradient += tl.load(p_order + sample)
        tl.store(p_gradient, tl.load(p_gradient) + sign * tl.sum(b_sum, axis=0))


@triton.jit(do_not_specialize=["n_u", "n_v", "n_blocks"])
def sorted_transport_join_kernel(
    p_u_order,  # [R, n_u] int64, contiguous, like all that follow
    p_v_order,  # [R, n_v] int64
    p_sums,  # [R, blocks, 3] float64, and so the next two from the cell kernel
    p_samples,  # [R, blocks + 1, 2] int32
    p_runs,  # [R, blocks, 2]
    p_u_gradient,  # [R, n_u] as p_runs, and so all that follow
    p_v_gradient,  # [R, n_v]; may be p_u_gradient
    p_value,  # [R]
    p_statistics,  # [R, 2]
    n_u,
    n_v,
    n_blocks,
    EQUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n_programs = 1 if EQUAL else n_blocks
    i_row = (tl.program_id(0) // n_programs).to(tl.int64)
    i_block = tl.program_id(0) % n_programs
    if i_block == 0:
        p_sums += i_row * n_blocks * 3
        for i_sum in tl.static_range(3):
            b_sum = tl.zeros([BLOCK], tl.float64)
            for i_first in range(0, n_blocks, BLOCK):
                o_block = i_first + tl.arange(0, BLOCK)
                b_sum += tl.load(p_sums + 3 * o_block + i_sum, mask=o_block < n_blocks, other=0.0)
            if i_sum == 0:
                tl.store(p_value + i_row, tl.sum(b_sum, axis=0))
            else:
                tl.store(p_statistics + 2 * i_row + i_sum - 1, tl.sum(b_sum, axis=0))
    if not EQUAL:
        p_samples += 2 * i_row * (n_blocks + 1)
        p_runs += 2 * i_row * n_blocks
        _join(p_samples, p_runs, p_u_order + i_row * n_u, p_u_gradient + i_row * n_u, i_block, 1.0, BLOCK)
        _join(p_samples + 1, p_runs + 1, p_v_order + i_row * n_v, p_v_gradient + i_row * n_v, i_block, -1.0, BLOCK)


# --- Launchers -------------------------------------------------------------------------------------------------------


def sorted_transport(
    u: Tensor,  # [R, n], or [n] for one row without the R everywhere; of any float dtype, like all but desirable
    u_ref: Tensor | None,  # [R, n]; None counts as zeros, here and below
    v: Tensor | None,  # [R, m]
    v_ref: Tensor | None,  # [R, m]
    desirable: Tensor | None,  # [R, n] bool, instead of v: the samples are the desirable entries of u and the others
    u_weights: Tensor | None,  # [R, n], non-negative; None counts as ones
    v_weights: Tensor | None,  # [R, m]
    link: str,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [R], [R, n], [R, m] ([0] with desirable) and [R, 2]: area and w1
    """The value, its gradients by u and v, and the statistics: float32 (float64 if u, v or a reference is)."""
    scores = (u, u_ref, v, v_ref)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in scores) else torch.float32
    value = torch.empty(u.shape[:-1], dtype=dtype, device=u.device)
    u_gradient = torch.empty(u.shape, dtype=dtype, device=u.device)
    v_gradient = torch.empty(0 if v is None else v.shape, dtype=dtype, device=u.device)
    statistics = torch.empty((*value.shape, 2), dtype=dtype, device=u.device)
    outputs = (value, u_gradient, v_gradient, statistics)
    n_rows, n_u, n_v = value.numel(), u.shape[-1], 0 if v is None else v.shape[-1]
    if n_rows == 0 or n_u == 0 or (v is not None and n_v == 0):
        for output in outputs:
            output.zero_()
        return outputs
    inputs = [x if x is None else x.contiguous().view(n_rows, -1) for x in (*scores, desirable, u_weights, v_weights)]
    rows = (value.view(n_rows), u_gradient.view(n_rows, n_u), v_gradient.view(n_rows, n_v), statistics.view(n_rows, 2))
    linked = {"LINK": link, "EQUAL": v is not None and n_u == n_v and u_weights is None and v_weights is None}
    launch = _at_once if dtype == torch.float32 and max(n_u, n_v) <= MOST_AT_ONCE else _spread
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(u):
        launch(inputs, rows, beta, label_smoothing, linked)
    return outputs


def _at_once(inputs: list, outputs: tuple, beta: float, label_smoothing: float, linked: dict) -> None:
    """One launch."""
    value, u_gradient, v_gradient, statistics = outputs
    desirable, u_weights, v_weights = inputs[4:]
    n_rows, n_u = u_gradient.shape
    n_v = 0 if desirable is not None else v_gradient.shape[1]
    both, device = (n_rows, n_u + n_v), value.device
    u_levels, v_levels = (
        None if weights is None else torch.empty(both, dtype=torch.float64, device=device)
        for weights in (u_weights, v_weights if desirable is None else u_weights)
    )
    block, num_warps = block_and_warps(n_u + n_v)
    sorted_transport_row_kernel[(n_rows,)](
        *inputs,
        value,
        u_gradient,
        v_gradient if desirable is None else u_gradient,
        statistics,
        torch.empty(both, dtype=torch.float32, device=device),
        torch.empty(both, dtype=torch.int32, device=device),
        u_levels,
        v_levels,
        n_u,
        n_v,
        max(n_u, n_v).bit_length(),
        beta,
        label_smoothing,
        BLOCK=block,
        CELLS=min(block, ROW_CELLS),
        num_warps=num_warps,
        **linked,
    )


def _spread(inputs: list, outputs: tuple, beta: float, label_smoothing: float, linked: dict) -> None:
    """Sorts and sums by torch, and two launches."""
    value, u_gradient, v_gradient, statistics = outputs
    u, u_ref, v, v_ref, desirable, u_weights, v_weights = inputs
    dtype, equal = value.dtype, linked["EQUAL"]
    u_present = None if u_weights is None else u_weights > 0
    v_present = None if v_weights is None else v_weights > 0
    if desirable is not None:
        v, v_ref, v_weights, v_gradient = u, u_ref, u_weights, u_gradient
        v_present = ~desirable if u_present is None else u_present & ~desirable
        u_present = desirable if u_present is None else u_present & desirable
    counts = None
    if u_present is not None or v_present is not None:
        sides = ((u_gradient, u_present), (v_gradient, v_present))
        counts = torch.stack(
            [torch.full_like(x[:, 0], x.shape[1], dtype=torch.int64) if p is None else p.sum(1) for x, p in sides], 1
        )
        u_gradient.zero_()
        v_gradient.zero_()
    n_rows, n_u = u_gradient.shape
    n_v = v_gradient.shape[1]
    block = CELL_BLOCK
    n_blocks = triton.cdiv(n_u if equal else n_u + n_v, block)
    u_sorted, u_order, u_levels = _sorted_side(u, u_ref, u_weights, u_present, dtype)
    v_sorted, v_order, v_levels = _sorted_side(v, v_ref, v_weights, v_present, dtype)
    sums = torch.empty((n_rows, n_blocks, 3), dtype=torch.float64, device=value.device)
    samples = torch.empty((n_rows, n_blocks + 1, 2), dtype=torch.int32, device=value.device)
    runs = torch.empty((n_rows, n_blocks, 2), dtype=dtype, device=value.device)
    sorted_transport_cell_kernel[(n_rows * n_blocks,)](
        u_sorted,
        u_order,
        u_levels,
        v_sorted,
        v_order,
        v_levels,
        counts,
        u_gradient,
        v_gradient,
        sums,
        samples,
        runs,
        n_u,
        n_v,
        n_blocks,
        max(n_u, n_v).bit_length(),
        beta,
        label_smoothing,
        BLOCK=block,
        num_warps=4,
        **linked,
    )
    sorted_transport_join_kernel[(n_rows if equal else n_rows * n_blocks,)](
        u_order,
        v_order,
        sums,
        samples,
        runs,
        u_gradient,
        v_gradient,
        value,
        statistics,
        n_u,
        n_v,
        n_blocks,
        EQUAL=equal,
        BLOCK=256,
        num_warps=4,
    )


def _sorted_side(
    values: Tensor, refs: Tensor | None, weights: Tensor | None, present: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sorted samples, absent ones last, their indices, and with weights the mass up to and including each."""
    values = values.to(dtype)
    if refs is not None:
        values = values - refs.to(dtype)
    if present is not None:
        values = values.masked_fill(~present, float("inf"))
    values, order = values.sort(dim=1, stable=True)
    if weights is None:
        return values, order, None
    mass = weights.double()
    if present is not None:
        mass = mass.masked_fill(~present, 0.0)
    # The cumulative sums never fall, although a parallel one may add in another order for each of them.
    return values, order, mass.gather(1, order).cumsum(1).cummax(1).values
