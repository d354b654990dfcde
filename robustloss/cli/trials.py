"""A call of each op on a device, and what its definition gives: small enough to take milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robustloss import functional, losses, sorting
from robustloss.naive.sinkhorn_sort import sinkhorn_sort as naive_sinkhorn_sort
from robustloss.naive.soft_sort import soft_rank as naive_soft_rank
from robustloss.naive.soft_sort import soft_sort as naive_soft_sort

_generator = torch.Generator().manual_seed(0)
LOGITS, REF_LOGITS = (torch.randn(2, 5, 97, generator=_generator) for _ in range(2))
HIDDEN, WEIGHT = torch.randn(2, 5, 16, generator=_generator), torch.randn(97, 16, generator=_generator)
LABELS = torch.randint(97, (2, 5), generator=_generator)
LOGPS = torch.randn(4, 33, generator=_generator).unbind()  # of chosen and rejected, the policy's and the reference's
VALUES = torch.randn(33, generator=_generator)


def _of_labels(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)


def token_logps(device: str) -> tuple[Any, Tensor]:
    return functional.token_logps(LOGITS.to(device), LABELS.to(device)), _of_labels(LOGITS)


def token_logratios(device: str) -> tuple[Any, Tensor]:
    found = functional.sequence_logratios(LOGITS.to(device), REF_LOGITS.to(device), LABELS.to(device))
    return found, (_of_labels(LOGITS) - _of_labels(REF_LOGITS)).sum(-1)


def linear_token_logps(device: str) -> tuple[Any, Tensor]:
    found = functional.linear_sequence_logps(HIDDEN.to(device), WEIGHT.to(device), LABELS.to(device))
    return found, _of_labels(HIDDEN @ WEIGHT.T).sum(-1)


def preference_loss(device: str) -> tuple[Any, Tensor]:
    found = losses.KLDPOLoss(beta=1.0, tau=0.5)(*(logps.to(device) for logps in LOGPS))
    each = softplus(-((LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3])))
    return found, (each.div(0.5).softmax(0) * each).sum()


def sorted_transport(device: str) -> tuple[Any, Tensor]:
    found = losses.AOTPairedLoss(beta=1.0)(*(logps.to(device) for logps in LOGPS))
    margins = (LOGPS[0] - LOGPS[1]).sort().values - (LOGPS[2] - LOGPS[3]).sort().values
    return found, softplus(-margins).mean()


def soft_sort(device: str) -> tuple[Any, Tensor]:
    return sorting.soft_sort(VALUES.to(device)), naive_soft_sort(VALUES)[0]


def soft_rank(device: str) -> tuple[Any, Tensor]:
    return sorting.soft_rank(VALUES.to(device)), naive_soft_rank(VALUES)[0]


def sinkhorn_sort(device: str) -> tuple[Any, Tensor]:
    return sorting.sinkhorn_sort(VALUES.to(device), strength=0.01), naive_sinkhorn_sort(VALUES[None], strength=0.01)[0]


TRIALS = {
    trial.__name__: trial
    for trial in (
        token_logps,
        token_logratios,
        linear_token_logps,
        preference_loss,
        sorted_transport,
        soft_sort,
        soft_rank,
        sinkhorn_sort,
    )
}
