"""Sorted margins are the optimal coupling on the line, and dominance violations behave like an index."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog

from robustloss.naive.links import LINKS, link_loss
from robustloss.naive.sorted_transport import dominance_violation, sorted_margins, sorted_transport

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [(1, 1), (1, 5), (5, 1), (4, 4), (6, 4), (3, 7), (12, 8), (100, 33)]


def sample(n: int, m: int, weighted: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(100 * n + m)
    u, v = torch.randn(n, generator=generator), 0.5 + 2 * torch.randn(m, generator=generator)
    if not weighted:
        return u.double(), v.double(), None, None
    return u.double(), v.double(), *(torch.rand(k, generator=generator).double() + 0.01 for k in (n, m))


def transport_cost(u, v, u_weights=None, v_weights=None, *, link: str = "least_squares", beta: float = 0.0):
    margins, mass = sorted_margins(u, v, u_weights, v_weights)
    losses = link_loss(margins, beta=beta, link=link)
    return losses.mean() if mass is None else (mass * losses).sum()


def normalized(weights, values) -> np.ndarray:
    weights = torch.ones_like(values) if weights is None else weights
    return (weights / weights.sum()).numpy()


def test_equal_sizes_give_the_plain_sorted_mean_to_the_bit():
    for dtype in (torch.float32, torch.float64):
        u, v, _, _ = sample(37, 37)
        u, v = u.to(dtype), v.to(dtype)
        margins, mass = sorted_margins(u, v)
        assert mass is None
        assert torch.equal(margins, u.sort().values - v.sort().values)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_least_squares_link_is_pots_squared_wasserstein_distance(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    expected = ot.wasserstein_1d(u.numpy(), v.numpy(), normalized(a, u), normalized(b, v), p=2)
    assert transport_cost(u, v, a, b).item() == pytest.approx(expected.item(), rel=1e-10)
    plan_cost = ot.emd2_1d(u.numpy(), v.numpy(), normalized(a, u), normalized(b, v), metric="sqeuclidean")
    assert transport_cost(u, v, a, b).item() == pytest.approx(plan_cost, rel=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_no_coupling_is_cheaper_for_any_convex_link_of_u_minus_v(link, weighted):
    """[A] Theorem 1, against a linear program over all couplings."""
    u, v, a, b = sample(5, 4, weighted)
    cost = link_loss(u[:, None] - v[None, :], beta=0.7, link=link).numpy()
    rows = np.kron(np.eye(5), np.ones((1, 4)))
    columns = np.kron(np.ones((1, 5)), np.eye(4))
    found = linprog(
        cost.ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([normalized(a, u), normalized(b, v)]),
        bounds=(0, None),
        method="highs",
    )
    assert found.success
    assert transport_cost(u, v, a, b, link=link, beta=0.7).item() == pytest.approx(found.fun, abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_mass_of_the_cells_sums_to_one(n, m, weighted):
    margins, mass = sorted_margins(*sample(n, m, weighted))
    if n == m and not weighted:
        assert mass is None
        return
    assert mass.shape == margins.shape
    assert (mass >= 0).all()
    assert mass.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_expected_margin_is_the_difference_of_the_means(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    margins, mass = sorted_margins(u, v, a, b)
    mean = margins.mean() if mass is None else (mass * margins).sum()
    expected = normalized(a, u) @ u.numpy() - normalized(b, v) @ v.numpy()
    assert mean.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_order_of_the_samples_does_not_matter(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    p, q = torch.randperm(n), torch.randperm(m)
    shuffled = (u[p], v[q], *(None if w is None else w[order] for w, order in ((a, p), (b, q))))
    torch.testing.assert_close(
        transport_cost(*shuffled, link="logistic", beta=1.0),
        transport_cost(u, v, a, b, link="logistic", beta=1.0),
        **CLOSE,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_duplicating_every_sample_changes_nothing(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    for k, l in ((2, 2), (2, 3), (1, 4)):
        twice = (u.repeat(k), v.repeat(l), *(None if w is None else w.repeat(r) for w, r in ((a, k), (b, l))))
        torch.testing.assert_close(
            transport_cost(*twice, link="logistic", beta=1.0),
            transport_cost(u, v, a, b, link="logistic", beta=1.0),
            **CLOSE,
        )


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_an_integer_weight_is_a_repeated_sample(n, m):
    u, v, _, _ = sample(n, m)
    counts = torch.arange(n) % 3
    counts[-1] = 2
    torch.testing.assert_close(
        transport_cost(u, v, counts.double(), link="logistic", beta=1.0),
        transport_cost(u.repeat_interleave(counts), v, link="logistic", beta=1.0),
        **CLOSE,
    )


@pytest.mark.parametrize("link", ["logistic", "least_squares"])
def test_equal_weights_are_no_weights(link):
    u, v, _, _ = sample(6, 6)
    ones = torch.full((6,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(transport_cost(u, v, ones, ones, link=link), transport_cost(u, v, link=link), **CLOSE)


def test_samples_of_zero_weight_are_ignored():
    u, v, a, b = sample(6, 4, weighted=True)
    a[torch.tensor([0, 3])] = 0
    u[0], u[3] = -1e6, 1e6
    u.requires_grad_()
    cost = transport_cost(u, v, a, b)
    torch.testing.assert_close(cost, transport_cost(u[a > 0], v, a[a > 0], b), **CLOSE)
    (gradient,) = torch.autograd.grad(cost, u)
    assert gradient[0] == gradient[3] == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_tied_samples_give_a_deterministic_subgradient_whose_sum_is_that_of_any_order(weighted):
    u = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.5, -1.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    a = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64) if weighted else None
    first, second = (torch.autograd.grad(transport_cost(u, v, a), u)[0] for _ in range(2))
    assert torch.equal(first, second)
    apart = (u.detach() + torch.tensor([1e-9, 2e-9, 0, 3e-9])).requires_grad_()
    (gradient,) = torch.autograd.grad(transport_cost(apart, v, a), apart)
    torch.testing.assert_close(first, gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (4, 4), (5, 3)])
def test_derivatives_of_both_orders_match_finite_differences_away_from_ties(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    u.requires_grad_()
    v.requires_grad_()

    def function(u, v):
        return transport_cost(u, v, a, b, link="logistic", beta=1.3)

    assert torch.autograd.gradcheck(function, (u, v))
    assert torch.autograd.gradgradcheck(function, (u, v))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_a_sample_that_dominates_has_no_violation_and_its_dual_has_all(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    above = u - u.min() + v.max() + 1
    area, w1 = dominance_violation(*sorted_margins(above, v, a, b))
    assert area == w1 == 0
    area, w1 = dominance_violation(*sorted_margins(v, above, b, a))
    assert area.item() == pytest.approx(1, abs=1e-12)
    assert w1.item() == pytest.approx(
        ot.wasserstein_1d(v.numpy(), above.numpy(), normalized(b, v), normalized(a, u), p=1).item(), rel=1e-10
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_violations_both_ways_share_the_wasserstein_distance(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    area, there = dominance_violation(*sorted_margins(u, v, a, b))
    area_back, back = dominance_violation(*sorted_margins(v, u, b, a))
    distance = ot.wasserstein_1d(u.numpy(), v.numpy(), normalized(a, u), normalized(b, v), p=1).item()
    assert (there + back).item() == pytest.approx(distance, rel=1e-10)
    assert (area + area_back).item() == pytest.approx(1, abs=1e-12)


def test_equal_samples_violate_nothing():
    u = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    area, w1 = dominance_violation(*sorted_margins(u, u.detach()))
    assert area == w1 == 0
    (gradient,) = torch.autograd.grad(area + w1, u)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_labelled_samples_are_two_samples(n, m, weighted):
    u, v, a, b = sample(n, m, weighted)
    order = torch.randperm(n + m)
    both, desirable = torch.cat([u, v])[order], (torch.arange(n + m) < n)[order]
    weights = torch.cat([a, b])[order][None] if weighted else None
    value, statistics = sorted_transport(both[None], desirable=desirable[None], u_weights=weights, beta=1.0)
    margins, mass = sorted_margins(u, v, a, b)
    torch.testing.assert_close(value[0], transport_cost(u, v, a, b, link="logistic", beta=1.0), **CLOSE)
    torch.testing.assert_close(statistics[0], torch.stack(dominance_violation(margins, mass)), **CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_rows_are_problems_of_their_own(n, m, weighted):
    rows = [sample(n, m, weighted), sample(n, m, weighted)]
    rows[1] = [None if x is None else x.flip(0).square() for x in rows[1]]
    u, v, a, b = (None if xs[0] is None else torch.stack(xs) for xs in zip(*rows, strict=True))
    value, _ = sorted_transport(u, None, v, None, None, a, b, beta=1.0)
    expected = torch.stack([transport_cost(*row, link="logistic", beta=1.0) for row in rows])
    torch.testing.assert_close(value, expected, **CLOSE)


def test_references_are_subtracted_from_their_side():
    u, v, *_ = sample(6, 4)
    shifted, _ = sorted_transport((u + 3)[None], torch.full((1, 6), 3.0), (v - 1)[None], torch.full((1, 4), -1.0))
    torch.testing.assert_close(shifted, sorted_transport(u[None], v=v[None])[0], **CLOSE)


@pytest.mark.parametrize("weights", ["of one side", "of both", "labels"])
def test_a_side_without_weight_gives_zero_and_no_gradient(weights):
    u, v, *_ = sample(4, 3)
    u, v = u[None].requires_grad_(), v[None].requires_grad_()
    nothing = torch.zeros(1, 4)
    if weights == "labels":
        value, statistics = sorted_transport(u, desirable=nothing.bool())
    else:
        v_weights = torch.zeros(1, 3) if weights == "of both" else None
        value, statistics = sorted_transport(u, v=v, u_weights=nothing, v_weights=v_weights)
    assert not value.any()
    assert not statistics.any()
    assert not torch.autograd.grad(value.sum(), u)[0].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_shapes_do_not_depend_on_the_data(weighted):
    """It compiles as a whole, and no host waits for a device."""
    torch._dynamo.reset()
    compiled = torch.compile(sorted_transport, fullgraph=True, backend="aot_eager")
    u, _, a, _ = sample(9, 1, weighted)
    a = None if a is None else a[None]
    for desirable in (u > 0, u > 1):
        expected = sorted_transport(u[None], desirable=desirable[None], u_weights=a)
        for got, wanted in zip(compiled(u[None], desirable=desirable[None], u_weights=a), expected, strict=True):
            torch.testing.assert_close(got, wanted)
