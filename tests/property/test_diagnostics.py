"""Diagnostics of any finite samples are numbers in their range; what does not fit is refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from property_cases import (
    SIZES,
    WEIGHTS,
    WRONG_NUMBERS,
    assert_right,
    exact,
    holds_for,
    refuses,
    spoiled,
    tensors,
    weights_for,
)

from robustloss import ChiSquare, CVaR, KLTilt, Mean, SoftMin, TotalVariation
from robustloss.diagnostics import dominance_violation, quantile_curves, worst_case

KINDS = ("ordinary", "wide", "tied", "constant", "zeros", "thousands", "denormal", "huge", "largest")
AGGREGATES = (Mean(), KLTilt(tau=0.1), KLTilt(rho=0.5), CVaR(0.3), ChiSquare(0.5), TotalVariation(0.3), SoftMin(1.0))


@st.composite
def samples(draw: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    size = draw(st.sampled_from(SIZES[1:]))
    return draw(tensors((size,), kinds=KINDS)), weights_for(
        size, draw(st.integers(0, 99)), draw(st.sampled_from(WEIGHTS))
    )


@holds_for(data=st.data())
def test_the_violation_of_dominance_is_zero_of_a_sample_by_itself_and_lies_in_its_interval(data):
    (u, u_weights), (v, v_weights) = data.draw(samples()), data.draw(samples())
    bootstrap = data.draw(st.sampled_from((0, 1, 5)))
    found = dominance_violation(u, v, u_weights=u_weights, v_weights=v_weights, bootstrap=bootstrap)
    assert -1e-12 <= found.area.estimate <= 1 + 1e-9
    for interval in (found.area, found.w1, found.w2):
        assert 0 <= interval.estimate < math.inf
        assert math.isnan(interval.low) if not bootstrap else interval.low <= interval.high
    assert found.w1.estimate <= found.w2.estimate * (1 + 1e-9) + 1e-150  # a smaller one has no square
    with_itself = dominance_violation(u, u, u_weights=u_weights, v_weights=u_weights, bootstrap=0)
    assert (with_itself.area.estimate, with_itself.w1.estimate, with_itself.w2.estimate) == (0, 0, 0)


@holds_for(data=st.data())
def test_quantile_curves_rise_from_the_smallest_to_the_largest_sample(data):
    (u, u_weights), (v, v_weights) = data.draw(samples()), data.draw(samples())
    count = data.draw(st.integers(2, 30))
    levels, *curves = quantile_curves(u, v, count, u_weights=u_weights, v_weights=v_weights)
    assert levels.shape == (count,)
    for curve, values, weights in zip(curves, (u, v), (u_weights, v_weights), strict=True):
        there = exact(values) if weights is None else exact(values)[weights > 0]
        assert (curve.diff() >= 0).all()
        assert curve[0] == there.min()
        assert curve[-1] == there.max()


@holds_for(data=st.data())
def test_the_worst_case_is_a_distribution_no_better_than_the_mean(data):
    losses, weights = data.draw(samples())
    aggregate = data.draw(st.sampled_from(AGGREGATES))
    found = worst_case(losses, aggregate, weights)
    assert (found.weights >= 0).all()
    assert_right(found.weights.sum(), torch.ones(()).double(), digits=10)
    assert_right(found.nominal.sum(), torch.ones(()).double())
    mean = (found.nominal * found.losses).sum().item()
    slack = 1e-6 * losses.double().abs().max().item()
    assert found.value <= mean + slack if isinstance(aggregate, SoftMin) else found.value >= mean - slack
    assert 1 - 1e-6 <= found.effective_sample_size <= len(losses) * (1 + 1e-6)
    assert found.kl >= -1e-6
    assert 0 <= found.total_variation <= 1 + 1e-6
    assert found.chi_square >= 0
    assert len(found.top(3)) == min(3, len(losses))


@holds_for(data=st.data())
def test_arguments_that_do_not_fit_are_refused_by_name(data):
    values = torch.tensor([0.5, -1.0, 2.0])
    given: dict[Any, dict[str, Any]] = {
        dominance_violation: {
            "u": values, "v": values, "u_weights": values.abs(), "v_weights": values.abs(), "bootstrap": 2,
            "confidence": 0.9,
        },
        quantile_curves: {"u": values, "v": values, "u_weights": values.abs(), "levels": 5},
        worst_case: {"losses": values, "aggregate": CVaR(0.5), "weights": values.abs()},
    }  # fmt: skip
    function = data.draw(st.sampled_from(list(given)))
    arguments = given[function]
    function(**arguments)
    name = data.draw(st.sampled_from(sorted(arguments)))
    wrong: dict[str, Any] = {
        "bootstrap": (-1, 1.5, None, True),
        "confidence": (*WRONG_NUMBERS, 0, 1),
        "levels": (1, -3, True, 2.5, None, torch.tensor([0.5, 1.5]), torch.zeros(2, 2), torch.tensor([math.nan])),
        "aggregate": (None, CVaR, "mean", 0.5),
    }
    if name in wrong:
        arguments[name] = data.draw(st.sampled_from(wrong[name]))
    elif name.endswith("weights") and data.draw(st.booleans()):
        arguments[name] = data.draw(st.sampled_from((-values.abs(), torch.zeros(3), values[:2])))
    else:
        arguments[name] = data.draw(spoiled(values))
    refuses(lambda: function(**arguments), name)
