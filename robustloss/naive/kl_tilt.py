r"""The worst case in a Kullback-Leibler ball: exponential tilting.

For a temperature tau ([W] Alg. 2 and Proposition 2), with q the samples' nominal weights,

.. math:: P_i = \frac{q_i e^{l_i / \tau}}{\sum_j q_j e^{l_j / \tau}}, \qquad L = \sum_i P_i l_i, \qquad
          \nabla L = \sum_i P_i \nabla l_i \quad (P \text{ held fixed}) = \nabla\, \tau \log \sum_i q_i e^{l_i / \tau}.

For a radius rho ([W] Theorem 3 and Lemma 12),

.. math:: \sup_{\mathrm{KL}(P \| q) \le \rho} \sum_i P_i l_i
          = \min_{\tau \ge 0} \; \tau \rho + \tau \log \sum_i q_i e^{l_i / \tau},

whose minimiser is the tau at which KL(P || q) = rho; when rho >= -log(q-mass at the maximum) the worst case is the
maximum and P is q restricted to the maximisers. Value and gradient agree there (Danskin).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normalized_weights(losses: Tensor, weights: Tensor | None) -> Tensor:
    """q [n]: uniform, or `weights` divided by their sum."""
    if weights is None:
        return torch.full_like(losses, 1 / max(losses.numel(), 1)).detach()
    fixed = weights.detach().to(losses.dtype)
    return fixed / fixed.sum()


def kl_tilt(losses: Tensor, *, tau: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tilted loss at temperature `tau`: (value [], P [n] detached).

    The value is :math:`\\sum_i P_i l_i`; every derivative is that of
    :math:`F = \\tau \\log \\sum_i q_i e^{l_i / \\tau}`.
    """
    nominal = normalized_weights(losses, weights)
    counted = nominal > 0
    # Shifted before the division: l / tau would overflow, or round the differences of large losses away.
    maximum = torch.where(counted, losses.detach(), -math.inf).max()
    scores = torch.where(counted, losses - maximum, 0.0) / tau + nominal.log()
    free_energy = tau * scores.logsumexp(0)
    worst_case = scores.detach().softmax(0)
    value = (worst_case * losses.detach()).sum()
    # The difference is exactly zero; at a high temperature F itself is mostly rounding.
    return value + (free_energy - free_energy.detach()), worst_case


def kl_tilt_unnormalized(
    losses: Tensor, *, tau: float, max_weight: float | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The weights of the papers' released code: :math:`\frac1n \sum_i \min(e^{(l_i - \bar l) / \tau}, w) \, l_i`,
    weights held fixed.

    They do not sum to one; kept for comparisons with that code. Returns (value [], P [n] = q times the weights,
    detached).
    """
    nominal = normalized_weights(losses, weights)
    fixed = losses.detach()
    tilt = ((fixed - (nominal * fixed).sum()) / tau).exp()
    if max_weight is not None:
        tilt = tilt.clamp(max=max_weight)
    worst_case = nominal * tilt
    return (worst_case * losses).sum(), worst_case


def kl_ball(losses: Tensor, *, rho: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The worst case over {P : KL(P || q) <= rho}: (value [], P [n] detached, tau [] detached), computed in float64."""
    dtype = losses.dtype
    losses = losses.double()
    nominal = normalized_weights(losses, weights)
    fixed = losses.detach()
    maximum = fixed[nominal > 0].max()
    mass_at_maximum = nominal[fixed == maximum].sum()
    if rho == 0:
        worst_case, tau = nominal, fixed.new_tensor(math.inf)
        value = (worst_case * losses).sum()
    elif rho >= -math.log(mass_at_maximum):
        worst_case, tau = torch.where(fixed == maximum, nominal / mass_at_maximum, 0.0), fixed.new_tensor(0.0)
        value = (worst_case * losses).sum()
    else:
        tau = _solve_temperature(fixed, nominal, rho)
        worst_case = (fixed / tau + nominal.log()).softmax(0)
        # One Newton step from the solution costs nothing in value and makes tau a function of the losses, so that the
        # second derivative sees how the temperature moves.
        divergence = _divergence(losses, nominal, tau)
        centred = fixed - (worst_case * fixed).sum()
        curvature = (worst_case * centred.square()).sum() / tau**3
        moved = tau - torch.where(curvature > 0, (rho - divergence) / curvature, 0.0)
        value = moved * rho + moved * (losses / moved + nominal.log()).logsumexp(0)
    return value.to(dtype), worst_case.detach().to(dtype), tau.to(dtype)


def _divergence(losses: Tensor, nominal: Tensor, tau: Tensor) -> Tensor:
    """KL(P_tau || q)."""
    scores = losses / tau + nominal.log()
    tilted = scores.softmax(0)
    return (tilted * losses).sum() / tau - scores.logsumexp(0)


def _solve_temperature(losses: Tensor, nominal: Tensor, rho: float, tolerance: float = 1e-14) -> Tensor:
    """The tau at which KL(P_tau || q) = rho: Newton on log(1 / tau), kept inside a bracket by bisection.

    The divergence rises monotonically from 0 (tau infinite) to -log(mass at the maximum) (tau zero).
    """
    spread = losses[nominal > 0].max() - losses[nominal > 0].min()
    scaled = (losses - losses[nominal > 0].max()) / spread
    low, high, log_sharpness = -60.0, 60.0, 0.0
    for _ in range(200):
        sharpness = math.exp(log_sharpness)
        scores = sharpness * scaled + nominal.log()
        tilted = scores.softmax(0)
        mean = (tilted * scaled).sum()
        gap = float(sharpness * mean - scores.logsumexp(0)) - rho
        if abs(gap) <= tolerance * max(rho, 1e-3) or high - low <= 1e-15 * max(1.0, abs(log_sharpness)):
            break
        low, high = (log_sharpness, high) if gap < 0 else (low, log_sharpness)
        slope = sharpness**2 * float((tilted * (scaled - mean).square()).sum())
        newton = log_sharpness - gap / slope if slope > 0 else math.nan
        log_sharpness = newton if low < newton < high else (low + high) / 2
    return spread / math.exp(log_sharpness)
