"""Worst (and mildest) reweightings held against convex solvers, at ties, at every edge of their parameters."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize, minimize_scalar

from robustloss.naive.worst_case import chi_square_ball, cvar, soft_min, total_variation_ball

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LOSSES = torch.tensor([0.2, 1.7, 0.9, 0.4, 1.1, 0.3], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.1], dtype=torch.float64)
EACH_WEIGHTS = pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])

# A parameter of each that gives the mean, then growing adversaries; the last is (nearly) the extreme loss.
FAMILIES = {
    cvar: ("alpha", [1.0, 0.8, 0.5, 0.2, 1e-3]),
    chi_square_ball: ("rho", [0.0, 1e-3, 0.3, 2.0, 1e3]),
    total_variation_ball: ("rho", [0.0, 0.01, 0.3, 0.7, 1.0]),
    soft_min: ("beta_prime", [1e9, 3.0, 1.0, 0.1, 1e-4]),
}
EVERY = [
    pytest.param(partial(function, **{name: value}), id=f"{function.__name__}-{name}={value:g}")
    for function, (name, values) in FAMILIES.items()
    for value in values
]
EVERY_FAMILY = pytest.mark.parametrize("function", FAMILIES, ids=lambda function: function.__name__)


def nominal(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    return weights / weights.sum()


def positive(losses: torch.Tensor, weights: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Losses and nominal weights of the samples that are there."""
    q, values = nominal(losses, weights).numpy(), losses.numpy()
    return values[q > 0], q[q > 0]


def cvar_solved(losses, weights, alpha) -> float:
    """sup <P, l> with 0 <= P <= q / alpha, by linear programming."""
    values, q = positive(losses, weights)
    found = linprog(-values, A_eq=np.ones((1, len(q))), b_eq=[1.0], bounds=[(0, w / alpha) for w in q], method="highs")
    assert found.success, found.message
    return -found.fun


def total_variation_solved(losses, weights, rho) -> float:
    """sup <q + u - v, l> with u, v >= 0, v <= q, sum u = sum v <= rho, by linear programming."""
    values, q = positive(losses, weights)
    n = len(q)
    found = linprog(
        np.concatenate([-values, values]),
        A_eq=np.concatenate([np.ones(n), -np.ones(n)])[None],
        b_eq=[0.0],
        A_ub=np.concatenate([np.ones(n), np.zeros(n)])[None],
        b_ub=[rho],
        bounds=[(0, None)] * n + [(0, w) for w in q],
        method="highs",
    )
    assert found.success, found.message
    return values @ q - found.fun


def chi_square_primal(losses, weights, rho) -> float:
    """sup <P, l> over the ball and the simplex, by sequential quadratic programming."""
    values, q = positive(losses, weights)
    found = minimize(
        lambda p: -p @ values,
        q,
        jac=lambda p: -values,
        bounds=[(0, 1)] * len(q),
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones_like(p)},
            {"type": "ineq", "fun": lambda p: rho - ((p - q) ** 2 / q).sum(), "jac": lambda p: -2 * (p - q) / q},
        ],
        method="SLSQP",
        options={"ftol": 1e-11, "maxiter": 500},
    )
    assert found.success, found.message
    return -found.fun


def chi_square_dual(losses, weights, rho) -> float:
    """min over eta of eta + sqrt(1 + rho) (sum q (l - eta)_+^2)^(1/2), by SciPy's scalar minimiser."""
    values, q = positive(losses, weights)
    centre, spread = values.max(), np.ptp(values)
    shifted = (values - centre) / spread

    def dual(eta):
        return eta + math.sqrt((1 + rho) * (q @ np.clip(shifted - eta, 0, None) ** 2))

    bounds = (-2 - 2 / math.sqrt(rho), 1e-12)
    return centre + spread * minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-12}).fun


def soft_min_solved(losses, weights, beta_prime) -> float:
    """inf <P, l> + beta' KL(P || q) over the simplex, by sequential quadratic programming."""
    values, q = positive(losses, weights)
    found = minimize(
        lambda p: p @ values + beta_prime * (p @ np.log(p / q)),
        q,
        jac=lambda p: values + beta_prime * (np.log(p / q) + 1),
        bounds=[(1e-14, 1)] * len(q),
        constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones_like(p)}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success, found.message
    return found.fun


@EACH_WEIGHTS
@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5, 1 / 6, 0.05, 1e-3])
def test_cvar_is_the_supremum_over_capped_weights(alpha, weights):
    value, _ = cvar(LOSSES, alpha=alpha, weights=weights)
    assert value.item() == pytest.approx(cvar_solved(LOSSES, weights, alpha), abs=1e-9)


@EACH_WEIGHTS
@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_the_total_variation_ball_gives_its_supremum(rho, weights):
    value, _ = total_variation_ball(LOSSES, rho=rho, weights=weights)
    assert value.item() == pytest.approx(total_variation_solved(LOSSES, weights, rho), abs=1e-9)


@EACH_WEIGHTS
@pytest.mark.parametrize("rho", [1e-4, 0.05, 0.5, 2.0, 4.9, 5.1, 12.0, 13.0])
def test_the_chi_square_ball_gives_its_supremum(rho, weights):
    value = chi_square_ball(LOSSES, rho=rho, weights=weights)[0].item()
    assert value == pytest.approx(chi_square_dual(LOSSES, weights, rho), abs=1e-9)
    assert value == pytest.approx(chi_square_primal(LOSSES, weights, rho), abs=1e-6)


@EACH_WEIGHTS
@pytest.mark.parametrize("beta_prime", [0.2, 1.0, 7.0])
def test_the_soft_minimum_is_the_mildest_reweighting_with_its_divergence(beta_prime, weights):
    value, worst_case = soft_min(LOSSES, beta_prime=beta_prime, weights=weights)
    assert value.item() == pytest.approx(soft_min_solved(LOSSES, weights, beta_prime), abs=1e-7)
    q = nominal(LOSSES, weights)
    divergence = torch.special.xlogy(worst_case, worst_case / torch.where(q > 0, q, 1.0)).sum()
    torch.testing.assert_close(value, (worst_case * LOSSES).sum() + beta_prime * divergence, **CLOSE)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4])
@pytest.mark.parametrize("n", [2, 7, 60])
def test_random_losses_of_any_size_and_spread_agree_with_the_solvers(n, scale):
    generator = torch.Generator().manual_seed(n)
    for _ in range(4):
        # Scaled around zero for the solvers; what they find scales with the losses.
        losses = torch.randn(n, generator=generator, dtype=torch.float64)
        weights = torch.rand(n, generator=generator, dtype=torch.float64)
        alpha, share, rho = torch.rand(3, generator=generator).clamp(min=1e-3).tolist()
        rho = n * rho**3
        for value, solved in (
            (cvar(scale * losses, alpha=alpha, weights=weights)[0], cvar_solved(losses, weights, alpha)),
            (
                total_variation_ball(scale * losses, rho=share, weights=weights)[0],
                total_variation_solved(losses, weights, share),
            ),
            (chi_square_ball(scale * losses, rho=rho, weights=weights)[0], chi_square_dual(losses, weights, rho)),
        ):
            assert value.item() / scale == pytest.approx(solved, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("function", EVERY)
def test_a_shift_moves_the_value_and_a_spread_of_1e_12_on_top_of_it_is_seen(function):
    value, worst_case = function(LOSSES)
    shifted, same = function(LOSSES + 1e4)
    torch.testing.assert_close(shifted - 1e4, value, rtol=0, atol=1e-10)
    torch.testing.assert_close(same, worst_case, rtol=1e-6, atol=1e-8)
    if function.func is soft_min:
        return  # its temperature has the losses' unit
    narrow = 1.0 + 1e-12 * LOSSES
    torch.testing.assert_close(function(narrow)[1], worst_case, rtol=0, atol=2e-3)


@EACH_WEIGHTS
@pytest.mark.parametrize("function", EVERY)
def test_p_is_a_distribution_on_the_samples_that_are_there_and_the_gradient_of_the_value(function, weights):
    losses = LOSSES.clone().requires_grad_()
    value, worst_case = function(losses, weights=weights)
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, worst_case, **CLOSE)
    assert not worst_case.requires_grad
    assert (worst_case >= 0).all()
    assert worst_case.sum().item() == pytest.approx(1, abs=1e-12)
    assert (worst_case[nominal(LOSSES, weights) == 0] == 0).all()


@EACH_WEIGHTS
@pytest.mark.parametrize("function", EVERY)
def test_derivatives_of_both_orders_match_finite_differences(function, weights):
    losses = LOSSES.clone().requires_grad_()

    def value(losses):
        return function(losses, weights=weights)[0]

    assert torch.autograd.gradcheck(value, losses)
    assert torch.autograd.gradgradcheck(value, losses)


@EACH_WEIGHTS
@EVERY_FAMILY
def test_the_value_runs_from_the_mean_to_the_extreme_loss(function, weights):
    name, parameters = FAMILIES[function]
    values = torch.stack([function(LOSSES, weights=weights, **{name: value})[0] for value in parameters])
    steps = -values.diff() if function is soft_min else values.diff()
    assert (steps > 0).all()
    mean = (nominal(LOSSES, weights) * LOSSES).sum()
    assert values[0].item() == pytest.approx(mean.item(), abs=1e-8)
    present = LOSSES[nominal(LOSSES, weights) > 0]
    extreme = present.min() if function is soft_min else present.max()
    assert values[-1].item() == pytest.approx(extreme.item(), abs=1e-3)


@EACH_WEIGHTS
def test_no_adversary_is_the_mean_to_the_last_digits(weights):
    mean = (nominal(LOSSES, weights) * LOSSES).sum()
    for value, worst_case in (
        cvar(LOSSES, alpha=1.0, weights=weights),
        total_variation_ball(LOSSES, rho=0.0, weights=weights),
        chi_square_ball(LOSSES, rho=0.0, weights=weights),
    ):
        torch.testing.assert_close(value, mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(worst_case, nominal(LOSSES, weights), rtol=1e-14, atol=0)


@pytest.mark.parametrize("rho", [1e-18, 1e-12, 1e-6])
def test_a_small_chi_square_ball_adds_its_root_times_the_standard_deviation(rho):
    """Duchi & Namkoong 1810.08750: mean + sqrt(rho variance), exact while no weight is zero."""
    losses = LOSSES.clone().requires_grad_()
    value, worst_case = chi_square_ball(losses, rho=rho)
    expected = LOSSES.mean() + math.sqrt(rho * LOSSES.var(correction=0).item())
    assert value.item() == pytest.approx(expected.item(), abs=1e-15)
    deviation = 6 * worst_case - 1
    expected = math.sqrt(rho) * (LOSSES - LOSSES.mean()) / LOSSES.std(correction=0)
    torch.testing.assert_close(deviation, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta_prime", [1e3, 1e6, 1e12])
def test_a_hot_soft_minimum_subtracts_half_the_variance_over_its_temperature(beta_prime):
    value, _ = soft_min(LOSSES, beta_prime=beta_prime)
    expected = LOSSES.mean() - LOSSES.var(correction=0) / (2 * beta_prime)
    assert value.item() == pytest.approx(expected.item(), abs=2e-16 + 1 / beta_prime**2)


@EACH_WEIGHTS
@pytest.mark.parametrize("rho", [1.0, 1.5, 50.0])
def test_a_ball_that_holds_everything_gives_the_maximum(rho, weights):
    losses = LOSSES.clone()
    losses[4] = losses[1]
    q = nominal(losses, weights)
    at_maximum = torch.where(losses == losses[1], q, 0.0)
    value, worst_case = total_variation_ball(losses, rho=min(rho, 1.0), weights=weights)
    assert value.item() == pytest.approx(1.7, abs=1e-14)
    torch.testing.assert_close(worst_case, at_maximum / at_maximum.sum(), **CLOSE)
    value, worst_case = chi_square_ball(losses, rho=1 / at_maximum.sum().item() - 1 + rho, weights=weights)
    assert value.item() == pytest.approx(1.7, abs=1e-14)
    torch.testing.assert_close(worst_case, at_maximum / at_maximum.sum(), **CLOSE)


def test_just_inside_the_limit_the_chi_square_ball_is_continuous():
    limit = 5.0  # n / 1 - 1
    inside = chi_square_ball(LOSSES, rho=limit * (1 - 1e-12))
    torch.testing.assert_close(inside, chi_square_ball(LOSSES, rho=limit), rtol=0, atol=1e-5)
    for rho in limit + np.arange(-5, 6) * 1e-15:
        losses = LOSSES.clone().requires_grad_()
        value, worst_case = chi_square_ball(losses, rho=float(rho))
        assert value.item() == pytest.approx(LOSSES.max().item(), abs=1e-6)
        (gradient,) = torch.autograd.grad(value, losses, create_graph=True)
        torch.testing.assert_close(gradient, worst_case, rtol=0, atol=1e-6)
        if gradient.requires_grad:
            (second,) = torch.autograd.grad(gradient.sum(), losses)
            assert torch.isfinite(second).all()


@pytest.mark.parametrize("function", EVERY)
def test_tied_samples_share_in_proportion_to_their_nominal_weights(function):
    losses = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5, 0.0, 1.5], dtype=torch.float64)
    value, worst_case = function(losses, weights=weights)
    ratio = (worst_case / weights)[weights > 0]
    for group in ((0, 2), (1, 3), (4, 5)):  # positions among those of positive weight
        assert ratio[group[0]].item() == pytest.approx(ratio[group[1]].item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, worst_case, **CLOSE)
    # The same as one sample that carries the group's weight.
    merged, _ = function(
        torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64), weights=torch.tensor([4.0, 6, 2], dtype=torch.float64)
    )
    torch.testing.assert_close(value, merged, **CLOSE)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("n", [1, 3, 7])
def test_equal_losses_leave_the_nominal_weights(function, n):
    losses = torch.full((n,), 0.7, dtype=torch.float64)
    for weights in (None, torch.arange(1.0, n + 1, dtype=torch.float64)):
        value, worst_case = function(losses, weights=weights)
        assert value.item() == pytest.approx(0.7, rel=1e-14)
        torch.testing.assert_close(worst_case, nominal(losses, weights), rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("ignored", [-1e6, 1e6])
def test_samples_of_zero_weight_are_ignored(function, ignored):
    losses = LOSSES.clone()
    losses[3] = ignored
    losses.requires_grad_()
    kept = WEIGHTS > 0
    value, worst_case = function(losses, weights=WEIGHTS)
    expected, expected_worst_case = function(LOSSES[kept], weights=WEIGHTS[kept])
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(worst_case[kept], expected_worst_case, **CLOSE)
    (gradient,) = torch.autograd.grad(value, losses)
    assert gradient[3] == worst_case[3] == 0
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("function", EVERY)
def test_an_integer_weight_is_a_repeated_sample(function):
    counts = torch.tensor([1, 3, 0, 2, 1, 2])
    torch.testing.assert_close(
        function(LOSSES, weights=counts.double())[0], function(LOSSES.repeat_interleave(counts))[0], **CLOSE
    )


@EVERY_FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_input_of_any_size_or_shape_gives_nan(function, dtype):
    name, _ = FAMILIES[function]
    generator = torch.Generator().manual_seed(7)
    for trial in range(120):
        n = int(torch.randint(1, 40, (), generator=generator))
        scale = 10 ** (24 * torch.rand((), generator=generator).item() - 16)
        losses = (scale * torch.randn(n, generator=generator).abs().pow(1 + trial % 7)).to(dtype)
        if trial % 3 == 0:
            losses = losses.round(decimals=0)  # ties
        weights = torch.rand(n, generator=generator).pow(1 + trial % 9).to(dtype) if trial % 2 else None
        parameter = 10 ** (22 * torch.rand((), generator=generator).item() - 20)
        if function in (cvar, total_variation_ball):
            parameter = min(parameter, 1.0)
        losses.requires_grad_()
        value, worst_case = function(losses, weights=weights, **{name: parameter})
        (gradient,) = torch.autograd.grad(value, losses)
        for got in (value, worst_case, gradient):
            assert torch.isfinite(got).all(), (trial, n, scale, parameter)
            assert got.dtype == dtype
        fixed, q = losses.detach(), nominal(losses.detach(), weights)
        slack = (1e-5 if dtype == torch.float32 else 1e-9) * (fixed.abs().max() + torch.finfo(dtype).tiny)
        mean = (q * fixed).sum()
        lowest, highest = (fixed.min(), mean) if function is soft_min else (mean, fixed.max())
        assert lowest - slack <= value <= highest + slack, (trial, n, scale, parameter)
        torch.testing.assert_close(gradient, worst_case, rtol=0, atol=1e-4)
