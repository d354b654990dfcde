r"""Isotonic regression of the sorted rows behind soft sorting and ranking, in parallel within a row.

u are a row's values (negated where descending) in non-decreasing order at positions 0, ..., n - 1. Each block B of
neighbouring positions has a level, and the levels of the solution do not increase from block to block:

====  ====================================================  ========================================================
op    :math:`\varphi_B` (l2)                                :math:`\varphi_B` (kl)
====  ====================================================  ========================================================
sort  :math:`\bar u_B - c_B / e`                            :math:`\log \sum_B e^{-i / e} - \log \sum_B e^{-u_i}`
rank  :math:`c_B - \bar u_B / e`                            :math:`\log \sum_B (i + 1) - \log \sum_B e^{u_i / e}`
====  ====================================================  ========================================================

with e the strength and c a block's centre (Blondel et al. 2020, arXiv 2002.08871, sections 4 and 5). Each is a weighted
mean of its members (kl: its exponential is), hence

.. math:: T_A(\theta) = \sum_A w_i (\varphi_i - \theta) \;\;\text{or}\;\; \sum_A w_i (e^{\varphi_i} - e^\theta)

falls in theta and is 0 at :math:`\theta = \varphi_A`.

Where two solved halves L and R meet, nothing happens or one block [a, b) of the ends of both is pooled. Pooling one
neighbour after another may take as many steps as there are blocks (one outlier does it), so [a, b) is searched for.
Its level is the root of the falling function :math:`T(\theta) = T_{L: \varphi < \theta}(\theta) + T_{R: \varphi >
\theta}(\theta)`. With a block i of L and a block j of R, both halfway through what is still unknown, one sum over what
lies between their starts, :math:`[s_i, J)` and :math:`[J, s_j)`, always halves one of the two sides:

- if :math:`\varphi_i < \varphi_j`, :math:`T_{[s_i, s_j)}(\varphi_i) > 0` gives T(phi_i) > 0, so that i is pooled; else
  :math:`T(\varphi_j) \le 0` and j is pooled;
- if not, :math:`T_{[s_i, J)}(\varphi_i) + T_{[J, s_j)}(\varphi_j) < 0` gives T(phi_i) < 0, so that i is not pooled;
  else :math:`T(\varphi_j) \ge 0` and j is not;
- once a side is known, the other needs its own block's level only.

So a junction of two halves of m positions takes 2 log2(m) steps whatever the values are, all junctions of one size are
lanes of one program, and log2(n) sizes solve the row. The sums to a junction from either side are kept for every
position, as a Sklansky scan keeps them: sums are only ever added to, since a difference of two would lose the digits of
the small one. One row has work O(n log n) (the sums; the searches of all junctions are O(n) together) and depth
O(log^2 n), against O(n) of both by pooling in turn.

Launches: one program for a row of at most TILE values, barriers between its sizes. Longer rows: a program for each
tile; one for each row, which joins tiles; one for each tile, which writes. A program that joins tiles cannot rewrite
all positions that it pools: it writes [a, b) down for each junction, and readers of a position look at the junctions
above it, the topmost that covers it being the one that holds.

All is float64, and relative to a block's own values: a level is held as what is left after the first value and
position, l2's sums are of distances to the first value, kl's are relative to their largest term. Rows may have up to
2^29 positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Names of the kernels' arguments, for a change of which nothing is compiled anew.
NOT_SPECIALIZED = ["n_positions", "log2_tile", "n_sizes"]

# A row's scratch of a position: 4 float64 and 2 int32; and of a tile: SUM_TO_JUNCTION and SUM_FROM_JUNCTION.
SUM_TO_JUNCTION: tl.constexpr = tl.constexpr(0)  # from a position to the end of the solved range that holds it
SUM_FROM_JUNCTION: tl.constexpr = tl.constexpr(1)  # from the start of that range to a position, which is included
REMAINDER: tl.constexpr = tl.constexpr(2)  # of the level of the block of a position
POOLED_REMAINDER: tl.constexpr = tl.constexpr(3)  # of the level of what is pooled at a junction
POOLED_START: tl.constexpr = tl.constexpr(0)
POOLED_END: tl.constexpr = tl.constexpr(1)


@triton.jit
def _value(p_values, o_position):
    b_value = tl.load(p_values + o_position)
    if b_value.dtype != tl.float64:
        b_value = b_value.to(tl.float32)
    return b_value.to(tl.float64)


@triton.jit
def _one_minus_exp(b_x):
    """1 - e^-x for x >= 0; Taylor's polynomial keeps the digits of a small one."""
    b_series = b_x * (1.0 - b_x * (1.0 / 2 - b_x * (1.0 / 6 - b_x * (1.0 / 24))))
    return tl.where(b_x < 1e-3, b_series, 1.0 - tl.exp(-b_x))


@triton.jit
def _rise(p_values, o_to, o_from, value_step, position_step):
    """phi at one position less phi at another, both without their remainders."""
    b_value = _value(p_values, o_to) - _value(p_values, o_from)
    return value_step * b_value + position_step * (o_to - o_from).to(tl.float64)


@triton.jit
def _is_lower(p_values, o_start, b_remainder, o_other, b_other, value_step, position_step, KL: tl.constexpr):
    """Whether a block's level is below another's; kl's remainders are exponentials."""
    b_rise = _rise(p_values, o_other, o_start, value_step, position_step)
    if KL:
        m_lower = b_other * tl.exp(b_rise) > b_remainder
    else:
        m_lower = b_rise + b_other - b_remainder > 0.0
    return m_lower


@triton.jit
def _join(
    p_values, b_left, b_right, o_start, o_middle, o_end, value_step, n_positions, RANK: tl.constexpr, KL: tl.constexpr
):
    """The sum over [start, end) from those over [start, middle) and [middle, end), either of which may be empty.

    l2: of distances to the first value. kl: of e^-u (sort) or e^(u / e) (rank), relative to the largest term; sort's
    are times 1 - e^(-1 / e), the denominator of the sum of e^(-i / e), which goes without.
    """
    if RANK and KL:
        b_last = _value(p_values, tl.maximum(o_end - 1, 0))
        b_distance = _value(p_values, tl.maximum(o_middle - 1, 0)) - b_last
        b_sum = b_left * tl.exp(-value_step * b_distance) + b_right
    else:
        b_distance = _value(p_values, tl.minimum(o_middle, n_positions - 1)) - _value(p_values, o_start)
        if KL:
            b_sum = b_left + b_right * tl.exp(-value_step * b_distance)
        else:
            b_sum = b_left + b_right + (o_end - o_middle).to(tl.float64) * b_distance
    return b_sum


@triton.jit
def _excess(
    p_values, b_sum, o_start, o_end, o_anchor, o_block, b_remainder,
    value_step, position_step, RANK: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """T of [start, end) at a block's level, over a positive factor that the anchor alone decides."""
    b_size = (o_end - o_start).to(tl.float64)
    if RANK and KL:
        b_rise = _rise(p_values, tl.maximum(o_end - 1, 0), o_block, value_step, position_step)
        b_excess = b_size * (o_start + o_end + 1).to(tl.float64) / 2 - b_sum * b_remainder * tl.exp(-b_rise)
    else:
        # An empty range may start after the last position.
        b_rise = _rise(p_values, tl.where(o_start < o_end, o_start, o_anchor), o_block, value_step, position_step)
        if KL:
            b_shift = position_step * (o_start - o_anchor).to(tl.float64)
            b_excess = tl.exp(b_shift) * _one_minus_exp(-position_step * b_size)
            b_excess -= b_sum * b_remainder * tl.exp(b_shift - b_rise)
        else:
            b_excess = value_step * b_sum + position_step * b_size * (b_size - 1) / 2
            b_excess += b_size * (b_rise - b_remainder)
    return tl.where(o_start < o_end, b_excess, 0.0)


@triton.jit
def _remainder(
    p_values, b_sum, o_start, o_end, value_step, position_step, RANK: tl.constexpr, KL: tl.constexpr
):  # fmt: skip
    """The level of [start, end) as one block, less that of its first value and position; kl: the exponential."""
    b_size = (o_end - o_start).to(tl.float64)
    if RANK and KL:
        b_distance = _value(p_values, o_end - 1) - _value(p_values, o_start)
        b_ranks = b_size * (o_start + o_end + 1).to(tl.float64) / 2
        b_remainder = b_ranks / b_sum * tl.exp(value_step * b_distance)
    elif KL:
        b_remainder = _one_minus_exp(-position_step * b_size) / b_sum
    else:
        b_remainder = value_step * b_sum / b_size + position_step * (b_size - 1) / 2
    return b_remainder


@triton.jit
def _block_of(p_start, p_scratch, p_pooled, o_position, n_positions, log2_tile, n_sizes):
    """Start and remainder of the block of a position after n_sizes sizes of joining tiles."""
    b_start = tl.load(p_start + o_position)
    b_remainder = tl.load(p_scratch + 4 * o_position + REMAINDER)
    for i_size in range(n_sizes):
        log2_half = log2_tile + i_size
        o_junction = ((o_position >> (log2_half + 1)) * 2 + 1) << log2_half
        m_junction = o_junction < n_positions
        b_pooled_start = tl.load(p_pooled + 2 * o_junction + POOLED_START, mask=m_junction, other=0)
        b_pooled_end = tl.load(p_pooled + 2 * o_junction + POOLED_END, mask=m_junction, other=0)
        m_pooled = (b_pooled_start <= o_position) & (o_position < b_pooled_end)
        p_remainder = p_scratch + 4 * o_junction + POOLED_REMAINDER
        b_remainder = tl.where(m_pooled, tl.load(p_remainder, mask=m_pooled, other=0.0), b_remainder)
        b_start = tl.where(m_pooled, b_pooled_start, b_start)
    return b_start, b_remainder


@triton.jit
def _sum_to_junction(
    p_values, p_scratch, p_tile_sums, o_start, o_junction, value_step, n_positions, log2_tile,
    RANK: tl.constexpr, KL: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sum over [start, junction)."""
    b_sum = tl.load(p_scratch + 4 * o_start + SUM_TO_JUNCTION)
    if TILES:
        i_rest = (o_start >> log2_tile) + 1
        o_rest = i_rest << log2_tile
        b_rest = tl.load(p_tile_sums + 2 * i_rest + SUM_TO_JUNCTION, mask=o_rest < o_junction, other=0.0)
        b_sum = _join(p_values, b_sum, b_rest, o_start, o_rest, o_junction, value_step, n_positions, RANK, KL)
    return b_sum


@triton.jit
def _sum_from_junction(
    p_values, p_scratch, p_tile_sums, o_junction, o_end, value_step, n_positions, log2_tile,
    RANK: tl.constexpr, KL: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sum over [junction, end), 0 if that is empty."""
    m_some = o_junction < o_end
    b_sum = tl.load(p_scratch + 4 * o_end - 4 + SUM_FROM_JUNCTION, mask=m_some, other=0.0)
    if TILES:
        i_tile = tl.where(m_some, o_end - 1, o_junction) >> log2_tile
        o_tile = i_tile << log2_tile
        b_whole = tl.load(p_tile_sums + 2 * i_tile - 2 + SUM_FROM_JUNCTION, mask=o_junction < o_tile, other=0.0)
        b_sum = _join(p_values, b_whole, b_sum, o_junction, o_tile, o_end, value_step, n_positions, RANK, KL)
    return b_sum


@triton.jit
def _pool_junctions(
    p_values, p_start, p_scratch, p_pooled, p_tile_sums, o_lane, o_first, o_stop, log2_half,
    value_step, position_step, n_positions, log2_tile, n_sizes,
    RANK: tl.constexpr, KL: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Find and write down what is pooled where, in [first, stop), two halves of 2^log2_half positions meet."""
    o_junction = o_first + ((2 * o_lane + 1) << log2_half)
    m_lane = o_junction < o_stop
    # A lane without a junction is at an empty one at the first position.
    o_junction = tl.where(m_lane, o_junction, o_first)
    o_left = tl.where(m_lane, o_junction - 1, o_first)
    o_right_end = tl.where(m_lane, tl.minimum(o_junction + (1 << log2_half), o_stop), o_first + 1)
    b_start, b_remainder = _block_of(p_start, p_scratch, p_pooled, o_left, n_positions, log2_tile, n_sizes)
    b_right, b_right_remainder = _block_of(p_start, p_scratch, p_pooled, o_junction, n_positions, log2_tile, n_sizes)
    m_pool = m_lane & _is_lower(
        p_values, b_start, b_remainder, b_right, b_right_remainder, value_step, position_step, KL
    )
    o_end = o_junction
    if tl.max(m_pool.to(tl.int32), axis=0) > 0:
        # What is pooled starts in [low, start] and ends in [next, end], where each side halves.
        o_low = tl.where(m_pool, o_junction - (1 << log2_half), b_start)
        o_next = tl.where(m_pool, o_junction + 1, o_junction)
        o_end = tl.where(m_pool, o_right_end, o_junction)
        for _ in range(2 * log2_half):
            m_left = o_low < b_start
            m_right = o_next < o_end
            o_i = (o_low + b_start) >> 1
            o_j = tl.minimum((o_next + o_end) >> 1, o_right_end - 1)
            b_i, b_remainder_i = _block_of(p_start, p_scratch, p_pooled, o_i, n_positions, log2_tile, n_sizes)
            b_j, b_remainder_j = _block_of(p_start, p_scratch, p_pooled, o_j, n_positions, log2_tile, n_sizes)
            m_lower = _is_lower(p_values, b_i, b_remainder_i, b_j, b_remainder_j, value_step, position_step, KL)

            o_from = tl.where(m_left, b_i, b_start)
            o_to = tl.where(m_right, b_j, o_end)
            # phi_i left and phi_j right; but phi_i on both sides if it is lower, and the other's if one side is known.
            b_level = tl.where(m_left, b_i, b_j)
            b_level_remainder = tl.where(m_left, b_remainder_i, b_remainder_j)
            b_excess = _excess(
                p_values,
                _sum_to_junction(
                    p_values, p_scratch, p_tile_sums, o_from, o_junction, value_step, n_positions, log2_tile,
                    RANK, KL, TILES,
                ),
                o_from, o_junction, o_from, b_level, b_level_remainder,
                value_step, position_step, RANK, KL,
            )  # fmt: skip
            m_own_side = m_right & ~m_lower
            b_excess += _excess(
                p_values,
                _sum_from_junction(
                    p_values, p_scratch, p_tile_sums, o_junction, o_to, value_step, n_positions, log2_tile,
                    RANK, KL, TILES,
                ),
                o_junction, o_to, o_from,
                tl.where(m_own_side, b_j, b_level), tl.where(m_own_side, b_remainder_j, b_level_remainder),
                value_step, position_step, RANK, KL,
            )  # fmt: skip
            # Which side is halved, and whether by pooling the block looked at or by leaving it out.
            m_left &= tl.where(m_lower, b_excess > 0.0, b_excess < 0.0) | ~m_right
            m_right &= ~m_left
            m_in = tl.where(o_low < b_start, tl.where(o_next < o_end, m_lower, b_excess > 0.0), b_excess < 0.0)
            o_next, o_end = tl.where(m_right & m_in, o_j + 1, o_next), tl.where(m_right & ~m_in, b_j, o_end)
            o_low, b_start = tl.where(m_left & ~m_in, o_i + 1, o_low), tl.where(m_left & m_in, b_i, b_start)
        b_left_sum = _sum_to_junction(
            p_values, p_scratch, p_tile_sums, b_start, o_junction, value_step, n_positions, log2_tile, RANK, KL, TILES
        )
        b_right_sum = _sum_from_junction(
            p_values, p_scratch, p_tile_sums, o_junction, o_end, value_step, n_positions, log2_tile,
            RANK, KL, TILES,
        )  # fmt: skip
        b_sum = _join(p_values, b_left_sum, b_right_sum, b_start, o_junction, o_end, value_step, n_positions, RANK, KL)
        b_remainder = _remainder(p_values, b_sum, b_start, o_end, value_step, position_step, RANK, KL)
        tl.store(p_scratch + 4 * o_junction + POOLED_REMAINDER, b_remainder, mask=m_pool)
    tl.store(p_pooled + 2 * o_junction + POOLED_START, tl.where(m_pool, b_start, o_junction), mask=m_lane)
    tl.store(p_pooled + 2 * o_junction + POOLED_END, tl.where(m_pool, o_end, o_junction), mask=m_lane)


@triton.jit
def _extend_sums(
    p_values, p_sums, i_left, i_junction, i_right, m_left, m_right,
    o_first, o_left, o_junction, o_right_end, o_end,
    value_step, n_positions, WIDTH: tl.constexpr, RANK: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """From the sums to and from junctions within either half [first, junction) and [junction, end) those within both.

    i_ are where the sums are kept: those from o_left, and to o_right_end, are extended.
    """
    p_left = p_sums + WIDTH * i_left + SUM_TO_JUNCTION
    p_right = p_sums + WIDTH * i_right + SUM_FROM_JUNCTION
    p_junction = p_sums + WIDTH * i_junction
    b_left = tl.load(p_left, mask=m_left, other=0.0)
    b_right_half = tl.load(p_junction + SUM_TO_JUNCTION, mask=m_left, other=0.0)
    b_left_half = tl.load(p_junction - WIDTH + SUM_FROM_JUNCTION, mask=m_right, other=0.0)
    b_right = tl.load(p_right, mask=m_right, other=0.0)
    o_left = tl.where(m_left, o_left, 0)
    o_first = tl.where(m_left, o_first, 0)
    o_junction = tl.where(m_left, o_junction, 0)
    o_end = tl.where(m_left, o_end, 0)
    o_right_end = tl.where(m_right, o_right_end, 0)
    b_left = _join(p_values, b_left, b_right_half, o_left, o_junction, o_end, value_step, n_positions, RANK, KL)
    b_right = _join(p_values, b_left_half, b_right, o_first, o_junction, o_right_end, value_step, n_positions, RANK, KL)
    tl.store(p_left, b_left, mask=m_left)
    tl.store(p_right, b_right, mask=m_right)


@triton.jit
def _write(
    p_values, p_order, p_result, p_result_order, p_start, p_scratch, p_pooled, o_position, m_position,
    value_step, position_step, n_positions, log2_tile, n_sizes, RANK: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """The results of some positions."""
    o_position = tl.where(m_position, o_position, 0)
    b_start, b_remainder = _block_of(p_start, p_scratch, p_pooled, o_position, n_positions, log2_tile, n_sizes)
    b_order = tl.load(p_order + o_position)
    b_first = _value(p_values, b_start)
    b_place = (o_position - b_start).to(tl.float64)
    if RANK:
        b_distance = value_step * (b_first - _value(p_values, o_position))
        if KL:
            b_result = b_remainder * tl.exp(b_distance)
        else:
            b_result = b_distance + ((b_start + 1).to(tl.float64) + b_remainder)
        o_result = b_order
    else:
        if KL:
            b_remainder = tl.log(b_remainder)
        b_result = b_first + value_step * (b_remainder - position_step * b_place)
        o_result = o_position.to(tl.int64)
    if p_result.dtype.element_ty != tl.float64:
        b_result = b_result.to(tl.float32)
    tl.store(p_result + o_result, b_result.to(p_result.dtype.element_ty), mask=m_position)
    tl.store(p_result_order + o_position, b_order.to(tl.int32), mask=m_position)
    tl.store(p_start + o_position, b_start, mask=m_position)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def isotonic_tile_kernel(
    p_values,  # [R, n] sorted, contiguous as all that follows
    p_order,  # [R, n] int64
    p_result,  # [R, n]; this, p_result_order and final starts are written for whole rows only
    p_result_order,  # [R, n] int32
    p_start,  # [R, n] int32
    p_scratch,  # [R, n, 4] float64
    p_pooled,  # [R, n, 2] int32
    p_tile_sums,  # [R, tiles, 2] float64
    n_positions,
    log2_tile,
    n_sizes,  # of halves: log2 of the positions there are, rounded up, but no more than of the tile
    value_step: tl.float64,  # a plain float argument would be rounded to float32
    position_step: tl.float64,
    sum_of_one: tl.float64,  # what a block of one position counts for in the sums
    RANK: tl.constexpr,
    KL: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n_tiles = (n_positions + (1 << log2_tile) - 1) >> log2_tile
    i_row = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % n_tiles
    p_values += i_row * n_positions
    p_order += i_row * n_positions
    p_result += i_row * n_positions
    p_result_order += i_row * n_positions
    p_start += i_row * n_positions
    p_scratch += i_row * n_positions * 4
    p_pooled += i_row * n_positions * 2
    p_tile_sums += i_row * n_tiles * 2
    o_first = i_tile << log2_tile
    o_stop = tl.minimum(o_first + (1 << log2_tile), n_positions)
    o_block = tl.arange(0, BLOCK)
    o_lane = tl.arange(0, LANES)

    # Every position is a block.
    for i_block in range(o_first, o_stop, BLOCK):
        o_position = i_block + o_block
        m_position = o_position < o_stop
        b_remainder = tl.full([BLOCK], 1.0 if KL else 0.0, tl.float64)
        if RANK and KL:
            b_remainder = (o_position + 1).to(tl.float64)
        b_sum = tl.zeros([BLOCK], tl.float64) + sum_of_one
        tl.store(p_start + o_position, o_position, mask=m_position)
        p_position = p_scratch + 4 * o_position
        tl.store(p_position + REMAINDER, b_remainder, mask=m_position)
        tl.store(p_position + SUM_TO_JUNCTION, b_sum, mask=m_position)
        tl.store(p_position + SUM_FROM_JUNCTION, b_sum, mask=m_position)
    tl.debug_barrier()

    for log2_half in range(n_sizes):
        half = 1 << log2_half
        n_junctions = (o_stop - o_first + half - 1) >> (log2_half + 1)
        for i_lane in range(0, n_junctions, LANES):
            _pool_junctions(
                p_values, p_start, p_scratch, p_pooled, p_tile_sums, i_lane + o_lane, o_first, o_stop, log2_half,
                value_step, position_step, n_positions, log2_tile, 0, RANK, KL, False,
            )  # fmt: skip
        tl.debug_barrier()
        # A lane has the same place in either half.
        for i_block in range(0, n_junctions << log2_half, BLOCK):
            o_place = i_block + o_block
            o_left_first = o_first + ((o_place >> log2_half) << (log2_half + 1))
            o_junction = o_left_first + half
            o_left = o_left_first + (o_place & (half - 1))
            o_right = o_left + half
            m_left = o_junction < o_stop
            m_right = o_right < o_stop
            b_start = tl.load(p_pooled + 2 * o_junction + POOLED_START, mask=m_left, other=0)
            b_end = tl.load(p_pooled + 2 * o_junction + POOLED_END, mask=m_left, other=0)
            m_pooled_left = m_left & (b_start <= o_left) & (b_start < b_end)
            m_pooled_right = m_right & (o_right < b_end)
            p_pooled_remainder = p_scratch + 4 * o_junction + POOLED_REMAINDER
            b_remainder = tl.load(p_pooled_remainder, mask=m_pooled_left | m_pooled_right, other=0.0)
            tl.store(p_start + o_left, b_start, mask=m_pooled_left)
            tl.store(p_start + o_right, b_start, mask=m_pooled_right)
            tl.store(p_scratch + 4 * o_left + REMAINDER, b_remainder, mask=m_pooled_left)
            tl.store(p_scratch + 4 * o_right + REMAINDER, b_remainder, mask=m_pooled_right)
            _extend_sums(
                p_values, p_scratch, o_left, o_junction, o_right, m_left, m_right,
                o_left_first, o_left, o_junction, o_right + 1, tl.minimum(o_junction + half, o_stop),
                value_step, n_positions, 4, RANK, KL,
            )  # fmt: skip
        tl.debug_barrier()

    if WHOLE_ROW:
        for i_block in range(0, n_positions, BLOCK):
            o_position = i_block + o_block
            _write(
                p_values, p_order, p_result, p_result_order, p_start, p_scratch, p_pooled,
                o_position, o_position < n_positions,
                value_step, position_step, n_positions, log2_tile, 0, RANK, KL,
            )  # fmt: skip
    else:
        b_total = tl.load(p_scratch + 4 * o_first + SUM_TO_JUNCTION)
        tl.store(p_tile_sums + 2 * i_tile + SUM_TO_JUNCTION, b_total)
        tl.store(p_tile_sums + 2 * i_tile + SUM_FROM_JUNCTION, b_total)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def isotonic_row_kernel(
    p_values,  # as for isotonic_tile_kernel
    p_start,
    p_scratch,
    p_pooled,
    p_tile_sums,
    n_positions,
    log2_tile,
    n_sizes,  # log2 of the tiles there are, rounded up
    value_step: tl.float64,
    position_step: tl.float64,
    RANK: tl.constexpr,
    KL: tl.constexpr,
    LANES: tl.constexpr,
):
    n_tiles = (n_positions + (1 << log2_tile) - 1) >> log2_tile
    i_row = tl.program_id(0).to(tl.int64)
    p_values += i_row * n_positions
    p_start += i_row * n_positions
    p_scratch += i_row * n_positions * 4
    p_pooled += i_row * n_positions * 2
    p_tile_sums += i_row * n_tiles * 2
    o_lane = tl.arange(0, LANES)
    for i_size in range(n_sizes):
        half = 1 << i_size  # in tiles
        n_junctions = (n_tiles + half - 1) >> (i_size + 1)
        for i_lane in range(0, n_junctions, LANES):
            _pool_junctions(
                p_values, p_start, p_scratch, p_pooled, p_tile_sums, i_lane + o_lane, 0, n_positions,
                log2_tile + i_size, value_step, position_step, n_positions, log2_tile, i_size,
                RANK, KL, True,
            )  # fmt: skip
        tl.debug_barrier()
        for i_block in range(0, n_junctions << i_size, LANES):
            o_place = i_block + o_lane
            i_left_first = (o_place >> i_size) << (i_size + 1)
            i_junction = i_left_first + half
            i_left = i_left_first + (o_place & (half - 1))
            i_right = i_left + half
            _extend_sums(
                p_values, p_tile_sums, i_left, i_junction, i_right,
                i_junction < n_tiles, i_right < n_tiles,
                i_left_first << log2_tile, i_left << log2_tile, i_junction << log2_tile,
                tl.minimum((i_right + 1) << log2_tile, n_positions),
                tl.minimum((i_junction + half) << log2_tile, n_positions),
                value_step, n_positions, 2, RANK, KL,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def isotonic_write_kernel(
    p_values,  # as for isotonic_tile_kernel
    p_order,
    p_result,
    p_result_order,
    p_start,
    p_scratch,
    p_pooled,
    n_positions,
    log2_tile,
    n_sizes,  # as for isotonic_row_kernel
    value_step: tl.float64,
    position_step: tl.float64,
    RANK: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n_blocks = tl.cdiv(n_positions, BLOCK)
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_position = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    _write(
        p_values + i_row * n_positions,
        p_order + i_row * n_positions,
        p_result + i_row * n_positions,
        p_result_order + i_row * n_positions,
        p_start + i_row * n_positions,
        p_scratch + i_row * n_positions * 4,
        p_pooled + i_row * n_positions * 2,
        o_position,
        o_position < n_positions,
        value_step,
        position_step,
        n_positions,
        log2_tile,
        n_sizes,
        RANK,
        KL,
    )
