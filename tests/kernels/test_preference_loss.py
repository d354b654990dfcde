"""The Triton kernels of preference_loss against the papers' formulas in float64 (interpreted where there is no GPU)."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss.kernels import preference_loss as kernels
from robustloss.naive import preference_loss as naive
from robustloss.naive.links import LINKS

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # The interpreter is NumPy, which warns where infinities are meant to come out.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

# Aggregates with parameters in the inside, and at both ends, of what they may be.
AGGREGATES = [
    ("mean", 0.0),
    ("kl_tilt", 0.05),
    ("kl_tilt", 20.0),
    ("kl_ball", 0.0),
    ("kl_ball", 1e-12),
    ("kl_ball", 0.3),
    ("kl_ball", 50.0),
    ("kl_tilt_unnormalized", 1.0),
    ("cvar", 0.3),
    ("cvar", 1.0),
    ("cvar", 1e-3),
    ("chi_square", 0.0),
    ("chi_square", 0.05),
    ("chi_square", 3.0),
    ("chi_square", 1e5),
    ("total_variation", 0.0),
    ("total_variation", 0.4),
    ("total_variation", 1.0),
    ("soft_min", 0.2),
    ("soft_min", 50.0),
]
# One of each kind of solver.
SOLVERS = [("mean", 0.0), ("kl_ball", 0.3), ("cvar", 0.3), ("chi_square", 3.0)]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}


def sample(device, n, dtype=torch.float32, seed=0):
    """Four log-probabilities and weights, a third of which are zero."""
    generator = torch.Generator().manual_seed(seed + n)
    logps = [(3 * torch.randn(n, generator=generator, dtype=torch.float64)).to(device, dtype) for _ in range(4)]
    weights = torch.rand(n, generator=generator) + 0.1
    weights[1::3] = 0
    return logps, weights.to(device)


@pytest.fixture
def several_launches(monkeypatch):
    """Blocks so small that a few pairs take the path of many: three launches, each over several blocks."""
    monkeypatch.setattr(kernels, "MOST_AT_ONCE", 40)
    monkeypatch.setattr(kernels, "PARALLEL_BLOCK", 32)
    monkeypatch.setattr(kernels, "block_and_warps", lambda *_: (64, 1))


def check(logps, weights, link="logistic", beta=0.7, label_smoothing=0.1, aggregate="mean", parameter=0.0, **options):
    """Value, gradient, P and statistics, against the formulas in float64."""
    max_weight = options.pop("max_weight", math.inf)
    tolerance = options.pop("tolerance", None)
    numbers = (link, beta, label_smoothing, aggregate, parameter, max_weight)
    outputs = kernels.preference_loss(*logps, weights, *numbers)
    chosen = logps[0].double().requires_grad_()
    wide = [None if x is None else x.double() for x in logps[1:]]
    value, worst_case, statistics = naive.preference_loss(
        chosen,
        *wide,
        weights,
        link=link,
        beta=beta,
        label_smoothing=label_smoothing,
        aggregate=aggregate,
        parameter=parameter,
        max_weight=max_weight,
    )
    (gradient,) = torch.autograd.grad(value, chosen)
    is_double = any(x is not None and x.dtype == torch.float64 for x in logps)
    dtype = torch.float64 if is_double else torch.float32
    tolerance = tolerance or TOLERANCE[dtype]
    for actual, expected in zip(outputs, (value, gradient, worst_case, statistics), strict=True):
        assert actual.dtype == dtype
        # Against the largest: a share of one pair in n is about 1 / n, and an absent pair's exactly 0.
        atol = tolerance * expected.detach().nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=tolerance, atol=atol, equal_nan=True)
    if weights is not None:
        assert (outputs[1][weights == 0] == 0).all()
        assert (outputs[2][weights == 0] == 0).all()
    return outputs


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("aggregate", "parameter"), AGGREGATES)
def test_every_aggregate_equals_its_formula(device, aggregate, parameter, weighted):
    for n in (1, 3, 200):
        logps, weights = sample(device, n)
        check(logps, weights if weighted else None, aggregate=aggregate, parameter=parameter)


@pytest.mark.parametrize(("aggregate", "parameter"), AGGREGATES)
def test_every_aggregate_over_many_blocks_equals_its_formula(device, several_launches, aggregate, parameter):
    logps, weights = sample(device, 150)
    check(logps, weights, aggregate=aggregate, parameter=parameter)


@pytest.mark.parametrize(("aggregate", "parameter"), SOLVERS)
def test_many_blocks_without_weights(device, several_launches, aggregate, parameter):
    check(sample(device, 150)[0], None, aggregate=aggregate, parameter=parameter)


@pytest.mark.parametrize(("aggregate", "parameter"), SOLVERS)
def test_a_batch_of_several_blocks_in_one_launch(device, monkeypatch, aggregate, parameter):
    monkeypatch.setattr(kernels, "block_and_warps", lambda *_: (64, 1))
    logps, weights = sample(device, 150)
    check(logps, weights, aggregate=aggregate, parameter=parameter)


@pytest.mark.parametrize(("aggregate", "parameter"), AGGREGATES)
def test_float64_is_computed_in_float64(device, aggregate, parameter):
    # A radius of 1e-12 is a difference of 1e-6 between P and q, of which float64 has ten digits.
    logps, weights = sample(device, 17, torch.float64)
    check(logps, weights, aggregate=aggregate, parameter=parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("link", [*LINKS, "identity"])
def test_every_link_equals_its_formula(device, link, label_smoothing, dtype):
    logps, weights = sample(device, 64, dtype)
    logps[0][:2] += torch.tensor([60.0, -60.0], dtype=dtype, device=device)
    check(logps, weights, link=link, label_smoothing=label_smoothing, aggregate="kl_tilt", parameter=3.0)


def test_the_loss_of_a_large_margin_keeps_its_digits(device):
    margins = torch.linspace(0, 80, 33, device=device)
    for margin in margins.split(1):
        value = kernels.preference_loss(margin, *[None] * 4, "logistic", 1.0, 0.0, "mean", 0.0, math.inf)[0]
        torch.testing.assert_close(value.double(), margin.double().neg().exp().log1p()[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("aggregate", "parameter"), AGGREGATES)
def test_ties_share_in_proportion_to_their_weights(device, aggregate, parameter):
    logps, weights = sample(device, 30)
    for x in logps:
        x[5:20] = x[5]  # in the middle
        x[22:] = x[22]
    logps[0][22:] -= 50  # the largest loss
    outputs = check(logps, weights, aggregate=aggregate, parameter=parameter)
    share = outputs[2] / weights
    for tied in (share[5:20], share[22:]):
        tied = tied[~tied.isnan()]
        torch.testing.assert_close(tied, tied[:1].expand_as(tied), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("aggregate", "parameter"), AGGREGATES)
def test_equal_losses_leave_the_weights_as_they_are(device, aggregate, parameter):
    weights = sample(device, 17)[1]
    _, _, worst_case, _ = check(
        [torch.full((17,), 0.3, device=device), *[None] * 3], weights, aggregate=aggregate, parameter=parameter
    )
    torch.testing.assert_close(worst_case, weights / weights.sum())


def test_the_two_zeros_are_one_loss(device):
    losses = torch.tensor([0.0, -0.0, -1.0, 0.0], device=device)
    outputs = kernels.preference_loss(losses, *[None] * 4, "identity", 1.0, 0.0, "cvar", 0.5, math.inf)
    torch.testing.assert_close(outputs[2], torch.tensor([1.0, 1.0, 0.0, 1.0], device=device) / 3)


@pytest.mark.parametrize(("aggregate", "parameter"), [x for x in AGGREGATES if x[0] != "kl_tilt_unnormalized"])
def test_losses_of_ten_thousand_neither_overflow_nor_lose_their_differences(device, aggregate, parameter):
    losses = 1e4 + torch.arange(17.0, device=device).flip(0) / 8
    check([losses, None, None, None], None, link="identity", aggregate=aggregate, parameter=parameter)
    check([-losses, None, None, None], None, link="identity", aggregate=aggregate, parameter=parameter)


def test_unnormalised_weights_are_clamped(device):
    logps, weights = sample(device, 17)
    *_, statistics = check(logps, weights, aggregate="kl_tilt_unnormalized", parameter=0.2, max_weight=10.0)
    assert statistics[6].item() == pytest.approx(10 * (weights / weights.sum()).max().item())


@pytest.mark.parametrize(("aggregate", "parameter"), SOLVERS)
def test_a_pair_of_weight_zero_is_absent_whatever_its_loss(device, aggregate, parameter):
    logps, weights = sample(device, 30)
    extreme = [x.clone() for x in logps]
    extreme[0][1::6], extreme[0][4::6] = 1e30, -1e30
    options = (weights, "identity", 1.0, 0.0, aggregate, parameter, math.inf)
    value, gradient, worst_case, _ = kernels.preference_loss(*logps, *options)
    actual = kernels.preference_loss(*extreme, *options)
    torch.testing.assert_close(actual[:3], (value, gradient, worst_case))


@pytest.mark.parametrize("absent", range(1, 8))
def test_what_is_none_counts_as_zeros(device, absent):
    logps, _ = sample(device, 17)
    logps = [x if i == 0 or not absent >> (i - 1) & 1 else None for i, x in enumerate(logps)]
    zeros = [torch.zeros(17, device=device) if x is None else x for x in logps]
    options = (None, "logistic", 0.7, 0.0, "kl_tilt", 1.0, math.inf)
    pairs = zip(kernels.preference_loss(*logps, *options), kernels.preference_loss(*zeros, *options), strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in pairs)


def test_inputs_of_any_dtypes_and_strides(device):
    logps, weights = sample(device, 34)
    mixed = [
        x.to(dtype)[::2]
        for x, dtype in zip(logps, (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16), strict=True)
    ]
    check(mixed, weights[::2].double(), aggregate="kl_ball", parameter=0.3)
    mixed[3] = mixed[3].double()
    check(mixed, weights[::2].bfloat16(), aggregate="kl_ball", parameter=0.3)


@pytest.mark.parametrize("aggregate", ["mean", "kl_ball"])
def test_an_empty_batch_is_worth_nothing(device, aggregate):
    value, gradient, worst_case, statistics = kernels.preference_loss(
        torch.zeros(0, device=device), *[None] * 4, "logistic", 0.1, 0.0, aggregate, 1.0, math.inf
    )
    assert value.item() == 0
    assert gradient.shape == worst_case.shape == (0,)
    assert statistics.isnan().tolist() == [True] * 8


@pytest.mark.parametrize(("aggregate", "parameter"), SOLVERS)
def test_one_launch_and_three_agree(device, several_launches, monkeypatch, aggregate, parameter):
    logps, weights = sample(device, 150)
    options = (weights, "robust", 0.7, 0.1, aggregate, parameter, math.inf)
    three = kernels.preference_loss(*logps, *options)
    monkeypatch.setattr(kernels, "MOST_AT_ONCE", 4096)
    one = kernels.preference_loss(*logps, *options)
    for actual, expected in zip(three, one, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("link", LINKS)
def test_a_logp_that_is_not_a_number_makes_the_loss_none(device, link):
    """Nothing looks at the inputs on a GPU, so the value has to tell."""
    logps, _ = sample(device, 5)
    logps[0][3] = torch.nan
    value, *_ = kernels.preference_loss(*logps, None, link, 0.7, 0.0, "mean", 0.0, math.inf)
    assert value.isnan()
