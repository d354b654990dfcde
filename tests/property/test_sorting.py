"""Sorting, ranking and transport of any finite samples are those of the naive float64 computation."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from hypothesis import strategies as st
from property_cases import (
    DTYPES,
    KINDS,
    SIZES,
    WEIGHTS,
    WRONG_NUMBERS,
    assert_right,
    exact,
    gradients,
    holds_for,
    largest,
    leaf,
    refuses,
    spoiled,
    tensors,
    unless_too_large,
    weights_for,
)
from torch import Tensor

from robustloss import sinkhorn_sort, soft_rank, soft_sort, sorted_transport
from robustloss.naive import sorted_transport as naive_transport
from robustloss.naive.links import LINKS, OFFSET_LINKS, SMOOTHED_LINKS

STRENGTHS = (1e-30, 1e-6, 0.01, 0.5, 1, 7.0, 1e6, 1e30)


@st.composite
def rows_of(draw: Any, **options: Any) -> Tensor:
    """[..., n] with no, one or two leading dimensions."""
    leading = draw(st.sampled_from(((), (), (1,), (3,), (0,), (2, 2))))
    return draw(tensors((*leading, draw(st.sampled_from(SIZES))), **options))


def spread(values: Tensor) -> float:
    return (values.double().max() - values.double().min()).item() if values.numel() else 0.0


@holds_for(data=st.data())
def test_soft_sorted_values_are_sorted_and_between_the_smallest_and_the_largest(data):
    values = leaf(data.draw(rows_of()))
    descending, regularization = data.draw(st.booleans()), data.draw(st.sampled_from(("l2", "kl")))
    strength = data.draw(st.sampled_from(STRENGTHS))
    options = {"descending": descending, "regularization": regularization, "strength": strength}
    got = unless_too_large(lambda: soft_sort(values, **options), values)
    if got is None:
        return
    assert got.shape == values.shape
    assert got.dtype == values.dtype
    steps = exact(got).diff(dim=-1)
    assert ((steps <= 0) if descending else (steps >= 0)).all()  # and so none is NaN
    if values.numel():
        slack = 2 * torch.finfo(values.dtype).eps * largest(values)
        assert got.min() >= exact(values).min() - slack
        assert got.max() <= exact(values).max() + slack
    if regularization == "l2" and largest(values) < 1e30:
        assert_right(exact(got).sum(-1).to(got.dtype), exact(values).sum(-1), scale=largest(values) * values.shape[-1])
    if strength * spread(values) < 0.5 and strength < 1e29:  # no gap is as wide as 1 / strength
        assert torch.equal(got, values.sort(-1, descending=descending).values)
    (gradient,) = gradients(got, [values])
    # Whatever it pools, it moves with the values.
    assert_right(gradient.sum(-1), torch.full(gradient.shape[:-1], values.shape[-1], dtype=torch.float64), digits=4)


@holds_for(data=st.data())
def test_soft_ranks_order_as_the_values_and_sum_to_the_triangular_number(data):
    values = leaf(data.draw(rows_of()))
    descending, regularization = data.draw(st.booleans()), data.draw(st.sampled_from(("l2", "kl")))
    strength = data.draw(st.sampled_from(STRENGTHS))
    options = {"descending": descending, "regularization": regularization, "strength": strength}
    got = unless_too_large(lambda: soft_rank(values, **options), values)
    if got is None:
        return
    n = values.shape[-1]
    assert got.shape == values.shape
    assert got.dtype == values.dtype
    assert_right(exact(got).sum(-1).to(got.dtype), torch.full(got.shape[:-1], n * (n + 1) / 2).double(), digits=2)
    in_order = exact(got).gather(-1, values.sort(stable=True, dim=-1, descending=descending).indices)
    assert (in_order.diff(dim=-1) >= -1e-6 * n).all()
    if n:
        assert (in_order >= 1 - 1e-2).all()
        assert (in_order <= n * (1 + 1e-2)).all()
    assert gradients(got, [values])[0].isfinite().all() or strength < 1e-5  # the slope of a rank is 1 / strength


@holds_for(data=st.data())
def test_sinkhorn_sorted_values_are_monotone_and_keep_their_sum(data):
    values = leaf(data.draw(rows_of(kinds=KINDS[:-1])))
    strength = data.draw(st.sampled_from((1e-3, 0.01, 0.1, 1.0, 50.0)))
    descending = data.draw(st.booleans())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = sinkhorn_sort(values, strength=strength, descending=descending, max_iterations=60)
    assert all("did not converge" in str(warning.message) for warning in told)
    assert got.shape == values.shape
    assert got.dtype == values.dtype
    slack = 1e-2 * torch.finfo(values.dtype).eps ** 0.25 * max(spread(values), 1e-30)
    steps = exact(got).diff(dim=-1)
    assert ((steps <= slack) if descending else (steps >= -slack)).all()
    assert_right(
        exact(got).sum(-1).to(got.dtype), exact(values).sum(-1), scale=largest(values) * values.shape[-1], digits=4
    )
    assert gradients(got, [values])[0].isfinite().all()


@st.composite
def links(draw: Any) -> dict[str, Any]:
    link = draw(st.sampled_from(LINKS))
    betas = (0.01, 0.1, 1, 3.5, 1e3)
    beta = draw(st.sampled_from((0.0, *betas) if link in OFFSET_LINKS else betas))
    smoothing = draw(st.sampled_from((0.0, 0.1, 0.49))) if link in SMOOTHED_LINKS else 0.0
    return {"link": link, "beta": beta, "label_smoothing": smoothing}


@holds_for(data=st.data())
def test_sorted_transport_is_that_of_the_naive_computation(data):
    u, link = data.draw(rows_of()), data.draw(links())
    v = data.draw(tensors((*u.shape[:-1], data.draw(st.sampled_from((u.shape[-1], *SIZES))))))
    weights = {}
    for name, side in (("u_weights", u), ("v_weights", v)):
        kind = data.draw(st.sampled_from(WEIGHTS))
        drawn = weights_for(side.shape[-1], data.draw(st.integers(0, 99)), kind)
        weights[name] = None if drawn is None else drawn.expand(side.shape).to(data.draw(st.sampled_from(DTYPES[:2])))
    u, v = leaf(u), leaf(v)
    got = unless_too_large(lambda: sorted_transport(u, v, **weights, **link), u, v)
    if got is None:
        return
    assert got.shape == u.shape[:-1]
    flat = [
        leaf(exact(x).reshape(-1, x.shape[-1]) if x.shape[-1] else exact(x).reshape(math.prod(x.shape[:-1]), 0))
        for x in (u, v)
    ]
    of_rows = [
        None if w is None else w.reshape(len(x), x.shape[-1]) for x, w in zip(flat, weights.values(), strict=True)
    ]
    wanted, _ = naive_transport.sorted_transport(
        flat[0], None, flat[1], None, None, *(None if w is None else w.double() for w in of_rows), **link
    )
    if not wanted.isfinite().all():  # float64 overflows
        return
    scale = max(1.0, link["beta"]) * (largest(u) + largest(v) + 1)
    if "squares" in link["link"] or "squared" in link["link"] or link["link"] == "ipo":
        scale = min((largest(u) + largest(v) + 1 + 1 / max(link["beta"], 1e-2)), 1e150) ** 2
    assert_right(got, wanted.reshape(got.shape), scale=scale)
    for got_gradient in gradients(got, [u, v]):
        assert not got_gradient.isnan().any()


@holds_for(data=st.data())
def test_arguments_that_do_not_fit_are_refused_by_name(data):
    values = data.draw(tensors((2, 5), kinds=("ordinary",), layouts=("contiguous",)))
    given: dict[Any, dict[str, Any]] = {
        soft_sort: {"values": values, "strength": 1.0, "regularization": "l2"},
        soft_rank: {"values": values, "strength": 1.0, "regularization": "kl"},
        sinkhorn_sort: {"values": values, "strength": 1.0, "max_iterations": 20, "tolerance": 1e-3},
        sorted_transport: {
            "u": values, "v": values, "u_weights": values.abs(), "v_weights": values.abs(), "link": "robust",
            "beta": 0.1, "label_smoothing": 0.1,
        },
    }  # fmt: skip
    function = data.draw(st.sampled_from(list(given)))
    arguments = given[function]
    function(**arguments)
    name = data.draw(st.sampled_from(sorted(arguments)))
    if isinstance(arguments[name], Tensor):
        ways = ("type", "dtype", "value") if name == "values" else ("type", "dtype", "shape", "value")
        arguments[name] = data.draw(spoiled(arguments[name], ways))
        if name.endswith("weights") and data.draw(st.booleans()):
            arguments[name] = -values.abs() - 1
    elif name == "max_iterations":
        arguments[name] = data.draw(st.sampled_from((0, -1, 2.0, True, None, "3")))
    elif name in ("regularization", "link"):
        arguments[name] = data.draw(st.sampled_from(("L2", "", None, 1, ["l2"], "os.system")))
    else:
        wrong = (*WRONG_NUMBERS, 0) if name != "label_smoothing" else (*WRONG_NUMBERS, 0.5, 1)
        wrong = tuple(x for x in wrong if not (x is None and name == "tolerance"))
        arguments[name] = data.draw(st.sampled_from(wrong))
    others = [other for other in ("u", "v") if other in arguments] if isinstance(arguments[name], Tensor) else []
    refuses(lambda: function(**arguments), name, *others)
