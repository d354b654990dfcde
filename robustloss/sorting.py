r"""Differentiable sorting and ranking along the last dimension, and transport between sorted samples.

All work under torch.compile(fullgraph=True). `sorted_transport` and `sinkhorn_sort` are described by themselves.

`soft_sort` and `soft_rank` cost a sort and a linear pass, are exact (not iterative) and twice differentiable.
`strength` has the unit of 1 / values in `soft_sort` and of values in `soft_rank`. Statistics are float64 on CPUs,
float32 or better elsewhere. At ties and where two blocks are about to be pooled the function has a kink, and the
gradient is a valid and deterministic subgradient.

- `values`: [..., n], float32, bfloat16, float16 or float64, finite (ValueError on the CPU; on a GPU looking would make
  the host wait).
- `regularization`: "l2" (piecewise linear) or "kl" (smooth within a block: what is pooled is weighted by a softmax).
- `strength`: the paper's epsilon > 0. Towards 0 the result is that of the hard sort, and below a data-dependent
  strength it is so to the bit.

Source: Blondel, Teboul, Berthet and Djolonga 2020, arXiv 2002.08871.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from robustloss._inputs import check_link, check_samples
from robustloss.naive.soft_sort import REGULARIZATIONS
from robustloss.ops.sorted_transport import sorted_transport as _sorted_transport
from robustloss.validation import check_choice, check_finite, check_number, check_tensor

__all__ = ["sinkhorn_sort", "soft_rank", "soft_sort", "sorted_transport"]


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

    Example:
        >>> values = torch.tensor([3.0, 1.0, 2.0])
        >>> soft_sort(values, strength=0.1)  # gaps of 1 are below 1 / strength: the hard sort
        tensor([1., 2., 3.])
        >>> soft_sort(values, strength=2.0)  # and here above: neighbours are 1 / strength apart
        tensor([1.5000, 2.0000, 2.5000])
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

    Example:
        >>> soft_rank(torch.tensor([3.0, 1.0, 1.2]), strength=0.5)  # the last two are close, and share their ranks
        tensor([3.0000, 1.3000, 1.7000])
    """
    return _by_row(torch.ops.robustloss.soft_rank, values, descending, regularization, strength)


def sorted_transport(
    u: Tensor,  # [..., n]
    v: Tensor,  # [..., m]
    *,
    u_weights: Tensor | None = None,  # [..., n]
    v_weights: Tensor | None = None,  # [..., m]
    link: str = "logistic",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # [...]
    r"""The cost of the optimal transport of one sample to another on the line, for the cost :math:`\ell(u - v)`.

    .. math:: \int_0^1 \ell\left(F_u^{-1}(s) - F_v^{-1}(s)\right) ds

    Source: [A] Theorem 1, Eq. 9; sizes n and m that differ by merging the two quantile grids. n = m without weights
    gives the mean of :math:`\ell(u_{(i)} - v_{(i)})`. At ties the stable order of a sort decides, a valid and
    deterministic subgradient.

    Args:
        u, v: samples in nats, any float dtypes; every leading dimension is a problem of its own. Gradients reach both.
        u_weights, v_weights: non-negative, normalised within each sample; constants. A sample of weight zero is absent.
        link, beta, label_smoothing: the cost, one of `naive.links`.

    Returns:
        [...], float32, or float64 if u or v is; 0, with a zero gradient, where a side has no samples.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit; on the CPU also NaN, infinity and
            negative weights.

    Example:
        >>> sorted_transport(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0]), beta=1.0)  # -log sigmoid(1), twice
        tensor(0.3133)
        >>> sorted_transport(torch.tensor([2.0, 0.0]), torch.tensor([1.0]), link="least_squares", beta=0.0)
        tensor(1.)
    """
    check_samples("u", u, u_weights, "u", u)
    check_samples("v", v, v_weights, "u", u)
    beta, label_smoothing = check_link(link, beta, label_smoothing)
    rows = math.prod(u.shape[:-1])
    u_rows, v_rows, u_weight_rows, v_weight_rows = (
        None if x is None else x.reshape(rows, x.shape[-1]) for x in (u, v, u_weights, v_weights)
    )
    try:
        value, *_ = _sorted_transport(
            u_rows, None, v_rows, None, None, u_weight_rows, v_weight_rows, link, beta, label_smoothing
        )
    except ValueError:
        for name, values in {"u": u, "v": v, "u_weights": u_weights, "v_weights": v_weights}.items():
            if values is not None:
                check_finite(name, values)  # at its index in the shape that was given
        raise
    return value.view(u.shape[:-1])


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


def sinkhorn_sort(
    values: Tensor,  # [..., n]
    *,
    descending: bool = False,
    strength: float = 0.01,
    max_iterations: int = 30,
    tolerance: float | None = None,
) -> Tensor:  # [..., n]
    r"""Smoothly sorted values: barycentres of an entropic transport plan onto an increasing grid.

    .. math:: P = \arg\min_{P 1 = P^T 1 = 1/n} \sum_{ij} P_{ij} \frac{(x_i - \mu - \sigma y_j)^2}{\sigma^2}
              + \varepsilon \sum_{ij} P_{ij} \log P_{ij}, \qquad s_j = n \sum_i P_{ij} x_i

    with mu and sigma the row's mean and standard deviation and y the grid of n equally spaced points of mean 0 and
    variance 1. The result is monotone, an average of the values at each place, and keeps their sum to the tolerance; it
    is the hard sort as `strength` -> 0 and the mean everywhere as `strength` -> infinity. Affine maps pass through:
    sinkhorn_sort(a x + b) = a sinkhorn_sort(x) + b for a > 0, with `descending` turned round for a < 0.

    Source: Cuturi, Teboul and Vert 2019, arXiv 1905.11885, Eq. 6 and 8, with the squared distance. The affine map
    takes the place of the paper's squashing, which bent the values; the potentials are found in the log domain by
    Newton's method, in about ten iterations at any strength.

    The gradient is that of the whole function, mu and sigma included, by implicit differentiation: it needs memory for
    neither the iterations nor the plan. A constant row stays as it is, and its gradient is the mean of the upstream
    one. There is no second derivative: asking for one raises RuntimeError.

    Args:
        values: [..., n] float32, bfloat16, float16 or float64, any strides. Time is O(n^2) a row (n to a few thousand),
            memory O(n).
        descending: largest first.
        strength: epsilon, in units of the row's variance: values within about sqrt(strength / 2) standard deviations
            mix. > 0; from 1e-5 to 1e3 it is exact to about 1e-5 (float32).
        max_iterations: of Newton's method, >= 1.
        tolerance: the largest deviation of a row of the plan from 1/n, relative to 1/n, and of cumulated rows relative
            to 1/sqrt(n), at which the iterations end; also the relative residual of the adjoint system. None: 1e-6, and
            1e-9 for float64.

    Returns:
        [..., n] in the values' dtype, computed in float32 (exponents in float64), or in float64.

    Raises:
        TypeError: values that are no tensor or not floating.
        ValueError: values without a dimension, NaN or infinity on the CPU; a number out of its range.

    Warns:
        UserWarning: once for each place that calls: the tolerance was not reached, on the CPU. On a GPU, where looking
            would make the host wait, and under torch.compile nothing warns.

    Example:
        >>> sinkhorn_sort(torch.tensor([3.0, 1.0, 2.0]), strength=1.0)
        tensor([1.1704, 2.0000, 2.8296])
    """
    check_tensor("values", values)
    if values.ndim < 1:
        raise ValueError("values must be [..., n], got a tensor without dimensions")
    check_finite("values", values)
    check_number("strength", strength, above=0)
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be a positive integer, got {max_iterations!r}")
    if tolerance is None:
        tolerance = 1e-9 if values.dtype == torch.float64 else 1e-6
    check_number("tolerance", tolerance, above=0)
    n = values.shape[-1]
    rows = values.reshape(-1, n) if n else values.reshape(0, 0)
    ascending = rows.sort(-1).values.contiguous()
    options = float(strength), max_iterations, float(tolerance)
    result, _, _, error = torch.ops.robustloss.sinkhorn_sort(ascending, *options)
    if not torch.compiler.is_compiling() and error.device.type == "cpu":
        _warn_unconverged(error, *options)
    return (result.flip(-1) if descending else result).view(values.shape)


_warned: set[tuple[str, int]] = set()


def _warn_unconverged(error: Tensor, strength: float, max_iterations: int, tolerance: float) -> None:
    largest = error.max().item() if error.numel() else 0.0
    if largest <= tolerance:
        return
    caller, level = sys._getframe(2), 3
    while caller.f_back and caller.f_globals.get("__name__", "").startswith(("robustloss.", "torch.nn.")):
        caller, level = caller.f_back, level + 1  # the line of the user who called a loss
    place = caller.f_code.co_filename, caller.f_lineno
    if place in _warned:
        return
    _warned.add(place)
    warnings.warn(
        f"sinkhorn_sort at strength {strength:g} did not converge in {max_iterations} iterations: a marginal is off by "
        f"{largest:.1e} of its value, wanted {tolerance:.1e}; raise strength, max_iterations or tolerance",
        UserWarning,
        stacklevel=level,
    )
