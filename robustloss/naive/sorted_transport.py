r"""One-dimensional optimal transport by sorting: the coupling behind AOT.

For a convex link the optimal coupling of two samples matches equal quantiles ([A] Theorem 1), so

.. math:: \min_\gamma \int \ell(u - v) \, d\gamma = \int_0^1 \ell\left(F_u^{-1}(s) - F_v^{-1}(s)\right) ds.

With n = m unweighted samples that is the mean over order statistics :math:`\frac1n \sum_i \ell(u_{(i)} - v_{(i)})`;
otherwise both quantile functions are step functions, and the integral is a sum over the cells of their merged grids
([A] has n = m only).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_margins(
    u: Tensor,  # [n]
    v: Tensor,  # [m]
    u_weights: Tensor | None = None,  # [n], non-negative
    v_weights: Tensor | None = None,  # [m]
) -> tuple[Tensor, Tensor | None]:
    """The margins between matched quantiles, and the mass of each: (margins [cells], mass [cells] or None if all are
    equal).

    At ties the stable sort decides, a valid and deterministic subgradient.
    """
    u_sorted, u_order = u.sort(stable=True)
    v_sorted, v_order = v.sort(stable=True)
    if u_weights is None and v_weights is None:
        if len(u) == len(v):
            return u_sorted - v_sorted, None
        # Levels i/n and j/m as integers over n * m: the cells are exact.
        u_levels = torch.arange(1, len(u) + 1, device=u.device) * len(v)
        v_levels = torch.arange(1, len(v) + 1, device=u.device) * len(u)
        total = len(u) * len(v)
    else:
        u_levels = _weight_levels(u, u_weights, u_order)
        v_levels = _weight_levels(v, v_weights, v_order)
        total = 1
    levels = torch.cat([u_levels, v_levels]).sort().values
    mass = (levels.diff(prepend=levels.new_zeros(1)).double() / total).to(u.dtype)
    u_cells = torch.searchsorted(u_levels, levels).clamp(max=len(u) - 1)
    v_cells = torch.searchsorted(v_levels, levels).clamp(max=len(v) - 1)
    return u_sorted[u_cells] - v_sorted[v_cells], mass


def _weight_levels(values: Tensor, weights: Tensor | None, order: Tensor) -> Tensor:
    """The cumulative mass up to and including each sorted sample, in float64, ending at exactly one."""
    mass = torch.ones_like(values) if weights is None else weights
    cumulative = mass.detach().double()[order].cumsum(0)
    return cumulative / cumulative[-1:]


def dominance_violation(margins: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""How far u is from dominating v in the first order: (area [], w1 []), both 0 where it does.

    area is the share of quantile levels at which :math:`F_u^{-1} < F_v^{-1}`, between 0 and 1; w1 is
    :math:`\int_0^1 (F_v^{-1} - F_u^{-1})_+ ds`, in nats, the Wasserstein-1 distance from u to the nearest distribution
    that dominates v. Source: [A] App. F (area of violation, Wasserstein-1 violation).
    """
    mass = torch.full_like(margins, 1 / max(margins.numel(), 1)) if mass is None else mass
    return (mass * (margins < 0)).sum(), (mass * (-margins).relu()).sum()
