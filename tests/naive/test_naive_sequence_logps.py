"""Sequence log-probabilities of naive/: shift, averages, packing and the language-model head."""

from __future__ import annotations

import pytest
import torch

from robustloss.naive.sequence_logps import (
    linear_logits,
    linear_sequence_logps,
    sequence_logps,
    shift_labels,
)
from robustloss.naive.token_logps import token_entropy, token_logps

IGNORE = -100
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Lengths of packed sequences: none empty; an empty one first, in the middle, last; single tokens around empty ones.
LENGTHS = [(3, 1, 4), (0, 3, 2), (0, 0, 1, 3), (2, 0, 0, 3), (4, 2, 0), (0, 1, 0, 1, 0), (0,), (5,), (1, 1, 1)]


def sample(B: int = 3, T: int = 6, V: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B * T * V)
    logits = 2 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, 0] = IGNORE
    labels[-1, T // 2 :] = IGNORE
    return logits, labels


def packed(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    N = sum(lengths)
    logits = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (N,), generator=generator)
    labels[1::3] = IGNORE
    return logits, labels, torch.tensor([0, *lengths]).cumsum(0)


def unpack(logits: torch.Tensor, labels: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sequences padded to one length, with ignored labels in the padding."""
    T = max(1, *lengths)
    wide = torch.zeros(len(lengths), T, logits.shape[-1], dtype=logits.dtype)
    wide_labels = torch.full((len(lengths), T), IGNORE)
    start = 0
    for row, length in enumerate(lengths):
        wide[row, :length] = logits[start : start + length]
        wide_labels[row, :length] = labels[start : start + length]
        start += length
    return wide, wide_labels


def test_a_sequence_is_the_sum_of_its_counted_tokens():
    logits, labels = sample()
    expected = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = torch.where(labels != IGNORE, expected, 0.0).sum(-1)
    torch.testing.assert_close(sequence_logps(logits, labels), expected, **CLOSE)


def test_the_average_divides_by_the_counted_tokens():
    logits, labels = sample()
    counts = (labels != IGNORE).sum(-1)
    torch.testing.assert_close(
        sequence_logps(logits, labels, average=True) * counts, sequence_logps(logits, labels), **CLOSE
    )


def test_shift_predicts_the_next_token():
    logits, labels = sample()
    torch.testing.assert_close(
        sequence_logps(logits, labels, shift=True), sequence_logps(logits[:, :-1], labels[:, 1:]), **CLOSE
    )


def test_temperature_divides_the_logits():
    logits, labels = sample()
    torch.testing.assert_close(
        sequence_logps(logits, labels, temperature=0.4), sequence_logps(logits / 0.4, labels), **CLOSE
    )


@pytest.mark.parametrize("average", [False, True])
def test_a_sequence_without_labels_gives_zero_and_a_zero_gradient(average):
    logits, labels = sample()
    labels[1] = IGNORE
    logits.requires_grad_()
    values, entropy = sequence_logps(logits, labels, average=average, return_entropy=True)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values[1] == entropy[1] == 0
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("average", [False, True])
def test_entropy_is_reduced_like_the_log_probabilities_and_carries_no_gradient(average):
    logits, labels = sample()
    logits.requires_grad_()
    _, entropy = sequence_logps(logits, labels, average=average, return_entropy=True)
    expected = token_entropy(logits, labels).sum(-1) / ((labels != IGNORE).sum(-1) if average else 1)
    torch.testing.assert_close(entropy, expected.detach(), **CLOSE)
    assert not entropy.requires_grad


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_packed_sequences_equal_padded_ones(lengths, shift, average):
    logits, labels, cu_seqlens = packed(lengths)
    options = {"shift": shift, "average": average, "return_entropy": True, "temperature": 0.9}
    got = sequence_logps(logits, labels, cu_seqlens=cu_seqlens, **options)
    expected = sequence_logps(*unpack(logits, labels, lengths), **options)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_packed_sequence_predicts_the_first_token_of_the_next(lengths):
    _, _, cu_seqlens = packed(lengths)
    labels = torch.arange(sum(lengths))
    expected = torch.cat(
        [torch.cat([part[1:], part.new_full((min(1, len(part)),), IGNORE)]) for part in labels.split(lengths)]
    )
    assert torch.equal(shift_labels(labels, IGNORE, cu_seqlens), expected)
    assert torch.equal(shift_labels(labels.unsqueeze(0), IGNORE, cu_seqlens), expected.unsqueeze(0))


def test_the_head_is_a_matrix_product_a_bias_and_a_soft_cap():
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 3), (5, 3), (5,))
    )
    plain = torch.einsum("bth,vh->btv", hidden, weight) + bias
    torch.testing.assert_close(linear_logits(hidden, weight, bias=bias), plain, **CLOSE)
    capped = linear_logits(hidden, weight, bias=bias, softcap=0.5)
    torch.testing.assert_close(capped, 0.5 * torch.tanh(plain / 0.5), **CLOSE)
    assert capped.abs().max() < 0.5
    torch.testing.assert_close(linear_logits(hidden, weight, bias=bias, softcap=1e9), plain, **CLOSE)
    labels = torch.randint(5, (2, 4), generator=generator)
    torch.testing.assert_close(
        linear_sequence_logps(hidden, weight, labels, bias=bias, softcap=0.5, temperature=0.7),
        token_logps(capped, labels, temperature=0.7).sum(-1),
        **CLOSE,
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_derivatives_of_both_orders_match_finite_differences(softcap):
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 2), (4, 2), (4,))
    )
    labels = torch.tensor([[IGNORE, 1, 3], [0, IGNORE, IGNORE]])

    def function(hidden, weight, bias):
        return linear_sequence_logps(hidden, weight, labels, bias=bias, softcap=softcap, shift=True, average=True)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(function, (hidden, weight, bias))
