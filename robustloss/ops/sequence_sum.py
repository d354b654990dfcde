r"""Op `sequence_sum`: the sum over each packed sequence, :math:`s_j = \sum_{c_j \le t < c_{j+1}} x_t`.

Segments are contiguous, so the reduction runs in order within each and is deterministic on every device, which a
scatter-add is not. The adjoint repeats each sequence's gradient over its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.ops._library import LIBRARY

LIBRARY.define("sequence_sum(Tensor values, Tensor cu_seqlens) -> Tensor")
LIBRARY.define("sequence_repeat(Tensor values, Tensor cu_seqlens, SymInt tokens) -> Tensor")


def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """values [N], cu_seqlens [S + 1] -> [S]; twice differentiable."""
    return torch.ops.robustloss.sequence_sum(values, cu_seqlens)


def _sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


def _repeat(values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    return values.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


LIBRARY.impl("sequence_sum", _sum, "CompositeExplicitAutograd")
LIBRARY.impl("sequence_repeat", _repeat, "CompositeExplicitAutograd")


@torch.library.register_fake("robustloss::sequence_sum", lib=LIBRARY)
def _(values, cu_seqlens):
    return values.new_empty(len(cu_seqlens) - 1)


@torch.library.register_fake("robustloss::sequence_repeat", lib=LIBRARY)
def _(values, cu_seqlens, tokens):
    return values.new_empty(tokens)


def _save_sum(ctx, inputs, output):
    values, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.tokens = len(values)


def _sum_backward(ctx, gradient):
    return torch.ops.robustloss.sequence_repeat(gradient, *ctx.saved_tensors, ctx.tokens), None


def _save_repeat(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _repeat_backward(ctx, gradient):
    return torch.ops.robustloss.sequence_sum(gradient, *ctx.saved_tensors), None, None


torch.library.register_autograd("robustloss::sequence_sum", _sum_backward, setup_context=_save_sum, lib=LIBRARY)
torch.library.register_autograd(
    "robustloss::sequence_repeat", _repeat_backward, setup_context=_save_repeat, lib=LIBRARY
)
