r"""Op `linear_token_logps`: log-probabilities straight from hidden states and the output head.

The functional op: 2 N H V flops forward; its backward computes the logits again, 8 NHV in all, and holds nothing in
between. It serves where there is no gradient, under torch.compile, and under create_graph. In eager training
`robustloss.functional` takes the regime that fits instead:

- `frozen_linear_token_logps`: only the hidden states need a gradient; 4 NHV.
- `trainable_linear_token_logps`: the weight does too; 6 NHV up to H tokens.
- `linear_token_logps_with_gradient`: the gradient of the log-probabilities is known beforehand; 6 NHV in one pass.

Layouts: hidden [N, H], weight [V, H], bias [V], adapter_hidden [N, R], adapter_weight [V, R], all of one dtype; labels
[N] int64 already shifted; logps [N], lse [2, N], statistics [n, N] as in `token_logps`. Equations: `_linear_head`.
"""

from __future__ import annotations

import torch

from robustloss.ops._library import LIBRARY
from robustloss.ops._linear_head import (
    HEAD,
    OPTIONS,
    TAGS,
    Head,
    Options,
    backward,
    empty_statistics,
    forward,
    scatter,
    second_derivative,
)

LIBRARY.define(
    f"linear_token_logps({HEAD}, Tensor labels, {OPTIONS}, int n_statistics)"
    " -> (Tensor logps, Tensor lse, Tensor statistics)",
    tags=TAGS,
)
LIBRARY.define(
    f"linear_token_logps_bwd(Tensor grad_logps, {HEAD}, Tensor labels, Tensor lse, {OPTIONS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def _forward(hidden, weight, bias, adapter_hidden, adapter_weight, labels, *rest):
    *options, n_statistics = rest
    head = Head(hidden, weight, bias, adapter_hidden, adapter_weight)
    part, kept = forward(head, labels, Options(*options), n_statistics)
    return scatter(part, kept, len(labels))


def _backward(grad_logps, hidden, weight, bias, adapter_hidden, adapter_weight, labels, lse, *rest):
    *options, needs = rest
    head = Head(hidden, weight, bias, adapter_hidden, adapter_weight)
    gradients = backward(grad_logps, head, labels, lse, Options(*options), needs)
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


LIBRARY.impl("linear_token_logps", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_token_logps_bwd", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("robustloss::linear_token_logps", lib=LIBRARY)
def _(hidden, weight, bias, adapter_hidden, adapter_weight, labels, *rest):
    return empty_statistics(hidden, labels, rest[-1])


@torch.library.register_fake("robustloss::linear_token_logps_bwd", lib=LIBRARY)
def _(grad_logps, hidden, weight, bias, adapter_hidden, adapter_weight, labels, lse, *rest):
    inputs = (hidden, weight, bias, adapter_hidden, adapter_weight)
    return tuple(
        torch.empty_like(value) if need else hidden.new_empty(0) for value, need in zip(inputs, rest[-1], strict=True)
    )


def _save_forward(ctx, inputs, output):
    *head, labels, ignore_index, temperature, softcap, chunk_size, _ = inputs
    _, lse, statistics = output
    ctx.save_for_backward(*head, labels, lse)
    ctx.options = Options(ignore_index, temperature, softcap, chunk_size)
    ctx.mark_non_differentiable(lse, statistics)


def _first_derivative(ctx, grad_logps, _grad_lse, _grad_statistics):
    *head, labels, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.robustloss.linear_token_logps_bwd(grad_logps, *head, labels, lse, *ctx.options, needs)
    return *[gradient if need else None for gradient, need in zip(gradients, needs, strict=True)], *[None] * 6


torch.library.register_autograd(
    "robustloss::linear_token_logps", _first_derivative, setup_context=_save_forward, lib=LIBRARY
)


def _save_backward(ctx, inputs, output):
    grad_logps, *head, labels, _lse, ignore_index, temperature, softcap, chunk_size, needs = inputs
    ctx.save_for_backward(grad_logps, *head, labels)
    ctx.options, ctx.needs = Options(ignore_index, temperature, softcap, chunk_size), needs


def _second_derivative(ctx, *cotangents):
    grad_logps, *head, labels = ctx.saved_tensors
    wanted = [value if need else None for value, need in zip(cotangents, ctx.needs, strict=True)]
    to_grad_logps, to_head = second_derivative(grad_logps, Head(*head), labels, ctx.options, wanted)
    return to_grad_logps, *to_head, *[None] * 7


torch.library.register_autograd(
    "robustloss::linear_token_logps_bwd", _second_derivative, setup_context=_save_backward, lib=LIBRARY
)
