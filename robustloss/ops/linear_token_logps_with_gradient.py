r"""`linear_token_logps` where the gradient of the log-probabilities is known beforehand: 6 N H V flops, no second pass.

Up to H tokens at a time go through `trainable_linear_token_logps`'s forward and straight on through its backward, so
that no logits are computed twice; with more tokens the groups' weight gradients are summed in float32. Where only the
hidden states need a gradient, 4 NHV.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustloss.ops._linear_head import (
    Head,
    Options,
    backward,
    forward,
    forward_waiting,
    forward_with_jacobian,
    kept_tokens,
    scatter,
    spread,
)

OF_TOKENS = (0, 3)  # hidden and adapter_hidden: a row each; the others are sums over tokens


class KnownGradient(torch.autograd.Function):
    """(sum of gradient x logps, logps) and the head's gradients."""

    @staticmethod
    def forward(ctx, *arguments: Any):
        *tensors, labels, grad_logps, options, needs = arguments
        head = Head(*tensors)
        if needs == [True, False, False, False, False]:
            part, kept, jacobian = forward_with_jacobian(head, labels, options, 0)
            logps = scatter(part, kept, len(labels))[0]
            grad_hidden = spread(jacobian.to(head.hidden.dtype), kept, len(labels)) * grad_logps.unsqueeze(-1)
            ctx.gradients = [grad_hidden.to(head.hidden.dtype), None, None, None, None]
        else:
            logps, ctx.gradients = _in_groups(head, labels, grad_logps, options, needs)
        ctx.mark_non_differentiable(logps)
        return (grad_logps * logps).sum(), logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of linear_sequence_logps_with_cotangent are given out once; call it again"
            )
        return *[None if gradient is None else gradient.mul_(upstream) for gradient in gradients], *[None] * 4


def _in_groups(
    head: Head, labels: Tensor, grad_logps: Tensor, options: Options, needs: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    kept, rows, kept_labels = kept_tokens(head, labels, options.ignore_index)
    upstream, n_hidden = grad_logps[kept], head.weight.shape[1]
    logps: list[Tensor] = []
    results: list[list[Tensor]] = [[] for _ in head]
    for start in range(0, max(1, len(kept_labels)), n_hidden):
        group = slice(start, start + n_hidden)
        own, own_labels = rows.of_tokens(group), kept_labels[group]
        waiting = head.weight.new_empty(head.weight.shape) if needs[1] else None
        if waiting is None:
            part, _ = forward(own, own_labels, options, 0)
        else:
            part, _ = forward_waiting(own, own_labels, options, 0, 0, waiting)
        logps.append(part.logps)
        gradients = backward(upstream[group], own, own_labels, part.lse, options, needs, 0, waiting)
        for place, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if place in OF_TOKENS or not results[place]:
                results[place].append(gradient)
            else:
                results[place] = [results[place][0].to(part.lse.dtype).add_(gradient)]

    gradients: list[Tensor | None] = [None] * len(results)
    for place, (values, like) in enumerate(zip(results, head, strict=True)):
        if values and like is not None:
            whole = spread(torch.cat(values), kept, len(labels)) if place in OF_TOKENS else values[0]
            gradients[place] = whole.to(like.dtype)
    return spread(torch.cat(logps), kept, len(labels)), gradients
