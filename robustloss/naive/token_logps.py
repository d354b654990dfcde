r"""Log-probability of each label under the softmax of its logits, and statistics of that softmax.

.. math:: \log p_t = z_{t, y_t} - \log \sum_v e^{z_{t, v}}, \qquad z = \text{logits} / \text{temperature}

Source: the definition of a causal language model's likelihood; [W] section 3, [A] section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary are float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def samples_dtype(*samples: Tensor | None) -> torch.dtype:
    """float64 if any sample is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in samples) else torch.float32


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    r"""Gemma's soft cap, :math:`c \tanh(x / c)`; None is no cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logps(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:  # [...]
    """`log softmax(logits / temperature)[labels]`, and 0 where the label is `ignore_index`."""
    counted = labels != ignore_index
    # What stands in an ignored row, NaN included, reaches neither the value nor the gradient.
    logits = torch.where(counted.unsqueeze(-1), logits.to(statistics_dtype(logits.dtype)), 0.0)
    log_probabilities = (logits / temperature).log_softmax(-1)
    picked = log_probabilities.gather(-1, torch.where(counted, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, picked, 0.0)


def token_entropy(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:  # [...]
    r"""Entropy :math:`-\sum_v p_v \log p_v` in nats, and 0 where the label is `ignore_index`."""
    log_probabilities = (logits.to(statistics_dtype(logits.dtype)) / temperature).log_softmax(-1)
    # xlogy's convention, 0 log 0 = 0: a logit of -inf is a token that cannot occur, not an undefined entropy.
    probabilities = log_probabilities.exp()
    entropy = -torch.where(probabilities != 0, probabilities * log_probabilities, 0.0).sum(-1)
    return torch.where(labels != ignore_index, entropy, 0.0)


def token_top1(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
) -> Tensor:  # [...]
    """1 where no token has a larger logit than the label, else 0; and 0 where the label is `ignore_index`."""
    counted = labels != ignore_index
    picked = logits.gather(-1, torch.where(counted, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    return (counted & (picked == logits.amax(-1))).to(statistics_dtype(logits.dtype))


def token_mean_logit(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
) -> Tensor:  # [...]
    """Mean logit over the vocabulary, before the temperature; 0 where the label is `ignore_index`."""
    return torch.where(labels != ignore_index, logits.to(statistics_dtype(logits.dtype)).mean(-1), 0.0)
