"""TV-DPO: the worst case of a batch of DPO losses in a total-variation ball."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustloss import DPOLoss, TotalVariation, TVDPOLoss

WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0], dtype=torch.float64)


def sample(B: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return [-20 + 5 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


def by_the_paper(logps, beta: float, rho: float) -> float:
    """min over eta of E(l - eta)_+ + rho max(l - eta)_+ + eta, the dual of the ball, over its kinks; by NumPy."""
    pc, pr, rc, rr = (value.numpy() for value in logps)
    losses = np.log1p(np.exp(-beta * (pc - pr - rc + rr)))
    excess = np.clip(losses[:, None] - losses[None, :], 0, None)
    return np.min(excess.mean(0) + rho * excess.max(0) + losses)


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.3, 0.5, 0.79, 1.0])
def test_the_loss_is_the_papers(rho):
    logps = sample()
    assert TVDPOLoss(0.3, rho)(*logps).item() == pytest.approx(by_the_paper(logps, 0.3, rho), rel=1e-12)


def test_a_radius_of_zero_is_dpo_and_of_one_the_worst_pair():
    logps = sample()
    losses = DPOLoss(0.3, reduction="none")(*logps)
    torch.testing.assert_close(TVDPOLoss(0.3, 0.0)(*logps), losses.mean())
    torch.testing.assert_close(TVDPOLoss(0.3, 1.0)(*logps), losses.max())


def test_the_mass_goes_from_the_easiest_pairs_to_the_hardest():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    losses = DPOLoss(0.3, reduction="none")(pc, pr, rc, rr)
    easiest, hardest = int(losses.argmin()), int(losses.argmax())
    moved = torch.full((5,), 0.2, dtype=torch.float64)
    moved[easiest] -= 0.1
    moved[hardest] += 0.1
    value, metrics = TVDPOLoss(0.3, 0.1)(pc, pr, rc, rr, return_metrics=True)
    expected = torch.autograd.grad((moved * losses).sum(), pc)
    torch.testing.assert_close(torch.autograd.grad(value, pc), expected, rtol=1e-10, atol=1e-10)
    assert metrics["tilt/max_weight"].item() == pytest.approx(0.3, abs=1e-12)
    assert metrics["tilt/effective_sample_size"].item() == pytest.approx(1 / moved.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_it_is_dpo_with_the_total_variation_ball_as_its_aggregate(weights):
    logps = sample()
    aggregated = DPOLoss(0.3, link="ipo", aggregate=TotalVariation(0.2))
    torch.testing.assert_close(
        TVDPOLoss(0.3, 0.2, link="ipo")(*logps, weights=weights), aggregated(*logps, weights=weights)
    )


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"rho must be >= 0, got -0.1"):
        TVDPOLoss(0.1, -0.1)
    with pytest.raises(ValueError, match=r"rho must be <= 1 .*, got 1.5"):
        TVDPOLoss(0.1, 1.5)
    with pytest.raises(ValueError, match=r"reduction='none' .*TVDPOLoss: .*weighs every"):
        TVDPOLoss(reduction="none")
