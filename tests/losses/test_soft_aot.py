"""AOT with soft sorts is the transport between softly sorted samples."""

from __future__ import annotations

import functools

import pytest
import torch

from robustloss import AOTPairedLoss, AOTUnpairedLoss, sinkhorn_sort, soft_sort
from robustloss.naive.links import link_loss
from robustloss.train.config import build_loss

SOFT_SORTS = {
    "soft_l2": functools.partial(soft_sort, regularization="l2"),
    "soft_kl": functools.partial(soft_sort, regularization="kl"),
    "sinkhorn": sinkhorn_sort,
}
STRENGTHS = {"soft_l2": 0.7, "soft_kl": 0.7, "sinkhorn": 0.05}
# At which nothing of `logps` is pooled any more, or hardly anything mixed.
SMALL = {"soft_l2": 1e-3, "soft_kl": 1e-3, "sinkhorn": 1e-5}

pytestmark = pytest.mark.parametrize("sort", SOFT_SORTS)


def logps(count: int, n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [3 * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_a_paired_loss_is_the_mean_link_of_soft_order_statistics(sort):
    pc, pr, rc, rr = logps(4, 9)
    soft = functools.partial(SOFT_SORTS[sort], strength=STRENGTHS[sort])
    expected = link_loss(soft(pc - pr) - soft(rc - rr), beta=0.3).mean()
    actual = AOTPairedLoss(0.3, sort=sort, strength=STRENGTHS[sort])(pc, pr, rc, rr)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(actual, AOTPairedLoss(0.3)(pc, pr, rc, rr), rtol=1e-3)


def test_an_unpaired_loss_is_the_transport_of_soft_order_statistics(sort):
    policy, ref = logps(2, 9)
    desirable = torch.tensor([True, False, True, True, False, True, True, False, True])
    soft = functools.partial(SOFT_SORTS[sort], strength=STRENGTHS[sort])
    u, v = soft((policy - ref)[desirable]), soft((policy - ref)[~desirable])
    # Six against three: each of v faces two of u.
    expected = link_loss(u - v.repeat_interleave(2), beta=0.3).mean()
    actual = AOTUnpairedLoss(0.3, sort=sort, strength=STRENGTHS[sort])(policy, ref, desirable)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_small_strength_is_the_hard_sort(sort):
    pc, pr, rc, rr = logps(4, 17)
    soft = AOTPairedLoss(0.3, sort=sort, strength=SMALL[sort])(pc, pr, rc, rr)
    torch.testing.assert_close(soft, AOTPairedLoss(0.3)(pc, pr, rc, rr), rtol=1e-3, atol=0)


@pytest.mark.parametrize("strength", ["given", "auto"])
def test_gradients(sort, strength):
    strength = STRENGTHS[sort] if strength == "given" else "auto"
    desirable = torch.tensor([True, False, True, True, False])
    policy, ref = logps(2, 5)
    if strength == "auto" and sort != "sinkhorn":
        # The scale is held fixed.
        pc, pr, rc, rr = logps(4, 6)
        pc.requires_grad_()
        (actual,) = torch.autograd.grad(AOTPairedLoss(0.3, sort=sort)(pc, pr, rc, rr), pc)
        u, v = pc - pr, rc - rr
        soft = [s * SOFT_SORTS[sort](x / s, strength=6 / 4) for x in (u, v) for s in [x.std(correction=0).item()]]
        (expected,) = torch.autograd.grad(link_loss(soft[0] - soft[1], beta=0.3).mean(), pc)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        return
    loss = AOTUnpairedLoss(0.3, sort=sort, strength=strength)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref, desirable), policy.requires_grad_())
    paired = AOTPairedLoss(0.3, sort=sort, strength=strength)
    pc, pr, rc, rr = logps(4, 6)
    assert torch.autograd.gradcheck(lambda c, r: paired(c, r, rc, rr), [pc.requires_grad_(), pr.requires_grad_()])


def test_automatic_softness_has_the_unit_of_the_samples(sort):
    loss = AOTPairedLoss(sort=sort)
    (samples,) = logps(1, 50)
    torch.testing.assert_close(loss._soften(1000 * samples), 1000 * loss._soften(samples), rtol=1e-6, atol=1e-6)


def test_automatic_softness_is_no_matter_of_size(sort):
    for n in (32, 512):
        samples = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        soft = AOTPairedLoss(sort=sort)._soften(samples)
        assert 0.8 < soft.std() / samples.std() < 0.999
        assert not torch.allclose(soft, samples.sort().values, atol=1e-2)


def test_classes_that_are_missing_or_single(sort):
    loss = AOTUnpairedLoss(sort=sort)
    (policy, ref) = (x.requires_grad_() for x in logps(2, 4))
    with pytest.warns(UserWarning, match="one class only"):
        value = loss(policy, ref, torch.ones(4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, policy)
    assert value == 0
    assert not gradient.any()
    value = loss(policy, ref, torch.tensor([True, False, False, False]))
    assert torch.autograd.grad(value, policy)[0].isfinite().all()


def test_equal_samples_are_left_alone(sort):
    ones = torch.ones(5, requires_grad=True)
    value = AOTPairedLoss(sort=sort)(ones, torch.zeros(5), torch.zeros(5), torch.zeros(5))
    (gradient,) = torch.autograd.grad(value, ones)
    torch.testing.assert_close(value, link_loss(torch.tensor(1.0), beta=0.1))
    torch.testing.assert_close(gradient, gradient.mean().expand(5))


def test_what_does_not_go_together_is_refused(sort):
    with pytest.raises(ValueError, match="weights are undefined for sort="):
        AOTPairedLoss(sort=sort)(*logps(4, 3), weights=torch.ones(3))
    with pytest.raises(ValueError, match="strength must be > 0"):
        AOTPairedLoss(sort=sort, strength=0.0)
    with pytest.raises(ValueError, match="strength must be one of 'auto'"):
        AOTPairedLoss(sort=sort, strength="much")
    with pytest.raises(ValueError, match="softens a sort, and sort is 'hard'"):
        AOTPairedLoss(strength=0.1)
    values = logps(4, 3)
    values[1][2] = torch.nan
    with pytest.raises(ValueError, match="policy_rejected_logps holds 1 non-finite"):
        AOTPairedLoss(sort=sort)(*values)


def test_a_config_names_it(sort):
    loss = build_loss({"name": "aot_unpaired", "sort": sort, "strength": 0.2})
    assert (loss.sort, loss.strength) == (sort, 0.2)
    assert f"sort='{sort}', strength=0.2" in repr(loss)
