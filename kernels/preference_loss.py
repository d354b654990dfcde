r"""Kernels of the op `preference_loss`: margins, a link and an aggregate, with the gradient and the statistics.

.. math:: h_i = (\text{chosen}_i - \text{ref\_chosen}_i) - (\text{rejected}_i - \text{ref\_rejected}_i), \qquad
    P_i = q_i \, m(\ell(h_i)), \qquad g_i = P_i \, \ell'(h_i)

with q the nominal weights. Every aggregate weighs a sample by a function m of its loss alone, which five numbers
describe: its *shape*. So there are three steps: the losses and slopes of the pairs; the shape, for which one program
reads the losses once for each sum over the batch that it needs; the gradient, pair by pair. Up to `MOST_AT_ONCE` pairs
one program takes all three, in one launch; a larger batch takes three, of which the outer two are parallel.

Sums and shapes are float64 whatever the losses are, and are added up in a fixed order: the same input gives the same
bits. The formulas and their sources are in `naive.kl_tilt` and `naive.worst_case`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._link import from_ordered_bits, link_loss_and_slope, ordered_bits

MOST_AT_ONCE = 4096  # pairs in one launch; over more, a single program would take longer than two more launches
PARALLEL_BLOCK = 1024  # pairs of a program beside others, for which four warps do

_N_MEANS: tl.constexpr = tl.constexpr(5)  # the statistics that are means over the batch


def block_and_warps(n_pairs: int, itemsize: int, warp_size: int = 64 if torch.version.hip else 32) -> tuple[int, int]:
    """The pairs of a block, and the warps of a program, for losses of `itemsize` bytes.

    16 bytes of losses a thread, so that few pairs stay within a warp, whose sums pass no barrier; at most 8 warps, so
    that a thread has registers for the several float64 numbers of each loss that a solver keeps.
    """
    block = min(8192 // itemsize, triton.next_power_of_2(n_pairs))
    return block, max(1, min(8, block * itemsize // (16 * warp_size)))


# --- The sample: losses and weights in memory, read block by block ---------------------------------------------------


@triton.jit
def _nominal(p_weights, o_pair, m_pair, total):
    """q: the weights over their sum, 0 beyond the end."""
    if p_weights is None:
        b_weights = tl.where(m_pair, 1.0, 0.0).to(tl.float64)
    else:
        b_weights = tl.load(p_weights + o_pair, mask=m_pair, other=0.0).to(tl.float64)
    return b_weights / total


@triton.jit
def _block(sample, i_block, BLOCK: tl.constexpr):
    """Losses and nominal weights (float64)."""
    p_losses, p_weights, n_losses, total = sample
    o_pair = i_block + tl.arange(0, BLOCK)
    m_pair = o_pair < n_losses
    return tl.load(p_losses + o_pair, mask=m_pair, other=0.0), _nominal(p_weights, o_pair, m_pair, total)


@triton.jit
def _extremes(sample, BLOCK: tl.constexpr):
    """The smallest and the largest loss; a sample of weight zero is absent."""
    dtype: tl.constexpr = sample[0].dtype.element_ty
    b_minimum = tl.full([BLOCK], float("inf"), dtype)
    b_maximum = tl.full([BLOCK], -float("inf"), dtype)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_minimum = tl.minimum(b_minimum, tl.where(b_nominal > 0.0, b_losses, float("inf")))
        b_maximum = tl.maximum(b_maximum, tl.where(b_nominal > 0.0, b_losses, -float("inf")))
    return tl.min(b_minimum, axis=0), tl.max(b_maximum, axis=0)


@triton.jit
def _mass_around(sample, level, BLOCK: tl.constexpr):
    """The nominal mass of the losses above `level` and of those equal to it."""
    b_above = tl.zeros([BLOCK], tl.float64)
    b_equal = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_above += tl.where(b_losses > level, b_nominal, 0.0)
        b_equal += tl.where(b_losses == level, b_nominal, 0.0)
    return tl.sum(b_above, axis=0), tl.sum(b_equal, axis=0)


@triton.jit
def _excess(sample, maximum, eta, BLOCK: tl.constexpr):
    """The first two moments of (l - maximum - eta)_+."""
    b_first = tl.zeros([BLOCK], tl.float64)
    b_second = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_excess = tl.maximum(b_losses.to(tl.float64) - maximum - eta, 0.0)
        b_excess = tl.where(b_nominal > 0.0, b_excess, 0.0)
        b_first += b_nominal * b_excess
        b_second += b_nominal * b_excess * b_excess
    return tl.sum(b_first, axis=0), tl.sum(b_second, axis=0)


@triton.jit
def _mean_and_variance(sample, maximum, level, BLOCK: tl.constexpr):
    """The mass, mean and variance of l - maximum over the losses above `level`."""
    b_mass = tl.zeros([BLOCK], tl.float64)
    b_first = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_nominal = tl.where(b_losses > level, b_nominal, 0.0)
        b_mass += b_nominal
        b_first += tl.where(b_nominal > 0.0, b_nominal * (b_losses.to(tl.float64) - maximum), 0.0)
    mass = tl.sum(b_mass, axis=0)
    mean = tl.sum(b_first, axis=0) / mass
    b_second = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_deviation = b_losses.to(tl.float64) - maximum - mean
        b_second += tl.where((b_losses > level) & (b_nominal > 0.0), b_nominal * b_deviation * b_deviation, 0.0)
    return mass, mean, tl.sum(b_second, axis=0) / mass


# --- The shape of each aggregate -------------------------------------------------------------------------------------


@triton.jit
def _tilted(b_losses, reference, sharpness):
    """e^(sharpness (l - reference)), which is 1 at the reference however sharp."""
    b_losses = b_losses.to(tl.float64)
    return tl.exp(tl.where(b_losses == reference, 0.0, (b_losses - reference) * sharpness))


@triton.jit
def _partition(sample, reference, sharpness, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_sum += tl.where(b_nominal > 0.0, b_nominal * _tilted(b_losses, reference, sharpness), 0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def _divergence(sample, maximum, sharpness, BLOCK: tl.constexpr):
    """KL(P || q) of P proportional to q e^(sharpness l), and its derivative by log(sharpness)."""
    normalizer = _partition(sample, maximum, sharpness, BLOCK)
    log_normalizer = tl.log(normalizer)
    b_divergence = tl.zeros([BLOCK], tl.float64)
    b_first = tl.zeros([BLOCK], tl.float64)
    b_second = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, sample[2], BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_losses = tl.where(b_nominal > 0.0, b_losses.to(tl.float64), maximum)
        b_score = (b_losses - maximum) * sharpness
        b_ratio = _tilted(b_losses, maximum, sharpness) / normalizer
        # KL is the mean under q of r log r - r + 1 >= 0, r = P / q: its terms cannot cancel, as those of r log r do.
        # In t = log r that is the sum over k of t^(k + 2) / (k! (k + 2)), which small ones need.
        b_log_ratio = b_score - log_normalizer
        b_series = 1.0 / 144 + b_log_ratio * (1.0 / 840 + b_log_ratio * (1.0 / 5760 + b_log_ratio * (1.0 / 45360)))
        b_series = 0.5 + b_log_ratio * (
            1.0 / 3 + b_log_ratio * (0.125 + b_log_ratio * (1.0 / 30 + b_log_ratio * b_series))
        )
        b_small = b_log_ratio * b_log_ratio * b_series
        b_terms = b_ratio * (b_log_ratio - 1.0) + 1.0
        b_divergence += b_nominal * tl.where(tl.abs(b_log_ratio) < 0.0625, b_small, b_terms)
        b_first += b_nominal * b_ratio * b_score
        b_second += b_nominal * b_ratio * b_score * b_score
    first = tl.sum(b_first, axis=0)
    return tl.sum(b_divergence, axis=0), tl.sum(b_second, axis=0) - first * first


@triton.jit
def _sharpness(sample, maximum, rho, BLOCK: tl.constexpr):
    """The 1 / tau at which KL(P || q) = rho: Newton for log KL as a function of log(1 / tau), kept inside a bracket by
    bisection. From KL = variance / (2 tau^2), its limit at small rho, it comes from below."""
    _, _, variance = _mean_and_variance(sample, maximum, -float("inf"), BLOCK)
    centre = 0.5 * tl.log(2.0 * rho / variance)
    low, high = tl.full([], -200.0, tl.float64), tl.full([], 200.0, tl.float64)
    offset, step = tl.full([], 0.0, tl.float64), high
    n_steps = 0
    while (tl.abs(step) > 1e-10) & (n_steps < 100):
        divergence, slope = _divergence(sample, maximum, tl.exp(centre + offset), BLOCK)
        low = tl.where(divergence < rho, offset, low)
        high = tl.where(divergence < rho, high, offset)
        moved = offset + divergence * tl.log(rho / divergence) / slope
        inside = (divergence > 0.0) & (slope > 0.0) & (low < moved) & (moved < high)
        moved = tl.where(inside, moved, 0.5 * (low + high))
        step = moved - offset
        offset = moved
        n_steps += 1
    return tl.exp(centre + offset)


@triton.jit
def _threshold(sample, low, high, bound, maximum, AGGREGATE: tl.constexpr, BLOCK: tl.constexpr):
    """By bisection on the ordered bits of the losses, down to one float, between `low` and `high` (kept, once crossed).

    chi_square: the largest level at which the second moment of the excess over it is at most `bound` times the square
    of the first. Else: the smallest level with less than `bound` of the mass above it, which is one of the losses.
    """
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if AGGREGATE == "chi_square":
            first, second = _excess(sample, maximum, from_ordered_bits(middle).to(tl.float64) - maximum, BLOCK)
            crossed = second > bound * first * first
        else:
            above, _ = _mass_around(sample, from_ordered_bits(middle), BLOCK)
            crossed = above < bound
        low = tl.where(crossed, low, middle)
        high = tl.where(crossed, middle, high)
    if AGGREGATE == "chi_square":
        level = from_ordered_bits(low)
    else:
        level = from_ordered_bits(high)
    return level


@triton.jit
def _solve(sample, parameter, max_weight, AGGREGATE: tl.constexpr, BLOCK: tl.constexpr):
    """The shape (`_multiplier` says what its five numbers mean) and the temperature."""
    zero = tl.full([], 0.0, tl.float64)
    a, b, c, d, e = zero, zero, zero, zero, zero
    tau = zero + float("nan")
    if AGGREGATE == "kl_tilt_unnormalized":
        _, mean, _ = _mean_and_variance(sample, zero, -float("inf"), BLOCK)
        a, b, c, d = mean, 1.0 / parameter, zero + 1.0, max_weight
        tau = parameter
    elif AGGREGATE != "mean":
        minimum, maximum = _extremes(sample, BLOCK)
        lowest, highest = minimum.to(tl.float64), maximum.to(tl.float64)
        if AGGREGATE == "soft_min":
            a, b = lowest, -1.0 / parameter
        else:
            a, b = highest, 1.0 / parameter
        if AGGREGATE == "kl_ball":
            _, at_maximum = _mass_around(sample, maximum, BLOCK)
            if parameter == 0.0:
                b = zero
            elif (minimum == maximum) | (parameter >= -tl.log(at_maximum)):
                b = zero + float("inf")
            else:
                b = _sharpness(sample, highest, parameter, BLOCK)
            tau = 1.0 / b
        if AGGREGATE == "kl_tilt":
            tau = parameter
        if AGGREGATE == "kl_tilt" or AGGREGATE == "kl_ball" or AGGREGATE == "soft_min":
            c, d = 1.0 / _partition(sample, a, b, BLOCK), zero + float("inf")
        elif AGGREGATE == "cvar" or AGGREGATE == "total_variation":
            _, at_maximum = _mass_around(sample, maximum, BLOCK)
            share = parameter
            c = 1.0 / parameter
            if AGGREGATE == "total_variation":
                moved = tl.minimum(parameter, 1.0 - at_maximum)
                share, c = 1.0 - moved, zero + 1.0
                e = moved / at_maximum
            bits = ordered_bits(maximum)
            level = _threshold(sample, ordered_bits(minimum) - 1, bits, share, highest, AGGREGATE, BLOCK)
            above, equal = _mass_around(sample, level, BLOCK)
            a, b, d = level.to(tl.float64), c * tl.minimum(share - above, equal) / equal, highest
        elif AGGREGATE == "chi_square":
            _, at_maximum = _mass_around(sample, maximum, BLOCK)
            a, b = highest, zero
            if parameter == 0.0:
                e = zero + 1.0
            elif (minimum == maximum) | ((1.0 + parameter) * at_maximum >= 1.0):
                d = 1.0 / at_maximum
            else:
                _, mean, variance = _mean_and_variance(sample, highest, -float("inf"), BLOCK)
                b = mean - tl.sqrt(variance / parameter)
                if b > lowest - highest:
                    # Not all are above the threshold: those that are tell where it lies among them.
                    bits = ordered_bits(minimum)
                    bound = 1.0 + parameter
                    level = _threshold(sample, bits, ordered_bits(maximum), bound, highest, AGGREGATE, BLOCK)
                    mass, mean, variance = _mean_and_variance(sample, highest, level, BLOCK)
                    b = mean - tl.sqrt(variance / (mass * bound - 1.0))
                first, _ = _excess(sample, highest, b, BLOCK)
                c = 1.0 / first
                d = -b * c
    return a, b, c, d, e, tau


@triton.jit
def _multiplier(b_losses, shape, AGGREGATE: tl.constexpr):
    """P_i / q_i, a function of the loss."""
    a, b, c, d, e = shape
    b_losses = b_losses.to(tl.float64)
    if AGGREGATE == "mean":
        b_multiplier = tl.full(b_losses.shape, 1.0, tl.float64)
    elif AGGREGATE == "cvar" or AGGREGATE == "total_variation":
        # c above the threshold a, b at it, and e more at the maximum d.
        b_multiplier = tl.where(b_losses > a, c, tl.where(b_losses == a, b, 0.0)) + tl.where(b_losses == d, e, 0.0)
    elif AGGREGATE == "chi_square":
        # c times the excess over the threshold b below the maximum a, d at the maximum, e for all.
        b_multiplier = e + tl.where(b_losses == a, d, c * tl.maximum(b_losses - a - b, 0.0))
    else:
        # c times the tilt of sharpness b relative to a, at most d.
        b_multiplier = tl.minimum(_tilted(b_losses, a, b) * c, d)
    return b_multiplier


@triton.jit
def _worst_case(b_losses, b_nominal, shape, AGGREGATE: tl.constexpr):
    """P, float64."""
    return tl.where(b_nominal > 0.0, b_nominal * _multiplier(b_losses, shape, AGGREGATE), 0.0)


@triton.jit
def _load(p_logps, o_pair, m_pair, BLOCK: tl.constexpr, dtype: tl.constexpr):
    if p_logps is None:
        b_logps = tl.zeros([BLOCK], dtype)
    else:
        b_logps = tl.load(p_logps + o_pair, mask=m_pair, other=0.0).to(dtype)
    return b_logps


# --- The three steps -------------------------------------------------------------------------------------------------


@triton.jit
def _take_margins(
    logps,
    p_losses,
    p_slopes,
    p_sums,
    i_block,
    n_pairs,
    beta,
    label_smoothing,
    LINK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the losses of a block, their slopes by the margin, and the sums for the statistics that are means."""
    dtype: tl.constexpr = p_losses.dtype.element_ty
    p_chosen, p_rejected, p_ref_chosen, p_ref_rejected = logps
    o_pair = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pair = o_pair < n_pairs
    b_chosen = _load(p_chosen, o_pair, m_pair, BLOCK, dtype)
    b_rejected = _load(p_rejected, o_pair, m_pair, BLOCK, dtype)
    b_chosen_ratios = b_chosen - _load(p_ref_chosen, o_pair, m_pair, BLOCK, dtype)
    b_rejected_ratios = b_rejected - _load(p_ref_rejected, o_pair, m_pair, BLOCK, dtype)
    p_sums += i_block * _N_MEANS
    tl.store(p_sums, tl.sum(b_chosen.to(tl.float64), axis=0))
    tl.store(p_sums + 1, tl.sum(b_rejected.to(tl.float64), axis=0))
    tl.store(p_sums + 2, tl.sum(b_chosen_ratios.to(tl.float64), axis=0))
    tl.store(p_sums + 3, tl.sum(b_rejected_ratios.to(tl.float64), axis=0))
    tl.store(p_sums + 4, tl.sum((b_chosen_ratios > b_rejected_ratios).to(tl.float64), axis=0))
    b_margins = b_chosen_ratios - b_rejected_ratios
    # A plain float argument would be rounded to float32.
    beta, label_smoothing = tl.full([], beta, dtype), tl.full([], label_smoothing, dtype)
    b_losses, b_slopes = link_loss_and_slope(b_margins, beta, label_smoothing, LINK)
    tl.store(p_losses + o_pair, b_losses, mask=m_pair)
    tl.store(p_slopes + o_pair, b_slopes, mask=m_pair)


@triton.jit
def _take_shape(
    p_losses,
    p_weights,
    p_sums,
    p_value,
    p_statistics,
    n_pairs,
    n_sums,
    parameter,
    max_weight,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the value and the statistics; the shape, and the sum of the weights."""
    o_block = tl.arange(0, BLOCK)
    for i_mean in tl.static_range(_N_MEANS):
        b_sum = tl.zeros([BLOCK], tl.float64)
        for i_block in range(0, n_sums, BLOCK):
            o_sum = i_block + o_block
            b_sum += tl.load(p_sums + o_sum * _N_MEANS + i_mean, mask=o_sum < n_sums, other=0.0)
        tl.store(p_statistics + i_mean, tl.sum(b_sum, axis=0) / n_pairs)

    b_total = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, n_pairs, BLOCK):
        b_total += _nominal(p_weights, i_block + o_block, i_block + o_block < n_pairs, 1.0)
    total = tl.sum(b_total, axis=0)
    sample = (p_losses, p_weights, n_pairs, total)
    parameter, max_weight = tl.full([], parameter, tl.float64), tl.full([], max_weight, tl.float64)
    a, b, c, d, e, tau = _solve(sample, parameter, max_weight, AGGREGATE, BLOCK)

    b_value = tl.zeros([BLOCK], tl.float64)
    b_sum = tl.zeros([BLOCK], tl.float64)
    b_square = tl.zeros([BLOCK], tl.float64)
    b_largest = tl.zeros([BLOCK], tl.float64)
    for i_block in range(0, n_pairs, BLOCK):
        b_losses, b_nominal = _block(sample, i_block, BLOCK)
        b_worst_case = _worst_case(b_losses, b_nominal, (a, b, c, d, e), AGGREGATE)
        b_value += tl.where(b_nominal > 0.0, b_worst_case * b_losses.to(tl.float64), 0.0)
        b_sum += b_worst_case
        b_square += b_worst_case * b_worst_case
        b_largest = tl.maximum(b_largest, b_worst_case)
    value, sum_worst_case = tl.sum(b_value, axis=0), tl.sum(b_sum, axis=0)
    if AGGREGATE == "soft_min":
        value = a + parameter * tl.log(c)
    tl.store(p_value, value)
    tl.store(p_statistics + _N_MEANS, sum_worst_case * sum_worst_case / tl.sum(b_square, axis=0))
    tl.store(p_statistics + _N_MEANS + 1, tl.max(b_largest, axis=0))
    tl.store(p_statistics + _N_MEANS + 2, tau)
    return a, b, c, d, e, total


@triton.jit
def _take_gradient(
    p_worst_case, p_gradient, p_weights, shape, total, i_block, n_pairs, AGGREGATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Put P and P times the slope in the place of the losses and the slopes."""
    o_pair = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pair = o_pair < n_pairs
    b_losses = tl.load(p_worst_case + o_pair, mask=m_pair, other=0.0)
    b_slopes = tl.load(p_gradient + o_pair, mask=m_pair, other=0.0)
    b_nominal = _nominal(p_weights, o_pair, m_pair, total)
    b_worst_case = _worst_case(b_losses, b_nominal, shape, AGGREGATE).to(b_losses.dtype)
    tl.store(p_worst_case + o_pair, b_worst_case, mask=m_pair)
    tl.store(p_gradient + o_pair, b_worst_case * b_slopes, mask=m_pair)


@triton.jit(do_not_specialize=["n_pairs"])
def preference_loss_kernel(
    p_chosen,  # [B] contiguous, like all that follow
    p_rejected,  # [B] or None, and so the next three
    p_ref_chosen,
    p_ref_rejected,
    p_weights,
    p_value,  # [] float32 or float64, and so the next three
    p_gradient,  # [B]
    p_worst_case,  # [B]
    p_statistics,  # [8]
    p_sums,  # [blocks, 5] float64
    n_pairs,
    beta: tl.float64,
    label_smoothing: tl.float64,
    parameter: tl.float64,
    max_weight: tl.float64,
    LINK: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    logps = (p_chosen, p_rejected, p_ref_chosen, p_ref_rejected)
    n_blocks = tl.cdiv(n_pairs, BLOCK)
    for i_block in range(n_blocks):
        _take_margins(logps, p_worst_case, p_gradient, p_sums, i_block, n_pairs, beta, label_smoothing, LINK, BLOCK)
    tl.debug_barrier()  # from here threads read what others wrote
    a, b, c, d, e, total = _take_shape(
        p_worst_case,
        p_weights,
        p_sums,
        p_value,
        p_statistics,
        n_pairs,
        n_blocks,
        parameter,
        max_weight,
        AGGREGATE,
        BLOCK,
    )
    tl.debug_barrier()  # and from here overwrite it
    for i_block in range(n_blocks):
        _take_gradient(p_worst_case, p_gradient, p_weights, (a, b, c, d, e), total, i_block, n_pairs, AGGREGATE, BLOCK)


@triton.jit(do_not_specialize=["n_pairs"])
def preference_loss_margin_kernel(
    p_chosen,  # [B] contiguous, like all that follow
    p_rejected,  # [B] or None, and so the next two
    p_ref_chosen,
    p_ref_rejected,
    p_losses,  # [B] float32 or float64
    p_slopes,  # [B] as p_losses
    p_sums,  # [blocks, 5] float64
    n_pairs,
    beta: tl.float64,
    label_smoothing: tl.float64,
    LINK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    logps = (p_chosen, p_rejected, p_ref_chosen, p_ref_rejected)
    i_block = tl.program_id(0).to(tl.int64)
    _take_margins(logps, p_losses, p_slopes, p_sums, i_block, n_pairs, beta, label_smoothing, LINK, BLOCK)


@triton.jit(do_not_specialize=["n_pairs", "n_sums"])
def preference_loss_shape_kernel(
    p_losses,  # [B] float32 or float64, contiguous, like all that follow
    p_weights,  # [B], or None
    p_sums,  # [n_sums, 5] float64
    p_value,  # [] as p_losses
    p_statistics,  # [8] as p_losses
    p_shape,  # [6] float64: the shape and the sum of the weights
    n_pairs,
    n_sums,
    parameter: tl.float64,
    max_weight: tl.float64,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    shape_and_total = _take_shape(
        p_losses, p_weights, p_sums, p_value, p_statistics, n_pairs, n_sums, parameter, max_weight, AGGREGATE, BLOCK
    )
    for i_number in tl.static_range(6):
        tl.store(p_shape + i_number, shape_and_total[i_number])


@triton.jit(do_not_specialize=["n_pairs"])
def preference_loss_gradient_kernel(
    p_worst_case,  # [B] float32 or float64, contiguous, like all that follow: the losses, to become P
    p_gradient,  # [B] as p_worst_case: the slopes, to become the gradient
    p_weights,  # [B], or None
    p_shape,  # [6] float64
    n_pairs,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    a, b, c = tl.load(p_shape), tl.load(p_shape + 1), tl.load(p_shape + 2)
    d, e, total = tl.load(p_shape + 3), tl.load(p_shape + 4), tl.load(p_shape + 5)
    i_block = tl.program_id(0).to(tl.int64)
    _take_gradient(p_worst_case, p_gradient, p_weights, (a, b, c, d, e), total, i_block, n_pairs, AGGREGATE, BLOCK)


def preference_loss(
    chosen: Tensor,  # [B] of any float dtype, like all that follow
    rejected: Tensor | None,  # [B]; None counts as zeros, here and below
    ref_chosen: Tensor | None,  # [B]
    ref_rejected: Tensor | None,  # [B]
    weights: Tensor | None,  # [B], non-negative; None counts as ones
    link: str,
    beta: float,
    label_smoothing: float,
    aggregate: str,
    parameter: float,
    max_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [B], [B] and [8], float32 (float64 if any log-probability is)
    """The value, its gradient by the margins, P, and the statistics of `naive.preference_loss.STATISTICS`."""
    logps = (chosen, rejected, ref_chosen, ref_rejected)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in logps) else torch.float32
    device, n_pairs = chosen.device, len(chosen)
    gradient = torch.empty(n_pairs, dtype=dtype, device=device)
    worst_case = torch.empty(n_pairs, dtype=dtype, device=device)
    if n_pairs == 0:
        nothing = torch.full((8,), float("nan"), dtype=dtype, device=device)
        return torch.zeros((), dtype=dtype, device=device), gradient, worst_case, nothing
    value = torch.empty((), dtype=dtype, device=device)
    statistics = torch.empty(8, dtype=dtype, device=device)
    at_once = n_pairs <= MOST_AT_ONCE
    block, num_warps = block_and_warps(n_pairs, value.element_size())
    n_blocks = triton.cdiv(n_pairs, block if at_once else PARALLEL_BLOCK)
    sums = torch.empty((n_blocks, 5), dtype=torch.float64, device=device)
    inputs = [x if x is None else x.contiguous() for x in logps]
    weights = weights if weights is None else weights.contiguous()
    alone = {"AGGREGATE": aggregate, "BLOCK": block, "num_warps": num_warps}
    parallel = {"BLOCK": PARALLEL_BLOCK, "num_warps": 4}
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(chosen):
        if at_once:
            preference_loss_kernel[(1,)](
                *inputs,
                weights,
                value,
                gradient,
                worst_case,
                statistics,
                sums,
                n_pairs,
                beta,
                label_smoothing,
                parameter,
                max_weight,
                LINK=link,
                **alone,
            )
            return value, gradient, worst_case, statistics
        shape = torch.empty(6, dtype=torch.float64, device=device)
        preference_loss_margin_kernel[(n_blocks,)](
            *inputs, worst_case, gradient, sums, n_pairs, beta, label_smoothing, LINK=link, **parallel
        )
        preference_loss_shape_kernel[(1,)](
            worst_case, weights, sums, value, statistics, shape, n_pairs, n_blocks, parameter, max_weight, **alone
        )
        preference_loss_gradient_kernel[(n_blocks,)](
            worst_case, gradient, weights, shape, n_pairs, AGGREGATE=aggregate, **parallel
        )
    return value, gradient, worst_case, statistics
