"""The public `sinkhorn_sort` on the CPU: what it is, what it keeps, its limits, its gradient and its memory."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck

import robustloss
from robustloss import sinkhorn_sort
from robustloss.naive import sinkhorn_sort as naive
from robustloss.ops._library import HAS_EXTENSION

STRENGTHS = [1e-5, 1e-3, 1e-2, 0.1, 1.0, 1e3]
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def samples(n: int) -> dict[str, torch.Tensor]:
    """Rows of every kind, of standard deviation 1: even, heavy-tailed, in clusters, with ties, with an outlier."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    rows = {
        "normal": normal,
        "heavy": torch.tan(math.pi * (uniform - 0.5)),
        "clusters": 0.01 * normal + (uniform < 0.3),
        "ties": (4 * uniform).floor(),
        "outlier": torch.where(torch.arange(n) == n // 2, 1e3, normal),
    }
    return {name: row / row.std(correction=0) for name, row in rows.items()}


def naive_with_gradient(values, upstream, strength):
    ascending, order = values.double().sort(-1)
    result, f, g, _ = naive.sort_ascending(ascending, strength, 60, 1e-10)
    gradient = naive.sort_ascending_bwd(upstream.double(), ascending, f, g, strength, 1e-10)
    return result, torch.zeros_like(gradient).scatter(-1, order, gradient)


@pytest.mark.skipif(not HAS_EXTENSION, reason="robustloss was installed without its C++ extension")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_values_and_gradients_are_the_naive_ones(dtype, strength):
    for n in (2, 5, 97):
        values = torch.stack(list(samples(n).values())).to(dtype).requires_grad_()
        upstream = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected, gradient = naive_with_gradient(values.detach(), upstream, strength)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = sinkhorn_sort(values, strength=strength)
        actual.backward(upstream)
        assert actual.dtype == values.grad.dtype == dtype
        limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(actual.double(), expected, **limits)
        # Both solve a system whose condition number is about 1 / strength.
        limits = {"rtol": 10 * TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
        torch.testing.assert_close(values.grad.double(), gradient, **limits)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_floating_dtype_is_computed_in_float32_or_better(dtype):
    values = torch.stack(list(samples(33).values())).to(dtype).requires_grad_()
    upstream = torch.linspace(-1, 1, 33).expand(5, -1)
    expected, gradient = naive_with_gradient(values.detach(), upstream, 0.1)
    actual = sinkhorn_sort(values, strength=0.1)
    actual.backward(upstream.to(dtype))
    assert actual.dtype == values.grad.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(values.grad.double(), gradient, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 3.0])
def test_gradcheck_of_the_whole_function(strength, descending):
    torch.manual_seed(0)
    values = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def function(x):
        return sinkhorn_sort(x, strength=strength, descending=descending, tolerance=1e-13, max_iterations=60)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1e-13 is beyond what strength 1e-3 can always show
        assert gradcheck(function, values, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_result_is_monotone_within_range_and_keeps_the_sum(strength):
    for dtype in (torch.float64, torch.float32):
        for row in samples(200).values():
            values = row.to(dtype)
            result = sinkhorn_sort(values, strength=strength)
            assert (result.diff() >= -1e-6 * values.abs().max()).all()
            assert result.min() >= values.min() - 1e-6
            assert result.max() <= values.max() * (1 + 1e-6)
            assert abs(result.sum() - values.sum()) <= 200 * TOLERANCE[dtype]


@pytest.mark.parametrize(("scale", "shift"), [(3.0, -5.0), (1e-20, 0.0), (1e20, 1e20), (1e-3, 10.0)])
def test_affine_maps_pass_through(scale, shift):
    values = samples(50)["normal"]
    expected = scale * sinkhorn_sort(values, strength=0.1) + shift
    torch.testing.assert_close(
        sinkhorn_sort(scale * values + shift, strength=0.1), expected, rtol=1e-9, atol=1e-9 * scale
    )
    turned = sinkhorn_sort(shift - scale * values, strength=0.1, descending=True)
    torch.testing.assert_close(turned, 2 * shift - expected, rtol=1e-9, atol=1e-9 * scale)


def test_permutations_change_nothing_and_permute_the_gradient():
    values = samples(40)["normal"].requires_grad_()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    upstream = torch.linspace(-1, 2, 40, dtype=torch.float64)
    results = [sinkhorn_sort(x, strength=0.1) for x in (values, values[order])]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(result @ upstream, values)[0] for result in results]
    assert torch.equal(*gradients)


def test_descending_is_ascending_turned_round():
    values = samples(40)["heavy"]
    assert torch.equal(sinkhorn_sort(values, descending=True), sinkhorn_sort(values).flip(-1))


def test_limits_of_the_strength_are_the_hard_sort_and_the_mean():
    values = torch.tensor([3.0, 1.0, 2.0, 7.0, 5.0])
    torch.testing.assert_close(sinkhorn_sort(values, strength=1e-5), values.sort().values)
    torch.testing.assert_close(sinkhorn_sort(values, strength=1e6), values.mean().expand(5), rtol=1e-5, atol=1e-5)


def test_the_gradient_at_a_small_strength_is_that_of_the_hard_sort():
    values = torch.tensor([3.0, 1.0, 2.0, 7.0, 5.0], requires_grad=True)
    sinkhorn_sort(values, strength=1e-5).backward(torch.arange(5.0))
    torch.testing.assert_close(values.grad, torch.tensor([2.0, 0.0, 1.0, 4.0, 3.0]))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
@pytest.mark.parametrize("strength", [1e-5, 1.0, 1e3])
def test_a_constant_row_stays_and_its_gradient_is_the_mean(value, strength):
    values = torch.full((7,), value, requires_grad=True)
    result = sinkhorn_sort(values, strength=strength)
    assert torch.equal(result, values)
    result.backward(torch.arange(7.0))
    torch.testing.assert_close(values.grad, torch.full((7,), 3.0))


def test_tied_values_have_equal_gradients():
    values = torch.tensor([2.0, 1.0, 2.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    sinkhorn_sort(values, strength=0.1).backward(torch.tensor([1.0, -2.0, 0.5, 4.0, 3.0]).double())
    torch.testing.assert_close(values.grad[[0, 1]], values.grad[[2, 4]])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1,), (2, 1), (2, 3, 4), (5, 1, 2, 9)])
def test_leading_dimensions_and_rows_of_no_and_one_value(shape):
    values = torch.randn(shape, requires_grad=True)
    result = sinkhorn_sort(values, strength=0.1)
    assert result.shape == shape
    result.sum().backward()
    torch.testing.assert_close(values.grad, torch.ones(shape))  # the sum is kept
    if shape[-1] == 1:
        assert torch.equal(result, values)
    for row, sorted_row in zip(
        values.reshape(-1, max(shape[-1], 1)), result.reshape(-1, max(shape[-1], 1)), strict=True
    ):
        torch.testing.assert_close(sinkhorn_sort(row, strength=0.1), sorted_row)


def test_any_strides():
    values = torch.randn(30, 4)
    torch.testing.assert_close(sinkhorn_sort(values.T), sinkhorn_sort(values.T.contiguous()))


def test_a_row_split_over_threads_gives_the_same_bits():
    values = samples(300)["normal"].float()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            x = values.clone().requires_grad_()
            result = sinkhorn_sort(x, strength=0.1)
            result.square().sum().backward()
            results.append((result, x.grad))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_too_few_iterations_warn_once_for_each_place():
    values = samples(64)["normal"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            sinkhorn_sort(values, strength=0.1, max_iterations=1)
        sinkhorn_sort(values, strength=0.1, max_iterations=1)
        sinkhorn_sort(values, strength=0.1)
    assert [w.category for w in caught] == [UserWarning] * 2
    assert all(w.filename == __file__ for w in caught)
    message = str(caught[0].message)
    assert "strength 0.1" in message
    assert "in 1 iterations" in message
    assert "wanted 1.0e-09" in message


def test_what_is_kept_for_the_backward_does_not_grow_with_the_iterations():
    values = samples(64)["normal"].float().requires_grad_()

    def kept(**options):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x.numel()) or x, lambda x: x):
            sinkhorn_sort(values, strength=0.1, **options)
        return sum(tensors)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kept(max_iterations=1) == kept(max_iterations=30, tolerance=1e-12) <= 5 * 64


def test_a_second_derivative_is_refused():
    values = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(sinkhorn_sort(values).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_graph_breaks(dynamic):
    compiled = torch.compile(
        lambda x: sinkhorn_sort(x, strength=0.1, descending=True), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for shape in ((3, 8), (2, 5)):
        values = torch.randn(shape, requires_grad=True)
        results = [
            function(values) for function in (compiled, lambda x: sinkhorn_sort(x, strength=0.1, descending=True))
        ]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(result.square().sum(), values)[0] for result in results]
        torch.testing.assert_close(*gradients)


def test_the_ops_agree_with_their_fakes():
    values = torch.randn(3, 6).sort(-1).values.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.robustloss.sinkhorn_sort, (values, 0.1, 30, 1e-6), test_utils=tests)
    _, f, g, _ = torch.ops.robustloss.sinkhorn_sort(values.detach(), 0.1, 30, 1e-6)
    arguments = (torch.randn(3, 6), values.detach(), f, g, 0.1, 1e-6)
    torch.library.opcheck(
        torch.ops.robustloss.sinkhorn_sort_bwd, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "values must be a torch.Tensor"),
        (torch.arange(3), {}, TypeError, "values must have dtype"),
        (torch.tensor(1.0), {}, ValueError, "without dimensions"),
        (torch.tensor([1.0, math.nan]), {}, ValueError, "non-finite"),
        (torch.tensor([1.0, math.inf]), {}, ValueError, "non-finite"),
        (torch.ones(2), {"strength": 0.0}, ValueError, "strength must be > 0"),
        (torch.ones(2), {"max_iterations": 0}, ValueError, "max_iterations must be a positive integer"),
        (torch.ones(2), {"tolerance": -1.0}, ValueError, "tolerance must be > 0"),
    ],
)
def test_what_is_refused(values, options, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_sort(values, **options)


def test_it_is_public():
    assert robustloss.sinkhorn_sort is sinkhorn_sort
    assert "sinkhorn_sort" in robustloss.__all__
