"""Direct preference optimisation and its links: DPO, cDPO, rDPO, SLiC's hinge and IPO."""

from __future__ import annotations

from torch import Tensor

from robustloss.losses.aggregates import Aggregate, Mean
from robustloss.losses.base import LossOutput, PairedLoss


class DPOLoss(PairedLoss):
    r"""A link of the paired margins, aggregated over the batch.

    .. math:: h_i = \left(\log\frac{\pi}{\pi_{ref}}(y^+_i|x_i)\right) -
              \left(\log\frac{\pi}{\pi_{ref}}(y^-_i|x_i)\right), \qquad
              L = \frac1B \sum_i \ell(h_i)

    Source: Rafailov et al. 2305.18290 (logistic, :math:`-\log\sigma(\beta h)`); with `label_smoothing` Mitchell's
    cDPO; link "robust" Chowdhury et al. 2403.00409 (rDPO); "hinge" Zhao et al. 2305.10425 (SLiC); "ipo" Azar et al.
    2310.12036. IPO expects log-probabilities averaged per token (`sequence_logps(average=True)`) in its authors'
    implementation.

    Args:
        beta: inverse temperature, > 0.
        label_smoothing: assumed probability of a flipped label, 0 <= . < 0.5; for the links logistic and robust.
        link: "logistic", "robust", "hinge", "ipo", "squared_hinge" or "least_squares".
        aggregate: `Mean()`, or any of `robustloss.losses`' aggregates.
        reduction: "mean", or "none" for the losses [B] (with Mean only).

    Raises:
        TypeError, ValueError: options of another type, out of range, or that do not go together.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        link: str = "logistic",
        aggregate: Aggregate | None = None,
        reduction: str = "mean",
    ):
        super().__init__(beta, link, label_smoothing, reduction)
        aggregate = Mean() if aggregate is None else aggregate
        if isinstance(aggregate, type) or not isinstance(aggregate, Aggregate):
            raise TypeError(
                "aggregate must be an aggregate such as Mean() or KLTilt(tau=0.1), "
                f"got {type(aggregate).__name__} {aggregate!r}"
            )
        self.aggregate = aggregate
        self.coupled = self.aggregate.coupled
        if self.coupled:
            self._refuse_reduction_none(
                "its aggregate weighs every sample by all the others, so no sample has a loss of its own"
            )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if isinstance(self.aggregate, Mean) else f", aggregate={self.aggregate}")

    def losses(
        self, policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
    ) -> Tensor:
        """The loss of each pair before aggregation, [B]."""
        return self._link((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        weights: Tensor | None = None,
        return_metrics: bool = False,
    ) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            policy_chosen_logps, policy_rejected_logps: [B], the trained model's log-probabilities in nats, any float
                dtype.
            ref_chosen_logps, ref_rejected_logps: [B], the reference model's; no gradient reaches them.
            weights: [B], sample weights >= 0, normalised to sum to one.
            return_metrics: also return a dict of detached scalars.

        Returns:
            A scalar, float32 or float64 ([B] with reduction="none"); or (scalar, metrics).

        Raises:
            TypeError, ValueError: dtypes, shapes or devices that do not fit; NaN or infinity on the CPU.
        """
        *logps, weights = self._prepare(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, weights
        )
        losses = self.losses(*logps)
        if self.reduction == "none":
            if weights is not None:
                raise ValueError("weights normalise over the batch: with reduction='none' multiply the losses yourself")
            value, metrics = losses, {}
        else:
            value, metrics = self.aggregate(losses, weights)
        return (value, self._metrics(*logps) | metrics) if return_metrics else value
