"""The Triton kernel of token_logratios against the difference of two log-probabilities in float64."""

from __future__ import annotations

import pytest
import torch

from robustloss.kernels.token_logps import token_logps_bwd, token_logps_fwd
from robustloss.kernels.token_logratios import token_logratios
from robustloss.naive.token_logps import statistics_dtype, token_logps

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # The interpreter is NumPy, which warns where infinities and NaN are meant to meet.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

IGNORE = -100
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def sample(device, shape, policy_dtype=FLOAT32, ref_dtype=FLOAT32):
    """The policy's and the reference's logits, and labels of which one is ignored."""
    generator = torch.Generator().manual_seed(0)
    policy, ref = (3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).unbind(0)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[0, 1] = IGNORE
    return policy.to(device, policy_dtype), ref.to(device, ref_dtype), labels.to(device)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("vocabulary", [1, 129, 5000, 5008])
@pytest.mark.parametrize(
    ("policy_dtype", "ref_dtype"),
    [
        (torch.float64, torch.float64),
        (FLOAT32, FLOAT32),
        (BFLOAT16, BFLOAT16),
        (torch.float16, torch.float16),
        (FLOAT32, BFLOAT16),
        (BFLOAT16, FLOAT32),
    ],
    ids=str,
)
def test_the_log_ratio_is_the_difference_of_the_log_probabilities(device, vocabulary, policy_dtype, ref_dtype):
    policy, ref, labels = sample(device, (2, 2, vocabulary), policy_dtype, ref_dtype)
    labels[1, 1] = vocabulary - 1
    logratios, _ = token_logratios(policy, ref, labels, IGNORE, 0.7)
    assert logratios.dtype == statistics_dtype(policy_dtype)
    logps, ref_logps = (token_logps(x.double(), labels, temperature=0.7) for x in (policy, ref))
    assert_close(logratios, logps - ref_logps, 1e-10 if policy_dtype == torch.float64 else 1e-5)
    assert logratios[0, 1] == 0.0


@pytest.mark.parametrize("vocabulary", [129, 5000])
def test_the_log_sum_exp_serves_the_backward_of_the_policy(device, vocabulary):
    policy, ref, labels = sample(device, (2, 2, vocabulary))
    _, lse = token_logratios(policy, ref, labels, IGNORE, 0.7)
    _, expected, _ = token_logps_fwd(policy, labels, IGNORE, 0.7, None, 0)
    assert torch.equal(lse[0], expected[0])
    assert_close(lse[1], expected[1], 1e-6)
    grad_logratios = torch.ones(2, 2, device=device)
    logits = policy.double().requires_grad_()
    token_logps(logits, labels, temperature=0.7).sum().backward()
    grad_logits = token_logps_bwd(grad_logratios, policy, labels, lse, IGNORE, 0.7, None)
    assert_close(grad_logits, logits.grad, 1e-5)


def test_a_policy_equal_to_its_reference_has_log_ratio_zero(device):
    policy, _, labels = sample(device, (2, 2, 5000), BFLOAT16)
    logratios, _ = token_logratios(policy, policy.clone(), labels, IGNORE, 0.7)
    assert torch.equal(logratios, torch.zeros_like(logratios))


def test_large_logits_keep_the_digits_of_the_log_ratio(device):
    policy, ref, labels = sample(device, (1, 3, 5000))
    policy, ref = policy + 3e4, ref - 1e5
    logratios, _ = token_logratios(policy, ref, labels, IGNORE, 1.0)
    logps, ref_logps = (token_logps(x.double(), labels) for x in (policy, ref))
    assert_close(logratios, logps - ref_logps, 1e-5)


def test_logits_that_lie_differently_in_memory_give_the_same_bits(device):
    policy, ref, labels = sample(device, (2, 3, 2500))
    time_major = policy.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.cat([ref, torch.full_like(ref[..., :9], 1e3)], dim=-1)[..., :2500]
    assert not time_major.is_contiguous()
    assert not padded.is_contiguous()
    expected = token_logratios(policy, ref, labels, IGNORE, 1.0)
    for actual, wanted in zip(token_logratios(time_major, padded, labels, IGNORE, 1.0), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_are_not_read_and_give_zero(device, ignore_index):
    logits = torch.full((2, 2, 129), float("nan"), device=device)
    labels = torch.full((2, 2), ignore_index, device=device)
    for zero in token_logratios(logits, logits.clone(), labels, ignore_index, 1.0):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("label", [-1, 129, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan_in_its_row_only(device, label):
    policy, ref, labels = sample(device, (1, 3, 129))
    labels[0, 2] = label
    for output in token_logratios(policy, ref, labels, IGNORE, 1.0):
        assert output[..., 2].isnan().all()
        assert output[..., :2].isfinite().all()


@pytest.mark.parametrize("broken", [0, 1], ids=["policy", "reference"])
def test_nan_in_either_row_gives_nan(device, broken):
    policy, ref, labels = sample(device, (1, 3, 5000))
    (policy, ref)[broken][0, 0, 3000] = float("nan")
    logratios, _ = token_logratios(policy, ref, labels, IGNORE, 1.0)
    assert logratios.isnan().tolist() == [[True, False, False]]


def test_no_rows_give_empty_tensors(device):
    logits = torch.zeros(0, 3, 7, device=device)
    labels = torch.zeros(0, 3, dtype=torch.int64, device=device)
    logratios, lse = token_logratios(logits, logits.clone(), labels, IGNORE, 1.0)
    assert (logratios.shape, lse.shape) == ((0, 3), (2, 0, 3))
