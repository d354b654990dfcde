r"""A loss of the batch: margins, a link, an aggregate.

.. math:: h_i = (\text{chosen}_i - \text{ref\_chosen}_i) - (\text{rejected}_i - \text{ref\_rejected}_i), \qquad
          L = \text{aggregate}(\ell(h_1), \dots, \ell(h_B))

The pieces are `links`, `kl_tilt` and `worst_case`. With the link "identity" the margins are the losses themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustloss.naive.kl_tilt import kl_ball, kl_tilt, kl_tilt_unnormalized, normalized_weights
from robustloss.naive.links import link_loss
from robustloss.naive.worst_case import chi_square_ball, cvar, soft_min, total_variation_ball

# (losses, weights, parameter) -> (value [], P [n] detached), and what `parameter` is.
AGGREGATES: dict[str, Callable[[Tensor, Tensor | None, float], tuple[Tensor, Tensor]]] = {
    "cvar": lambda losses, weights, alpha: cvar(losses, alpha=alpha, weights=weights),
    "chi_square": lambda losses, weights, rho: chi_square_ball(losses, rho=rho, weights=weights),
    "total_variation": lambda losses, weights, rho: total_variation_ball(losses, rho=rho, weights=weights),
    "soft_min": lambda losses, weights, beta_prime: soft_min(losses, beta_prime=beta_prime, weights=weights),
}
# What the statistics are, in order. The first five are means over the batch, whatever the weights.
STATISTICS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logratios",
    "rejected_logratios",
    "accuracy",  # the share of pairs with chosen_logratio > rejected_logratio
    "effective_sample_size",  # (sum P)^2 / sum P^2
    "max_weight",  # max P
    "tau",  # the KL tilts' temperature, NaN for other aggregates
)


def logratios(
    chosen: Tensor, rejected: Tensor | None, ref_chosen: Tensor | None, ref_rejected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected sequences, [B] each; the margins are their difference."""
    zeros = torch.zeros_like(chosen)
    rejected, ref_chosen, ref_rejected = (zeros if x is None else x for x in (rejected, ref_chosen, ref_rejected))
    return chosen - ref_chosen, rejected - ref_rejected


def preference_loss(
    chosen: Tensor,  # [B]
    rejected: Tensor | None = None,  # [B]; None counts as zeros, here and below
    ref_chosen: Tensor | None = None,  # [B]
    ref_rejected: Tensor | None = None,  # [B]
    weights: Tensor | None = None,  # [B], non-negative; normalised to q
    *,
    link: str = "logistic",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    aggregate: str = "mean",
    parameter: float = 0.0,  # tau of kl_tilt and kl_tilt_unnormalized; rho; alpha; beta_prime
    max_weight: float = math.inf,  # of kl_tilt_unnormalized
) -> tuple[Tensor, Tensor, Tensor]:
    """(value [], differentiable; P [B], detached; statistics [8], detached: `STATISTICS`)."""
    chosen_ratios, rejected_ratios = logratios(chosen, rejected, ref_chosen, ref_rejected)
    margins = chosen_ratios - rejected_ratios
    if link == "identity":
        losses = margins
    else:
        losses = link_loss(margins, beta=beta, link=link, label_smoothing=label_smoothing)
    tau = losses.new_tensor(math.nan)
    if not len(losses):
        value, worst_case = losses.sum(), losses.detach()
    elif aggregate == "mean":
        worst_case = normalized_weights(losses, weights)
        value = losses.mean() if weights is None else (worst_case * losses).sum()
    elif aggregate == "kl_tilt":
        value, worst_case = kl_tilt(losses, tau=parameter, weights=weights)
        tau = losses.new_tensor(parameter)
    elif aggregate == "kl_ball":
        value, worst_case, tau = kl_ball(losses, rho=parameter, weights=weights)
    elif aggregate == "kl_tilt_unnormalized":
        value, worst_case = kl_tilt_unnormalized(losses, tau=parameter, max_weight=max_weight, weights=weights)
        tau = losses.new_tensor(parameter)
    else:
        value, worst_case = AGGREGATES[aggregate](losses, weights, parameter)
    rejected = torch.zeros_like(chosen) if rejected is None else rejected
    means = [x.mean() for x in (chosen, rejected, chosen_ratios, rejected_ratios)]
    accuracy = (chosen_ratios > rejected_ratios).to(losses.dtype).mean()
    effective = worst_case.sum().square() / worst_case.square().sum()
    largest = worst_case.max() if len(losses) else tau
    return value, worst_case, torch.stack([*means, accuracy, effective, largest, tau]).detach()
