r"""Op `frozen_linear_token_logps`: `linear_token_logps` where only the hidden states need a gradient (LoRA).

While a tile of logits is there, :math:`J_t = \partial \log p_t / \partial h_t` takes its part of them; the backward
only scales its rows, :math:`dh_t = g_t J_t`. Nothing is computed twice: 4 N H V flops, and [N, H] kept. The second
derivative is `linear_token_logps`'s.
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
    empty_statistics,
    forward_with_jacobian,
    scatter,
    second_derivative,
    spread,
)

LIBRARY.define(
    f"frozen_linear_token_logps({HEAD}, Tensor labels, {OPTIONS}, int n_statistics)"
    " -> (Tensor logps, Tensor lse, Tensor statistics, Tensor jacobian)",
    tags=TAGS,
)
LIBRARY.define(
    f"frozen_linear_token_logps_bwd(Tensor grad_logps, Tensor jacobian, {HEAD}, Tensor labels, {OPTIONS}) -> Tensor"
)


def _frozen_forward(hidden, weight, bias, adapter_hidden, adapter_weight, labels, *rest):
    *values, n_statistics = rest
    head = Head(hidden, weight, bias, adapter_hidden, adapter_weight)
    part, kept, jacobian = forward_with_jacobian(head, labels, Options(*values), n_statistics)
    return *scatter(part, kept, len(labels)), spread(jacobian.to(hidden.dtype), kept, len(labels))


def _frozen_backward(grad_logps, jacobian, *_):
    return (jacobian * grad_logps.unsqueeze(-1)).to(jacobian.dtype)


LIBRARY.impl("frozen_linear_token_logps", _frozen_forward, "CompositeExplicitAutograd")
LIBRARY.impl("frozen_linear_token_logps_bwd", _frozen_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("robustloss::frozen_linear_token_logps", lib=LIBRARY)
def _(hidden, weight, bias, adapter_hidden, adapter_weight, labels, *rest):
    return *empty_statistics(hidden, labels, rest[-1]), torch.empty_like(hidden)


@torch.library.register_fake("robustloss::frozen_linear_token_logps_bwd", lib=LIBRARY)
def _(grad_logps, jacobian, *_):
    return torch.empty_like(jacobian)


def _save_frozen(ctx, inputs, output):
    *head, labels, ignore_index, temperature, softcap, chunk_size, _ = inputs
    _, lse, statistics, jacobian = output
    ctx.save_for_backward(jacobian, *head, labels)
    ctx.options = Options(ignore_index, temperature, softcap, chunk_size)
    ctx.mark_non_differentiable(lse, statistics, jacobian)


def _frozen_first_derivative(ctx, grad_logps, *_):
    gradient = torch.ops.robustloss.frozen_linear_token_logps_bwd(grad_logps, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * 10


torch.library.register_autograd(
    "robustloss::frozen_linear_token_logps", _frozen_first_derivative, setup_context=_save_frozen, lib=LIBRARY
)


def _save_frozen_backward(ctx, inputs, output):
    grad_logps, _, *head, labels, ignore_index, temperature, softcap, chunk_size = inputs
    ctx.save_for_backward(grad_logps, *head, labels)
    ctx.options = Options(ignore_index, temperature, softcap, chunk_size)


def _frozen_second_derivative(ctx, cotangent):
    grad_logps, *head, labels = ctx.saved_tensors
    wanted = [cotangent, None, None, None, None]
    to_grad_logps, to_head = second_derivative(grad_logps, Head(*head), labels, ctx.options, wanted)
    return to_grad_logps, None, *to_head, *[None] * 5


torch.library.register_autograd(
    "robustloss::frozen_linear_token_logps_bwd",
    _frozen_second_derivative,
    setup_context=_save_frozen_backward,
    lib=LIBRARY,
)
