"""Aggregates: how the losses of a batch become one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from robustloss.naive.kl_tilt import kl_ball, kl_tilt, kl_tilt_unnormalized, normalized_weights
from robustloss.naive.worst_case import chi_square_ball, cvar, soft_min, total_variation_ball
from robustloss.validation import check_number


@runtime_checkable
class Aggregate(Protocol):
    """losses [B], weights [B] or None -> (value [], metrics of detached tensors)."""

    coupled: bool  # whether a sample's gradient depends on the other samples

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Mean:
    r"""The (weighted) mean :math:`\sum_i q_i l_i`."""

    coupled = False

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if weights is None:
            return losses.mean() if losses.numel() else losses.sum(), {}
        return (normalized_weights(losses, weights) * losses).sum(), {}


@dataclass(frozen=True)
class KLTilt:
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
    """

    tau: float | None = None
    rho: float | None = None
    normalize: bool = True
    max_weight: float | None = None

    coupled = True

    def __post_init__(self):
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

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if losses.numel() == 0:
            return losses.sum(), {}
        if self.rho is not None:
            value, worst_case, tau = kl_ball(losses, rho=self.rho, weights=weights)
        else:
            assert self.tau is not None
            tau = losses.new_tensor(self.tau)
            if self.normalize:
                value, worst_case = kl_tilt(losses, tau=self.tau, weights=weights)
            else:
                value, worst_case = kl_tilt_unnormalized(
                    losses, tau=self.tau, max_weight=self.max_weight, weights=weights
                )
        metrics = {
            "tilt/effective_sample_size": worst_case.sum().square() / worst_case.square().sum(),
            "tilt/max_weight": worst_case.max(),
            "tilt/tau": tau,
        }
        return value, metrics


def _worst_case_metrics(worst_case: Tensor) -> dict[str, Tensor]:
    return {
        "tilt/effective_sample_size": worst_case.sum().square() / worst_case.square().sum(),
        "tilt/max_weight": worst_case.max(),
    }


@dataclass(frozen=True)
class CVaR:
    r"""The mean of the worst `alpha` share of the batch, 0 < alpha <= 1 (`naive.worst_case.cvar`)."""

    alpha: float

    coupled = True

    def __post_init__(self):
        if check_number("alpha", self.alpha, above=0) > 1:
            raise ValueError(f"alpha must be <= 1, got {self.alpha:g}")

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if losses.numel() == 0:
            return losses.sum(), {}
        value, worst_case = cvar(losses, alpha=self.alpha, weights=weights)
        return value, _worst_case_metrics(worst_case)


@dataclass(frozen=True)
class ChiSquare:
    r"""The worst case in a chi-square ball of radius `rho` >= 0 (`naive.worst_case.chi_square_ball`)."""

    rho: float

    coupled = True

    def __post_init__(self):
        check_number("rho", self.rho, at_least=0)

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if losses.numel() == 0:
            return losses.sum(), {}
        value, worst_case = chi_square_ball(losses, rho=self.rho, weights=weights)
        return value, _worst_case_metrics(worst_case)


@dataclass(frozen=True)
class TotalVariation:
    r"""The worst case in a total-variation ball of radius 0 <= `rho` <= 1 (`naive.worst_case.total_variation_ball`)."""

    rho: float

    coupled = True

    def __post_init__(self):
        if check_number("rho", self.rho, at_least=0) > 1:
            raise ValueError(f"rho must be <= 1, got {self.rho:g}")

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if losses.numel() == 0:
            return losses.sum(), {}
        value, worst_case = total_variation_ball(losses, rho=self.rho, weights=weights)
        return value, _worst_case_metrics(worst_case)


@dataclass(frozen=True)
class SoftMin:
    r"""The soft minimum at temperature `beta_prime` > 0 (`naive.worst_case.soft_min`): hard pairs count less."""

    beta_prime: float

    coupled = True

    def __post_init__(self):
        check_number("beta_prime", self.beta_prime, above=0)

    def __call__(self, losses: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if losses.numel() == 0:
            return losses.sum(), {}
        value, worst_case = soft_min(losses, beta_prime=self.beta_prime, weights=weights)
        return value, _worst_case_metrics(worst_case)
