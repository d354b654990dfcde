"""WDPO: DPO and the gradient penalty of [W] Alg. 1 and App. F, through a small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustloss import DPOLoss, WDPOLoss
from robustloss.naive.sequence_logps import sequence_logps

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
B, T, V, H = 3, 4, 6, 2


class TinyModel(nn.Module):
    """Embedding, tanh of a running mean, head: enough for a loss that is curved in embeddings and parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, H, dtype=torch.float64))
        self.mixer = nn.Parameter(torch.randn(H, H, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(V, H, dtype=torch.float64))

    def logps(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, T + 1, dtype=inputs.dtype).view(-1, 1)
        hidden = torch.tanh((inputs.cumsum(1) / steps) @ self.mixer)
        return sequence_logps(hidden @ self.head.t(), labels, shift=True)


MODEL = TinyModel()
TOKENS = torch.randint(V, (2 * B, T), generator=torch.Generator().manual_seed(1))
REFERENCE = -6 + torch.randn(2 * B, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)


def exact(**options) -> WDPOLoss:
    return WDPOLoss(0.5, penalty="exact", **options)


def forward(loss: WDPOLoss, parameters: tuple[torch.Tensor, ...] | None = None, **options):
    embedding, mixer, head = tuple(MODEL.parameters()) if parameters is None else parameters
    inputs = embedding[TOKENS]
    steps = torch.arange(1, T + 1, dtype=torch.float64).view(-1, 1)
    hidden = torch.tanh((inputs.cumsum(1) / steps) @ mixer)
    logps = sequence_logps(hidden @ head.t(), TOKENS, shift=True)
    return loss(*logps.chunk(2), *REFERENCE.chunk(2), embeddings=inputs, **options)


def slow_penalties(beta: float) -> torch.Tensor:
    """||grad_z l_i||^2, one pair and one backward at a time."""
    norms = []
    for pair in range(B):
        rows = torch.tensor([pair, pair + B])
        inputs = MODEL.embedding[TOKENS[rows]].detach().requires_grad_()
        chosen, rejected = MODEL.logps(inputs, TOKENS[rows])
        loss = DPOLoss(beta)(chosen[None], rejected[None], *REFERENCE[rows, None])
        norms.append(torch.autograd.grad(loss, inputs)[0].square().sum())
    return torch.stack(norms)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("squared", [True, False])
def test_the_loss_is_dpo_and_the_penalty_of_each_pairs_own_gradient(squared, weights):
    value, metrics = forward(exact(rho=0.3, squared=squared), weights=weights, return_metrics=True)
    logps = MODEL.logps(MODEL.embedding[TOKENS], TOKENS)
    plain = DPOLoss(0.5)(*logps.chunk(2), *REFERENCE.chunk(2), weights=weights)
    q = torch.ones(B, dtype=torch.float64) if weights is None else weights
    mean = (q * slow_penalties(0.5)).sum() / q.sum()
    penalty = 0.3 * (mean if squared else mean.sqrt())
    torch.testing.assert_close(value, plain + penalty, **CLOSE)
    torch.testing.assert_close(metrics["penalty/value"], penalty, **CLOSE)
    torch.testing.assert_close(metrics["penalty/gradient_norm"], mean.sqrt(), **CLOSE)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("squared", [True, False])
def test_the_gradient_of_the_whole_loss_matches_finite_differences(squared, weights):
    parameters = tuple(p.detach().clone().requires_grad_() for p in MODEL.parameters())
    loss = exact(rho=2.0, squared=squared)
    assert torch.autograd.gradcheck(lambda *p: forward(loss, p, weights=weights), parameters)


def test_a_radius_of_zero_is_plain_dpo():
    value = forward(exact(rho=0.0))
    logps = MODEL.logps(MODEL.embedding[TOKENS], TOKENS)
    torch.testing.assert_close(value, DPOLoss(0.5)(*logps.chunk(2), *REFERENCE.chunk(2)), **CLOSE)


def test_the_squared_penalty_of_a_batch_is_the_mean_of_its_pairs():
    """So it accumulates over microbatches and data-parallel ranks like plain DPO; the rooted one does not."""
    assert not WDPOLoss().coupled
    assert WDPOLoss(squared=False).coupled
    _, metrics = forward(exact(rho=0.3), return_metrics=True)
    torch.testing.assert_close(metrics["penalty/value"], 0.3 * slow_penalties(0.5).mean(), **CLOSE)


@pytest.mark.parametrize("squared", [True, False])
def test_evaluation_without_gradients_gives_the_same_value(squared):
    loss = exact(rho=0.3, squared=squared)
    inputs = MODEL.embedding[TOKENS].detach().requires_grad_()
    logps = MODEL.logps(inputs, TOKENS).chunk(2)
    with torch.no_grad():
        value, metrics = loss(*logps, *REFERENCE.chunk(2), embeddings=inputs, return_metrics=True)
    assert not value.requires_grad
    torch.testing.assert_close(value, forward(loss).detach(), **CLOSE)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_an_empty_batch_gives_zero():
    inputs = torch.zeros(0, T, H, requires_grad=True)
    logps = inputs.sum((1, 2))
    ref = torch.zeros(0)
    for squared in (True, False):
        value = WDPOLoss(squared=squared, penalty="exact")(logps[:0], logps[:0], ref, ref, embeddings=inputs)
        assert value == 0
