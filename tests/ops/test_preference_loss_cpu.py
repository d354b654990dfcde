"""The C++ half of the op `preference_loss` against naive/: every aggregate and link, dtypes, edges, derivatives."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from robustloss.naive.links import LINKS, SMOOTHED_LINKS, link_loss, link_slope
from robustloss.naive.preference_loss import STATISTICS
from robustloss.naive.preference_loss import preference_loss as naive_preference_loss
from robustloss.ops._library import HAS_EXTENSION
from robustloss.ops.preference_loss import _naive, preference_loss

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="robustloss was installed without its C++ extension")

OP = torch.ops.robustloss.preference_loss.default
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# (aggregate, parameter, max_weight); the second list in the order of the first's parameters
AGGREGATES = [
    ("mean", 0.0, math.inf),
    ("kl_tilt", 0.3, math.inf),
    ("kl_ball", 0.2, math.inf),
    ("kl_tilt_unnormalized", 0.5, 2.0),
    ("cvar", 0.3, math.inf),
    ("chi_square", 0.6, math.inf),
    ("total_variation", 0.25, math.inf),
    ("soft_min", 0.7, math.inf),
]
EDGES = [
    ("kl_tilt", 1e-3, math.inf),
    ("kl_tilt", 1e6, math.inf),
    ("kl_tilt_unnormalized", 5.0, math.inf),
    ("kl_ball", 0.0, math.inf),
    ("kl_ball", 1e-6, math.inf),
    ("kl_ball", 50.0, math.inf),
    ("cvar", 1.0, math.inf),
    ("cvar", 0.02, math.inf),
    ("chi_square", 0.0, math.inf),
    ("chi_square", 1e-4, math.inf),
    ("chi_square", 1e6, math.inf),
    ("total_variation", 0.0, math.inf),
    ("total_variation", 1.0, math.inf),
    ("soft_min", 1e-3, math.inf),
    ("soft_min", 1e3, math.inf),
]
OPTIONS = [(link, 0.37, 0.1 * (link in SMOOTHED_LINKS)) for link in (*LINKS, "identity")]
# Those whose value is a function of the losses that has their gradient: all but the tilts of given temperature.
POTENTIALS = [aggregate for aggregate in AGGREGATES if not aggregate[0].startswith("kl_tilt")]


def named(value) -> str:
    return "-".join(map(str, value[:2])) if isinstance(value, tuple) else str(value)


def sample(n: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [(-20 + 3 * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)]


def weights_of(n: int) -> torch.Tensor:
    """Random, the second, fifth, ... of them zero."""
    weights = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 0.1
    weights[1::3] = 0
    return weights


def oracle(logps, weights, link, beta, smoothing, aggregate, parameter, max_weight):
    """The op's outputs by the naive composition in float64 and its autograd."""
    chosen, *others = [x.detach().double() for x in logps]
    chosen.requires_grad_()
    value, worst_case, statistics = naive_preference_loss(
        chosen,
        *others,
        None if weights is None else weights.double(),
        link=link,
        beta=beta,
        label_smoothing=smoothing,
        aggregate=aggregate,
        parameter=parameter,
        max_weight=max_weight,
    )
    return value.detach(), torch.autograd.grad(value, chosen)[0], worst_case, statistics


@pytest.fixture
def poisoned():
    """What the op allocates is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_agrees(logps, weights, options, aggregate, rtol=1e-12, atol=1e-12):
    got = OP(*logps, weights, *options, *aggregate)
    wanted = oracle(logps, weights, *options, *aggregate)
    for name, actual, expected in zip(("value", "gradient", "worst_case"), got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(
            actual.double(), expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name} {options}: {text}"
        )
    for name, actual, expected in zip(STATISTICS, got[3].double(), wanted[3], strict=True):
        # A temperature follows from differences of the order of the radius.
        loose = 1e4 if name == "tau" else 1
        torch.testing.assert_close(
            actual,
            expected,
            rtol=loose * rtol,
            atol=loose * atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name} {options}: {text}",
        )


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("aggregate", [*AGGREGATES, *EDGES], ids=named)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1025])
def test_values_gradients_and_statistics_are_those_of_naive(n, aggregate, weighted):
    for options in OPTIONS:
        assert_agrees(sample(n), weights_of(n) if weighted else None, options, aggregate, atol=1e-11)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
def test_a_batch_of_many_blocks(aggregate, weighted):
    n = 70_000
    # The naive thresholds come from sums over all samples, whose rounding a single sample at the threshold shows.
    assert_agrees(sample(n), weights_of(n) if weighted else None, OPTIONS[0], aggregate, rtol=1e-11, atol=1e-9)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
@pytest.mark.parametrize("n", [3, 64, 1025])
def test_float32_is_exact_to_its_rounding(n, aggregate):
    """Differences of losses are divided by a small temperature, so they are taken in float64."""
    for options, weights in itertools.product(OPTIONS, (None, weights_of(n).float())):
        logps = sample(n, torch.float32)
        got = OP(*logps, weights, *options, *aggregate)
        assert all(x.dtype == torch.float32 for x in got)
        assert_agrees(logps, weights, options, aggregate, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "dtypes", itertools.product([torch.float32, torch.bfloat16, torch.float16, torch.float64], repeat=2)
)
def test_dtypes_may_be_mixed(dtypes):
    policy_dtype, ref_dtype = dtypes
    pc, pr, rc, rr = sample(37)
    logps = [pc.to(policy_dtype), pr.to(policy_dtype), rc.to(ref_dtype), rr.to(ref_dtype)]
    weights = weights_of(37).to(torch.bfloat16)
    got = OP(*logps, weights, *OPTIONS[0], *AGGREGATES[2])
    wide = torch.float64 in dtypes
    assert all(x.dtype == (torch.float64 if wide else torch.float32) for x in got)
    tolerance = 1e-12 if wide else 1e-6
    assert_agrees(logps, weights, OPTIONS[0], AGGREGATES[2], rtol=tolerance, atol=tolerance)


def test_missing_vectors_are_zeros():
    pc, pr, rc, rr = sample(20)
    zeros = torch.zeros(20, dtype=torch.float64)
    tilt = AGGREGATES[1]
    for given, full in [
        ((pc, None, None, None), (pc, zeros, zeros, zeros)),
        ((pc, pr, None, None), (pc, pr, zeros, zeros)),
        ((pc, None, rc, None), (pc, zeros, rc, zeros)),
        ((pc, None, None, rr), (pc, zeros, zeros, rr)),
    ]:
        for got, expected in zip(
            OP(*given, None, *OPTIONS[0], *tilt), OP(*full, None, *OPTIONS[0], *tilt), strict=True
        ):
            assert torch.equal(got, expected)


def test_any_strides():
    logps = sample(50)
    expected = OP(*logps, weights_of(50), *OPTIONS[0], *AGGREGATES[2])
    strided = torch.stack([*logps, weights_of(50)], 1).unbind(1)
    reversed_storage = [x.flip(0).contiguous().flip(0) for x in strided]
    for vectors in (strided, reversed_storage):
        for got, wanted in zip(OP(*vectors, *OPTIONS[0], *AGGREGATES[2]), expected, strict=True):
            assert torch.equal(got, wanted)
    one = torch.tensor([-3.0]).expand(50)
    assert torch.isfinite(OP(one, one, one, one, None, *OPTIONS[0], *AGGREGATES[2])[1]).all()


@pytest.mark.parametrize("link", OPTIONS, ids=named)
def test_equal_margins_give_equal_bits_wherever_they_stand(link):
    for n in (5, 67, 5000):
        _, gradient, _, _ = OP(torch.full((n,), 0.7531), None, None, None, None, *link, *AGGREGATES[1])
        assert (gradient == gradient[0]).all()


@pytest.mark.parametrize("link", LINKS)
def test_far_margins_keep_their_digits(link):
    margins = torch.tensor([-1e4, -800.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 800.0, 1e4], dtype=torch.float64)
    options = {"beta": 0.9, "link": link}
    for i, margin in enumerate(margins):
        value, gradient, _, _ = OP(margin[None], None, None, None, None, link, 0.9, 0.0, *AGGREGATES[0])
        torch.testing.assert_close(value, link_loss(margins, **options)[i], rtol=1e-14, atol=1e-300)
        torch.testing.assert_close(gradient[0], link_slope(margins, **options)[i], rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("link", OPTIONS[:-1], ids=named)
def test_the_naive_slope_is_the_derivative_of_the_naive_link(link):
    name, beta, smoothing = link
    margins = torch.linspace(-9, 9, 32, dtype=torch.float64, requires_grad=True)
    options = {"link": name, "beta": beta, "label_smoothing": smoothing}
    (expected,) = torch.autograd.grad(link_loss(margins, **options).sum(), margins)
    torch.testing.assert_close(link_slope(margins.detach(), **options), expected, **CLOSE)


def test_a_tiny_share_is_the_maximum_and_a_huge_temperature_the_mean():
    losses = sample(999)[0]
    value, _, worst_case, _ = OP(losses, None, None, None, None, "identity", 1.0, 0.0, "cvar", 1e-9, math.inf)
    assert value == losses.max()
    assert torch.equal(worst_case, torch.nn.functional.one_hot(losses.argmax(), 999).double())
    for sign, aggregate in ((1, "kl_tilt"), (-1, "soft_min")):
        tau = 1e6
        value, _, _, _ = OP(losses, None, None, None, None, "identity", 1.0, 0.0, aggregate, tau, math.inf)
        order = 2 if aggregate == "soft_min" else 1
        expected = losses.mean() + sign * losses.var(correction=0) / (order * tau)
        assert value.item() == pytest.approx(expected.item(), abs=1e-10)


# ---- edges ----------------------------------------------------------------------------------------------------------


def of_losses(losses, aggregate, parameter, weights=None, max_weight=math.inf):
    return OP(losses, None, None, None, weights, "identity", 1.0, 0.0, aggregate, parameter, max_weight)


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
def test_nothing_at_all(aggregate):
    for weights in (None, torch.zeros(0)):
        value, gradient, worst_case, statistics = OP(*[torch.zeros(0)] * 4, weights, *OPTIONS[0], *aggregate)
        assert value == 0
        assert gradient.shape == worst_case.shape == (0,)
        assert statistics.isnan().all()


@pytest.mark.parametrize(
    ("aggregate", "parameter"), [("kl_ball", 9.0), ("cvar", 0.01), ("chi_square", 50.0), ("total_variation", 1.0)]
)
def test_ties_at_the_maximum_share_its_mass_by_weight(aggregate, parameter):
    losses = torch.tensor([2.0, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    value, gradient, worst_case, _ = of_losses(losses, aggregate, parameter, weights)
    expected = torch.tensor([0.25, 0.0, 0.75, 0.0, 0.0], dtype=torch.float64)
    assert value.item() == pytest.approx(2, abs=1e-14)
    torch.testing.assert_close(worst_case, expected, **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_ties_at_a_threshold_share_in_proportion_to_their_weights():
    losses = torch.tensor([1.0, 5.0, 1.0, 0.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    # The worst half of the mass, 5 of 10: the 2 at the loss 5, and 3 of the 4 at the loss 1.
    _, _, worst_case, _ = of_losses(losses, "cvar", 0.5, weights)
    torch.testing.assert_close(worst_case, torch.tensor([0.15, 0.4, 0.45, 0.0], dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("aggregate", [*AGGREGATES, *EDGES], ids=named)
@pytest.mark.parametrize("n", [1, 7, 70_000])
def test_equal_losses_leave_the_nominal_weights(n, aggregate):
    for weights in (None, weights_of(n)):
        q = torch.full((n,), 1 / n, dtype=torch.float64) if weights is None else weights / weights.sum()
        value, gradient, worst_case, _ = of_losses(torch.full((n,), 0.7, dtype=torch.float64), *aggregate[:2], weights)
        assert value.item() == pytest.approx(0.7, rel=1e-12)
        torch.testing.assert_close(worst_case, q, rtol=1e-9, atol=1e-15)
        assert torch.equal(gradient, worst_case)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4])
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
def test_losses_of_any_size(aggregate, scale):
    """A temperature is in units of the loss; a radius has none."""
    name, parameter, max_weight = aggregate
    losses = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 8
    if name in ("kl_tilt", "kl_tilt_unnormalized", "soft_min"):
        scaled = parameter * scale
    else:
        scaled = parameter
    expected = of_losses(losses, name, parameter, None, max_weight)
    got = of_losses(scale * losses, name, scaled, None, max_weight)
    torch.testing.assert_close(got[0], scale * expected[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-9, atol=1e-13)
    # On top of a large common loss the differences have few digits left, but those count.
    shifted = of_losses(1e4 + losses, name, parameter, None, max_weight)
    torch.testing.assert_close(shifted[1], expected[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_the_worst_case_of_a_ball_lies_on_its_sphere_whatever_the_losses(weighted):
    generator = torch.Generator().manual_seed(7)
    for trial in range(200):
        n = int(torch.randint(2, 300, (), generator=generator))
        scale = 10 ** (18 * torch.rand((), generator=generator).item() - 13)
        losses = scale * torch.randn(n, generator=generator, dtype=torch.float64).abs().pow(1 + trial % 7)
        if trial % 3 == 0:
            losses = scale * (losses / scale).round()
        weights = torch.rand(n, generator=generator, dtype=torch.float64).pow(1 + trial % 9) if weighted else None
        q = torch.full_like(losses, 1 / n) if weights is None else weights / weights.sum()
        rho = -q[losses == losses.max()].sum().log().item() * torch.rand((), generator=generator).item() ** 4 * 0.999
        if rho <= 0:
            continue
        _, _, worst_case, statistics = of_losses(losses, "kl_ball", rho, weights)
        divergence = torch.special.xlogy(worst_case, worst_case / q).sum().item()
        assert divergence == pytest.approx(rho, rel=1e-9, abs=1e-14), (trial, n, scale)
        assert statistics[7] > 0
        _, _, worst_case, _ = of_losses(losses, "chi_square", rho, weights)
        spread = (worst_case.square() / q).sum().item() - 1
        assert spread == pytest.approx(min(rho, 1 / q[losses == losses.max()].sum().item() - 1), rel=1e-9, abs=1e-14)


def test_newton_does_not_run_in_circles():
    """Squares of normal margins: KL rises in two steps, between which Newton alone goes back and forth for ever."""
    pc, pr, rc, rr = sample(9000)
    _, _, worst_case, _ = OP(pc, pr, rc, rr, None, "least_squares", 0.37, 0.0, "kl_ball", 1.0, math.inf)
    assert torch.special.xlogy(worst_case, worst_case * 9000).sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
def test_samples_of_zero_weight_are_absent_however_large(aggregate):
    logps, weights = sample(90), weights_of(90)
    kept = weights > 0
    logps[0][~kept] += torch.where(torch.arange(30) % 2 == 0, 1e5, -1e5).double()
    got = OP(*logps, weights, *OPTIONS[0], *aggregate)
    expected = OP(*[x[kept] for x in logps], weights[kept], *OPTIONS[0], *aggregate)
    torch.testing.assert_close(got[0], expected[0], **CLOSE)
    assert not got[1][~kept].any()
    torch.testing.assert_close(got[1][kept], expected[1], **CLOSE)


def test_losses_that_overflow_are_refused():
    logps = torch.tensor([1e200, 0.0, 1.0], dtype=torch.float64)
    for name, parameter, max_weight in AGGREGATES:
        for vector, dtype in ((logps, "float64"), (torch.full((3,), 1e30), "float32")):
            with pytest.raises(ValueError, match=f"too large: the loss overflows {dtype}"):
                OP(vector, None, None, None, None, "ipo", 0.1, 0.0, name, parameter, max_weight)


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1000])
def test_losses_whose_squares_overflow_or_vanish_have_the_worst_case_of_others(aggregate, exponent):
    name, parameter, max_weight = aggregate
    temperature = name in ("kl_tilt", "kl_tilt_unnormalized", "soft_min")
    losses = sample(50)[0]
    value, *_, statistics = OP(losses, *[None] * 4, "identity", 1.0, 0.0, *aggregate)
    scaled = math.ldexp(parameter, exponent) if temperature else parameter
    given = torch.ldexp(losses, torch.tensor(exponent).double())
    got, _, worst_case, of_scaled = OP(given, *[None] * 4, "identity", 1.0, 0.0, name, scaled, max_weight)
    torch.testing.assert_close(torch.ldexp(got, torch.tensor(-exponent).double()), value, **CLOSE)
    torch.testing.assert_close(of_scaled[5:7], statistics[5:7], **CLOSE)
    assert worst_case.isfinite().all()


def test_the_same_bits_whatever_the_number_of_threads():
    logps = sample(70_000, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([x for aggregate in AGGREGATES for x in OP(*logps, None, *OPTIONS[0], *aggregate)[:3]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 16, 4999])
def test_nan_and_infinity_are_refused_by_name(position, bad, index):
    vectors = [*sample(5000, torch.float32), torch.ones(5000)]
    vectors[position][index] = bad
    name = ("chosen", "rejected", "ref_chosen", "ref_rejected", "weights")[position]
    for entry in (OP, _naive):
        with pytest.raises(ValueError, match=rf"^{name} holds 1 non-finite value\(s\), .* index \({index},\): {bad};"):
            entry(*vectors, *OPTIONS[0], *AGGREGATES[1])


def test_bad_weights_are_refused():
    logps = sample(5000, torch.float32)
    negative = torch.ones(5000)
    negative[4321] = -2.5
    for entry in (OP, _naive):
        with pytest.raises(ValueError, match=r"^weights must be >= 0, got a minimum of -2.5"):
            entry(*logps, negative, *OPTIONS[0], *AGGREGATES[1])
        with pytest.raises(ValueError, match=r"^weights must not all be zero"):
            entry(*logps, torch.zeros(5000), *OPTIONS[0], *AGGREGATES[1])


def test_layouts_and_names_that_cannot_be_are_refused():
    x = torch.zeros(3)
    options, mean = OPTIONS[0], AGGREGATES[0]
    with pytest.raises(ValueError, match=r"rejected must have shape \[3\] \(chosen's shape\), got \[4\]"):
        OP(x, torch.zeros(4), None, None, None, *options, *mean)
    with pytest.raises(ValueError, match=r"chosen must be \[B\], got \[3, 1\]"):
        OP(x[:, None], None, None, None, None, *options, *mean)
    with pytest.raises(TypeError, match=r"ref_chosen must have dtype float32, .* got Long"):
        OP(x, None, x.long(), None, None, *options, *mean)
    with pytest.raises(ValueError, match=r"link must be one of 'identity', .*, got 'sigmoid'"):
        OP(x, None, None, None, None, "sigmoid", 0.1, 0.0, *mean)
    with pytest.raises(ValueError, match=r"aggregate must be one of 'mean', .*, got 'median'"):
        OP(x, None, None, None, None, *options, "median", 0.0, math.inf)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("aggregate", POTENTIALS, ids=named)
def test_derivatives_of_both_orders_match_finite_differences(aggregate, weighted):
    *policy, rc, rr = [x.requires_grad_(i < 2) for i, x in enumerate(sample(6))]
    weights = weights_of(6) if weighted else None
    for options in OPTIONS:

        def value(chosen, rejected, options=options):
            return preference_loss(chosen, rejected, rc, rr, weights, *options, *aggregate)[0]

        assert torch.autograd.gradcheck(value, policy)
        assert torch.autograd.gradgradcheck(value, policy)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_derivatives_of_the_tilt_match_finite_differences_of_log_mean_exp(options):
    link, beta, smoothing = options
    *policy, rc, rr = [x.requires_grad_(i < 2) for i, x in enumerate(sample(6))]

    def carrier(chosen, rejected):
        value = preference_loss(chosen, rejected, rc, rr, None, *options, "kl_tilt", 0.4, math.inf)[0]
        margins = (chosen - rc) - (rejected - rr)
        losses = margins
        if link != "identity":
            losses = link_loss(margins, link=link, beta=beta, label_smoothing=smoothing)
        return 0.4 * (losses.detach() / 0.4).logsumexp(0) + value - value.detach()

    assert torch.autograd.gradcheck(carrier, policy)
    assert torch.autograd.gradgradcheck(carrier, policy)


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=named)
def test_the_backward_scales_the_gradient(aggregate):
    pc, pr, rc, rr = sample(30, torch.float32)
    inputs = [pc.requires_grad_(), pr.bfloat16().requires_grad_(), rc.requires_grad_(), rr.requires_grad_()]
    for entry in (OP, preference_loss):
        value, gradient, worst_case, statistics = entry(*inputs, None, *OPTIONS[0], *aggregate)
        assert not any(x.requires_grad for x in (gradient, worst_case, statistics))
        grads = torch.autograd.grad(value, inputs, torch.tensor(-2.5), allow_unused=True)
        assert torch.equal(grads[0], -2.5 * gradient)
        assert torch.equal(grads[1], (2.5 * gradient).bfloat16())
        assert grads[2] is grads[3] is None


def test_one_side_alone_or_one_tensor_on_both_sides():
    pc, pr, rc, rr = sample(12)
    tilt = (*OPTIONS[0], *AGGREGATES[2])
    _, gradient, _, _ = OP(pc, pr, rc, rr, None, *tilt)
    for order in (False, True):
        for position, sign in ((0, 1), (1, -1)):
            inputs = [x.clone().requires_grad_(i == position) for i, x in enumerate((pc, pr))]
            value = preference_loss(*inputs, rc, rr, None, *tilt)[0]
            (grad,) = torch.autograd.grad(value, inputs[position], create_graph=order)
            torch.testing.assert_close(grad, sign * gradient, **CLOSE)
        same = pc.clone().requires_grad_()
        for rejected in (same, same * 1):
            value = preference_loss(same, rejected, rc, rr, None, *tilt)[0]
            (grad,) = torch.autograd.grad(value, same, create_graph=order)
            assert grad.abs().max() < 1e-15


def test_without_grad_there_is_no_graph():
    logps = [x.requires_grad_() for x in sample(9)]
    with torch.no_grad():
        value, gradient, _, _ = preference_loss(*logps, None, *OPTIONS[0], *AGGREGATES[1])
    assert not value.requires_grad
    assert torch.equal(gradient, preference_loss(*logps, None, *OPTIONS[0], *AGGREGATES[1])[1])


def test_the_op_keeps_its_contract():
    logps = [x.requires_grad_(i < 2) for i, x in enumerate(sample(9))]
    torch.library.opcheck(OP, (*logps, weights_of(9), *OPTIONS[0], *AGGREGATES[2]))
    mixed = [x.detach().to(dtype) for x, dtype in zip(logps, (torch.bfloat16, torch.float32) * 2, strict=True)]
    torch.library.opcheck(OP, (mixed[0], None, mixed[1], None, None, *OPTIONS[0], *AGGREGATES[2]))


# ---- elsewhere ------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, warnings
if {missing}:
    sys.modules["robustloss._C"] = None
import torch
from tests.ops.test_preference_loss_cpu import AGGREGATES, OPTIONS, preference_loss, sample, weights_of
results = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for options in OPTIONS:
        for aggregate in AGGREGATES:
            logps = [x.requires_grad_(i < 2) for i, x in enumerate(sample(67))]
            value, *others = preference_loss(*logps, weights_of(67), *options, *aggregate)
            results.append([value.detach(), *others, *torch.autograd.grad(value, logps[:2])])
assert len(caught) == {missing}, caught
torch.save(results, sys.argv[1])
"""


@pytest.mark.parametrize("where", ["default", "avx2", "missing"])
def test_other_instruction_sets_and_an_install_without_the_extension_agree(where, tmp_path):
    missing = where == "missing"
    environment = dict(os.environ) | ({} if missing else {"ATEN_CPU_CAPABILITY": where})
    command = [sys.executable, "-c", ELSEWHERE.format(missing=missing), str(tmp_path / "results")]
    subprocess.run(command, check=True, env=environment)
    results = iter(torch.load(tmp_path / "results"))
    for options, aggregate in itertools.product(OPTIONS, AGGREGATES):
        logps = [x.requires_grad_(i < 2) for i, x in enumerate(sample(67))]
        value, *others = preference_loss(*logps, weights_of(67), *options, *aggregate)
        here = [value.detach(), *others, *torch.autograd.grad(value, logps[:2])]
        for name, got, expected in zip(
            ("value", "gradient", "P", "statistics", "dpc", "dpr"), next(results), here, strict=True
        ):
            torch.testing.assert_close(
                got, expected, rtol=1e-11, atol=1e-11, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
            )
