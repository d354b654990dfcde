"""The gradient penalty: closed form on a log-linear policy, both kinds, and where it has no slope."""

from __future__ import annotations

import pytest
import torch

from robustloss.naive.gradient_penalty import gradient_penalty

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
BETA, RHO = 0.7, 0.3
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5], dtype=torch.float64)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings z [8, 3] of four pairs (chosen rows first) and parameters w [3]."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(8, 3, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True),
    )


def losses_of(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    chosen, rejected = (z @ w).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))


def closed_form(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """||grad_z l||^2 = 2 beta^2 sigma(-beta h)^2 ||w||^2: both rows of a pair have the slope's norm."""
    chosen, rejected = (z @ w).chunk(2)
    return 2 * (BETA * torch.sigmoid(-BETA * (chosen - rejected))).square() * w.square().sum()


def aggregate(norms: torch.Tensor, squared: bool, weights: torch.Tensor | None = None) -> torch.Tensor:
    mean = norms.mean() if weights is None else (weights * norms).sum() / weights.sum()
    return RHO * (mean if squared else mean.sqrt())


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("squared", [True, False])
def test_a_log_linear_policy_has_the_closed_form_penalty_and_gradient(squared, weights):
    z, w = sample()
    penalty, norms = gradient_penalty(losses_of(z, w), z, rho=RHO, squared=squared, weights=weights)
    torch.testing.assert_close(norms, closed_form(z, w).detach(), **CLOSE)
    expected = aggregate(closed_form(z, w), squared, weights)
    torch.testing.assert_close(penalty, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(penalty, (w, z)), torch.autograd.grad(expected, (w, z)), **CLOSE)


@pytest.mark.parametrize("squared", [True, False])
def test_the_parameter_gradient_matches_finite_differences(squared):
    z, w = sample()

    def function(w):
        return gradient_penalty(losses_of(z, w), z, rho=RHO, squared=squared)[0]

    assert torch.autograd.gradcheck(function, w)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (8, 5, 2), (12, 2)], ids=str)
def test_a_loss_may_own_any_number_of_rows_of_any_shape(shape):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    losses = (z.reshape(-1, 4, *shape[1:]) ** 3).movedim(1, 0).reshape(4, -1).sum(1)
    _, norms = gradient_penalty(losses, z, rho=RHO)
    expected = (3 * z**2).square().reshape(-1, 4, *shape[1:]).movedim(1, 0).reshape(4, -1).sum(1)
    torch.testing.assert_close(norms, expected.detach(), **CLOSE)


@pytest.mark.parametrize("squared", [True, False])
def test_a_loss_without_slope_has_no_penalty_and_no_nan(squared):
    z, w = sample()
    losses = (z @ (0 * w)).chunk(2)[0].cosh()
    penalty, norms = gradient_penalty(losses, z, rho=RHO, squared=squared)
    assert penalty == 0
    assert (norms == 0).all()
    gradients = torch.autograd.grad(penalty, (w, z))
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_radius_of_zero_has_no_penalty_and_no_gradient():
    z, w = sample()
    penalty, norms = gradient_penalty(losses_of(z, w), z, rho=0.0)
    assert penalty == 0
    assert (norms > 0).all()
    assert (torch.autograd.grad(penalty, w)[0] == 0).all()


def test_without_grad_mode_the_value_comes_without_a_graph():
    z, w = sample()
    losses = losses_of(z, w)
    with torch.no_grad():
        penalty, norms = gradient_penalty(losses, z, rho=RHO)
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, aggregate(closed_form(z, w), True).detach(), **CLOSE)
    assert not norms.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4,), (4, 3)], ids=str)
def test_norms_of_low_precision_embeddings_are_summed_in_the_losses_dtype(shape, dtype):
    z = torch.full(shape, 300.0, dtype=dtype, requires_grad=True)
    losses = (z.float() ** 2).reshape(4, -1).sum(1)  # slope 600, whose square float16 cannot hold
    _, norms = gradient_penalty(losses, z, rho=RHO)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((4,), 600.0**2 * z[0].numel()))


def test_embeddings_outside_the_graph_are_refused():
    z, w = sample()
    other = torch.zeros(8, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"embeddings .*graph"):
        gradient_penalty(losses_of(z, w), other, rho=RHO)
