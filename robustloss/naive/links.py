r"""Links: how a margin h becomes a loss.

=============== ================================================================ ==================================
link            formula                                                          source
=============== ================================================================ ==================================
logistic        -(1 - e) log s(b h) - e log s(-b h)                              Rafailov 2305.18290; e: Mitchell's cDPO
robust          [-(1 - e) log s(b h) + e log s(-b h)] / (1 - 2 e)                Chowdhury 2403.00409
hinge           max(0, 1 - b h)                                                  Zhao 2305.10425 (SLiC)
squared_hinge   max(0, b - h)^2                                                  [A] section 3
least_squares   (b - h)^2                                                        [A] section 3
ipo             (h - 1 / (2 b))^2                                                Azar 2310.12036
=============== ================================================================ ==================================

s is the logistic sigmoid, b is `beta` (an inverse temperature; [A]'s offset for squared_hinge and least_squares) and
e is `label_smoothing`, the assumed probability that a pair's label is flipped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LINKS = ("logistic", "robust", "hinge", "squared_hinge", "least_squares", "ipo")
SMOOTHED_LINKS = ("logistic", "robust")
OFFSET_LINKS = ("squared_hinge", "least_squares")


def link_loss(margins: Tensor, *, beta: float, link: str = "logistic", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each margin; margins of any shape, in nats."""
    if link == "logistic":
        loss = -F.logsigmoid(beta * margins)
        # softplus(x) = -log s(-x), and -log s(-x) = -log s(x) + x.
        return loss + label_smoothing * beta * margins if label_smoothing else loss
    if link == "robust":
        loss, flipped = -F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins)
        return ((1 - label_smoothing) * loss - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if link == "hinge":
        return torch.relu(1 - beta * margins)
    if link == "squared_hinge":
        return torch.relu(beta - margins).square()
    if link == "least_squares":
        return (beta - margins).square()
    if link == "ipo":
        return (margins - 1 / (2 * beta)).square()
    raise ValueError(f"link must be one of {', '.join(map(repr, LINKS))}, got {link!r}")


def link_slope(margins: Tensor, *, beta: float, link: str = "logistic", label_smoothing: float = 0.0) -> Tensor:
    """The derivative of `link_loss` by each margin; at a kink that of the flat side."""
    if link == "logistic":
        return beta * (label_smoothing - torch.sigmoid(-beta * margins))
    if link == "robust":
        right, flipped = torch.sigmoid(-beta * margins), torch.sigmoid(beta * margins)
        return -beta * ((1 - label_smoothing) * right + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if link == "hinge":
        return -beta * (beta * margins < 1).to(margins.dtype)
    if link == "squared_hinge":
        return -2 * torch.relu(beta - margins)
    if link == "least_squares":
        return -2 * (beta - margins)
    if link == "ipo":
        return 2 * (margins - 1 / (2 * beta))
    raise ValueError(f"link must be one of {', '.join(map(repr, LINKS))}, got {link!r}")
