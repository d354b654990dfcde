"""Naive soft sorting and ranking against what a projection is, scipy's isotonic regression, and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression

from robustloss.naive.soft_sort import REGULARIZATIONS, block_sum, soft_rank, soft_sort

STRENGTHS = [1e-4, 0.1, 0.7, 3.0, 100.0, 1e4]
both_directions = pytest.mark.parametrize("descending", [False, True])
each_regularization = pytest.mark.parametrize("regularization", REGULARIZATIONS)
each_strength = pytest.mark.parametrize("strength", STRENGTHS)


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, rtol=1e-10, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def check_projection(z, point, hull, bregman):
    """`point` is the projection of z onto the convex hull of hull's permutations.

    It is in the hull: what is majorised by a vector is a mean of its permutations. And from it no vertex lies in the
    direction of z: with l2 that direction is z - point, with kl it is z - log(point).
    """
    scale = hull.abs().max()
    partial = [values.sort(descending=True).values.cumsum(0) for values in (point, hull)]
    assert (partial[0] <= partial[1] + 1e-12 * scale * len(z)).all()
    close(partial[0][-1], partial[1][-1])
    direction = z - bregman(point)
    direction = direction - direction.mean()  # all vertices have one sum
    vertices = hull[torch.tensor(list(itertools.permutations(range(len(z)))))]
    assert ((vertices - point) @ direction).max() <= 1e-9 * scale * direction.abs().max().clamp(min=1)


@each_strength
@both_directions
@pytest.mark.parametrize("seed", range(4))
def test_l2_results_are_projections_onto_the_permutahedron(strength, descending, seed):
    x, rho = sample(6, seed=seed), torch.arange(1, 7, dtype=torch.float64)
    ramp = rho.flip(0) if descending else rho
    result, _, _ = soft_sort(x, descending, "l2", strength)
    check_projection(ramp / strength, result, x, lambda point: point)
    ranks, _, _ = soft_rank(x, descending, "l2", strength)
    check_projection((-x if descending else x) / strength, ranks, rho, lambda point: point)


@pytest.mark.parametrize("strength", [0.05, 0.7, 3.0, 100.0, 1e4])
@both_directions
@pytest.mark.parametrize("seed", range(4))
def test_kl_results_are_bregman_projections_onto_the_permutahedron(strength, descending, seed):
    x, rho = sample(6, seed=seed), torch.arange(1, 7, dtype=torch.float64)
    result, _, _ = soft_sort(x, descending, "kl", strength)
    sign = 1 if descending else -1
    check_projection(rho.flip(0) / strength, (sign * result).exp(), (sign * x).exp(), torch.log)
    ranks, _, _ = soft_rank(x, descending, "kl", strength)
    check_projection(-sign * x / strength, ranks, rho, torch.log)


@pytest.mark.parametrize("strength", [0.1, 1.0, 7.0, 100.0, 1e4])
@both_directions
def test_l2_is_z_minus_the_isotonic_regression_of_z_minus_w(strength, descending):
    for seed, n in enumerate([1, 2, 17, 300]):
        x, rho = sample(n, seed=seed).numpy(), np.arange(n, 0, -1.0)
        sign = 1 if descending else -1
        z, w = rho / strength, np.sort(sign * x)[::-1]
        expected = sign * (z - isotonic_regression(z - w, increasing=False).x)
        close(soft_sort(torch.tensor(x), descending, "l2", strength)[0], expected)
        order = np.argsort(sign * x)  # the rank n goes to the largest, or where descending to the smallest
        z = -sign * x[order] / strength
        ranks = np.empty(n)
        ranks[order] = z - isotonic_regression(z - rho, increasing=False).x
        close(soft_rank(torch.tensor(x), descending, "l2", strength)[0], ranks)


def test_the_examples_of_the_authors_implementation():
    x = torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)
    close(soft_sort(x, strength=1.0)[0], [5 / 3, 8 / 3, 11 / 3])
    close(soft_sort(x, strength=0.1)[0], [1, 2, 5])
    close(soft_rank(x, strength=2.0)[0], [3, 1.25, 1.75])
    close(soft_rank(x, strength=1.0)[0], [3, 1, 2])


@pytest.mark.parametrize(("gap", "strength"), [(3.0, 0.5), (0.4, 2.0), (1e-3, 1e4), (40.0, 30.0)])
def test_two_values_in_closed_form(gap, strength):
    x = torch.tensor([7.0 + gap, 7.0], dtype=torch.float64)
    mean, largest, step = 7 + gap / 2, 7 + gap, 1 / strength
    pooled = gap > step
    close(soft_sort(x, True, "l2", strength)[0], [mean + step / 2, mean - step / 2] if pooled else [largest, 7.0])
    kl = math.log1p(math.exp(-gap)) + largest - math.log1p(math.exp(-step))
    close(soft_sort(x, True, "kl", strength)[0], [kl, kl - step] if pooled else [largest, 7.0])
    share = gap / strength / 2 if gap < strength else 0.5
    close(soft_rank(x, False, "l2", strength)[0], [1.5 + share, 1.5 - share])
    upper = 3 / (1 + math.exp(-gap / strength)) if gap / strength < math.log(2) else 2
    close(soft_rank(x, False, "kl", strength)[0], [upper, 3 - upper])


@each_regularization
@both_directions
def test_sorting_pools_gaps_above_the_inverse_strength_and_ranking_gaps_below_the_strength(regularization, descending):
    strength = 4.0  # its inverse: 0.25
    x = torch.tensor([0.0, 0.2, 0.44, 0.7, 0.8], dtype=torch.float64)  # one gap above, 0.26
    x = x.flip(0) if descending else x
    pooled = 2 if not descending else 1
    expected = [0, 1, 2, 3, 4]
    expected[pooled + 1] = pooled
    assert soft_sort(x, descending, regularization, strength)[2].tolist() == expected
    x = torch.tensor([0.0, 9.0, 18.0, 18.5, 27.0], dtype=torch.float64)  # one gap below 4 log(4 / 3)
    x = x.flip(0) if descending else x
    assert soft_rank(x, descending, regularization, strength)[2].tolist() == expected


@each_regularization
@both_directions
def test_a_small_strength_gives_the_hard_sort_and_the_hard_ranks(regularization, descending):
    x = sample(3, 40)
    result, order, block_start = soft_sort(x, descending, regularization, 1e-3)
    hard = x.sort(descending=descending, stable=True)
    assert torch.equal(result, hard.values)
    assert torch.equal(order.long(), hard.indices)
    assert (block_start == torch.arange(40)).all()
    ranks, _, _ = soft_rank(x, descending, regularization, 1e-7)
    assert torch.equal(ranks, hard.indices.argsort(-1) + 1.0)


@both_directions
def test_a_large_strength_gives_means(descending):
    x = sample(3, 40)
    mean = x.mean(-1, keepdim=True).expand(x.shape)
    close(soft_sort(x, descending, "l2", 1e12)[0], mean)
    sign = 1 if descending else -1
    log_mean_exp = sign * ((sign * x).logsumexp(-1, keepdim=True) - math.log(40))
    close(soft_sort(x, descending, "kl", 1e12)[0], log_mean_exp.expand(x.shape))
    for regularization in REGULARIZATIONS:
        close(soft_rank(x, descending, regularization, 1e12)[0], torch.full_like(x, 20.5))


@each_regularization
@both_directions
@each_strength
def test_permutations_order_and_sums(regularization, descending, strength):
    x = sample(60)
    permutation = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    result, _, _ = soft_sort(x, descending, regularization, strength)
    assert torch.equal(soft_sort(x[permutation], descending, regularization, strength)[0], result)
    ranks, order, _ = soft_rank(x, descending, regularization, strength)
    assert torch.equal(soft_rank(x[permutation], descending, regularization, strength)[0], ranks[permutation])
    steps = -result.diff() if descending else result.diff()
    assert (steps > -1e-12).all()
    assert (ranks[order.long()].diff() > -1e-12).all()
    assert ranks.min() > 1 - 1e-12
    assert ranks.max() < 60 + 1e-12
    close(ranks.sum(), 60 * 61 / 2)
    if regularization == "l2":
        close(result.sum(), x.sum())
    else:
        sign = 1 if descending else -1
        close((sign * result).exp().sum(), (sign * x).exp().sum())


@each_regularization
@both_directions
def test_ties_share_their_ranks_and_keep_their_order(regularization, descending):
    x = torch.tensor([3.0, 1.0, 3.0, 1.0, 3.0], dtype=torch.float64)
    ranks, order, _ = soft_rank(x, descending, regularization, 1e-3)
    close(ranks, [2.0, 4.5, 2.0, 4.5, 2.0] if descending else [4.0, 1.5, 4.0, 1.5, 4.0])
    assert order.tolist() == ([0, 2, 4, 1, 3] if descending else [1, 3, 0, 2, 4])


def test_a_common_shift_or_a_large_scale_costs_no_digits():
    x = sample(50).float().double()
    shifted = (x * 2**20).round() / 2**20 + 2**30  # exact
    x = shifted - 2**30
    for regularization, strength in itertools.product(REGULARIZATIONS, [0.3, 5.0]):
        close(soft_rank(shifted, False, regularization, strength)[0], soft_rank(x, False, regularization, strength)[0])
        moved = soft_sort(shifted, False, regularization, strength)[0] - 2**30
        close(moved, soft_sort(x, False, regularization, strength)[0], atol=3e-7)  # 2^30 in float64
    ties = torch.tensor([1e30, 1e30, 1e30, -1e30], dtype=torch.float64)
    for regularization in REGULARIZATIONS:
        close(soft_rank(ties, False, regularization, 1e-4)[0], [3.0, 3.0, 3.0, 1.0])


@each_regularization
@both_directions
@pytest.mark.parametrize("strength", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("function", [soft_sort, soft_rank])
def test_derivatives(function, regularization, descending, strength):
    x = sample(2, 7).requires_grad_()
    _, _, block_start = function(x, descending, regularization, 4.0)
    assert (block_start != torch.arange(7)).any()  # something is pooled

    def result(values):
        return function(values, descending, regularization, strength)[0]

    assert torch.autograd.gradcheck(result, x)
    assert torch.autograd.gradgradcheck(result, x)


def test_block_sum():
    block_start = torch.tensor([[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 4, 5]], dtype=torch.int32)
    values = torch.arange(12.0).view(2, 6)
    assert block_sum(values, block_start).tolist() == [[1, 1, 2, 12, 12, 12], [6, 24, 24, 24, 10, 11]]


@pytest.mark.parametrize("function", [soft_sort, soft_rank])
@each_regularization
def test_leading_dimensions_and_nothing_at_all(function, regularization):
    x = sample(2, 3, 5)
    result, _, _ = function(x, False, regularization, 2.0)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(result[i, j], function(x[i, j], False, regularization, 2.0)[0])
    for shape in ((0,), (0, 4), (3, 0)):
        assert [value.shape for value in function(torch.zeros(shape), False, regularization)] == [shape] * 3
    assert function(torch.tensor([5.0]), False, regularization)[0].tolist() == [5.0 if function is soft_sort else 1.0]
