"""The Triton kernels of token_logps against the papers' formula in float64 (interpreted where there is no GPU)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from robustloss.kernels._row import row_tile
from robustloss.kernels.token_logps import token_logps_bwd, token_logps_bwd_out, token_logps_fwd
from robustloss.naive.token_logps import (
    soft_cap,
    statistics_dtype,
    token_entropy,
    token_logps,
    token_mean_logit,
    token_top1,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # The interpreter is NumPy, which warns where infinities and NaN are meant to meet.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

IGNORE = -100
# Shorter than a warp, odd, and, for every dtype, whole blocks with a tail and without one; the last two are aligned.
VOCABULARIES = [1, 7, 129, 5000, 5008, 8192]


def sample(device, shape, dtype=torch.float32, seed=0, scale=3.0):
    """Logits, labels with some of them ignored, and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    *rows, vocabulary = shape
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    grad_logps = torch.randn(rows, generator=generator, dtype=torch.float64).to(statistics_dtype(dtype))
    return logits.to(device), labels.to(device), grad_logps.to(device)


def oracle(logits, labels, grad_logps, temperature=1.0, softcap=None, ignore_index=IGNORE):
    """logps, log-sum-exp, the three statistics and the logits' gradient, in float64."""
    rows = {"ignore_index": ignore_index}
    logits = logits.double().requires_grad_()
    capped = soft_cap(logits, softcap)
    logps = token_logps(capped, labels, temperature=temperature, **rows)
    lse = torch.where(labels != ignore_index, (capped / temperature).logsumexp(-1), 0.0)
    entropy = token_entropy(capped, labels, temperature=temperature, **rows)
    # The cap keeps the order, and rounds what it saturates to ties.
    statistics = [entropy, token_top1(logits, labels, **rows), token_mean_logit(capped, labels, **rows)]
    (grad_logits,) = torch.autograd.grad(logps, logits, grad_logps.double(), retain_graph=True)
    return logps.detach(), lse.detach(), torch.stack(statistics).detach(), grad_logits


def forward_and_backward(logits, labels, grad_logps, temperature=1.0, softcap=None, ignore_index=IGNORE):
    """What the oracle gives, from the kernels."""
    options = (ignore_index, temperature, softcap)
    logps, lse, statistics = token_logps_fwd(logits, labels, *options, 3)
    return logps, lse.sum(0), statistics, token_logps_bwd(grad_logps, logits, labels, lse, *options)


def assert_close(actual, expected, rtol, atol=None):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol if atol is None else atol)


def statistics_tolerance(dtype):
    return 1e-10 if dtype == torch.float64 else 1e-5


def assert_gradient_close(actual, expected):
    """A half-precision gradient is rounded once, by half a unit of its last place: it is the nearest to the exact one.

    The interpreter truncates float32 to bfloat16, an error of up to a whole unit. The absolute tolerance is far below
    1 / V, the size of most elements.
    """
    bfloat16 = 2.0**-8 if actual.device.type == "cuda" else 2.0**-7
    rounding = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: bfloat16, torch.float16: 2.0**-11}
    exact = statistics_tolerance(actual.dtype)
    assert_close(actual, expected, rounding[actual.dtype] + exact, 0.1 * exact)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_forward_and_backward_equal_the_formula(device, vocabulary, dtype, softcap):
    logits, labels, grad_logps = sample(device, (2, 2, vocabulary), dtype)
    labels[0, 0], labels[1, 1] = vocabulary - 1, 0
    logits[1, 1, 0] = 9.0  # a top-1 hit
    outputs = forward_and_backward(logits, labels, grad_logps, 0.7, softcap)
    expected = oracle(logits, labels, grad_logps, 0.7, softcap)
    assert [output.dtype for output in outputs] == [statistics_dtype(dtype)] * 3 + [dtype]
    for actual, wanted in zip(outputs[:3], expected[:3], strict=True):
        assert_close(actual, wanted, statistics_tolerance(dtype))
    assert_gradient_close(outputs[3], expected[3])


def test_the_vocabularies_tested_take_several_blocks_and_a_tail():
    for itemsize in (2, 4, 8):
        for most_loads in (2, 4):
            loads, lanes, vector, _ = row_tile(5000, itemsize, most_loads)
            block = loads * lanes * vector
            assert block < 5000
            assert 5000 % block != 0
            assert 5008 % block != 0
            assert 8192 % block == 0


def test_the_log_sum_exp_is_the_largest_logit_and_the_log_of_a_sum_relative_to_it(device):
    logits, labels, _ = sample(device, (1, 3, 5000))
    labels[0, 1] = IGNORE
    _, lse, _ = token_logps_fwd(logits, labels, IGNORE, 0.5, None, 0)
    largest = 2 * logits.amax(-1)
    wanted = torch.stack([largest, (2 * logits - largest.unsqueeze(-1)).logsumexp(-1)])
    wanted[:, 0, 1] = 0.0
    assert torch.equal(lse[0], wanted[0])
    assert_close(lse[1], wanted[1], 1e-6)


@pytest.mark.parametrize("rows", [(0, 3), (2, 0)])
def test_no_rows_give_empty_tensors(device, rows):
    logits, labels, grad_logps = sample(device, (*rows, 7))
    logps, lse, statistics = token_logps_fwd(logits, labels, IGNORE, 1.0, None, 3)
    assert (logps.shape, lse.shape, statistics.shape) == (rows, (2, *rows), (3, *rows))
    assert token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0, None).shape == (*rows, 7)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("vocabulary", [7, 5000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ignored_rows_are_not_read_and_give_zero(device, vocabulary, ignore_index, softcap):
    logits = torch.full((2, 2, vocabulary), float("nan"), device=device)
    labels = torch.full((2, 2), ignore_index, device=device)
    options = (ignore_index, 1.0, softcap)
    outputs = token_logps_fwd(logits, labels, *options, 3)
    not_a_number = torch.full((2, 2), float("nan"), device=device)
    grad_logits = token_logps_bwd(not_a_number, logits, labels, outputs[1], *options)
    token_logps_bwd_out(not_a_number, logits, labels, outputs[1], *options, 0, logits)
    for zero in (*outputs, grad_logits, logits):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("label", [-1, 5000, 2**40, -(2**40)])
def test_a_label_outside_the_vocabulary_gives_nan_in_its_row_only(device, label):
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    labels[:] = torch.tensor([[4, 4999, IGNORE]])
    expected = oracle(logits, labels, grad_logps)
    labels[0, 1] = label
    logps, lse, statistics = token_logps_fwd(logits, labels, IGNORE, 1.0, None, 3)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0, None)
    for actual in (logps, lse, statistics):
        assert actual[..., 1].isnan().all()
    assert grad_logits[:, 1].isnan().all()
    for actual, wanted in zip((logps, lse.sum(0), statistics), expected[:3], strict=True):
        assert_close(actual[..., ::2], wanted[..., ::2], 1e-5)
    assert_close(grad_logits[:, ::2], expected[3][:, ::2], 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 3000, 4999])
def test_nan_or_infinity_among_the_logits_gives_nan(device, position, value):
    logits, labels, grad_logps = sample(device, (1, 1, 5000))
    labels[:] = 17
    logits[0, 0, position] = value
    logps, lse, statistics, grad_logits = forward_and_backward(logits, labels, grad_logps)
    for actual in (logps, lse, statistics[0], grad_logits):
        assert actual.isnan().all()


@pytest.mark.parametrize("allowed", [slice(0, 3), slice(2500, 2600), slice(4990, 5000)], ids=["head", "middle", "tail"])
def test_logits_of_minus_infinity_are_tokens_that_cannot_occur(device, allowed):
    logits, labels, grad_logps = sample(device, (1, 2, 5000))
    masked = torch.full_like(logits, -float("inf"))
    masked[..., allowed] = logits[..., allowed]
    labels[:] = allowed.start + 1
    logps, lse, statistics, grad_logits = forward_and_backward(masked, labels, grad_logps, 1.3)
    short = oracle(logits[..., allowed], torch.ones_like(labels), grad_logps, 1.3)
    outputs = (logps, lse, statistics[:2], grad_logits[..., allowed])
    for actual, wanted in zip(outputs, (*short[:2], short[2][:2], short[3]), strict=True):
        assert_close(actual, wanted, 1e-5)
    assert torch.equal(statistics[2], torch.full_like(logps, -float("inf")))
    grad_logits[..., allowed] = 0.0
    assert not grad_logits.any()


def test_a_label_that_cannot_occur_has_log_probability_minus_infinity(device):
    logits, labels, grad_logps = sample(device, (1, 1, 129))
    labels[:] = 5
    logits[..., 5] = -float("inf")
    logps, lse, statistics, grad_logits = forward_and_backward(logits, labels, grad_logps)
    assert logps.item() == -float("inf")
    assert math.isfinite(lse.item())
    assert math.isfinite(statistics[0].item())
    assert grad_logits[0, 0, 5] == grad_logps.item()


def test_a_vocabulary_of_minus_infinity_alone_has_no_distribution(device):
    logits = torch.full((1, 1, 5000), -float("inf"), device=device)
    labels = torch.zeros(1, 1, dtype=torch.int64, device=device)
    logps, lse, _ = token_logps_fwd(logits, labels, IGNORE, 1.0, None, 0)
    assert logps.isnan().all()
    assert lse.flatten().tolist() == [-float("inf")] * 2


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_under_a_soft_cap_infinity_is_the_cap(device, value):
    logits, labels, grad_logps = sample(device, (1, 2, 5000))
    labels[:] = 17
    large = logits.clone()
    large[..., [0, 3000, 4999]] = 1e30 if value > 0 else -1e30
    logits[..., [0, 3000, 4999]] = value
    expected = oracle(large, labels, grad_logps, 1.0, 5.0)
    outputs = forward_and_backward(logits, labels, grad_logps, 1.0, 5.0)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_equal_logits_are_the_uniform_distribution_and_every_label_a_hit(device, vocabulary):
    logits = torch.full((1, 2, vocabulary), 2.5, device=device)
    labels = torch.tensor([[0, vocabulary - 1]], device=device)
    logps, lse, statistics = token_logps_fwd(logits, labels, IGNORE, 0.5, None, 3)
    uniform = torch.full_like(logps, math.log(vocabulary))
    assert_close(logps, -uniform, 1e-6)
    assert_close(lse.sum(0), uniform + 5.0, 1e-6)
    assert_close(statistics[0], uniform, 1e-6)
    assert statistics[1].tolist() == [[1.0, 1.0]]
    assert_close(statistics[2], torch.full_like(logps, 2.5), 1e-6)


def test_two_logits_that_a_saturated_cap_cannot_tell_apart_are_no_tie(device):
    logits = torch.tensor([[[200.0, 300.0, 1.0]] * 2], device=device)
    labels = torch.tensor([[0, 1]], device=device)
    _, _, statistics = token_logps_fwd(logits, labels, IGNORE, 1.0, 5.0, 3)
    assert statistics[1].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("softcap", [30.0, 0.5])
def test_the_soft_cap_keeps_the_digits_of_small_and_large_logits(device, softcap):
    """In a vocabulary of one token the largest logit is that token's, soft-capped."""
    ratios = torch.cat([torch.logspace(-8, 2, 51), torch.linspace(0.2, 0.3, 20)])
    ratios = torch.cat([ratios, -ratios, torch.zeros(1)])
    logits = (softcap * ratios).to(device).view(1, -1, 1)
    _, lse, _ = token_logps_fwd(logits, torch.zeros_like(logits[..., 0]).long(), IGNORE, 1.0, softcap, 0)
    exact = softcap * torch.tanh(logits[..., 0].double() / softcap)
    assert_close(lse[0], exact, 1e-6)
    small = (logits[..., 0] / softcap).abs() < 0.25
    assert_close(lse[0][small], exact[small], 3e-7, 1e-30)


@pytest.mark.parametrize("offset", [3e4, -3e4, 1e30, -1e30])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_large_logits_keep_the_digits_of_probabilities(device, offset, temperature):
    """Adding a constant to every logit changes no probability: only the logits' own rounding is lost."""
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    logits = logits + offset
    logps, _, statistics, grad_logits = forward_and_backward(logits, labels, grad_logps, temperature)
    expected = oracle(logits, labels, grad_logps, temperature)
    assert_close(logps, expected[0], 1e-5)
    assert_close(statistics, expected[2], 1e-5)
    assert_close(grad_logits, expected[3], 1e-5, 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.7, 3.1])
def test_large_logits_keep_the_digits_of_the_gradient_at_any_temperature(device, temperature):
    """By the fused multiply-add, which the interpreter rounds twice."""
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    logits = logits + 3e4
    grad_logits = forward_and_backward(logits, labels, grad_logps, temperature)[3]
    assert_close(grad_logits, oracle(logits, labels, grad_logps, temperature)[3], 1e-5, 1e-8)


@pytest.mark.parametrize("scale", [1e-20, 1e3])
def test_nearly_uniform_and_nearly_certain_distributions(device, scale):
    logits, labels, grad_logps = sample(device, (1, 4, 5000), scale=scale)
    outputs = forward_and_backward(logits, labels, grad_logps)
    expected = oracle(logits, labels, grad_logps)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(device, temperature):
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    outputs = forward_and_backward(logits, labels, grad_logps, temperature)
    expected = oracle(logits, labels, grad_logps, temperature)
    for actual, wanted in zip(outputs[:3], expected[:3], strict=True):
        assert_close(actual, wanted, 1e-5)
    # The gradient grows as 1 / T.
    assert_close(outputs[3] * temperature, expected[3] * temperature, 1e-3 if temperature < 1 else 1e-5, 1e-8)


@pytest.mark.parametrize("n_statistics", [0, 1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_statistics_not_asked_for_change_no_bit_of_the_rest(device, n_statistics, softcap):
    logits, labels, _ = sample(device, (2, 2, 5000))
    logps, lse, statistics = token_logps_fwd(logits, labels, IGNORE, 0.7, softcap, 3)
    fewer = token_logps_fwd(logits, labels, IGNORE, 0.7, softcap, n_statistics)
    assert torch.equal(fewer[0], logps)
    assert torch.equal(fewer[1], lse)
    assert torch.equal(fewer[2], statistics[:n_statistics])


def time_major(logits):
    return logits.transpose(0, 1).contiguous().transpose(0, 1)


def without_last_position(logits):
    return torch.cat([logits, torch.full_like(logits[:, :1], 1e3)], dim=1)[:, :-1]


def padded_vocabulary(logits):
    return torch.cat([logits, torch.full_like(logits[..., :9], 1e3)], dim=-1)[..., : logits.shape[-1]]


def every_second_row(logits):
    return torch.stack([logits, torch.full_like(logits, 1e3)], dim=2)[:, :, 0]


LAYOUTS = [time_major, without_last_position, padded_vocabulary, every_second_row]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_logits_give_the_bits_of_contiguous_ones(device, layout):
    logits, labels, grad_logps = sample(device, (2, 3, 2500))
    strided = layout(logits)
    assert torch.equal(strided, logits)
    assert not strided.is_contiguous()
    outputs, expected = (forward_and_backward(x, labels, grad_logps) for x in (strided, logits))
    assert outputs[3].is_contiguous()
    for actual, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(actual, wanted)


def storage_around(tensor):
    """What of the tensor's storage is not of the tensor."""
    storage = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride()).fill_(False)
    return storage[outside]


@pytest.mark.parametrize("layout", [torch.clone, *LAYOUTS])
@pytest.mark.parametrize("inplace", [True, False])
def test_the_gradient_written_to_any_tensor_has_the_same_bits(device, layout, inplace):
    logits, labels, grad_logps = sample(device, (2, 3, 2500))
    labels[0, 1], labels[1, 0] = IGNORE, 2500
    grad_logits = layout(logits)
    if not inplace:
        logits = logits.clone()
        grad_logits.fill_(float("nan"))
    else:
        logits = grad_logits
    around = storage_around(grad_logits).clone()

    options = (IGNORE, 0.7, None)
    _, lse, _ = token_logps_fwd(logits, labels, *options, 0)
    expected = token_logps_bwd(grad_logps, logits, labels, lse, *options)
    assert token_logps_bwd_out(grad_logps, logits, labels, lse, *options, 0, grad_logits) is None
    torch.testing.assert_close(grad_logits, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(storage_around(grad_logits), around)


@pytest.mark.parametrize("strides", [(0, 0), (1, 0), (1, 2)])
def test_the_incoming_gradient_may_have_any_strides(device, strides):
    logits, labels, grad_logps = sample(device, (2, 3, 129))
    grad_logps = grad_logps.as_strided((2, 3), strides)
    expected = oracle(logits, labels, grad_logps)[3]
    assert_gradient_close(forward_and_backward(logits, labels, grad_logps)[3], expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bounds", [[0, 1, 5000], [0, 2000, 2500, 5000]])
def test_the_tiles_of_a_vocabulary_have_the_gradients_of_the_whole(device, bounds, softcap):
    logits, labels, grad_logps = sample(device, (1, 4, 5000))
    labels[:] = torch.tensor([[0, 2499, 4999, IGNORE]])
    options = (IGNORE, 0.7, softcap)
    _, lse, _ = token_logps_fwd(logits, labels, *options, 0)
    grad_logits = torch.full_like(logits, float("nan"))
    for start, end in pairwise(bounds):
        tile, grad_tile = logits[..., start:end], grad_logits[..., start:end]
        token_logps_bwd_out(grad_logps, tile, labels, lse, *options, start, grad_tile)
    assert torch.equal(grad_logits, token_logps_bwd(grad_logps, logits, labels, lse, *options))


def test_rows_further_than_two_to_the_31_elements_from_the_first(device):
    """Untouched pages of the buffer take no memory on a CPU: three rows of 4 GiB are read and written."""
    vocabulary, stride = 129, 2**30 + 8
    rows, labels, grad_logps = sample(device, (3, 1, vocabulary), torch.bfloat16)
    labels[:] = torch.tensor([[4], [5], [128]])
    buffer = torch.zeros(0, dtype=torch.bfloat16, device=device)
    buffer.untyped_storage().resize_(2 * (2 * stride + vocabulary))  # torch.empty is poisoned here
    logits = buffer.as_strided((3, 1, vocabulary), (stride, vocabulary, 1))
    logits.copy_(rows)
    logps, lse, _ = token_logps_fwd(logits, labels, IGNORE, 1.0, None, 0)
    token_logps_bwd_out(grad_logps, logits, labels, lse, IGNORE, 1.0, None, 0, logits)
    expected = oracle(rows, labels, grad_logps)
    assert_close(logps, expected[0], 1e-5)
    assert_gradient_close(logits, expected[3])
