"""Token log-probabilities and entropy of naive/: the definition itself, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss.naive.token_logps import statistics_dtype, token_entropy, token_logps

IGNORE = -100


def sample(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_token_logps_are_the_log_softmax_of_the_scaled_logits_at_the_labels(temperature):
    logits, labels = sample(3, 5, 11)
    expected = torch.log_softmax(logits / temperature, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_logps(logits, labels, temperature=temperature), expected, rtol=1e-10, atol=1e-10)


def test_uniform_logits_give_minus_log_vocabulary_and_the_largest_entropy():
    logits, labels = torch.full((4, 7), 2.5, dtype=torch.float64), torch.tensor([0, 3, 6, 2])
    expected = torch.full((4,), math.log(7), dtype=torch.float64)
    torch.testing.assert_close(token_logps(logits, labels), -expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(token_entropy(logits, labels), expected, rtol=1e-12, atol=0)


def test_two_tokens_give_the_logistic_sigmoid():
    gap = torch.linspace(-30, 30, 13, dtype=torch.float64)
    logits = torch.stack([gap, torch.zeros_like(gap)], -1)
    torch.testing.assert_close(
        token_logps(logits, torch.zeros(13, dtype=torch.long)),
        torch.nn.functional.logsigmoid(gap),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_is_the_expected_surprise(temperature):
    logits, labels = sample(6, 9)
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    torch.testing.assert_close(token_entropy(logits, labels, temperature=temperature), expected, rtol=1e-10, atol=1e-10)


def test_probabilities_of_all_labels_sum_to_one():
    logits, _ = sample(1, 11)
    every = token_logps(logits.expand(11, 11), torch.arange(11))
    assert every.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_adding_a_constant_to_the_logits_changes_nothing():
    logits, labels = sample(4, 9)
    torch.testing.assert_close(token_logps(logits + 700, labels), token_logps(logits, labels), rtol=1e-10, atol=1e-10)


def test_ignored_labels_give_zero_and_a_zero_gradient():
    logits, labels = sample(2, 4, 5)
    labels[0] = IGNORE
    labels[1, 2] = IGNORE
    logits.requires_grad_()
    values = token_logps(logits, labels)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    ignored = labels == IGNORE
    assert torch.equal(values[ignored], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(gradient[ignored], torch.zeros(5, 5, dtype=torch.float64))
    assert (gradient[~ignored].abs().sum(-1) > 0).all()
    assert torch.equal(token_entropy(logits, labels)[ignored], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_in_an_ignored_row_reaches_nothing(garbage):
    logits, labels = sample(2, 3, 5)
    labels[0, 1] = IGNORE
    logits[0, 1] = garbage
    logits.requires_grad_()
    values = token_logps(logits, labels)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(values).all()
    assert torch.equal(gradient[0, 1], torch.zeros(5, dtype=torch.float64))
    assert torch.isfinite(gradient).all()
    assert token_entropy(logits.detach(), labels)[0, 1] == 0


def test_another_ignore_index_may_be_a_token():
    logits, labels = sample(5, 4)
    labels[:] = torch.tensor([0, 1, 2, 3, 0])
    values = token_logps(logits, labels, ignore_index=0)
    assert values[0] == values[4] == 0
    torch.testing.assert_close(values[1:4], token_logps(logits, labels)[1:4])


def test_the_gradient_is_one_hot_minus_softmax_over_the_temperature():
    logits, labels = sample(3, 6)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(token_logps(logits, labels, temperature=0.7).sum(), logits)
    expected = (torch.nn.functional.one_hot(labels, 6) - torch.softmax(logits / 0.7, -1)) / 0.7
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-10)


def test_derivatives_of_both_orders_match_finite_differences():
    logits, labels = sample(2, 3, 4)
    labels[0, 1] = IGNORE

    def function(x):
        return token_logps(x, labels, temperature=0.8)

    logits.requires_grad_()
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_tokens_that_cannot_occur_leave_values_and_gradients_finite():
    logits, labels = sample(3, 5)
    logits[:, 4] = -math.inf
    labels.clamp_(max=3)
    logits.requires_grad_()
    values = token_logps(logits, labels)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(
        token_entropy(logits.detach(), labels), token_entropy(logits[:, :4].detach(), labels), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_statistics_are_float32_or_better(dtype):
    logits, labels = sample(4, 9)
    rounded = logits.to(dtype)
    values = token_logps(rounded, labels)
    assert values.dtype == statistics_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(values.double(), token_logps(rounded.double(), labels), rtol=1e-6, atol=1e-6)
