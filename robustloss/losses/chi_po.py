"""Chi-squared preference optimisation (χPO)."""

from __future__ import annotations

from torch import Tensor

from robustloss.losses.aggregates import Aggregate
from robustloss.losses.dpo import DPOLoss
from robustloss.validation import check_number

# exp of a log-ratio stops growing here: e^20 = 5e8 saturates any margin, and its square is still a float32.
LARGEST_LOGRATIO = 20.0


class ChiPOLoss(DPOLoss):
    r"""DPO with a reward that grows with the density ratio itself, so that leaving the reference's support is dear.

    .. math:: l_i = -\log\sigma\left(\mathrm{clip}_{\pm 2R}\left[\beta \phi(z^+_i) - \beta \phi(z^-_i)\right]\right),
              \qquad \phi(z) = z + \log z, \qquad z^\pm_i = \frac{\pi}{\pi_{ref}}(y^\pm_i | x_i)

    phi is what a chi-square (with a Kullback-Leibler) penalty makes of the reward, where DPO has log z. Source: Huang
    et al. 2407.13399, Algorithm 1. In z the log-ratio is capped at 20 nats, against overflow; log z is not.

    Args:
        beta: the strength of both penalties, > 0.
        max_reward: R, a bound of the rewards in nats, > 0: a margin beyond 2R on either side has no gradient. None: no
            clipping.
        label_smoothing, aggregate, reduction: as `DPOLoss`.

    forward, its errors and metrics are `DPOLoss`'s; the implicit rewards are beta phi(z).

    Example:
        >>> policy = torch.tensor([[-12.0, -9.0, -20.0], [-15.0, -8.0, -16.0]])  # chosen, rejected
        >>> reference = torch.tensor([[-14.0, -9.5, -18.0], [-14.0, -9.0, -17.0]])
        >>> ChiPOLoss(beta=0.1)(*policy, *reference)
        tensor(0.6994)
    """

    def __init__(
        self,
        beta: float = 0.1,
        max_reward: float | None = None,
        *,
        label_smoothing: float = 0.0,
        aggregate: Aggregate | None = None,
        reduction: str = "mean",
    ):
        super().__init__(beta, label_smoothing, "logistic", aggregate, reduction)
        self.max_reward: float | None = None if max_reward is None else check_number("max_reward", max_reward, above=0)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.max_reward is None else f", max_reward={self.max_reward:g}")

    def rewards(self, policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The implicit rewards beta * (z + log z) of the density ratio z, in nats, of any shape."""
        logratios = policy_logps - ref_logps
        return self.beta * (_density_ratio(logratios) + logratios)

    def losses(
        self, policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
    ) -> Tensor:
        """The loss of each pair before aggregation, [B]."""
        chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
        # Not phi - phi: beside a large z the digits of log z are lost.
        margins = (_density_ratio(chosen) - _density_ratio(rejected)) + (chosen - rejected)
        if self.max_reward is not None:
            bound = 2 * self.max_reward / self.beta  # the link multiplies by beta
            margins = margins.clamp(-bound, bound)
        return self._link(margins)


def _density_ratio(logratios: Tensor) -> Tensor:
    return logratios.clamp(max=LARGEST_LOGRATIO).exp()
