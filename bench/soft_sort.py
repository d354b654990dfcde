"""`soft_sort`: soft order statistics by projection (Blondel et al. 2020, arXiv 2002.08871), forward and backward.

A contestant is a function of values [B, n] (standard normal, float32), "l2" or "kl", and the strength; ascending. How
much there is to pool depends on the strength: a pass names it. The share of the elements that are in a pooled block:

    n         l2, strength 0.01    l2, strength 1    l2, strength 100    kl, strength 1
    64        0                    0.5%              100%                0.6%
    1024      0                    0.01%             26%                 0.01%
    4096      0                    0                 4%                  0
    65536     0                    0                 0.2%                0

Ceiling: torch.sort and its own backward, the hard sort that any soft one contains; by time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .cases import TRAINING, Case, Peer, Problem, Suite, ours
from .results import OURS, SORT

SoftSort = Callable[[Tensor, str, float], Tensor]

PASSES = {
    f"{regularization}, strength {strength:g}, {TRAINING}": (regularization, strength)
    for regularization, strength in (("l2", 0.01), ("l2", 1.0), ("l2", 100.0), ("kl", 1.0))
}


def _ours() -> SoftSort:
    soft_sort = ours("soft_sort")
    return lambda values, regularization, strength: soft_sort(values, regularization=regularization, strength=strength)


def _hard_sort(values: Tensor, regularization: str, strength: float) -> Tensor:
    return values.sort().values


def by_minimax(values: Tensor, regularization: str, strength: float) -> Tensor:
    """In float64 and O(n^2): isotonic regression as the least over k <= i of the most over j >= i of v(k..j), where v
    is the difference of the means (l2) or logsumexps (kl) of n / strength, ..., 1 / strength and of sorted -values.
    """
    n = values.shape[-1]
    place = torch.arange(n, device=values.device)
    ranks = (n - place) / strength
    ordered = -values.double().sort().values

    def block_sums(terms: Tensor) -> Tensor:  # [..., k, j], one where j < k
        ends = terms.cumsum(-1)
        sums = ends.unsqueeze(-2) - (ends - terms).unsqueeze(-1)
        return torch.where(place >= place[:, None], sums, 1.0)

    if regularization == "l2":
        of_blocks = block_sums(ranks - ordered) / block_sums(torch.ones_like(ordered))
    else:
        of_blocks = block_sums(ranks.double().exp().expand_as(ordered)).log() - block_sums(ordered.exp()).log()
    most = of_blocks.flip(-1).cummax(-1).values.flip(-1)  # [..., k, i]
    return torch.where(place >= place[:, None], most, torch.inf).amin(-2) - ranks


class SoftSortSuite(Suite):
    op = "soft_sort"
    cpu_shapes: ClassVar = [{"B": B, "n": n} for n in (64, 1024, 4096, 65_536) for B in (1, 64)]
    gpu_shapes: ClassVar = [{"B": B, "n": n} for B, n in ((1, 1024), (64, 4096), (4, 65_536), (1024, 512))]
    tiny_shape: ClassVar = {"B": 2, "n": 16}
    peers: ClassVar = {
        OURS: Peer(_ours),
        "torchsort": Peer(lambda: importlib.import_module("torchsort").soft_sort),
    }
    small_calls = True
    in_turn = True

    def dtypes(self, on_gpu: bool) -> tuple[str, ...]:
        return ("float32",)

    def passes(self, dtype: str, on_gpu: bool) -> tuple[str, ...]:
        return tuple(PASSES)

    def ceilings(self, pass_name: str) -> tuple[str, ...]:
        return (SORT,)

    def reference(self) -> SoftSort:
        return by_minimax

    def problem(self, case: Case, function: SoftSort | None, device: torch.device) -> Problem:
        values = torch.randn(*case.shape.values(), device=device, requires_grad=True)
        cotangent = torch.randn(values.shape, device=device)
        soft_sort = function or _hard_sort

        def run() -> list[Tensor]:
            result = soft_sort(values, *PASSES[case.pass_name])
            return [result.detach(), *torch.autograd.grad(result, values, cotangent.to(result.dtype))]

        return Problem(run, [values, cotangent])


SUITE = SoftSortSuite()
