r"""Op `linear_token_logps`: log-probabilities straight from hidden states and the output head, token chunk by token
chunk.

.. math:: a = h W^\top + b, \quad s = c \tanh(a / c) \text{ (soft cap, optional)}, \quad \log p = s_y / T -
          \mathrm{lse}(s / T)

One buffer of [chunk, V] logits is all that ever exists: each chunk goes through the BLAS and then the row kernel of
`token_logps`. Tokens whose label is `ignore_index` are dropped before the matmul. The backward recomputes the chunk's
logits and turns them into their gradient in place; weight gradients are accumulated in float32, because rounding each
chunk's product to bfloat16 biases training (observed by TRL's authors).

Layouts: hidden [N, H], weight [V, H], bias [V], labels [N] int64 already shifted; logps, lse, entropy [N] in float32
(float64 for float64 hidden states), 0 where the label is `ignore_index`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustloss.naive.token_logps import statistics_dtype
from robustloss.ops._library import LIBRARY

LIBRARY.define(
    "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float temperature,"
    " float? softcap, int chunk_size, bool return_entropy) -> (Tensor logps, Tensor lse, Tensor entropy)"
)
LIBRARY.define(
    "linear_token_logps_bwd(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor lse,"
    " int ignore_index, float temperature, float? softcap, int chunk_size, bool need_hidden, bool need_weight,"
    " bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def default_chunk_size(vocabulary: int, itemsize: int) -> int:
    """Tokens in a chunk: a logits buffer of about 64 MiB.

    Large enough that the matmul runs at full speed (a few hundred rows), small enough to vanish beside the model; never
    below 64 rows, where the matmul would be bound by reading the weight.
    """
    return max(64, (1 << 26) // max(1, vocabulary * itemsize))


def _chunks(labels: Tensor, ignore_index: int, chunk_size: int) -> Iterator[Tensor]:
    """The indices of the counted tokens, `chunk_size` at a time."""
    kept = (labels != ignore_index).nonzero().squeeze(-1)
    return iter(kept.split(chunk_size)) if len(kept) else iter(())


def _head(rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, buffer: Tensor) -> Tensor:
    """The (soft-capped) logits of `rows`, written into the first rows of `buffer`."""
    logits = buffer[: len(rows)]
    if bias is None:
        torch.mm(rows, weight.t(), out=logits)
    else:
        torch.addmm(bias, rows, weight.t(), out=logits)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _forward(hidden, weight, bias, labels, ignore_index, temperature, softcap, chunk_size, return_entropy):
    dtype = statistics_dtype(hidden.dtype)
    logps = hidden.new_zeros(labels.shape, dtype=dtype)
    lse = torch.zeros_like(logps)
    entropy = torch.zeros_like(logps) if return_entropy else logps.new_empty(0)
    buffer = hidden.new_empty(min(chunk_size, len(labels)), len(weight))
    for index in _chunks(labels, ignore_index, chunk_size):
        logits = _head(hidden[index], weight, bias, softcap, buffer)
        chunk_logps, chunk_lse, chunk_entropy = torch.ops.robustloss.token_logps(
            logits.unsqueeze(0), labels[index].unsqueeze(0), ignore_index, temperature, return_entropy
        )
        logps[index], lse[index] = chunk_logps[0], chunk_lse[0]
        if return_entropy:
            entropy[index] = chunk_entropy[0]
    return logps, lse, entropy


def _backward(
    grad_logps,
    hidden,
    weight,
    bias,
    labels,
    lse,
    ignore_index,
    temperature,
    softcap,
    chunk_size,
    need_hidden,
    need_weight,
    need_bias,
):
    dtype = statistics_dtype(hidden.dtype)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if need_bias else None
    buffer = hidden.new_empty(min(chunk_size, len(labels)), len(weight))
    for index in _chunks(labels, ignore_index, chunk_size):
        rows = hidden[index]
        logits = _head(rows, weight, bias, softcap, buffer)
        slope = None if softcap is None else 1 - (logits.to(dtype) / softcap).square()
        torch.ops.robustloss.token_logps_bwd_(
            grad_logps[index].unsqueeze(0),
            logits.unsqueeze(0),
            labels[index].unsqueeze(0),
            lse[index].unsqueeze(0),
            ignore_index,
            temperature,
        )
        if slope is not None:
            logits.mul_(slope)
        if need_hidden:
            grad_hidden[index] = logits @ weight
        if grad_weight is not None:
            _accumulate_product(grad_weight, logits.t(), rows)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=dtype)
    empty = hidden.new_empty(0)
    return (
        grad_hidden,
        empty if grad_weight is None else grad_weight.to(weight.dtype),
        empty.clone() if grad_bias is None else grad_bias.to(weight.dtype),
    )


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right with the product never rounded to less than total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


LIBRARY.impl("linear_token_logps", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_token_logps_bwd", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("robustloss::linear_token_logps", lib=LIBRARY)
def _(hidden, weight, bias, labels, ignore_index, temperature, softcap, chunk_size, return_entropy):
    logps = torch.empty(labels.shape, dtype=statistics_dtype(hidden.dtype), device=hidden.device)
    return logps, torch.empty_like(logps), torch.empty_like(logps) if return_entropy else logps.new_empty(0)


@torch.library.register_fake("robustloss::linear_token_logps_bwd", lib=LIBRARY)
def _(grad_logps, hidden, weight, bias, labels, lse, i, t, s, c, need_hidden, need_weight, need_bias):
    empty = hidden.new_empty(0)
    return (
        torch.empty_like(hidden) if need_hidden else empty,
        torch.empty_like(weight) if need_weight else empty.clone(),
        weight.new_empty(len(weight)) if need_bias else empty.clone(),
    )


# ---- first derivative ---------------------------------------------------------------------------------------------


def _save_forward(ctx, inputs, output):
    hidden, weight, bias, labels, *options, _ = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, labels, lse)
    ctx.options = tuple(options)
    ctx.mark_non_differentiable(lse, entropy)


def _first_derivative(ctx, grad_logps, _grad_lse, _grad_entropy):
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.robustloss.linear_token_logps_bwd(
        grad_logps, hidden, weight, bias, labels, lse, *ctx.options, *needs
    )
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *wanted, *[None] * 6


torch.library.register_autograd(
    "robustloss::linear_token_logps", _first_derivative, setup_context=_save_forward, lib=LIBRARY
)


# ---- second derivative --------------------------------------------------------------------------------------------


def _save_backward(ctx, inputs, output):
    grad_logps, hidden, weight, bias, labels, _lse, *options = inputs
    ctx.save_for_backward(grad_logps, hidden, weight, bias, labels)
    ctx.options = tuple(options)


def _second_derivative(ctx, to_hidden, to_weight, to_bias):
    r"""Cotangents of (grad_logps, hidden, weight, bias), chunk by chunk.

    With D [N, V] the gradient of the head's output a, the backward is dh = D W, dW = D^T h, db = 1^T D, so its pairing
    with cotangents (G_h, G_W, G_b) is <D, U>, U = G_h W^T + h G_W^T + G_b. D depends on (g, a); A = d<D, U>/da then
    flows into h and W like any gradient of a, and D itself into the factors of U that are inputs.
    """
    grad_logps, hidden, weight, bias, labels = ctx.saved_tensors
    ignore_index, temperature, softcap, chunk_size, need_hidden, need_weight, need_bias = ctx.options
    dtype = statistics_dtype(hidden.dtype)
    to_grad_logps = torch.zeros_like(grad_logps)
    out_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    out_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    out_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device)
    head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    for index in _chunks(labels, ignore_index, chunk_size):
        rows, target = hidden[index].to(dtype), labels[index].unsqueeze(-1)
        logits = torch.nn.functional.linear(rows, head, offset)
        if softcap is None:
            capped, slope, bend = logits, torch.ones_like(logits), torch.zeros_like(logits)
        else:
            ratio = torch.tanh(logits / softcap)
            capped, slope = softcap * ratio, 1 - ratio.square()
            bend = -2 / softcap * ratio * slope
        paired = torch.zeros_like(logits)  # U
        if need_hidden:
            paired = paired + to_hidden[index].to(dtype) @ head.t()
        if need_weight:
            paired = paired + rows @ to_weight.to(dtype).t()
        if need_bias:
            paired = paired + to_bias.to(dtype)
        probabilities = (capped / temperature).softmax(-1)
        residual = (-probabilities).scatter_add(-1, target, torch.ones_like(target, dtype=dtype)) / temperature
        scale = grad_logps[index].to(dtype).unsqueeze(-1)
        gradient = scale * residual * slope  # D
        to_grad_logps = to_grad_logps.index_copy(0, index, (residual * slope * paired).sum(-1).to(grad_logps.dtype))
        sloped = slope * paired
        mean = (probabilities * sloped).sum(-1, keepdim=True)
        curved = scale * (residual * bend * paired - probabilities * (sloped - mean) * slope / temperature**2)  # A
        rows_out = curved @ head
        weight_out = curved.t() @ rows
        if need_weight:
            rows_out = rows_out + gradient @ to_weight.to(dtype)
        if need_hidden:
            weight_out = weight_out + gradient.t() @ to_hidden[index].to(dtype)
        out_hidden = out_hidden.index_copy(0, index, rows_out)
        out_weight = out_weight + weight_out
        out_bias = out_bias + curved.sum(0)
    return (
        to_grad_logps,
        out_hidden.to(hidden.dtype),
        out_weight.to(weight.dtype),
        None if bias is None else out_bias.to(bias.dtype),
        *[None] * 9,
    )


torch.library.register_autograd(
    "robustloss::linear_token_logps_bwd", _second_derivative, setup_context=_save_backward, lib=LIBRARY
)
