"""Alignment via optimal transport: losses of sorted margins."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from robustloss.losses.base import (
    PAIRED_NAMES,
    UNPAIRED_NAMES,
    LossOutput,
    PairedLoss,
    PreferenceLoss,
    UnpairedLoss,
    check_values,
    check_vectors,
)
from robustloss.naive.token_logps import samples_dtype
from robustloss.ops.sorted_transport import sorted_transport
from robustloss.sorting import sinkhorn_sort, soft_sort
from robustloss.validation import (
    check_choice,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_weight_values,
)

SORTS = ("hard", "soft_l2", "soft_kl", "sinkhorn")
SINGLE = "a sort of one sample a side is plain DPO on it"


def _warn(message: str) -> None:
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
        strength: float | str = "auto",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, link, label_smoothing, reduction)
        self.sort: str = check_choice("sort", sort, SORTS)
        self.strength: float | str = _check_strength(strength)
        if sort == "hard" and strength != "auto":
            raise ValueError(
                f"strength={strength!r} softens a sort, and sort is 'hard': give sort='soft_l2', or leave it out"
            )
        self._refuse_reduction_none("sorting matches every sample to another, so no sample has a loss of its own")

    def extra_repr(self) -> str:
        softness = "" if self.sort == "hard" else f", strength={self.strength!r}"
        return f"{super().extra_repr()}, sort={self.sort!r}{softness}"

    def _soften(self, samples: Tensor) -> Tensor:
        """The soft order statistics of the samples [n], in their own unit."""
        given = self.strength if isinstance(self.strength, float) else None
        if self.sort == "sinkhorn":
            return sinkhorn_sort(samples) if given is None else sinkhorn_sort(samples, strength=given)
        regularization = self.sort.removeprefix("soft_")
        if given is not None:
            return soft_sort(samples, regularization=regularization, strength=given)
        # A constant of the problem, and a tensor: the host does not wait for it.
        fixed = samples.detach()
        scale = (fixed - fixed.mean()).square().mean().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)  # 0 of equal samples, NaN of none
        return scale * soft_sort(samples / scale, regularization=regularization, strength=max(1, samples.shape[0]) / 4)

    def _check_soft(self, names: tuple[str, ...], logps: tuple[Tensor, ...], weights: Tensor | None) -> None:
        if weights is not None:
            raise ValueError(f"weights are undefined for sort={self.sort!r}: soft sorts weigh all samples alike")
        check_values(names, logps, None)

    def _transport(self, *samples: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss [] and the dominance violation [2]: the op `sorted_transport`, given its vectors."""
        value, _, _, dominance = sorted_transport(*samples, self.link, self.beta, self.label_smoothing)
        return value, dominance


def _check_strength(strength: object) -> float | str:
    if isinstance(strength, str):
        return check_choice("strength", strength, ("auto",))
    return check_number("strength", strength, above=0)


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
        sort: how order statistics are taken. "hard" gives each pair's gradient to the one place it sorts to;
            "soft_l2" and "soft_kl" (`soft_sort`) and "sinkhorn" (`sinkhorn_sort`, without a second derivative) share
            it among neighbours. Soft sorts take no weights.
        strength: of the soft sorts, > 0, as the functions take it (`soft_sort`: 1 / nats; `sinkhorn_sort`: relative to
            the variance). "auto": 0.01 for sinkhorn; for the others n / (4 standard deviations) for n samples, held
            fixed, so that neighbours further apart than 4 standard deviations / n are pooled at any scale and size. Of
            normally distributed samples these are three quarters, and the softened ones spread about 6% less. (It needs
            n: `soft_sort` pools gaps above 1 / strength, and hardly a gap of many samples is a standard deviation.)
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    Metrics: `DPOLoss`'s, and dominance/violation_area, dominance/violation_w1 (`naive.sorted_transport` of u over v).

    Example:
        >>> batch = torch.tensor([[-12.0, -9.0], [-15.0, -8.0], [-14.0, -9.0], [-14.0, -11.0]])
        >>> batch[0] - batch[1], batch[2] - batch[3]  # u and v; the smaller of u meets the smaller of v
        (tensor([ 3., -1.]), tensor([0., 2.]))
        >>> AOTPairedLoss(beta=0.1)(*batch)
        tensor(0.6944)
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
        # The reference is a constant of the problem, whatever graph it comes with.
        pc, pr, rc, rr = policy_chosen_logps, policy_rejected_logps, *map(_constant, logps[2:])
        try:
            if self.sort == "hard":
                loss, dominance = self._transport(pc, pr, rc, rr, None, weights, weights)
            else:
                self._check_soft(PAIRED_NAMES, logps, weights)
                dtype = samples_dtype(*logps)
                u, v = pc.to(dtype) - pr.to(dtype), rc.to(dtype) - rr.to(dtype)
                loss, dominance = self._transport(self._soften(u), None, self._soften(v), None, None, None, None)
        except ValueError:
            check_values(PAIRED_NAMES, logps, weights)
            raise
        if weights is not None and _is_zero(loss):
            check_weight_values(weights)
        if not torch.compiler.is_compiling() and len(pc) == 1:
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

    Example:
        >>> policy, reference = torch.tensor([-12.0, -9.0, -20.0]), torch.tensor([-14.0, -9.5, -18.0])
        >>> AOTUnpairedLoss(beta=0.1)(policy, reference, desirable=torch.tensor([True, True, False]))
        tensor(0.5445)
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

        A soft sort splits the classes first: on a GPU the host waits for their sizes, and neither CUDA graphs nor
        torch.compile(fullgraph=True) take it.

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
            if self.sort == "hard":
                loss, dominance = self._transport(
                    policy_logps, _constant(ref_logps), None, None, desirable, weights, None
                )
            else:
                self._check_soft(UNPAIRED_NAMES, logps, weights)
                dtype = samples_dtype(*logps)
                ratios = policy_logps.to(dtype) - _constant(ref_logps).to(dtype)
                u, v = self._soften(ratios[desirable]), self._soften(ratios[~desirable])
                loss, dominance = self._transport(u, None, v, None, None, None, None)
        except ValueError:
            check_values(UNPAIRED_NAMES, logps, weights)
            raise
        one_class = _is_zero(loss) and self._is_one_class(desirable, weights)
        if one_class and len(desirable):
            _warn(f"{type(self).__name__}: one class only in a batch of {len(desirable)}, so there is nothing to match")
        elif not torch.compiler.is_compiling() and len(desirable) == 2 and desirable.device.type == "cpu":
            # Elsewhere the two may be of one class.
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
