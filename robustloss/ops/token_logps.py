r"""Op `token_logps`: log-probability of each label, its log-sum-exp and (on request) statistics, in one read.

.. math:: \log p_t = z_{t, y_t} - \mathrm{lse}_t, \quad \mathrm{lse}_t = \log \sum_v e^{z_{t,v}}, \quad z = s / T,
          \quad s = c \tanh(x / c)

with x the logits, c the soft cap (s = x without one) and T the temperature. With g the incoming gradient, p = exp(z -
lse) and s' = ds/dx, the backward is :math:`D = (g / T) (1_y - p) s'`. `token_logps_bwd_out` writes it into a tensor,
which may be the logits themselves, and takes any tile of the vocabulary: a label outside of it has no target there.

Layouts: logits [B, T, V], any strides as long as V has stride 1; labels [B, T] int64 contiguous, already shifted; logps
[B, T] in float32 (float64 for float64 logits), 0 where the label is `ignore_index`. lse [2, B, T] is the largest z and
the log of the sum of exp(z - largest): their sum is the log-sum-exp, but one float32 would lose its digits to a large
logit. statistics [n, B, T], n = 0, 1 or 3: entropy in nats; 1 where no token has a larger logit than the label; mean s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.naive import token_logps as naive
from robustloss.naive.token_logps import soft_cap, statistics_dtype
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_triton
from robustloss.validation import check_labels_in_range

LIBRARY.define(
    "token_logps(Tensor logits, Tensor labels, int ignore_index, float temperature, float? softcap, int n_statistics)"
    " -> (Tensor logps, Tensor lse, Tensor statistics)"
)
LIBRARY.define(
    "token_logps_bwd(Tensor grad_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index, float temperature,"
    " float? softcap) -> Tensor"
)
LIBRARY.define(
    "token_logps_bwd_out(Tensor grad_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index,"
    " float temperature, float? softcap, int vocabulary_start, Tensor(a!) grad_logits) -> ()"
)

register_triton("token_logps", "token_logps:token_logps_fwd")
register_triton("token_logps_bwd", "token_logps:token_logps_bwd")
register_triton("token_logps_bwd_out", "token_logps:token_logps_bwd_out")


def _naive_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, softcap: float | None, n_statistics: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_labels_in_range(labels, logits.shape[-1], ignore_index)
    capped = soft_cap(logits.to(statistics_dtype(logits.dtype)), softcap)
    logps = naive.token_logps(capped, labels, ignore_index=ignore_index, temperature=temperature)
    scaled = capped / temperature
    largest = scaled.amax(-1)
    shift = torch.where(largest == -float("inf"), 0.0, largest)  # (-inf) - (-inf) is no number
    lse = torch.stack([largest, (scaled - shift.unsqueeze(-1)).logsumexp(-1)])
    lse = torch.where(labels != ignore_index, lse, 0.0)
    if n_statistics == 0:
        return logps, lse, logps.new_empty(0, *logps.shape)
    entropy = naive.token_entropy(capped, labels, ignore_index=ignore_index, temperature=temperature)
    if n_statistics == 1:
        return logps, lse, entropy.unsqueeze(0)
    top1 = naive.token_top1(logits, labels, ignore_index=ignore_index)  # the cap may round several logits to one
    mean_logit = naive.token_mean_logit(capped, labels, ignore_index=ignore_index)
    return logps, lse, torch.stack([entropy, top1, mean_logit])


def _naive_backward(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    vocabulary_start: int = 0,
) -> Tensor:
    capped, slope, _ = soft_cap_derivatives(logits.to(lse.dtype), softcap)
    probabilities = ((capped / temperature - lse[0].unsqueeze(-1)) - lse[1].unsqueeze(-1)).exp()
    scale = (grad_logps.to(lse.dtype) / temperature).unsqueeze(-1)
    vocabulary = torch.arange(vocabulary_start, vocabulary_start + logits.shape[-1], device=logits.device)
    gradient = scale * ((labels.unsqueeze(-1) == vocabulary).to(lse.dtype) - probabilities) * slope
    return torch.where((labels != ignore_index).unsqueeze(-1), gradient, 0.0).to(logits.dtype)


def _naive_backward_out(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    vocabulary_start: int,
    grad_logits: Tensor,
) -> None:
    options = (ignore_index, temperature, softcap, vocabulary_start)
    grad_logits.copy_(_naive_backward(grad_logps, logits, labels, lse, *options))


register_cpu_fallback("token_logps", _naive_forward)
register_cpu_fallback("token_logps_bwd", _naive_backward)
register_cpu_fallback("token_logps_bwd_out", _naive_backward_out)


@torch.library.register_fake("robustloss::token_logps", lib=LIBRARY)
def _(logits, labels, ignore_index, temperature, softcap, n_statistics):
    logps = torch.empty(labels.shape, dtype=statistics_dtype(logits.dtype), device=logits.device)
    return logps, logps.new_empty(2, *labels.shape), logps.new_empty(n_statistics, *labels.shape)


@torch.library.register_fake("robustloss::token_logps_bwd", lib=LIBRARY)
def _(grad_logps, logits, labels, lse, ignore_index, temperature, softcap):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("robustloss::token_logps_bwd_out", lib=LIBRARY)
def _(grad_logps, logits, labels, lse, ignore_index, temperature, softcap, vocabulary_start, grad_logits):
    return None


# ---- first derivative: the forward op's autograd ------------------------------------------------------------------


def _save_forward(ctx, inputs, output):
    logits, labels, *options, _ = inputs
    _, lse, statistics = output
    ctx.save_for_backward(logits, labels, lse)
    ctx.options = options
    # The loss is a function of logps alone.
    ctx.mark_non_differentiable(lse, statistics)


def _backward(ctx, grad_logps, _grad_lse, _grad_statistics):
    logits, labels, lse = ctx.saved_tensors
    grad_logits = torch.ops.robustloss.token_logps_bwd(grad_logps, logits, labels, lse, *ctx.options)
    return grad_logits, *[None] * 5


torch.library.register_autograd("robustloss::token_logps", _backward, setup_context=_save_forward, lib=LIBRARY)


# ---- second derivative: the backward op's autograd ----------------------------------------------------------------


def soft_cap_derivatives(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """s, ds/dx and d2s/dx2."""
    if softcap is None:
        return logits, torch.ones_like(logits), torch.zeros_like(logits)
    ratio = torch.tanh(logits / softcap)
    slope = torch.cosh(logits / softcap).square().reciprocal()  # near the cap, 1 - tanh^2 has no digits left
    return softcap * ratio, slope, -2 / softcap * ratio * slope


def pair_gradient(
    scale: Tensor,  # [..., 1] the gradient g of logps
    logits: Tensor,  # [..., V]
    target: Tensor,  # [..., 1] int64, a valid label
    cotangent: Tensor,  # [..., V] G
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., V], [..., V]
    r"""D, the gradient of the logits, paired with G: d<D, G>/dg, d<D, G>/dx, and D itself.

    .. math:: \frac{d\langle D, G\rangle}{dx} = \frac{g}{T} \Big( (1_y - p) s'' G
              - \frac{1}{T} p \, (s' G - \langle p, s' G\rangle) s' \Big)

    Plain PyTorch on purpose: it is differentiable again, and only exact WDPO comes here.
    """
    capped, slope, bend = soft_cap_derivatives(logits, softcap)
    probabilities = (capped / temperature).softmax(-1)
    residual = (-probabilities).scatter_add(-1, target, torch.ones_like(scale)) / temperature
    sloped = slope * cotangent
    mean = (probabilities * sloped).sum(-1, keepdim=True)
    curved = residual * bend * cotangent - probabilities * (sloped - mean) * slope / temperature**2
    return (residual * sloped).sum(-1), scale * curved, scale * residual * slope


def _save_backward(ctx, inputs, output):
    grad_logps, logits, labels, _lse, *options = inputs
    ctx.save_for_backward(grad_logps, logits, labels)
    ctx.options = options


def _double_backward(ctx, cotangent):
    grad_logps, logits, labels = ctx.saved_tensors
    ignore_index, temperature, softcap = ctx.options
    dtype = statistics_dtype(logits.dtype)
    counted = (labels != ignore_index).unsqueeze(-1)
    to_grad, to_logits, _ = pair_gradient(
        grad_logps.to(dtype).unsqueeze(-1),
        torch.where(counted, logits.to(dtype), 0.0),
        torch.where(counted, labels.unsqueeze(-1), 0),
        torch.where(counted, cotangent.to(dtype), 0.0),
        temperature,
        softcap,
    )
    return to_grad.to(grad_logps.dtype), to_logits.to(logits.dtype), *[None] * 5


torch.library.register_autograd(
    "robustloss::token_logps_bwd", _double_backward, setup_context=_save_backward, lib=LIBRARY
)


# ---- a gradient that takes the logits' place ----------------------------------------------------------------------


class InplaceTokenLogps(torch.autograd.Function):
    """`token_logps`, or with `ref_logits` the op `token_logratios`, whose backward overwrites the (policy's) logits."""

    @staticmethod
    def forward(ctx, logits, ref_logits, labels, ignore_index, temperature, n_statistics):
        if ref_logits is None:
            values, lse, statistics = torch.ops.robustloss.token_logps(
                logits, labels, ignore_index, temperature, None, n_statistics
            )
        else:
            values, lse = torch.ops.robustloss.token_logratios(logits, ref_logits, labels, ignore_index, temperature)
            statistics = values.new_empty(0, *values.shape)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = (ignore_index, temperature, None, 0)
        ctx.mark_non_differentiable(statistics)
        return values, statistics

    @staticmethod
    def backward(ctx, grad_values, _grad_statistics):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True overwrites the logits, so a second derivative (create_graph=True) is "
                "impossible; leave inplace_backward=False"
            )
        logits, labels, lse = ctx.saved_tensors
        torch.ops.robustloss.token_logps_bwd_out(grad_values, logits, labels, lse, *ctx.options, logits)
        # Autograd then refuses a second backward through the overwritten logits instead of computing nonsense.
        torch.autograd.graph.increment_version(logits)
        return logits, *[None] * 5
