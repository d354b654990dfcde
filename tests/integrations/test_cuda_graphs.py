"""On a GPU the host never waits for the device: steps queue up, and CUDA graphs capture them.

Without a GPU that is shown on meta tensors, which have no values to look at, by the code that serves CUDA tensors: its
launchers, with kernels that are not run. What asks for a value raises.
"""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_cases import losses_of_logps, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from robustloss import (
    AOTUnpairedLoss,
    WDPOLoss,
    linear_sequence_logps,
    sequence_logps,
    sequence_logratios,
    sinkhorn_sort,
    soft_rank,
    soft_sort,
    sorted_transport,
    token_logps,
)
from robustloss.kernels import sequence_sum
from robustloss.ops._linear_head import Head, kept_tokens

B, T, V, H = 3, 5, 31, 8


class OnMeta(TorchDispatchMode):
    """Runs this library's ops as for CUDA tensors, and refuses data that would come from the host's memory, whose copy
    it waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "robustloss":
            with self:
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made of numbers of the host"
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            assert {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)} == {"meta"}
        return result


@pytest.fixture
def launched(monkeypatch):
    """Kernels are noted, not run."""
    names = []

    def launcher(kernel, grid):
        return lambda *args, **options: names.append(kernel.fn.__name__)

    monkeypatch.setattr(type(sequence_sum.sequence_sum_kernel), "__getitem__", launcher)
    return names


def leaf(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def labels(*shape):
    return torch.empty(shape, dtype=torch.int64, device="meta")


def arguments(loss, size, device="meta"):
    """[policy's log-probabilities], [the reference's], the rest by name."""
    tokens, refs, others = make_batch(loss, size, 5)
    policy = [(-3 * ids.float()).mean(-1).to(device).requires_grad_() for ids, _ in tokens]
    return policy, [ref.to(device) for ref in refs], {name: value.to(device) for name, value in others.items()}


@pytest.mark.parametrize("loss", losses_of_logps(), ids=str)
@pytest.mark.parametrize("size", [6, 20_000], ids=["", "large"])
def test_no_loss_makes_the_host_wait(loss, size, launched):
    policy, refs, others = arguments(loss, size)
    others["weights"] = torch.empty(size, device="meta")
    if getattr(loss, "sort", "hard") != "hard":  # soft sorts take no weights
        del others["weights"]
    loss = copy.deepcopy(loss).to("meta")
    with OnMeta():
        value, metrics = loss(*policy, *refs, **others, return_metrics=True)
        value.backward()
    assert all(number.device.type == "meta" for number in (value, *metrics.values()))
    assert all(logps.grad.shape == (size,) for logps in policy)


def test_exact_wdpo_does_not_make_the_host_wait(launched):
    embeddings = leaf(2 * B, T, H)
    with OnMeta():
        chosen, rejected = embeddings.square().sum((1, 2)).chunk(2)
        loss = WDPOLoss(penalty="exact")
        loss(chosen, rejected, *torch.empty(2, B, device="meta"), embeddings=embeddings).backward()
    assert embeddings.grad is not None


FUNCTIONS = {
    "token_logps": (lambda x: token_logps(x, labels(B, T), shift=True), (B, T, V)),
    "sequence_logps": (lambda x: sequence_logps(x, labels(B, T), shift=True, average=True), (B, T, V)),
    "statistics": (lambda x: sequence_logps(x, labels(B, T), return_statistics=True)[0], (B, T, V)),
    "in place": (lambda x: sequence_logps(x * 1, labels(B, T), inplace_backward=True), (B, T, V)),
    "packed": (lambda x: sequence_logps(x, labels(B * T), cu_seqlens=labels(B + 1), shift=True), (B * T, V)),
    "sequence_logratios": (lambda x: sequence_logratios(x, x.detach(), labels(B, T), shift=True), (B, T, V)),
    "sorted_transport": (lambda x: sorted_transport(x, x[:, :4].detach()), (B, T)),
    "sorted_transport, large": (lambda x: sorted_transport(x, x[:, :9].detach(), u_weights=x.detach()), (1, 20_000)),
    "soft_sort": (soft_sort, (B, T)),
    "soft_rank, large": (lambda x: soft_rank(x, regularization="kl"), (1, 200_000)),
    "sinkhorn_sort": (sinkhorn_sort, (B, T)),
    "sinkhorn_sort, large": (sinkhorn_sort, (1, 3000)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_makes_the_host_wait(name, launched):
    function, shape = FUNCTIONS[name]
    values = leaf(*shape)
    with OnMeta():
        function(values).sum().backward()
    assert values.grad.shape == shape
    assert launched


def test_the_two_that_wait_are_known(launched):
    """Their docstrings say so, and torch.compile(mode="reduce-overhead") is told."""
    loss = AOTUnpairedLoss(sort="soft_l2")
    policy, refs, others = arguments(loss, 6)
    with OnMeta(), pytest.raises(NotImplementedError, match="nonzero"):
        loss(*policy, *refs, **others)
    assert "the host waits" in AOTUnpairedLoss.forward.__doc__

    assert "the host waits" in linear_sequence_logps.__doc__
    head = Head(torch.empty(4, H, device="meta"), torch.empty(V, H, device="meta"), None, None, None)
    with pytest.raises(NotImplementedError, match="nonzero"):
        kept_tokens(head, labels(4), -100)
    ops = torch.ops.robustloss
    for op in (ops.linear_token_logps, ops.linear_token_logps_bwd, ops.frozen_linear_token_logps):
        assert torch.Tag.cudagraph_unsafe in op.default.tags


# ---- with a GPU -----------------------------------------------------------------------------------------------------


def captured_equals_eager(function, inputs, others):
    """A graph of `function(inputs)` and its gradients, replayed on other values, is what eager mode makes of them."""
    twin = copy.deepcopy(function)

    def step(function):
        value = function(*inputs)
        return value, *torch.autograd.grad(value.sum(), [x for x in inputs if x.requires_grad])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for warm in (function, twin):
            step(warm)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(warm)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(function)
    for values in others:
        with torch.no_grad():
            for x, value in zip(inputs, values, strict=True):
                x.copy_(value)
        graph.replay()
        torch.testing.assert_close(results, step(twin), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", losses_of_logps(), ids=str)
@pytest.mark.parametrize("size", [6, 20_000], ids=["", "large"])
def test_a_loss_is_captured_and_replayed(loss, size):
    if size > 6 and getattr(loss, "sort", "hard") == "sinkhorn":
        pytest.skip("a Sinkhorn sort of 20,000 takes n^2 work")
    policy, refs, options = arguments(loss, size, "cuda")

    class Captured(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = copy.deepcopy(loss).cuda()

        def forward(self, *logps):
            return self.loss(*logps, **options, return_metrics=True)[0]

    values = [[torch.randn_like(x) for x in (*policy, *refs)] for _ in range(2)]
    captured_equals_eager(Captured(), [*policy, *refs], values)


@pytest.mark.gpu
def test_log_probabilities_are_captured_and_replayed():
    class Captured(torch.nn.Module):
        def forward(self, logits, labels):
            return sequence_logps(logits, labels, shift=True)

    def batch():
        return [torch.randn(B, T, V, device="cuda"), torch.randint(V, (B, T), device="cuda")]

    logits, ids = batch()
    captured_equals_eager(Captured(), [logits.requires_grad_(), ids], [batch(), batch()])


@pytest.mark.gpu
def test_reduce_overhead_leaves_the_linear_head_out_of_its_graphs():
    torch.compiler.reset()
    hidden, weight = torch.randn(B, T, H, device="cuda", requires_grad=True), torch.randn(V, H, device="cuda")
    ids = torch.randint(V, (B, T), device="cuda")

    def function(hidden):
        return linear_sequence_logps(hidden.sin(), weight, ids, shift=True).exp()

    compiled = torch.compile(function, mode="reduce-overhead")
    for _ in range(4):
        values = compiled(hidden), function(hidden)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*[torch.autograd.grad(value.sum(), hidden) for value in values])
