r"""Op `token_logratios`: log-probability of each label under the policy minus that under the reference, both read by
one kernel.

.. math:: r_t = \log \pi(y_t) - \log \pi_\mathrm{ref}(y_t)

The reference is held fixed, so the gradient is that of the policy's log-probability, and the backward is
`token_logps`'s. Layouts are `token_logps`'s too; the two logits may differ in dtype and strides. The log-ratio has the
policy's statistics dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.naive.token_logps import statistics_dtype
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_triton

LIBRARY.define(
    "token_logratios(Tensor policy_logits, Tensor ref_logits, Tensor labels, int ignore_index, float temperature)"
    " -> (Tensor logratios, Tensor policy_lse)"
)

register_triton("token_logratios", "token_logratios:token_logratios")


def _naive(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, ignore_index: int, temperature: float
) -> tuple[Tensor, Tensor]:
    token_logps = torch.ops.robustloss.token_logps
    logps, lse, _ = token_logps(policy_logits, labels, ignore_index, temperature, None, 0)
    ref_logps, _, _ = token_logps(ref_logits, labels, ignore_index, temperature, None, 0)
    return (logps - ref_logps).to(logps.dtype), lse


register_cpu_fallback("token_logratios", _naive)


@torch.library.register_fake("robustloss::token_logratios", lib=LIBRARY)
def _(policy_logits, ref_logits, labels, ignore_index, temperature):
    logratios = torch.empty(labels.shape, dtype=statistics_dtype(policy_logits.dtype), device=labels.device)
    return logratios, logratios.new_empty(2, *labels.shape)


def _save(ctx, inputs, output):
    policy_logits, _, labels, *options = inputs
    _, lse = output
    ctx.save_for_backward(policy_logits, labels, lse)
    ctx.options = options
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_logratios, _grad_lse):
    logits, labels, lse = ctx.saved_tensors
    grad_logits = torch.ops.robustloss.token_logps_bwd(grad_logratios, logits, labels, lse, *ctx.options, None)
    return grad_logits, *[None] * 4


torch.library.register_autograd("robustloss::token_logratios", _backward, setup_context=_save, lib=LIBRARY)
