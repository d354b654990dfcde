r"""Kernel of the op `token_logratios`: log-ratios of the policy to the reference, both logits read once.

.. math:: r_t = \log \pi(y_t) - \log \pi_\mathrm{ref}(y_t)

with both as in `token_logps`. One program serves one token: it takes the two rows block by block in turn, so that the
loads of both are in flight together. The reference has no gradient; the policy's is `token_logps_bwd` of its lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._row import LOG2_E, add_block, block_offsets, is_aligned, join_lanes, row_tile, store_lse


@triton.jit(do_not_specialize=["n_time", "ignore_index"])
def token_logratios_fwd_kernel(
    p_policy_logits,  # [B, T, V], V contiguous
    p_ref_logits,  # [B, T, V], V contiguous
    p_labels,  # [B, T] int64, contiguous
    p_logratios,  # [B, T] float32 or float64, contiguous
    p_lse,  # [2, B, T], the policy's, as p_logratios
    n_time,
    n_vocabulary,
    stride_policy_batch,
    stride_policy_time,
    stride_ref_batch,
    stride_ref_time,
    ignore_index,
    inverse_temperature: tl.float64,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    dtype: tl.constexpr = p_lse.dtype.element_ty
    BLOCK: tl.constexpr = LOADS * LANES * VECTOR
    i_row = tl.program_id(0)
    n_rows = tl.num_programs(0).to(tl.int64)
    label = tl.load(p_labels + i_row)

    if (label == ignore_index) | (label < 0) | (label >= n_vocabulary):
        b_unread = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(p_logratios + i_row, b_unread)
        tl.store(p_lse + i_row, b_unread)
        tl.store(p_lse + n_rows + i_row, b_unread)
    else:
        i_batch = (i_row // n_time).to(tl.int64)
        i_time = (i_row % n_time).to(tl.int64)
        p_policy = p_policy_logits + i_batch * stride_policy_batch + i_time * stride_policy_time
        p_ref = p_ref_logits + i_batch * stride_ref_batch + i_time * stride_ref_time
        b_target = tl.load(p_policy + label).to(dtype)
        b_ref_target = tl.load(p_ref + label).to(dtype)

        b_inverse_temperature = tl.full([], inverse_temperature, dtype)
        scale = LOG2_E * b_inverse_temperature
        b_max = tl.full([LANES], -float("inf"), dtype)
        b_ref_max = tl.full([LANES], -float("inf"), dtype)
        b_sum = tl.zeros([LANES], dtype)
        b_ref_sum = tl.zeros([LANES], dtype)
        b_none = tl.zeros([LANES], dtype)  # no entropy
        o_block = block_offsets(LOADS, LANES, VECTOR)

        n_whole = n_vocabulary // BLOCK * BLOCK
        for i_block in range(0, n_whole, BLOCK):
            b_logits = tl.load(p_policy + i_block + o_block).to(dtype)
            b_ref_logits = tl.load(p_ref + i_block + o_block).to(dtype)
            b_max, b_sum, b_none = add_block(b_max, b_sum, b_none, b_logits, scale, False)
            b_ref_max, b_ref_sum, b_none = add_block(b_ref_max, b_ref_sum, b_none, b_ref_logits, scale, False)
        if n_whole < n_vocabulary:
            m_block = n_whole + o_block < n_vocabulary
            b_logits = tl.load(p_policy + n_whole + o_block, mask=m_block, other=-float("inf")).to(dtype)
            b_ref_logits = tl.load(p_ref + n_whole + o_block, mask=m_block, other=-float("inf")).to(dtype)
            b_max, b_sum, b_none = add_block(b_max, b_sum, b_none, b_logits, scale, False)
            b_ref_max, b_ref_sum, b_none = add_block(b_ref_max, b_ref_sum, b_none, b_ref_logits, scale, False)

        b_row_max, b_total, _ = join_lanes(b_max, b_sum, b_none, scale, False)
        b_ref_row_max, b_ref_total, _ = join_lanes(b_ref_max, b_ref_sum, b_none, scale, False)
        b_log_sum = tl.log(b_total)
        store_lse(p_lse, i_row, n_rows, b_row_max, b_log_sum, b_inverse_temperature)
        b_logps = (b_target - b_row_max) * b_inverse_temperature - b_log_sum
        b_ref_logps = (b_ref_target - b_ref_row_max) * b_inverse_temperature - tl.log(b_ref_total)
        tl.store(p_logratios + i_row, b_logps - b_ref_logps)


def token_logratios(
    policy_logits: Tensor,  # [B, T, V] any strides, V contiguous
    ref_logits: Tensor,  # [B, T, V] any strides, V contiguous, of any float dtype
    labels: Tensor,  # [B, T] int64, contiguous
    ignore_index: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [B, T] and [2, B, T], float32 (float64 for float64 policy_logits)
    """Log-ratios of the labels, and the two parts of the policy's log-sum-exp."""
    n_batch, n_time, n_vocabulary = policy_logits.shape
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    logratios = torch.empty((n_batch, n_time), dtype=dtype, device=policy_logits.device)
    lse = torch.empty((2, n_batch, n_time), dtype=dtype, device=policy_logits.device)
    n_rows = n_batch * n_time
    if n_rows == 0:
        return logratios, lse
    # Two loads of each row: four in flight, as where there is one.
    aligned = is_aligned(policy_logits) and is_aligned(ref_logits)
    loads, lanes, vector, num_warps = row_tile(n_vocabulary, policy_logits.element_size(), 2, aligned)
    with torch.cuda.device_of(policy_logits):
        token_logratios_fwd_kernel[(n_rows,)](
            policy_logits,
            ref_logits,
            labels,
            logratios,
            lse,
            n_time,
            n_vocabulary,
            policy_logits.stride(0),
            policy_logits.stride(1),
            ref_logits.stride(0),
            ref_logits.stride(1),
            ignore_index,
            1.0 / temperature,
            LOADS=loads,
            LANES=lanes,
            VECTOR=vector,
            num_warps=num_warps,
        )
    return logratios, lse
