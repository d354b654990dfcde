"""Alignment via optimal transport: losses of sorted margins."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from robustloss.losses.aggregates import Mean
from robustloss.losses.base import LossOutput, PairedLoss, PreferenceLoss, UnpairedLoss, dominance_metrics
from robustloss.naive.sorted_transport import sorted_margins
from robustloss.validation import check_choice

SORTS = ("hard",)
SINGLE = "a sort of one sample a side is plain DPO on it"


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():
        # Past forward and the two frames of nn.Module's call, at the caller's line.
        warnings.warn(f"{message}; give larger batches, as the loss compares distributions", UserWarning, stacklevel=5)


class SortedLoss(PreferenceLoss):
    """What the two AOT losses share: their options."""

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
        pc, pr, rc, rr, weights = self._prepare(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, weights
        )
        if len(pc) == 1:
            _warn(f"{type(self).__name__}: {SINGLE}")
        margins, mass = sorted_margins(pc - pr, rc - rr, weights, weights)
        value, _ = Mean()(self._link(margins), mass)
        return (value, self._metrics(pc, pr, rc, rr) | dominance_metrics(margins, mass)) if return_metrics else value


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
            match: 0, with a zero gradient and no dominance metrics.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices that do not fit; NaN or infinity on the CPU.
        """
        policy, ref, desirable, weights = self._prepare(policy_logps, ref_logps, desirable, weights)
        ratios = policy - ref
        in_u, in_v = desirable, ~desirable
        if weights is not None:
            # Zero weight is absence, so that a class of nothing else counts as missing.
            in_u, in_v = in_u & (weights > 0), in_v & (weights > 0)
        u, v = ratios[in_u], ratios[in_v]
        if len(u) == 0 or len(v) == 0:
            if len(ratios):
                _warn(
                    f"{type(self).__name__}: one class only in a batch of {len(ratios)}, so there is nothing to match"
                )
            value = 0 * ratios.sum()
            return (value, self._metrics(policy, ref, desirable)) if return_metrics else value
        if len(u) == len(v) == 1:
            _warn(f"{type(self).__name__}: {SINGLE}")
        u_weights, v_weights = (None, None) if weights is None else (weights[in_u], weights[in_v])
        margins, mass = sorted_margins(u, v, u_weights, v_weights)
        value, _ = Mean()(self._link(margins), mass)
        return (
            (value, self._metrics(policy, ref, desirable) | dominance_metrics(margins, mass))
            if return_metrics
            else value
        )
