"""Alignment via optimal transport: losses of sorted margins."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from robustloss.losses.base import (
    LossOutput,
    PairedLoss,
    PreferenceLoss,
    UnpairedLoss,
    check_values,
    check_vectors,
)
from robustloss.ops.sorted_transport import sorted_transport
from robustloss.validation import check_choice, check_same_device, check_shape, check_tensor, check_weight_values

PAIRED_NAMES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
UNPAIRED_NAMES = ("policy_logps", "ref_logps")
SORTS = ("hard",)
SINGLE = "a sort of one sample a side is plain DPO on it"


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():
        # Past forward and the two frames of nn.Module's call, at the caller's line.
        warnings.warn(f"{message}; give larger batches, as the loss compares distributions", UserWarning, stacklevel=5)


class SortedLoss(PreferenceLoss):
    """What the two AOT losses share: their options, and the op they call."""

    coupled = True

    def __init__(
        self,
        beta: float = 0.1,
        link: str = "logistic",
        sort: str = "hard",
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, link, label_smoothing, reduction)
        self.sort = check_choice("sort", sort, SORTS)
        self._refuse_reduction_none("sorting matches every sample to another, so no sample has a loss of its own")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sort={self.sort!r}"


def _constant(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _dominance_metrics(dominance: Tensor) -> dict[str, Tensor]:
    area, w1 = dominance.unbind()
    return {"dominance/violation_area": area, "dominance/violation_w1": w1}


def _is_zero(loss: Tensor) -> bool:
    """Whether the batch may be one without anything to match; always False where looking would cost something."""
    return loss.device.type == "cpu" and not torch.compiler.is_compiling() and loss.item() == 0


class AOTPairedLoss(SortedLoss, PairedLoss):
    r"""Make the policy's chosen-over-rejected log-ratio dominate the reference's, quantile by quantile.

    .. math:: u_i = \log\frac{\pi(y^+_i|x_i)}{\pi(y^-_i|x_i)}, \quad v_i =
              \log\frac{\pi_{ref}(y^+_i|x_i)}{\pi_{ref}(y^-_i|x_i)}, \quad
              L = \frac1B \sum_i \ell(u_{(i)} - v_{(i)})

    Source: [A] sections 2.1 and 3, Eq. 5 and 9.

    Args:
        beta: inverse temperature of the link, > 0 ([A]'s offset, >= 0, for squared_hinge and least_squares).
        link, label_smoothing: as `DPOLoss`.
        sort: "hard".
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    Metrics: `DPOLoss`'s, and dominance/violation_area, dominance/violation_w1 (`naive.sorted_transport` of u
        over v).
    """

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
        """The loss of a batch of pairs; arguments, results and errors as `DPOLoss.forward`.

        With `weights`, quantiles are those of the weighted samples. A batch of one pair warns: it is plain DPO.
        """
        logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        check_vectors(PAIRED_NAMES, logps, weights)
        pc, pr, rc, rr = logps
        # The reference is a constant of the problem, whatever graph it comes with.
        rc, rr = _constant(rc), _constant(rr)
        try:
            loss, _, _, dominance = sorted_transport(
                pc, pr, rc, rr, None, weights, weights, self.link, self.beta, self.label_smoothing
            )
        except ValueError:
            check_values(PAIRED_NAMES, logps, weights)
            raise
        if weights is not None and _is_zero(loss):
            check_weight_values(weights)
        if len(pc) == 1:
            _warn(f"{type(self).__name__}: {SINGLE}")
        if not return_metrics:
            return loss
        metrics = self._metrics(*(x.to(loss.dtype) for x in (pc, pr, rc, rr)))
        return loss, metrics | _dominance_metrics(dominance)


class AOTUnpairedLoss(SortedLoss, UnpairedLoss):
    r"""Make the log-ratios of desirable completions dominate those of the others, quantile by quantile.

    .. math:: u = \{r_i : \text{desirable}\}, \quad v = \{r_i : \text{not}\}, \quad
              L = \int_0^1 \ell\left(F_u^{-1}(s) - F_v^{-1}(s)\right) ds, \quad r = \log\pi(y|x) - \log\pi_{ref}(y|x)

    Source: [A] sections 2.1 and 3, Eq. 3 and 9; unequal sizes by merging the two quantile grids
        (`naive.sorted_transport`).

    Args: as `AOTPairedLoss`.

    Metrics: rewards/* and logps/* of both classes, dominance/violation_area and dominance/violation_w1 of u over v.
    """

    def forward(
        self,
        policy_logps: Tensor,
        ref_logps: Tensor,
        desirable: Tensor,
        *,
        weights: Tensor | None = None,
        return_metrics: bool = False,
    ) -> LossOutput:
        """The loss of a batch of labelled completions.

        Args:
            policy_logps, ref_logps: [B] log-probabilities in nats, any float dtype; no gradient reaches the reference.
            desirable: [B] bool.
            weights: [B], sample weights >= 0, normalised within each class.
            return_metrics: also return a dict of detached scalars.

        Returns:
            A scalar, float32 or float64; or (scalar, metrics). A batch that holds one class only has nothing to
            match: 0, with a zero gradient and no dominance metrics (zeros where looking would make the host wait).

        Raises:
            TypeError, ValueError: dtypes, shapes or devices that do not fit; NaN or infinity on the CPU.
        """
        logps = (policy_logps, ref_logps)
        check_vectors(UNPAIRED_NAMES, logps, weights)
        check_tensor("desirable", desirable, dtypes=(torch.bool,))
        check_shape("desirable", desirable, policy_logps.shape, "policy_logps' shape")
        check_same_device("desirable", desirable, "policy_logps", policy_logps)
        try:
            loss, _, _, dominance = sorted_transport(
                policy_logps,
                _constant(ref_logps),
                None,
                None,
                desirable,
                weights,
                None,
                self.link,
                self.beta,
                self.label_smoothing,
            )
        except ValueError:
            check_values(UNPAIRED_NAMES, logps, weights)
            raise
        one_class = _is_zero(loss) and self._is_one_class(desirable, weights)
        if one_class and len(desirable):
            _warn(f"{type(self).__name__}: one class only in a batch of {len(desirable)}, so there is nothing to match")
        elif len(desirable) == 2:
            _warn(f"{type(self).__name__}: {SINGLE}")
        if not return_metrics:
            return loss
        metrics = self._metrics(policy_logps.to(loss.dtype), ref_logps.to(loss.dtype).detach(), desirable)
        return loss, metrics if one_class else metrics | _dominance_metrics(dominance)

    @staticmethod
    def _is_one_class(desirable: Tensor, weights: Tensor | None) -> bool:
        if weights is not None:
            check_weight_values(weights)
            desirable = desirable[weights > 0]  # zero weight is absence
        return bool(desirable.all()) or not bool(desirable.any())
