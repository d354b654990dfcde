"""DPO, distributionally robust in total variation."""

from __future__ import annotations

from robustloss.losses.aggregates import TotalVariation
from robustloss.losses.dpo import DPOLoss


class TVDPOLoss(DPOLoss):
    r"""DPO under the worst reweighting of the batch within a total-variation distance.

    .. math:: L = \sup_P \sum_i P_i l_i \quad \text{over} \quad \tfrac12 \sum_i |P_i - \tfrac1B| \le \rho, \qquad
              l_i = -\log\sigma(\beta h_i)

    The worst case takes a mass rho from the pairs of smallest loss and gives it to the largest. Source: Mandal et al.
    2503.00539, with P on the pairs of the batch and the worst case exact there.

    Args:
        beta: DPO's inverse temperature, > 0.
        rho: the radius, a share of the batch, 0 <= rho <= 1; 0 is plain DPO, 1 the worst pair.
        link, label_smoothing: as `DPOLoss`.
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    forward, its errors and metrics are `DPOLoss`'s, with tilt/effective_sample_size and tilt/max_weight.

    Example:
        >>> policy = torch.tensor([[-12.0, -9.0, -20.0], [-15.0, -8.0, -16.0]])  # chosen, rejected
        >>> reference = torch.tensor([[-14.0, -9.5, -18.0], [-14.0, -9.0, -17.0]])
        >>> TVDPOLoss(beta=0.1, rho=0.25)(*policy, *reference)
        tensor(0.7841)
    """

    def __init__(
        self,
        beta: float = 0.1,
        rho: float = 0.1,
        *,
        link: str = "logistic",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, label_smoothing, link, aggregate=TotalVariation(rho), reduction=reduction)
