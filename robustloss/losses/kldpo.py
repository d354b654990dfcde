"""Kullback-Leibler distributionally robust DPO."""

from __future__ import annotations

from robustloss.losses.aggregates import KLTilt
from robustloss.losses.dpo import DPOLoss


class KLDPOLoss(DPOLoss):
    r"""DPO under the worst reweighting of the batch near it in Kullback-Leibler divergence.

    .. math:: L = \sum_i P_i l_i, \qquad P_i \propto e^{l_i / \tau}, \qquad l_i = -\log\sigma(\beta h_i)

    Source: [W] Alg. 2 (`tau`), Theorem 3 (`rho`). The reported value is :math:`\sum_i P_i l_i`; the gradient is
    :math:`\sum_i P_i \nabla l_i`, that of :math:`\tau \log \frac1B \sum_i e^{l_i / \tau}`.

    Args:
        beta: DPO's inverse temperature, > 0.
        tau: temperature of the tilt in nats of loss, > 0: the smaller, the more the worst pairs weigh.
        rho: in place of tau, the radius in nats, >= 0, for which tau is solved. Give exactly one of the two.
        link, label_smoothing: as `DPOLoss`.
        normalize, max_weight: `normalize=False, max_weight=10` are the papers' released code; see `KLTilt`.
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    forward, its errors and metrics are `DPOLoss`'s, with tilt/effective_sample_size, tilt/max_weight and tilt/tau.

    Example:
        >>> policy = torch.tensor([[-12.0, -9.0, -20.0], [-15.0, -8.0, -16.0]])  # chosen, rejected
        >>> reference = torch.tensor([[-14.0, -9.5, -18.0], [-14.0, -9.0, -17.0]])
        >>> loss, metrics = KLDPOLoss(beta=0.1, tau=0.1)(*policy, *reference, return_metrics=True)
        >>> loss, metrics["tilt/max_weight"]  # the worst pair weighs three quarters
        (tensor(0.8162), tensor(0.7653))
        >>> KLDPOLoss(beta=0.1, tau=100.0)(*policy, *reference)  # a large tau is plain DPO
        tensor(0.7092)
    """

    def __init__(
        self,
        beta: float = 0.1,
        tau: float | None = None,
        rho: float | None = None,
        *,
        link: str = "logistic",
        label_smoothing: float = 0.0,
        normalize: bool = True,
        max_weight: float | None = None,
        reduction: str = "mean",
    ):
        tilt = KLTilt(tau=tau, rho=rho, normalize=normalize, max_weight=max_weight)
        super().__init__(beta, label_smoothing, link, aggregate=tilt, reduction=reduction)
