"""What holds for every loss: derivatives, dtypes, constants, detached metrics, compilation, copies, printing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from robustloss import (
    LOSSES,
    AOTPairedLoss,
    AOTUnpairedLoss,
    BetaDPOLoss,
    ChiPOLoss,
    ChiSquare,
    CVaR,
    DPOLoss,
    DrDPOLoss,
    GroupDROLoss,
    KLDPOLoss,
    KLTilt,
    KTOLoss,
    SoftMin,
    TotalVariation,
    TVDPOLoss,
    WDPOLoss,
)
from robustloss.losses import StatefulLoss
from robustloss.naive.links import LINKS

B = 6
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.5, 3.0, 1.0], dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, True, True, False, True])
GROUPS = torch.tensor([0, 1, 1, 0, 0, 1])
REWEIGHTED = [DPOLoss(0.37, aggregate=a) for a in (CVaR(0.4), ChiSquare(0.3), TotalVariation(0.3), SoftMin(0.5))]
# Betas that keep the margins of `sample` off the kinks of the hinges.
VALUE_IS_ITS_OWN_POTENTIAL = [
    *(DPOLoss(0.37, link=link) for link in LINKS),
    DPOLoss(0.37, 0.1),
    DPOLoss(0.37, 0.2, "robust"),
    KLDPOLoss(0.37, rho=0.3),
    KLDPOLoss(0.37, rho=0.3, link="ipo"),
    KLDPOLoss(0.37, rho=0.0),
    KLDPOLoss(0.37, rho=9.0),
    *REWEIGHTED,
    *(AOTPairedLoss(0.37, link) for link in LINKS),
    *(AOTUnpairedLoss(0.37, link) for link in LINKS),
    KTOLoss(0.37, 1.5, 0.5),
    DrDPOLoss(0.37, 0.5),
    TVDPOLoss(0.37, 0.25),
    ChiPOLoss(0.37),
    DPOLoss(0.37, aggregate=CVaR(0.3)),
    DPOLoss(0.37, aggregate=ChiSquare(0.5)),
]
ALL = [*VALUE_IS_ITS_OWN_POTENTIAL, KLDPOLoss(0.37, tau=0.4), KLDPOLoss(0.37, tau=0.4, normalize=False, max_weight=10)]
PLAIN = [
    DPOLoss(),
    KLDPOLoss(tau=0.1),
    KLDPOLoss(rho=0.1),
    *REWEIGHTED,
    AOTPairedLoss(),
    AOTUnpairedLoss(),
    KTOLoss(),
    DrDPOLoss(),
    TVDPOLoss(),
    ChiPOLoss(),
    WDPOLoss(penalty="exact"),
]
# In evaluation, where a second call gives what the first gave.
EVERY = [*PLAIN, BetaDPOLoss().eval(), GroupDROLoss().eval()]


def sample(loss, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Policy log-probabilities with a gradient, then the reference's: 4 or 2 vectors [B]."""
    generator = torch.Generator().manual_seed(0)
    sides = 2 if loss.paired else 1
    values = [(-20 + 3 * torch.randn(B, generator=generator)).to(dtype) for _ in range(2 * sides)]
    return [value.requires_grad_(i < sides) for i, value in enumerate(values)]


def call(loss, logps, **options):
    if isinstance(loss, WDPOLoss):
        # Embeddings that the log-probabilities are a function of: here, their own rows.
        embeddings = torch.cat(logps[:2]).detach().requires_grad_()
        policy = embeddings.sin().chunk(2)
        return loss(*policy, *logps[2:], embeddings=embeddings, **options)
    if loss.needs_groups:
        options["groups"] = GROUPS
    return loss(*logps, **options) if loss.paired else loss(*logps, DESIRABLE, **options)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("loss", VALUE_IS_ITS_OWN_POTENTIAL, ids=str)
def test_derivatives_of_both_orders_match_finite_differences(loss, weights):
    *policy, ref = sample(loss) if not loss.paired else [*sample(loss)[:2], sample(loss)[2:]]
    ref = ref if isinstance(ref, list) else [ref]

    def function(*policy):
        return call(loss, [*policy, *ref], weights=weights)

    assert torch.autograd.gradcheck(function, policy)
    assert torch.autograd.gradgradcheck(function, policy)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("link", LINKS)
def test_derivatives_of_the_tilted_loss_match_finite_differences_of_log_mean_exp(link, weights):
    loss, tau = KLDPOLoss(0.37, tau=0.4, link=link), 0.4
    *policy, rc, rr = sample(loss)
    q = (torch.ones_like(WEIGHTS) if weights is None else weights).detach()

    def carrier(pc, pr):
        value = loss(pc, pr, rc, rr, weights=weights)
        losses = loss.losses(pc, pr, rc, rr).detach()
        free_energy = tau * ((losses / tau + (q / q.sum()).log()).logsumexp(0))
        return free_energy + value - value.detach()

    assert torch.autograd.gradcheck(carrier, policy)
    assert torch.autograd.gradgradcheck(carrier, policy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_any_float_dtype_gives_a_float32_or_float64_loss(loss, dtype):
    logps = sample(loss, dtype)
    value, metrics = call(loss, logps, return_metrics=True)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wanted
    assert value.shape == ()
    assert all(metric.dtype == wanted for metric in metrics.values())
    exact = call(loss, [x.detach().double().requires_grad_(x.requires_grad) for x in logps])
    if not isinstance(loss, WDPOLoss):  # whose embeddings are rounded again on the way
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
        value.backward()
        assert logps[0].grad.dtype == dtype


def test_a_float64_reference_of_a_float32_policy_gives_float64():
    loss = DPOLoss()
    pc, pr, rc, rr = sample(loss, torch.float32)
    assert loss(pc, pr, rc.double(), rr).dtype == torch.float64


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_no_gradient_reaches_the_reference_or_the_weights(loss):
    logps = sample(loss)
    ref = [value.requires_grad_() for value in logps[len(logps) // 2 :]]
    weights = WEIGHTS.clone().requires_grad_()
    value = call(loss, logps, weights=weights)
    gradients = torch.autograd.grad(value, [*ref, weights], allow_unused=True)
    assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_metrics_are_detached_scalars_and_leave_the_value_as_it_is(loss):
    logps = sample(loss)
    value, metrics = call(loss, logps, return_metrics=True)
    assert torch.equal(value, call(loss, logps))
    assert value.requires_grad
    for name, metric in metrics.items():
        assert metric.shape == (), name
        assert not metric.requires_grad, name
        assert torch.isfinite(metric), name
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"} <= metrics.keys()


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_margins_of_ten_thousand_stay_finite(loss):
    for sign in (1, -1):
        logps = [
            (value.detach() + sign * 1e4 * (1 if i == 0 else 0)).float().requires_grad_(value.requires_grad)
            for i, value in enumerate(sample(loss))
        ]
        value = call(loss, logps)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, logps[0])[0]).all()


@pytest.mark.parametrize("loss", [DPOLoss(), KTOLoss()], ids=str)
def test_uncoupled_losses_reduce_to_their_mean(loss):
    logps = sample(loss)
    each = copy.deepcopy(loss)
    each.reduction = "none"
    losses, metrics = call(each, logps, return_metrics=True)
    assert losses.shape == (B,)
    torch.testing.assert_close(losses.mean(), call(loss, logps))
    assert metrics.keys() == call(loss, logps, return_metrics=True)[1].keys()


@pytest.mark.parametrize("loss", PLAIN[:-1], ids=str)
def test_coupled_says_whether_a_samples_gradient_depends_on_the_others(loss):
    logps = sample(loss)
    (before,) = torch.autograd.grad(call(loss, logps), logps[0])
    depends = False
    for index in range(B):
        moved = [value.detach().clone().requires_grad_(value.requires_grad) for value in logps]
        with torch.no_grad():
            moved[0][index] += 9
        (after,) = torch.autograd.grad(call(loss, moved), moved[0])
        others = torch.arange(B) != index
        depends |= not torch.allclose(before[others], after[others], rtol=1e-9, atol=0)
    assert depends == loss.coupled


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize(
    "loss",
    [DPOLoss(), DPOLoss(0.3, 0.1), KLDPOLoss(tau=0.1), KLDPOLoss(rho=0.1), *REWEIGHTED, AOTPairedLoss()],
    ids=str,
)
def test_compiled_losses_equal_eager_ones(loss, metrics):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for weights in (None, WEIGHTS):
        logps = sample(loss)
        eager, got = (f(*logps, weights=weights, return_metrics=metrics) for f in (loss, compiled))
        torch.testing.assert_close(got, eager, rtol=1e-12, atol=1e-12)
        eager, got = (value[0] if metrics else value for value in (eager, got))
        torch.testing.assert_close(
            torch.autograd.grad(got, logps[:2]), torch.autograd.grad(eager, logps[:2]), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_copies_and_pickles_are_the_same_loss(loss):
    logps = sample(loss)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert str(twin) == str(loss)
        assert torch.equal(call(twin, logps), call(loss, logps))
    assert not list(loss.parameters())
    assert isinstance(loss, StatefulLoss) or loss.state_dict() == {}


@pytest.mark.parametrize(
    ("loss", "printed"),
    [
        (DPOLoss(0.2, 0.1), "DPOLoss(beta=0.2, link='logistic', label_smoothing=0.1)"),
        (DPOLoss(link="ipo", reduction="none"), "DPOLoss(beta=0.1, link='ipo', reduction='none')"),
        (
            DPOLoss(aggregate=KLTilt(rho=0.3)),
            "DPOLoss(beta=0.1, link='logistic', aggregate=KLTilt(tau=None, rho=0.3, normalize=True, max_weight=None))",
        ),
        (
            WDPOLoss(rho=0.5, squared=False),
            "WDPOLoss(beta=0.1, link='logistic', rho=0.5, squared=False, penalty='central')",
        ),
        (AOTPairedLoss(), "AOTPairedLoss(beta=0.1, link='logistic', sort='hard')"),
        (AOTUnpairedLoss(link="hinge"), "AOTUnpairedLoss(beta=0.1, link='hinge', sort='hard')"),
        (
            KTOLoss(desirable_weight=2),
            "KTOLoss(beta=0.1, desirable_weight=2, undesirable_weight=1, reduction='mean')",
        ),
        (TVDPOLoss(rho=0.2), "TVDPOLoss(beta=0.1, link='logistic', aggregate=TotalVariation(rho=0.2))"),
        (DrDPOLoss(0.2, 0.5), "DrDPOLoss(beta=0.2, link='logistic', aggregate=SoftMin(beta_prime=0.5))"),
        (ChiPOLoss(max_reward=3), "ChiPOLoss(beta=0.1, link='logistic', max_reward=3)"),
        (
            BetaDPOLoss(),
            "BetaDPOLoss(beta=0.1, alpha=0.6, filter_ratio=0.2, momentum=0.9, filtering='sample')",
        ),
        (
            GroupDROLoss(groups=2, group_sizes=[1, 3]),
            "GroupDROLoss(beta=0.1, link='logistic', groups=2, step_size=0.01, group_shares=[0.25, 0.75])",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_printing_a_loss_shows_its_options(loss, printed):
    assert str(loss) == printed


def test_every_loss_has_the_name_that_configuration_files_use():
    assert {name: type(loss) for name, loss in zip(LOSSES, _in_order(), strict=True)} == LOSSES


def _in_order():
    paired = DPOLoss(), KLDPOLoss(tau=1), WDPOLoss(), AOTPairedLoss()
    return *paired, AOTUnpairedLoss(), KTOLoss(), DrDPOLoss(), ChiPOLoss(), BetaDPOLoss(), GroupDROLoss(), TVDPOLoss()
