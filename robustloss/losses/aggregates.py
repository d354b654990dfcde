"""Aggregates: how the losses of a batch become one number.

Those here are computed by the op `preference_loss` together with margins and link; called by themselves, on losses.
A nominal weight q_i is 1 / B, or `weights` divided by their sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from robustloss.ops.preference_loss import preference_loss
from robustloss.validation import check_finite, check_number, check_weight_values


@runtime_checkable
class Aggregate(Protocol):
    """losses [B], weights [B] or None -> (value [], metrics of detached tensors)."""

    coupled: bool  # whether a sample's gradient depends on the other samples

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]: ...


class FusedAggregate:
    """An aggregate that the op `preference_loss` knows."""

    coupled = True

    @property
    def arguments(self) -> tuple[str, float, float]:
        """The op's aggregate, parameter and max_weight."""
        raise NotImplementedError

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        """Of the worst case P: tilt/effective_sample_size ((sum P_i)^2 / sum P_i^2, in samples), tilt/max_weight (the
        largest P_i).

        `statistics` are the op's.
        """
        return {"tilt/effective_sample_size": statistics[5], "tilt/max_weight": statistics[6]}

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            value, _, _, statistics = preference_loss(
                losses, None, None, None, weights, "identity", 1.0, 0.0, *self.arguments
            )
        except ValueError:
            check_finite("losses", losses)
            if weights is not None:
                check_weight_values(weights)
            raise
        return value, self.metrics(statistics)


@dataclass(frozen=True)
class Mean(FusedAggregate):
    r"""The (weighted) mean :math:`\sum_i q_i l_i`.

    Example:
        >>> losses = torch.tensor([0.5, 0.7, 0.9, 2.0])
        >>> Mean()(losses, weights=None)
        (tensor(1.0250), {})
    """

    coupled = False

    @property
    def arguments(self) -> tuple[str, float, float]:
        return "mean", 0.0, math.inf

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class KLTilt(FusedAggregate):
    r"""The worst case near the batch in Kullback-Leibler divergence: :math:`\sum_i P_i l_i`,
    :math:`P_i \propto q_i e^{l_i / \tau}`.

    Give exactly one of

    - `tau` (nats of loss, > 0): the temperature itself ([W] Alg. 2); small tau looks at the worst pairs only;
    - `rho` (nats, >= 0): the radius; the temperature is solved so that KL(P || q) = rho ([W] Theorem 3).

    `normalize=False` (with `tau`) gives the weights of the papers' released code, exp((l - mean) / tau), not
    normalised and clamped at `max_weight` (10 there), for comparisons with it.

    Metrics: tilt/effective_sample_size ((sum P_i)^2 / sum P_i^2, in samples), tilt/max_weight (the largest P_i),
    tilt/tau.

    Raises:
        ValueError: both or neither of tau and rho; tau <= 0; rho < 0; options that do not go together.

    Example:
        >>> losses = torch.tensor([0.5, 0.7, 0.9, 2.0])
        >>> KLTilt(tau=1.0)(losses, weights=None)[0]
        tensor(1.4230)
        >>> value, metrics = KLTilt(rho=0.1)(losses, weights=None)
        >>> value, metrics["tilt/tau"]
        (tensor(1.2988), tensor(1.4198))
    """

    tau: float | None = None
    rho: float | None = None
    normalize: bool = True
    max_weight: float | None = None

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.rho is None):
            raise ValueError(f"give exactly one of tau and rho, got tau={self.tau} and rho={self.rho}")
        if self.tau is not None:
            check_number("tau", self.tau, above=0)
        if self.rho is not None:
            check_number("rho", self.rho, at_least=0)
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be a bool, got {type(self.normalize).__name__} {self.normalize!r}")
        if self.max_weight is not None:
            check_number("max_weight", self.max_weight, above=0)
        if self.normalize and self.max_weight is not None:
            raise ValueError("max_weight clamps unnormalised weights: give normalize=False with it, or leave it out")
        if not self.normalize and self.tau is None:
            raise ValueError("normalize=False needs tau: a radius rho is defined for a normalised distribution only")

    @property
    def arguments(self) -> tuple[str, float, float]:
        if self.tau is None:
            assert self.rho is not None
            return "kl_ball", self.rho, math.inf
        if self.normalize:
            return "kl_tilt", self.tau, math.inf
        return "kl_tilt_unnormalized", self.tau, math.inf if self.max_weight is None else self.max_weight

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        return super().metrics(statistics) | {"tilt/tau": statistics[7]}


@dataclass(frozen=True)
class CVaR(FusedAggregate):
    r"""The conditional value at risk: the mean of the worst `alpha` share of the batch, 0 < alpha <= 1.

    .. math:: \max_P \sum_i P_i l_i \quad \text{over} \quad P_i \le q_i / \alpha

    Source: Rockafellar & Uryasev 2000. alpha = 1 is the mean. Losses tied at the threshold share in proportion to q.

    Metrics: tilt/effective_sample_size, tilt/max_weight.

    Raises:
        ValueError: alpha outside (0, 1].

    Example:
        >>> losses = torch.tensor([0.5, 0.7, 0.9, 2.0])
        >>> CVaR(0.5)(losses, weights=None)[0]  # of the worst two
        tensor(1.4500)
    """

    alpha: float

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, above=0)
        if self.alpha > 1:
            raise ValueError(f"alpha must be <= 1 (the share of the batch that is averaged), got {self.alpha:g}")

    @property
    def arguments(self) -> tuple[str, float, float]:
        return "cvar", self.alpha, math.inf


@dataclass(frozen=True)
class ChiSquare(FusedAggregate):
    r"""The worst case in a ball of Pearson's chi-square divergence of radius `rho` >= 0.

    .. math:: \max_P \sum_i P_i l_i \quad \text{over} \quad \sum_i \frac{(P_i - q_i)^2}{q_i} \le \rho,
              \qquad P_i \propto q_i (l_i - \eta)_+

    Source: Duchi & Namkoong 1810.08750. rho = 0 is the mean.

    Metrics: tilt/effective_sample_size, tilt/max_weight.

    Raises:
        ValueError: rho < 0.

    Example:
        >>> losses = torch.tensor([0.5, 0.7, 0.9, 2.0])
        >>> ChiSquare(0.5)(losses, weights=None)[0]
        tensor(1.4354)
    """

    rho: float

    def __post_init__(self) -> None:
        check_number("rho", self.rho, at_least=0)

    @property
    def arguments(self) -> tuple[str, float, float]:
        return "chi_square", self.rho, math.inf


@dataclass(frozen=True)
class TotalVariation(FusedAggregate):
    r"""The worst case in a ball of total variation: a mass of `rho`, 0 <= rho <= 1, moves from the smallest losses to
    the largest.

    .. math:: \max_P \sum_i P_i l_i \quad \text{over} \quad \tfrac12 \sum_i |P_i - q_i| \le \rho

    Source: Mandal et al. 2503.00539. rho = 0 is the mean, rho = 1 the maximum.

    Metrics: tilt/effective_sample_size, tilt/max_weight.

    Raises:
        ValueError: rho outside [0, 1].

    Example:
        >>> losses = torch.tensor([0.5, 0.7, 0.9, 2.0])
        >>> TotalVariation(0.25)(losses, weights=None)[0]  # the weight of the smallest goes to the largest
        tensor(1.4000)
    """

    rho: float

    def __post_init__(self) -> None:
        check_number("rho", self.rho, at_least=0)
        if self.rho > 1:
            raise ValueError(f"rho must be <= 1 (the share of the mass that moves), got {self.rho:g}")

    @property
    def arguments(self) -> tuple[str, float, float]:
        return "total_variation", self.rho, math.inf


@dataclass(frozen=True)
class SoftMin(FusedAggregate):
    r"""Dr.DPO's aggregate, which trusts the pairs that fit: :math:`-\beta' \log \sum_i q_i e^{-l_i / \beta'}`.

    Source: Wu et al. 2407.07880. Hard pairs count *less*: the sign is the opposite of `KLTilt`'s, for labels that may
    be wrong. A large `beta_prime` (nats of loss, > 0) is the mean.

    Metrics: tilt/effective_sample_size, tilt/max_weight.

    Raises:
        ValueError: beta_prime <= 0.

    Example:
        >>> losses = torch.tensor([0.5, 0.7, 0.9, 2.0])
        >>> SoftMin(1.0)(losses, weights=None)[0]  # below the mean, 1.0250
        tensor(0.8885)
    """

    beta_prime: float

    def __post_init__(self) -> None:
        check_number("beta_prime", self.beta_prime, above=0)

    @property
    def arguments(self) -> tuple[str, float, float]:
        return "soft_min", self.beta_prime, math.inf
