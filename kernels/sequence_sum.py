r"""Kernels of the ops `sequence_sum` and `sequence_repeat`: tokens to padded or packed sequences, and back.

.. math:: s_j = \frac{1}{n_j} \sum_{t \in j} x_t

with n_j the number of labels in the sequence other than `ignore_index`, at least 1; or 1 without the average. One
program adds up one sequence in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Small kernels gain nothing from knowing these, and must not be compiled anew when they change.
_NOT_SPECIALIZED = [
    "n_time",
    "stride_sequence",
    "stride_time",
    "stride_labels_sequence",
    "stride_labels_time",
    "ignore_index",
]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def sequence_sum_kernel(
    p_values,  # [B, T] or [N], any strides
    p_labels,  # int64, as p_values
    p_cu_seqlens,  # [S + 1] int32 or int64, contiguous; not touched unless PACKED
    p_sums,  # [B] or [S]
    p_counts,  # [B] or [S]
    n_time,
    stride_sequence,
    stride_time,
    stride_labels_sequence,
    stride_labels_time,
    ignore_index,
    PACKED: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = p_sums.dtype.element_ty
    i_sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        i_start = tl.load(p_cu_seqlens + i_sequence).to(tl.int64)
        n_tokens = tl.load(p_cu_seqlens + i_sequence + 1).to(tl.int64) - i_start
        p_values += i_start * stride_time
        p_labels += i_start * stride_labels_time
    else:
        n_tokens = tl.full([], n_time, tl.int64)
        p_values += i_sequence * stride_sequence
        p_labels += i_sequence * stride_labels_sequence

    o_token = tl.arange(0, BLOCK).to(tl.int64)
    b_sum = tl.zeros([BLOCK], dtype)
    b_count = tl.zeros([BLOCK], tl.int32)
    for i_block in range(0, n_tokens, BLOCK):
        m_token = i_block + o_token < n_tokens
        b_sum += tl.load(p_values + (i_block + o_token) * stride_time, mask=m_token, other=0.0)
        if AVERAGE:
            b_label = tl.load(p_labels + (i_block + o_token) * stride_labels_time, mask=m_token, other=ignore_index)
            b_count += (b_label != ignore_index).to(tl.int32)
    b_total = tl.sum(b_sum, axis=0)
    b_number = tl.full([], 1.0, dtype)
    if AVERAGE:
        b_number = tl.maximum(tl.sum(b_count, axis=0), 1).to(dtype)
        b_total = b_total / b_number
    tl.store(p_sums + i_sequence, b_total)
    tl.store(p_counts + i_sequence, b_number)


@triton.jit(do_not_specialize=["n_tokens", "n_sequences", "stride_sequence", "n_steps"])
def sequence_repeat_kernel(
    p_values,  # [S], any stride
    p_cu_seqlens,  # [S + 1] int32 or int64, contiguous
    p_tokens,  # [N] contiguous
    n_tokens,
    n_sequences,
    stride_sequence,
    n_steps,  # of the search: the bits of n_sequences
    BLOCK: tl.constexpr,
):
    o_token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_token = o_token < n_tokens
    # Binary search for the last sequence that starts at or before the token, which skips the empty ones.
    b_low = tl.zeros([BLOCK], tl.int64)
    b_high = tl.zeros([BLOCK], tl.int64) + n_sequences
    for _ in range(n_steps):
        b_middle = (b_low + b_high) // 2
        m_started = tl.load(p_cu_seqlens + b_middle) <= o_token
        b_low = tl.where(m_started, b_middle, b_low)
        b_high = tl.where(m_started, b_high, b_middle)
    b_values = tl.load(p_values + b_low * stride_sequence, mask=m_token)
    tl.store(p_tokens + o_token, b_values, mask=m_token)


def sequence_sum(
    values: Tensor,  # [B, T], or [N] with cu_seqlens; any strides
    labels: Tensor,  # int64, same shape
    cu_seqlens: Tensor | None,  # [S + 1] int32 or int64, contiguous
    ignore_index: int,
    average: bool,
) -> tuple[Tensor, Tensor]:  # both [B] or [S], dtype of values
    """Sums (with `average` means) over the sequences, and what they were divided by (1 without `average`)."""
    n_time = values.shape[-1]
    n_sequences = len(values) if cu_seqlens is None else len(cu_seqlens) - 1
    sums = torch.empty(n_sequences, dtype=values.dtype, device=values.device)
    counts = torch.empty_like(sums)
    if n_sequences == 0:
        return sums, counts
    with torch.cuda.device_of(values):
        sequence_sum_kernel[(n_sequences,)](
            values,
            labels,
            cu_seqlens,
            sums,
            counts,
            n_time,
            values.stride(0),
            values.stride(-1),
            labels.stride(0),
            labels.stride(-1),
            ignore_index,
            PACKED=cu_seqlens is not None,
            AVERAGE=average,
            # A long sequence takes few turns, each of which waits for the memory; a short one has few idle threads.
            BLOCK=min(4096, triton.next_power_of_2(max(n_time, 32))),
            num_warps=8,
        )
    return sums, counts


def sequence_repeat(
    values: Tensor,  # [S], any stride
    cu_seqlens: Tensor,  # [S + 1] int32 or int64, contiguous, from 0 to tokens
    tokens: int,
) -> Tensor:  # [tokens], dtype of values
    """Each token's value is its sequence's."""
    repeated = torch.empty(tokens, dtype=values.dtype, device=values.device)
    if tokens == 0:
        return repeated
    n_sequences = len(values)
    block = 1024
    with torch.cuda.device_of(values):
        sequence_repeat_kernel[(triton.cdiv(tokens, block),)](
            values,
            cu_seqlens,
            repeated,
            tokens,
            n_sequences,
            values.stride(0),
            n_sequences.bit_length(),
            BLOCK=block,
        )
    return repeated
