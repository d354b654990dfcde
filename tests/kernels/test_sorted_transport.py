"""The Triton kernels of sorted_transport against the quantile coupling in float64 (interpreted without a GPU).

The interpreter sorts slowly: what a program sorts has at most 128 samples here.
"""

from __future__ import annotations

import pytest
import torch

from robustloss.kernels import sorted_transport as kernels
from robustloss.kernels.sorted_transport import sorted_transport
from robustloss.naive.links import LINKS, link_loss
from robustloss.naive.sorted_transport import dominance_violation, sorted_margins

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

SIZES = [(1, 1), (3, 1), (6, 4), (17, 17), (17, 30), (64, 64)]
# Levels that tie, that never do, and runs that span several blocks of cells.
LONG_SIZES = [(1, 50), (33, 33), (45, 30)]


@pytest.fixture
def spread(monkeypatch):
    """Rows so long, next to the limits, that their cells are spread over many programs."""
    monkeypatch.setattr(kernels, "MOST_AT_ONCE", 0)
    monkeypatch.setattr(kernels, "CELL_BLOCK", 16)


@pytest.fixture
def few_cells_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "ROW_CELLS", 16)


def scores(device, *shape, dtype=torch.float32, seed=0):
    """Values with ties, of which some are a zero of either sign."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values[..., ::4] = values[..., ::4].round()
    values[..., ::7] = -0.0
    return values.to(device, dtype)


def masses(device, *shape, seed=0):
    """Weights, a third of which are zero where there are several."""
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) + 0.05
    if shape[-1] > 2:
        weights[..., 1::3] = 0
    return weights.to(device)


def couple(u, v, u_weights=None, v_weights=None, **link):
    """The value, the gradients and the statistics of two samples, in float64."""
    u, v = u.double().requires_grad_(), v.double().requires_grad_()
    if not len(u) or not len(v):
        return [torch.zeros_like(u.sum()).detach(), torch.zeros_like(u), torch.zeros_like(v), u.new_zeros(2)]
    margins, mass = sorted_margins(u, v, u_weights, v_weights)
    losses = link_loss(margins, **link)
    value = losses.mean() if mass is None else (mass * losses).sum()
    gradients = torch.autograd.grad(value, (u, v))
    return [value.detach(), *gradients, torch.stack(dominance_violation(margins.detach(), mass))]


def check(u, v, u_ref=None, v_ref=None, u_weights=None, v_weights=None, link="logistic", beta=0.7, label_smoothing=0.1):
    """Each row, against the formula."""
    outputs = sorted_transport(u, u_ref, v, v_ref, None, u_weights, v_weights, link, beta, label_smoothing)
    is_double = any(x is not None and x.dtype == torch.float64 for x in (u, u_ref, v, v_ref))
    dtype = torch.float64 if is_double else torch.float32
    u = u.to(dtype) if u_ref is None else u.to(dtype) - u_ref.to(dtype)
    v = v.to(dtype) if v_ref is None else v.to(dtype) - v_ref.to(dtype)
    for row in range(len(u)):
        weights = [None if x is None else x[row] for x in (u_weights, v_weights)]
        expected = couple(u[row], v[row], *weights, link=link, beta=beta, label_smoothing=label_smoothing)
        assert_close([x[row] for x in outputs], expected, dtype)
    return outputs


def assert_close(outputs, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(actual.double(), wanted.detach(), rtol=tolerance, atol=atol)


WEIGHTED = pytest.mark.parametrize(
    ("u_weighted", "v_weighted"), [(False, False), (True, False), (False, True), (True, True)]
)


def check_sizes(device, n, m, u_weighted, v_weighted, dtype=torch.float32):
    u_weights = masses(device, 2, n) if u_weighted else None
    v_weights = masses(device, 2, m, seed=1) if v_weighted else None
    u, v = scores(device, 2, n, dtype=dtype), scores(device, 2, m, dtype=dtype, seed=1)
    check(u, v, 0.5 * u.round(), None, u_weights, v_weights)


@WEIGHTED
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_any_two_samples(device, few_cells_at_a_time, n, m, u_weighted, v_weighted):
    check_sizes(device, n, m, u_weighted, v_weighted)


@WEIGHTED
@pytest.mark.parametrize(("n", "m"), LONG_SIZES)
def test_any_two_long_samples(device, spread, n, m, u_weighted, v_weighted):
    check_sizes(device, n, m, u_weighted, v_weighted)


@WEIGHTED
@pytest.mark.parametrize(("n", "m"), SIZES[:-3])
def test_float64_is_computed_in_float64(device, n, m, u_weighted, v_weighted):
    check_sizes(device, n, m, u_weighted, v_weighted, torch.float64)


@pytest.mark.parametrize("m", [30, 17])
@pytest.mark.parametrize("link", LINKS)
def test_every_link(device, link, m):
    check(scores(device, 1, 30), scores(device, 1, m, seed=1), link=link)


def check_desirable(device, n, desirable, weighted, dtype):
    """One sample in two parts is two samples."""
    u, u_ref = scores(device, 3, n, dtype=dtype), scores(device, 3, n, seed=2)
    weights = masses(device, 3, n) if weighted else None
    outputs = sorted_transport(u, u_ref, None, None, desirable, weights, None, "least_squares", 0.3, 0.0)
    assert outputs[2].shape == (0,)
    differences = u.to(dtype) - u_ref.to(dtype)
    for row in range(3):
        present = torch.ones_like(desirable[row]) if weights is None else weights[row] > 0
        sides = [present & desirable[row], present & ~desirable[row]]
        samples = [differences[row][side] for side in sides]
        masses_of = [None if weights is None else weights[row][side] for side in sides]
        value, *gradients, statistics = couple(*samples, *masses_of, link="least_squares", beta=0.3)
        expected = torch.zeros(n, dtype=torch.float64, device=device)
        for side, gradient in zip(sides, gradients, strict=True):
            expected[side] = gradient
        actual = [outputs[0][row], outputs[1][row], outputs[3][row]]
        assert_close(actual, [value, expected, statistics], dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_desirable_entries_against_the_others(device, n, weighted):
    desirable = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < 0.6
    desirable[1] = torch.arange(n) % 2 == 0  # as many, or one more
    desirable[2] = n % 2 == 0  # all, or none
    check_desirable(device, n, desirable.to(device), weighted, torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_desirable_entries_of_a_long_row(device, spread, dtype, weighted):
    desirable = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    desirable[2] = True
    check_desirable(device, 40, desirable.to(device), weighted, dtype)


@pytest.mark.parametrize("long", [False, True])
def test_ties_are_broken_by_the_lower_index(device, request, long):
    if long:
        request.getfixturevalue("spread")
    u = torch.tensor([[1.0, 0.0, 1.0, -0.0]], device=device)
    v = torch.tensor([[0.0, 5.0, 1.0, 3.0]], device=device)
    _, u_gradient, v_gradient, _ = sorted_transport(u, None, v, None, None, None, None, "least_squares", 0.0, 0.0)
    # u in order 1, 3, 0, 2 against v in order 0, 2, 3, 1.
    assert u_gradient.tolist() == [[-1.0, 0.0, -2.0, -0.5]]
    assert v_gradient.tolist() == [[0.0, 2.0, 0.5, 1.0]]


@pytest.mark.parametrize("long", [False, True])
def test_a_sample_of_weight_zero_is_absent_whatever_its_value(device, request, long):
    if long:
        request.getfixturevalue("spread")
    u, v, weights = scores(device, 1, 20), scores(device, 1, 13), masses(device, 1, 20)
    extreme = u.clone()
    extreme[:, 1::6], extreme[:, 4::6] = 1e30, -1e30
    rest = (None, v, None, None, weights, None, "least_squares", 0.3, 0.0)
    pairs = zip(sorted_transport(u, *rest), sorted_transport(extreme, *rest), strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in pairs)


@pytest.mark.parametrize("long", [False, True])
def test_weights_that_are_all_zero_leave_nothing_to_couple(device, request, long):
    if long:
        request.getfixturevalue("spread")
    u, v = scores(device, 2, 20), scores(device, 2, 13)
    weights = masses(device, 2, 20)
    weights[0] = 0
    outputs = sorted_transport(u, None, v, None, None, weights, None, "ipo", 0.3, 0.0)
    assert all((x[0] == 0).all() for x in outputs)
    assert_close([x[1] for x in outputs], couple(u[1], v[1], weights[1], link="ipo", beta=0.3), torch.float32)


@pytest.mark.parametrize(("rows", "n", "m"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_an_empty_side_is_worth_nothing(device, rows, n, m):
    u, v = torch.ones(rows, n, device=device), torch.ones(rows, m, device=device)
    outputs = sorted_transport(u, None, v, None, None, None, None, "ipo", 0.3, 0.0)
    assert [x.shape for x in outputs] == [(rows,), (rows, n), (rows, m), (rows, 2)]
    assert all((x == 0).all() for x in outputs)


def test_inputs_of_any_dtypes_and_strides(device):
    u, v = scores(device, 20, 3).T.bfloat16(), scores(device, 3, 26)[:, ::2].half()
    check(u, v, scores(device, 3, 20, seed=3), None, masses(device, 3, 40)[:, ::2].double(), None)


def test_large_scores_keep_their_differences(device):
    u, v = scores(device, 1, 17) + 1e4, scores(device, 1, 30) + 1e4
    check(u, v, link="least_squares", beta=0.0)


@pytest.mark.parametrize("long", [False, True])
def test_vectors_are_one_row(device, request, long):
    if long:
        request.getfixturevalue("spread")
    u, v, desirable = scores(device, 9), scores(device, 6, seed=1), scores(device, 9, seed=2) > 0
    for given in ((u, None, v, None, None, masses(device, 9), None), (u, None, None, None, desirable, None, None)):
        rows = sorted_transport(*(x if x is None else x[None] for x in given), "logistic", 0.5, 0.0)
        for of_vector, of_row in zip(sorted_transport(*given, "logistic", 0.5, 0.0), rows, strict=True):
            expected = of_row[0] if len(of_row) else of_row
            assert of_vector.shape == expected.shape
            assert torch.equal(of_vector, expected)


@pytest.mark.parametrize(("n", "m"), [(33, 33), (60, 40)])
def test_one_launch_and_many_programs_agree(device, monkeypatch, n, m):
    u, v = scores(device, 2, n), scores(device, 2, m)
    rest = (None, v, None, None, None, None, "logistic", 0.7, 0.0)
    one = sorted_transport(u, *rest)
    monkeypatch.setattr(kernels, "MOST_AT_ONCE", 0)
    monkeypatch.setattr(kernels, "CELL_BLOCK", 16)
    for actual, expected in zip(sorted_transport(u, *rest), one, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("link", LINKS)
def test_a_sample_that_is_not_a_number_makes_the_loss_none(device, link):
    """Nothing looks at the inputs on a GPU, so the value has to tell."""
    u, v = scores(device, 5), scores(device, 5, seed=1)
    u[2] = torch.nan
    value, *_ = sorted_transport(u, None, v, None, None, None, None, link, 0.7, 0.0)
    assert value.isnan()
