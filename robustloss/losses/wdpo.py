"""Wasserstein distributionally robust DPO."""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.losses.base import LossOutput
from robustloss.losses.dpo import DPOLoss
from robustloss.naive.gradient_penalty import gradient_penalty
from robustloss.naive.kl_tilt import normalized_weights
from robustloss.validation import check_number, check_tensor


class WDPOLoss(DPOLoss):
    r"""DPO with the gradient penalty that the worst case in a Wasserstein ball amounts to.

    .. math:: L = \frac1B \sum_i l_i + \rho \, \frac1B \sum_i \|\nabla_z l_i\|_2^2 \quad \text{or} \quad
              \frac1B \sum_i l_i + \rho \sqrt{\frac1B \sum_i \|\nabla_z l_i\|_2^2}

    Source: [W] Alg. 1 (rooted, `squared=False`) and App. F (squared, what its authors ran). z are the input
    embeddings of both sequences of a pair. Exact: the penalty is trained by double backward, so the model's attention
    needs a second derivative (`attn_implementation="eager"`, or SDPA with only its math kernel allowed).

    Args:
        beta: DPO's inverse temperature, > 0.
        rho: strength of the penalty, the radius of the ball, >= 0.
        squared: the mean of squared norms, or its root.
        link, label_smoothing: as `DPOLoss`.
        reduction: "mean"; "none" is refused: the penalty is reported and trained as one number.

    Metrics: `DPOLoss`'s, and penalty/value and penalty/gradient_norm (the root of the mean squared norm).
    """

    needs_embeddings = True

    def __init__(
        self,
        beta: float = 0.1,
        rho: float = 0.01,
        squared: bool = True,
        *,
        link: str = "logistic",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, label_smoothing, link, reduction=reduction)
        self._refuse_reduction_none("its penalty is reported and trained as one number")
        self.rho = check_number("rho", rho, at_least=0)
        if not isinstance(squared, bool):
            raise TypeError(f"squared must be a bool, got {type(squared).__name__}")
        self.squared = squared
        self.coupled = not squared

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rho={self.rho:g}, squared={self.squared}"

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        embeddings: Tensor | None = None,
        weights: Tensor | None = None,
        return_metrics: bool = False,
    ) -> LossOutput:
        """As `DPOLoss.forward`, with the embeddings that the policy's log-probabilities were computed from.

        Args:
            embeddings: [2B, T, H], chosen rows first, then rejected (any [k B, ...] whose row i + j B belongs to pair
                i): part of the graph of the log-probabilities. Under torch.no_grad the penalty's value is still
                computed, if the log-probabilities themselves carry a graph.

        Raises:
            ValueError: embeddings missing, of a number of rows that is no multiple of B, or not in the graph.
        """
        with torch.enable_grad():  # a conversion to float32 under torch.no_grad would cut the graph
            *logps, weights = self._prepare(
                policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, weights
            )
            embeddings = self._check_embeddings(embeddings, logps[0])
            losses = self.losses(*logps)
        if not losses.requires_grad:
            raise ValueError(
                "embeddings must be part of the graph of the policy's log-probabilities, which carry no graph"
            )
        value, _ = self.aggregate(losses, weights)
        penalty, norms = gradient_penalty(losses, embeddings, rho=self.rho, squared=self.squared, weights=weights)
        value = value + penalty
        if not torch.is_grad_enabled():
            value = value.detach()
        if not return_metrics:
            return value
        mean_norm = (normalized_weights(norms, weights) * norms).sum()
        metrics = {"penalty/gradient_norm": mean_norm.sqrt(), "penalty/value": penalty.detach()}
        return value, self._metrics(*logps) | metrics

    @staticmethod
    def _check_embeddings(embeddings: Tensor | None, like: Tensor) -> Tensor:
        if embeddings is None:
            raise ValueError(
                "embeddings is missing: WDPO differentiates its losses with respect to the input embeddings; pass the "
                "tensor given to the model as inputs_embeds (requires_grad=True), or train through "
                "robustloss.train.LossModule"
            )
        check_tensor("embeddings", embeddings)
        rows, pairs = len(embeddings) if embeddings.ndim else 0, len(like)
        if embeddings.ndim < 1 or (rows != pairs and (rows == 0 or pairs == 0 or rows % pairs)):
            raise ValueError(
                f"embeddings must have a multiple of {pairs} rows (chosen rows first, then rejected), "
                f"got {tuple(embeddings.shape)}"
            )
        if not embeddings.requires_grad:
            raise ValueError("embeddings must require grad: call .requires_grad_() before the model's forward")
        return embeddings
