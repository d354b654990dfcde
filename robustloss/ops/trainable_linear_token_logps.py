r"""`linear_token_logps` where the weight needs a gradient too, and where the head is split over a process group.

The weight's gradient [V, H] is allocated in the forward, and the logits of the first H tokens wait in it, tile by tile,
until the backward turns each tile into that part of the gradient. They cost no memory that the backward would not need
anyway, and are not computed twice: 6 N H V flops up to H tokens, towards 8 NHV for more.

Over a process group, which splits the vocabulary, every rank merges all ranks' parts, and dh is their sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from robustloss.ops._linear_head import Head, Part, backward, forward, forward_waiting, merge, scatter


class TrainableHead(torch.autograd.Function):
    """`linear_token_logps` whose logits wait in the memory of the weight's gradient; also over a process group."""

    @staticmethod
    def forward(ctx, *arguments: Any):
        *tensors, labels, options, n_statistics, waits, group, vocabulary_start = arguments
        head = Head(*tensors)
        ctx.waiting = None
        if waits:
            ctx.waiting = head.weight.new_empty(head.weight.shape)
            part, kept = forward_waiting(head, labels, options, n_statistics, vocabulary_start, ctx.waiting)
        else:
            part, kept = forward(head, labels, options, n_statistics, vocabulary_start)
        if group is not None:
            part = merge(gather_parts(part, group))
        logps, lse, statistics = scatter(part, kept, len(labels))
        ctx.save_for_backward(*tensors, labels, lse)
        ctx.options, ctx.group, ctx.vocabulary_start = options, group, vocabulary_start
        ctx.mark_non_differentiable(lse, statistics)
        return logps, lse, statistics

    @staticmethod
    def backward(ctx, grad_logps, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, labels, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        if torch.is_grad_enabled():
            if ctx.group is not None:
                raise RuntimeError(
                    "the head is split over a process group, for which there is no second derivative "
                    "(create_graph=True); gather the weight instead"
                )
            gradients = torch.ops.robustloss.linear_token_logps_bwd(
                grad_logps, *tensors, labels, lse, *ctx.options, needs
            )
            gradients = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        else:
            waiting, ctx.waiting = ctx.waiting, None  # a second backward through the same graph computes them again
            gradients = backward(
                grad_logps, Head(*tensors), labels, lse, ctx.options, needs, ctx.vocabulary_start, waiting
            )
            if ctx.group is not None:
                for gradient in (gradients[0], gradients[3]):  # every rank has the logits of its part only
                    if gradient is not None:
                        dist.all_reduce(gradient, group=ctx.group)
        return *gradients, *[None] * 6


def gather_parts(part: Part, group: dist.ProcessGroup) -> list[Part]:
    """Every rank's part, in the order of ranks."""
    own = torch.cat([part.logps.unsqueeze(0), part.lse, part.statistics])
    size = torch.ones_like(own[:1]) * part.size
    gathered = [
        torch.empty(len(own) + 1, own.shape[1], dtype=own.dtype, device=own.device) for _ in range(group.size())
    ]
    dist.all_gather(gathered, torch.cat([own, size]), group=group)
    return [Part(values[0], values[1:3], values[3:-1], values[-1]) for values in gathered]
