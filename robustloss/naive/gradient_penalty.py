r"""The exact Wasserstein gradient penalty.

.. math:: R = \rho \, \frac1n \sum_i \|\nabla_z l_i\|_2^2 \quad (\text{squared}), \qquad
          R = \rho \sqrt{\frac1n \sum_i \|\nabla_z l_i\|_2^2} \quad (\text{rooted}),

z the input embeddings of both of pair i's sequences. Source: [W] Alg. 1 (rooted) and App. F (squared, what was run).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.naive.kl_tilt import normalized_weights


def gradient_penalty(
    losses: Tensor,  # [B]
    embeddings: Tensor,  # [k * B, ...]
    *,
    rho: float,
    squared: bool = True,
    weights: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:
    """The penalty and the squared gradient norms: (R [], norms [B] detached).

    Row i + j B of `embeddings` belongs to loss i (chosen rows first, then rejected: k = 2), and loss i must depend on
    its own rows only. The penalty is differentiable when grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    # grad_outputs instead of losses.sum(), which would have no graph under torch.no_grad.
    (gradient,) = torch.autograd.grad(
        losses, embeddings, torch.ones_like(losses), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    if gradient is None:
        raise ValueError("embeddings must be part of the graph of the losses, which do not depend on them")
    per_row = gradient.to(losses.dtype).square().unsqueeze(-1).flatten(1).sum(1)
    norms = per_row.view(len(gradient) // max(len(losses), 1), len(losses)).sum(0)
    mean = (normalized_weights(losses, weights) * norms).sum()
    if squared:
        return rho * mean, norms.detach()
    # The root has no derivative at zero; zero is a subgradient there.
    root = torch.where(mean > 0, torch.where(mean > 0, mean, 1.0).sqrt(), 0.0)
    return rho * root, norms.detach()
