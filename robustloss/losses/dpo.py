"""Direct preference optimisation and its links: DPO, cDPO, rDPO, SLiC's hinge and IPO."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustloss.losses.aggregates import Aggregate, FusedAggregate, Mean
from robustloss.losses.base import PAIRED_NAMES, LossOutput, PairedLoss, check_values, check_vectors
from robustloss.naive.links import OFFSET_LINKS
from robustloss.ops.preference_loss import preference_loss


class DPOLoss(PairedLoss):
    r"""Direct preference optimisation: a loss of each pair's margin, averaged over the batch.

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

    Example:
        >>> policy_chosen, policy_rejected = torch.tensor([-12.0, -9.0, -20.0]), torch.tensor([-15.0, -8.0, -16.0])
        >>> ref_chosen, ref_rejected = torch.tensor([-14.0, -9.5, -18.0]), torch.tensor([-14.0, -9.0, -17.0])
        >>> DPOLoss(beta=0.1)(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
        tensor(0.7091)
        >>> DPOLoss(beta=0.1, reduction="none")(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
        tensor([0.5544, 0.7185, 0.8544])
    """

    _is_changed = False

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
        self.coupled: bool = self.aggregate.coupled
        if self.coupled:
            self._refuse_reduction_none(
                "its aggregate weighs every sample by all the others, so no sample has a loss of its own"
            )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if isinstance(self.aggregate, Mean) else f", aggregate={self.aggregate}")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A subclass may have a link, losses or rewards of its own, of which the op knows nothing.
        cls._is_changed = any(
            getattr(cls, name) is not getattr(DPOLoss, name) for name in ("losses", "rewards", "_link")
        )

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
            TypeError, ValueError: dtypes, shapes or devices that do not fit; on the CPU also NaN, infinity and
                numbers so large that the loss overflows.
        """
        aggregate = self.aggregate
        if self.reduction == "none" or self._is_changed or not isinstance(aggregate, FusedAggregate):
            return self._forward_in_steps(
                policy_chosen_logps,
                policy_rejected_logps,
                ref_chosen_logps,
                ref_rejected_logps,
                weights,
                return_metrics,
            )
        logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        check_vectors(PAIRED_NAMES, logps, weights)
        try:
            value, _, _, statistics = preference_loss(
                policy_chosen_logps,
                policy_rejected_logps,
                # The reference is a constant of the problem, whatever graph it comes with.
                ref_chosen_logps.detach() if ref_chosen_logps.requires_grad else ref_chosen_logps,
                ref_rejected_logps.detach() if ref_rejected_logps.requires_grad else ref_rejected_logps,
                weights.detach() if weights is not None and weights.requires_grad else weights,
                self.link,
                self.beta,
                self.label_smoothing,
                *aggregate.arguments,
            )
        except ValueError:
            check_values(PAIRED_NAMES, logps, weights)
            raise
        if not return_metrics:
            return value
        return value, self._metrics_of(statistics) | aggregate.metrics(statistics)

    def _forward_in_steps(self, pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, weights: Tensor | None, metrics: bool):
        """The losses themselves, or an aggregate of the user's own."""
        *logps, weights = self._prepare(pc, pr, rc, rr, weights)
        value, more = self.losses(*logps), {}
        if self.reduction == "none":
            if weights is not None:
                raise ValueError("weights normalise over the batch: with reduction='none' multiply the losses yourself")
        else:
            value, more = self.aggregate(value, weights)
        return (value, self._metrics(*logps) | more) if metrics else value

    def _metrics_of(self, statistics: Tensor) -> dict[str, Tensor]:
        """The metrics of `PairedLoss`, from the op's statistics."""
        chosen_logps, rejected_logps, chosen, rejected, accuracy, *_ = statistics.unbind()
        if self.link not in OFFSET_LINKS:
            chosen, rejected = self.beta * chosen, self.beta * rejected
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            "rewards/accuracies": accuracy,
        }
