"""Kahneman-Tversky optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.losses.aggregates import Mean
from robustloss.losses.base import LossOutput, UnpairedLoss, check_logps
from robustloss.validation import check_number, check_same_device


class KTOLoss(UnpairedLoss):
    r"""Desirable completions above, the others below a shared reference point.

    .. math:: l_i = \lambda_D \, (1 - \sigma(\beta (r_i - z_0))) \text{ (desirable)}, \quad
              \lambda_U \, (1 - \sigma(\beta (z_0 - r_i))) \text{ (not)}, \quad z_0 = \max\left(0, \tfrac1K \sum_k
              r'_k\right)

    r' are log-ratios of mismatched pairs (a prompt with another prompt's completion), an estimate of the KL
    divergence from the reference; no gradient flows through z_0. Source: Ethayarajh et al. 2402.01306, section 4.

    Args:
        beta: inverse temperature, > 0.
        desirable_weight, undesirable_weight: lambda_D and lambda_U, >= 0; choose them so that the two classes weigh
            about equally.
        reduction: "mean", or "none" for the losses [B].

    Example:
        >>> policy, reference = torch.tensor([-12.0, -9.0, -20.0]), torch.tensor([-14.0, -9.5, -18.0])
        >>> desirable = torch.tensor([True, True, False])
        >>> KTOLoss(beta=0.1)(policy, reference, desirable)
        tensor(0.4626)
        >>> KTOLoss(beta=0.1)(policy, reference, desirable, kl_logratios=torch.tensor([1.0, 3.0]))  # z_0 = 2
        tensor(0.4796)
    """

    coupled = False
    needs_mismatched = True

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        *,
        reduction: str = "mean",
    ):
        super().__init__(beta, "logistic", 0.0, reduction)
        self.desirable_weight: float = check_number("desirable_weight", desirable_weight, at_least=0)
        self.undesirable_weight: float = check_number("undesirable_weight", undesirable_weight, at_least=0)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta:g}, desirable_weight={self.desirable_weight:g}, "
            f"undesirable_weight={self.undesirable_weight:g}, reduction={self.reduction!r}"
        )

    def forward(
        self,
        policy_logps: Tensor,
        ref_logps: Tensor,
        desirable: Tensor,
        *,
        kl_logratios: Tensor | None = None,
        weights: Tensor | None = None,
        return_metrics: bool = False,
    ) -> LossOutput:
        """The loss of a batch of labelled completions; arguments and errors as `AOTUnpairedLoss.forward`, and

        Args:
            kl_logratios: [K] log-ratios of mismatched pairs, in nats; without them the reference point z_0 is 0.

        Returns:
            A scalar, float32 or float64 ([B] with reduction="none"); or (scalar, metrics), the metrics with kl (z_0,
            in nats).
        """
        policy, ref, desirable, weights = self._prepare(policy_logps, ref_logps, desirable, weights)
        ratios = policy - ref
        if kl_logratios is None:
            baseline = torch.zeros((), dtype=ratios.dtype, device=ratios.device)
        else:
            (mismatched,) = check_logps(kl_logratios=kl_logratios)
            check_same_device("kl_logratios", mismatched, "policy_logps", policy)
            if not mismatched.shape[0]:
                raise ValueError("kl_logratios must hold at least one log-ratio, got none; leave it out for z_0 = 0")
            baseline = mismatched.detach().mean().clamp(min=0).to(ratios.dtype)
        scores = self.beta * (ratios - baseline)
        losses = torch.where(
            desirable, self.desirable_weight * torch.sigmoid(-scores), self.undesirable_weight * torch.sigmoid(scores)
        )
        if self.reduction == "none":
            if weights is not None:
                raise ValueError("weights normalise over the batch: with reduction='none' multiply the losses yourself")
            value = losses
        else:
            value, _ = Mean()(losses, weights)
        return (value, self._metrics(policy, ref, desirable) | {"kl": baseline}) if return_metrics else value
