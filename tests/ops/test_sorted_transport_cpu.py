"""The C++ half of the op `sorted_transport`, and the public function on it, against the naive version and POT."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch

import robustloss
from robustloss.naive import sorted_transport as naive
from robustloss.naive.links import LINKS
from robustloss.ops._library import HAS_EXTENSION
from robustloss.ops.sorted_transport import _naive, sorted_transport

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="robustloss was installed without its C++ extension")

SIZES = [*itertools.product((0, 1, 2, 7, 64), repeat=2), (100, 33), (5000, 3001), (3001, 5000), (9000, 9000), (1, 9000)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
R = 2


def weights_of(values: torch.Tensor, weighted: bool) -> torch.Tensor | None:
    return torch.rand_like(values) * (torch.rand_like(values) > 0.3) if weighted else None


def two_samples(n: int, m: int, *, weighted: bool = False, refs: bool = True) -> list[torch.Tensor | None]:
    """The op's seven tensors in the form u against v."""
    torch.manual_seed(100 * n + m)
    u, u_ref = torch.randn(2, R, n, dtype=torch.float64)
    v, v_ref = 0.5 + 2 * torch.randn(2, R, m, dtype=torch.float64)
    weights = weights_of(u, weighted), weights_of(v, weighted)
    return [u, u_ref if refs else None, v, v_ref if refs else None, None, *weights]


def labelled(n: int, m: int, *, weighted: bool = False, refs: bool = True) -> list[torch.Tensor | None]:
    """The same samples in one row, n of them desirable, shuffled."""
    torch.manual_seed(100 * n + m)
    u, u_ref = torch.randn(2, R, n + m, dtype=torch.float64)
    desirable = torch.rand(R, n + m).argsort(-1) < n
    return [u, u_ref if refs else None, None, None, desirable, weights_of(u, weighted), None]


def run(tensors, link="logistic", beta=0.3, label_smoothing=0.0):
    return sorted_transport(*tensors, link, beta, label_smoothing)


def naive_results(tensors, link="logistic", beta=0.3, label_smoothing=0.0):
    """Value, gradients and statistics of the naive version, in float64."""
    u, u_ref, v, v_ref, *others = (
        x.detach().double() if x is not None and x.is_floating_point() else x for x in tensors
    )
    samples = [x.requires_grad_() for x in (u, v) if x is not None]
    value, statistics = naive.sorted_transport(
        u, u_ref, v, v_ref, *others, link=link, beta=beta, label_smoothing=label_smoothing
    )
    gradients = list(torch.autograd.grad(value.sum(), samples))
    return [value.detach(), *gradients, *([] if v is not None else [value.new_empty(0)]), statistics]


def assert_close(actual, expected, tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", [two_samples, labelled])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_value_gradients_and_violations_are_the_naive_ones(n, m, form, weighted):
    for link, dtype, refs in (("logistic", torch.float64, True), ("least_squares", torch.float32, False)):
        tensors = form(n, m, weighted=weighted, refs=refs)
        tensors = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]
        results = run(tensors, link)
        assert all(x.dtype == dtype for x in results)
        assert_close(results, naive_results(tensors, link), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("form", [two_samples, labelled])
@pytest.mark.parametrize("link", LINKS)
def test_every_link(link, form):
    for (n, m), weighted in itertools.product(((64, 64), (100, 33)), (False, True)):
        tensors = form(n, m, weighted=weighted)
        smoothings = (0.0, 0.2) if link in ("logistic", "robust") else (0.0,)
        for beta, label_smoothing in itertools.product((0.1, 1.7), smoothings):
            options = (link, beta, label_smoothing)
            assert_close(run(tensors, *options), naive_results(tensors, *options), 1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("link", ["least_squares", "squared_hinge"])
def test_long_samples_match_pots_wasserstein_distance(link, weighted):
    """With an offset of zero and v above u, both links are the squared distance."""
    torch.manual_seed(0)
    n, m = 100_000, 70_001
    u, v = torch.randn(n, dtype=torch.float64), 2 * torch.randn(m, dtype=torch.float64)
    if link == "squared_hinge":
        v = v - v.min() + u.max()
    weights = [weights_of(x, weighted) for x in (u, v)]
    masses = [None if w is None else (w / w.sum()).numpy() for w in weights]
    expected = ot.wasserstein_1d(u.numpy(), v.numpy(), *masses, p=2).item()
    value = robustloss.sorted_transport(u, v, u_weights=weights[0], v_weights=weights[1], link=link, beta=0.0)
    assert value.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 64, 4096, 4097, 20_000])
def test_equal_sizes_are_the_mean_over_the_sorted_margins_to_the_bit(n, dtype):
    """Sorted beforehand or not, in one row or as two labelled classes, the sum is the same sum."""
    torch.manual_seed(n)
    u, v = (3 * torch.randn(2, 1, n)).to(dtype)
    shuffled = run([u, None, v, None, None, None, None])[0]
    in_order = run([u.sort(-1).values, None, v.sort(-1).values, None, None, None, None])[0]
    assert torch.equal(shuffled, in_order)
    order = torch.randperm(2 * n)
    both, desirable = torch.cat([u, v], -1)[:, order], (torch.arange(2 * n) < n)[None, order]
    assert torch.equal(run([both, None, None, None, desirable, None, None])[0], in_order)
    if hasattr(torch.ops.robustloss, "preference_loss"):
        margins = (u.sort(-1).values.double() - v.sort(-1).values.double())[0]
        mean = torch.ops.robustloss.preference_loss(
            margins, None, None, None, None, "logistic", 0.3, 0.0, "mean", 0.0, math.inf
        )[0]
        assert torch.equal(mean.to(shuffled.dtype), shuffled[0])


@pytest.mark.parametrize("dtypes", itertools.product(DTYPES, repeat=2), ids=str)
def test_mixed_dtypes_are_taken_exactly(dtypes):
    u, u_ref, v, v_ref, *_ = two_samples(64, 33)
    tensors = [u.to(dtypes[0]), u_ref.to(dtypes[1]), v.to(dtypes[1]), v_ref.to(dtypes[0]), None, None, None]
    results = run(tensors)
    wide = torch.float64 in dtypes
    assert results[0].dtype == (torch.float64 if wide else torch.float32)
    assert_close(results, naive_results(tensors), 1e-12 if wide else 1e-5)


def test_strides_do_not_matter():
    tensors = labelled(40, 30, weighted=True)
    expected = run(tensors)
    strided = [None if x is None else torch.stack([x, x], -1).transpose(0, 1)[..., 0].transpose(0, 1) for x in tensors]
    assert not strided[0].is_contiguous()
    for got, wanted in zip(run(strided), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", [two_samples, labelled])
def test_rows_are_problems_of_their_own(form, weighted):
    tensors = form(64, 33, weighted=weighted)
    together = run(tensors)
    for row in range(R):
        alone = run([None if x is None else x[row : row + 1] for x in tensors])
        for got, wanted in zip(alone, together, strict=True):
            assert torch.equal(got[0], wanted[row]) if wanted.numel() else got.numel() == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_bits_whatever_the_number_of_threads(weighted):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([*run(two_samples(9000, 7001, weighted=weighted)), *run(labelled(9000, 9000))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_every_output_is_written():
    """Deterministic mode fills memory that nothing wrote to with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for form, weighted in itertools.product((two_samples, labelled), (False, True)):
            for n, m in ((0, 3), (7, 7), (5000, 3001)):
                assert all(x.isfinite().all() for x in run(form(n, m, weighted=weighted)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_ties_are_broken_by_position():
    """Of equal samples, -0 and 0 among them, the first gets the lowest quantile."""
    u = torch.tensor([[1.0, 0.0, 1.0, -0.0, 1.0]])
    v = torch.tensor([[0.5, -3.0, 2.0, 9.0, 0.1]])
    _, u_gradient, _, _ = run([u, None, v, None, None, None, None], "least_squares", 0.0)
    order = torch.tensor([1, 3, 0, 2, 4])
    expected = torch.empty_like(u)
    expected[0, order] = 2 / 5 * (u[0, order] - v[0].sort().values)
    torch.testing.assert_close(u_gradient, expected)


def test_a_permutation_of_the_samples_permutes_the_gradient():
    u, _, v, _, _, u_weights, v_weights = two_samples(100, 33, weighted=True)
    value, u_gradient, v_gradient, statistics = run([u, None, v, None, None, u_weights, v_weights])
    p, q = torch.randperm(100), torch.randperm(33)
    shuffled = run([u[:, p], None, v[:, q], None, None, u_weights[:, p], v_weights[:, q]])
    for got, wanted in zip(shuffled, (value, u_gradient[:, p], v_gradient[:, q], statistics), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 20)])
def test_the_two_forms_agree(n, m):
    u, u_ref, _, _, desirable, weights, _ = labelled(n, m, weighted=True)
    for row, w in itertools.product(range(R), (None, weights)):
        side, other = desirable[row], ~desirable[row]
        pick = lambda x, of: None if x is None else x[row, of][None]  # noqa: B023, E731
        sides = [pick(u, side), pick(u_ref, side), pick(u, other), pick(u_ref, other)]
        value, u_gradient, v_gradient, statistics = run([*sides, None, pick(w, side), pick(w, other)])
        whole = run([u, u_ref, None, None, desirable, w, None])
        assert torch.equal(whole[0][row : row + 1], value)
        assert torch.equal(whole[1][row, side], u_gradient[0])
        assert torch.equal(whole[1][row, other], v_gradient[0])
        assert torch.equal(whole[3][row : row + 1], statistics)


@pytest.mark.parametrize("form", [two_samples, labelled])
def test_a_side_of_no_weight_is_empty(form):
    tensors = form(7, 5, weighted=True)
    empty = tensors[4] if form is labelled else torch.ones_like(tensors[0], dtype=torch.bool)
    tensors[5] = torch.where(empty, 0.0, tensors[5])
    for result in run(tensors):
        assert not result.any()
    assert_close(run(tensors), naive_results(tensors), 0)


def test_equal_samples_have_no_violation():
    u = torch.randn(1, 4000)
    _, _, _, statistics = run([u, None, u[:, torch.randperm(4000)], None, None, None, None])
    assert not statistics.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", [two_samples, labelled])
def test_both_derivatives_match_finite_differences(form, weighted):
    *tensors, desirable, u_weights, v_weights = form(5, 3, weighted=weighted)
    samples = [x.requires_grad_() for x in tensors if x is not None]

    def value(*samples):
        return run([*(*samples, None, None)[:4], desirable, u_weights, v_weights], beta=1.3)[0]

    assert torch.autograd.gradcheck(value, samples)
    assert torch.autograd.gradgradcheck(value, samples)


def test_second_derivatives_of_a_sample_against_a_function_of_itself():
    u = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda u: robustloss.sorted_transport(u, u.sin() - 2, beta=1.3), u)
    once = torch.autograd.grad(run([u, None, u, None, None, None, None])[0], u, create_graph=True)[0]
    torch.testing.assert_close(once, torch.zeros_like(u))  # u cannot move away from itself


def test_gradients_scale_with_the_upstream_one_and_have_the_samples_dtypes():
    u, _, v, *_ = two_samples(9, 4)
    u, v = u.bfloat16().requires_grad_(), v.requires_grad_()
    value, u_gradient, v_gradient, _ = run([u, None, v, None, None, None, None])
    upstream = torch.tensor([2.0, -3.0], dtype=torch.float64)
    grad_u, grad_v = torch.autograd.grad(value, (u, v), upstream)
    assert grad_u.dtype == torch.bfloat16
    torch.testing.assert_close(grad_u, (upstream[:, None] * u_gradient).bfloat16())
    assert torch.equal(grad_v, upstream[:, None] * v_gradient)


def test_references_have_minus_the_samples_gradients_and_weights_none():
    u, u_ref, v, v_ref, _, *weights = (
        None if x is None else x.requires_grad_() for x in two_samples(5, 4, weighted=True)
    )
    value = run([u, u_ref, v, v_ref, None, *weights])[0].sum()
    grads = torch.autograd.grad(value, [u, u_ref, v, v_ref, *weights], allow_unused=True)
    assert torch.equal(grads[1], -grads[0])
    assert torch.equal(grads[3], -grads[2])
    assert grads[4] is grads[5] is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", [two_samples, labelled])
def test_vectors_are_one_row(form, weighted):
    tensors = form(64, 33, weighted=weighted)
    row, rows = ([None if x is None else x[1].expand(*shape, -1) for x in tensors] for shape in ((), (1,)))
    for entry in (run, lambda tensors: _naive(*tensors, "logistic", 0.3, 0.0)):
        for got, wanted in zip(entry(row), entry(rows), strict=True):
            assert torch.equal(got, wanted[0] if wanted.numel() else wanted)
    assert all(
        x.shape == y.shape
        for x, y in zip(run(row), run([None if x is None else x.to("meta") for x in row]), strict=True)
    )


@pytest.mark.parametrize("form", [two_samples, labelled])
def test_the_op_follows_torchs_rules(form):
    tensors = [x.requires_grad_() if i in (0, 2) and x is not None else x for i, x in enumerate(form(7, 5))]
    torch.library.opcheck(sorted_transport, (*tensors, "logistic", 0.3, 0.0))


def test_it_compiles_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(robustloss.sorted_transport, fullgraph=True, backend="aot_eager")
    for n, m in ((7, 5), (9, 9), (6, 4)):  # from the second on, with symbolic sizes
        u, v = (torch.randn(3, size, requires_grad=True) for size in (n, m))
        expected, value = robustloss.sorted_transport(u, v), compiled(u, v)
        assert torch.equal(value, expected)
        for got, wanted in zip(
            torch.autograd.grad(value.sum(), (u, v)), torch.autograd.grad(expected.sum(), (u, v)), strict=True
        ):
            assert torch.equal(got, wanted)


def test_leading_dimensions_are_kept():
    u, v = torch.randn(2, 3, 7), torch.randn(2, 3, 4)
    value = robustloss.sorted_transport(u, v)
    assert value.shape == (2, 3)
    assert torch.equal(value[1, 2], robustloss.sorted_transport(u[1, 2], v[1, 2]))
    assert robustloss.sorted_transport(torch.ones(3, 0), torch.ones(3, 2)).tolist() == [0, 0, 0]
    assert robustloss.sorted_transport(torch.ones(0, 4), torch.ones(0, 2)).shape == (0,)


U, V = torch.zeros(2, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"u": [1.0]}, TypeError, r"u must be a torch.Tensor, got list"),
        ({"v": V.long()}, TypeError, r"v must have dtype float32, .*got int64"),
        ({"u": torch.tensor(1.0)}, ValueError, r"u must be \[..., n\] .*got \(\)"),
        (
            {"v": torch.zeros(3, 3)},
            ValueError,
            r"v must be \[..., n\] with u's leading dimensions \(2,\), got \(3, 3\)",
        ),
        ({"v": V.to("meta")}, ValueError, r"v is on meta but u is on cpu"),
        ({"u_weights": V}, ValueError, r"u_weights must have shape \(2, 4\) \(u's shape\), got \(2, 3\)"),
        ({"v_weights": V - 1}, ValueError, r"v_weights must be >= 0, got a minimum of -1"),
        ({"u_weights": U + math.nan}, ValueError, r"u_weights holds 8 non-finite value\(s\), .* index \(0, 0\): nan"),
        ({"u": U[0] + math.inf, "v": V[0]}, ValueError, r"u holds 4 non-finite value\(s\), .* index \(0,\): inf"),
        ({"link": "sigmoid"}, ValueError, r"link must be one of 'logistic', .*got 'sigmoid'"),
        ({"beta": 0}, ValueError, r"beta must be > 0, got 0"),
        ({"beta": -1, "link": "least_squares"}, ValueError, r"beta must be >= 0, got -1"),
        ({"label_smoothing": 0.1, "link": "ipo"}, ValueError, r"label_smoothing=0.1 .* not for 'ipo'"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        robustloss.sorted_transport(**({"u": U, "v": V} | arguments))


NAMES = ("u", "u_ref", "v", "v_ref", "desirable", "u_weights", "v_weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v": None}, r"give either v or desirable, got neither"),
        ({"desirable": U > 0}, r"give either v or desirable, got both"),
        ({"v": None, "v_ref": V, "desirable": U > 0}, r"v_ref and v_weights need v"),
        ({"v": None, "desirable": V > 0}, r"desirable must have shape \[2, 4\] \(that of u\), got \[2, 3\]"),
        ({"u_ref": V}, r"u_ref must have shape \[2, 4\] \(that of u\), got \[2, 3\]"),
        ({"v": V[0]}, r"v must have shape \[2, n\], got \[3\]"),
        ({"u": U[0]}, r"v must have shape \[n\], got \[2, 3\]"),
        ({"u": U[None]}, r"u must be \[n\] or \[R, n\], got \[1, 2, 4\]"),
        ({"u": U[0], "v": V[0] - math.inf}, r"v holds 3 non-finite value\(s\), the first at index \(0,\): -inf"),
        ({"v_ref": V + math.nan}, r"v_ref holds 6 non-finite value\(s\), the first at index \(0, 0\): nan; log-prob"),
        ({"u": U.index_fill(1, torch.tensor(3), -math.inf)}, r"u holds 2 non-finite .*at index \(0, 3\): -inf"),
        ({"u_weights": U - 0.5}, r"u_weights must be >= 0, got a minimum of -0.5"),
    ],
)
def test_the_op_names_what_does_not_fit(arguments, message):
    given = dict.fromkeys(NAMES) | {"u": U, "v": V} | arguments
    with pytest.raises(ValueError, match=message):
        run([given[name] for name in NAMES])


def test_the_first_bad_argument_is_named_on_any_number_of_threads():
    u = torch.zeros(1, 50_000)
    u[0, -1] = math.nan
    for tensors in ([u, None, u, None, None, None, None], [u * 0, None, u, None, None, u, None]):
        name = "u" if tensors[0].isnan().any() else "v"
        with pytest.raises(ValueError, match=rf"^{name} holds 1 non-finite value\(s\), .*\(0, 49999\): nan"):
            run(tensors)
