"""The C++ half of the op `token_logratios`: two rows of a token at a time, whatever their dtypes and strides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import robustloss.ops  # noqa: F401  (registers the op)
from robustloss.naive.token_logps import token_logps
from robustloss.ops._library import HAS_EXTENSION

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="robustloss was installed without its C++ extension")

OP = torch.ops.robustloss
IGNORE = -100
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sample(B=3, T=7, V=1500):
    torch.manual_seed(0)
    policy, ref = 3 * torch.randn(2, B, T, V, dtype=torch.float64)
    labels = torch.randint(V, (B, T))
    labels[0, 2:] = IGNORE
    return policy, ref, labels


@pytest.mark.parametrize(("policy_dtype", "ref_dtype"), itertools.product(DTYPES, DTYPES), ids=str)
def test_log_ratios_are_differences_of_the_naive_log_probabilities(policy_dtype, ref_dtype):
    policy, ref, labels = sample()
    policy, ref = policy.to(policy_dtype), ref.to(ref_dtype)
    logratios, lse = OP.token_logratios(policy, ref, labels, IGNORE, 0.7)
    assert logratios.dtype == lse.dtype == (torch.float64 if policy_dtype == torch.float64 else torch.float32)
    logps, ref_logps = (token_logps(values.double(), labels, temperature=0.7) for values in (policy, ref))
    tolerance = 1e-12 if policy_dtype == ref_dtype == torch.float64 else 1e-6
    torch.testing.assert_close(logratios.double(), logps - ref_logps, rtol=tolerance, atol=tolerance)
    assert torch.equal(lse, OP.token_logps(policy, labels, IGNORE, 0.7, None, 0)[1])


def test_strides_and_ignored_rows():
    policy, ref, labels = sample()
    expected, lse = OP.token_logratios(policy, ref, labels, IGNORE, 1.0)
    ignored = labels == IGNORE
    policy[ignored] = ref[ignored] = math.nan
    moved = ref.transpose(0, 1).contiguous().transpose(0, 1)
    actual = OP.token_logratios(policy, moved, labels, IGNORE, 1.0)
    assert torch.equal(actual[0], expected)
    assert torch.equal(actual[1], lse)
    assert (expected[ignored] == 0).all()


def test_a_model_is_its_own_reference_to_the_bit():
    policy, _, labels = sample()
    logits = policy.float()
    logratios, _ = OP.token_logratios(logits, logits, labels, IGNORE, 0.7)
    assert not logratios.any()


def test_logits_far_from_zero_keep_their_digits():
    policy, ref, labels = sample()
    policy, ref = (policy + 1e5).float(), (ref - 1e5).float()
    logratios, lse = OP.token_logratios(policy, ref, labels, IGNORE, 0.7)
    exact = policy.double().requires_grad_()
    logps, ref_logps = (token_logps(values, labels, temperature=0.7) for values in (exact, ref.double()))
    torch.testing.assert_close(logratios.double(), (logps - ref_logps).detach(), rtol=1e-6, atol=1e-6)
    grad = OP.token_logps_bwd(torch.ones(3, 7), policy, labels, lse, IGNORE, 0.7, None)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(logps.sum(), exact)[0], rtol=1e-5, atol=1e-12)


def test_nan_in_either_row_spoils_the_log_ratio_and_no_other():
    policy, ref, labels = sample()
    policy[1, 0, 3] = ref[2, 0, 5] = math.nan
    logratios, lse = OP.token_logratios(policy, ref, labels, IGNORE, 1.0)
    spoilt = torch.zeros(3, 7, dtype=torch.bool)
    spoilt[[1, 2], 0] = True
    assert torch.equal(logratios.isnan(), spoilt)
    assert lse[:, 1, 0].isnan().all()
    assert lse[:, 2, 0].isfinite().all()


def test_the_same_bits_whatever_the_number_of_threads():
    policy, ref, labels = sample(V=40_000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OP.token_logratios(policy.float(), ref.bfloat16(), labels, IGNORE, 1.0))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nothing_at_all():
    logratios, lse = OP.token_logratios(torch.ones(0, 3, 5), torch.ones(0, 3, 5), torch.ones(0, 3).long(), IGNORE, 1.0)
    assert logratios.shape == (0, 3)
    assert lse.shape == (2, 0, 3)


def test_derivatives_are_those_of_the_policys_log_probability():
    policy, ref, labels = sample(2, 3, 9)

    def logratios(logits):
        return OP.token_logratios(logits, ref, labels, IGNORE, 0.7)[0]

    assert torch.autograd.gradcheck(logratios, policy.requires_grad_())
    assert torch.autograd.gradgradcheck(logratios, policy)


def test_bad_labels_and_layouts_are_named():
    policy, ref, labels = sample(2, 3, 9)
    labels[1, 1] = 9
    with pytest.raises(ValueError, match=r"labels\[1, 1\] is 9, but must be in \[0, 9\)"):
        OP.token_logratios(policy, ref, labels, IGNORE, 1.0)
    labels[1, 1] = 0
    with pytest.raises(ValueError, match="ref_logits must have policy_logits' vocabulary 9, got 8"):
        OP.token_logratios(policy, ref[..., :8], labels, IGNORE, 1.0)
    with pytest.raises(ValueError, match="ref_logits must have stride 1"):
        OP.token_logratios(policy, torch.ones(2, 9, 3).transpose(1, 2), labels, IGNORE, 1.0)
