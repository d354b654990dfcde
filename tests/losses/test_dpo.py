"""DPO and its links as modules, with the plain mean as the aggregate."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss import DPOLoss
from robustloss.naive.links import LINKS, SMOOTHED_LINKS, link_loss

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0], dtype=torch.float64)


def sample(B: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return [-20 + 5 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


def margins_of(pc, pr, rc, rr) -> torch.Tensor:
    return pc - pr - rc + rr


@pytest.mark.parametrize("loss", [DPOLoss(), DPOLoss(0.5, 0.1), DPOLoss(0.01, 0.2, "robust")], ids=str)
def test_where_policy_and_reference_agree_the_loss_is_log_two(loss):
    chosen, rejected = sample()[:2]
    assert loss(chosen, rejected, chosen, rejected).item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("link", LINKS)
def test_the_loss_is_the_mean_link_of_the_margins(link):
    logps = sample()
    smoothing = 0.1 * (link in SMOOTHED_LINKS)
    expected = link_loss(margins_of(*logps), beta=0.3, link=link, label_smoothing=smoothing)
    torch.testing.assert_close(DPOLoss(0.3, smoothing, link)(*logps), expected.mean(), **CLOSE)
    torch.testing.assert_close(DPOLoss(0.3, smoothing, link, reduction="none")(*logps), expected, **CLOSE)


def test_weights_make_a_weighted_mean_in_which_only_proportions_count():
    logps = sample()
    losses = DPOLoss(reduction="none")(*logps)
    expected = (WEIGHTS * losses).sum() / WEIGHTS.sum()
    for factor in (1, 13.0):
        torch.testing.assert_close(DPOLoss()(*logps, weights=factor * WEIGHTS), expected, **CLOSE)


def test_the_gradient_of_plain_dpo_is_its_closed_form():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    pr.requires_grad_()
    got = torch.autograd.grad(DPOLoss(0.3)(pc, pr, rc, rr), (pc, pr))
    slope = -0.3 * torch.sigmoid(-0.3 * margins_of(pc, pr, rc, rr)).detach() / 5
    torch.testing.assert_close(got, (slope, -slope), **CLOSE)


def test_swapping_chosen_and_rejected_flips_the_margin():
    pc, pr, rc, rr = sample()
    torch.testing.assert_close(
        DPOLoss(0.3, reduction="none")(pr, pc, rr, rc) - DPOLoss(0.3, reduction="none")(pc, pr, rc, rr),
        0.3 * margins_of(pc, pr, rc, rr),
        **CLOSE,
    )


def test_metrics_are_means_over_the_batch():
    pc, pr, rc, rr = sample()
    _, metrics = DPOLoss(0.3)(pc, pr, rc, rr, return_metrics=True)
    chosen, rejected = 0.3 * (pc - rc), 0.3 * (pr - rr)
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": pc.mean(),
        "logps/rejected": pr.mean(),
    }
    torch.testing.assert_close(metrics, expected, **CLOSE)


@pytest.mark.parametrize("link", ["squared_hinge", "least_squares"])
def test_an_offset_is_no_temperature_of_the_rewards(link):
    pc, pr, rc, rr = sample()
    loss = DPOLoss(0.0, link=link)
    torch.testing.assert_close(loss.rewards(pc, rc), pc - rc, **CLOSE)
    _, metrics = loss(pc, pr, rc, rr, return_metrics=True)
    assert metrics["rewards/accuracies"] == (margins_of(pc, pr, rc, rr) > 0).double().mean()


def test_an_empty_batch_gives_zero():
    empty = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    value = DPOLoss()(*empty)
    assert value == 0
    assert torch.autograd.grad(value, empty[0])[0].shape == (0,)
    assert DPOLoss()(*empty, weights=torch.zeros(0)) == 0
    assert DPOLoss(reduction="none")(*empty).shape == (0,)


def test_rewards_of_a_subclass_are_what_the_metrics_tell():
    class Doubled(DPOLoss):
        def rewards(self, policy_logps, ref_logps):
            return 2 * super().rewards(policy_logps, ref_logps)

    logps = [torch.tensor([float(i), -1.0]) for i in range(4)]
    _, plain = DPOLoss()(*logps, return_metrics=True)
    _, doubled = Doubled()(*logps, return_metrics=True)
    torch.testing.assert_close(doubled["rewards/chosen"], 2 * plain["rewards/chosen"])
