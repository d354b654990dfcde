"""KLDPO: the tilt of [W] Alg. 2 and the ball of [W] Theorem 3 over a batch of DPO losses."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss import DPOLoss, KLDPOLoss, KLTilt
from robustloss.naive.kl_tilt import kl_ball

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0], dtype=torch.float64)


def sample(B: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return [-20 + 5 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_the_loss_is_algorithm_2(weights):
    logps = sample()
    losses = DPOLoss(0.2, reduction="none")(*logps)
    q = torch.ones(5, dtype=torch.float64) if weights is None else weights
    tilt = q * ((losses - losses.mean()) / 0.3).exp()
    expected = (tilt / tilt.sum() * losses).sum()
    torch.testing.assert_close(KLDPOLoss(0.2, tau=0.3)(*logps, weights=weights), expected, **CLOSE)


def test_the_gradient_weighs_every_pairs_gradient_by_its_tilt():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    losses = DPOLoss(0.2, reduction="none")(pc, pr, rc, rr)
    tilt = (losses / 0.3).softmax(0).detach()
    expected = torch.autograd.grad((tilt * losses).sum(), pc)
    torch.testing.assert_close(torch.autograd.grad(KLDPOLoss(0.2, tau=0.3)(pc, pr, rc, rr), pc), expected, **CLOSE)


@pytest.mark.parametrize("loss", [KLDPOLoss(0.2, tau=1e9), KLDPOLoss(0.2, rho=0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_robustness_is_plain_dpo(loss, dtype):
    logps = [value.to(dtype).requires_grad_() for value in sample()]
    for weights in (None, WEIGHTS):
        robust, plain = loss(*logps, weights=weights), DPOLoss(0.2)(*logps, weights=weights)
        torch.testing.assert_close(robust, plain, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            torch.autograd.grad(robust, logps[:2]), torch.autograd.grad(plain, logps[:2]), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("loss", [KLDPOLoss(0.2, tau=1e-4), KLDPOLoss(0.2, rho=9.0)], ids=str)
def test_full_robustness_is_the_worst_pair(loss):
    logps = sample()
    assert loss(*logps).item() == pytest.approx(DPOLoss(0.2, reduction="none")(*logps).max().item(), abs=1e-10)


def test_a_radius_gives_the_ball_and_its_temperature_as_a_metric():
    logps = sample()
    value, metrics = KLDPOLoss(0.2, rho=0.4)(*logps, weights=WEIGHTS, return_metrics=True)
    losses = DPOLoss(0.2, reduction="none")(*logps)
    expected, worst_case, tau = kl_ball(losses, rho=0.4, weights=WEIGHTS)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(metrics["tilt/tau"], tau, **CLOSE)
    torch.testing.assert_close(metrics["tilt/max_weight"], worst_case.max(), **CLOSE)
    # At that temperature the tilt is the same loss.
    torch.testing.assert_close(KLDPOLoss(0.2, tau=tau.item())(*logps, weights=WEIGHTS), value, **CLOSE)


def test_the_effective_sample_size_runs_from_one_to_the_batch():
    logps = sample()
    sizes = [
        KLDPOLoss(0.2, tau=tau)(*logps, return_metrics=True)[1]["tilt/effective_sample_size"].item()
        for tau in (1e-4, 0.1, 0.3, 1.0, 1e6)
    ]
    assert sizes[0] == pytest.approx(1, abs=1e-9)
    assert sizes[-1] == pytest.approx(5, abs=1e-9)
    assert sizes == sorted(sizes)


def test_metrics_are_dpos_and_the_tilts():
    logps = sample()
    _, metrics = KLDPOLoss(0.2, tau=0.3)(*logps, return_metrics=True)
    _, plain = DPOLoss(0.2)(*logps, return_metrics=True)
    tilt = (DPOLoss(0.2, reduction="none")(*logps) / 0.3).softmax(0)
    expected = plain | {
        "tilt/effective_sample_size": 1 / tilt.square().sum(),
        "tilt/max_weight": tilt.max(),
        "tilt/tau": torch.tensor(0.3, dtype=torch.float64),
    }
    torch.testing.assert_close(metrics, expected, **CLOSE)


def test_the_released_code_is_an_option():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    losses = DPOLoss(0.2, reduction="none")(pc, pr, rc, rr)
    factors = ((losses - losses.mean()) / 0.1).exp().clamp(max=10).detach()
    assert factors.max() == 10
    value = KLDPOLoss(0.2, tau=0.1, normalize=False, max_weight=10)(pc, pr, rc, rr)
    expected = (factors * losses).mean()
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(value, pc), torch.autograd.grad(expected, pc), **CLOSE)


def test_kldpo_is_dpo_with_a_tilt_as_its_aggregate():
    logps = sample()
    torch.testing.assert_close(
        KLDPOLoss(0.2, rho=0.3, link="hinge")(*logps), DPOLoss(0.2, link="hinge", aggregate=KLTilt(rho=0.3))(*logps)
    )


@pytest.mark.parametrize("options", [{"tau": 0.1}, {"rho": 0.1}], ids=str)
def test_one_pair_is_plain_dpo_and_no_pair_is_zero(options):
    logps = sample(1)
    assert KLDPOLoss(0.2, **options)(*logps).item() == pytest.approx(DPOLoss(0.2)(*logps).item(), abs=1e-12)
    empty = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    assert KLDPOLoss(0.2, **options)(*empty) == 0


def test_at_step_zero_every_weight_is_the_same():
    chosen, rejected = sample()[:2]
    value, metrics = KLDPOLoss(tau=0.05)(chosen, rejected, chosen, rejected, return_metrics=True)
    assert value.item() == pytest.approx(math.log(2), abs=1e-12)
    assert metrics["tilt/max_weight"].item() == pytest.approx(0.2, abs=1e-12)
