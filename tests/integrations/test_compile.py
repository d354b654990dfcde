"""torch.compile of losses, and of a model with its loss: one graph, compiled once for batches of any size, with eager's
values and gradients."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from compiled_cases import Step, losses_of_logps, make_batch

from robustloss import AOTPairedLoss, BetaDPOLoss, KLDPOLoss, sequence_logps, soft_sort, sorted_transport

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def assert_compiled_once(function, backend, batches, twin=None):
    """`function`, compiled for the first batch, is for all of them what eager mode computes; batches are (arguments,
    what is differentiated by)."""
    twin = function if twin is None else twin
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for index, (arguments, inputs) in enumerate(batches):
        with torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"):
            found = compiled(*arguments)
        expected = twin(*arguments)
        torch.testing.assert_close(found, expected, **CLOSE)
        values = [value[0] if isinstance(value, tuple) else value for value in (found, expected)]
        torch.testing.assert_close(*[torch.autograd.grad(value.sum(), inputs) for value in values], **CLOSE)


def batch_of_logps(loss, B):
    """Log-probabilities in place of tokens."""
    tokens, refs, others = make_batch(loss, B, 5)
    policy = [(-3 * ids.float()).mean(-1).requires_grad_() for ids, _ in tokens]
    return ([*policy, *refs], others), policy


@pytest.mark.parametrize("loss", losses_of_logps(), ids=str)
def test_a_loss_is_one_graph_for_batches_of_any_size(loss):
    twin = copy.deepcopy(loss)
    assert_compiled_once(
        lambda logps, others: loss(*logps, **others, return_metrics=True),
        "aot_eager",
        [batch_of_logps(loss, B) for B in (6, 9, 5)],
        lambda logps, others: twin(*logps, **others, return_metrics=True),
    )
    # Of losses that learn from their batches.
    torch.testing.assert_close(loss.state_dict(), twin.state_dict(), **CLOSE)
    if isinstance(loss, BetaDPOLoss):
        assert loss.batches == 3
        assert loss.margin_mean != 0


def test_a_model_and_its_loss_are_one_graph():
    step = Step(KLDPOLoss(tau=0.1))
    sizes = ((4, 6), (7, 9), (5, 8))
    batches = [(make_batch(step.loss, *size), list(step.parameters())) for size in sizes]
    assert_compiled_once(step, "aot_eager", batches)


@pytest.mark.slow  # the compiler of C++ takes most of it
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler on the CPU")
def test_the_default_backend_agrees_from_logits_to_losses():
    losses = [KLDPOLoss(rho=0.1), AOTPairedLoss(sort="soft_l2")]

    def function(logits, labels, *refs):
        chosen, rejected = (sequence_logps(part, labels, shift=True) for part in logits)
        return sum(loss(chosen, rejected, *refs) for loss in losses)

    batches = []
    for B in (4, 7):
        torch.manual_seed(B)
        logits = torch.randn(2, B, 5, 11, requires_grad=True)
        batches.append(((logits, torch.randint(11, (B, 5)), -12 + torch.randn(B), -12 + torch.randn(B)), logits))
    assert_compiled_once(function, "inductor", batches)


def test_packed_sequences_are_compiled_once_for_any_number_of_them():
    batches = []
    for lengths in ([3, 4], [2, 2, 5], [5, 3, 4, 6]):
        torch.manual_seed(len(lengths))
        logits = torch.randn(sum(lengths), 11, requires_grad=True)
        labels, cu_seqlens = torch.randint(11, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0)
        batches.append(((logits, labels, cu_seqlens), logits))

    def function(logits, labels, cu_seqlens):
        return sequence_logps(logits, labels, cu_seqlens=cu_seqlens, shift=True, average=True)

    assert_compiled_once(function, "aot_eager", batches)


def test_an_option_that_is_refused_is_named():
    compiled = torch.compile(sorted_transport, fullgraph=True, dynamic=True, backend="aot_eager")
    u, v = torch.randn(5), torch.randn(7)
    for beta in (0.1, 0.2):
        torch.testing.assert_close(compiled(u, v, beta=beta), sorted_transport(u, v, beta=beta))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"beta must be > 0, got -0\.1"):
        compiled(u, v, beta=-0.1)


@pytest.mark.parametrize("strict", [False, True])
def test_an_option_may_be_a_symbol(strict):
    """A strength that follows the number of values."""

    class Sort(torch.nn.Module):
        def forward(self, values):
            return soft_sort(values, strength=values.shape[-1] / 4)

    sizes = ({1: torch.export.Dim("n", min=2, max=64)},)
    exported = torch.export.export(Sort(), (torch.randn(3, 6),), dynamic_shapes=sizes, strict=strict).module()
    for values in (torch.randn(3, 6), torch.randn(3, 9)):
        torch.testing.assert_close(exported(values), soft_sort(values, strength=values.shape[-1] / 4))
