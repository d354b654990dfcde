"""The Triton kernels of sinkhorn_sort against the naive op, all stages in one program and launch by launch."""

from __future__ import annotations

import pytest
import torch

from robustloss.kernels.sinkhorn_sort import in_one_program, sinkhorn_sort, sinkhorn_sort_bwd
from robustloss.naive import sinkhorn_sort as naive

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def sample(device, n, dtype):
    """Sorted rows: scattered, constant, with ties."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, n, generator=generator, dtype=torch.float64)
    rows[1] = 0.1
    rows[2] = (2 * rows[2]).floor()
    upstream = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return rows.to(device, dtype).sort(-1).values, upstream.to(device, dtype)


def check(device, n, dtype, strength):
    values, upstream = sample(device, n, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    actual, f, g, error = sinkhorn_sort(values, strength, 12, tolerance, one_program=True)
    gradient = sinkhorn_sort_bwd(upstream, values, f, g, strength, tolerance, one_program=True)
    assert (error <= tolerance).all()
    assert actual.dtype == gradient.dtype == dtype
    exact = values.double()
    expected, *potentials, _ = naive.sort_ascending(exact, strength, 30, 1e-12)
    expected_gradient = naive.sort_ascending_bwd(upstream.double(), exact, *potentials, strength, 1e-12)
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(actual.double(), expected, **limits)
    torch.testing.assert_close(gradient.double(), expected_gradient, **limits)
    assert torch.equal(actual[1], values[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strength", [1e-3, 0.1, 100.0])
def test_values_and_gradients_are_the_naive_ones(device, dtype, strength):
    check(device, 7, dtype, strength)


@pytest.mark.parametrize("n", [1, 2, 17, 66])
def test_any_length_in_one_program(device, n):
    check(device, n, torch.float32, 0.03)


def test_launches_give_the_bits_of_one_program(device):
    values, upstream = sample(device, 18, torch.float32)
    results = []
    for one_program in (True, False):
        forward = sinkhorn_sort(values, 0.1, 7, 1e-6, one_program=one_program)
        _, f, g, _ = forward
        results.append([*forward, sinkhorn_sort_bwd(upstream, values, f, g, 0.1, 1e-6, one_program=one_program)])
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("one_program", [True, False])
def test_too_few_iterations_are_told_by_the_error(device, one_program):
    values, _ = sample(device, 9, torch.float32)
    _, _, _, error = sinkhorn_sort(values, 0.1, 1, 1e-6, one_program=one_program)
    assert error[0] > 1e-6
    assert error[1] <= 1e-6  # the constant row needs none


@pytest.mark.parametrize("one_program", [True, False])
def test_a_nan_ends_and_stays_in_its_row(device, one_program):
    values, upstream = sample(device, 6, torch.float32)
    values[0, -1] = float("nan")  # as a sort leaves it
    actual, f, g, _ = sinkhorn_sort(values, 0.1, 4, 1e-6, one_program=one_program)
    gradient = sinkhorn_sort_bwd(upstream, values, f, g, 0.1, 1e-6, one_program=one_program)
    for output in (actual, gradient):
        assert output[0].isnan().all()
        assert output[1:].isfinite().all()


def test_short_problems_take_one_program():
    assert in_one_program(1024, True, 32)
    assert not in_one_program(1025, False, 32)
    assert in_one_program(512, False, 64)
    assert not in_one_program(512, True, 64)


def test_no_rows_and_empty_rows(device):
    for shape in ((0, 3), (2, 0)):
        values = torch.zeros(shape, device=device)
        actual, f, g, error = sinkhorn_sort(values, 0.1, 10, 1e-6)
        assert actual.shape == f.shape == g.shape == shape
        assert error.tolist() == [0.0] * shape[0]
        assert sinkhorn_sort_bwd(values, values, f, g, 0.1, 1e-6).shape == shape
