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
    worst_case = torch.where(nominal > 0, nominal * tilt, 0.0)
    return (worst_case * losses).sum(), worst_case


def kl_ball(losses: Tensor, *, rho: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The worst case over {P : KL(P || q) <= rho}: (value [], P [n] detached, tau [] detached), computed in float64."""
    dtype = losses.dtype
    losses = losses.double()
    nominal = normalized_weights(losses, weights)
    fixed = losses.detach()
    maximum = fixed[nominal > 0].max()
    mass_at_maximum = nominal[fixed == maximum].sum()
    mass_below = nominal[fixed < maximum].sum()
    if rho == 0:
        worst_case, tau = nominal, fixed.new_tensor(math.inf)
        value = (worst_case * losses).sum()
    elif rho >= math.log1p(mass_below / mass_at_maximum):
        worst_case, tau = torch.where(fixed == maximum, nominal / mass_at_maximum, 0.0), fixed.new_tensor(0.0)
        value = (worst_case * losses).sum()
    else:
        shifted = torch.where(nominal > 0, losses - maximum, 0.0)
        tau = _solve_temperature(shifted.detach(), nominal, rho)
        scores = shifted / tau + nominal.log()
        worst_case = scores.detach().softmax(0)
        free_energy = tau * scores.logsumexp(0)
        # The temperature moves with the losses, d tau / d l = tau P (l - mean) / variance. That leaves the gradient P
        # as it is and adds to the Hessian what this square, zero with a zero gradient, contributes.
        mean = (worst_case * shifted.detach()).sum()
        deviation = worst_case * (shifted.detach() - mean)
        variance = (deviation * (shifted.detach() - mean)).sum().clamp(min=torch.finfo(torch.float64).tiny)
        drift = (deviation * (losses - fixed)).sum().square() / (2 * variance * tau)
        value = maximum + mean + (free_energy - free_energy.detach()) - drift
    return value.to(dtype), worst_case.to(dtype), tau.to(dtype)


def _divergence(exponents: Tensor, nominal: Tensor) -> float:
    """KL(P || q) of P proportional to q exp(exponents)."""
    centred = exponents - (nominal * exponents).sum()
    if centred.abs().max() < 1:
        # Both terms are close to zero and cancel to the second order: only expm1 and log1p leave digits of a tiny KL.
        growth = nominal * centred.expm1()
        return float((growth * centred).sum() / (1 + growth.sum()) - growth.sum().log1p())
    scores = exponents + nominal.log()
    return float((scores.softmax(0) * exponents).sum() - scores.logsumexp(0))


def _solve_temperature(shifted: Tensor, nominal: Tensor, rho: float) -> Tensor:
    """The tau at which KL(P_tau || q) = rho, for losses whose maximum is 0: Newton for log KL as a function of
    log(1 / tau), kept inside a bracket by bisection.

    The divergence rises monotonically from 0 (tau infinite) to -log(mass at the maximum) (tau zero), like 1 / tau^2 at
    first, which is a straight line in the logarithms.
    """
    spread = -shifted.min()
    scaled = shifted / spread
    low, high, log_sharpness = -200.0, 200.0, 0.0
    for _ in range(100):
        sharpness = math.exp(log_sharpness)
        divergence = _divergence(sharpness * scaled, nominal)
        low, high = (log_sharpness, high) if divergence < rho else (low, log_sharpness)
        tilted = (sharpness * scaled + nominal.log()).softmax(0)
        slope = sharpness**2 * float((tilted * (scaled - (tilted * scaled).sum()).square()).sum())
        step = divergence * math.log(rho / divergence) / slope if divergence > 0 and slope > 0 else math.nan
        inside = low < log_sharpness + step < high
        previous, log_sharpness = log_sharpness, log_sharpness + step if inside else (low + high) / 2
        if abs(log_sharpness - previous) <= 1e-12:
            break
    return spread / math.exp(log_sharpness)
