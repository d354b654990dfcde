r"""Differentiable sorting and ranking along the last dimension.

`strength` has the unit of 1 / values in `soft_sort` and of values in `soft_rank`. Both cost a sort and a linear pass,
are exact (not iterative), twice differentiable, and work under torch.compile(fullgraph=True). Statistics are float64 on
CPUs; results have the input's dtype. At ties and where two blocks are about to be pooled the function has a kink, and
the gradient is a valid and deterministic subgradient.

    values: [..., n], float32, bfloat16, float16 or float64, finite (ValueError on the CPU; on a GPU looking would make
        the host wait).
    regularization: "l2" (piecewise linear) or "kl" (smooth within a block: what is pooled is weighted by a softmax).
    strength: the paper's epsilon > 0. Towards 0 the result is that of the hard sort, and below a data-dependent
        strength it is so to the bit.

Source: Blondel, Teboul, Berthet and Djolonga 2020, arXiv 2002.08871.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustloss.naive.soft_sort import REGULARIZATIONS
from robustloss.validation import check_choice, check_number, check_tensor

__all__ = ["soft_rank", "soft_sort"]


def soft_sort(
    values: Tensor,  # [..., n]
    *,
    descending: bool = False,
    regularization: str = "l2",
    strength: float = 1.0,
) -> Tensor:  # [..., n]
    r"""Soft order statistics: the projection of (1, ..., n) / strength onto the permutahedron of `values`.

    A gap between neighbouring order statistics larger than 1 / strength is pooled (smaller ones are left as they are):
    with l2 the block's k-th value becomes the block's mean plus :math:`(k - (m + 1) / 2) / \text{strength}`. For large
    strengths all tend to the mean (l2) or, of the order in which they are sorted, :math:`\log \overline{e^x}`
    (descending) and :math:`-\log \overline{e^{-x}}` (ascending) (kl).

    Args:
        values, regularization, strength: see the module's docstring.
        descending: largest first.

    Returns:
        [..., n] in values' dtype, sorted.

    Raises:
        TypeError, ValueError: what is no floating tensor of at least one dimension, not finite (on the CPU), or an
            unknown regularization; a strength that is not positive and finite.
    """
    return _by_row(torch.ops.robustloss.soft_sort, values, descending, regularization, strength)


def soft_rank(
    values: Tensor,  # [..., n]
    *,
    descending: bool = False,
    regularization: str = "l2",
    strength: float = 1.0,
) -> Tensor:  # [..., n]
    r"""Soft ranks, between 1 and n: the projection of values / strength onto the permutahedron of (1, ..., n).

    Neighbouring values closer than `strength` are pooled (l2), or closer than strength * log((k + 1) / k) at rank k
    (kl), and share their ranks by how far they are apart; ties share evenly. Ranks sum to n (n + 1) / 2.

    Args:
        values, regularization, strength: see the module's docstring.
        descending: rank 1 is the largest value; by default it is the smallest.

    Returns:
        [..., n] in values' dtype: the rank of each value, where the value stands. bfloat16 has integers to 256 only,
        float16 to 2048 (and overflows beyond 65504).

    Raises:
        TypeError, ValueError: as `soft_sort`.
    """
    return _by_row(torch.ops.robustloss.soft_rank, values, descending, regularization, strength)


def _by_row(op: Callable, values: Tensor, descending: bool, regularization: str, strength: float) -> Tensor:
    check_tensor("values", values)
    check_choice("regularization", regularization, REGULARIZATIONS)
    options = bool(descending), regularization, check_number("strength", strength, above=0)
    if values.ndim == 2:
        return op(values.contiguous(), *options)[0]
    if values.ndim == 0:
        raise ValueError("values must be [..., n], got a scalar")
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    return op(rows, *options)[0].view(values.shape)
