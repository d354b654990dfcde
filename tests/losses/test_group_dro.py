"""GroupDRO: weights of groups that follow the groups' losses, and the loss they make."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from robustloss import DPOLoss, GroupDROLoss

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
GROUPS = torch.tensor([0, 1, 1, 2, 0, 1])
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0, 1.0], dtype=torch.float64)


def sample(seed: int = 0, B: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-20 + 5 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


def numpy_losses(logps, beta: float) -> np.ndarray:
    pc, pr, rc, rr = (value.numpy() for value in logps)
    return np.log1p(np.exp(-beta * (pc - pr - rc + rr)))


def by_the_paper(batches, beta: float, step_size: float, sizes) -> tuple[list[float], np.ndarray]:
    """Algorithm 1: alpha_g *= exp(eta N l / N_g), normalise, then descend on sum alpha_g (N / N_g) l; by NumPy."""
    total, alpha, values = sum(sizes), np.full(len(sizes), 1 / len(sizes)), []
    for logps, groups in batches:
        losses = numpy_losses(logps, beta)
        weighted = np.array([total / N * losses[groups.numpy() == g].sum() / len(losses) for g, N in enumerate(sizes)])
        alpha = alpha * np.exp(step_size * weighted)
        alpha = alpha / alpha.sum()
        values.append(alpha @ weighted)
    return values, alpha


def test_importance_weighted_groups_are_the_papers():
    batches = [(sample(seed), GROUPS.roll(seed) % (3 - seed % 2)) for seed in range(5)]
    loss = GroupDROLoss(0.3, 3, 0.5, group_sizes=[10, 30, 60])
    values = [loss(*logps, groups=groups).item() for logps, groups in batches]
    expected, alpha = by_the_paper(batches, 0.3, 0.5, [10, 30, 60])
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_allclose(loss.group_weights.numpy(), alpha, rtol=1e-12)


def test_without_sizes_a_groups_loss_is_its_mean_in_the_batch():
    loss, logps = GroupDROLoss(0.3, 3, 0.5), sample()
    losses = numpy_losses(logps, 0.3)
    means = np.array([losses[GROUPS.numpy() == g].mean() for g in range(3)])
    alpha = np.exp(0.5 * means) / np.exp(0.5 * means).sum()
    value, metrics = loss(*logps, groups=GROUPS, return_metrics=True)
    assert value.item() == pytest.approx(alpha @ means, rel=1e-12)
    for g in range(3):
        assert metrics[f"group_dro/weight_{g}"].item() == pytest.approx(alpha[g], rel=1e-12)
        assert metrics[f"group_dro/loss_{g}"].item() == pytest.approx(means[g], rel=1e-12)


def test_the_gradient_holds_the_new_weights_fixed():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    loss = GroupDROLoss(0.3, 3, 0.5)
    (gradient,) = torch.autograd.grad(loss(pc, pr, rc, rr, groups=GROUPS), pc)
    losses = DPOLoss(0.3, reduction="none")(pc, pr, rc, rr)
    coefficients = (loss.group_weights / torch.bincount(GROUPS))[GROUPS]
    torch.testing.assert_close(gradient, torch.autograd.grad((coefficients * losses).sum(), pc)[0], **CLOSE)


@pytest.mark.parametrize("sizes", [None, [1, 2, 3]], ids=["means", "importance"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_derivatives_of_both_orders_match_finite_differences_in_evaluation(weights, sizes):
    pc, pr, rc, rr = sample()
    policy = pc.requires_grad_(), pr.requires_grad_()
    loss = GroupDROLoss(0.3, 3, 0.5, group_sizes=sizes, link="ipo")
    loss(pc, pr, rc, rr, groups=GROUPS)
    loss.eval()

    def function(pc, pr):
        return loss(pc, pr, rc, rr, groups=GROUPS, weights=weights)

    assert torch.autograd.gradcheck(function, policy)
    assert torch.autograd.gradgradcheck(function, policy)


def test_the_weights_flow_to_the_worst_group_and_stay_a_distribution():
    loss, logps = GroupDROLoss(0.3, 3, 1.0), sample()
    means = [DPOLoss(0.3)(*(value[g == GROUPS] for value in logps)).item() for g in range(3)]
    worst = int(np.argmax(means))
    before = loss.group_weights[worst].item()
    for _ in range(300):
        value = loss(*logps, groups=GROUPS)
        assert loss.group_weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert loss.group_weights[worst] > before - 1e-12
        before = loss.group_weights[worst].item()
    assert value.item() == pytest.approx(max(means), rel=1e-6)
    # However small a weight has become, it can come back.
    assert torch.isfinite(loss.log_weights).all()


def test_a_step_size_of_zero_keeps_the_groups_equal():
    loss, logps = GroupDROLoss(0.3, 3, 0.0), sample()
    means = [DPOLoss(0.3)(*(value[g == GROUPS] for value in logps)).item() for g in range(3)]
    assert loss(*logps, groups=GROUPS).item() == pytest.approx(np.mean(means), rel=1e-12)


def test_one_group_is_plain_dpo():
    logps = sample()
    value = GroupDROLoss(0.3, 1)(*logps, groups=torch.zeros(6, dtype=torch.int64), weights=WEIGHTS)
    torch.testing.assert_close(value, DPOLoss(0.3)(*logps, weights=WEIGHTS), **CLOSE)


def test_a_group_that_the_batch_lacks_keeps_its_weight():
    loss, logps = GroupDROLoss(0.3, 4, 0.5), sample()
    groups = torch.tensor([0, 2, 2, 0, 0, 2])
    value, metrics = loss(*logps, groups=groups, return_metrics=True)
    weights = loss.group_weights
    assert weights[1].item() == weights[3].item() == pytest.approx(0.25, abs=1e-12)
    assert (weights[0] + weights[2]).item() == pytest.approx(0.5, abs=1e-12)
    assert weights[0] != weights[2]
    assert torch.isfinite(value)
    assert math.isnan(metrics["group_dro/loss_1"].item())
    assert metrics["group_dro/weight_1"].item() == pytest.approx(0.25, abs=1e-12)


def test_pairs_of_zero_weight_are_absent():
    logps = sample()
    kept = WEIGHTS > 0
    for sizes in (None, [2, 3, 5]):
        one, two = (GroupDROLoss(0.3, 3, 0.5, group_sizes=sizes) for _ in range(2))
        torch.testing.assert_close(
            one(*logps, groups=GROUPS, weights=WEIGHTS),
            two(*(value[kept] for value in logps), groups=GROUPS[kept], weights=WEIGHTS[kept]),
            **CLOSE,
        )
        torch.testing.assert_close(one.log_weights, two.log_weights, **CLOSE)
    alone = WEIGHTS * (GROUPS != 2)
    loss = GroupDROLoss(0.3, 3, 0.5)
    loss(*logps, groups=GROUPS, weights=alone)
    assert loss.group_weights[2].item() == pytest.approx(1 / 3, abs=1e-12)


def test_an_empty_batch_changes_nothing():
    empty = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    for sizes in (None, [1, 2]):
        loss = GroupDROLoss(groups=2, group_sizes=sizes)
        value = loss(*empty, groups=torch.zeros(0, dtype=torch.int64))
        assert value == 0
        assert torch.autograd.grad(value, empty[0])[0].shape == (0,)
        torch.testing.assert_close(loss.group_weights, torch.full((2,), 0.5, dtype=torch.float64))


def test_evaluation_learns_nothing():
    loss, logps = GroupDROLoss(0.3, 3, 0.5), sample()
    loss(*logps, groups=GROUPS)
    state = copy.deepcopy(loss.state_dict())
    evaluated = loss.eval()(*sample(1), groups=GROUPS)
    assert torch.equal(loss.state_dict()["log_weights"], state["log_weights"])
    assert torch.equal(loss(*sample(1), groups=GROUPS), evaluated)
    loss.train()(*sample(1), groups=GROUPS)
    assert not torch.equal(loss.state_dict()["log_weights"], state["log_weights"])


def test_a_state_goes_on_where_it_was_saved(tmp_path):
    batches = [sample(seed) for seed in range(6)]
    whole, first, second = (GroupDROLoss(0.3, 3, 0.5) for _ in range(3))
    expected = [whole(*logps, groups=GROUPS) for logps in batches]
    for logps in batches[:3]:
        first(*logps, groups=GROUPS)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    for logps, value in zip(batches[3:], expected[3:], strict=True):
        assert torch.equal(second(*logps, groups=GROUPS), value)
    assert list(first.state_dict()) == ["log_weights"]


def test_a_cast_of_the_model_around_it_keeps_the_digits_of_the_weights():
    loss = GroupDROLoss(0.3, 3, 0.5)
    loss(*sample(), groups=GROUPS)
    before = loss.log_weights.clone()
    model = torch.nn.ModuleDict({"loss": loss, "model": torch.nn.Linear(2, 2)}).bfloat16()
    assert model["model"].weight.dtype == torch.bfloat16
    assert torch.equal(loss.log_weights, before)
    assert loss.log_weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GroupDROLoss(groups=0), ValueError, r"groups must be an integer >= 1 .*got 0"),
        (lambda: GroupDROLoss(groups=2.0), ValueError, r"groups must be an integer >= 1 .*got 2.0"),
        (lambda: GroupDROLoss(step_size=-1), ValueError, r"step_size must be >= 0, got -1"),
        (lambda: GroupDROLoss(groups=2, group_sizes=[1]), ValueError, r"group_sizes must hold 2 numbers .*got 1"),
        (lambda: GroupDROLoss(groups=2, group_sizes=3), TypeError, r"group_sizes must be a list of 2 numbers, got 3"),
        (lambda: GroupDROLoss(groups=2, group_sizes=[1, 0]), ValueError, r"group_sizes\[1\] must be > 0, got 0"),
        (lambda: GroupDROLoss(reduction="none"), ValueError, r"reduction='none' .*GroupDROLoss: a pair weighs"),
    ],
)
def test_options_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (None, ValueError, r"groups is missing: .*int64 \[B\]"),
        ([0] * 6, TypeError, r"groups must be a torch.Tensor, got list"),
        (torch.zeros(6), TypeError, r"groups must have dtype int64, int32, got float32"),
        (torch.zeros(5, dtype=torch.int64), ValueError, r"groups must have shape \(6,\) \(one group a pair\), got"),
        (torch.tensor([0, 1, 2, 3, 0, 0]), ValueError, r"groups must be in \[0, 3\), got values from 0 to 3"),
        (torch.tensor([0, 1, 2, -1, 0, 0]), ValueError, r"groups must be in \[0, 3\), got values from -1 to 2"),
        (GROUPS.to("meta"), ValueError, r"groups is on meta but the log-probabilities is on cpu"),
    ],
    ids=["missing", "list", "float", "shape", "above", "below", "device"],
)
def test_groups_are_whole_numbers_one_a_pair(groups, error, message):
    with pytest.raises(error, match=message):
        GroupDROLoss(0.3, 3)(*sample(), groups=groups)
