"""`linear_sequence_logps`: log-probabilities of sequences from hidden states [B, T, H] and the output head [V, H].

Passes
    forward                            log-probabilities, without gradient
    forward+backward                   per-sequence log-probabilities, then any gradient per sequence
    forward+backward, known gradient   their sum, so that a contestant may use its gradient in the forward
    forward+backward, frozen head      hidden states want a gradient, the weight does not (LoRA)
All labels count.

Work: flops of the products that the pass cannot do without: 2 N H V for the logits and as much for each gradient, so 2,
4 or 6 (N = B T). A contestant that computes the logits again does more than it is credited for.

Ceiling: the matrix products that robustloss does, alone, into memory that is there: 2, 4 or 6 N H V, and 2 more for the
tokens beyond the first H where the gradient comes later than the forward (the logits of the first H wait in the
weight's gradient; others are computed twice). Passes are held against it by their time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import FORWARD, TRAINING, Absent, Case, Peer, Problem, Shape, Suite, compiled, ours
from .results import OURS, PRODUCTS
from .sequence_logps import (
    GPU_TOKENS_AND_VOCABULARY,
    LogitsFunction,
    cross_entropy,
    log_softmax_gather,
    logsumexp_gather,
    trl_selective,
)

HeadFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

KNOWN, FROZEN = "forward+backward, known gradient", "forward+backward, frozen head"
# N H V times this: what a pass cannot do without.
LEAST_FLOPS = {FORWARD: 2, FROZEN: 4, KNOWN: 6, TRAINING: 6}


@dataclass(frozen=True)
class Head:
    """A contestant, a function of (hidden, weight, labels); None for what it does not offer."""

    logps: HeadFunction | None = None  # [B], for any later gradient
    loss: HeadFunction | None = None  # -sum of all, whose gradient is known in the forward, which some use


def _after_linear(function: LogitsFunction) -> Head:
    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function(F.linear(hidden, weight), labels)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")

    return Head(logps, loss if function is cross_entropy else None)


EAGER = {
    "linear + log_softmax + gather": _after_linear(log_softmax_gather),
    "linear + logsumexp + gather": _after_linear(logsumexp_gather),
    "linear + F.cross_entropy": _after_linear(cross_entropy),
}


def _compiled(head: Head) -> Head:
    return Head(compiled(head.logps), None if head.loss is None else compiled(head.loss))


def _ours() -> Head:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        cotangent = torch.full((len(labels),), -1.0, device=hidden.device)
        return ours("linear_sequence_logps_with_cotangent")(hidden, weight, labels, cotangent)[0]

    return Head(ours("linear_sequence_logps"), loss)


def _by_token(function: HeadFunction, sign: int = 1) -> HeadFunction:
    """For functions of [N, H], [V, H] and [N] that return [N]."""

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return sign * function(hidden.flatten(0, 1), weight, labels.flatten()).view_as(labels).sum(-1)

    return logps


def _by_loss(function: HeadFunction) -> HeadFunction:
    return lambda hidden, weight, labels: function(hidden.flatten(0, 1), weight, labels.flatten())


def _torch_linear(chunked: bool) -> Head:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")

    def function(reduction: str) -> HeadFunction:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, options=options
        )

    return Head(_by_token(function("none"), sign=-1), _by_loss(function("sum")))


def _trl_chunked() -> Head:
    utilities = importlib.import_module("trl.trainer.utils")
    function = utilities._ChunkedLogProbFunction
    chunk_size = utilities._CHUNKED_LOGPROB_CHUNK_SIZE

    def by_token(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # bias, temperature, softcap and logit scale as TRL's own fused head passes them; no statistics asked for.
        return function.apply(hidden, weight, None, labels, 1.0, chunk_size, None, 1.0, ())[0]

    # TRL's loss, too, is the sum of these.
    return Head(_by_token(by_token), _by_loss(lambda hidden, weight, labels: -by_token(hidden, weight, labels).sum()))


def _liger() -> Head:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    if not torch.cuda.is_available():
        raise Absent("its kernels are Triton's, which need a GPU")

    def function(reduction: str) -> HeadFunction:
        module = loss(reduction=reduction)
        return lambda hidden, weight, labels: module(weight, hidden, labels)

    return Head(_by_token(function("none"), sign=-1), _by_loss(function("sum")))


def _cut_cross_entropy() -> Head:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def function(reduction: str) -> HeadFunction:
        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            # Its kernels are Triton's; what it offers elsewhere is torch.compile of the eager linear op.
            implementation = "cce" if hidden.is_cuda else "torch_compile"
            return linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=implementation)

        return call

    return Head(_by_token(function("none"), sign=-1), _by_loss(function("sum")))


class LinearSequenceLogps(Suite):
    op = "linear_sequence_logps"
    cpu_shapes: ClassVar = [{"B": 2, "T": 512, "V": 32_000, "H": 1024}]
    gpu_shapes: ClassVar = [{"B": n // 1024, "T": 1024, "V": v, "H": 4096} for n, v in GPU_TOKENS_AND_VOCABULARY]
    tiny_shape: ClassVar = {"B": 2, "T": 32, "V": 512, "H": 128}
    peers: ClassVar = {
        OURS: Peer(_ours),
        "torch linear_cross_entropy, chunked": Peer(lambda: _torch_linear(chunked=True)),
        "torch linear_cross_entropy": Peer(lambda: _torch_linear(chunked=False)),
        "TRL ChunkedLogProbFunction": Peer(_trl_chunked),
        "Liger fused linear cross entropy": Peer(_liger),
        "cut-cross-entropy": Peer(_cut_cross_entropy, compiled=not torch.cuda.is_available()),
        **{name: Peer(lambda head=head: head) for name, head in EAGER.items()},
        "linear + TRL selective_log_softmax": Peer(lambda: _after_linear(trl_selective())),
        **{
            f"torch.compile({name})": Peer(lambda head=head: _compiled(head), compiled=True)
            for name, head in EAGER.items()
        },
    }

    def dtypes(self, on_gpu: bool) -> tuple[str, ...]:
        return ("bfloat16",) if on_gpu else ("float32", "bfloat16")

    def passes(self, dtype: str, on_gpu: bool) -> tuple[str, ...]:
        # In bfloat16 on a CPU the other two would take minutes to say nothing new.
        return (FORWARD, FROZEN, KNOWN, TRAINING) if on_gpu or dtype == "float32" else (FORWARD, TRAINING)

    def ceilings(self, pass_name: str) -> tuple[str, ...]:
        return (PRODUCTS,)

    def compiles(self, case: Case, on_gpu: bool) -> bool:
        # On a CPU in the passes in which anything could be fused.
        return on_gpu or case.pass_name in (FORWARD, TRAINING)

    def work(self, case: Case) -> tuple[float, str]:
        B, T, V, H = case.shape.values()
        rows = LEAST_FLOPS[case.pass_name] * B * T
        if case.is_ceiling and case.pass_name == TRAINING:
            rows += 2 * tokens_twice(case.shape)
        return rows * H * V, "TFLOP/s"

    def reference(self) -> Head:
        def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return log_softmax_gather(F.linear(hidden.float(), weight.float()), labels)

        return Head(logps, lambda *arguments: -logps(*arguments).sum())

    def problem(self, case: Case, head: Head | None, device: torch.device) -> Problem:
        B, T, V, H = case.shape.values()
        dtype = getattr(torch, case.dtype)
        hidden = torch.randn(B, T, H, device=device, dtype=dtype)
        # Logits of standard deviation 3, as in the row op.
        weight = torch.randn(V, H, device=device, dtype=dtype).mul_(3 * H**-0.5)
        labels = torch.randint(V, (B, T), device=device)
        cotangent = torch.randn(B, device=device)
        if head is None:
            return _products_problem(case, hidden.flatten(0, 1), weight)

        if head.logps is None and case.pass_name != KNOWN:
            raise Absent("it returns no log-probabilities, only their sum")
        if head.loss is None and case.pass_name == KNOWN:
            raise Absent(f"it has nothing of its own for a known gradient: see {TRAINING}")
        hidden.requires_grad_(case.pass_name != FORWARD)
        weight.requires_grad_(case.pass_name in (TRAINING, KNOWN))
        wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [head.logps(hidden, weight, labels)]

        def any_gradient() -> list[Tensor]:
            logps = head.logps(hidden, weight, labels)
            return list(torch.autograd.grad(logps, wanted, cotangent.to(logps.dtype)))

        def known_gradient() -> list[Tensor]:
            return list(torch.autograd.grad(head.loss(hidden, weight, labels), wanted))

        run = {FORWARD: forward, KNOWN: known_gradient}.get(case.pass_name, any_gradient)
        return Problem(run, [hidden, weight, labels, cotangent])


def tokens_twice(shape: Shape) -> int:
    """Tokens whose logits do not fit the weight's gradient to wait there for a gradient that comes later."""
    return max(shape["B"] * shape["T"] - shape["H"], 0)


def _products_problem(case: Case, hidden: Tensor, weight: Tensor) -> Problem:
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> list[Tensor]:
        torch.mm(hidden, weight.T, out=logits)
        if case.pass_name == TRAINING and tokens_twice(case.shape):
            torch.mm(hidden[case.shape["H"] :], weight.T, out=logits[case.shape["H"] :])
        if case.pass_name != FORWARD:
            torch.mm(logits, weight, out=grad_hidden)
        if case.pass_name in (KNOWN, TRAINING):
            torch.mm(logits.T, hidden, out=grad_weight)
        return []

    return Problem(run, [hidden, weight])


SUITE = LinearSequenceLogps()
