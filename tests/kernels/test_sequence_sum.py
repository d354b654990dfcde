"""The Triton kernels of sequence_sum and sequence_repeat against sums that Python writes out, and as adjoints."""

from __future__ import annotations

import pytest
import torch

from robustloss.kernels.sequence_sum import sequence_repeat, sequence_sum

pytestmark = pytest.mark.usefixtures("poisoned_empty")

IGNORE = -100
# One token, some less than a block, several blocks with a tail; and, packed, none at all in three places.
LENGTHS = [0, 1, 33, 0, 0, 4500, 4096, 7, 0]


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    return request.param


def sample(device, shape, dtype):
    """Values, and labels of which some are ignored; the value there is 0, as the row kernels leave it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORE
    return torch.where(labels != IGNORE, values, 0.0).to(device, dtype), labels.to(device)


def cumulative(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def check(outputs, values, labels, average):
    """Against the sum of each of a list of sequences, in float64."""
    counts = [max(1, int((row != IGNORE).sum())) if average else 1 for row in labels]
    sums = [row.double().sum() / count for row, count in zip(values, counts, strict=True)]
    actual_sums, actual_counts = outputs
    assert actual_sums.dtype == actual_counts.dtype == values[0].dtype
    assert actual_counts.tolist() == counts
    tolerance = 1e-12 if values[0].dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual_sums.double(), torch.stack(sums), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("tokens", [1, 33, 4096, 9000])
def test_padded_sequences(device, dtype, tokens, average):
    values, labels = sample(device, (3, tokens), dtype)
    labels[1], values[1] = IGNORE, 0.0
    check(sequence_sum(values, labels, None, IGNORE, average), values, labels, average)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences(device, dtype, offsets_dtype, average):
    values, labels = sample(device, (sum(LENGTHS),), dtype)
    cu_seqlens = cumulative(LENGTHS, device, offsets_dtype)
    outputs = sequence_sum(values, labels, cu_seqlens, IGNORE, average)
    check(outputs, values.split(LENGTHS), labels.split(LENGTHS), average)


@pytest.mark.parametrize("average", [False, True])
def test_values_and_labels_of_any_strides(device, average):
    values, labels = sample(device, (70, 3), torch.float32)
    outputs = sequence_sum(values.T, labels.T, None, IGNORE, average)
    check(outputs, values.T, labels.T, average)
    packed = sequence_sum(values[:, 1], labels[:, 1], cumulative([30, 40], device), IGNORE, average)
    check(packed, values[:, 1].split([30, 40]), labels[:, 1].split([30, 40]), average)
    expanded = torch.ones(1, device=device).expand(70)
    sums, _ = sequence_sum(expanded, labels[:, 0], cumulative([30, 40], device), IGNORE, False)
    assert sums.tolist() == [30.0, 40.0]


def test_each_token_gets_the_value_of_its_sequence(device, dtype):
    values = torch.randn(len(LENGTHS), dtype=dtype).to(device)
    cu_seqlens = cumulative(LENGTHS, device)
    repeated = sequence_repeat(values, cu_seqlens, sum(LENGTHS))
    assert torch.equal(repeated, values.repeat_interleave(cu_seqlens.diff()))


@pytest.mark.parametrize("lengths", [[1], [5000], [1] * 40, [0, 0, 3], [3, 0, 0]])
def test_few_and_many_sequences(device, lengths):
    values, labels = sample(device, (sum(lengths),), torch.float32)
    cu_seqlens = cumulative(lengths, device)
    check(sequence_sum(values, labels, cu_seqlens, IGNORE, True), values.split(lengths), labels.split(lengths), True)
    numbers = torch.arange(len(lengths), dtype=torch.float32, device=device)
    expected = numbers.repeat_interleave(cu_seqlens.diff())
    assert torch.equal(sequence_repeat(numbers, cu_seqlens, sum(lengths)), expected)


def test_repeating_an_expanded_gradient(device):
    expanded = torch.full((1,), 2.0, device=device).expand(3)
    repeated = sequence_repeat(expanded, cumulative([2, 0, 5], device), 7)
    assert repeated.tolist() == [2.0] * 7


def test_repeat_is_the_adjoint_of_the_sum(device):
    values, labels = sample(device, (sum(LENGTHS),), torch.float64)
    weights = torch.randn(len(LENGTHS), dtype=torch.float64).to(device)
    cu_seqlens = cumulative(LENGTHS, device)
    sums, _ = sequence_sum(values, labels, cu_seqlens, IGNORE, False)
    repeated = sequence_repeat(weights, cu_seqlens, sum(LENGTHS))
    torch.testing.assert_close(sums @ weights, values @ repeated)


def test_a_nan_stays_in_its_sequence(device):
    values, labels = sample(device, (4, 50), torch.float32)
    values[2, 49] = float("nan")
    sums, _ = sequence_sum(values, labels, None, IGNORE, True)
    assert sums.isnan().tolist() == [False, False, True, False]


def test_no_sequences_and_no_tokens(device):
    nothing, no_labels = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    for cu_seqlens, expected in ((cumulative([], device), []), (cumulative([0, 0], device), [0.0, 0.0])):
        sums, counts = sequence_sum(nothing, no_labels, cu_seqlens, IGNORE, True)
        assert sums.tolist() == expected
        assert counts.tolist() == [1.0] * len(expected)
    assert sequence_repeat(nothing, cumulative([], device), 0).shape == (0,)
    sums, _ = sequence_sum(torch.zeros(2, 0, device=device), no_labels.view(2, 0), None, IGNORE, True)
    assert sums.tolist() == [0.0, 0.0]
