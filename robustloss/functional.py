"""Log-probabilities and log-ratios of sequences.

Everything here is a pure function of tensors, twice differentiable, and works under torch.compile(fullgraph=True),
autocast and torch.no_grad. The functions share these arguments:

    labels: int64 or int32. Where a label equals `ignore_index`, nothing is counted; a sequence with no label left
        gives 0 and a zero gradient. On the CPU a label outside [0, V) raises ValueError; on a GPU it gives NaN,
        because looking would make the host wait.
    temperature: the logits are divided by it.
    shift: the Hugging Face convention: position t predicts labels[t + 1]. Done on the labels; logits are never copied.
    average: divide by the number of counted tokens.
    cu_seqlens: int32 or int64 [S + 1], the packed (padding-free) form: sequence s is tokens cu_seqlens[s] to
        cu_seqlens[s + 1].
    return_entropy: also return the entropy in nats, reduced like the log-probabilities; a statistic without gradient.

Results are float32 whatever the input type (float64 for float64 input), in nats.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from robustloss.naive.sequence_logps import shift_labels
from robustloss.ops.linear_token_logps import default_chunk_size
from robustloss.ops.sequence_sum import sequence_sum
from robustloss.validation import (
    INTEGER_DTYPES,
    check_labels_in_range,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)

__all__ = [
    "linear_sequence_logps",
    "linear_sequence_logratios",
    "sequence_logps",
    "sequence_logratios",
    "token_logps",
]


def token_logps(
    logits: Tensor,  # [B, T, V] or [N, V]
    labels: Tensor,  # [B, T] or [N]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    shift: bool = False,
) -> Tensor:  # [B, T] or [N]
    r"""Log-probability of each label: :math:`z_{y} - \log \sum_v e^{z_v}`, z = logits / temperature, in nats.

    Args:
        logits: [B, T, V] or [N, V], float32, bfloat16, float16 or float64, any strides.
        labels: the logits' shape without V.
        ignore_index, temperature, shift: see the module's docstring.

    Returns:
        [B, T] or [N] float32 (float64 for float64 logits); 0 where the label is `ignore_index`. With shift=True
        position t holds the log-probability of labels[t + 1] and the last position 0.

    Raises:
        TypeError: an argument that is no tensor or of another dtype.
        ValueError: shapes, devices or temperature that do not fit; a label outside [0, V) on the CPU.
    """
    _check_logits(logits, labels, temperature)
    labels = _prepare_labels(labels, shift, ignore_index, None)
    return _token_statistics(logits, labels, ignore_index, temperature, False, False)[0]


def sequence_logps(
    logits: Tensor,  # [B, T, V], or [N, V] or [1, N, V] with cu_seqlens
    labels: Tensor,  # [B, T], or [N] or [1, N]
    *,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [B]
    r"""Log-probability of each sequence, :math:`\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})` ([W] Eq. 3).

    Args:
        logits: [B, T, V], or [N, V] or [1, N, V] with `cu_seqlens`; float32, bfloat16, float16 or float64, any strides.
        labels: the logits' shape without V.
        ignore_index, average, temperature, shift, cu_seqlens, return_entropy: see the module's docstring.
        inplace_backward: the backward pass writes the gradient over the logits, so that training needs no second [B,
            T, V] tensor. The logits must not be needed afterwards, must not be a leaf or its view, and no second
            derivative is possible; both misuses raise. Under torch.compile, whose memory planning reuses the buffer
            itself, it has no effect.

    Returns:
        [B] (or [S] for S packed sequences) float32, float64 for float64 logits; with `return_entropy` also the entropy.

    Raises:
        TypeError, ValueError: as `token_logps`; also a cu_seqlens that does not run from 0 to N.
    """
    _check_logits(logits, labels, temperature)
    _check_packing(labels, cu_seqlens)
    owner = logits if logits._base is None else logits._base
    if inplace_backward and owner.requires_grad and owner.is_leaf:
        raise ValueError(
            "inplace_backward=True overwrites the logits with their gradient, but logits is a leaf tensor, or a view "
            "of one, that others hold; pass the output of a module, or leave inplace_backward=False"
        )
    labels = _prepare_labels(labels, shift, ignore_index, cu_seqlens)
    logps, entropy = _token_statistics(logits, labels, ignore_index, temperature, return_entropy, inplace_backward)
    return _reduce(logps, entropy, labels, ignore_index, average, cu_seqlens, return_entropy)


def linear_sequence_logps(
    hidden: Tensor,  # [B, T, H], or [N, H] or [1, N, H] with cu_seqlens
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T], or [N] or [1, N]
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # [B]
    """`sequence_logps` of the logits hidden @ weight.T + bias, which are never held: see
    `robustloss.ops.linear_token_logps`.

    Args:
        hidden: [B, T, H], or [N, H] or [1, N, H] with `cu_seqlens`: the last hidden states.
        weight: [V, H], the output head (`lm_head.weight`), of hidden's dtype (under autocast both are cast).
        bias: [V].
        softcap: Gemma's logit soft cap c, logits = c tanh(a / c).
        chunk_size: tokens whose logits are held at a time; by default a buffer of about 64 MiB.
        labels and the rest: see the module's docstring.

    Returns:
        [B] float32 (float64 for float64 hidden states); with `return_entropy` also the entropy.

    Raises:
        TypeError, ValueError: as `sequence_logps`; also hidden, weight and bias that do not fit together.
    """
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    if weight.ndim != 2 or hidden.ndim not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [B, T, H] or [N, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_shape("bias", check_tensor("bias", bias), weight.shape[:1], "weight's first dimension")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have hidden's dtype {hidden.dtype}, got {value.dtype}; cast one, or use autocast"
            )
    _check_labels(labels, hidden, "hidden", temperature)
    # Here, because the op sees labels by the chunk, and would name the wrong position.
    check_labels_in_range(labels, len(weight), ignore_index)
    _check_packing(labels, cu_seqlens)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")

    labels = _prepare_labels(labels, shift, ignore_index, cu_seqlens)
    with torch.autocast(device_type, enabled=False):
        logps, _, entropy = torch.ops.robustloss.linear_token_logps(
            hidden.flatten(0, -2),
            weight,
            bias,
            labels.flatten(),
            ignore_index,
            float(temperature),
            softcap,
            chunk_size or default_chunk_size(len(weight), hidden.itemsize),
            return_entropy,
        )
    logps = logps.view(labels.shape)
    entropy = entropy.view(labels.shape) if return_entropy else entropy
    return _reduce(logps, entropy, labels, ignore_index, average, cu_seqlens, return_entropy)


def sequence_logratios(
    policy_logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    **options,
) -> Tensor:  # [B]
    """Log-ratio of each sequence, log pi(y|x) - log pi_ref(y|x); no gradient reaches the reference.

    Args:
        policy_logits, ref_logits, labels: as `sequence_logps`; the two logits have one shape.
        options: `sequence_logps`'s, except return_entropy; inplace_backward concerns the policy's logits only.

    Returns:
        [B] float32 (float64 for float64 logits), in nats.
    """
    check_tensor("policy_logits", policy_logits)
    check_shape("ref_logits", check_tensor("ref_logits", ref_logits), policy_logits.shape, "policy_logits' shape")
    _refuse_entropy(options)
    with torch.no_grad():
        ref_logps = sequence_logps(ref_logits, labels, **{**options, "inplace_backward": False})
    # Without return_entropy the result is one tensor.
    return cast(Tensor, sequence_logps(policy_logits, labels, **options)) - cast(Tensor, ref_logps)


def linear_sequence_logratios(
    policy_hidden: Tensor,  # [B, T, H]
    policy_weight: Tensor,  # [V, H]
    ref_hidden: Tensor,  # [B, T, H']
    ref_weight: Tensor,  # [V, H']
    labels: Tensor,  # [B, T]
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options,
) -> Tensor:  # [B]
    """Log-ratio of each sequence from both models' hidden states; no gradient reaches the reference.

    Args:
        policy_hidden, policy_weight, policy_bias: as `linear_sequence_logps`.
        ref_hidden, ref_weight, ref_bias: the reference model's; its hidden size may differ, its vocabulary may not.
        options: `linear_sequence_logps`'s, except bias and return_entropy.

    Returns:
        [B] float32 (float64 for float64 hidden states), in nats.
    """
    if len(check_tensor("ref_weight", ref_weight)) != len(check_tensor("policy_weight", policy_weight)):
        raise ValueError(f"ref_weight must have policy_weight's {len(policy_weight)} rows, got {len(ref_weight)}")
    _refuse_entropy(options)
    with torch.no_grad():
        ref_logps = linear_sequence_logps(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
    policy_logps = linear_sequence_logps(policy_hidden, policy_weight, labels, bias=policy_bias, **options)
    return cast(Tensor, policy_logps) - cast(Tensor, ref_logps)


# ---- what they share ----------------------------------------------------------------------------------------------


def _refuse_entropy(options: dict) -> None:
    if options.get("return_entropy"):
        raise TypeError("a log-ratio has no entropy: call sequence_logps with return_entropy=True instead")


def _check_logits(logits: Tensor, labels: Tensor, temperature: float) -> None:
    check_tensor("logits", logits)
    if logits.ndim not in (2, 3) or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [B, T, V] or [N, V] with V >= 1, got {tuple(logits.shape)}")
    _check_labels(labels, logits, "logits", temperature)


def _check_labels(labels: Tensor, like: Tensor, like_name: str, temperature: float) -> None:
    check_tensor("labels", labels, dtypes=INTEGER_DTYPES)
    check_shape("labels", labels, like.shape[:-1], f"{like_name}' shape without its last dimension")
    check_same_device("labels", labels, like_name, like)
    check_number("temperature", temperature, above=0)


def _check_packing(labels: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if labels.ndim != 2:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} hold packed sequences: give cu_seqlens, or labels [B, T]"
            )
        return
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGER_DTYPES)
    check_same_device("cu_seqlens", cu_seqlens, "labels", labels)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be [S + 1], got {tuple(cu_seqlens.shape)}")
    if labels.ndim == 2 and labels.shape[0] != 1:
        raise ValueError(f"with cu_seqlens labels must be [N] or [1, N], got {tuple(labels.shape)}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != labels.numel() or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to {labels.numel()} (the number of tokens), got {bounds}")


def _prepare_labels(labels: Tensor, shift: bool, ignore_index: int, cu_seqlens: Tensor | None) -> Tensor:
    labels = labels.long().contiguous()
    return shift_labels(labels, ignore_index, cu_seqlens) if shift else labels


def _token_statistics(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, return_entropy: bool, inplace_backward: bool
) -> tuple[Tensor, Tensor]:
    """Per-token (logps, entropy) in labels' shape; entropy is empty unless asked for."""
    rows = logits if logits.ndim == 3 else logits.unsqueeze(0)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    row_labels = labels.view(rows.shape[:-1])
    if inplace_backward and not torch.compiler.is_compiling():
        logps, entropy = _InplaceTokenLogps.apply(rows, row_labels, ignore_index, float(temperature), return_entropy)
    else:
        logps, _, entropy = torch.ops.robustloss.token_logps(
            rows, row_labels, ignore_index, float(temperature), return_entropy
        )
    return logps.view(labels.shape), entropy.view(labels.shape) if return_entropy else entropy


class _InplaceTokenLogps(torch.autograd.Function):
    """`token_logps` whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, temperature, return_entropy):
        logps, lse, entropy = torch.ops.robustloss.token_logps(
            logits, labels, ignore_index, temperature, return_entropy
        )
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = (ignore_index, temperature)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, _grad_entropy):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True overwrites the logits, so a second derivative (create_graph=True) is "
                "impossible; leave inplace_backward=False"
            )
        logits, labels, lse = ctx.saved_tensors
        torch.ops.robustloss.token_logps_bwd_(grad_logps, logits, labels, lse, *ctx.options)
        # Autograd then refuses a second backward through the overwritten logits instead of computing nonsense.
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None, None


def _reduce(
    logps: Tensor,
    entropy: Tensor,
    labels: Tensor,
    ignore_index: int,
    average: bool,
    cu_seqlens: Tensor | None,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    def total(values: Tensor) -> Tensor:
        return values.sum(-1) if cu_seqlens is None else sequence_sum(values.flatten(), cu_seqlens)

    count = total((labels != ignore_index).to(logps.dtype)).clamp(min=1) if average else None
    reduced = [
        total(values) if count is None else total(values) / count for values in (logps, entropy)[: 1 + return_entropy]
    ]
    return (reduced[0], reduced[1]) if return_entropy else reduced[0]
