"""AOT, paired and unpaired: sorted margins of log-ratios."""

from __future__ import annotations

import math
import warnings

import ot
import pytest
import torch

from robustloss import AOTPairedLoss, AOTUnpairedLoss, DPOLoss
from robustloss.naive.links import LINKS, link_loss
from robustloss.ops._library import HAS_EXTENSION

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def sample(B: int = 6, sides: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return [-20 + 5 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(sides)]


def unpaired(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    policy, ref = sample(n + m, 2)
    desirable = torch.zeros(n + m, dtype=torch.bool)
    desirable[torch.randperm(n + m, generator=torch.Generator().manual_seed(1))[:n]] = True
    return policy, ref, desirable


@pytest.mark.parametrize("link", LINKS)
def test_paired_aot_matches_order_statistics_of_policy_and_reference(link):
    pc, pr, rc, rr = sample()
    margins = (pc - pr).sort().values - (rc - rr).sort().values
    expected = link_loss(margins, beta=0.3, link=link).mean()
    torch.testing.assert_close(AOTPairedLoss(0.3, link)(pc, pr, rc, rr), expected, **CLOSE)


@pytest.mark.parametrize("link", LINKS)
def test_unpaired_aot_with_equal_sizes_is_sorted_dpo_on_the_ratios(link):
    policy, ref, desirable = unpaired(5, 5)
    ratios = policy - ref
    u, v = ratios[desirable].sort().values, ratios[~desirable].sort().values
    value = AOTUnpairedLoss(0.3, link)(policy, ref, desirable)
    torch.testing.assert_close(value, link_loss(u - v, beta=0.3, link=link).mean(), **CLOSE)
    torch.testing.assert_close(value, DPOLoss(0.3, link=link)(u, v, 0 * u, 0 * v), **CLOSE)


@pytest.mark.skipif(not HAS_EXTENSION, reason="the fallback sums the cells of labelled samples in another way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unpaired_aot_is_paired_aot_of_the_two_classes_to_the_bit(dtype):
    u, v = (x.to(dtype) for x in sample(64, 2))
    zeros, order = torch.zeros_like(u), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    ratios, desirable = torch.cat([u, v])[order], (torch.arange(128) < 64)[order]
    assert torch.equal(AOTUnpairedLoss(0.3)(ratios, 0 * ratios, desirable), AOTPairedLoss(0.3)(u, zeros, v, zeros))


def test_a_policy_that_is_its_reference_violates_nothing():
    """Both differences are rounded alike, so that sorted margins are zero and not noise around it."""
    chosen, rejected = (x.float() for x in sample(500, 2))
    value, metrics = AOTPairedLoss()(chosen, rejected, chosen, rejected, return_metrics=True)
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["dominance/violation_area"] == metrics["dominance/violation_w1"] == 0


@pytest.mark.parametrize(("n", "m"), [(1, 4), (7, 3), (4, 6)])
def test_unpaired_aot_of_unequal_sizes_is_an_optimal_transport_cost(n, m):
    policy, ref, desirable = unpaired(n, m)
    ratios = (policy - ref).numpy()
    expected = ot.wasserstein_1d(ratios[desirable.numpy()], ratios[~desirable.numpy()], p=2).item()
    value = AOTUnpairedLoss(0.0, "least_squares")(policy, ref, desirable)
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_weights_of_unpaired_aot_are_normalised_within_each_class():
    policy, ref, desirable = unpaired(7, 3)
    weights = torch.rand(10, dtype=torch.float64) + 0.1
    ratios, q = (policy - ref).numpy(), weights.numpy()
    is_u = desirable.numpy()
    expected = ot.wasserstein_1d(
        ratios[is_u], ratios[~is_u], q[is_u] / q[is_u].sum(), q[~is_u] / q[~is_u].sum(), p=2
    ).item()
    loss = AOTUnpairedLoss(0.0, "least_squares")
    assert loss(policy, ref, desirable, weights=weights).item() == pytest.approx(expected, rel=1e-10)
    scaled = torch.where(desirable, 5 * weights, weights)
    torch.testing.assert_close(
        loss(policy, ref, desirable, weights=scaled), loss(policy, ref, desirable, weights=weights), **CLOSE
    )


def test_an_integer_weight_of_a_pair_is_a_repeated_pair():
    logps = sample()
    counts = torch.tensor([1, 2, 0, 3, 1, 1])
    repeated = [value.repeat_interleave(counts) for value in logps]
    torch.testing.assert_close(
        AOTPairedLoss(0.3)(*logps, weights=counts.double()), AOTPairedLoss(0.3)(*repeated), **CLOSE
    )


def test_equal_weights_are_no_weights():
    logps = sample()
    torch.testing.assert_close(
        AOTPairedLoss(0.3)(*logps, weights=torch.full((6,), 7.0)), AOTPairedLoss(0.3)(*logps), **CLOSE
    )


def test_sorting_lowers_the_mean_of_a_convex_link():
    """The pairs' own coupling is one of those that transport chooses from."""
    pc, pr, rc, rr = sample(50)
    assert AOTPairedLoss(0.3)(pc, pr, rc, rr) < DPOLoss(0.3)(pc, pr, rc, rr)


def test_the_order_of_the_pairs_does_not_matter():
    logps = sample()
    order = torch.randperm(6)
    torch.testing.assert_close(AOTPairedLoss()(*[x[order] for x in logps]), AOTPairedLoss()(*logps), **CLOSE)


def test_one_pair_is_plain_dpo_with_one_warning_a_call():
    logps = sample(1)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"AOTPairedLoss: .*plain DPO") as caught:
            value = AOTPairedLoss(0.3)(*logps)
        assert [warning.filename for warning in caught] == [__file__]
    torch.testing.assert_close(value, DPOLoss(0.3)(*logps), **CLOSE)
    policy, ref, desirable = unpaired(1, 1)
    with pytest.warns(UserWarning, match=r"AOTUnpairedLoss: .*plain DPO") as caught:
        AOTUnpairedLoss(0.3)(policy, ref, desirable)
    assert len(caught) == 1


def test_larger_batches_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AOTPairedLoss(0.3)(*sample(2))
        AOTUnpairedLoss(0.3)(*unpaired(1, 2))


def test_dominance_metrics_see_who_is_above_whom():
    pc, pr, rc, rr = sample()
    for shift, share in ((1e3, 0.0), (-1e3, 1.0)):
        _, metrics = AOTPairedLoss()(pc + shift, pr, rc, rr, return_metrics=True)
        assert metrics["dominance/violation_area"].item() == pytest.approx(share, abs=1e-12)
    gap = (rc - rr).mean() - (pc - 1e3 - pr).mean()
    torch.testing.assert_close(metrics["dominance/violation_w1"], gap, **CLOSE)


def test_metrics_are_dpos_and_the_dominance_violation():
    logps = sample()
    _, metrics = AOTPairedLoss(0.3)(*logps, return_metrics=True)
    _, plain = DPOLoss(0.3)(*logps, return_metrics=True)
    dominance = {"dominance/violation_area", "dominance/violation_w1"}
    assert metrics.keys() == plain.keys() | dominance
    torch.testing.assert_close({name: metrics[name] for name in plain}, plain, **CLOSE)


def test_unpaired_metrics_are_means_over_each_class():
    policy, ref, desirable = unpaired(4, 2)
    _, metrics = AOTUnpairedLoss(0.3)(policy, ref, desirable, return_metrics=True)
    rewards = 0.3 * (policy - ref)
    expected = {
        "rewards/chosen": rewards[desirable].mean(),
        "rewards/rejected": rewards[~desirable].mean(),
        "rewards/margins": rewards[desirable].mean() - rewards[~desirable].mean(),
        "logps/chosen": policy[desirable].mean(),
        "logps/rejected": policy[~desirable].mean(),
    }
    assert metrics.keys() == expected.keys() | {"dominance/violation_area", "dominance/violation_w1"}
    torch.testing.assert_close({name: metrics[name] for name in expected}, expected, **CLOSE)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_of_one_class_has_nothing_to_match(present, weighted):
    policy, ref, desirable = unpaired(4, 2)
    policy.requires_grad_()
    # A class whose weights are all zero is as absent as one without samples.
    labels = desirable if weighted else torch.full_like(desirable, present)
    weights = (desirable == present).double() if weighted else None
    with pytest.warns(UserWarning, match="one class only in a batch of 6"):
        value, metrics = AOTUnpairedLoss()(policy, ref, labels, weights=weights, return_metrics=True)
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, policy)[0], torch.zeros_like(policy))
    assert "dominance/violation_area" not in metrics


def test_samples_of_zero_weight_are_ignored():
    policy, ref, desirable = unpaired(4, 3)
    weights = torch.rand(7, dtype=torch.float64) + 0.1
    weights[2] = weights[5] = 0
    kept = weights > 0
    loss = AOTUnpairedLoss(0.3)
    torch.testing.assert_close(
        loss(policy, ref, desirable, weights=weights),
        loss(policy[kept], ref[kept], desirable[kept], weights=weights[kept]),
        **CLOSE,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_unpaired_aot_compiles_whatever_the_labels(weighted):
    torch._dynamo.reset()
    loss = AOTUnpairedLoss(0.3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    policy, ref, desirable = unpaired(7, 3)
    weights = torch.rand(10, dtype=torch.float64) if weighted else None
    policy.requires_grad_()
    for labels in (desirable, policy > ref):
        expected, value = loss(policy, ref, labels, weights=weights), compiled(policy, ref, labels, weights=weights)
        assert torch.equal(value, expected)
        assert torch.equal(*(torch.autograd.grad(x, policy)[0] for x in (value, expected)))


def test_an_empty_batch_gives_zero():
    empty = torch.zeros(0, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.bool)
    for weights in (None, torch.zeros(0)):
        assert AOTPairedLoss()(empty, empty, empty, empty, weights=weights) == 0
        assert AOTUnpairedLoss()(empty, empty, labels, weights=weights) == 0
