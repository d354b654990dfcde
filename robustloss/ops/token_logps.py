r"""Op `token_logps`: log-probability of each label, its log-sum-exp and (on request) its entropy, in one read.

.. math:: \log p_t = z_{t, y_t} - \mathrm{lse}_t, \quad \mathrm{lse}_t = \log \sum_v e^{z_{t,v}}, \quad z = x / T

With g the incoming gradient and p = exp(z - lse), the backward is :math:`dx = (g / T) (1_y - p)`, and, with G the
cotangent of dx, the second derivative is :math:`dg = (G_y - \langle p, G \rangle) / T` and
:math:`dx' = -(g / T^2)\, p \odot (G - \langle p, G \rangle)`.

Layouts: logits [B, T, V], any strides as long as V has stride 1; labels [B, T] int64 contiguous, already shifted;
logps, lse and entropy [B, T] in float32 (float64 for float64 logits), 0 where the label is `ignore_index`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.naive.token_logps import statistics_dtype
from robustloss.naive.token_logps import token_entropy as naive_token_entropy
from robustloss.naive.token_logps import token_logps as naive_token_logps
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_triton
from robustloss.validation import check_labels_in_range

LIBRARY.define(
    "token_logps(Tensor logits, Tensor labels, int ignore_index, float temperature, bool return_entropy)"
    " -> (Tensor logps, Tensor lse, Tensor entropy)"
)
LIBRARY.define(
    "token_logps_bwd(Tensor grad_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index,"
    " float temperature) -> Tensor"
)
LIBRARY.define(
    "token_logps_bwd_(Tensor grad_logps, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index,"
    " float temperature) -> ()"
)

register_triton("token_logps", "token_logps:token_logps_fwd")
register_triton("token_logps_bwd", "token_logps:token_logps_bwd")
register_triton("token_logps_bwd_", "token_logps:token_logps_bwd_")


def _naive_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_labels_in_range(labels, logits.shape[-1], ignore_index)
    options = {"ignore_index": ignore_index, "temperature": temperature}
    logps = naive_token_logps(logits, labels, **options)
    scaled = logits.to(logps.dtype) / temperature
    lse = torch.where(labels != ignore_index, scaled.logsumexp(-1), 0.0)
    entropy = naive_token_entropy(logits, labels, **options) if return_entropy else logps.new_empty(0)
    return logps, lse, entropy


def _naive_backward(
    grad_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, temperature: float
) -> Tensor:
    counted = (labels != ignore_index).unsqueeze(-1)
    probabilities = (logits.to(lse.dtype) / temperature - lse.unsqueeze(-1)).exp()
    scale = (grad_logps.to(lse.dtype) / temperature).unsqueeze(-1)
    target = torch.where(counted, labels.unsqueeze(-1), 0)
    grad_logits = (-scale * probabilities).scatter_add(-1, target, scale)
    return torch.where(counted, grad_logits, 0.0).to(logits.dtype)


def _naive_backward_(
    grad_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, temperature: float
) -> None:
    logits.copy_(_naive_backward(grad_logps, logits, labels, lse, ignore_index, temperature))


register_cpu_fallback("token_logps", _naive_forward)
register_cpu_fallback("token_logps_bwd", _naive_backward)
register_cpu_fallback("token_logps_bwd_", _naive_backward_)


@torch.library.register_fake("robustloss::token_logps", lib=LIBRARY)
def _(logits, labels, ignore_index, temperature, return_entropy):
    statistics = torch.empty(labels.shape, dtype=statistics_dtype(logits.dtype), device=logits.device)
    entropy = torch.empty_like(statistics) if return_entropy else statistics.new_empty(0)
    return statistics, torch.empty_like(statistics), entropy


@torch.library.register_fake("robustloss::token_logps_bwd", lib=LIBRARY)
def _(grad_logps, logits, labels, lse, ignore_index, temperature):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("robustloss::token_logps_bwd_", lib=LIBRARY)
def _(grad_logps, logits, labels, lse, ignore_index, temperature):
    return None


# ---- first derivative: the forward op's autograd ------------------------------------------------------------------


def _save_forward(ctx, inputs, output):
    logits, labels, ignore_index, temperature, _ = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, labels, lse)
    ctx.options = (ignore_index, temperature)
    # Both are statistics: the loss is a function of logps alone.
    ctx.mark_non_differentiable(lse, entropy)


def _backward(ctx, grad_logps, _grad_lse, _grad_entropy):
    logits, labels, lse = ctx.saved_tensors
    grad_logits = torch.ops.robustloss.token_logps_bwd(grad_logps, logits, labels, lse, *ctx.options)
    return grad_logits, None, None, None, None


torch.library.register_autograd("robustloss::token_logps", _backward, setup_context=_save_forward, lib=LIBRARY)


# ---- second derivative: the backward op's autograd ----------------------------------------------------------------


def _save_backward(ctx, inputs, output):
    grad_logps, logits, labels, lse, ignore_index, temperature = inputs
    ctx.save_for_backward(grad_logps, logits, labels, lse)
    ctx.options = (ignore_index, temperature)


def _double_backward(ctx, cotangent):
    """Plain PyTorch on purpose: it is differentiable again, and only exact WDPO comes here."""
    grad_logps, logits, labels, lse = ctx.saved_tensors
    ignore_index, temperature = ctx.options
    counted = (labels != ignore_index).unsqueeze(-1)
    target = torch.where(counted, labels.unsqueeze(-1), 0)
    cotangent = torch.where(counted, cotangent.to(lse.dtype), 0.0)
    probabilities = torch.softmax(logits.to(lse.dtype) / temperature, -1)
    mean_cotangent = (probabilities * cotangent).sum(-1, keepdim=True)
    grad_of_grad = ((cotangent.gather(-1, target) - mean_cotangent) / temperature).squeeze(-1)
    scale = (grad_logps.to(lse.dtype) / temperature**2).unsqueeze(-1)
    grad_of_logits = -scale * probabilities * (cotangent - mean_cotangent)
    return grad_of_grad.to(grad_logps.dtype), grad_of_logits.to(logits.dtype), None, None, None, None


torch.library.register_autograd(
    "robustloss::token_logps_bwd", _double_backward, setup_context=_save_backward, lib=LIBRARY
)
