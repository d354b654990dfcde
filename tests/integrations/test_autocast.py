"""Autocast: what comes out is float32 whatever autocast says, and the output head is cast as a linear layer is."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_cases import VOCABULARY, WIDTH, Step, losses_of_logps, make_batch

from robustloss import (
    KLDPOLoss,
    linear_sequence_logps,
    sequence_logps,
    sinkhorn_sort,
    soft_rank,
    soft_sort,
    sorted_transport,
)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("loss", losses_of_logps(), ids=str)
def test_a_loss_under_autocast_is_the_loss_to_the_bit(loss):
    tokens, refs, others = make_batch(loss, 6, 5)
    results = []
    for context in (autocast(), torch.autocast("cpu", enabled=False)):
        policy = [(-3 * ids.float()).mean(-1).requires_grad_() for ids, _ in tokens]
        with context:
            value, metrics = copy.deepcopy(loss)(*policy, *refs, **others, return_metrics=True)
            value.backward()
        assert {number.dtype for number in (value, *metrics.values())} == {torch.float32}
        results.append((value, metrics, [logps.grad for logps in policy]))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [soft_sort, soft_rank, sinkhorn_sort, sorted_transport])
def test_sorting_under_autocast_is_sorting_to_the_bit(function):
    samples = [torch.linspace(-2, 3, 7).sin(), torch.linspace(0, 1, 5)][: 2 if function is sorted_transport else 1]
    with autocast():
        cast = function(*samples)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, function(*samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_taken_as_they_are(dtype):
    torch.manual_seed(0)
    values, labels, results = torch.randn(3, 5, VOCABULARY, dtype=dtype), torch.randint(VOCABULARY, (3, 5)), []
    for context in (autocast(), torch.autocast("cpu", enabled=False)):
        logits = values.clone().requires_grad_()
        with context:
            logps, statistics = sequence_logps(logits, labels, shift=True, return_statistics=True)
            logps.sum().backward()
        assert logps.dtype == torch.float32
        results.append((logps, statistics, logits.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def head(dtype, frozen):
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (3, 5))
    labels[:, :2] = -100
    tensors = [torch.randn(3, 5, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)]
    tensors += [torch.randn(3, 5, 2), torch.randn(VOCABULARY, 2)]
    leaves = [value.requires_grad_(index == 0 or not frozen) for index, value in enumerate(tensors)]
    return labels, leaves, [value.to(dtype) for value in leaves]


def logps_of(labels, hidden, weight, bias, u, v):
    return linear_sequence_logps(hidden, weight, labels, bias=bias, adapter=(u, v), softcap=9.0, shift=True)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["", "backward under autocast too"])
def test_the_head_under_autocast_is_the_head_cast_by_hand(frozen, backward_inside):
    labels, leaves, cast = head(torch.bfloat16, frozen)
    expected = logps_of(labels, *cast)
    wanted = [value for value in leaves if value.requires_grad]
    expected_gradients = torch.autograd.grad(expected.square().sum(), wanted)
    with autocast():
        logps = logps_of(labels, *leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
        gradients = torch.autograd.grad(logps.square().sum(), wanted)
    assert logps.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert torch.equal(logps, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=0)


def test_a_second_derivative_under_autocast_is_as_exact_as_outside():
    labels, leaves, cast = head(torch.float32, frozen=False)
    curvatures = []
    for context in (autocast(), torch.autocast("cpu", enabled=False)):
        logps = logps_of(labels, *cast)
        with context:
            gradients = torch.autograd.grad(logps.square().sum(), leaves, create_graph=True)
            curvatures.append(torch.autograd.grad(sum(value.square().sum() for value in gradients), leaves))
    torch.testing.assert_close(*curvatures, rtol=0, atol=0)


def test_a_model_trains_under_autocast_near_float32():
    step = Step(KLDPOLoss(tau=1.0))
    batch, gradients = make_batch(step.loss, 6, 8), []
    for context in (autocast(), torch.autocast("cpu", enabled=False)):
        with context:
            loss, _ = step(*batch)
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(step.parameters()))]))
    cast, exact = gradients
    assert (cast - exact).norm() < 0.03 * exact.norm()
