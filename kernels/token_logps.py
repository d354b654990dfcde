r"""Kernels of the op `token_logps`: one read of the logits forward, one read and one write backward.

.. math:: \log p_t = z_{t, y_t} - \mathrm{lse}_t, \quad \mathrm{lse}_t = \log \sum_v e^{z_{t,v}}, \quad
    H_t = \mathrm{lse}_t - \sum_v p_{t,v} z_{t,v}, \quad z = x / T, \quad p = e^{z - \mathrm{lse}}

.. math:: dx = (g / T) (1_y - p)

with T the temperature and g the gradient of logps. The sums are the online form of Milakov and Gimelshein,
arXiv 1805.02867. One program serves one token, and nothing is summed across programs: the same input gives the same
bits.

A row whose label is `ignore_index` is not read and gives 0. Any other label outside [0, V) is not read either and gives
NaN in every output and in the gradient: an exception would make the host wait for the device. NaN and +inf among the
logits give NaN; -inf is a token that cannot occur.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# A changing sequence length or padding label must not compile the kernel anew.
_NOT_SPECIALIZED = ["n_time", "ignore_index"]


@triton.jit
def _accumulate(b_logits, b_max, b_sum, b_weighted, scale, RETURN_ENTROPY: tl.constexpr):
    """Take one block into the running maximum, sum of e^(z - max) and, for the entropy, sum of e^(z - max) (x - max).

    The sums stay one per lane: rescaling them is free (a fused multiply-add) and only the maximum crosses the warps.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=0))
    # While all logits seen are -inf, any finite shift will do and avoids (-inf) - (-inf).
    b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
    b_rescale = tl.exp2((b_max - b_shift) * scale)
    b_centred = b_logits - b_shift
    b_exp = tl.exp2(b_centred * scale)
    if RETURN_ENTROPY:
        b_moved = tl.where(b_max == -float("inf"), 0.0, b_max - b_shift)
        # 0 log 0 = 0: the product would be 0 x (-inf). A NaN reaches the entropy through b_sum.
        b_weighted = b_rescale * (b_weighted + b_moved * b_sum) + tl.where(b_exp > 0.0, b_exp * b_centred, 0.0)
    b_sum = b_rescale * b_sum + b_exp
    return b_new_max, b_sum, b_weighted


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def token_logps_fwd_kernel(
    p_logits,  # [B, T, V], V contiguous
    p_labels,  # [B, T] int64, contiguous
    p_logps,  # [B, T] float32 or float64, contiguous
    p_lse,  # [B, T], as p_logps
    p_entropy,  # [B, T], as p_logps; not touched unless RETURN_ENTROPY
    n_time,
    n_vocabulary,
    stride_batch,
    stride_time,
    ignore_index,
    temperature: tl.float64,  # a plain float argument would be rounded to float32
    RETURN_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = p_lse.dtype.element_ty
    i_row = tl.program_id(0)
    label = tl.load(p_labels + i_row)

    if (label == ignore_index) | (label < 0) | (label >= n_vocabulary):
        b_unread = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(p_logps + i_row, b_unread)
        tl.store(p_lse + i_row, b_unread)
        if RETURN_ENTROPY:
            tl.store(p_entropy + i_row, b_unread)
    else:
        i_batch = (i_row // n_time).to(tl.int64)
        i_time = (i_row % n_time).to(tl.int64)
        p_row = p_logits + i_batch * stride_batch + i_time * stride_time
        b_target = tl.load(p_row + label).to(dtype)

        b_temperature = tl.full([], temperature, dtype)
        scale = LOG2_E / b_temperature
        o_vocabulary = tl.arange(0, BLOCK)
        b_max = tl.full([], -float("inf"), dtype)
        b_sum = tl.zeros([BLOCK], dtype)
        b_weighted = tl.zeros([BLOCK], dtype)

        # Whole blocks go without a mask: a mask that ends at any n_vocabulary would forbid 16-byte loads.
        n_whole = n_vocabulary // BLOCK * BLOCK
        for i_block in range(0, n_whole, BLOCK):
            b_logits = tl.load(p_row + i_block + o_vocabulary).to(dtype)
            b_max, b_sum, b_weighted = _accumulate(b_logits, b_max, b_sum, b_weighted, scale, RETURN_ENTROPY)
        if n_whole < n_vocabulary:
            m_vocabulary = n_whole + o_vocabulary < n_vocabulary
            b_logits = tl.load(p_row + n_whole + o_vocabulary, mask=m_vocabulary, other=-float("inf")).to(dtype)
            b_max, b_sum, b_weighted = _accumulate(b_logits, b_max, b_sum, b_weighted, scale, RETURN_ENTROPY)

        b_total = tl.sum(b_sum, axis=0)
        b_log_total = tl.log(b_total)
        tl.store(p_lse + i_row, b_max / b_temperature + b_log_total)
        # Not target - lse: for large logits lse has already lost the digits that this difference keeps.
        tl.store(p_logps + i_row, (b_target - b_max) / b_temperature - b_log_total)
        if RETURN_ENTROPY:
            b_mean = tl.sum(b_weighted, axis=0) / b_total
            tl.store(p_entropy + i_row, b_log_total - b_mean / b_temperature)


@triton.jit
def _gradient(b_logits, o_vocabulary, label, b_lse, b_grad, scale):
    """(g / T) (1_y - p); the 1 at the target is added here, in float32, and the result is rounded once."""
    b_probability = tl.exp2((b_logits - b_lse) * scale)
    return b_grad * (tl.where(o_vocabulary == label, 1.0, 0.0) - b_probability)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def token_logps_bwd_kernel(
    p_grad_logps,  # [B, T] contiguous
    p_logits,  # [B, T, V], V contiguous
    p_labels,  # [B, T] int64, contiguous
    p_lse,  # [B, T] float32 or float64, contiguous
    p_grad_logits,  # [B, T, V], V contiguous; may be p_logits itself: a block is read before it is written
    n_time,
    n_vocabulary,
    stride_batch,
    stride_time,
    stride_grad_batch,
    stride_grad_time,
    ignore_index,
    temperature: tl.float64,
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

    if (label == ignore_index) | (label < 0) | (label >= n_vocabulary):
        b_unread = tl.where(label == ignore_index, 0.0, float("nan"))
        b_unread = tl.full([BLOCK], b_unread, p_grad_logits.dtype.element_ty)
        for i_block in range(0, n_whole, BLOCK):
            tl.store(p_grad_row + i_block + o_vocabulary, b_unread)
        if n_whole < n_vocabulary:
            m_vocabulary = n_whole + o_vocabulary < n_vocabulary
            tl.store(p_grad_row + n_whole + o_vocabulary, b_unread, mask=m_vocabulary)
    else:
        b_temperature = tl.full([], temperature, dtype)
        scale = LOG2_E / b_temperature
        b_grad = tl.load(p_grad_logps + i_row).to(dtype) / b_temperature
        b_lse = tl.load(p_lse + i_row) * b_temperature  # in the units of the logits
        for i_block in range(0, n_whole, BLOCK):
            o_block = i_block + o_vocabulary
            b_logits = tl.load(p_row + o_block).to(dtype)
            b_gradient = _gradient(b_logits, o_block, label, b_lse, b_grad, scale)
            tl.store(p_grad_row + o_block, b_gradient.to(p_grad_logits.dtype.element_ty))
        if n_whole < n_vocabulary:
            o_block = n_whole + o_vocabulary
            m_vocabulary = o_block < n_vocabulary
            b_logits = tl.load(p_row + o_block, mask=m_vocabulary, other=-float("inf")).to(dtype)
            b_gradient = _gradient(b_logits, o_block, label, b_lse, b_grad, scale)
            tl.store(p_grad_row + o_block, b_gradient.to(p_grad_logits.dtype.element_ty), mask=m_vocabulary)


def block_and_warps(n_vocabulary: int, itemsize: int) -> tuple[int, int]:
    """Elements of a block and warps of a program: every thread holds four 16-byte loads, 2 KiB a warp of 32.

    Four loads in flight a thread hide the memory's latency within the registers of several programs an SM; four
    warps (an 8 KiB block) share one cross-warp maximum, and a short row gets fewer of them.
    """
    block = min(triton.next_power_of_2(n_vocabulary), 8192 // itemsize)
    return block, max(1, block * itemsize // 2048)


def token_logps_fwd(
    logits: Tensor,  # [B, T, V] any strides, V contiguous
    labels: Tensor,  # [B, T] int64, contiguous
    ignore_index: int,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # each [B, T] float32 (float64 for float64 logits); entropy [0] if not asked for
    """Log-probabilities of the labels, natural log-sum-exp of logits / temperature, and entropy in nats."""
    n_batch, n_time, n_vocabulary = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps = torch.empty((n_batch, n_time), dtype=dtype, device=logits.device)
    lse = torch.empty_like(logps)
    entropy = torch.empty_like(logps) if return_entropy else logps.new_empty(0)
    n_rows = n_batch * n_time
    if n_rows == 0:
        return logps, lse, entropy
    block, num_warps = block_and_warps(n_vocabulary, logits.element_size())
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(logits):
        token_logps_fwd_kernel[(n_rows,)](
            logits,
            labels,
            logps,
            lse,
            entropy,
            n_time,
            n_vocabulary,
            logits.stride(0),
            logits.stride(1),
            ignore_index,
            temperature,
            RETURN_ENTROPY=return_entropy,
            BLOCK=block,
            num_warps=num_warps,
        )
    return logps, lse, entropy


def token_logps_bwd(
    grad_logps: Tensor,  # [B, T] any strides
    logits: Tensor,  # [B, T, V] any strides, V contiguous
    labels: Tensor,  # [B, T] int64, contiguous
    lse: Tensor,  # [B, T] from token_logps_fwd
    ignore_index: int,
    temperature: float,
) -> Tensor:  # [B, T, V] contiguous, dtype of logits
    """Gradient of the logits."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch_backward(grad_logps, logits, labels, lse, grad_logits, ignore_index, temperature)
    return grad_logits


def token_logps_bwd_(
    grad_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, temperature: float
) -> None:
    """`token_logps_bwd` that writes the gradient over the logits."""
    _launch_backward(grad_logps, logits, labels, lse, logits, ignore_index, temperature)


def _launch_backward(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad_logits: Tensor,
    ignore_index: int,
    temperature: float,
) -> None:
    n_batch, n_time, n_vocabulary = logits.shape
    n_rows = n_batch * n_time
    if n_rows == 0:
        return
    block, num_warps = block_and_warps(n_vocabulary, logits.element_size())
    with torch.cuda.device_of(logits):
        token_logps_bwd_kernel[(n_rows,)](
            grad_logps.contiguous(),  # a sum's gradient comes expanded, with strides 0
            logits,
            labels,
            lse,
            grad_logits,
            n_time,
            n_vocabulary,
            logits.stride(0),
            logits.stride(1),
            grad_logits.stride(0),
            grad_logits.stride(1),
            ignore_index,
            temperature,
            BLOCK=block,
            num_warps=num_warps,
        )
