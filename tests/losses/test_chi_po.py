"""χPO: DPO whose reward is beta (z + log z) of the density ratio z."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robustloss import ChiPOLoss, DPOLoss, KLTilt
from robustloss.losses.chi_po import LARGEST_LOGRATIO

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def sample(B: int = 6, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return [-20 + spread * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


def by_the_paper(logps, beta: float, bound: float | None) -> np.ndarray:
    """-log sigmoid(clip_{2R}[beta phi(z+) - beta phi(z-)]), phi(z) = z + log z; by NumPy."""
    pc, pr, rc, rr = (value.numpy() for value in logps)

    def phi(z):
        return z + np.log(z)

    margins = beta * phi(np.exp(pc) / np.exp(rc)) - beta * phi(np.exp(pr) / np.exp(rr))
    if bound is not None:
        margins = np.clip(margins, -2 * bound, 2 * bound)
    return np.log1p(np.exp(-margins))


@pytest.mark.parametrize("bound", [None, 0.2, 3.0])
@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_the_loss_is_the_papers(beta, bound):
    logps = sample()
    expected = by_the_paper(logps, beta, bound)
    np.testing.assert_allclose(ChiPOLoss(beta, bound, reduction="none")(*logps).numpy(), expected, rtol=1e-11)
    assert ChiPOLoss(beta, bound)(*logps).item() == pytest.approx(expected.mean(), rel=1e-11)


def test_near_the_reference_it_is_dpo_of_twice_the_beta():
    """phi(e^r) = 1 + 2 r + r^2 / 2 + ..."""
    logps = sample(spread=1e-6)
    torch.testing.assert_close(ChiPOLoss(0.3)(*logps), DPOLoss(0.6)(*logps), rtol=0, atol=1e-11)


def test_where_policy_and_reference_agree_the_loss_is_log_two():
    chosen, rejected = sample()[:2]
    assert ChiPOLoss(0.3, 2.0)(chosen, rejected, chosen, rejected).item() == pytest.approx(math.log(2), abs=1e-12)


def test_a_margin_beyond_the_bound_has_no_gradient():
    pc, pr, rc, rr = sample()
    pc = (rc + torch.tensor([2.0, 0.1, -0.1, 2.0, 0.0, 3.0], dtype=torch.float64)).requires_grad_()
    loss = ChiPOLoss(0.5, 0.6)
    margins = loss.rewards(pc.detach(), rc) - loss.rewards(pr, rr)
    (gradient,) = torch.autograd.grad(loss(pc, pr, rc, rr), pc)
    beyond = margins.abs() > 1.2
    assert beyond.any()
    assert not beyond.all()
    assert torch.equal(gradient == 0, beyond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ratio", [19.0, 21.0, 100.0, 1e4, -1e4])
def test_no_density_ratio_overflows(dtype, ratio):
    rc, rr = (value.to(dtype) for value in sample()[2:])
    for chosen, rejected in ((ratio, 0.0), (0.0, ratio), (ratio, ratio)):
        policy = [(rc + chosen).requires_grad_(), (rr + rejected).requires_grad_()]
        value, metrics = ChiPOLoss(0.1)(*policy, rc, rr, return_metrics=True)
        gradients = torch.autograd.grad(value, policy)
        for tensor in (value, *gradients, *metrics.values()):
            assert torch.isfinite(tensor).all()
            assert torch.isfinite(tensor.square()).all()  # as a norm of gradients takes it


def test_beyond_the_cap_the_log_ratios_still_count():
    zero = torch.zeros(1)
    logps = torch.tensor([31.0]).requires_grad_(), torch.tensor([30.0])
    value = ChiPOLoss(0.5)(*logps, zero, zero)
    torch.testing.assert_close(value, DPOLoss(0.5)(*logps, zero, zero))
    assert torch.autograd.grad(value, logps[0])[0] < 0


def test_rewards_are_the_ones_the_margins_are_made_of_and_grow_without_end():
    pc, pr, rc, rr = sample()
    loss = ChiPOLoss(0.3)
    ratios = torch.linspace(-40, 40, 200, dtype=torch.float64)
    rewards = loss.rewards(ratios, torch.zeros_like(ratios))
    assert (rewards.diff() > 0).all()
    inside = ratios < LARGEST_LOGRATIO
    torch.testing.assert_close(rewards[inside], 0.3 * (ratios.exp() + ratios)[inside], **CLOSE)
    _, metrics = loss(pc, pr, rc, rr, return_metrics=True)
    torch.testing.assert_close(metrics["rewards/chosen"], 0.3 * ((pc - rc).exp() + pc - rc).mean(), **CLOSE)
    torch.testing.assert_close(
        metrics["rewards/accuracies"], (loss.rewards(pc, rc) > loss.rewards(pr, rr)).double().mean()
    )


@pytest.mark.parametrize("bound", [None, 2.0])
def test_derivatives_of_both_orders_match_finite_differences(bound):
    pc, pr, rc, rr = sample()
    policy = pc.requires_grad_(), pr.requires_grad_()
    loss = ChiPOLoss(0.3, bound, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda pc, pr: loss(pc, pr, rc, rr), policy)
    assert torch.autograd.gradgradcheck(lambda pc, pr: loss(pc, pr, rc, rr), policy)


def test_any_aggregate_goes_with_it():
    logps = sample()
    losses = ChiPOLoss(0.3, 2.0, reduction="none")(*logps)
    loss = ChiPOLoss(0.3, 2.0, aggregate=KLTilt(tau=0.5))
    torch.testing.assert_close(loss(*logps), (torch.softmax(losses / 0.5, 0) * losses).sum(), **CLOSE)
    with pytest.raises(ValueError, match=r"reduction='none' .*ChiPOLoss"):
        ChiPOLoss(aggregate=KLTilt(tau=0.5), reduction="none")


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"max_reward must be > 0, got 0"):
        ChiPOLoss(0.1, 0)
    with pytest.raises(TypeError, match=r"max_reward must be a number, got str"):
        ChiPOLoss(0.1, "3")
    assert str(ChiPOLoss(0.1, 3)) == "ChiPOLoss(beta=0.1, link='logistic', max_reward=3)"
