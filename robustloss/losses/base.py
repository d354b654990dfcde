"""What all losses share: the checks of their inputs, the link, the rewards and their metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustloss._inputs import check_link
from robustloss.naive.links import OFFSET_LINKS, link_loss
from robustloss.naive.token_logps import samples_dtype
from robustloss.validation import (
    FLOATING_DTYPES,
    check_choice,
    check_finite,
    check_magnitude,
    check_same_device,
    check_shape,
    check_tensor,
    check_weight_values,
)

LossOutput = Tensor | tuple[Tensor, dict[str, Tensor]]
# What `forward` calls its log-probabilities.
PAIRED_NAMES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
UNPAIRED_NAMES = ("policy_logps", "ref_logps")


class PreferenceLoss(nn.Module):
    """A loss of sequence log-probabilities: a margin, a link and an aggregate."""

    beta: float
    label_smoothing: float
    paired: bool  # whether forward takes (chosen, rejected) pairs or single completions with a label
    coupled: bool  # whether a sample's gradient depends on the other samples of the batch
    needs_embeddings = False  # whether forward differentiates by the input embeddings (`embeddings=`)
    differentiates_twice = False  # whether it does so by double backward, which fused attention and ZeRO-3 lack
    backwards_per_microbatch = 1  # how often a step of training calls backward for each microbatch
    needs_mismatched = False  # whether forward takes log-ratios of mismatched pairs (`kl_logratios=`)
    needs_groups = False  # whether forward takes the group of each pair (`groups=`)

    def __init__(self, beta: float, link: str, label_smoothing: float, reduction: str = "mean"):
        super().__init__()
        self.beta, self.label_smoothing = check_link(link, beta, label_smoothing)
        self.link = link
        check_choice("reduction", reduction, ("mean", "none"))
        self.reduction = reduction

    def extra_repr(self) -> str:
        parts = [f"beta={self.beta:g}", f"link={self.link!r}"]
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing:g}")
        if self.reduction != "mean":
            parts.append(f"reduction={self.reduction!r}")
        return ", ".join(parts)

    def rewards(self, policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The implicit rewards beta * (policy_logps - ref_logps), in nats, of any shape.

        For the links squared_hinge and least_squares, whose beta is an offset, they are the log-ratios themselves.
        """
        logratios = policy_logps - ref_logps
        return logratios if self.link in OFFSET_LINKS else self.beta * logratios

    def _link(self, margins: Tensor) -> Tensor:
        return link_loss(margins, beta=self.beta, link=self.link, label_smoothing=self.label_smoothing)

    def _refuse_reduction_none(self, reason: str) -> None:
        if self.reduction == "none":
            raise ValueError(f"reduction='none' is undefined for {type(self).__name__}: {reason}")


def check_vectors(names: Sequence[str], vectors: Sequence[Tensor], weights: Tensor | None) -> None:
    """Refuse log-probabilities that are no vectors [B] of one length on one device, and weights that do not fit them.

    Their values are left to the op, which looks at them anyway; `check_values` then names the argument.
    """
    first = vectors[0]
    if isinstance(first, Tensor) and first.ndim == 1:
        shape, device = first.shape, first.device
        for vector in vectors if weights is None else (*vectors, weights):
            if (
                not isinstance(vector, Tensor)
                or vector.dtype not in FLOATING_DTYPES
                or vector.shape != shape
                or vector.device != device
            ):
                break
        else:
            return
    for name, vector in zip(names, vectors, strict=True):
        check_tensor(name, vector)
        if vector.ndim != 1:
            raise ValueError(f"{name} must be [B] (one log-probability a sequence), got {tuple(vector.shape)}")
        check_shape(name, vector, first.shape, f"{names[0]}'s shape")
        check_same_device(name, vector, names[0], first)
    if weights is not None:
        check_shape("weights", check_tensor("weights", weights), first.shape, "one weight a sample")
        check_same_device("weights", weights, "the log-probabilities", first)


def check_values(names: Sequence[str], vectors: Sequence[Tensor], weights: Tensor | None) -> None:
    """Refuse NaN and infinity, and weights that are negative or all zero, by the argument's name."""
    for name, vector in zip(names, vectors, strict=True):
        check_finite(name, vector)
    if weights is not None:
        check_weight_values(weights)


def check_logps(**logps: Tensor) -> list[Tensor]:
    """Log-probabilities as float32 (or float64) vectors of one length, on one device, finite and not too large."""
    names, vectors = list(logps), list(logps.values())
    check_vectors(names, vectors, None)
    dtype = samples_dtype(*vectors)
    vectors = [value.to(dtype) for value in vectors]
    for name, value in zip(names, vectors, strict=True):
        check_magnitude(name, value)
    return vectors


def check_weights(weights: Tensor | None, like: Tensor) -> Tensor | None:
    """Sample weights [B]: non-negative, not all zero; they are constants."""
    if weights is None:
        return None
    check_shape("weights", check_tensor("weights", weights), like.shape, "one weight a sample")
    check_same_device("weights", weights, "the log-probabilities", like)
    check_weight_values(weights)
    return weights.detach().to(like.dtype)


def reward_metrics(
    chosen_reward: Tensor, rejected_reward: Tensor, chosen_logp: Tensor, rejected_logp: Tensor
) -> dict[str, Tensor]:
    """Means over each side under the names users grep for; NaN where a side is empty."""
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "logps/chosen": chosen_logp,
        "logps/rejected": rejected_logp,
    }
    return {name: value.detach() for name, value in metrics.items()}


class PairedLoss(PreferenceLoss):
    """A loss of pairs (chosen, rejected)."""

    paired = True

    def _prepare(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected = check_logps(
            policy_chosen_logps=policy_chosen_logps,
            policy_rejected_logps=policy_rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
        )
        # The reference is a constant of the problem, whatever graph it comes with.
        return (
            policy_chosen,
            policy_rejected,
            ref_chosen.detach(),
            ref_rejected.detach(),
            check_weights(weights, policy_chosen),
        )

    def _metrics(self, pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> dict[str, Tensor]:
        chosen, rejected = self.rewards(pc.detach(), rc), self.rewards(pr.detach(), rr)
        metrics = reward_metrics(*(values.mean() for values in (chosen, rejected, pc, pr)))
        metrics["rewards/accuracies"] = (chosen > rejected).to(chosen.dtype).mean()
        return metrics


class UnpairedLoss(PreferenceLoss):
    """A loss of single completions labelled desirable or not."""

    paired = False

    def _prepare(
        self, policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        policy, ref = check_logps(policy_logps=policy_logps, ref_logps=ref_logps)
        check_tensor("desirable", desirable, dtypes=(torch.bool,))
        check_shape("desirable", desirable, policy.shape, "policy_logps' shape")
        check_same_device("desirable", desirable, "policy_logps", policy)
        return policy, ref.detach(), desirable, check_weights(weights, policy)

    def _metrics(self, policy: Tensor, ref: Tensor, desirable: Tensor) -> dict[str, Tensor]:
        rewards, policy = self.rewards(policy.detach(), ref), policy.detach()
        sides = [(mask, mask.sum()) for mask in (desirable, ~desirable)]
        # Not values[mask], for whose size the host would wait.
        return reward_metrics(
            *(torch.where(mask, values, 0.0).sum() / count for values in (rewards, policy) for mask, count in sides)
        )
