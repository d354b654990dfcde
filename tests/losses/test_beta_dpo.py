"""β-DPO: a beta that follows the margins of a batch, and pairs left out that lie far from them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from robustloss import BetaDPOLoss, DPOLoss

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0, 1.0, 0.2, 0.0, 1.0, 2.0], dtype=torch.float64)


def sample(seed: int = 0, B: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-20 + 2 * torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(4)]


def margins_of(logps) -> torch.Tensor:
    pc, pr, rc, rr = logps
    return pc - pr - rc + rr


class Paper:
    """The paper's algorithm as its released code runs it, by NumPy; which pairs stay is told to it."""

    def __init__(self, beta, alpha, momentum):
        self.beta, self.alpha, self.momentum = beta, alpha, momentum
        self.mean = self.std = 0.0

    def __call__(self, margins: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
        self.mean = self.momentum * self.mean + (1 - self.momentum) * margins.mean()
        self.std = self.momentum * self.std + (1 - self.momentum) * margins.std(ddof=1)
        beta = max(self.beta * (1 + self.alpha * (margins[kept].mean() - self.mean)), 1e-3)
        return np.log1p(np.exp(-beta * margins[kept])).mean(), beta

    def nearest(self, margins: np.ndarray, count: int) -> np.ndarray:
        """The most likely pairs, by the statistics that see this batch."""
        mean = self.momentum * self.mean + (1 - self.momentum) * margins.mean()
        return np.sort(np.argsort(np.abs(margins - mean), kind="stable")[:count])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("filter_ratio", [0.0, 0.2, 0.55])
def test_without_chance_the_loss_is_the_papers(alpha, filter_ratio):
    loss = BetaDPOLoss(0.3, alpha, filter_ratio, filtering="nearest")
    paper = Paper(0.3, alpha, 0.9)
    for seed in range(8):
        logps = sample(seed)
        margins = margins_of(logps).numpy()
        expected, beta = paper(margins, paper.nearest(margins, int(10 * (1 - filter_ratio))))
        value, metrics = loss(*logps, return_metrics=True)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert metrics["beta_dpo/beta"].item() == pytest.approx(beta, rel=1e-12)
        assert loss.margin_mean.item() == pytest.approx(paper.mean, rel=1e-12)
        assert loss.margin_std.item() == pytest.approx(paper.std, rel=1e-12)
        assert metrics["beta_dpo/margin_mean"] == loss.margin_mean
        assert metrics["beta_dpo/margin_std"] == loss.margin_std
        assert metrics["beta_dpo/kept"].item() == int(10 * (1 - filter_ratio)) / 10


def test_the_pairs_that_stay_are_drawn_in_proportion_to_their_normal_density():
    """Of three pairs one stays: how often each does, against exp(-(h - M_0)^2 / (2 sigma^2)), normalised."""
    loss = BetaDPOLoss(0.3, 0.0, 0.6)
    margins = torch.tensor([-1.0, 0.2, 2.5], dtype=torch.float64)
    loss.margin_mean.fill_(0.5)
    loss.margin_std.fill_(1.5)
    density = torch.exp(-0.5 * ((margins - 0.5) / 1.5).square())
    draws, counts = 4000, torch.zeros(3)
    for _ in range(draws):
        loss.batches += 1
        counts += loss._select(margins, torch.ones(3, dtype=torch.bool))
    share = counts.double() / draws
    # Five standard deviations of a share of 4000.
    torch.testing.assert_close(share, density / density.sum(), rtol=0, atol=5 * 0.5 / math.sqrt(draws))


def test_draws_are_without_replacement_and_depend_on_seed_and_batch_alone():
    logps = sample()

    def kept(seed, steps=3):
        loss = BetaDPOLoss(0.3, 0.0, 0.5, momentum=0.0, seed=seed)
        for value in logps:
            value.requires_grad_()
        rows = []
        for _ in range(steps):
            torch.randn(7)  # the global generator has no part in it
            (gradient,) = torch.autograd.grad(loss(*logps), logps[0])
            rows.append(gradient != 0)
        return torch.stack(rows)

    first = kept(0)
    assert (first.sum(1) == 5).all()
    assert torch.equal(first, kept(0))
    assert not torch.equal(first, kept(1))
    assert not torch.equal(first[0], first[1])


def test_the_gradient_is_dpos_on_the_kept_pairs_at_the_batchs_beta():
    pc, pr, rc, rr = sample()
    pc.requires_grad_()
    loss = BetaDPOLoss(0.3, 0.6, 0.2)
    value, metrics = loss(pc, pr, rc, rr, return_metrics=True)
    (gradient,) = torch.autograd.grad(value, pc)
    kept = gradient != 0
    assert kept.sum() == 8
    dpo = DPOLoss(metrics["beta_dpo/beta"].item())
    expected = dpo(*(side[kept] for side in (pc, pr, rc, rr)))
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, pc)[0], **CLOSE)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_both_derivatives_are_those_of_a_dpo_loss_of_fixed_beta(weights):
    pc, pr, rc, rr = sample()
    policy = pc.requires_grad_(), pr.requires_grad_()
    value, metrics = BetaDPOLoss(0.3, 0.6).eval()(pc, pr, rc, rr, weights=weights, return_metrics=True)
    fixed = DPOLoss(metrics["beta_dpo/beta"].item())(pc, pr, rc, rr, weights=weights)
    derivatives = []
    for loss in (value, fixed):
        first = torch.autograd.grad(loss, policy, create_graph=True)
        direction = torch.linspace(-1, 2, 10, dtype=torch.float64)
        along = sum((gradient * direction).sum() for gradient in first)
        derivatives.append([*first, *torch.autograd.grad(along, policy)])
    torch.testing.assert_close(*derivatives, **CLOSE)


def test_without_alpha_and_filter_it_is_dpo():
    logps = sample()
    for weights in (None, WEIGHTS):
        torch.testing.assert_close(
            BetaDPOLoss(0.3, 0.0, 0.0)(*logps, weights=weights), DPOLoss(0.3)(*logps, weights=weights), **CLOSE
        )


def test_easy_batches_raise_beta_and_hard_ones_lower_it_to_a_floor():
    pc, pr, rc, rr = sample()
    loss = BetaDPOLoss(0.3, 0.6, 0.0).eval()

    def beta(shift):
        return loss(pc + shift, pr, rc, rr, return_metrics=True)[1]["beta_dpo/beta"].item()

    assert beta(5.0) > beta(0.0) > beta(-0.5)
    assert beta(5.0) - beta(0.0) == pytest.approx(0.3 * 0.6 * 5, rel=1e-9)
    assert beta(-1000.0) == 1e-3


@pytest.mark.parametrize("filtering", ["sample", "nearest"])
def test_where_policy_and_reference_agree_the_loss_is_log_two(filtering):
    chosen, rejected = sample()[:2]
    loss = BetaDPOLoss(filtering=filtering)
    for _ in range(2):  # the second time too: sigma is still zero
        value, metrics = loss(chosen, rejected, chosen, rejected, return_metrics=True)
        assert value.item() == pytest.approx(math.log(2), abs=1e-12)
        assert metrics["beta_dpo/kept"].item() == 0.8
        assert metrics["beta_dpo/beta"].item() == 0.1


def test_pairs_of_zero_weight_are_absent():
    logps = sample()
    kept = WEIGHTS > 0
    one, two = (BetaDPOLoss(0.3, 0.6, 0.3, filtering="nearest") for _ in range(2))
    for _ in range(2):
        torch.testing.assert_close(
            one(*logps, weights=WEIGHTS, return_metrics=True)[0],
            two(*(value[kept] for value in logps), weights=WEIGHTS[kept]),
            **CLOSE,
        )
    torch.testing.assert_close(one.state_dict(), two.state_dict(), **CLOSE)


def test_one_pair_stays_and_no_pair_is_zero():
    logps = sample(B=1)
    loss = BetaDPOLoss(0.3, 0.0, 0.9)
    assert loss(*logps).item() == pytest.approx(DPOLoss(0.3)(*logps).item(), rel=1e-12)
    assert loss.margin_std == 0
    before = copy.deepcopy(loss.state_dict())
    empty = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    value, _ = loss(*empty, return_metrics=True)
    assert value == 0
    assert torch.autograd.grad(value, empty[0])[0].shape == (0,)
    assert loss.state_dict() == before


def test_evaluation_keeps_every_pair_and_learns_nothing():
    loss = BetaDPOLoss(0.3, 0.6, 0.5)
    loss(*sample())
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    value, metrics = loss(*sample(1), return_metrics=True)
    assert loss.state_dict() == before
    assert metrics["beta_dpo/kept"] == 1
    beta = 0.3 * (1 + 0.6 * (margins_of(sample(1)).mean() - before["margin_mean"]))
    assert value.item() == pytest.approx(DPOLoss(beta.item())(*sample(1)).item(), rel=1e-12)


def test_a_state_goes_on_where_it_was_saved(tmp_path):
    batches = [sample(seed) for seed in range(6)]
    whole, first, second = (BetaDPOLoss(0.3, 0.6, 0.4) for _ in range(3))
    expected = [whole(*logps) for logps in batches]
    for logps in batches[:3]:
        first(*logps)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    for logps, value in zip(batches[3:], expected[3:], strict=True):
        assert torch.equal(second(*logps), value)
    assert list(first.state_dict()) == ["margin_mean", "margin_std", "batches"]


def test_a_cast_of_the_model_around_it_keeps_the_digits_of_the_averages():
    loss = BetaDPOLoss(0.3)
    loss(*sample())
    before = copy.deepcopy(loss.state_dict())
    torch.nn.ModuleList([loss]).bfloat16().half()
    assert loss.state_dict() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaDPOLoss(0), r"beta must be > 0, got 0"),
        (lambda: BetaDPOLoss(alpha=-1), r"alpha must be >= 0, got -1"),
        (lambda: BetaDPOLoss(filter_ratio=1), r"filter_ratio must be < 1, got 1"),
        (lambda: BetaDPOLoss(momentum=1), r"momentum must be < 1, got 1"),
        (lambda: BetaDPOLoss(filtering="none"), r"filtering must be one of 'sample', 'nearest', got 'none'"),
        (lambda: BetaDPOLoss(seed=-1), r"seed must be an integer in \[0, 2\*\*31\), got -1"),
        (lambda: BetaDPOLoss(seed=0.5), r"seed must be an integer in \[0, 2\*\*31\), got 0.5"),
        (lambda: BetaDPOLoss(reduction="none"), r"reduction='none' .*BetaDPOLoss: beta and the choice"),
    ],
)
def test_options_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
