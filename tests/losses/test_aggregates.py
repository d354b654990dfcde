"""Aggregates: what each makes of a batch of losses, inside a loss and by itself, and one of the user's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from robustloss import ChiSquare, CVaR, DPOLoss, KLTilt, Mean, SoftMin, TotalVariation
from robustloss.losses import Aggregate
from robustloss.naive import kl_tilt, worst_case

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0], dtype=torch.float64)
NAIVE = [
    (Mean(), lambda losses, q: ((kl_tilt.normalized_weights(losses, q) * losses).sum(), None)),
    (KLTilt(tau=0.3), lambda losses, q: kl_tilt.kl_tilt(losses, tau=0.3, weights=q)),
    (KLTilt(rho=0.3), lambda losses, q: kl_tilt.kl_ball(losses, rho=0.3, weights=q)[:2]),
    (
        KLTilt(tau=0.3, normalize=False, max_weight=1.5),
        lambda losses, q: kl_tilt.kl_tilt_unnormalized(losses, tau=0.3, max_weight=1.5, weights=q),
    ),
    (
        KLTilt(tau=0.3, normalize=False),
        lambda losses, q: kl_tilt.kl_tilt_unnormalized(losses, tau=0.3, weights=q),
    ),
    (CVaR(0.3), lambda losses, q: worst_case.cvar(losses, alpha=0.3, weights=q)),
    (ChiSquare(0.3), lambda losses, q: worst_case.chi_square_ball(losses, rho=0.3, weights=q)),
    (TotalVariation(0.3), lambda losses, q: worst_case.total_variation_ball(losses, rho=0.3, weights=q)),
    (SoftMin(0.3), lambda losses, q: worst_case.soft_min(losses, beta_prime=0.3, weights=q)),
]
AGGREGATES = [aggregate for aggregate, _ in NAIVE]


def sample(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(-20 + 5 * torch.randn(5, generator=generator)).to(dtype).requires_grad_(i < 2) for i in range(4)]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize(("aggregate", "naive"), NAIVE, ids=[str(aggregate) for aggregate in AGGREGATES])
def test_the_loss_is_the_papers_formula_of_the_pairs_losses(aggregate, naive, weights):
    logps = sample()
    losses = DPOLoss(0.3, reduction="none")(*logps)
    expected, _ = naive(losses, weights)
    value, metrics = DPOLoss(0.3, aggregate=aggregate)(*logps, weights=weights, return_metrics=True)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(value, logps[:2]), torch.autograd.grad(expected, logps[:2], retain_graph=True), **CLOSE
    )
    alone, same = aggregate(losses, weights)
    torch.testing.assert_close(alone, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(alone, losses), torch.autograd.grad(expected, losses), **CLOSE)
    torch.testing.assert_close(same, {name: metrics[name] for name in same}, **CLOSE)


@pytest.mark.parametrize(("aggregate", "naive"), NAIVE, ids=[str(aggregate) for aggregate in AGGREGATES])
def test_a_reweighting_reports_its_weights(aggregate, naive):
    metrics = DPOLoss(0.3, aggregate=aggregate)(*sample(), return_metrics=True)[1]
    tilt = {name: value for name, value in metrics.items() if name.startswith("tilt/")}
    if isinstance(aggregate, Mean):
        assert not tilt
        return
    _, weight = naive(DPOLoss(0.3, reduction="none")(*sample()), None)
    expected = {
        "tilt/effective_sample_size": weight.sum().square() / weight.square().sum(),
        "tilt/max_weight": weight.max(),
    }
    if isinstance(aggregate, KLTilt):
        assert tilt.pop("tilt/tau") > 0
    torch.testing.assert_close(tilt, expected, **CLOSE)


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=str)
def test_the_loss_and_all_its_metrics_are_one_op(aggregate):
    class Count(TorchDispatchMode):
        ops: list[str]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.ops.append(str(function))
            return function(*args, **(kwargs or {}))

    count = Count()
    count.ops = []
    logps = sample()
    with count:
        DPOLoss(0.3, aggregate=aggregate)(*logps)
    assert count.ops == ["robustloss.preference_loss.default"]


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=str)
def test_coupled_aggregates_say_so(aggregate):
    assert isinstance(aggregate, Aggregate)
    assert aggregate.coupled == (not isinstance(aggregate, Mean))
    assert DPOLoss(aggregate=aggregate).coupled == aggregate.coupled
    if aggregate.coupled:
        with pytest.raises(ValueError, match=r"reduction='none' .*weighs every"):
            DPOLoss(aggregate=aggregate, reduction="none")


@pytest.mark.parametrize(
    ("mild", "hard"),
    [
        (CVaR(1), CVaR(0.01)),
        (ChiSquare(0), ChiSquare(9)),
        (TotalVariation(0), TotalVariation(1)),
        (KLTilt(rho=0), KLTilt(rho=9)),
    ],
    ids=str,
)
def test_a_radius_runs_from_the_mean_to_the_maximum(mild, hard):
    losses = DPOLoss(0.3, reduction="none")(*sample())
    torch.testing.assert_close(mild(losses, None)[0], losses.mean(), **CLOSE)
    torch.testing.assert_close(hard(losses, None)[0], losses.max(), **CLOSE)


def test_the_soft_minimum_runs_from_the_minimum_to_the_mean():
    losses = DPOLoss(0.3, reduction="none")(*sample())
    values = torch.stack([SoftMin(beta_prime)(losses, None)[0] for beta_prime in (1e-3, 0.1, 1, 10, 1e9)])
    assert (values.diff() > 0).all()
    assert values[0].item() == pytest.approx(losses.min().item(), abs=0.002)
    assert values[-1].item() == pytest.approx(losses.mean().item(), rel=1e-8)


def test_an_aggregate_of_the_users_own():
    class Median:
        coupled = True

        def __call__(self, losses, weights):
            assert weights is None or (weights.dtype == losses.dtype and not weights.requires_grad)
            return losses.median(), {"median/spread": (losses.detach() - losses.detach().median()).abs().mean()}

    logps = sample()
    value, metrics = DPOLoss(0.3, aggregate=Median())(*logps, weights=WEIGHTS.float(), return_metrics=True)
    torch.testing.assert_close(value, DPOLoss(0.3, reduction="none")(*logps).median(), **CLOSE)
    assert metrics.keys() == DPOLoss(0.3)(*logps, return_metrics=True)[1].keys() | {"median/spread"}
    (gradient,) = torch.autograd.grad(value, logps[0])
    assert (gradient != 0).sum() == 1
    with pytest.raises(ValueError, match=r"policy_chosen_logps holds 1 non-finite"):
        DPOLoss(aggregate=Median())(torch.tensor([math.nan]), *[torch.zeros(1)] * 3)


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=str)
def test_an_aggregate_alone_names_what_is_wrong_with_its_losses(aggregate):
    with pytest.raises(ValueError, match=r"^losses holds 1 non-finite value.* index \(1,\): inf"):
        aggregate(torch.tensor([0.0, math.inf]), None)
    with pytest.raises(ValueError, match=r"^weights must not all be zero"):
        aggregate(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=str)
def test_no_losses_give_zero_and_an_empty_gradient(aggregate):
    losses = torch.zeros(0, requires_grad=True)
    value, _ = aggregate(losses, None)
    assert value == 0
    assert torch.autograd.grad(value, losses)[0].shape == (0,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CVaR(0), ValueError, r"alpha must be > 0, got 0"),
        (lambda: CVaR(1.5), ValueError, r"alpha must be <= 1 .*got 1.5"),
        (lambda: CVaR("half"), TypeError, r"alpha must be a number, got str"),
        (lambda: ChiSquare(-1), ValueError, r"rho must be >= 0, got -1"),
        (lambda: ChiSquare(math.inf), ValueError, r"rho must be finite, got inf"),
        (lambda: TotalVariation(-0.1), ValueError, r"rho must be >= 0, got -0.1"),
        (lambda: TotalVariation(1.01), ValueError, r"rho must be <= 1 .*got 1.01"),
        (lambda: SoftMin(0), ValueError, r"beta_prime must be > 0, got 0"),
        (lambda: SoftMin(math.nan), ValueError, r"beta_prime must be finite, got nan"),
    ],
)
def test_parameters_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_printing_and_comparing_shows_the_parameters():
    assert str(DPOLoss(aggregate=CVaR(0.2))) == "DPOLoss(beta=0.1, link='logistic', aggregate=CVaR(alpha=0.2))"
    assert ChiSquare(0.1) == ChiSquare(0.1) != ChiSquare(0.2)
    assert len({SoftMin(1.0), SoftMin(1.0), TotalVariation(0.5)}) == 2
