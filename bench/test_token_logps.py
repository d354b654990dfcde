"""Log-probabilities of sequences from their logits, on the CPU: time against what people write in eager PyTorch.

GB/s counts the bytes that the task must move at least (forward: one read of the logits; backward: another read and one
write), so the plain read and the plain copy show how much of the machine's bandwidth is used.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustloss.functional import sequence_logps

B, T, V = 2, 512, 32_000
DTYPES = [torch.float32, torch.bfloat16]


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)


def logsumexp_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).sum(-1)


def inplace(logits: Tensor, labels: Tensor) -> Tensor:
    return sequence_logps(logits, labels, inplace_backward=True)


def plain_read(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.view(torch.int32).amax()


def plain_copy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.detach().clone()


EAGER = {
    "log_softmax + gather": log_softmax_gather,
    "logsumexp + gather": logsumexp_gather,
    "F.cross_entropy(none)": cross_entropy,
}
FORWARD = {"robustloss": sequence_logps, **EAGER, "plain read": plain_read}
TRAINING = {"robustloss": sequence_logps, "robustloss in place": inplace, **EAGER}


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def sample(request) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, T, V, generator=generator)
    return logits.to(request.param), torch.randint(V, (B, T), generator=generator)


def title(what: str, logits: Tensor) -> str:
    return f"sequence_logps {what}, {str(logits.dtype).removeprefix('torch.')} [{B}, {T}, {V}]"


@pytest.mark.parametrize("contestant", FORWARD)
def test_forward(measure, sample, contestant):
    logits, labels = sample
    measure(
        title("forward", logits),
        contestant,
        torch.no_grad()(FORWARD[contestant]),
        setup=lambda: (logits, labels),
        least_bytes=logits.nbytes,
    )


@pytest.mark.parametrize("contestant", [*TRAINING, "plain copy"])
def test_forward_and_backward(measure, sample, contestant):
    base, labels = sample
    leaf = base.detach().requires_grad_()

    def forward_and_backward(logits: Tensor, labels: Tensor) -> Tensor:
        if contestant == "plain copy":
            return plain_copy(logits, labels)
        return torch.autograd.grad(TRAINING[contestant](logits, labels).sum(), logits)[0]

    measure(
        title("forward + backward", base),
        contestant,
        forward_and_backward,
        # Like the output of a model: no leaf, and new each time because the in-place backward overwrites it.
        setup=lambda: (leaf.clone(), labels),
        least_bytes=base.nbytes * (2 if contestant == "plain copy" else 3),
    )
