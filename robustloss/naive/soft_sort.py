r"""Soft sorting and ranking: projections onto the permutahedron, solved by isotonic regression.

.. math:: P_\Psi(z, w) = z_\sigma - v, \qquad v = \arg\min_{v_1 \ge \dots \ge v_n} \sum_B \text{divergence}(z_B, w_B)

with z and w sorted descending. Pooling adjacent violators finds the blocks B on which v is constant; there it is

.. math:: v_B = \overline{z_B} - \overline{w_B} \;\; (\text{l2}), \qquad
          v_B = \operatorname{LSE}(z_B) - \operatorname{LSE}(w_B) \;\; (\text{kl}).

With rho = (n, ..., 1) and the strength e, descending soft sorting is P(rho / e, x) and ascending is -P(rho / e, -x);
ascending soft ranks are P(x / e, rho) (l2) or exp P(x / e, log rho) (kl), descending ones those of -x. Source: Blondel,
Teboul, Berthet and Djolonga 2020, arXiv 2002.08871, sections 4 and 5.

z - v subtracts two numbers as large as n / e. So the same is written here with differences of neighbours only. Let u be
x (-x where descending) in non-decreasing order, at positions i = 0, ..., n - 1; b and t a block's first and last
position, m its size, c its centre (b + t) / 2, and A and B neighbours, A before B:

==== ================================================================ =============================================
op   A and B are pooled if                                            in a block
==== ================================================================ =============================================
sort :math:`(\bar u_B - \bar u_A) e > c_B - c_A`                      :math:`\bar u + (i - c) / e`
rank :math:`\bar u_B - \bar u_A < (c_B - c_A) e`                      :math:`(u_i - \bar u) / e + c + 1`
==== ================================================================ =============================================

for l2, and for kl, with :math:`E = \sum e^{u_b - u_j}` and :math:`Q = \sum_{k<m} e^{-k/e}` (sort), or
:math:`E = \sum e^{(u_j - u_t) / e}` and S the sum of the ranks i + 1 (rank),

==== ================================================================ =============================================
sort :math:`u_{b(B)} - u_{b(A)} - m_A / e > \log (E_B Q_A / E_A Q_B)` :math:`u_b - \log (E / Q) + (i - b) / e`
rank :math:`(u_{t(B)} - u_{t(A)}) / e < \log (S_B E_A / S_A E_B)`     :math:`S e^{(u_i - u_t) / e} / E`
==== ================================================================ =============================================

So soft sorting pools where gaps exceed 1 / e, soft ranking where they are below e (kl: e log of the ranks' ratio), and
a block of one is the hard value or rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

REGULARIZATIONS = ("l2", "kl")


class Block(NamedTuple):
    start: int
    size: int
    first: float
    last: float
    spread: float  # l2: mean - first. kl: E

    @property
    def mean_rank(self) -> float:
        return self.start + (self.size - 1) / 2 + 1


class Pooling(NamedTuple):
    """How isotonic regression pools: the spread of one value, when neighbours pool, and the spread of both."""

    single: float
    violates: Callable[[Block, Block, float], bool]
    merge: Callable[[Block, Block, float], float]


# Means and exponentials are held relative to one of the block's own values: large values keep their digits.


def _merge_means(a: Block, b: Block, strength: float) -> float:
    return a.spread + b.size / (a.size + b.size) * ((b.first - a.first) + b.spread - a.spread)


def _difference_of_means(a: Block, b: Block) -> float:
    return (b.first - a.first) + (b.spread - a.spread)


def _sort_violates_l2(a: Block, b: Block, strength: float) -> bool:
    return _difference_of_means(a, b) * strength > b.mean_rank - a.mean_rank


def _rank_violates_l2(a: Block, b: Block, strength: float) -> bool:
    return _difference_of_means(a, b) < (b.mean_rank - a.mean_rank) * strength


def _sort_violates_kl(a: Block, b: Block, strength: float) -> bool:
    log_q = [math.log(math.expm1(-block.size / strength) / math.expm1(-1 / strength)) for block in (a, b)]
    return (b.first - a.first) - a.size / strength > math.log(b.spread / a.spread) + log_q[0] - log_q[1]


def _sort_merge_kl(a: Block, b: Block, strength: float) -> float:
    return a.spread + b.spread * math.exp(a.first - b.first)


def _rank_violates_kl(a: Block, b: Block, strength: float) -> bool:
    ratio = b.size * b.mean_rank / (a.size * a.mean_rank) * (a.spread / b.spread)
    return (b.last - a.last) / strength < math.log(ratio)


def _rank_merge_kl(a: Block, b: Block, strength: float) -> float:
    return b.spread + a.spread * math.exp((a.last - b.last) / strength)


SORT_POOLING = {
    "l2": Pooling(0.0, _sort_violates_l2, _merge_means),
    "kl": Pooling(1.0, _sort_violates_kl, _sort_merge_kl),
}
RANK_POOLING = {
    "l2": Pooling(0.0, _rank_violates_l2, _merge_means),
    "kl": Pooling(1.0, _rank_violates_kl, _rank_merge_kl),
}


def pool_adjacent_violators(u: Tensor, pooling: Pooling, strength: float) -> Tensor:  # [n] -> [n]
    """Where the block of each position starts, int32; u non-decreasing."""
    blocks: list[Block] = []
    for i, value in enumerate(u.tolist()):
        block = Block(i, 1, value, value, pooling.single)
        while blocks and pooling.violates(blocks[-1], block, strength):
            before = blocks.pop()
            spread = pooling.merge(before, block, strength)
            block = Block(before.start, before.size + block.size, before.first, block.last, spread)
        blocks.append(block)
    starts = [start for start, size, *_ in blocks for _ in range(size)]
    return torch.tensor(starts, dtype=torch.int32, device=u.device)


def block_sum(values: Tensor, block_start: Tensor) -> Tensor:  # [..., n] -> [..., n]
    """The sum over the block that each position is in."""
    index = block_start.long()
    return torch.zeros_like(values).scatter_add(-1, index, values).gather(-1, index)


def _blocks(
    values: Tensor, descending: bool, pooling: Pooling, strength: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(u, order, block_start, positions, size of each position's block): u float64 and differentiable."""
    order = values.sort(descending=descending, stable=True).indices
    u = values.double().gather(-1, order)
    u = -u if descending else u
    rows = u.detach().reshape(math.prod(u.shape[:-1]), u.shape[-1])
    starts = [pool_adjacent_violators(row, pooling, strength) for row in rows]
    block_start = torch.stack(starts) if starts else order.int()
    block_start = block_start.view(order.shape)
    positions = torch.arange(u.shape[-1], dtype=torch.float64, device=u.device).expand(u.shape)
    return u, order.int(), block_start, positions, block_sum(torch.ones_like(u), block_start)


def soft_sort(
    values: Tensor,  # [..., n]
    descending: bool = False,
    regularization: str = "l2",
    strength: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # [..., n] each
    """(sorted, order, block_start): the soft order statistics, the stable hard order, and the blocks, both int32.

    Computed in float64, returned in values' dtype; twice differentiable with the blocks held fixed.
    """
    u, order, block_start, i, size = _blocks(values, descending, SORT_POOLING[regularization], strength)
    first = u.detach().gather(-1, block_start.long())
    if regularization == "l2":
        mean = first + block_sum(u - first, block_start) / size
        result = mean + (i - (block_start + (size - 1) / 2)) / strength
    else:
        q = torch.expm1(-size / strength) / math.expm1(-1 / strength)
        result = first - (block_sum((first - u).exp(), block_start) / q).log() + (i - block_start) / strength
    result = torch.where(size == 1, u, result)
    return (-result if descending else result).to(values.dtype), order, block_start


def soft_rank(
    values: Tensor,  # [..., n]
    descending: bool = False,
    regularization: str = "l2",
    strength: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # [..., n] each
    """(ranks, order, block_start): the soft rank of each value, 1 to n, and the rest as `soft_sort`."""
    u, order, block_start, _, size = _blocks(values, descending, RANK_POOLING[regularization], strength)
    mean_rank = block_start + (size - 1) / 2 + 1
    if regularization == "l2":
        offset = u - u.detach().gather(-1, block_start.long())
        result = (offset - block_sum(offset, block_start) / size) / strength + mean_rank
    else:
        last = u.detach().gather(-1, (block_start + size - 1).long())
        weights = ((u - last) / strength).exp()
        result = size * mean_rank * weights / block_sum(weights, block_start)
    return torch.empty_like(result).scatter(-1, order.long(), result).to(values.dtype), order, block_start
