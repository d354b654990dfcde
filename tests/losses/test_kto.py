"""KTO: two classes around a shared reference point."""

from __future__ import annotations

import pytest
import torch

from robustloss import KTOLoss

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
DESIRABLE = torch.tensor([True, False, True, True, False])
MISMATCHED = torch.tensor([0.5, -0.1, 1.3], dtype=torch.float64)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(-20 + 3 * torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))


def closed_form(policy, ref, baseline, beta=0.3, lambda_d=1.5, lambda_u=0.7) -> torch.Tensor:
    ratios = policy - ref
    return torch.where(
        DESIRABLE,
        lambda_d * (1 - torch.sigmoid(beta * (ratios - baseline))),
        lambda_u * (1 - torch.sigmoid(beta * (baseline - ratios))),
    )


@pytest.mark.parametrize(
    ("mismatched", "baseline"),
    [(None, 0.0), (MISMATCHED, 1.7 / 3), (-MISMATCHED, 0.0)],
    ids=["none", "positive mean", "negative mean"],
)
def test_the_loss_is_its_closed_form_around_the_clamped_mean_of_mismatched_ratios(mismatched, baseline):
    policy, ref = sample()
    losses = closed_form(policy, ref, baseline)
    for reduction, expected in (("none", losses), ("mean", losses.mean())):
        loss = KTOLoss(0.3, 1.5, 0.7, reduction=reduction)
        value, metrics = loss(policy, ref, DESIRABLE, kl_logratios=mismatched, return_metrics=True)
        torch.testing.assert_close(value, expected, **CLOSE)
        assert metrics["kl"].item() == pytest.approx(baseline, abs=1e-12)


def test_where_policy_and_reference_agree_the_loss_is_one_half():
    policy, _ = sample()
    assert KTOLoss()(policy, policy, DESIRABLE).item() == pytest.approx(0.5, abs=1e-12)


def test_no_gradient_flows_through_the_reference_point():
    policy, ref = sample()
    mismatched = MISMATCHED.clone().requires_grad_()
    policy.requires_grad_()
    value = KTOLoss()(policy, ref, DESIRABLE, kl_logratios=mismatched)
    first, second = torch.autograd.grad(value, (policy, mismatched), allow_unused=True)
    assert second is None
    assert (first[DESIRABLE] < 0).all()
    assert (first[~DESIRABLE] > 0).all()


def test_weights_make_a_weighted_mean():
    policy, ref = sample()
    weights = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0], dtype=torch.float64)
    expected = (weights * closed_form(policy, ref, 0.0)).sum() / weights.sum()
    torch.testing.assert_close(KTOLoss(0.3, 1.5, 0.7)(policy, ref, DESIRABLE, weights=weights), expected, **CLOSE)


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_is_defined(label):
    policy, ref = sample()
    value = KTOLoss()(policy, ref, torch.full((5,), label))
    assert torch.isfinite(value)


def test_an_empty_batch_gives_zero():
    empty = torch.zeros(0, requires_grad=True)
    assert KTOLoss()(empty, empty, torch.zeros(0, dtype=torch.bool)) == 0


def test_metrics_are_means_over_each_class():
    policy, ref = sample()
    _, metrics = KTOLoss(0.3)(policy, ref, DESIRABLE, kl_logratios=MISMATCHED, return_metrics=True)
    rewards = 0.3 * (policy - ref)
    expected = {
        "rewards/chosen": rewards[DESIRABLE].mean(),
        "rewards/rejected": rewards[~DESIRABLE].mean(),
        "rewards/margins": rewards[DESIRABLE].mean() - rewards[~DESIRABLE].mean(),
        "logps/chosen": policy[DESIRABLE].mean(),
        "logps/rejected": policy[~DESIRABLE].mean(),
        "kl": MISMATCHED.mean(),
    }
    torch.testing.assert_close(metrics, expected, **CLOSE)


def test_mismatched_ratios_may_not_be_empty():
    policy, ref = sample()
    with pytest.raises(ValueError, match=r"kl_logratios must hold at least one .*got"):
        KTOLoss()(policy, ref, DESIRABLE, kl_logratios=torch.zeros(0))


def test_mismatched_ratios_on_another_device_are_refused():
    policy, ref = sample()
    with pytest.raises(ValueError, match=r"kl_logratios is on meta but policy_logps is on cpu"):
        KTOLoss()(policy, ref, DESIRABLE, kl_logratios=torch.zeros(3, device="meta"))
