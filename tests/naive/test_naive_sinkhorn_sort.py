"""Naive Sinkhorn sort against POT's plan, its limits and its derivative."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

from robustloss.naive.sinkhorn_sort import grid, sinkhorn_sort, sort_ascending, sort_ascending_bwd, standardize

STRENGTHS = [0.05, 0.3, 2.0, 100.0]


def sample(n=12):
    torch.manual_seed(0)
    return 3 + 2 * torch.randn(2, n, dtype=torch.float64)


def plan_of_pot(values: torch.Tensor, strength: float) -> np.ndarray:
    """The entropic plan of one row onto the grid, by POT's log-domain Sinkhorn iterations."""
    z = ((values - values.mean()) / values.std(correction=0)).numpy()
    y = np.linspace(-1, 1, len(z))
    cost = (z[:, None] - (y / y.std())[None, :]) ** 2
    return ot.bregman.sinkhorn_log([], [], cost, strength, numItermax=100_000, stopThr=1e-14)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_sorted_values_are_the_barycentres_of_pots_plan(strength):
    values = sample()
    expected = [len(row) * plan_of_pot(row, strength).T @ row.numpy() for row in values]
    actual = sinkhorn_sort(values, strength=strength)
    np.testing.assert_allclose(actual.numpy(), np.stack(expected), rtol=1e-9, atol=1e-9)


def test_the_grid_is_equally_spaced_with_mean_zero_and_variance_one():
    points = grid(7, sample())
    torch.testing.assert_close(points.diff(), points.diff()[:1].expand(6))
    assert points.mean().abs() < 1e-15
    assert abs(points.var(correction=0).item() - 1) < 1e-15
    assert grid(1, sample()).tolist() == [0.0]


def test_standardising_a_constant_row_gives_zeros():
    z, mean, deviation = standardize(torch.full((1, 5), 0.1, dtype=torch.float64))
    assert not z.any()
    assert (mean.item(), deviation.item()) == (0.1, 0.0)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_rows_and_columns_of_the_plan_sum_to_one(strength):
    ascending = sample().sort(-1).values
    _, f, g, error = sort_ascending(ascending, strength, 30, 1e-12)
    z, _, _ = standardize(ascending)
    plan = (2 / strength * z.unsqueeze(-1) * grid(12, z) + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    torch.testing.assert_close(plan.sum(-1), torch.ones_like(z), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plan.sum(-2), torch.ones_like(z), rtol=1e-11, atol=1e-11)
    assert (error <= 1e-12).all()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_implicit_gradient_is_that_of_differences(strength):
    ascending = sample(7).sort(-1).values
    upstream = torch.randn(2, 7, dtype=torch.float64)
    _, f, g, _ = sort_ascending(ascending, strength, 30, 1e-13)
    gradient = sort_ascending_bwd(upstream, ascending, f, g, strength, 1e-13)
    step = 1e-5
    for i in range(7):
        moved = [ascending.index_add(1, torch.tensor([i]), torch.full((2, 1), s * step).double()) for s in (1, -1)]
        above, below = (sort_ascending(row, strength, 30, 1e-13)[0] for row in moved)
        slope = ((above - below) / (2 * step) * upstream).sum(-1)
        torch.testing.assert_close(gradient[:, i], slope, rtol=1e-7, atol=1e-7)


def test_no_rows_and_empty_rows():
    for shape in ((0, 3), (2, 0)):
        values = torch.zeros(shape)
        assert sinkhorn_sort(values, strength=0.1).shape == shape
        _, f, g, error = sort_ascending(values, 0.1, 10, 1e-6)
        assert error.shape == shape[:1]
        assert sort_ascending_bwd(values, values, f, g, 0.1, 1e-6).shape == shape
