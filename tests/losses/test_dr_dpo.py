"""Dr. DPO: the soft minimum of a batch of DPO losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustloss import DPOLoss, DrDPOLoss, KLDPOLoss, SoftMin

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0], dtype=torch.float64)


def sample(B: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return [-20 + 5 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


def by_the_paper(logps, beta: float, beta_prime: float) -> float:
    """-beta' log E exp(-l / beta'), by NumPy."""
    pc, pr, rc, rr = (value.numpy() for value in logps)
    losses = np.log1p(np.exp(-beta * (pc - pr - rc + rr)))
    return -beta_prime * np.log(np.mean(np.exp(-losses / beta_prime)))


@pytest.mark.parametrize("beta_prime", [0.1, 1.0, 10.0])
def test_the_loss_is_the_papers(beta_prime):
    logps = sample()
    value = DrDPOLoss(0.3, beta_prime)(*logps)
    assert value.item() == pytest.approx(by_the_paper(logps, 0.3, beta_prime), rel=1e-12)


def test_the_gradient_weighs_pairs_by_how_well_they_fit():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    losses = DPOLoss(0.3, reduction="none")(pc, pr, rc, rr)
    trust = (-losses / 0.5).softmax(0).detach()
    expected = torch.autograd.grad((trust * losses).sum(), pc)
    torch.testing.assert_close(torch.autograd.grad(DrDPOLoss(0.3, 0.5)(pc, pr, rc, rr), pc), expected, **CLOSE)


def test_it_looks_away_from_the_pairs_that_kldpo_looks_at():
    logps = sample()
    mean = DPOLoss(0.3)(*logps)
    assert DrDPOLoss(0.3, 0.5)(*logps) < mean < KLDPOLoss(0.3, tau=0.5)(*logps)
    _, ours = DrDPOLoss(0.3, 0.5)(*logps, return_metrics=True)
    trust = (-DPOLoss(0.3, reduction="none")(*logps) / 0.5).softmax(0)
    torch.testing.assert_close(ours["tilt/max_weight"], trust.max(), **CLOSE)
    torch.testing.assert_close(ours["tilt/effective_sample_size"], 1 / trust.square().sum(), **CLOSE)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_a_large_temperature_is_plain_dpo_and_a_small_one_the_best_pair(weights):
    logps = sample()
    losses = DPOLoss(0.3, reduction="none")(*logps)
    hot, cold = (DrDPOLoss(0.3, beta_prime)(*logps, weights=weights) for beta_prime in (1e9, 1e-4))
    assert hot.item() == pytest.approx(DPOLoss(0.3)(*logps, weights=weights).item(), abs=1e-8)
    present = losses if weights is None else losses[weights > 0]
    assert cold.item() == pytest.approx(present.min().item(), abs=1e-3)


def test_it_is_dpo_with_the_soft_minimum_as_its_aggregate():
    logps = sample()
    aggregated = DPOLoss(0.3, 0.1, "robust", aggregate=SoftMin(0.7))
    torch.testing.assert_close(DrDPOLoss(0.3, 0.7, link="robust", label_smoothing=0.1)(*logps), aggregated(*logps))


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"beta_prime must be > 0, got 0"):
        DrDPOLoss(0.1, 0)
    with pytest.raises(ValueError, match=r"reduction='none' .*DrDPOLoss: .*weighs every"):
        DrDPOLoss(reduction="none")
