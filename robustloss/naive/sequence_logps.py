r"""Log-probability of each sequence: the sum (or mean) of its counted tokens' log-probabilities.

.. math:: \log \pi(y \mid x) = \sum_{t : y_t \ne \text{ignore}} \log \pi(y_t \mid x, y_{<t})

Source: [W] Eq. 3, [A] section 2; averaging per token is the length normalisation used by IPO's authors and SimPO.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from robustloss.naive.token_logps import statistics_dtype, token_entropy, token_logps


def shift_labels(labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Labels such that position t holds the token that position t predicts; a sequence's last position predicts none.

    labels [..., T]; cu_seqlens [S + 1] marks where packed sequences start and end.
    """
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None:
        # One slot more than there are tokens: the end of an empty sequence before the first token falls into slot 0.
        ends = torch.zeros(labels.shape[-1] + 1, dtype=torch.bool, device=labels.device)
        ends[cu_seqlens[1:].long()] = True
        shifted = torch.where(ends[1:], ignore_index, shifted)
    return shifted


def reduce_tokens(values: Tensor, counted: Tensor, *, average: bool, cu_seqlens: Tensor | None) -> Tensor:
    """Sum (or mean over counted tokens) of values [B, T] per row, or of values [N] per packed sequence."""
    if cu_seqlens is None:
        total, count = values.sum(-1), counted.sum(-1)
    else:
        starts = cu_seqlens.tolist()
        spans = list(pairwise(starts))
        total = torch.stack([values[a:b].sum() for a, b in spans]) if spans else values.new_zeros(0)
        count = torch.stack([counted[a:b].sum() for a, b in spans]) if spans else counted.new_zeros(0)
    return total / count.clamp(min=1) if average else total


def sequence_logps(
    logits: Tensor,  # [B, T, V], or [N, V] with cu_seqlens
    labels: Tensor,  # [B, T], or [N]
    *,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [B]
    """The sum over each sequence of `token_logps`; entropy is reduced the same way."""
    if shift:
        labels = shift_labels(labels, ignore_index, cu_seqlens)
    counted = labels != ignore_index
    tokens = token_logps(logits, labels, ignore_index=ignore_index, temperature=temperature)
    logps = reduce_tokens(tokens, counted, average=average, cu_seqlens=cu_seqlens)
    if not return_entropy:
        return logps
    entropy = token_entropy(logits.detach(), labels, ignore_index=ignore_index, temperature=temperature)
    return logps, reduce_tokens(entropy, counted, average=average, cu_seqlens=cu_seqlens)


def linear_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
) -> Tensor:  # [..., V]
    r"""The language-model head: :math:`a = h W^\top + b`, then Gemma's soft cap :math:`c \tanh(a / c)`."""
    dtype = statistics_dtype(hidden.dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_sequence_logps(
    hidden: Tensor,  # [B, T, H], or [N, H] with cu_seqlens
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T], or [N]
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:  # [B]
    """`sequence_logps` of the head's logits."""
    return sequence_logps(linear_logits(hidden, weight, bias=bias, softcap=softcap), labels, **options)
