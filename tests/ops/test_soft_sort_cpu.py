"""The ops `soft_sort` and `soft_rank` on CPU against naive/, certificates of optimality, and the public functions."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss import functional
from robustloss.naive import soft_sort as naive
from robustloss.naive.soft_sort import REGULARIZATIONS
from robustloss.ops import soft_sort as ops
from robustloss.ops._library import HAS_EXTENSION

OP = torch.ops.robustloss
STRENGTHS = [1e-4, 0.1, 1.0, 30.0, 1e4]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ["soft_sort", "soft_rank"]
each_name = pytest.mark.parametrize("name", NAMES)
each_regularization = pytest.mark.parametrize("regularization", REGULARIZATIONS)
both_directions = pytest.mark.parametrize("descending", [False, True])
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason="robustloss was installed without its C++ extension")


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# ---- the forward --------------------------------------------------------------------------------------------------


@needs_extension
@each_name
@each_regularization
@both_directions
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_naive_projection(name, regularization, descending, strength):
    for shape in ((7, 2), (5, 33), (1, 700)):
        for values in (sample(*shape), 30 * sample(*shape, seed=1), (3 * sample(*shape)).round()):
            expected = getattr(naive, name)(values, descending, regularization, strength)
            actual = getattr(OP, name)(values, descending, regularization, strength)
            close(actual[0], expected[0], rtol=1e-11, atol=1e-11)
            assert torch.equal(actual[1], expected[1])
            assert torch.equal(actual[2], expected[2])


@needs_extension
@each_name
@each_regularization
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_once_to_the_dtype_of_the_values(name, regularization, dtype):
    for descending, strength in ((False, 0.5), (True, 8.0)):
        values = sample(3, 100, dtype=dtype)
        result, order, block_start = getattr(OP, name)(values, descending, regularization, strength)
        exact, *layout = getattr(OP, name)(values.double(), descending, regularization, strength)
        assert result.dtype == dtype
        assert order.dtype == block_start.dtype == torch.int32
        assert torch.equal(order, layout[0])
        assert torch.equal(block_start, layout[1])
        # float32 first, then 16 bits: half a unit in the last place and a little.
        close(result, exact, rtol=0.51 * torch.finfo(dtype).eps if dtype != torch.float64 else 0, atol=0)


@needs_extension
@each_regularization
@both_directions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_nothing_pools_the_hard_sort_to_the_bit(regularization, descending, dtype):
    values = sample(4, 200, dtype=dtype)
    values[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    result, order, block_start = OP.soft_sort(values, descending, regularization, 1e-3)
    hard = values.sort(descending=descending, stable=True)
    bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(result.view(bits), hard.values.view(bits))
    assert torch.equal(order.long(), hard.indices)
    assert (block_start == torch.arange(200)).all()


@needs_extension
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_float32_rows_of_a_million_are_exact_to_a_hundred_thousandth(strength):
    """An l2 projection s of z on the permutahedron of w carries its certificate, which knows nothing of pooling.

    All ascending: z - s is constant on each block and falls from one to the next, and on each block s is majorised by
    w: the sums of its heads are at least w's, the whole equal.
    """
    n = 2**20
    values = sample(1, n, dtype=torch.float32)
    u, ranks = values[0].double().sort(stable=True).values, torch.arange(1.0, n + 1, dtype=torch.float64)
    for name in NAMES:
        op = getattr(OP, name)
        exact, order, block_start = op(values.double(), False, "l2", strength)
        z, w, s = (ranks / strength, u, exact[0]) if name == "soft_sort" else (u / strength, ranks, exact[0][order[0]])
        start = block_start[0].long()
        within = start[1:] == start[:-1]
        step, rounding = z.diff() - s.diff(), 1e-15 * (z.abs().max() + s.abs().max())
        assert (step[within].abs() <= rounding).all()
        assert (step[~within] >= -rounding).all()
        heads = (s - w).cumsum(0)
        heads = heads - torch.where(start > 0, heads[start - 1], 0.0)
        rounding = 1e-11 * (s - w).abs().sum() + 1e-15 * w.abs().max()
        assert (heads >= -rounding).all()
        assert (heads[torch.cat([~within, torch.tensor([True])])].abs() <= rounding).all()
        close(op(values, False, "l2", strength)[0], exact, rtol=1e-6, atol=0)
        exact_kl = op(values.double(), False, "kl", strength)[0]
        close(op(values, False, "kl", strength)[0], exact_kl, rtol=1e-6, atol=0)
        log_sum = -(-exact_kl).logsumexp(-1) if name == "soft_sort" else exact_kl.sum(-1)
        whole = -(-values.double()).logsumexp(-1) if name == "soft_sort" else torch.tensor([n * (n + 1) / 2])
        close(log_sum, whole, rtol=1e-11)


@needs_extension
@both_directions
def test_huge_tiny_and_tied_values(descending):
    sign = -1.0 if descending else 1.0
    ties = sign * torch.tensor([[1e30, -1e30, 1e30, 1e30, -1e30]])
    for strength in (1e-4, 1.0, 1e4):
        for regularization in REGULARIZATIONS:
            ranks, _, _ = OP.soft_rank(ties, descending, regularization, strength)
            close(ranks, torch.tensor([[4.0, 1.5, 4.0, 4.0, 1.5]]), rtol=1e-6)
    result, _, _ = OP.soft_sort(ties, descending, "l2", 1.0)  # two gaps of 0 about one of 2e30
    close(result, torch.full((1, 5), 2e29 * sign), rtol=1e-6)
    result, _, _ = OP.soft_sort(ties, descending, "kl", 1.0)  # a log-sum-exp over a spread of 2e30
    close(result, torch.full((1, 5), -1e30 * sign), rtol=1e-6)
    tiny = torch.tensor([[3e-38, 1e-38, 2e-38]])
    assert torch.equal(OP.soft_sort(tiny, descending, "l2", 1.0)[0], tiny.sort(descending=descending).values)
    close(OP.soft_rank(tiny, descending, "kl", 1.0)[0], torch.full((1, 3), 2.0), rtol=1e-6)
    wide = 1e4 * sample(1, 500)
    for name in NAMES:
        for strength in (1e-4, 1.0, 1e4):
            values = wide.clone().requires_grad_()
            result, _, _ = getattr(OP, name)(values, descending, "kl", strength)
            (gradient,) = torch.autograd.grad(result.sum(), values)
            assert result.isfinite().all()
            close(gradient.sum(), torch.tensor(500.0 if name == "soft_sort" else 0.0), atol=1e-8)


@needs_extension
@each_name
@each_regularization
def test_every_row_by_itself_whatever_the_threads(name, regularization):
    values = sample(50, 300, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs.append(getattr(OP, name)(values, False, regularization, 10.0))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*outputs, strict=True):
        assert torch.equal(one, two)
    for row in (0, 31, 49):
        alone = getattr(OP, name)(values[row : row + 1], False, regularization, 10.0)
        for whole, part in zip(outputs[0], alone, strict=True):
            assert torch.equal(whole[row : row + 1], part)


# ---- derivatives --------------------------------------------------------------------------------------------------


@each_name
@each_regularization
@both_directions
@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_first_and_second_derivatives(name, regularization, descending, strength):
    values = sample(2, 8).requires_grad_()
    assert (getattr(OP, name)(values, descending, regularization, 5.0)[2] != torch.arange(8)).any()

    def function(values):
        return getattr(OP, name)(values, descending, regularization, strength)[0]

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@each_name
def test_the_third_derivative(name):
    values = sample(1, 5).requires_grad_()

    def curvature(values):
        result = getattr(OP, name)(values, False, "kl", 3.0)[0]
        (first,) = torch.autograd.grad((result * sample(1, 5, seed=1)).sum(), values, create_graph=True)
        (second,) = torch.autograd.grad((first * first).sum(), values, create_graph=True)
        return second

    assert curvature(values).any()
    assert torch.autograd.gradcheck(curvature, values)


@needs_extension
@each_regularization
@both_directions
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_naive_projection(regularization, descending, strength, dtype):
    values, gradient = sample(3, 400, dtype=dtype), sample(3, 400, seed=1, dtype=dtype)
    for name in NAMES:
        exact = values.double().requires_grad_()
        expected = torch.autograd.grad(
            getattr(naive, name)(exact, descending, regularization, strength)[0], exact, gradient.double()
        )[0]
        given = values.clone().requires_grad_()
        result = getattr(OP, name)(given, descending, regularization, strength)[0]
        (actual,) = torch.autograd.grad(result, given, gradient)
        assert actual.dtype == dtype
        scale = expected.abs().max().item()
        eps, tiny = max(torch.finfo(dtype).eps, 1e-12), torch.finfo(dtype).smallest_normal
        if scale < torch.finfo(dtype).max:  # a slope of 1e4 is beyond float16
            close(actual, expected, rtol=2 * eps, atol=1e-3 * eps * scale + 1e-3 * tiny)
        _, order, block_start = getattr(OP, name)(values, descending, regularization, strength)
        rest = (values if regularization == "kl" else None, order, block_start, descending)
        fallback = (
            ops._naive_sort_bwd(gradient, *rest)
            if name == "soft_sort"
            else ops._naive_rank_bwd(gradient, *rest, strength)
        )
        assert fallback.dtype == dtype
        if dtype in (torch.float64, torch.float32):
            close(fallback, actual, rtol=0, atol=100 * eps * scale)


@each_name
def test_a_gradient_of_any_strides(name):
    values = sample(4, 30).requires_grad_()
    weights = sample(30, 4, seed=1).T
    for regularization in REGULARIZATIONS:
        result = getattr(OP, name)(values, False, regularization, 4.0)[0]
        (strided,) = torch.autograd.grad(result, values, weights, retain_graph=True)
        (dense,) = torch.autograd.grad(result, values, weights.contiguous(), retain_graph=True)
        assert torch.equal(strided, dense)
        (ones,) = torch.autograd.grad(result, values, torch.ones_like(result), retain_graph=True)
        assert torch.equal(torch.autograd.grad(result.sum(), values)[0], ones)


def test_the_values_may_be_overwritten_where_l2_does_not_need_them():
    for name in NAMES:
        leaf = sample(2, 9).requires_grad_()
        (expected,) = torch.autograd.grad(getattr(OP, name)(leaf * 1, False, "l2", 3.0)[0][:, 3].sum(), leaf)
        values = leaf * 1
        result = getattr(OP, name)(values, False, "l2", 3.0)[0]
        values.zero_()
        assert expected.any()
        # The zeros' own gradient is none, but the backward of the op does not raise.
        torch.autograd.grad(result[:, 3].sum(), leaf)


def test_block_sum_is_its_own_adjoint():
    block_start = torch.tensor([[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 4, 5]], dtype=torch.int32)
    values, weights = sample(2, 6).requires_grad_(), sample(2, 6, seed=1)
    close(OP.block_sum(values, block_start), naive.block_sum(values, block_start))
    close((OP.block_sum(values, block_start) * weights).sum(), (values * OP.block_sum(weights, block_start)).sum())
    assert torch.autograd.gradcheck(lambda x: OP.block_sum(x, block_start), values)
    assert torch.autograd.gradgradcheck(lambda x: OP.block_sum(x, block_start), values)


# ---- the public functions -----------------------------------------------------------------------------------------


@each_name
def test_shapes(name):
    function = getattr(functional, name)
    values = sample(2, 3, 20)
    expected = function(values.view(6, 20), strength=3.0).view(2, 3, 20)
    assert torch.equal(function(values, strength=3.0), expected)
    assert torch.equal(function(values[1, 2], strength=3.0), expected[1, 2])
    assert torch.equal(function(values.transpose(0, 1), strength=3.0), expected.transpose(0, 1))
    columns = values[0].T.contiguous().T
    assert torch.equal(function(columns, strength=3.0), expected[0])
    assert torch.equal(function(values[..., ::2].contiguous(), strength=3.0), function(values[..., ::2], strength=3.0))
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 3)):
        for regularization in REGULARIZATIONS:
            empty = torch.zeros(shape, requires_grad=True)
            result = function(empty, regularization=regularization)
            assert result.shape == shape
            assert torch.autograd.grad(result.sum(), empty)[0].shape == shape
    one = torch.tensor([5.0], requires_grad=True)
    assert function(one).tolist() == [5.0 if name == "soft_sort" else 1.0]
    assert torch.autograd.grad(function(one).sum(), one)[0].item() == (1.0 if name == "soft_sort" else 0.0)


def test_directions():
    values = torch.tensor([3.0, 1.0, 2.0])
    assert functional.soft_sort(values, strength=0.1).tolist() == [1.0, 2.0, 3.0]
    assert functional.soft_sort(values, descending=True, strength=0.1).tolist() == [3.0, 2.0, 1.0]
    assert functional.soft_rank(values, strength=0.1).tolist() == [3.0, 1.0, 2.0]
    assert functional.soft_rank(values, descending=True, strength=0.1).tolist() == [1.0, 3.0, 2.0]


@each_name
@each_regularization
def test_under_torch_compile(name, regularization):
    function = getattr(functional, name)

    def gradient(values):
        return torch.autograd.grad(function(values, regularization=regularization, strength=2.0)[..., 1].sum(), values)

    def forward(values):
        return function(3 * values, descending=True, regularization=regularization, strength=2.0) * 2

    values = sample(2, 3, 9, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(values), forward(values)
    assert torch.equal(actual, expected)
    weights = sample(2, 3, 9, seed=1, dtype=torch.float32)
    (actual,), (expected,) = (torch.autograd.grad(result, values, weights) for result in (actual, expected))
    assert torch.equal(actual, expected)
    assert gradient(values)[0].any()


@each_name
def test_the_registration_of_the_ops(name):
    values = sample(2, 6).requires_grad_()
    op, backward = getattr(OP, name).default, getattr(OP, f"{name}_bwd").default
    strength = (3.0,) if name == "soft_rank" else ()
    for regularization in REGULARIZATIONS:
        torch.library.opcheck(op, (values, False, regularization, 3.0))
        _, order, block_start = op(values.detach(), False, regularization, 3.0)
        given = values if regularization == "kl" else None
        gradient = sample(2, 6, seed=1).requires_grad_()
        torch.library.opcheck(backward, (gradient, given, order, block_start, False, *strength))


@each_name
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, bad):
    for index in (0, 7, 63):
        for dtype in DTYPES:
            for sign in (1.0, -1.0):
                values = sample(3, 64, dtype=dtype)
                values[1, index] = math.copysign(bad, sign) if math.isnan(bad) else bad
                with pytest.raises(ValueError, match="values"):
                    getattr(functional, name)(values)


@each_name
def test_bad_arguments(name):
    function, values = getattr(functional, name), torch.zeros(3)
    with pytest.raises(TypeError, match=r"values must be a torch.Tensor, got list"):
        function([1.0])
    with pytest.raises(TypeError, match=r"values must have dtype .*, got int64"):
        function(torch.arange(3))
    with pytest.raises(ValueError, match=r"values must be .*, got a scalar"):
        function(torch.tensor(1.0))
    with pytest.raises(ValueError, match="regularization must be one of 'l2', 'kl', got 'l1'"):
        function(values, regularization="l1")
    for strength in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="strength must be"):
            function(values, strength=strength)
    with pytest.raises(TypeError, match="strength must be a number, got str"):
        function(values, strength="auto")
