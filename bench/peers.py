"""The contestants: robustloss and what people use today, behind one call per op.

    sequence_logps:        logps(logits [B, T, V], labels [B, T]) -> [B]
    linear_sequence_logps: logps(hidden [B, T, H], weight [V, H], labels [B, T]) -> [B], for any later gradient, and
                           loss(hidden, weight, labels) -> scalar -sum of all log-probabilities, whose gradient is known
                           in the forward, which some contestants use

A contestant is loaded only when it is measured. One that does not import, or lacks what a pass needs, raises, and the
suite lists it as absent with that reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
HeadFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "robustloss"


class Absent(Exception):
    """The contestant cannot do what is asked; the message says why."""


@dataclass(frozen=True)
class Peer:
    load: Callable[[], LogitsFunction | Head]
    compiled: bool = False  # by torch.compile: the first call at a shape compiles


@dataclass(frozen=True)
class Head:
    """A linear contestant; None for what it does not offer."""

    logps: HeadFunction | None = None
    loss: HeadFunction | None = None


def sequence_peers() -> dict[str, Peer]:
    eager = {
        "log_softmax + gather": log_softmax_gather,
        "logsumexp + gather": logsumexp_gather,
        "F.cross_entropy(none)": cross_entropy,
    }
    return {
        OURS: Peer(_ours),
        f"{OURS} in place": Peer(_ours_in_place),
        **{name: Peer(lambda function=function: function) for name, function in eager.items()},
        "TRL selective_log_softmax": Peer(_trl_selective),
        "flash-attn cross_entropy_loss": Peer(_flash_attention),
        **{
            f"torch.compile({name})": Peer(lambda function=function: _compile(function), compiled=True)
            for name, function in eager.items()
        },
    }


def linear_peers() -> dict[str, Peer]:
    eager = {
        "linear + log_softmax + gather": log_softmax_gather,
        "linear + logsumexp + gather": logsumexp_gather,
        "linear + F.cross_entropy": cross_entropy,
    }
    heads = {name: _after_linear(function) for name, function in eager.items()}
    return {
        OURS: Peer(_ours_linear),
        "torch linear_cross_entropy, chunked": Peer(lambda: _torch_linear(chunked=True)),
        "torch linear_cross_entropy": Peer(lambda: _torch_linear(chunked=False)),
        "TRL ChunkedLogProbFunction": Peer(_trl_chunked),
        "Liger fused linear cross entropy": Peer(_liger),
        "cut-cross-entropy": Peer(_cut_cross_entropy, compiled=not torch.cuda.is_available()),
        **{name: Peer(lambda head=head: head) for name, head in heads.items()},
        "linear + TRL selective_log_softmax": Peer(lambda: _after_linear(_trl_selective())),
        **{
            f"torch.compile({name})": Peer(lambda head=head: _compile_head(head), compiled=True)
            for name, head in heads.items()
        },
    }


# ---- eager ----------------------------------------------------------------------------------------------------------


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)


def logsumexp_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).sum(-1)


def _after_linear(function: LogitsFunction) -> Head:
    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function(F.linear(hidden, weight), labels)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")

    return Head(logps, loss if function is cross_entropy else None)


def _compile(function: Callable) -> Callable:
    # Without the reset a second shape would be compiled for all shapes, or not at all after eight of them.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _compile_head(head: Head) -> Head:
    return Head(_compile(head.logps), None if head.loss is None else _compile(head.loss))


# ---- robustloss -----------------------------------------------------------------------------------------------------


def _ours() -> LogitsFunction:
    return importlib.import_module("robustloss.functional").sequence_logps


def _ours_in_place() -> LogitsFunction:
    sequence_logps = _ours()
    return lambda logits, labels: sequence_logps(logits, labels, inplace_backward=True)


def _ours_linear() -> Head:
    functional = importlib.import_module("robustloss.functional")

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if not hasattr(functional, "linear_sequence_logps_with_cotangent"):
            raise Absent("this robustloss has no linear_sequence_logps_with_cotangent")
        cotangent = torch.full((len(labels),), -1.0, device=hidden.device)
        return functional.linear_sequence_logps_with_cotangent(hidden, weight, labels, cotangent)[0]

    return Head(functional.linear_sequence_logps, loss)


# ---- libraries ------------------------------------------------------------------------------------------------------


def _by_token(function: Callable[[Tensor, Tensor, Tensor], Tensor], sign: int = 1) -> HeadFunction:
    """For functions of [N, H], [V, H] and [N] that return [N]."""

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return sign * function(hidden.flatten(0, 1), weight, labels.flatten()).view_as(labels).sum(-1)

    return logps


def _by_loss(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> HeadFunction:
    return lambda hidden, weight, labels: function(hidden.flatten(0, 1), weight, labels.flatten())


def _torch_linear(chunked: bool) -> Head:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")

    def function(reduction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, options=options
        )

    return Head(_by_token(function("none"), sign=-1), _by_loss(function("sum")))


def _trl_selective() -> LogitsFunction:
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda logits, labels: selective_log_softmax(logits, labels).sum(-1)


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

    def function(reduction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        module = loss(reduction=reduction)
        return lambda hidden, weight, labels: module(weight, hidden, labels)

    return Head(_by_token(function("none"), sign=-1), _by_loss(function("sum")))


def _cut_cross_entropy() -> Head:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def function(reduction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            # Its kernels are Triton's; what it offers elsewhere is torch.compile of the eager linear op.
            implementation = "cce" if hidden.is_cuda else "torch_compile"
            return linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=implementation)

        return call

    return Head(_by_token(function("none"), sign=-1), _by_loss(function("sum")))


def _flash_attention() -> LogitsFunction:
    cross_entropy_loss = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda logits, labels: -cross_entropy_loss(logits.flatten(0, 1), labels.flatten())[0].view_as(labels).sum(-1)
