r"""Op `frozen_linear_token_logps`: `linear_token_logps` where only the hidden states need a gradient (LoRA).

While a chunk of tokens' logits are there, :math:`J_t = \partial \log p_t / \partial h_t` is made of them; the backward
only scales its rows, :math:`dh_t = g_t J_t`. Nothing is computed twice: 4 N H V flops, and [N, H] kept. The second
derivative is `linear_token_logps`'s.
"""

from __future__ import annotations

import torch

from robustloss.ops._library import LIBRARY
from robustloss.ops._linear_head import (
    EVERY_TOKEN,
    HEAD,
    OPTIONS,
    Head,
    Options,
    chunk_gradient,
    empty_statistics,
    second_derivative,
    token_chunks,
)

LIBRARY.define(
    f"frozen_linear_token_logps({HEAD}, Tensor labels, {OPTIONS}, int n_statistics)"
    " -> (Tensor logps, Tensor lse, Tensor statistics, Tensor jacobian)"
)
LIBRARY.define(
    f"frozen_linear_token_logps_bwd(Tensor grad_logps, Tensor jacobian, {HEAD}, Tensor labels, {OPTIONS}) -> Tensor"
)


def _frozen_forward(hidden, weight, bias, adapter_hidden, adapter_weight, labels, *rest):
    *values, n_statistics = rest
    head, options = Head(hidden, weight, bias, adapter_hidden, adapter_weight), Options(*values)
    logps, lse, statistics = (value.zero_() for value in empty_statistics(hidden, labels, n_statistics))
    jacobian = torch.zeros_like(hidden)
    for index, _, label, logits in token_chunks(head, labels, options):
        chunk = torch.ops.robustloss.token_logps(
            logits.unsqueeze(0), label.unsqueeze(0), EVERY_TOKEN, *options[1:3], n_statistics
        )
        logps[index], lse[:, index], statistics[:, index] = chunk[0][0], chunk[1][:, 0], chunk[2][:, 0]
        jacobian[index] = chunk_gradient(torch.ones_like(chunk[0][0]), logits, label, chunk[1], options) @ weight
    return logps, lse, statistics, jacobian


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
