"""The links of margins to losses, and floats as integers of the same order: what the coupled losses' kernels share.

The formulas are those of `naive.links`; s is the logistic sigmoid.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(b_values):
    """log(1 + y) for 0 <= y <= 1."""
    if b_values.dtype == tl.float32:
        # As 2 artanh(y / (2 + y)), a series in at most 1 / 9: near 1 the GPU's own logarithm has no digits to spare.
        b_ratio = b_values / (2.0 + b_values)
        b_square = b_ratio * b_ratio
        b_series = 1.0 / 9 + b_square * (1.0 / 11 + b_square * (1.0 / 13 + b_square * (1.0 / 15)))
        b_series = 1.0 / 3 + b_square * (1.0 / 5 + b_square * (1.0 / 7 + b_square * b_series))
        b_log = 2.0 * b_ratio + 2.0 * b_ratio * b_square * b_series
    else:
        # Kahan: what 1 + y rounds off is in the denominator too.
        b_more = 1.0 + b_values
        b_log = tl.where(b_more == 1.0, b_values, tl.log(b_more) * (b_values / (b_more - 1.0)))
    return b_log


@triton.jit
def link_loss_and_slope(b_margins, beta, label_smoothing, LINK: tl.constexpr):
    """The loss of each margin and its derivative; beta and label_smoothing in the margins' dtype."""
    if LINK == "logistic" or LINK == "robust":
        b_scaled = beta * b_margins
        b_exp = tl.exp(-tl.abs(b_scaled))
        b_log1p = _log1p(b_exp)
        b_loss = tl.maximum(-b_scaled, 0.0) + b_log1p  # -log s(x)
        b_likely = 1.0 / (1.0 + b_exp)
        b_unlikely = b_exp * b_likely
        b_miss = tl.where(b_scaled > 0.0, b_unlikely, b_likely)  # s(-x)
        if LINK == "logistic":
            b_loss += label_smoothing * b_scaled
            b_slope = beta * (label_smoothing - b_miss)
        else:
            b_flipped = tl.maximum(b_scaled, 0.0) + b_log1p  # -log s(x) of the flipped pair
            b_hit = tl.where(b_scaled > 0.0, b_likely, b_unlikely)
            inverse = 1.0 / (1.0 - 2.0 * label_smoothing)
            b_loss = ((1.0 - label_smoothing) * b_loss - label_smoothing * b_flipped) * inverse
            b_slope = -beta * inverse * ((1.0 - label_smoothing) * b_miss + label_smoothing * b_hit)
    elif LINK == "hinge":
        b_short = 1.0 - beta * b_margins
        b_loss = tl.maximum(b_short, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_slope = tl.where(b_short > 0.0, -beta, 0.0)
    elif LINK == "squared_hinge":
        b_short = tl.maximum(beta - b_margins, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_loss = b_short * b_short
        b_slope = -2.0 * b_short
    elif LINK == "least_squares":
        b_short = beta - b_margins
        b_loss = b_short * b_short
        b_slope = -2.0 * b_short
    elif LINK == "ipo":
        b_excess = b_margins - 0.5 / beta
        b_loss = b_excess * b_excess
        b_slope = 2.0 * b_excess
    else:
        tl.static_assert(LINK == "identity", "an unknown link")
        b_loss = b_margins
        b_slope = tl.zeros_like(b_margins) + 1.0
    return b_loss, b_slope


@triton.jit
def ordered_bits(b_values):
    """int32 of float32, int64 of float64, in the same order; the two zeros are one. `from_ordered_bits` undoes it."""
    b_values = tl.where(b_values == 0.0, 0.0, b_values)
    if b_values.dtype == tl.float32:
        b_bits = b_values.to(tl.int32, bitcast=True)
        b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    else:
        b_bits = b_values.to(tl.int64, bitcast=True)
        b_ordered = b_bits ^ ((b_bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return b_ordered


@triton.jit
def from_ordered_bits(b_ordered):
    if b_ordered.dtype == tl.int32:
        b_values = (b_ordered ^ ((b_ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        b_values = (b_ordered ^ ((b_ordered >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    return b_values
