"""What the tests of torch.compile, torch.export, autocast and CUDA graphs share: a tiny model, and every loss of
log-probabilities on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustloss import (
    LOSSES,
    AOTPairedLoss,
    AOTUnpairedLoss,
    BetaDPOLoss,
    ChiPOLoss,
    CVaR,
    DPOLoss,
    DrDPOLoss,
    GroupDROLoss,
    KLDPOLoss,
    KTOLoss,
    TVDPOLoss,
    linear_sequence_logps,
)
from robustloss.losses import PreferenceLoss

VOCABULARY, WIDTH = 31, 16


def losses_of_logps() -> list[PreferenceLoss]:
    """Fresh ones: some have a state."""
    losses = [
        DPOLoss(),
        DPOLoss(0.3, 0.1, "robust", aggregate=CVaR(0.4)),
        KLDPOLoss(tau=0.1),
        KLDPOLoss(rho=0.1),
        AOTPairedLoss(),
        AOTPairedLoss(sort="soft_kl"),
        AOTPairedLoss(sort="sinkhorn"),
        AOTUnpairedLoss(),
        KTOLoss(),
        DrDPOLoss(),
        TVDPOLoss(),
        ChiPOLoss(),
        BetaDPOLoss(),
        GroupDROLoss(),
    ]
    # WDPO is a function of the embeddings too.
    assert {type(loss) for loss in losses} == {kind for kind in LOSSES.values() if not kind.needs_embeddings}
    return losses


class TinyModel(nn.Module):
    """Hugging Face's shape of a causal language model: a decoder of hidden states, and `lm_head`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        query, key, value = self.attention(F.layer_norm(hidden, (WIDTH,))).chunk(3, -1)
        hidden = hidden + F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + F.gelu(self.mlp(hidden))


class Step(nn.Module):
    """A training step's forward: (loss, metrics) of a batch, as `make_batch`."""

    def __init__(self, loss: PreferenceLoss) -> None:
        super().__init__()
        self.model, self.loss = TinyModel(), loss

    def logps(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return linear_sequence_logps(self.model(input_ids), self.model.lm_head.weight, labels, shift=True)

    def forward(
        self, tokens: tuple[tuple[Tensor, Tensor], ...], refs: tuple[Tensor, ...], others: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps = [self.logps(*side) for side in tokens]
        return self.loss(*logps, *refs, **others, return_metrics=True)


def make_batch(loss: PreferenceLoss, B: int, T: int) -> tuple:
    """The arguments of `Step.forward`: B pairs or completions of T tokens, the first of them a prompt."""
    generator = torch.Generator().manual_seed(B)

    def tokens() -> tuple[Tensor, Tensor]:
        ids = torch.randint(VOCABULARY, (B, T), generator=generator)
        labels = ids.clone()
        labels[:, :2] = -100
        labels[0, -1] = -100
        return ids, labels

    sides = 2 if loss.paired else 1
    refs = tuple(-3.0 * T + torch.randn(B, generator=generator) for _ in range(sides))
    others = {}
    if not loss.paired:
        others["desirable"] = torch.arange(B) % 3 > 0
    if loss.needs_groups:
        others["groups"] = torch.arange(B) % 2
    if loss.needs_mismatched:
        others["kl_logratios"] = torch.randn(B, generator=generator)
    return tuple(tokens() for _ in range(sides)), refs, others
