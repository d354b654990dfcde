r"""Ops `soft_sort` and `soft_rank`: differentiable order statistics and ranks; their equations: naive/soft_sort.py.

With g the incoming gradient, p the softmax over a block of -u (sort) or u / e (rank), r = S p the rank, and one block's
sums in angle brackets, the backwards by position are

.. math:: \langle g \rangle / m \;\; (\text{sort, l2}), \quad  p_i \langle g \rangle \;\; (\text{sort, kl}), \quad
          (g_i - \langle g \rangle / m) \, \sigma / e \;\; (\text{rank, l2}), \quad
          r_i (g_i - \langle p g \rangle) \, \sigma / e \;\; (\text{rank, kl})

with sigma = -1 where descending, else 1. They are linear in g, and l2's do not depend on the values: no `values`, l2.
The op `block_sum` is its own adjoint, and every further derivative is composed of it.

Layouts, all [R, n]: values of any floating dtype; sorted and block_start by position, ranks by index; order and
block_start int32, contiguous; gradients of any strides. Statistics are float64 on CPUs, float32 or better elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.naive import soft_sort as naive
from robustloss.naive.token_logps import statistics_dtype
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_triton
from robustloss.validation import check_finite

# A Scalar may be a symbol, as a strength that follows the number of values is to torch.compile; a float may not.
LIBRARY.define(
    "soft_sort(Tensor values, bool descending, str regularization, Scalar strength)"
    " -> (Tensor sorted, Tensor order, Tensor block_start)"
)
LIBRARY.define(
    "soft_rank(Tensor values, bool descending, str regularization, Scalar strength)"
    " -> (Tensor ranks, Tensor order, Tensor block_start)"
)
LIBRARY.define(
    "soft_sort_bwd(Tensor grad_sorted, Tensor? values, Tensor order, Tensor block_start, bool descending) -> Tensor"
)
LIBRARY.define(
    "soft_rank_bwd(Tensor grad_ranks, Tensor? values, Tensor order, Tensor block_start, bool descending,"
    " Scalar strength) -> Tensor"
)
LIBRARY.define("block_sum(Tensor values, Tensor block_start) -> Tensor")

for _op in ("soft_sort", "soft_rank", "soft_sort_bwd", "soft_rank_bwd", "block_sum"):
    register_triton(_op, f"soft_sort:{_op}")


@torch.library.register_fake("robustloss::soft_sort", lib=LIBRARY)
@torch.library.register_fake("robustloss::soft_rank", lib=LIBRARY)
def _(values, descending, regularization, strength):
    order = values.new_empty(values.shape, dtype=torch.int32)
    return values.new_empty(values.shape), order, torch.empty_like(order)


@torch.library.register_fake("robustloss::soft_sort_bwd", lib=LIBRARY)
@torch.library.register_fake("robustloss::soft_rank_bwd", lib=LIBRARY)
@torch.library.register_fake("robustloss::block_sum", lib=LIBRARY)
def _(gradient, *_):
    return gradient.new_empty(gradient.shape)


# ---- first derivative ---------------------------------------------------------------------------------------------


def _save(ctx, inputs, output):
    values, ctx.descending, regularization, ctx.strength = inputs
    _, order, block_start = output
    ctx.save_for_backward(values if regularization == "kl" else None, order, block_start)
    ctx.mark_non_differentiable(order, block_start)


def _sort_backward(ctx, grad_sorted, *_):
    gradient = torch.ops.robustloss.soft_sort_bwd(grad_sorted, *ctx.saved_tensors, ctx.descending)
    return gradient, None, None, None


def _rank_backward(ctx, grad_ranks, *_):
    gradient = torch.ops.robustloss.soft_rank_bwd(grad_ranks, *ctx.saved_tensors, ctx.descending, ctx.strength)
    return gradient, None, None, None


torch.library.register_autograd("robustloss::soft_sort", _sort_backward, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("robustloss::soft_rank", _rank_backward, setup_context=_save, lib=LIBRARY)


# ---- second derivative, in plain PyTorch: differentiable again ----------------------------------------------------


def block_sum(values: Tensor, block_start: Tensor) -> Tensor:
    return torch.ops.robustloss.block_sum(values, block_start)


def _sizes(block_start: Tensor, dtype: torch.dtype) -> Tensor:
    return block_sum(torch.ones(block_start.shape, dtype=dtype, device=block_start.device), block_start)


def _block_softmax(scores: Tensor, reference: Tensor, block_start: Tensor) -> Tensor:
    """Softmax over each block; `reference` is the position of its largest score."""
    weights = (scores - scores.detach().gather(-1, reference.long())).exp()
    return weights / block_sum(weights, block_start)


def _by_index(values: Tensor, order: Tensor) -> Tensor:
    """What stands at position i goes to index order[i]."""
    return torch.empty_like(values).scatter(-1, order.long(), values)


def _sort_weights(values: Tensor | None, order: Tensor, block_start: Tensor, descending: bool, like: Tensor) -> Tensor:
    """The share of each value in its block's gradient, by position."""
    if values is None:
        return 1 / _sizes(block_start, like.dtype)
    scores = values.to(like.dtype).gather(-1, order.long())
    return _block_softmax(scores if descending else -scores, block_start, block_start)


def _rank_weights(
    values: Tensor | None, order: Tensor, block_start: Tensor, descending: bool, strength: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(weights, slope) by position: the backward is slope * (g - the block's mean of g with these weights)."""
    size = _sizes(block_start, like.dtype)
    sign = -1 if descending else 1
    if values is None:
        return 1 / size, torch.full_like(size, sign / strength)
    scores = values.to(like.dtype).gather(-1, order.long()) * (sign / strength)
    weights = _block_softmax(scores, block_start + size - 1, block_start)
    return weights, size * (block_start + (size + 1) / 2) * weights * (sign / strength)


def _naive_sort_bwd(
    grad_sorted: Tensor, values: Tensor | None, order: Tensor, block_start: Tensor, descending: bool
) -> Tensor:
    gradient = grad_sorted.to(statistics_dtype(grad_sorted.dtype))
    weights = _sort_weights(values, order, block_start, descending, gradient)
    return _by_index(weights * block_sum(gradient, block_start), order).to(grad_sorted.dtype)


def _naive_rank_bwd(
    grad_ranks: Tensor, values: Tensor | None, order: Tensor, block_start: Tensor, descending: bool, strength: float
) -> Tensor:
    gradient = grad_ranks.to(statistics_dtype(grad_ranks.dtype)).gather(-1, order.long())
    weights, slope = _rank_weights(values, order, block_start, descending, strength, gradient)
    return _by_index(slope * (gradient - block_sum(weights * gradient, block_start)), order).to(grad_ranks.dtype)


def _save_bwd(ctx, inputs, output):
    gradient, values, order, block_start, *ctx.options = inputs
    ctx.save_for_backward(None if values is None else gradient, values, order, block_start)


def _sort_double_backward(ctx, cotangent):
    grad_sorted, values, order, block_start = ctx.saved_tensors
    (descending,) = ctx.options
    dtype = statistics_dtype(cotangent.dtype)
    by_position = cotangent.to(dtype).gather(-1, order.long())
    weights = _sort_weights(values, order, block_start, descending, by_position)
    expected = block_sum(weights * by_position, block_start)
    to_values = None
    if values is not None:
        total = block_sum(grad_sorted.to(dtype), block_start)
        slope = total * weights * (by_position - expected)
        to_values = _by_index(slope if descending else -slope, order).to(values.dtype)
    return expected.to(cotangent.dtype), to_values, None, None, None


def _rank_double_backward(ctx, cotangent):
    grad_ranks, values, order, block_start = ctx.saved_tensors
    descending, strength = ctx.options
    # The Jacobian of the ranks is a covariance, thus its own adjoint.
    to_grad = torch.ops.robustloss.soft_rank_bwd(cotangent, values, order, block_start, descending, strength)
    to_values = None
    if values is not None:
        dtype, index = statistics_dtype(cotangent.dtype), order.long()
        weights, slope = _rank_weights(values, order, block_start, descending, strength, cotangent.to(dtype))

        def centred(by_index: Tensor) -> Tensor:
            by_position = by_index.to(dtype).gather(-1, index)
            return by_position - block_sum(weights * by_position, block_start)

        product = centred(grad_ranks) * centred(cotangent)
        third_moment = slope * (product - block_sum(weights * product, block_start))
        to_values = _by_index(third_moment * ((-1 if descending else 1) / strength), order).to(values.dtype)
    return to_grad, to_values, *[None] * 4


torch.library.register_autograd(
    "robustloss::soft_sort_bwd", _sort_double_backward, setup_context=_save_bwd, lib=LIBRARY
)
torch.library.register_autograd(
    "robustloss::soft_rank_bwd", _rank_double_backward, setup_context=_save_bwd, lib=LIBRARY
)


def _save_block_sum(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _block_sum_backward(ctx, gradient):
    return block_sum(gradient, *ctx.saved_tensors), None


torch.library.register_autograd(
    "robustloss::block_sum", _block_sum_backward, setup_context=_save_block_sum, lib=LIBRARY
)


# ---- where the C++ extension was not built ------------------------------------------------------------------------


def _naive_sort(
    values: Tensor, descending: bool, regularization: str, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_finite("values", values)
    return naive.soft_sort(values, descending, regularization, strength)


def _naive_rank(
    values: Tensor, descending: bool, regularization: str, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_finite("values", values)
    return naive.soft_rank(values, descending, regularization, strength)


register_cpu_fallback("soft_sort", _naive_sort)
register_cpu_fallback("soft_rank", _naive_rank)
register_cpu_fallback("soft_sort_bwd", _naive_sort_bwd)
register_cpu_fallback("soft_rank_bwd", _naive_rank_bwd)
register_cpu_fallback("block_sum", naive.block_sum)
