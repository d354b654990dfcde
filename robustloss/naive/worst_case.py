r"""Other adversaries than the Kullback-Leibler one: which reweighting P of the losses l, near their nominal weights q.

=================================== ==================================================== ==============================
function                            the worst (or mildest) P over                        source
=================================== ==================================================== ==============================
cvar(alpha)                         P_i <= q_i / alpha                                   Rockafellar & Uryasev 2000
chi_square_ball(rho)                sum_i (P_i - q_i)^2 / q_i <= rho                     Duchi & Namkoong 1810.08750
total_variation_ball(rho)           sum_i abs(P_i - q_i) / 2 <= rho, P = 0 where q = 0   Mandal et al. 2503.00539
soft_min(beta_prime)                all P, the mildest: + beta_prime KL(P || q)          Wu et al. 2407.07880 (Dr.DPO)
=================================== ==================================================== ==============================

Each returns (value [], P [n] detached); the gradient of the value is P (Danskin), at ties a valid and deterministic
subgradient: tied samples share in proportion to q. A sample of weight zero is absent. Computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustloss.naive.kl_tilt import normalized_weights

WorstCase = tuple[Tensor, Tensor]


def cvar(losses: Tensor, *, alpha: float, weights: Tensor | None = None) -> WorstCase:
    """The mean of the worst `alpha` share of the losses, 0 < alpha <= 1."""
    nominal, fixed = _double(losses, weights)
    worst_case = _heaviest(fixed, nominal, alpha) / alpha
    return _linear(losses, worst_case)


def total_variation_ball(losses: Tensor, *, rho: float, weights: Tensor | None = None) -> WorstCase:
    """The worst case moves a mass of `rho`, 0 <= rho <= 1, from the smallest losses to the largest."""
    nominal, fixed = _double(losses, weights)
    maximum = fixed[nominal > 0].max()
    at_maximum = torch.where(fixed == maximum, nominal, 0.0)
    moved = min(rho, 1 - at_maximum.sum().item())
    worst_case = _heaviest(fixed, nominal, 1 - moved) + moved * at_maximum / at_maximum.sum()
    return _linear(losses, worst_case)


def _heaviest(losses: Tensor, nominal: Tensor, share: float) -> Tensor:
    """What is left of the nominal weights when only the largest losses, `share` of the mass, are kept."""
    levels, group = losses.unique(return_inverse=True)  # ascending: equal losses are one
    mass = torch.zeros_like(levels).index_add(0, group, nominal)
    above = mass.flip(0).cumsum(0).flip(0) - mass  # summed from the top, where the mass that counts may be tiny
    kept = (share - above).clamp(min=0).minimum(mass) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return nominal * kept[group]


def chi_square_ball(losses: Tensor, *, rho: float, weights: Tensor | None = None) -> WorstCase:
    r"""The worst case over a ball of Pearson's chi-square divergence, rho >= 0.

    .. math:: P_i \propto q_i (l_i - \eta)_+, \qquad
              L = \min_\eta \; \eta + \sqrt{1 + \rho} \, \Big(\sum_i q_i (l_i - \eta)_+^2\Big)^{1/2}

    where eta, below the k-th largest loss only, follows from those k losses alone; k is the smallest that fits. When
    1 + rho >= 1 / (q-mass at the maximum) the worst case is q restricted to the maximisers.
    """
    nominal, fixed = _double(losses, weights)
    maximum = fixed[nominal > 0].max()
    at_maximum = torch.where(fixed == maximum, nominal, 0.0)
    mass_below = nominal[fixed < maximum].sum()
    if rho * at_maximum.sum() >= mass_below:
        return _linear(losses, at_maximum / at_maximum.sum())
    if rho == 0:
        return _linear(losses, nominal)
    shifted = torch.where(nominal > 0, losses.double() - maximum, 0.0)
    spread = -shifted.min().detach()
    scaled = shifted / spread  # in [-1, 0]: the squares of any losses stay within range
    eta = _solve_threshold(scaled.detach(), nominal, rho)
    excess = (scaled - eta).relu()
    first, second = (nominal * excess).sum(), (nominal * excess.square()).sum()
    dual = eta + math.sqrt(1 + rho) * second.sqrt()
    worst_case = (nominal * excess).detach() / first.detach()
    # The differences are exactly zero; at a small radius the dual is a difference of two large numbers. eta moves with
    # the losses, which leaves the gradient as it is and adds to the Hessian what the square contributes.
    slope = -math.sqrt(1 + rho) * first / second.sqrt()  # d dual / d eta - 1
    active = torch.where(excess > 0, nominal, 0.0)
    deviation = scaled - (active * scaled).sum() / active.sum()
    curvature = math.sqrt(1 + rho) * active.sum() * (active * deviation.square()).sum() / second.pow(1.5)
    # Where only the maximisers are left, eta moves nothing.
    drift = torch.where(curvature > 0, 0.5 / curvature, 0.0).detach() * (slope - slope.detach()).square()
    value = maximum + (worst_case * shifted.detach()).sum() + spread * (dual - dual.detach() - drift)
    return value.to(losses.dtype), worst_case.to(losses.dtype)


def _solve_threshold(shifted: Tensor, nominal: Tensor, rho: float) -> Tensor:
    """The eta at which sum P^2 / q = 1 + rho, for losses whose maximum is 0.

    With M, m and v the mass, mean and variance of the losses above eta, the condition reads
    (m - eta)^2 (M (1 + rho) - 1) = v; of the sets of k largest losses, one gives an eta between its smallest loss and
    the next.
    """
    order = shifted.masked_fill(nominal == 0, -math.inf).sort(descending=True).indices
    order = order[: int((nominal > 0).sum())]
    ordered, weight = shifted[order], nominal[order]
    mass = weight.cumsum(0)
    mean = (weight * ordered).cumsum(0) / mass
    next_below = torch.cat([ordered[1:], ordered.new_full((1,), -math.inf)])
    # M (1 + rho) - 1, where 1 - M is summed from below: a small radius leaves no digits to the difference.
    slack = mass * rho - (weight.flip(0).cumsum(0).flip(0) - weight)
    for k in ((slack > 0) & (ordered < 0) & (ordered > next_below)).nonzero().flatten().tolist():
        variance = (weight[: k + 1] * (ordered[: k + 1] - mean[k]).square()).sum() / mass[k]
        eta = mean[k] - (variance / slack[k]).sqrt()
        if eta >= next_below[k]:
            return eta
    raise AssertionError("the losses hold no NaN, so the last set fits")


def soft_min(losses: Tensor, *, beta_prime: float, weights: Tensor | None = None) -> WorstCase:
    r"""Dr.DPO's aggregate, which trusts the pairs that fit: :math:`-\beta' \log \sum_i q_i e^{-l_i / \beta'}`.

    :math:`P_i \propto q_i e^{-l_i / \beta'}`: the opposite sign of `kl_tilt`. Value and gradient agree.
    """
    nominal, fixed = _double(losses, weights)
    minimum = fixed[nominal > 0].min()
    exponents = torch.where(nominal > 0, minimum - losses.double(), 0.0) / beta_prime
    scores = exponents + nominal.log()
    if exponents.min() > -1:
        # Close to the mean the logarithm is close to zero: only expm1 and log1p leave digits of it.
        log_mean = (nominal * exponents.expm1()).sum().log1p()
    else:
        log_mean = scores.logsumexp(0)
    value = minimum - beta_prime * log_mean
    return value.to(losses.dtype), scores.detach().softmax(0).to(losses.dtype)


def _double(losses: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    fixed = losses.detach().double()
    return normalized_weights(fixed, weights), fixed


def _linear(losses: Tensor, worst_case: Tensor) -> WorstCase:
    value = (worst_case * losses.double()).sum()
    return value.to(losses.dtype), worst_case.to(losses.dtype)
