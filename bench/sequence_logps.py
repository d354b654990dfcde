"""`sequence_logps`: log-probabilities of sequences from their logits, logps(logits [B, T, V], labels [B, T]) -> [B].

Passes: forward (without gradient); forward+backward (any gradient per sequence); on a GPU also the backward alone, its
forward untimed. All labels count.

Work: bytes of one read of the logits (forward), a read and a write (backward), or all three, N V each (N = B T).

Ceilings: a plain read and a plain copy of the logits, in GB/s. The forward is held against the faster of the two, other
passes against the copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import BACKWARD, FORWARD, TRAINING, Absent, Case, Peer, Problem, Suite, compiled, ours
from .results import COPY, OURS, READ

LogitsFunction = Callable[[Tensor, Tensor], Tensor]

# N and V of models that people train, for the linear op too.
GPU_TOKENS_AND_VOCABULARY = [(8192, 32_000), (8192, 128_256), (8192, 151_936), (4096, 256_000)]
# Passes over the logits that a pass needs at least.
TRAFFIC = {READ: 1, COPY: 2, FORWARD: 1, BACKWARD: 2, TRAINING: 3}
IN_PLACE = f"{OURS} in place"


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)


def logsumexp_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).sum(-1)


EAGER = {
    "log_softmax + gather": log_softmax_gather,
    "logsumexp + gather": logsumexp_gather,
    "F.cross_entropy(none)": cross_entropy,
}


def trl_selective() -> LogitsFunction:
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda logits, labels: selective_log_softmax(logits, labels).sum(-1)


def _flash_attention() -> LogitsFunction:
    cross_entropy_loss = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda logits, labels: -cross_entropy_loss(logits.flatten(0, 1), labels.flatten())[0].view_as(labels).sum(-1)


def _ours_in_place() -> LogitsFunction:
    sequence_logps = ours("sequence_logps")
    return lambda logits, labels: sequence_logps(logits, labels, inplace_backward=True)


class _HandOver(torch.autograd.Function):
    """Logits as a model hands them over: no leaf, already in memory, and free to be overwritten."""

    @staticmethod
    def forward(ctx, anchor: Tensor, buffer: Tensor) -> Tensor:
        # Not a view, so that its version counter is its own: each round's graph starts anew.
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, buffer.shape, buffer.stride())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


class SequenceLogps(Suite):
    op = "sequence_logps"
    cpu_shapes: ClassVar = [{"B": 2, "T": 512, "V": 32_000}, {"B": 2, "T": 128, "V": 151_936}]
    gpu_shapes: ClassVar = [{"B": n // 1024, "T": 1024, "V": v} for n, v in GPU_TOKENS_AND_VOCABULARY]
    tiny_shape: ClassVar = {"B": 2, "T": 32, "V": 512}
    peers: ClassVar = {
        OURS: Peer(lambda: ours("sequence_logps")),
        IN_PLACE: Peer(_ours_in_place),
        **{name: Peer(lambda function=function: function) for name, function in EAGER.items()},
        "TRL selective_log_softmax": Peer(trl_selective),
        "flash-attn cross_entropy_loss": Peer(_flash_attention),
        **{
            f"torch.compile({name})": Peer(lambda function=function: compiled(function), compiled=True)
            for name, function in EAGER.items()
        },
    }

    def dtypes(self, on_gpu: bool) -> tuple[str, ...]:
        return ("bfloat16",) if on_gpu else ("float32", "bfloat16")

    def passes(self, dtype: str, on_gpu: bool) -> tuple[str, ...]:
        return (FORWARD, BACKWARD, TRAINING) if on_gpu else (FORWARD, TRAINING)

    def ceilings(self, pass_name: str) -> tuple[str, ...]:
        return (READ, COPY) if pass_name == FORWARD else (COPY,)

    def compiles(self, case: Case, on_gpu: bool) -> bool:
        return on_gpu or case.shape != self.cpu_shapes[1]

    def work(self, case: Case) -> tuple[float, str]:
        B, T, V = case.shape.values()
        passes = TRAFFIC[case.peer if case.is_ceiling else case.pass_name]
        return passes * B * T * V * getattr(torch, case.dtype).itemsize, "GB/s"

    def reference(self) -> LogitsFunction:
        return lambda logits, labels: log_softmax_gather(logits.float(), labels)

    def problem(self, case: Case, function: LogitsFunction | None, device: torch.device) -> Problem:
        B, T, V = case.shape.values()
        buffer = torch.randn(B, T, V, device=device, dtype=getattr(torch, case.dtype)).mul_(3)
        labels = torch.randint(V, (B, T), device=device)
        cotangent = torch.randn(B, device=device)
        anchor = torch.zeros((), device=device, requires_grad=True)
        if function is None:
            return _traffic_problem(case, buffer)

        def logits_and_logps() -> tuple[Tensor, Tensor]:
            logits = _HandOver.apply(anchor, buffer)
            return logits, function(logits, labels)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function(buffer, labels)]

        def training() -> list[Tensor]:
            logits, logps = logits_and_logps()
            return [torch.autograd.grad(logps, logits, cotangent.to(logps.dtype))[0]]

        run = {FORWARD: forward, TRAINING: training}.get(case.pass_name)
        if case.pass_name == BACKWARD:
            if case.peer == IN_PLACE or case.peer.startswith("torch.compile"):
                raise Absent("its backward runs once only, as it reuses the memory of its forward")
            logits, logps = logits_and_logps()
            logps_cotangent = cotangent.to(logps.dtype)

            def run() -> list[Tensor]:
                return list(torch.autograd.grad(logps, logits, logps_cotangent, retain_graph=True))

        refill = None
        # On a CPU all start from logits just written. On a GPU, whose kernels take no branch by value, nothing is
        # refilled.
        if device.type == "cpu" and case.pass_name != BACKWARD:
            source = buffer.clone()

            def refill() -> None:
                buffer.copy_(source)

        return Problem(run, [buffer, labels, cotangent], refill)


def _traffic_problem(case: Case, buffer: Tensor) -> Problem:
    if case.peer == READ:
        # The fastest of torch's reductions over the same bytes: no NaN to look for, and few elements.
        words = buffer.view(torch.int64)
        return Problem(lambda: [words.amax()], [buffer])
    target = torch.empty_like(buffer)
    return Problem(lambda: [target.copy_(buffer)], [buffer, target])


SUITE = SequenceLogps()
