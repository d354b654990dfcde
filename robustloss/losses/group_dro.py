"""Group-robust DPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustloss.losses.base import LossOutput
from robustloss.losses.dpo import DPOLoss
from robustloss.losses.stateful import StatefulLoss
from robustloss.validation import (
    INTEGER_DTYPES,
    check_finite,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)


class GroupDROLoss(StatefulLoss, DPOLoss):
    r"""DPO on the worst mixture of known groups, whose weights follow the groups' losses.

    .. math:: \alpha_g \leftarrow \frac{\alpha_g e^{\eta L_g}}{\sum_k \alpha_k e^{\eta L_k}}, \qquad
              L = \sum_g \alpha_g L_g

    with :math:`L_g` the mean loss of group g in the batch, the new weights held fixed in the gradient. Source: Ramesh
    et al. 2405.20304, Algorithm 1 (GR-DPO), on batches as in Sagawa et al. 1911.08731.

    A group that the batch lacks has no L_g: it keeps its weight, and the others share the rest. With `group_sizes` L_g
    is instead the paper's importance-weighted estimate :math:`\frac{N}{N_g} \frac1B \sum_{i \in g} l_i`, which is
    unbiased for batches drawn from the whole data, and 0 for an absent group.

    Args:
        beta: DPO's inverse temperature, > 0.
        groups: how many groups there are, >= 1.
        step_size: eta, per nat of loss, >= 0; 0 keeps the weights equal.
        group_sizes: [groups] N_g, how many pairs of the data each group has, > 0.
        link, label_smoothing: as `DPOLoss`.
        reduction: "mean"; "none" is refused, as the loss couples the batch.

    State: log_weights, the groups' log weights, float64 [groups]; `group_weights` are the weights.

    Metrics: `DPOLoss`'s, and group_dro/weight_<g> and group_dro/loss_<g> (NaN where the batch lacks the group).

    Example:
        >>> policy = torch.tensor([[-12.0, -9.0, -20.0], [-15.0, -8.0, -16.0]])  # chosen, rejected
        >>> reference = torch.tensor([[-14.0, -9.5, -18.0], [-14.0, -9.0, -17.0]])
        >>> loss_function = GroupDROLoss(beta=0.1, groups=2, step_size=1.0)
        >>> loss_function(*policy, *reference, groups=torch.tensor([0, 0, 1]))
        tensor(0.7572)
        >>> loss_function.group_weights.tolist()  # the second group has the larger loss
        [0.44..., 0.55...]
    """

    needs_groups = True
    log_weights: Tensor
    shares: Tensor | None

    def __init__(
        self,
        beta: float = 0.1,
        groups: int = 2,
        step_size: float = 0.01,
        *,
        group_sizes: Sequence[int] | None = None,
        link: str = "logistic",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, label_smoothing, link, reduction=reduction)
        self._refuse_reduction_none("a pair weighs what its group weighs, and that follows the whole batch")
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups must be an integer >= 1 (how many groups there are), got {groups!r}")
        self.groups = groups
        self.step_size: float = check_number("step_size", step_size, at_least=0)
        self.coupled: bool = True
        self.register_buffer("log_weights", torch.full((groups,), 1 / groups, dtype=torch.float64).log())
        shares = None
        if group_sizes is not None:
            if isinstance(group_sizes, str) or not isinstance(group_sizes, Sequence):
                raise TypeError(f"group_sizes must be a list of {groups} numbers, got {group_sizes!r}")
            sizes = [check_number(f"group_sizes[{g}]", size, above=0) for g, size in enumerate(group_sizes)]
            if len(sizes) != groups:
                raise ValueError(f"group_sizes must hold {groups} numbers (groups), got {len(sizes)}")
            shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        self.register_buffer("shares", shares, persistent=False)

    @property
    def group_weights(self) -> Tensor:
        """alpha, float64 [groups]: what each group weighs now."""
        return self.log_weights.softmax(0)

    def extra_repr(self) -> str:
        importance = "" if self.shares is None else f", group_shares={[round(x, 4) for x in self.shares.tolist()]}"
        return f"{super().extra_repr()}, groups={self.groups}, step_size={self.step_size:g}{importance}"

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
        return_metrics: bool = False,
    ) -> LossOutput:
        """The loss of a batch of pairs; arguments, results and errors as `DPOLoss.forward`, and

        Args:
            groups: [B] int64, the group of each pair, 0 <= . < groups.

        Raises:
            ValueError: groups missing, of another shape, or out of range (looked at on the CPU only).
        """
        *logps, weights = self._prepare(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, weights
        )
        groups = self._check_groups(groups, logps[0])
        losses = self.losses(*logps)
        check_finite("losses", losses)  # a square that overflows would stay in the weights for ever
        weights = torch.ones_like(losses) if weights is None else weights
        # A product with the indicators, not a scatter: the same sums in the same order on every device.
        indicator = (groups == torch.arange(self.groups, device=groups.device)[:, None]).double()  # [G, B]
        sums, counts = indicator @ (weights.double() * losses.detach()), indicator @ weights.double()
        present = counts > 0
        if self.shares is None:
            scale = torch.where(present, 1 / counts, 0.0)
        else:
            scale = 1 / (self.shares * counts.sum()).clamp(min=torch.finfo(torch.float64).tiny)
        group_losses = scale * sums
        if self.training:
            self._update(group_losses, present)
        coefficients = self.group_weights * scale
        value = ((coefficients[groups] * weights.double()).to(losses.dtype) * losses).sum()
        if not return_metrics:
            return value
        told = torch.where(present, group_losses, torch.nan).to(losses.dtype)
        group_weights = self.group_weights.to(losses.dtype)
        metrics = {f"group_dro/weight_{g}": group_weights[g] for g in range(self.groups)}
        metrics |= {f"group_dro/loss_{g}": told[g] for g in range(self.groups)}
        return value, self._metrics(*logps) | metrics

    @torch.no_grad()
    def _update(self, group_losses: Tensor, present: Tensor) -> None:
        moved = self.log_weights + self.step_size * group_losses
        if self.shares is not None:
            self.log_weights.copy_(moved.log_softmax(0))
            return
        mass = self.log_weights.masked_fill(~present, -torch.inf).logsumexp(0)
        moved = mass + moved - moved.masked_fill(~present, -torch.inf).logsumexp(0)
        self.log_weights.copy_(torch.where(present, moved, self.log_weights))

    def _check_groups(self, groups: Tensor | None, like: Tensor) -> Tensor:
        if groups is None:
            raise ValueError("groups is missing: GroupDROLoss needs the group of each pair, int64 [B]")
        check_shape("groups", check_tensor("groups", groups, dtypes=INTEGER_DTYPES), like.shape, "one group a pair")
        check_same_device("groups", groups, "the log-probabilities", like)
        if groups.device.type == "cpu" and not torch.compiler.is_compiling() and groups.numel():
            low, high = int(groups.min()), int(groups.max())
            if low < 0 or high >= self.groups:
                raise ValueError(f"groups must be in [0, {self.groups}), got values from {low} to {high}")
        return groups.long()
