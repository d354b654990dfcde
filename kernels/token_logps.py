r"""Kernels of the op `token_logps`: one read of the logits forward, one read and one write backward.

.. math:: \log p_t = z_{t, y_t} - \mathrm{lse}_t, \quad \mathrm{lse}_t = \log \sum_v e^{z_{t,v}}, \quad z = s / T, \quad
    s = c \tanh(x / c), \quad p = e^{z - \mathrm{lse}}

.. math:: H_t = \mathrm{lse}_t - \sum_v p_{t,v} z_{t,v}, \quad dx = (g / T) (1_y - p) \, ds/dx

with T the temperature, c the soft cap (s = x without one) and g the gradient of logps. The sums are the online form of
Milakov and Gimelshein, arXiv 1805.02867. One program serves one token, and nothing is summed across programs: the same
input gives the same bits.

lse [2, B, T] is the largest z and the log of the sum of e^(z - largest): one float32 would lose the digits of
probabilities to a large logit. The first is rounded, and the second is relative to the rounded one; so the backward
gets z - lse back, by a fused multiply-add, as exactly as the forward had it.

A row whose label is `ignore_index` is not read and gives 0. Forward, any other label outside [0, V) is not read either
and gives NaN in every output: an exception would make the host wait for the device. Backward, a label outside the
logits, which may be a tile of the vocabulary, has no target there. NaN and +inf among the logits give NaN; -inf is a
token that cannot occur (under a soft cap both are merely the cap, with their sign).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._row import (
    LOG2_E,
    add_block,
    block_offsets,
    is_aligned,
    join_lanes,
    lane_max,
    lane_sum,
    row_tile,
    soft_cap,
    store_lse,
)

# A changing sequence length, padding label, tile or expanded gradient must not compile a kernel anew.
_STRIDES_GRAD_LOGPS = ["stride_grad_logps_batch", "stride_grad_logps_time"]


@triton.jit(do_not_specialize=["n_time", "ignore_index"])
def token_logps_fwd_kernel(
    p_logits,  # [B, T, V], V contiguous
    p_labels,  # [B, T] int64, contiguous
    p_logps,  # [B, T] float32 or float64, contiguous
    p_lse,  # [2, B, T], as p_logps
    p_statistics,  # [N_STATISTICS, B, T], as p_logps
    n_time,
    n_vocabulary,
    stride_batch,
    stride_time,
    ignore_index,
    inverse_temperature: tl.float64,  # a plain float argument would be rounded to float32
    softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    N_STATISTICS: tl.constexpr,  # 0; 1: entropy; 3: also the top-1 hit and the mean of s
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    dtype: tl.constexpr = p_lse.dtype.element_ty
    BLOCK: tl.constexpr = LOADS * LANES * VECTOR
    i_row = tl.program_id(0)
    n_rows = tl.num_programs(0).to(tl.int64)  # times row or statistic, this may pass 2^31
    label = tl.load(p_labels + i_row)

    if (label == ignore_index) | (label < 0) | (label >= n_vocabulary):
        b_unread = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(p_logps + i_row, b_unread)
        for i_output in tl.static_range(2):
            tl.store(p_lse + i_output * n_rows + i_row, b_unread)
        for i_output in tl.static_range(N_STATISTICS):
            tl.store(p_statistics + i_output * n_rows + i_row, b_unread)
    else:
        i_batch = (i_row // n_time).to(tl.int64)
        i_time = (i_row % n_time).to(tl.int64)
        p_row = p_logits + i_batch * stride_batch + i_time * stride_time
        b_label_logit = tl.load(p_row + label).to(dtype)

        b_inverse_temperature = tl.full([], inverse_temperature, dtype)
        scale = LOG2_E * b_inverse_temperature
        b_cap = tl.full([], softcap, dtype)
        b_inverse_cap = 1.0 / b_cap
        b_target = soft_cap(b_label_logit, b_cap, b_inverse_cap, HAS_SOFTCAP)

        b_max = tl.full([LANES], -float("inf"), dtype)
        b_sum = tl.zeros([LANES], dtype)
        b_weighted = tl.zeros([LANES], dtype)
        b_largest = tl.full([LANES], -float("inf"), dtype)  # the cap may round several logits to one s
        b_plain_sum = tl.zeros([LANES], dtype)
        o_block = block_offsets(LOADS, LANES, VECTOR)

        # Whole blocks go without a mask: a mask that ends at any n_vocabulary would forbid 16-byte loads.
        n_whole = n_vocabulary // BLOCK * BLOCK
        for i_block in range(0, n_whole, BLOCK):
            b_logits = tl.load(p_row + i_block + o_block).to(dtype)
            b_capped = soft_cap(b_logits, b_cap, b_inverse_cap, HAS_SOFTCAP)
            b_max, b_sum, b_weighted = add_block(b_max, b_sum, b_weighted, b_capped, scale, N_STATISTICS > 0)
            if N_STATISTICS > 1:
                b_largest = tl.maximum(b_largest, lane_max(b_logits))
                b_plain_sum += lane_sum(b_capped)
        if n_whole < n_vocabulary:
            m_block = n_whole + o_block < n_vocabulary
            b_logits = tl.load(p_row + n_whole + o_block, mask=m_block, other=-float("inf")).to(dtype)
            b_capped = soft_cap(b_logits, b_cap, b_inverse_cap, HAS_SOFTCAP)
            if HAS_SOFTCAP:
                b_capped = tl.where(m_block, b_capped, -float("inf"))
            b_max, b_sum, b_weighted = add_block(b_max, b_sum, b_weighted, b_capped, scale, N_STATISTICS > 0)
            if N_STATISTICS > 1:
                b_largest = tl.maximum(b_largest, lane_max(b_logits))
                b_plain_sum += lane_sum(tl.where(m_block, b_capped, 0.0))

        b_row_max, b_total, b_weighted_total = join_lanes(b_max, b_sum, b_weighted, scale, N_STATISTICS > 0)
        b_log_sum = tl.log(b_total)
        store_lse(p_lse, i_row, n_rows, b_row_max, b_log_sum, b_inverse_temperature)
        # Not target - lse: for large logits lse has already lost the digits that this difference keeps.
        tl.store(p_logps + i_row, (b_target - b_row_max) * b_inverse_temperature - b_log_sum)
        if N_STATISTICS > 0:
            b_mean = b_weighted_total / b_total
            tl.store(p_statistics + i_row, b_log_sum - b_mean * b_inverse_temperature)
        if N_STATISTICS > 1:
            b_hit = tl.where(b_label_logit == tl.max(b_largest, axis=0), 1.0, 0.0)
            tl.store(p_statistics + n_rows + i_row, b_hit)
            tl.store(p_statistics + 2 * n_rows + i_row, tl.sum(b_plain_sum, axis=0) / n_vocabulary)


@triton.jit
def _gradient(
    b_logits,
    m_target,
    b_lse,
    b_log2_sum,
    b_grad,
    b_inverse_temperature,
    b_cap,
    b_inverse_cap,
    HAS_SOFTCAP: tl.constexpr,
):
    """(g / T) (1_y - p) ds/dx; the 1 at the target is added here, in float32, and the result is rounded once."""
    b_capped = soft_cap(b_logits, b_cap, b_inverse_cap, HAS_SOFTCAP)
    b_scaled = tl.fma(b_capped, b_inverse_temperature, -b_lse)
    b_gradient = b_grad * (tl.where(m_target, 1.0, 0.0) - tl.exp2(b_scaled * LOG2_E - b_log2_sum))
    if HAS_SOFTCAP:
        b_tanh = b_capped * b_inverse_cap
        b_gradient *= 1.0 - b_tanh * b_tanh
    return b_gradient


@triton.jit(do_not_specialize=["n_time", "vocabulary_start", *_STRIDES_GRAD_LOGPS, "ignore_index"])
def token_logps_bwd_kernel(
    p_grad_logps,  # [B, T]
    p_logits,  # [B, T, V], V contiguous; possibly a tile of the vocabulary
    p_labels,  # [B, T] int64, contiguous
    p_lse,  # [2, B, T] float32 or float64, contiguous
    p_grad_logits,  # [B, T, V], V contiguous; may be p_logits itself: a block is read before it is written
    n_time,
    n_vocabulary,
    vocabulary_start,
    stride_grad_logps_batch,
    stride_grad_logps_time,
    stride_batch,
    stride_time,
    stride_grad_batch,
    stride_grad_time,
    ignore_index,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = p_lse.dtype.element_ty
    i_row = tl.program_id(0)
    i_batch = (i_row // n_time).to(tl.int64)
    i_time = (i_row % n_time).to(tl.int64)
    p_row = p_logits + i_batch * stride_batch + i_time * stride_time
    p_grad_row = p_grad_logits + i_batch * stride_grad_batch + i_time * stride_grad_time
    o_vocabulary = tl.arange(0, BLOCK)
    n_whole = n_vocabulary // BLOCK * BLOCK
    label = tl.load(p_labels + i_row)

    if label == ignore_index:
        b_zero = tl.zeros([BLOCK], p_grad_logits.dtype.element_ty)
        for i_block in range(0, n_whole, BLOCK):
            tl.store(p_grad_row + i_block + o_vocabulary, b_zero)
        if n_whole < n_vocabulary:
            m_block = n_whole + o_vocabulary < n_vocabulary
            tl.store(p_grad_row + n_whole + o_vocabulary, b_zero, mask=m_block)
    else:
        target = (label - vocabulary_start).to(tl.int32)
        b_inverse_temperature = tl.full([], inverse_temperature, dtype)
        b_cap = tl.full([], softcap, dtype)
        b_inverse_cap = 1.0 / b_cap
        p_grad = p_grad_logps + i_batch * stride_grad_logps_batch + i_time * stride_grad_logps_time
        b_grad = tl.load(p_grad).to(dtype) * b_inverse_temperature
        b_lse = tl.load(p_lse + i_row)
        b_log2_sum = tl.load(p_lse + tl.num_programs(0) + i_row) * LOG2_E
        for i_block in range(0, n_whole, BLOCK):
            o_block = i_block + o_vocabulary
            b_logits = tl.load(p_row + o_block).to(dtype)
            b_gradient = _gradient(
                b_logits,
                o_block == target,
                b_lse,
                b_log2_sum,
                b_grad,
                b_inverse_temperature,
                b_cap,
                b_inverse_cap,
                HAS_SOFTCAP,
            )
            tl.store(p_grad_row + o_block, b_gradient.to(p_grad_logits.dtype.element_ty))
        # In halves: every masked element takes registers.
        for i_block in range(n_whole, n_vocabulary, BLOCK // 2):
            o_block = i_block + tl.arange(0, BLOCK // 2)
            m_block = o_block < n_vocabulary
            b_logits = tl.load(p_row + o_block, mask=m_block, other=-float("inf")).to(dtype)
            b_gradient = _gradient(
                b_logits,
                o_block == target,
                b_lse,
                b_log2_sum,
                b_grad,
                b_inverse_temperature,
                b_cap,
                b_inverse_cap,
                HAS_SOFTCAP,
            )
            tl.store(p_grad_row + o_block, b_gradient.to(p_grad_logits.dtype.element_ty), mask=m_block)


def token_logps_fwd(
    logits: Tensor,  # [B, T, V] any strides, V contiguous
    labels: Tensor,  # [B, T] int64, contiguous
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    n_statistics: int,  # 0, 1 or 3
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T], [2, B, T] and [n, B, T], float32 (float64 for float64 logits)
    """Log-probabilities of the labels, the two parts of the log-sum-exp, and statistics.

    The statistics are the entropy in nats, the top-1 hit (1 where no token has a larger logit than the label), and the
    mean over the vocabulary of the soft-capped logits.
    """
    n_batch, n_time, n_vocabulary = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps = torch.empty((n_batch, n_time), dtype=dtype, device=logits.device)
    lse = torch.empty((2, n_batch, n_time), dtype=dtype, device=logits.device)
    statistics = torch.empty((n_statistics, n_batch, n_time), dtype=dtype, device=logits.device)
    n_rows = n_batch * n_time
    if n_rows == 0:
        return logps, lse, statistics
    loads, lanes, vector, num_warps = row_tile(
        n_vocabulary, logits.element_size(), most_loads(softcap), is_aligned(logits)
    )
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(logits):
        token_logps_fwd_kernel[(n_rows,)](
            logits,
            labels,
            logps,
            lse,
            statistics,
            n_time,
            n_vocabulary,
            logits.stride(0),
            logits.stride(1),
            ignore_index,
            1.0 / temperature,
            softcap or 1.0,
            HAS_SOFTCAP=softcap is not None,
            N_STATISTICS=n_statistics,
            LOADS=loads,
            LANES=lanes,
            VECTOR=vector,
            num_warps=num_warps,
        )
    return logps, lse, statistics


def token_logps_bwd(
    grad_logps: Tensor,  # [B, T] any strides
    logits: Tensor,  # [B, T, V] any strides, V contiguous
    labels: Tensor,  # [B, T] int64, contiguous
    lse: Tensor,  # [2, B, T] from token_logps_fwd, contiguous
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> Tensor:  # [B, T, V] contiguous, dtype of logits
    """Gradient of the logits."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    token_logps_bwd_out(grad_logps, logits, labels, lse, ignore_index, temperature, softcap, 0, grad_logits)
    return grad_logits


def token_logps_bwd_out(
    grad_logps: Tensor,  # [B, T] any strides
    logits: Tensor,  # [B, T, V] any strides, V contiguous
    labels: Tensor,  # [B, T] int64, contiguous
    lse: Tensor,  # [2, B, T] of the whole vocabulary, contiguous
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    vocabulary_start: int,  # the token of the first logit
    grad_logits: Tensor,  # [B, T, V] any strides, V contiguous, dtype of logits; may be logits
) -> None:
    """`token_logps_bwd` for a tile of the vocabulary, written to `grad_logits`."""
    n_batch, n_time, n_vocabulary = logits.shape
    n_rows = n_batch * n_time
    if n_rows == 0:
        return
    loads, lanes, vector, num_warps = row_tile(n_vocabulary, logits.element_size(), most_loads(softcap))
    with torch.cuda.device_of(logits):
        token_logps_bwd_kernel[(n_rows,)](
            grad_logps,
            logits,
            labels,
            lse,
            grad_logits,
            n_time,
            n_vocabulary,
            vocabulary_start,
            grad_logps.stride(0),
            grad_logps.stride(1),
            logits.stride(0),
            logits.stride(1),
            grad_logits.stride(0),
            grad_logits.stride(1),
            ignore_index,
            1.0 / temperature,
            softcap or 1.0,
            HAS_SOFTCAP=softcap is not None,
            BLOCK=loads * lanes * vector,
            num_warps=num_warps,
        )


def most_loads(softcap: float | None) -> int:
    """A soft cap takes as many registers as the loads of half a block."""
    return 4 if softcap is None else 2
