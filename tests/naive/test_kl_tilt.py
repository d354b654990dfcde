"""Exponential tilting at a temperature: value, derivatives, limits, weights, and the released code's variant."""

from __future__ import annotations

import pytest
import torch

from robustloss.naive.kl_tilt import kl_tilt, kl_tilt_unnormalized, normalized_weights

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LOSSES = torch.tensor([0.2, 1.7, 0.9, 0.4, 1.1], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def free_energy(losses: torch.Tensor, tau: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """F = tau log sum q exp(l / tau)."""
    q = normalized_weights(losses, weights)
    return tau * (q * (losses / tau).exp()).sum().log()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("tau", [0.1, 1.0, 7.0])
def test_the_value_is_the_loss_expected_under_the_tilted_weights(tau, weights):
    q = torch.full_like(LOSSES, 0.2) if weights is None else weights / weights.sum()
    tilted = q * (LOSSES / tau).exp()
    tilted = tilted / tilted.sum()
    value, worst_case = kl_tilt(LOSSES, tau=tau, weights=weights)
    torch.testing.assert_close(worst_case, tilted, **CLOSE)
    torch.testing.assert_close(value, (tilted * LOSSES).sum(), **CLOSE)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("tau", [0.05, 0.5, 20.0])
def test_gradient_and_hessian_are_those_of_log_mean_exp(tau, weights):
    def value(losses):
        return kl_tilt(losses, tau=tau, weights=weights)[0]

    def oracle(losses):
        return free_energy(losses, tau, weights)

    losses = LOSSES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(losses), losses)
    torch.testing.assert_close(gradient, torch.autograd.grad(oracle(losses), losses)[0], **CLOSE)
    torch.testing.assert_close(gradient, kl_tilt(LOSSES, tau=tau, weights=weights)[1], **CLOSE)
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(value, LOSSES), hessian(oracle, LOSSES), **CLOSE)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_derivatives_match_finite_differences_of_log_mean_exp(weights):
    def carrier(losses):
        """The value of F with the derivatives of the tilted loss: gradcheck then differences F."""
        value, _ = kl_tilt(losses, tau=0.4, weights=weights)
        return free_energy(losses, 0.4, weights).detach() + value - value.detach()

    losses = LOSSES.clone().requires_grad_()
    assert torch.autograd.gradcheck(carrier, losses)
    assert torch.autograd.gradgradcheck(carrier, losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [1e6, 1e12, 1e20])
def test_a_high_temperature_gives_the_mean(tau, dtype):
    losses = LOSSES.to(dtype).requires_grad_()
    value, worst_case = kl_tilt(losses, tau=tau)
    torch.testing.assert_close(value, losses.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(worst_case, torch.full_like(worst_case, 0.2), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, worst_case, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [1e-3, 1e-30])
def test_a_low_temperature_gives_the_maximum(tau, dtype):
    losses = LOSSES.to(dtype).requires_grad_()
    value, worst_case = kl_tilt(losses, tau=tau)
    assert value == losses.max()
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, worst_case)
    assert worst_case.argmax() == 1
    assert worst_case.max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [1e-3, 1e-36])
def test_huge_losses_over_a_tiny_temperature_do_not_overflow(tau, dtype):
    losses = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    value, worst_case = kl_tilt(losses, tau=tau)
    assert value == 1e4
    assert torch.equal(worst_case, torch.tensor([0.5, 0, 0, 0.5], dtype=dtype))
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, worst_case)


def test_the_tilt_depends_on_differences_of_losses_even_when_the_losses_are_large():
    """In float32, l / tau alone would round away differences of the order of tau."""
    gaps = torch.tensor([0.0, 1 / 1024, 2 / 1024, 3 / 1024])  # exact at this offset
    _, worst_case = kl_tilt(4096 + gaps, tau=1e-3)
    torch.testing.assert_close(worst_case, kl_tilt(gaps, tau=1e-3)[1], rtol=1e-5, atol=1e-7)


def test_an_integer_weight_is_a_repeated_sample():
    counts = torch.tensor([1, 3, 0, 2, 1])
    value, worst_case = kl_tilt(LOSSES, tau=0.6, weights=counts.double())
    repeated, parts = kl_tilt(LOSSES.repeat_interleave(counts), tau=0.6)
    torch.testing.assert_close(value, repeated, **CLOSE)
    owner = torch.arange(5).repeat_interleave(counts)
    torch.testing.assert_close(worst_case, torch.zeros_like(LOSSES).index_add(0, owner, parts), **CLOSE)


@pytest.mark.parametrize("ignored", [5.0, 1e4])
def test_samples_of_zero_weight_are_ignored(ignored):
    losses = LOSSES.clone()
    losses[1] = ignored
    losses.requires_grad_()
    value, worst_case = kl_tilt(losses, tau=1e-2, weights=WEIGHTS)
    kept = WEIGHTS > 0
    torch.testing.assert_close(value, kl_tilt(LOSSES[kept], tau=1e-2, weights=WEIGHTS[kept])[0], **CLOSE)
    (gradient,) = torch.autograd.grad(value, losses)
    assert worst_case[1] == gradient[1] == 0
    assert torch.isfinite(gradient).all()


def test_weights_matter_up_to_a_factor_only():
    torch.testing.assert_close(
        kl_tilt(LOSSES, tau=0.3, weights=WEIGHTS), kl_tilt(LOSSES, tau=0.3, weights=17 * WEIGHTS), **CLOSE
    )


def test_the_papers_subtraction_of_the_mean_cancels():
    centred = ((LOSSES - LOSSES.mean()) / 0.3).exp()
    torch.testing.assert_close(kl_tilt(LOSSES, tau=0.3)[1], centred / centred.sum(), **CLOSE)


@pytest.mark.parametrize("shift", [-3.0, 1e3])
def test_adding_a_constant_to_all_losses_adds_it_to_the_value(shift):
    torch.testing.assert_close(kl_tilt(LOSSES + shift, tau=0.3)[0], kl_tilt(LOSSES, tau=0.3)[0] + shift, **CLOSE)


def test_the_value_falls_from_the_maximum_to_the_mean_as_the_temperature_rises():
    values = torch.stack([kl_tilt(LOSSES, tau=tau)[0] for tau in (1e-2, 0.1, 0.3, 1.0, 3.0, 100.0)])
    assert (values.diff() < 0).all()
    assert values[0] <= LOSSES.max()
    assert values[-1] >= LOSSES.mean()


def test_one_sample_keeps_its_loss():
    losses = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    value, worst_case = kl_tilt(losses, tau=0.1)
    assert value.item() == pytest.approx(0.7, abs=1e-15)
    assert worst_case.item() == torch.autograd.grad(value, losses)[0].item() == 1


def test_the_unnormalised_tilt_is_the_released_code():
    losses = torch.tensor([0.1, 4.0, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    factors = ((losses - losses.mean()) / 0.5).exp().clamp(max=10).detach()
    assert factors.max() == 10
    value, worst_case = kl_tilt_unnormalized(losses, tau=0.5, max_weight=10)
    torch.testing.assert_close(value, (factors * losses).mean(), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(value, losses)[0], factors / 4, **CLOSE)
    torch.testing.assert_close(worst_case, factors / 4, **CLOSE)


def test_the_unnormalised_tilt_without_a_clamp_is_the_exponential():
    value, _ = kl_tilt_unnormalized(LOSSES, tau=0.5)
    torch.testing.assert_close(value, (((LOSSES - LOSSES.mean()) / 0.5).exp() * LOSSES).mean(), **CLOSE)


def test_the_clamp_holds_where_the_exponential_overflows():
    losses = torch.tensor([0.0, 1e4], dtype=torch.float32)
    value, worst_case = kl_tilt_unnormalized(losses, tau=1e-3, max_weight=10)
    assert torch.equal(worst_case, torch.tensor([0.0, 5.0]))
    assert value == 5e4


def test_an_ignored_sample_may_overflow_the_unnormalised_tilt():
    losses = torch.tensor([0.0, 1e4, 1.0])
    value, worst_case = kl_tilt_unnormalized(losses, tau=1e-3, weights=torch.tensor([1.0, 0.0, 0.0]))
    assert value == 0
    assert torch.equal(worst_case, torch.tensor([1.0, 0.0, 0.0]))


def test_weighted_unnormalised_tilts_are_repeated_samples():
    counts = torch.tensor([1, 3, 0, 2, 1])
    torch.testing.assert_close(
        kl_tilt_unnormalized(LOSSES, tau=0.6, max_weight=2.0, weights=counts.double())[0],
        kl_tilt_unnormalized(LOSSES.repeat_interleave(counts), tau=0.6, max_weight=2.0)[0],
        **CLOSE,
    )


def test_uniform_weights_sum_to_one():
    assert normalized_weights(LOSSES, None).sum().item() == pytest.approx(1, abs=1e-15)
    assert normalized_weights(LOSSES, WEIGHTS).sum().item() == pytest.approx(1, abs=1e-15)
