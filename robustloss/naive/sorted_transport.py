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

from robustloss.naive.links import link_loss
from robustloss.naive.token_logps import samples_dtype


def sorted_transport(
    u: Tensor,  # [R, n]
    u_ref: Tensor | None = None,  # [R, n]; None counts as zeros, here and below
    v: Tensor | None = None,  # [R, m]
    v_ref: Tensor | None = None,  # [R, m]
    desirable: Tensor | None = None,  # bool [R, n], instead of v: u's other samples are the other side
    u_weights: Tensor | None = None,  # [R, n], non-negative; zero is absence
    v_weights: Tensor | None = None,  # [R, m]
    *,
    link: str = "logistic",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(value [R], differentiable; statistics [R, 2], detached: `dominance_violation`); 0 where a side is empty.

    Nothing here depends on the data but numbers, so that it compiles, and no host waits for a device.
    """
    u, v, u_weights, v_weights = two_samples(u, u_ref, v, v_ref, desirable, u_weights, v_weights)
    margins, mass = sorted_margins(u, v, u_weights, v_weights)
    losses = margins
    if link != "identity":
        losses = link_loss(margins, beta=beta, link=link, label_smoothing=label_smoothing)
    value = losses.mean(-1) if mass is None else (mass * losses).sum(-1)
    return value, torch.stack(dominance_violation(margins.detach(), mass), -1)


def two_samples(
    u: Tensor,
    u_ref: Tensor | None,
    v: Tensor | None,
    v_ref: Tensor | None,
    desirable: Tensor | None,
    u_weights: Tensor | None,
    v_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What `match` takes; labelled samples are on both sides, on one of them without weight."""
    dtype = samples_dtype(u, u_ref, v, v_ref)
    u = u.to(dtype) if u_ref is None else u.to(dtype) - u_ref.to(dtype)
    if desirable is None:
        assert v is not None
        v = v.to(dtype) if v_ref is None else v.to(dtype) - v_ref.to(dtype)
        return u, v, u_weights, v_weights
    if u_weights is None:
        return u, u, desirable, ~desirable
    return u, u, u_weights * desirable, u_weights * ~desirable


def sorted_margins(
    u: Tensor, v: Tensor, u_weights: Tensor | None = None, v_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The margins between matched quantiles, 0 in cells without mass, and the mass of each, as `match`."""
    u_cells, v_cells, mass = match(u, v, u_weights, v_weights)
    margins = u.gather(-1, u_cells) - v.gather(-1, v_cells)
    return margins if mass is None else torch.where(mass > 0, margins, 0.0), mass


def match(
    u: Tensor,  # [..., n]
    v: Tensor,  # [..., m]
    u_weights: Tensor | None = None,  # [..., n], non-negative, or bool: whether a sample is there
    v_weights: Tensor | None = None,  # [..., m]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which sample of u meets which of v in each cell of the merged quantile grids, and the cell's mass: two indices
    [..., cells] and a mass [..., cells], None if all are equal.

    At ties the stable sort decides. There are n + m cells whatever the data, some of mass zero: all of them where the
    weights of a side are all zero. Without samples on a side there are no cells.
    """
    u_order, v_order = (x.argsort(dim=-1, stable=True) for x in (u, v))
    if u.shape[-1] == 0 or v.shape[-1] == 0:
        return u_order[..., :0], v_order[..., :0], u[..., :0].detach()
    if u_weights is None and v_weights is None and u.shape[-1] == v.shape[-1]:
        return u_order, v_order, None
    u_levels, v_levels = _cumulative(u_weights, u_order), _cumulative(v_weights, v_order)
    u_total, v_total = u_levels[..., -1:], v_levels[..., -1:]
    if u_levels.is_floating_point() or v_levels.is_floating_point():
        u_levels, v_levels, total = u_levels.double() / u_total, v_levels.double() / v_total, 1
    else:
        # Levels i/n and j/m as integers over n * m: the cells are exact.
        u_levels, v_levels, total = u_levels * v_total, v_levels * u_total, u_total * v_total
    levels = torch.cat([u_levels, v_levels], -1).sort(-1).values
    mass = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1])).double() / total
    # A level that is no number is that of a side whose weights are all zero.
    mass = torch.where((mass > 0) & (u_total > 0) & (v_total > 0), mass, 0.0).to(u.dtype)
    u_cells, v_cells = (
        order.gather(-1, torch.searchsorted(own, levels).clamp(max=order.shape[-1] - 1))
        for order, own in ((u_order, u_levels), (v_order, v_levels))
    )
    return u_cells, v_cells, mass


def _cumulative(weights: Tensor | None, order: Tensor) -> Tensor:
    """The mass up to and including each sorted sample: integers where samples count one, else float64."""
    if weights is None:
        return torch.arange(1, order.shape[-1] + 1, device=order.device).expand(order.shape)
    mass = weights.detach().to(torch.int64 if weights.dtype == torch.bool else torch.float64)
    return mass.gather(-1, order).cumsum(-1)


def dominance_violation(margins: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""How far u is from dominating v in the first order: (area [...], w1 [...]), both 0 where it does.

    area is the share of quantile levels at which :math:`F_u^{-1} < F_v^{-1}`, between 0 and 1; w1 is
    :math:`\int_0^1 (F_v^{-1} - F_u^{-1})_+ ds`, in nats, the Wasserstein-1 distance from u to the nearest distribution
    that dominates v. Source: [A] App. F (area of violation, Wasserstein-1 violation).
    """
    mass = torch.full_like(margins, 1 / max(margins.shape[-1], 1)) if mass is None else mass
    return (mass * (margins < 0)).sum(-1), (mass * (-margins).relu()).sum(-1)
