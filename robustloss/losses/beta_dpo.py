"""DPO with a dynamic beta (β-DPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss._random import hashed_uniforms
from robustloss.losses.base import LossOutput, PairedLoss
from robustloss.losses.stateful import StatefulLoss
from robustloss.naive.kl_tilt import normalized_weights
from robustloss.validation import check_choice, check_number

SMALLEST_BETA = 1e-3


class BetaDPOLoss(StatefulLoss, PairedLoss):
    r"""DPO on the pairs of a batch that look ordinary, with a beta that follows their margins.

    .. math:: M_0 \leftarrow m M_0 + (1 - m) \, \bar h, \qquad \sigma \leftarrow m \sigma + (1 - m) \, \mathrm{std}(h)

    .. math:: \beta_{batch} = \beta \left(1 + \alpha \left(\tfrac{1}{|S|} \sum_{i \in S} h_i - M_0\right)\right), \qquad
              L = -\frac{1}{|S|} \sum_{i \in S} \log \sigma(\beta_{batch} h_i)

    S holds all but the share `filter_ratio` of the pairs, drawn without replacement in proportion to
    :math:`e^{-(h_i - M_0)^2 / 2 \sigma^2}`; no gradient flows through beta, M_0 or S. Source: Wu et al. 2407.08639,
    with what their released code settles: the margins h_i are log-ratios not yet multiplied by beta, M_0 and sigma
    start at 0 and see the batch before it is filtered, and beta_batch stays at or above 1e-3.

    In evaluation mode M_0 and sigma stay as they are and S is the whole batch.

    Args:
        beta: the inverse temperature at M_0, > 0.
        alpha: how much a nat of margin beyond M_0 changes beta, relative to it, >= 0; 0 keeps beta.
        filter_ratio: the share of pairs left out in training, 0 <= . < 1 (at least one pair stays).
        momentum: m, 0 <= . < 1.
        filtering: "sample", as above, drawn by place in the batch, or "nearest": those nearest to M_0 stay, without
            chance.
        seed: of the draws. They depend on it and on the number of training batches so far, which is part of the state:
            a resumed run draws as if it had never stopped, on any device.
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    State: margin_mean (M_0), margin_std (sigma), float64 []; batches, int64 [].

    Metrics: `DPOLoss`'s (rewards by `beta`), and beta_dpo/beta (of this batch), beta_dpo/margin_mean,
    beta_dpo/margin_std and beta_dpo/kept (the share of pairs in S).

    Example:
        >>> policy = torch.tensor([[-12.0, -9.0, -20.0], [-15.0, -8.0, -16.0]])  # chosen, rejected
        >>> reference = torch.tensor([[-14.0, -9.5, -18.0], [-14.0, -9.0, -17.0]])
        >>> loss_function = BetaDPOLoss(beta=0.1, filter_ratio=0.0)
        >>> loss, metrics = loss_function(*policy, *reference, return_metrics=True)
        >>> loss, metrics["beta_dpo/beta"]
        (tensor(0.7070), tensor(0.0910))
    """

    margin_mean: Tensor
    margin_std: Tensor
    batches: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.6,
        filter_ratio: float = 0.2,
        *,
        momentum: float = 0.9,
        filtering: str = "sample",
        seed: int = 0,
        reduction: str = "mean",
    ):
        super().__init__(beta, "logistic", 0.0, reduction)
        self._refuse_reduction_none("beta and the choice of pairs follow the whole batch")
        self.alpha: float = check_number("alpha", alpha, at_least=0)
        self.filter_ratio: float = check_number("filter_ratio", filter_ratio, at_least=0, below=1)
        self.momentum: float = check_number("momentum", momentum, at_least=0, below=1)
        self.filtering: str = check_choice("filtering", filtering, ("sample", "nearest"))
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"seed must be an integer in [0, 2**31), got {seed!r}")
        self.seed = seed
        self.register_buffer("margin_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("margin_std", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta:g}, alpha={self.alpha:g}, filter_ratio={self.filter_ratio:g}, "
            f"momentum={self.momentum:g}, filtering={self.filtering!r}"
        )

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

        `weights` weigh the pairs in every mean; a pair of weight zero is absent.
        """
        *logps, weights = self._prepare(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, weights
        )
        pc, pr, rc, rr = logps
        own = (pc - rc) - (pr - rr)  # with the gradient, in the log-probabilities' dtype
        if not own.shape[0]:
            return (own.sum(), self._metrics(*logps)) if return_metrics else own.sum()
        margins = own.detach().double()
        nominal = normalized_weights(margins, None if weights is None else weights.double())
        chosen = nominal
        if self.training:
            self._update(margins, nominal)
            kept = self._select(margins, nominal > 0)
            chosen = torch.where(kept, nominal, 0.0)
            chosen = chosen / chosen.sum()
        drift = (chosen * margins).sum() - self.margin_mean
        beta = (self.beta * (1 + self.alpha * drift)).clamp(min=SMALLEST_BETA)
        value = -(chosen.to(own.dtype) * torch.nn.functional.logsigmoid(beta.to(own.dtype) * own)).sum()
        if not return_metrics:
            return value
        state = {
            "beta_dpo/beta": beta,
            "beta_dpo/margin_mean": self.margin_mean,
            "beta_dpo/margin_std": self.margin_std,
            "beta_dpo/kept": (chosen > 0).double().sum() / (nominal > 0).double().sum(),
        }
        return value, self._metrics(*logps) | {name: number.to(own.dtype, copy=True) for name, number in state.items()}

    @torch.no_grad()
    def _update(self, margins: Tensor, nominal: Tensor) -> None:
        mean = (nominal * margins).sum()
        # n / (n - 1) times the variance where all weigh the same; the spread of a single pair counts as 0.
        freedom = 1 - nominal.square().sum()
        variance = torch.where(freedom > 1e-12, (nominal * (margins - mean).square()).sum() / freedom, 0.0)
        for buffer, now in ((self.margin_mean, mean), (self.margin_std, variance.sqrt())):
            self._write(buffer, self.momentum * buffer + (1 - self.momentum) * now)
        self.batches += 1

    def _select(self, margins: Tensor, present: Tensor) -> Tensor:
        """Which pairs stay, bool [n]."""
        distance = (margins - self.margin_mean) / self.margin_std.clamp(min=1e-12)
        keys = -0.5 * distance.square()
        if self.filtering == "sample" and self.filter_ratio:
            # The largest of log p_i + Gumbel noise are draws without replacement in proportion to p (Gumbel top-k).
            keys = keys - (-hashed_uniforms(keys.shape[0], self.seed, self.batches).log()).log()
        order = keys.masked_fill(~present, -torch.inf).argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.shape[0], device=order.device)
        count = (present.sum().double() * (1 - self.filter_ratio) + 1e-9).floor().clamp(min=1)
        return (rank < count) & present
