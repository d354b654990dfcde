"""What an aggregate looks at: the weight P of every sample, and how far P is from the nominal weights q."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustloss._files import replace_file
from robustloss.losses.aggregates import Aggregate
from robustloss.losses.base import check_weights
from robustloss.naive.kl_tilt import normalized_weights
from robustloss.validation import check_finite, check_tensor


@dataclass(frozen=True)
class WorstCase:
    r"""The weights P that an aggregate gives to the samples' losses; float64 [n] vectors, and numbers.

    The divergences are those of :math:`P / \sum_i P_i` from q; P sums to one but for `KLTilt(normalize=False)`.
    """

    losses: Tensor  #: as given
    nominal: Tensor  #: q
    weights: Tensor  #: P: the derivative of the aggregate's value by each loss
    value: float  #: of the aggregate
    effective_sample_size: float  #: (sum P)^2 / sum P^2, in samples
    max_weight: float  #: the largest P_i
    kl: float  #: sum P log(P / q), in nats
    chi_square: float  #: sum (P - q)^2 / q
    total_variation: float  #: sum abs(P - q) / 2
    tau: float  #: the temperature of a KL tilt, NaN for other aggregates

    def top(self, k: int) -> Tensor:
        """The indices of the k largest weights, the heaviest first; int64 [min(k, n)]. Ties: the lower index first."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(f"k must be an integer >= 0, got {k!r}")
        return self.weights.argsort(descending=True, stable=True)[:k]

    def to_jsonl(
        self, path: str | Path, ids: Sequence[str | int] | None = None, texts: Sequence[str] | None = None
    ) -> None:
        """Write one JSON object a sample, the heaviest first: index, id and text where given, loss, nominal, weight.

        The file is whole or not there.

        Raises:
            ValueError: ids or texts that are not one a sample.
        """
        for name, values in (("ids", ids), ("texts", texts)):
            if values is not None and len(values) != len(self.losses):
                raise ValueError(f"{name} must be one a sample ({len(self.losses)}), got {len(values)}")
        losses, nominal, weights = self.losses.tolist(), self.nominal.tolist(), self.weights.tolist()
        lines = []
        for i in self.top(len(losses)).tolist():
            row = {"index": i, "loss": losses[i], "nominal": nominal[i], "weight": weights[i]}
            row |= {} if ids is None else {"id": ids[i]}
            row |= {} if texts is None else {"text": texts[i]}
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        replace_file(Path(path), "".join(lines))


def worst_case(losses: Tensor, aggregate: Aggregate, weights: Tensor | None = None) -> WorstCase:
    """The weight that `aggregate` gives to each of the losses.

    Args:
        losses: [n], n >= 1, any float dtype; `DPOLoss(reduction="none")` gives them.
        aggregate: such as KLTilt(rho=0.1), CVaR(0.2), or a loss's own (`loss.aggregate`).
        weights: [n] nominal weights >= 0, normalised to q; None: uniform.

    Raises:
        TypeError, ValueError: arguments of another type or shape, on two devices, or not finite.

    Example:
        >>> from robustloss import KLTilt
        >>> found = worst_case(torch.tensor([0.5, 0.7, 0.9, 2.0]), KLTilt(rho=0.1))
        >>> found.weights.tolist()  # doctest: +ELLIPSIS
        [0.157..., 0.181..., 0.208..., 0.452...]
        >>> found.top(2), round(found.kl, 3)
        (tensor([3, 2]), 0.1)
    """
    check_tensor("losses", losses)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"losses must be a vector of at least one loss, got {tuple(losses.shape)}")
    check_finite("losses", losses)
    if isinstance(aggregate, type) or not isinstance(aggregate, Aggregate):
        raise TypeError(f"aggregate must be an aggregate such as KLTilt(rho=0.1), got {type(aggregate).__name__}")
    values = losses.detach().double().requires_grad_()
    weights = check_weights(weights, values)
    with torch.enable_grad():
        value, metrics = aggregate(values, weights)
    (given,) = torch.autograd.grad(value, values)
    nominal = normalized_weights(values, weights)
    p = given / given.sum()
    difference, present = p - nominal, nominal > 0
    safe = torch.where(present, nominal, 1.0)
    return WorstCase(
        losses=values.detach(),
        nominal=nominal,
        weights=given,
        value=value.item(),
        effective_sample_size=(given.sum().square() / given.square().sum()).item(),
        max_weight=given.max().item(),
        kl=torch.special.xlogy(p, p / safe).sum().item(),
        chi_square=torch.where(present, difference.square() / safe, 0.0).sum().item(),
        total_variation=difference.abs().sum().item() / 2,
        tau=float(metrics.get("tilt/tau", math.nan)),
    )
