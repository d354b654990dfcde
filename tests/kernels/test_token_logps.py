"""The Triton kernels of token_logps against the papers' formula in float64 (interpreted where there is no GPU)."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss.kernels.token_logps import block_and_warps, token_logps_bwd, token_logps_bwd_, token_logps_fwd
from robustloss.naive.token_logps import token_entropy, token_logps

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # The interpreter is NumPy, which warns where infinities and NaN are meant to meet.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

IGNORE = -100
# Shorter than a warp, odd, and, for every dtype, whole blocks with a tail and without one.
VOCABULARIES = [1, 7, 129, 5000, 8192]


def sample(device, shape, dtype=torch.float32, seed=0, scale=3.0):
    """Logits, labels with some of them ignored, and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    *rows, vocabulary = shape
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocabulary, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    grad_logps = torch.randn(rows, generator=generator, dtype=torch.float64).to(statistics(dtype))
    return logits.to(device), labels.to(device), grad_logps.to(device)


def statistics(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def oracle(logits, labels, grad_logps, temperature=1.0, ignore_index=IGNORE):
    """logps, lse, entropy and the logits' gradient, in float64."""
    options = {"temperature": temperature, "ignore_index": ignore_index}
    logits = logits.double().requires_grad_()
    logps = token_logps(logits, labels, **options)
    lse = torch.where(labels != ignore_index, (logits / temperature).logsumexp(-1), 0.0)
    (grad_logits,) = torch.autograd.grad(logps, logits, grad_logps.double(), retain_graph=True)
    return logps.detach(), lse.detach(), token_entropy(logits, labels, **options).detach(), grad_logits


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_forward_and_backward_equal_the_formula(device, vocabulary, dtype):
    logits, labels, grad_logps = sample(device, (2, 3, vocabulary), dtype)
    labels[0, 0], labels[1, 2] = vocabulary - 1, 0
    temperature = 0.7
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, temperature, True)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, temperature)

    assert logps.dtype == lse.dtype == entropy.dtype == statistics(dtype)
    assert grad_logits.dtype == dtype
    expected = oracle(logits, labels, grad_logps, temperature)
    for actual, wanted in zip((logps, lse, entropy), expected[:3], strict=True):
        assert_close(actual, wanted, statistics_tolerance(dtype))
    assert_gradient_close(grad_logits, expected[3])


def test_the_vocabularies_tested_take_several_blocks_and_a_tail():
    for itemsize in (2, 4, 8):
        block, _ = block_and_warps(5000, itemsize)
        assert block < 5000
        assert 5000 % block != 0
        assert 8192 % block == 0


@pytest.mark.parametrize("rows", [(0, 3), (2, 0)])
def test_no_rows_give_empty_tensors(device, rows):
    logits, labels, grad_logps = sample(device, (*rows, 7))
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    token_logps_bwd_(grad_logps, logits, labels, lse, IGNORE, 1.0)
    assert logps.shape == lse.shape == entropy.shape == rows
    assert token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0).shape == (*rows, 7)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_ignored_rows_are_not_read_and_give_zero(device, vocabulary, ignore_index):
    logits = torch.full((2, 2, vocabulary), float("nan"), device=device)
    labels = torch.full((2, 2), ignore_index, device=device)
    logps, lse, entropy = token_logps_fwd(logits, labels, ignore_index, 1.0, True)
    grad_logits = token_logps_bwd(torch.ones_like(logps), logits, labels, lse, ignore_index, 1.0)
    token_logps_bwd_(torch.ones_like(logps), logits, labels, lse, ignore_index, 1.0)
    for zero in (logps, lse, entropy, grad_logits, logits):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("label", [-1, 5000, 2**40, -(2**40)])
def test_a_label_outside_the_vocabulary_gives_nan_in_its_row_only(device, label):
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    labels[:] = torch.tensor([[4, 4999, IGNORE]])
    expected = oracle(logits, labels, grad_logps)
    labels[0, 1] = label
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0)
    for actual, wanted in zip((logps, lse, entropy, grad_logits), expected, strict=True):
        assert actual[0, 1].isnan().all()
        assert_close(actual[0, ::2], wanted[0, ::2], 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 3000, 4999])
def test_nan_or_infinity_among_the_logits_gives_nan(device, position, value):
    logits, labels, grad_logps = sample(device, (1, 1, 5000))
    labels[:] = 17
    logits[0, 0, position] = value
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0)
    for actual in (logps, lse, entropy, grad_logits):
        assert actual.isnan().all()


@pytest.mark.parametrize("allowed", [slice(0, 3), slice(2500, 2600), slice(4990, 5000)], ids=["head", "middle", "tail"])
def test_logits_of_minus_infinity_are_tokens_that_cannot_occur(device, allowed):
    logits, labels, grad_logps = sample(device, (1, 2, 5000))
    masked = torch.full_like(logits, -float("inf"))
    masked[..., allowed] = logits[..., allowed]
    labels[:] = allowed.start + 1
    logps, lse, entropy = token_logps_fwd(masked, labels, IGNORE, 1.3, True)
    grad_logits = token_logps_bwd(grad_logps, masked, labels, lse, IGNORE, 1.3)

    short = oracle(logits[..., allowed], torch.ones_like(labels), grad_logps, 1.3)
    for actual, wanted in zip((logps, lse, entropy, grad_logits[..., allowed]), short, strict=True):
        assert_close(actual, wanted, 1e-5)
    grad_logits[..., allowed] = 0.0
    assert not grad_logits.any()


def test_a_label_that_cannot_occur_has_log_probability_minus_infinity(device):
    logits, labels, grad_logps = sample(device, (1, 1, 129))
    labels[:] = 5
    logits[..., 5] = -float("inf")
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    assert logps.item() == -float("inf")
    assert math.isfinite(lse.item())
    assert math.isfinite(entropy.item())
    assert token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0)[0, 0, 5] == grad_logps.item()


def test_a_vocabulary_of_minus_infinity_alone_has_no_distribution(device):
    logits = torch.full((1, 1, 5000), -float("inf"), device=device)
    logps, lse, _ = token_logps_fwd(logits, torch.zeros(1, 1, dtype=torch.int64, device=device), IGNORE, 1.0, False)
    assert logps.isnan().all()
    assert lse.item() == -float("inf")


@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_equal_logits_are_the_uniform_distribution(device, vocabulary):
    logits = torch.full((1, 2, vocabulary), 2.5, device=device)
    labels = torch.tensor([[0, vocabulary - 1]], device=device)
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 0.5, True)
    uniform = torch.full_like(logps, math.log(vocabulary))
    assert_close(logps, -uniform, 1e-6)
    assert_close(entropy, uniform, 1e-6)
    assert_close(lse, uniform + 5.0, 1e-6)


@pytest.mark.parametrize("offset", [3e4, -3e4, 1e30, -1e30])
def test_large_logits_keep_the_digits_of_the_log_probability(device, offset):
    """Adding a constant to every logit changes no probability: only the logits' own rounding is lost."""
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    logits = logits + offset
    logps, _, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    expected = oracle(logits, labels, grad_logps)
    assert_close(logps, expected[0], 1e-5)
    assert_close(entropy, expected[2], 1e-5)


def test_the_gradient_at_large_logits_is_as_good_as_the_saved_log_sum_exp(device):
    logits, labels, grad_logps = sample(device, (1, 3, 5000))
    logits = logits + 3e4
    _, lse, _ = token_logps_fwd(logits, labels, IGNORE, 1.0, False)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0)
    assert_close(grad_logits, oracle(logits, labels, grad_logps)[3], 3e4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("scale", [1e-20, 1e3])
def test_nearly_uniform_and_nearly_certain_distributions(device, scale):
    logits, labels, grad_logps = sample(device, (1, 4, 5000), scale=scale)
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0)
    expected = oracle(logits, labels, grad_logps)
    for actual, wanted in zip((logps, lse, entropy), expected[:3], strict=True):
        assert_close(actual, wanted, 1e-5)
    assert_close(grad_logits, expected[3], scale * 1e-6 + 1e-5)


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
    outputs, expected = (token_logps_fwd(x, labels, IGNORE, 1.0, True) for x in (strided, logits))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(actual, wanted)
    grad_logits = token_logps_bwd(grad_logps, strided, labels, outputs[1], IGNORE, 1.0)
    assert grad_logits.is_contiguous()
    assert torch.equal(grad_logits, token_logps_bwd(grad_logps, logits, labels, expected[1], IGNORE, 1.0))


@pytest.mark.parametrize("layout", [torch.clone, *LAYOUTS])
def test_the_gradient_written_over_the_logits_has_the_same_bits(device, layout):
    logits, labels, grad_logps = sample(device, (2, 3, 2500))
    labels[0, 1], labels[1, 0] = IGNORE, 2500
    logits = layout(logits)
    storage = torch.as_strided(logits, (logits.untyped_storage().nbytes() // 4,), (1,), 0)
    is_logit = torch.zeros_like(storage, dtype=torch.bool)
    is_logit.as_strided(logits.shape, logits.stride()).fill_(True)
    around = storage[~is_logit].clone()

    _, lse, _ = token_logps_fwd(logits, labels, IGNORE, 0.7, False)
    grad_logits = token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 0.7)
    assert token_logps_bwd_(grad_logps, logits, labels, lse, IGNORE, 0.7) is None
    torch.testing.assert_close(logits, grad_logits, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(storage[~is_logit], around)


@pytest.mark.parametrize("strides", [(0, 0), (1, 0), (1, 2)])
def test_the_incoming_gradient_may_have_any_strides(device, strides):
    logits, labels, grad_logps = sample(device, (2, 3, 129))
    grad_logps = grad_logps.as_strided((2, 3), strides)
    _, lse, _ = token_logps_fwd(logits, labels, IGNORE, 1.0, False)
    expected = oracle(logits, labels, grad_logps)[3]
    assert_gradient_close(token_logps_bwd(grad_logps, logits, labels, lse, IGNORE, 1.0), expected)


def test_without_entropy_none_is_made_and_the_rest_keeps_its_bits(device):
    logits, labels, _ = sample(device, (2, 3, 5000))
    logps, lse, entropy = token_logps_fwd(logits, labels, IGNORE, 1.0, True)
    without = token_logps_fwd(logits, labels, IGNORE, 1.0, False)
    assert torch.equal(without[0], logps)
    assert torch.equal(without[1], lse)
    assert without[2].shape == (0,)
    assert entropy.shape == (2, 3)


def test_rows_further_than_two_to_the_31_elements_from_the_first(device):
    """Untouched pages of the buffer take no memory on a CPU: three rows of 4 GiB are read and written."""
    vocabulary, stride = 129, 2**30 + 8
    rows, labels, grad_logps = sample(device, (3, 1, vocabulary), torch.bfloat16)
    labels[:] = torch.tensor([[4], [5], [128]])
    buffer = torch.zeros(0, dtype=torch.bfloat16, device=device)
    buffer.untyped_storage().resize_(2 * (2 * stride + vocabulary))  # torch.empty is poisoned here
    logits = buffer.as_strided((3, 1, vocabulary), (stride, vocabulary, 1))
    logits.copy_(rows)
    logps, lse, _ = token_logps_fwd(logits, labels, IGNORE, 1.0, False)
    token_logps_bwd_(grad_logps, logits, labels, lse, IGNORE, 1.0)
    expected = oracle(rows, labels, grad_logps)
    assert_close(logps, expected[0], 1e-5)
    assert_gradient_close(logits, expected[3])
