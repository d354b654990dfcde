"""The C++ half of the op `token_logps` against naive/: dtypes, layouts, instruction sets, values that break sums."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import robustloss.ops  # noqa: F401  (registers the op)
from robustloss.naive.token_logps import soft_cap, token_entropy, token_logps, token_mean_logit, token_top1
from robustloss.ops._library import HAS_EXTENSION

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="robustloss was installed without its C++ extension")

OP = torch.ops.robustloss
IGNORE = -100
# Against a float64 oracle that sees the same rounded logits: log-probabilities and statistics, and the gradient, which
# is of the dtype: in half precision within two roundings.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-6, 2**-8),
    torch.float16: (1e-6, 2**-10),
}


def sample(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64, scale: float = 3.0, ignored: float = 0.3):
    generator = torch.Generator().manual_seed(math.prod(shape))
    B, T, V = shape
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < ignored] = IGNORE
    return logits, labels


def forward(logits, labels, ignore_index, temperature, softcap=None):
    """logps, lse and entropy."""
    logps, lse, statistics = OP.token_logps(logits, labels, ignore_index, temperature, softcap, 1)
    return logps, lse, statistics[0]


def oracle(logits: torch.Tensor, labels: torch.Tensor, grad_logps: torch.Tensor, temperature: float, softcap=None):
    """Log-probabilities, statistics and the gradient of <grad_logps, logps> in float64."""
    exact = logits.detach().double().requires_grad_()
    capped = soft_cap(exact, softcap)
    logps = token_logps(capped, labels, temperature=temperature)
    (grad,) = torch.autograd.grad(logps, exact, grad_logps.double())
    capped = capped.detach()
    statistics = [
        token_entropy(capped, labels, temperature=temperature),
        token_top1(exact.detach(), labels),
        token_mean_logit(capped, labels),
    ]
    return logps.detach(), torch.stack(statistics), grad


def assert_agrees_with_naive(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, softcap: float | None = None
) -> None:
    rtol, grad_rtol = TOLERANCES[logits.dtype]
    # A soft-capped logit is a float: it is known to units in the last place of the cap.
    atol = rtol * max(1.0, 0.2 * (softcap or 0.0) / temperature)
    logps, lse, statistics = OP.token_logps(logits, labels, IGNORE, temperature, softcap, 3)
    assert logps.dtype == lse.dtype == statistics.dtype
    assert logps.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    grad_logps = torch.linspace(-2, 2, labels.numel(), dtype=logps.dtype).view(labels.shape)
    options = (IGNORE, temperature, softcap)
    grad = OP.token_logps_bwd(grad_logps, logits, labels, lse, *options)
    assert grad.dtype == logits.dtype
    assert grad.is_contiguous()

    exact_logps, exact_statistics, exact_grad = oracle(logits, labels, grad_logps, temperature, softcap)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=rtol, atol=atol)
    torch.testing.assert_close(statistics.double(), exact_statistics, rtol=rtol, atol=atol)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=grad_rtol, atol=atol)

    # Fewer statistics change nothing, and the first is the same.
    for n_statistics in (0, 1):
        fewer = OP.token_logps(logits, labels, *options, n_statistics)
        torch.testing.assert_close(fewer[0], logps, rtol=rtol, atol=atol)
        torch.testing.assert_close(fewer[2], statistics[:n_statistics], rtol=rtol, atol=atol)

    overwritten = logits.clone()  # keeps the strides of a permuted tensor
    OP.token_logps_bwd_out(grad_logps, overwritten, labels, lse, *options, 0, overwritten)
    assert torch.equal(overwritten, grad)

    # Tiles of the vocabulary, into poisoned memory: a label outside of its tile has no target there.
    poisoned = torch.full_like(grad, math.nan)
    for start in range(0, logits.shape[-1], 700):
        tile = slice(start, start + 700)
        OP.token_logps_bwd_out(grad_logps, logits[..., tile], labels, lse, *options, start, poisoned[..., tile])
    torch.testing.assert_close(poisoned, grad, rtol=grad_rtol, atol=rtol)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
# One logit; around the vector widths 4 to 32; around one block; several blocks with a ragged end.
@pytest.mark.parametrize("V", [1, 7, 16, 33, 1023, 1024, 1025, 5003])
def test_values_and_gradients_are_those_of_naive(V, temperature, dtype):
    assert_agrees_with_naive(*sample((2, 5, V), dtype), temperature)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("softcap", [1.5, 30.0])
@pytest.mark.parametrize("V", [1, 33, 1025, 2051])
def test_soft_capped_values_and_gradients_are_those_of_naive(V, softcap, dtype):
    logits, labels = sample((2, 5, V), dtype)
    assert_agrees_with_naive(logits, labels, 0.7, softcap)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(temperature, dtype):
    logits, labels = sample((2, 5, 1500), dtype)
    rtol, grad_rtol = TOLERANCES[dtype]
    logps, lse, entropy = forward(logits, labels, IGNORE, temperature)
    grad_logps = torch.full_like(logps, temperature)  # so that the gradient is of the order of 1
    exact_logps, exact_statistics, exact_grad = oracle(logits, labels, grad_logps, temperature)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=rtol, atol=rtol)
    torch.testing.assert_close(entropy.double(), exact_statistics[0], rtol=rtol, atol=rtol)
    grad = OP.token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, temperature, None)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=grad_rtol, atol=rtol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_long_rows_keep_the_digits_of_their_sum(temperature):
    logits, labels = sample((1, 8, 151_936), torch.float32, ignored=0)
    labels = logits.argmax(-1)  # whose log-probability is nearest to 0, so that the sum's error shows most
    logps, lse, statistics = OP.token_logps(logits, labels, IGNORE, temperature, None, 3)
    exact_logps, exact_statistics, exact_grad = oracle(logits, labels, torch.ones(1, 8), temperature)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.double(), exact_statistics, rtol=2e-6, atol=1e-7)
    grad = OP.token_logps_bwd(torch.ones(1, 8), logits, labels, lse, IGNORE, temperature, None)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_log_sum_exp_is_the_largest_logit_and_a_log_sum_relative_to_it(dtype):
    logits, labels = sample((2, 5, 3001), dtype)
    _, lse, _ = forward(logits, labels, IGNORE, 0.5)
    exact = 2 * logits.double()
    largest = exact.amax(-1)
    log_sum = (exact - largest.unsqueeze(-1)).logsumexp(-1)
    wanted = torch.where(labels != IGNORE, torch.stack([largest, log_sum]), 0.0)
    assert torch.equal(lse[0].double(), wanted[0])
    torch.testing.assert_close(lse[1].double(), wanted[1], rtol=TOLERANCES[dtype][0], atol=TOLERANCES[dtype][0])


@pytest.mark.parametrize("ascending", [True, False])
def test_the_maximum_may_come_in_any_block(ascending):
    logits, labels = sample((1, 4, 4500), torch.float32)
    assert_agrees_with_naive(logits.sort(-1, descending=not ascending).values, labels)


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5)])
def test_no_rows_give_empty_results(shape):
    assert_agrees_with_naive(*sample(shape, torch.float32))


@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_vocabulary_of_one_has_probability_one_and_no_gradient(dtype, softcap):
    logits, labels = sample((20, 3, 1), dtype, scale=30.0, ignored=0)
    logps, lse, statistics = OP.token_logps(logits, labels, IGNORE, 1e-3, softcap, 3)
    assert torch.equal(logps, torch.zeros_like(logps))
    assert torch.equal(statistics[0], torch.zeros_like(logps))
    assert torch.equal(statistics[1], torch.ones_like(logps))
    grad = OP.token_logps_bwd(torch.ones_like(logps), logits, labels, lse, IGNORE, 1e-3, softcap)
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_one_token(softcap):
    assert_agrees_with_naive(*sample((1, 1, 1025), torch.float32, ignored=0), softcap=softcap)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4, -1e4])
def test_equal_logits_are_the_uniform_distribution(value, dtype):
    V = 3001
    logps, _, entropy = forward(torch.full((1, 2, V), value, dtype=dtype), torch.tensor([[0, V - 1]]), IGNORE, 1.0)
    torch.testing.assert_close(logps, torch.full_like(logps, -math.log(V)), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.full_like(logps, math.log(V)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e5, -1e5])
def test_logits_far_from_zero_keep_their_digits(offset, temperature):
    logits, labels = sample((2, 6, 3001), torch.float32, ignored=0)
    logits += offset
    logps, lse, entropy = forward(logits, labels, IGNORE, temperature)
    exact_logps, exact_statistics, exact_grad = oracle(logits, labels, torch.ones(2, 6), temperature)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), exact_statistics[0], rtol=1e-6, atol=0)
    # In one float32, the log-sum-exp alone would be off by up to 4e-3 at 1e5, and every probability with it.
    grad = OP.token_logps_bwd(torch.ones(2, 6), logits, labels, lse, IGNORE, temperature, None)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("scale", [1e4, 1e5])
def test_logits_of_great_spread_keep_their_digits(scale):
    logits, labels = sample((2, 6, 3001), torch.float32, scale=scale)
    logps, lse, _ = forward(logits, labels, IGNORE, 1.0)
    exact_logps, _, exact_grad = oracle(logits, labels, torch.ones(2, 6), 1.0)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=1e-6, atol=1e-6)
    grad = OP.token_logps_bwd(torch.ones(2, 6), logits, labels, lse, IGNORE, 1.0, None)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_near_the_soft_cap_the_gradient_keeps_its_digits(dtype):
    # 1 - tanh^2 would have none left at 8 caps, where it is 5e-7.
    logits = torch.linspace(-12, 12, 1001, dtype=torch.float64).to(dtype).view(1, 1, -1)
    labels = torch.tensor([[500]])
    _, lse, _ = forward(logits, labels, IGNORE, 1.0, 1.5)
    grad = OP.token_logps_bwd(torch.ones(1, 1, dtype=lse.dtype), logits, labels, lse, IGNORE, 1.0, 1.5)
    exact = logits.double()
    slope = 1 / torch.cosh(exact / 1.5).square()
    target = torch.nn.functional.one_hot(labels, 1001)
    exact_grad = (target - (1.5 * torch.tanh(exact / 1.5)).softmax(-1)) * slope
    torch.testing.assert_close(grad.double(), exact_grad, rtol=TOLERANCES[dtype][1], atol=0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_under_a_soft_cap_infinity_is_the_cap(value, dtype):
    logits, labels = sample((1, 2, 3000), dtype, ignored=0)
    labels[:] = 17
    logits[..., [0, 1500, 2999]] = math.copysign(6e4, value)
    wanted = OP.token_logps(logits, labels, IGNORE, 1.0, 5.0, 3)
    logits[..., [0, 1500, 2999]] = value
    outputs = OP.token_logps(logits, labels, IGNORE, 1.0, 5.0, 3)
    assert all(map(torch.equal, outputs, wanted))
    grad = OP.token_logps_bwd(torch.ones_like(wanted[0]), logits, labels, wanted[1], IGNORE, 1.0, 5.0)
    assert not grad[..., [0, 1500, 2999]].any()
    assert grad.isfinite().all()


def test_every_largest_logit_is_a_top1_hit_and_no_other():
    logits = torch.tensor([[[200.0, 300.0, 300.0, 1.0]] * 4])
    labels = torch.arange(4).view(1, 4)
    for softcap in (None, 5.0):  # which rounds the first three to one number
        _, _, statistics = OP.token_logps(logits, labels, IGNORE, 1.0, softcap, 3)
        assert statistics[1].tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_logits_at_the_ends_of_float32_do_not_overflow():
    logits = torch.zeros(1, 2, 3000)
    logits[0, 0, :2000], logits[0, 0, -1] = -3e38, 3e38
    logits[0, 1, 0], logits[0, 1, 1:] = 3e38, -3e38
    labels = torch.tensor([[2999, 0]])
    logps, _, entropy = forward(logits, labels, IGNORE, 1.0)
    assert torch.equal(logps, torch.zeros(1, 2))
    assert torch.equal(entropy, torch.zeros(1, 2))


def test_tokens_of_logit_minus_infinity_cannot_occur():
    logits, labels = sample((2, 4, 3000), torch.float32, ignored=0)
    logits[:, :, 100:2900] = -math.inf  # whole blocks of them
    labels[labels >= 100] = 2950
    labels[0, 0] = 500
    logps, lse, entropy = forward(logits, labels, IGNORE, 1.0)
    assert logps[0, 0] == -math.inf
    assert entropy.isfinite().all()
    assert (OP.token_logps(logits, labels, IGNORE, 1.0, None, 3)[2][2] == -math.inf).all()
    grad = OP.token_logps_bwd(torch.ones(2, 4), logits, labels, lse, IGNORE, 1.0, None)
    assert torch.equal(grad[1, :, 100:2900], torch.zeros(4, 2800))
    logits, labels = logits[1:], labels[1:]
    assert_agrees_with_naive(logits, labels)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1500, 2999])
def test_nan_or_plus_infinity_spoils_its_row_and_no_other(where, bad, dtype):
    logits, labels = sample((1, 3, 3000), dtype, ignored=0)
    logits[0, 1, where] = bad
    for softcap in (None, 5.0) if math.isnan(bad) else (None,):
        logps, lse, (entropy, top1, mean) = OP.token_logps(logits, labels, IGNORE, 1.0, softcap, 3)
        grad = OP.token_logps_bwd(torch.ones_like(logps), logits, labels, lse, IGNORE, 1.0, softcap)
        assert top1[0, 1] == 0
        for tensor in (logps, *lse, entropy, mean, grad):
            assert tensor[0, 1].isnan().all()
            assert tensor[0, [0, 2]].isfinite().all()


def test_a_row_of_minus_infinity_is_nan_as_in_torch():
    logits, labels = torch.full((1, 1, 2000), -math.inf), torch.tensor([[3]])
    logps, lse, _ = forward(logits, labels, IGNORE, 1.0)
    assert logps.isnan().all()
    assert lse.flatten().tolist() == [-math.inf, -math.inf]
    assert OP.token_logps_bwd(torch.ones(1, 1), logits, labels, lse, IGNORE, 1.0, None).isnan().all()


def test_the_target_is_subtracted_before_rounding_to_bfloat16():
    # Here p of the target rounds to 1 in bfloat16, so p - 1 after rounding would be 0.
    logits = torch.tensor([[[9.0, 0.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    labels = torch.tensor([[0]])
    _, lse, _ = forward(logits, labels, IGNORE, 1.0)
    grad = OP.token_logps_bwd(torch.ones(1, 1), logits, labels, lse, IGNORE, 1.0, None)
    exact = 3 * math.exp(-9) / (1 + 3 * math.exp(-9))
    assert grad[0, 0, 0].item() == pytest.approx(exact, rel=2**-8)


# ---- which rows are read and written --------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ignored", [0.3, 1.0])
def test_ignored_rows_are_neither_read_nor_given_a_gradient(ignored, softcap):
    logits, labels = sample((3, 8, 600), torch.float32, ignored=ignored)
    masked = labels == IGNORE
    logits[masked] = math.nan
    logps, lse, statistics = OP.token_logps(logits, labels, IGNORE, 1.0, softcap, 3)
    grad_logps = torch.where(masked, math.nan, 1.0)
    grad = OP.token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0, softcap)
    OP.token_logps_bwd_out(grad_logps, logits, labels, lse, IGNORE, 1.0, softcap, 0, logits)
    for tensor in (logps, *lse, *statistics, grad, logits):
        assert torch.equal(tensor[masked], torch.zeros_like(tensor[masked]))
        assert tensor.isfinite().all()


def test_every_element_of_the_results_is_written():
    logits, labels = sample((2, 7, 1030), torch.float32)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        outputs = OP.token_logps(logits, labels, IGNORE, 1.0, None, 3)
        grad = OP.token_logps_bwd(torch.ones(2, 7), logits, labels, outputs[1], IGNORE, 1.0, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (*outputs, grad))


def test_ignore_index_may_be_a_token():
    logits, labels = sample((2, 5, 11), ignored=0)
    labels[0, :3] = 4
    logps, _, _ = forward(logits, labels, 4, 1.0)
    torch.testing.assert_close(logps, token_logps(logits, labels, ignore_index=4))
    assert torch.equal(logps[0, :3], torch.zeros(3, dtype=torch.float64))


def test_rows_beyond_two_to_the_31_elements_are_found():
    B, V = 70_000, 32_768
    logits = torch.empty(B, 1, V, dtype=torch.bfloat16)  # 4.6 GB of address space, of which two rows are ever touched
    labels = torch.full((B, 1), IGNORE)
    row, target = sample((1, 1, V), torch.bfloat16, ignored=0)
    logits[-1], labels[-1] = row[0], target[0]
    logits[1], labels[1] = 0, 0
    logps, _, _ = forward(logits, labels, IGNORE, 1.0)
    torch.testing.assert_close(logps[-1:], token_logps(row, target), rtol=1e-5, atol=0)
    assert logps[1].item() == pytest.approx(-math.log(V))
    assert logps.count_nonzero() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere large gradients are ordinary memory")
def test_a_large_gradient_takes_the_memory_that_the_last_one_left():
    logits, labels = sample((1, 40, 40_000), torch.float32)
    _, lse, _ = forward(logits, labels, IGNORE, 1.0)

    def gradient(factor):
        return OP.token_logps_bwd(torch.full((1, 40), factor), logits, labels, lse, IGNORE, 1.0, None)

    first = gradient(1.0)
    kept, address = first.clone(), first.data_ptr()
    second = gradient(2.0)
    assert second.data_ptr() != address  # while it is held, it is nobody else's
    assert torch.equal(first, kept)
    del first
    again = gradient(1.0)
    assert again.data_ptr() == address
    assert torch.equal(again, kept)
    torch.testing.assert_close(second, 2 * kept)
    del again
    # A much smaller or larger one gets memory of its own.
    small = OP.token_logps_bwd(
        torch.ones(1, 12), logits[:, :12], labels[:, :12].contiguous(), lse[:, :, :12], IGNORE, 1.0, None
    )
    assert small.data_ptr() != address
    torch.testing.assert_close(small, kept[:, :12])


# ---- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "sliced in T": lambda x: x[:, :-1],
    "sliced in B and T": lambda x: x[::2, 1:],
    "batch and time exchanged": lambda x: x.transpose(0, 1),
    "one sequence expanded over the batch": lambda x: x[:1].expand(4, -1, -1),
    "sliced vocabulary": lambda x: x[:, :, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_any_strides_over_batch_and_time(layout, dtype):
    logits = LAYOUTS[layout](sample((3, 6, 300), dtype)[0])
    assert not logits.is_contiguous()
    assert_agrees_with_naive(logits, sample((*logits.shape[:2], 290))[1])


def test_in_place_backward_writes_through_the_strides_and_nowhere_else():
    base, labels = sample((3, 6, 300), torch.float32)
    logits, labels = base[:, :-1], labels[:, :-1].contiguous()
    last = base[:, -1].clone()
    _, lse, _ = forward(logits, labels, IGNORE, 1.0)
    grad = OP.token_logps_bwd(torch.ones(3, 5), logits, labels, lse, IGNORE, 1.0, None)
    OP.token_logps_bwd_out(torch.ones(3, 5), logits, labels, lse, IGNORE, 1.0, None, 0, logits)
    assert torch.equal(base[:, :-1], grad)
    assert torch.equal(base[:, -1], last)


def test_in_place_backward_refuses_logits_that_share_memory():
    logits, labels = sample((1, 3, 8), torch.float32, ignored=0)
    logits, labels = logits.expand(2, -1, -1), labels.repeat(2, 1)
    with pytest.raises(RuntimeError, match="single memory location"):
        OP.token_logps_bwd_out(torch.ones(2, 3), logits, labels, torch.zeros(2, 2, 3), IGNORE, 1.0, None, 0, logits)


def test_in_place_backward_refuses_a_gradient_that_runs_into_the_logits():
    logits, labels = sample((1, 4, 8), torch.float32, ignored=0)
    lse = torch.zeros(2, 1, 3)
    with pytest.raises(RuntimeError, match="single memory location"):
        OP.token_logps_bwd_out(
            torch.ones(1, 3), logits[:, :3], labels[:, :3].contiguous(), lse, IGNORE, 1.0, None, 0, logits[:, 1:]
        )


GRADIENTS = {
    "of a sum": lambda values: values[0, 0].expand(3, 6),
    "of sums over the tokens": lambda values: values[:, :1].expand(3, 6),
    "of sums over the batch": lambda values: values[:1].expand(3, 6),
    "transposed": lambda values: values.t().contiguous().t(),
    "every other": lambda values: values.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", GRADIENTS)
def test_the_incoming_gradient_may_have_any_strides(layout):
    logits, labels = sample((3, 6, 50), torch.float32)
    _, lse, _ = forward(logits, labels, IGNORE, 1.0)
    strided = GRADIENTS[layout](torch.linspace(1, 2, 18).view(3, 6))
    assert not strided.is_contiguous()
    grads = [
        OP.token_logps_bwd(grad, logits, labels, lse, IGNORE, 1.0, None) for grad in (strided, strided.contiguous())
    ]
    assert torch.equal(*grads)


def test_logits_with_a_stride_in_the_vocabulary_are_refused():
    logits, labels = sample((2, 3, 8), torch.float32)
    with pytest.raises(ValueError, match="logits must have stride 1 along the vocabulary"):
        forward(logits.transpose(1, 2).contiguous().transpose(1, 2), labels, IGNORE, 1.0)


@pytest.mark.parametrize("label", [50, -1, -101, 2**40])
def test_a_label_outside_the_vocabulary_is_named(label):
    logits, labels = sample((3, 4, 50), torch.float32)
    labels[2, 1] = label
    message = rf"labels\[2, 1\] is {label}, but must be in \[0, 50\)"
    with pytest.raises(ValueError, match=message):
        forward(logits, labels, IGNORE, 1.0)


def test_bad_options_and_results_are_named():
    logits, labels = sample((2, 3, 8), torch.float32)
    for options, message in [
        ((0.0, None, 0), "temperature must be > 0, got 0"),
        ((1.0, -1.0, 0), "softcap must be > 0 or None, got -1"),
        ((1.0, None, 2), "n_statistics must be 0, 1 or 3, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            OP.token_logps(logits, labels, IGNORE, *options)
    ones, lse = torch.ones(2, 3), torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"grad_logps must have shape \[2, 3\], got \[3, 2\]"):
        OP.token_logps_bwd(ones.t(), logits, labels, lse, IGNORE, 1.0, None)
    with pytest.raises(ValueError, match=r"lse must have shape \[2, 2, 3\], got \[2, 3\]"):
        OP.token_logps_bwd(ones, logits, labels, lse[0], IGNORE, 1.0, None)
    for result in (logits.double(), logits[..., :-1], torch.zeros(2, 8, 3).transpose(1, 2)):
        with pytest.raises(ValueError, match=r"grad_logits must be as logits"):
            OP.token_logps_bwd_out(ones, logits, labels, lse, IGNORE, 1.0, None, 0, result)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_and_second_derivatives_are_those_of_finite_differences(temperature, softcap):
    logits, labels = sample((2, 3, 9), scale=1.0)
    assert (labels == IGNORE).any()

    def logps(logits):
        return forward(logits, labels, IGNORE, temperature, softcap)[0]

    assert torch.autograd.gradcheck(logps, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(logps, logits)


# ---- threads and instruction sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_number_of_threads(dtype):
    logits, labels = sample((2, 40, 5003), dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            outputs = OP.token_logps(logits, labels, IGNORE, 0.9, 5.0, 3)
            grad = OP.token_logps_bwd(torch.ones(2, 40), logits, labels, outputs[1], IGNORE, 0.9, 5.0)
            results.append((*outputs, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


INSTRUCTION_SETS = ["DEFAULT", "AVX2", "AVX512"]


@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_every_instruction_set_agrees_with_naive(capability):
    here = torch.backends.cpu.get_cpu_capability()
    if here not in INSTRUCTION_SETS or INSTRUCTION_SETS.index(here) < INSTRUCTION_SETS.index(capability):
        pytest.skip(f"this processor has {here}, not {capability}")
    # The choice is made once a process; this file's own helpers do the comparison there.
    script = f"""
import torch, test_token_logps_cpu as t
assert torch.backends.cpu.get_cpu_capability() == {capability!r}
for dtype in t.TOLERANCES:
    for V in (1, 33, 2051):
        t.assert_agrees_with_naive(*t.sample((2, 5, V), dtype), 0.6)
        t.assert_agrees_with_naive(*t.sample((2, 5, V), dtype), 0.6, 5.0)
    for bad in ("nan", "inf"):
        t.test_nan_or_plus_infinity_spoils_its_row_and_no_other(1500, float(bad), dtype)
    t.test_under_a_soft_cap_infinity_is_the_cap(float("inf"), dtype)
    t.test_extreme_temperatures(1e-3, dtype)
    t.test_a_vocabulary_of_one_has_probability_one_and_no_gradient(dtype, 1.5)
t.test_near_the_soft_cap_the_gradient_keeps_its_digits(torch.float32)
t.test_tokens_of_logit_minus_infinity_cannot_occur()
for temperature in (1.0, 0.7):
    t.test_logits_far_from_zero_keep_their_digits(1e5, temperature)
    t.test_long_rows_keep_the_digits_of_their_sum(temperature)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability.lower(), "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
