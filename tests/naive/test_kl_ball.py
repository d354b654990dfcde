"""The worst case in a Kullback-Leibler ball, held against convex solvers and at every edge of the problem."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from robustloss.naive.kl_tilt import kl_ball

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LOSSES = torch.tensor([0.2, 1.7, 0.9, 0.4, 1.1, 0.3], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.1], dtype=torch.float64)


def nominal(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    weights = torch.ones_like(losses) if weights is None else weights
    return weights / weights.sum()


def divergence(worst_case: torch.Tensor, q: torch.Tensor) -> float:
    return torch.special.xlogy(worst_case, worst_case / torch.where(q > 0, q, 1.0)).sum().item()


def dual_minimum(losses: torch.Tensor, rho: float, weights: torch.Tensor | None = None) -> float:
    """min over tau of tau rho + tau log sum q exp(l / tau) ([W] Lemma 12), by SciPy's scalar minimiser."""
    q, values = nominal(losses, weights).numpy(), losses.numpy()
    values, q = values[q > 0], q[q > 0]
    shifted = values - values.max()

    def dual(log_tau):
        tau = math.exp(log_tau)
        return tau * rho + tau * logsumexp(shifted / tau, b=q)

    centre = math.log(np.ptp(values))
    best = minimize_scalar(dual, bounds=(centre - 12, centre + 12), method="bounded", options={"xatol": 1e-10})
    return values.max() + best.fun


def primal_maximum(losses: torch.Tensor, rho: float, weights: torch.Tensor | None = None) -> float:
    """sup { <P, l> : KL(P || q) <= rho, P in the simplex }, by sequential quadratic programming."""
    q, values = nominal(losses, weights).numpy(), losses.numpy()
    values, q = values[q > 0], q[q > 0]
    found = minimize(
        lambda p: -p @ values,
        q,
        jac=lambda p: -values,
        bounds=[(1e-14, 1)] * len(q),
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones_like(p)},
            {
                "type": "ineq",
                "fun": lambda p: rho - (p * np.log(p / q)).sum(),
                "jac": lambda p: -(np.log(p / q) + 1),
            },
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success, found.message
    return -found.fun


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("rho", [1e-3, 0.05, 0.3, 1.0, 1.4])
def test_the_value_is_the_supremum_over_the_ball(rho, weights):
    value = kl_ball(LOSSES, rho=rho, weights=weights)[0].item()
    assert value == pytest.approx(dual_minimum(LOSSES, rho, weights), abs=1e-10)
    assert value == pytest.approx(primal_maximum(LOSSES, rho, weights), abs=1e-7)


@pytest.mark.parametrize("n", [2, 7, 100])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4])
def test_random_losses_of_any_size_and_spread_agree_with_the_dual(n, scale):
    generator = torch.Generator().manual_seed(n)
    for _ in range(5):
        losses = scale * torch.randn(n, generator=generator, dtype=torch.float64) + scale
        weights = torch.rand(n, generator=generator, dtype=torch.float64)
        rho = math.exp(6 * torch.rand((), generator=generator).item() - 6) * 0.9 * math.log(n)
        for given in (None, weights):
            value, worst_case, tau = kl_ball(losses, rho=rho, weights=given)
            at_maximum = nominal(losses, given)[losses.argmax()].item()
            if rho < -math.log(at_maximum):
                assert value.item() / scale == pytest.approx(dual_minimum(losses, rho, given) / scale, abs=1e-10)
                assert divergence(worst_case, nominal(losses, given)) == pytest.approx(rho, abs=1e-10)
                assert tau > 0
            else:
                assert value == losses.max()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("rho", [1e-6, 1e-3, 0.3, 1.3])
def test_the_worst_case_lies_on_the_sphere_and_is_the_tilt_at_its_temperature(rho, weights):
    value, worst_case, tau = kl_ball(LOSSES, rho=rho, weights=weights)
    q = nominal(LOSSES, weights)
    assert divergence(worst_case, q) == pytest.approx(rho, abs=1e-10)
    assert worst_case.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close((worst_case * LOSSES).sum(), value, **CLOSE)
    tilt = q * ((LOSSES - LOSSES.max()) / tau).exp()
    torch.testing.assert_close(worst_case, tilt / tilt.sum(), **CLOSE)


def test_the_conditions_of_theorem_3_hold():
    """[W] Eq. 23 to 25: P = q exp((l - mu - tau) / tau) for one mu, with sum P = 1 and KL = rho."""
    rho = 0.4
    _, worst_case, tau = kl_ball(LOSSES, rho=rho)
    multiplier = LOSSES - tau - tau * (worst_case * len(LOSSES)).log()
    torch.testing.assert_close(multiplier, multiplier[:1].expand(6), **CLOSE)
    exponent = (LOSSES - multiplier[0] - tau) / tau
    assert (exponent.exp() / 6 * exponent).sum().item() == pytest.approx(rho, abs=1e-10)


def test_a_radius_of_zero_is_the_mean():
    losses = LOSSES.clone().requires_grad_()
    value, worst_case, tau = kl_ball(losses, rho=0.0, weights=WEIGHTS)
    torch.testing.assert_close(value, (nominal(LOSSES, WEIGHTS) * LOSSES).sum(), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(value, losses)[0], worst_case)
    assert tau == math.inf


@pytest.mark.parametrize("rho", [math.log(6), 2.0, 50.0, 1e6])
def test_beyond_log_n_the_worst_case_is_the_maximum(rho):
    losses = LOSSES.clone().requires_grad_()
    value, worst_case, tau = kl_ball(losses, rho=rho)
    assert value == LOSSES.max()
    assert torch.equal(worst_case, torch.nn.functional.one_hot(torch.tensor(1), 6).double())
    torch.testing.assert_close(torch.autograd.grad(value, losses)[0], worst_case)
    assert tau == 0


def test_ties_at_the_maximum_share_its_mass_by_weight():
    losses = torch.tensor([2.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    for rho in (math.log(5 / 4), 1.0):
        value, worst_case, _ = kl_ball(losses, rho=rho, weights=weights)
        assert value.item() == pytest.approx(2, abs=1e-12)
        torch.testing.assert_close(worst_case, torch.tensor([0.25, 0, 0.75, 0], dtype=torch.float64), **CLOSE)
    _, worst_case, tau = kl_ball(losses, rho=0.1, weights=weights)
    assert worst_case[2].item() == pytest.approx(3 * worst_case[0].item(), rel=1e-12)
    assert tau > 0


@pytest.mark.parametrize("slack", [-1e-3, -1e-6, -1e-9, -1e-12, -1e-15, 0.0, 1e-15])
def test_nothing_breaks_around_the_radius_at_which_the_maximum_is_reached(slack):
    losses = LOSSES.clone().requires_grad_()
    rho = math.log(6) + slack
    value, worst_case, _ = kl_ball(losses, rho=rho)
    (gradient,) = torch.autograd.grad(value, losses)
    assert LOSSES.max() + slack * 10 - 1e-12 <= value <= LOSSES.max() + 1e-12
    torch.testing.assert_close(gradient, worst_case, rtol=0, atol=1e-6)
    assert divergence(worst_case, nominal(LOSSES, None)) <= rho + 1e-10


@pytest.mark.parametrize("rho", [0.0, 1e-17, 1e-3, 1.0])
@pytest.mark.parametrize("losses", [[0.7], [0.7] * 10, [1e4] * 3, [0.0] * 7], ids=["one", "ten", "huge", "zero"])
def test_equal_losses_leave_the_nominal_weights(losses, rho):
    losses = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    value, worst_case, _ = kl_ball(losses, rho=rho)
    torch.testing.assert_close(value, losses[0].detach(), **CLOSE)
    torch.testing.assert_close(worst_case, nominal(losses.detach(), None), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(value, losses)[0], worst_case, **CLOSE)


@pytest.mark.parametrize("rho", [1e-6, 1e-9, 1e-12, 1e-15, 1e-20, 1e-30])
def test_tiny_radii_move_the_value_by_the_root_of_twice_rho_times_the_variance(rho):
    losses = LOSSES.clone().requires_grad_()
    value, worst_case, tau = kl_ball(losses, rho=rho)
    expected = LOSSES.mean() + math.sqrt(2 * rho * LOSSES.var(correction=0).item())
    assert value.item() == pytest.approx(expected.item(), abs=max(1e-10, 10 * rho))
    torch.testing.assert_close(torch.autograd.grad(value, losses)[0], worst_case, rtol=0, atol=1e-8)
    assert divergence(worst_case, nominal(LOSSES, None)) == pytest.approx(rho, abs=1e-10)
    assert tau > 0


def test_the_value_rises_with_the_radius_from_the_mean_to_the_maximum():
    radii = [0.0, 1e-8, 1e-4, 0.01, 0.1, 0.5, 1.0, 1.5, 1.79, 2.0]
    values = torch.stack([kl_ball(LOSSES, rho=rho)[0] for rho in radii])
    assert (values.diff() > 0).all()
    torch.testing.assert_close(values[0], LOSSES.mean())
    assert values[-1] == LOSSES.max()


def test_an_integer_weight_is_a_repeated_sample():
    counts = torch.tensor([1, 3, 0, 2, 1, 2])
    torch.testing.assert_close(
        kl_ball(LOSSES, rho=0.2, weights=counts.double())[0],
        kl_ball(LOSSES.repeat_interleave(counts), rho=0.2)[0],
        **CLOSE,
    )


@pytest.mark.parametrize("ignored", [-1e6, 1e6])
@pytest.mark.parametrize("rho", [0.0, 0.3, 9.0])
def test_samples_of_zero_weight_are_ignored(rho, ignored):
    losses = LOSSES.clone()
    losses[3] = ignored
    losses.requires_grad_()
    kept = WEIGHTS > 0
    value, worst_case, _ = kl_ball(losses, rho=rho, weights=WEIGHTS)
    torch.testing.assert_close(value, kl_ball(LOSSES[kept], rho=rho, weights=WEIGHTS[kept])[0], **CLOSE)
    (gradient,) = torch.autograd.grad(value, losses)
    assert worst_case[3] == gradient[3] == 0
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("rho", [1e-2, 0.3, 1.2, 9.0])
def test_derivatives_of_both_orders_match_finite_differences(rho, weights):
    """Value and gradient agree (Danskin), and the Hessian sees the temperature move."""
    losses = LOSSES.clone().requires_grad_()

    def function(losses):
        return kl_ball(losses, rho=rho, weights=weights)[0]

    assert torch.autograd.gradcheck(function, losses)
    assert torch.autograd.gradgradcheck(function, losses)
    torch.testing.assert_close(
        torch.autograd.grad(function(losses), losses)[0], kl_ball(LOSSES, rho=rho, weights=weights)[1], **CLOSE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_input_of_any_size_or_shape_gives_nan(dtype):
    generator = torch.Generator().manual_seed(7)
    for trial in range(150):
        n = int(torch.randint(1, 40, (), generator=generator))
        scale = 10 ** (24 * torch.rand((), generator=generator).item() - 16)
        losses = (scale * torch.randn(n, generator=generator).abs().pow(1 + trial % 7)).to(dtype)
        if trial % 3 == 0:
            losses = losses.round(decimals=0)  # ties
        weights = torch.rand(n, generator=generator).pow(1 + trial % 9).to(dtype) if trial % 2 else None
        rho = 10 ** (22 * torch.rand((), generator=generator).item() - 20)
        losses.requires_grad_()
        value, worst_case, tau = kl_ball(losses, rho=rho, weights=weights)
        (gradient,) = torch.autograd.grad(value, losses)
        for got in (value, worst_case, tau, gradient):
            assert torch.isfinite(got).all(), (trial, n, scale, rho)
            assert got.dtype == dtype
        slack = 1e-5 if dtype == torch.float32 else 1e-9
        fixed, q = losses.detach(), nominal(losses.detach(), weights)
        size = fixed.abs().max() + torch.finfo(dtype).tiny
        assert (q * fixed).sum() - slack * size <= value <= fixed.max() + slack * size
        torch.testing.assert_close(gradient, worst_case, rtol=0, atol=1e-4)
