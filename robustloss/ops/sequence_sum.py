r"""Op `sequence_sum`: the sum (or the mean over counted tokens) over each padded or packed sequence.

.. math:: s_j = \frac{1}{n_j} \sum_{t \in j} x_t

with n_j the number of tokens whose label is not `ignore_index` (at least 1), or 1 without `average`. One program sums
one sequence in a fixed order, so the result is the same on every run, which a scatter-add's is not. The adjoint gives
each token its sequence's gradient: for padded sequences a view with stride 0, which the row kernels read as it is; for
packed ones the op `sequence_repeat`.

Layouts: values [B, T], or [N] with cu_seqlens [S + 1], float32 or float64, 0 where the label is `ignore_index`; labels
int64 of the same shape; sums and counts [B] or [S] in values' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.ops._library import LIBRARY, register_triton

LIBRARY.define(
    "sequence_sum(Tensor values, Tensor labels, Tensor? cu_seqlens, int ignore_index, bool average)"
    " -> (Tensor sums, Tensor counts)"
)
LIBRARY.define("sequence_repeat(Tensor values, Tensor cu_seqlens, SymInt tokens) -> Tensor")

register_triton("sequence_sum", "sequence_sum:sequence_sum")
register_triton("sequence_repeat", "sequence_sum:sequence_repeat")


def _reduce(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


def _sum(
    values: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, average: bool
) -> tuple[Tensor, Tensor]:
    sums = _reduce(values, cu_seqlens)
    if not average:
        return sums, torch.ones_like(sums)
    counts = _reduce((labels != ignore_index).to(values.dtype), cu_seqlens).clamp(min=1)
    return sums / counts, counts


def _repeat(values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    return values.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


LIBRARY.impl("sequence_sum", _sum, "CPU")
LIBRARY.impl("sequence_repeat", _repeat, "CPU")


@torch.library.register_fake("robustloss::sequence_sum", lib=LIBRARY)
def _(values, labels, cu_seqlens, ignore_index, average):
    # Not len(), which would hold a compiled graph to this number of sequences.
    sums = values.new_empty(values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    return sums, torch.empty_like(sums)


@torch.library.register_fake("robustloss::sequence_repeat", lib=LIBRARY)
def _(values, cu_seqlens, tokens):
    return values.new_empty(tokens)


def _save_sum(ctx, inputs, output):
    values, _, cu_seqlens, _, ctx.average = inputs
    _, counts = output
    ctx.save_for_backward(cu_seqlens, counts)
    ctx.mark_non_differentiable(counts)
    ctx.shape = values.shape


def _sum_backward(ctx, gradient, _grad_counts):
    cu_seqlens, counts = ctx.saved_tensors
    if ctx.average:
        gradient = gradient / counts
    if cu_seqlens is None:
        return gradient.unsqueeze(-1).expand(ctx.shape), *[None] * 4
    return torch.ops.robustloss.sequence_repeat(gradient, cu_seqlens, ctx.shape[0]), *[None] * 4


def _save_repeat(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _repeat_backward(ctx, gradient):
    (cu_seqlens,) = ctx.saved_tensors
    labels = torch.empty(gradient.shape, dtype=torch.int64, device=gradient.device)  # a plain sum looks at none
    return torch.ops.robustloss.sequence_sum(gradient, labels, cu_seqlens, 0, False)[0], None, None


torch.library.register_autograd("robustloss::sequence_sum", _sum_backward, setup_context=_save_sum, lib=LIBRARY)
torch.library.register_autograd(
    "robustloss::sequence_repeat", _repeat_backward, setup_context=_save_repeat, lib=LIBRARY
)
