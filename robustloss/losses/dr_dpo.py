"""Distributionally robustified DPO (Dr. DPO)."""

from __future__ import annotations

from robustloss.losses.aggregates import SoftMin
from robustloss.losses.dpo import DPOLoss


class DrDPOLoss(DPOLoss):
    r"""DPO that trusts the pairs it fits, against flipped labels.

    .. math:: L = -\beta' \log \frac1B \sum_i e^{-l_i / \beta'}, \qquad l_i = -\log\sigma(\beta h_i)

    A pair weighs :math:`P_i \propto e^{-l_i / \beta'}`: the opposite sign of KLDPO's tilt. A large beta' is plain DPO,
    a small one the pair that fits best. Source: Wu et al. 2407.07880 and its released code (`loss.mode_weight` is
    beta' there).

    Args:
        beta: DPO's inverse temperature, > 0.
        beta_prime: the temperature of the soft minimum, in nats of loss, > 0.
        link, label_smoothing: as `DPOLoss`.
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    forward, its errors and metrics are `DPOLoss`'s, with tilt/effective_sample_size and tilt/max_weight.

    Example:
        >>> policy = torch.tensor([[-12.0, -9.0, -20.0], [-15.0, -8.0, -16.0]])  # chosen, rejected
        >>> reference = torch.tensor([[-14.0, -9.5, -18.0], [-14.0, -9.0, -17.0]])
        >>> DrDPOLoss(beta=0.1, beta_prime=0.1)(*policy, *reference)  # below DPO's 0.7091: hard pairs count less
        tensor(0.6424)
    """

    def __init__(
        self,
        beta: float = 0.1,
        beta_prime: float = 1.0,
        *,
        link: str = "logistic",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, label_smoothing, link, aggregate=SoftMin(beta_prime), reduction=reduction)
