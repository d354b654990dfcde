r"""Sinkhorn sort: the values are transported to an increasing grid with entropy, and each point of the grid takes the
mean of what arrives there (Cuturi, Teboul and Vert 2019, arXiv 1905.11885, Eq. 6 and 8).

.. math:: P = \arg\min_{P \ge 0} \sum_{ij} P_{ij} (z_i - y_j)^2 + \varepsilon \sum_{ij} P_{ij} (\log P_{ij} - 1),
          \qquad P 1 = P^T 1 = \tfrac1n 1, \qquad s = n P^T x

with z the standardised values and y the standardised grid, n equally spaced points. The plan is n P = e,
:math:`e_{ij} = \exp(f_i + g_j + 2 z_i y_j / \varepsilon)`: the squares go into the potentials f and g. Affine maps keep
z, so the sort commutes with them; the paper's squashing is not needed, as no exponential is taken of a cost alone.

The potentials are found by Newton's method on the semi-dual :math:`\sum_i f_i + \sum_j g_j(f)`, where g makes each
column's sum 1: its gradient is one minus the rows' sums r, and minus its Hessian is :math:`\mathrm{diag}(r) - e e^T`.
Sinkhorn's alternation finds the same point in about :math:`1 / \varepsilon` times as many passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_HALVINGS = 30


def grid(n: int, like: Tensor) -> Tensor:
    """n equally spaced points of mean 0 and variance 1 (0 for a single one), float64."""
    points = torch.arange(n, dtype=torch.float64, device=like.device) - (n - 1) / 2
    return points * math.sqrt(12 / (n * n - 1)) if n > 1 else points


def standardize(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mean, standard deviation), float64; z = 0 in a constant row."""
    origin = values[..., :1].double()
    centred = values.double() - origin  # exactly 0 in a constant row
    spread = centred.abs().amax(-1, keepdim=True)
    scaled = centred / torch.where(spread > 0, spread, 1.0)
    mean = scaled.mean(-1, keepdim=True)
    deviation = (scaled - mean).square().mean(-1, keepdim=True).sqrt()
    z = (scaled - mean) / torch.where(spread > 0, deviation, 1.0)
    return z, origin + spread * mean, spread * deviation


def sort_ascending(
    values: Tensor,  # [R, n] ascending
    strength: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `sinkhorn_sort`: (sorted [R, n], f [R, n], g [R, n], error [R])."""
    rows, n = values.shape
    if not values.numel():
        potential = torch.empty_like(values, dtype=torch.float64)
        return torch.empty_like(values), potential, potential.clone(), potential.new_zeros(rows)
    z, mean, deviation = standardize(values)
    y = grid(n, values)
    products = 2 / strength * z.unsqueeze(-1) * y
    # The duals of the hard sort, by the trapezoidal rule along it.
    f = -torch.cat([z.new_zeros(rows, 1), (z.diff() * (y[1:] + y[:-1]) / strength).cumsum(-1)], -1)
    iteration = 0
    while True:
        exponents = products + f.unsqueeze(-1)
        plan = exponents.softmax(-2)  # its columns sum to 1 to the last digit, as they would not by way of g
        residual = 1 - plan.sum(-1)
        error = torch.maximum(residual.abs(), residual.cumsum(-1).abs() / math.sqrt(n)).amax(-1)
        done = error <= tolerance
        if iteration == max_iterations or bool(done.all()):
            break
        f = torch.where(done.unsqueeze(-1), f, f + _newton_step(exponents, plan, residual))
        iteration += 1
    barycentres = (plan.mT @ z.unsqueeze(-1)).squeeze(-1)
    return (mean + deviation * barycentres).to(values.dtype), f, -exponents.logsumexp(-2), error


def _newton_step(exponents: Tensor, plan: Tensor, residual: Tensor) -> Tensor:
    """The change of f [R, n], halved until the semi-dual grows by it, or loses no more than digits."""
    step = _solve(plan, residual)
    ascent = (residual * step).sum(-1, keepdim=True)
    length = torch.ones_like(ascent)
    for _ in range(MOST_HALVINGS):
        change = length * step
        lost = (plan * change.unsqueeze(-1).exp()).sum(-2).log().sum(-1, keepdim=True)
        grown = change.sum(-1, keepdim=True) - lost >= 1e-4 * length * ascent - 1e-7 * step.shape[-1]
        if bool(grown.all()):
            break
        length = torch.where(grown, length, length / 2)
    return length * step


def _solve(plan: Tensor, rhs: Tensor) -> Tensor:
    """x of (diag(r) - e e^T) x = rhs, r the rows' sums: singular, as constants change nothing, and nearly so where the
    plan falls apart; both are ruled out by a ridge."""
    n = plan.shape[-1]
    identity = torch.eye(n, dtype=plan.dtype, device=plan.device)
    matrix = torch.diag_embed(plan.sum(-1)) - plan @ plan.mT + 1 / n + 1e-14 * identity
    return torch.linalg.solve(matrix, rhs.unsqueeze(-1)).squeeze(-1)


def sort_ascending_bwd(
    grad_sorted: Tensor,  # [R, n]
    values: Tensor,  # [R, n] ascending
    f: Tensor,
    g: Tensor,
    strength: float,
    tolerance: float,
) -> Tensor:
    r"""The op `sinkhorn_sort_bwd`: the gradient with respect to the values [R, n].

    With h the gradient with respect to the sorted values, :math:`L = \sum_{ij} e_{ij} h_j z_i`, the plan answers a
    change of its exponents m by :math:`de_{ij} = e_{ij} (dm_{ij} + df_i + dg_j)`, and df, dg keep the marginals. So
    :math:`dL = \sum_{ij} e_{ij} (h_j z_i - \alpha_i - \beta_j) dm_{ij}`, where alpha and beta make the rows and columns
    of what multiplies dm sum to 0: with :math:`\beta = h C - e^T \alpha`,

    .. math:: (I - e e^T) \alpha = \rho, \qquad \rho_i = \sum_j e_{ij} h_j (z_i - C_j).
    """
    if not values.numel():
        return torch.empty_like(values)
    n = values.shape[-1]
    h = grad_sorted.double()
    z, _, _ = standardize(values)
    y = grid(n, values)
    plan = (2 / strength * z.unsqueeze(-1) * y + f.unsqueeze(-1)).softmax(-2)
    barycentres = (plan.mT @ z.unsqueeze(-1)).squeeze(-1)
    differences = h.unsqueeze(-2) * (z.unsqueeze(-1) - barycentres.unsqueeze(-2))  # [R, n, n], h_j (z_i - C_j)
    alpha = _solve(plan, (plan * differences).sum(-1))
    multiplier = plan * (differences + (plan.mT @ alpha.unsqueeze(-1)).mT - alpha.unsqueeze(-1))
    grad_z = (plan @ h.unsqueeze(-1)).squeeze(-1) + 2 / strength * (multiplier @ y)
    # Through the mean and the standard deviation, both ways.
    shift = (h - grad_z).mean(-1, keepdim=True)
    scale = (h * barycentres - grad_z * z).mean(-1, keepdim=True)
    return (grad_z + shift + scale * z).to(values.dtype)


def sinkhorn_sort(
    values: Tensor,  # [R, n]
    *,
    strength: float,
    max_iterations: int = 50,
    tolerance: float = 1e-12,
) -> Tensor:
    """The sorted values [R, n], ascending, in plain operations on [R, n, n]."""
    return sort_ascending(values.sort(-1).values, strength, max_iterations, tolerance)[0]
