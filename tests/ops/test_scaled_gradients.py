"""The autograd of the ops that return gradients with their value: in C++, and in Python where that was not built."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from robustloss.ops._library import HAS_EXTENSION
from robustloss.ops.preference_loss import preference_loss
from robustloss.ops.sorted_transport import sorted_transport


def paired_loss(chosen, rejected, ref_chosen, ref_rejected):
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, None, "logistic", 0.7, 0.0, "kl_ball", 0.3, math.inf
    )


def transport(u, u_ref, v, v_ref):
    return sorted_transport(u, u_ref, v, v_ref, None, None, None, "logistic", 0.7, 0.0)


# The op as a function of four vectors, and how many of them it is differentiable by.
OPS = [(paired_loss, 2), (transport, 4)]


def samples(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return list((3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype))


def differentiable(vectors, which):
    return [x.detach().requires_grad_(i in which) for i, x in enumerate(vectors)]


def check_derivatives(op, n):
    """Both orders, whichever of the samples ask for them."""
    for count in (1, n):
        for which in itertools.combinations(range(n), count):
            inputs = differentiable(samples(), which)
            assert torch.autograd.gradcheck(lambda *x: op(*x)[0], inputs)
            assert torch.autograd.gradgradcheck(lambda *x: op(*x)[0], inputs)


def check_constants(op, n):
    inputs = differentiable(samples(), range(4))
    value, *others = op(*inputs)
    assert not any(x.requires_grad for x in others)
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    assert [x is None for x in grads] == [i >= n for i in range(4)]
    with torch.no_grad():
        assert not op(*inputs)[0].requires_grad


def check_dtypes(op, n):
    """The gradient is scaled in the value's dtype, then each sample gets its own."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float32)
    inputs = [x.to(dtype) for x, dtype in zip(samples(), dtypes, strict=True)]
    inputs = differentiable(inputs, range(n))
    value, *gradients = op(*inputs)
    for create_graph in (False, True):
        grads = torch.autograd.grad(value, inputs[:n], torch.tensor(-2.5), create_graph=create_graph)
        assert [x.dtype for x in grads] == [*dtypes[:n]]
        assert all(x.requires_grad is create_graph for x in grads)
        for i, grad in enumerate(grads):
            expected = (-1) ** i * -2.5 * gradients[i // 2]
            tolerances = {"rtol": 1e-5, "atol": 1e-6} if create_graph else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(grad.detach().float(), expected.to(grad.dtype).float(), **tolerances)
        value = op(*inputs)[0]


def check_saved_tensors(op, n):
    """Hooks see them, checkpoints drop and recompute them, and one backward frees them."""
    inputs = differentiable(samples(), range(n))
    expected = torch.autograd.grad(op(*inputs)[0], inputs[:n])
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
        value = op(*inputs)[0]
    assert packed
    checkpointed = checkpoint(lambda *x: op(*x)[0], *inputs, use_reentrant=False)
    for result in (value, checkpointed):
        assert all(map(torch.equal, torch.autograd.grad(result, inputs[:n]), expected))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, inputs[:n])


def check_compilation(op, n):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: op(*x)[0], fullgraph=True, backend="aot_eager")
    inputs = differentiable(samples(), range(n))
    got, expected = (
        torch.autograd.grad(function(*inputs), inputs[:n]) for function in (compiled, lambda *x: op(*x)[0])
    )
    assert all(map(torch.equal, got, expected))


CHECKS = [check_derivatives, check_constants, check_dtypes, check_saved_tensors, check_compilation]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("op", "n"), OPS)
def test_scaled_gradients(op, n, check):
    check(op, n)


WITHOUT_EXTENSION = """
import sys
sys.modules["robustloss._C"] = None
from tests.ops.test_scaled_gradients import CHECKS, HAS_EXTENSION, OPS
assert not HAS_EXTENSION
for op, n in OPS:
    for check in CHECKS:
        check(op, n)
"""


@pytest.mark.skipif(not HAS_EXTENSION, reason="nothing else to compare with")
def test_scaled_gradients_without_the_extension():
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_EXTENSION], check=True)


@pytest.mark.skipif(not HAS_EXTENSION, reason="the Python registration leaves it to torch")
@pytest.mark.parametrize(("op", "n"), OPS)
def test_a_forward_derivative_is_refused_and_not_zero(op, n):
    inputs = samples()
    with torch.autograd.forward_ad.dual_level():
        inputs[n - 1] = torch.autograd.forward_ad.make_dual(inputs[n - 1], torch.ones_like(inputs[n - 1]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            op(*inputs)
