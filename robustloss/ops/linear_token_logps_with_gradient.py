r"""`linear_token_logps` where the gradient of the log-probabilities is known beforehand: 6 N H V flops in one pass.

A chunk of tokens' logits become their gradient, and that its part of dh and dW, before the next chunk's take its place.
dW is summed over the chunks in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from robustloss.naive.token_logps import statistics_dtype
from robustloss.ops._linear_head import EVERY_TOKEN, Head, add_product, chunk_gradient, empty_statistics, token_chunks


class KnownGradient(torch.autograd.Function):
    """(sum of gradient x logps, logps, lse, statistics) and the head's gradients in one pass."""

    @staticmethod
    def forward(ctx, *arguments: Any):
        *tensors, labels, grad_logps, options, n_statistics = arguments
        head = Head(*tensors)
        dtype = statistics_dtype(head.hidden.dtype)
        needs = ctx.needs_input_grad[:5]
        logps, lse, statistics = (value.zero_() for value in empty_statistics(head.hidden, labels, n_statistics))
        gradients: dict[int, torch.Tensor] = {}  # by place among the five
        for place, left, right in head.products:
            if needs[place]:
                gradients[place] = torch.zeros_like(left)
            if needs[place + 1]:
                gradients[place + 1] = torch.zeros(right.shape, dtype=dtype, device=right.device)
        if needs[2]:
            gradients[2] = torch.zeros(len(head.weight), dtype=dtype, device=labels.device)
        for index, rows, label, logits in token_chunks(head, labels, options):
            chunk = torch.ops.robustloss.token_logps(
                logits.unsqueeze(0), label.unsqueeze(0), EVERY_TOKEN, *options[1:3], n_statistics
            )
            logps[index], lse[:, index], statistics[:, index] = chunk[0][0], chunk[1][:, 0], chunk[2][:, 0]
            if not gradients:
                continue
            gradient = chunk_gradient(grad_logps[index], logits, label, chunk[1], options)
            for place, left, right in rows.products:
                if needs[place]:
                    gradients[place][index] = gradient @ right
                if needs[place + 1]:
                    add_product(gradients[place + 1], gradient.t(), left)
            if needs[2]:
                gradients[2] += gradient.sum(0, dtype=dtype)
        ctx.gradients = [
            gradients[place].to(value.dtype) if place in gradients else None for place, value in enumerate(tensors)
        ]
        ctx.mark_non_differentiable(logps, lse, statistics)
        return (grad_logps * logps).sum(), logps, lse, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of linear_sequence_logps_with_cotangent are given out once; call it again"
            )
        return *[None if gradient is None else gradient.mul_(upstream) for gradient in gradients], *[None] * 4
