"""Wasserstein distributionally robust DPO."""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.losses.base import LossOutput
from robustloss.losses.dpo import DPOLoss
from robustloss.losses.stateful import StatefulLoss
from robustloss.naive.gradient_penalty import gradient_penalty
from robustloss.naive.kl_tilt import normalized_weights
from robustloss.validation import check_choice, check_number, check_tensor

# The default `step`. Measured over GPT-2, Llama, Qwen2 and Qwen3 of random weights (32 to 256 wide, 2 to 8 layers): the
# penalty's gradient is off by less than 1e-3 (central) and 4e-3 (one-sided).
STEPS = {"central": 1e-3, "one_sided": 1e-4}
HALF = (torch.bfloat16, torch.float16)


class WDPOLoss(StatefulLoss, DPOLoss):
    r"""DPO with the gradient penalty that the worst case in a Wasserstein ball amounts to.

    .. math:: L = \frac1B \sum_i l_i + \rho \, \frac1B \sum_i \|\nabla_z l_i\|_2^2 \quad \text{or} \quad
              \frac1B \sum_i l_i + \rho \sqrt{\frac1B \sum_i \|\nabla_z l_i\|_2^2}

    Source: [W] Alg. 1 (rooted, `squared=False`) and App. F (squared, what its authors ran). z are the input
    embeddings of both sequences of a pair. The penalty's value is always exact; its gradient is

    - "central": a central difference along the gradients by the embeddings (`robustloss.penalty`): three forwards and
      first-order backwards of a microbatch, so any attention, gradient checkpointing, ZeRO stage and adapter will do;
    - "one_sided": a one-sided difference: two, and an error of first instead of second order in the step;
    - "exact": by double backward: eager attention (or SDPA with only its math kernel allowed) and no ZeRO-3.

    The first two need the model: train them by `robustloss.penalty.directional_step`, or (with the graphs of all passes
    alive at once) by `robustloss.train.LossModule`.

    Args:
        beta: DPO's inverse temperature, > 0.
        rho: strength of the penalty, the radius of the ball, >= 0.
        squared: the mean of squared norms, or its root.
        penalty: "central", "one_sided" or "exact".
        step: how far a difference moves the embedding that it moves most, as a fraction of that embedding's norm, > 0;
            None: 1e-3 (central) or 1e-4 (one-sided); in half precision and under autocast what the first step measures
            of the model's curvature by two forwards more (`measured_step`, a buffer; 0 before), of "central" only:
            "one_sided" is then too inaccurate at any step, and needs one to be given.
        link, label_smoothing: as `DPOLoss`.
        reduction: "mean"; "none" is refused: the penalty is reported and trained as one number.

    State of "one_sided", which weighs its first pass before it knows the gradients: running means, float64, 0 before
    the first step: `stretch` of max_t ||u_t|| / ||z_t||, u the gradients of the log-probabilities by their own
    embeddings, t their tokens; and `mean_square` of ||grad_z l||^2. The first microbatch of a training has no penalty,
    and later a pair that these put off by more than a factor of 10 has none in that step.

    Metrics: `DPOLoss`'s; penalty/value and penalty/gradient_norm (the root of the mean squared norm); of a difference
    penalty/slope_error, by what fraction the difference quotients of the log-probabilities miss their slopes, which are
    known (above a few percent `step` is too long, or for the precision too short); and penalty/skipped, how many pairs
    of the step had no penalty ("one_sided").

    Example:
        The log-probabilities of a "model" that is linear in the embeddings, so that the gradients are known:

        >>> embeddings = torch.ones(2, 1, 1, requires_grad=True)  # chosen, rejected
        >>> chosen, rejected = (-embeddings).sum((1, 2)).chunk(2)
        >>> zero = torch.zeros(1)
        >>> loss_function = WDPOLoss(beta=0.1, rho=1.0, penalty="exact")
        >>> loss, metrics = loss_function(chosen, rejected, zero, zero, embeddings=embeddings, return_metrics=True)
        >>> metrics["penalty/gradient_norm"]  # sqrt(2) * beta * sigmoid(0)
        tensor(0.0707)
        >>> loss  # log 2 + rho * 0.0707^2
        tensor(0.6981, grad_fn=<AddBackward0>)
    """

    needs_embeddings = True
    measured_step: Tensor
    stretch: Tensor
    mean_square: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        rho: float = 0.01,
        squared: bool = True,
        *,
        penalty: str = "central",
        step: float | None = None,
        link: str = "logistic",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__(beta, label_smoothing, link, reduction=reduction)
        self._refuse_reduction_none("its penalty is reported and trained as one number")
        self.rho: float = check_number("rho", rho, at_least=0)
        if not isinstance(squared, bool):
            raise TypeError(f"squared must be a bool, got {type(squared).__name__}")
        self.squared = squared
        self.coupled: bool = not squared
        check_choice("penalty", penalty, ("central", "one_sided", "exact"))
        self.penalty = penalty
        self.step: float | None = None if step is None else check_number("step", step, above=0)
        if step is not None and penalty == "exact":
            raise ValueError("step is the length of a difference, which penalty='exact' has none of")
        if self.step is None and penalty == "central":
            self.register_buffer("measured_step", torch.zeros((), dtype=torch.float64))
        if penalty == "one_sided":
            self.register_buffer("stretch", torch.zeros((), dtype=torch.float64))
            self.register_buffer("mean_square", torch.zeros((), dtype=torch.float64))

    @property
    def differentiates_twice(self) -> bool:
        return self.penalty == "exact"

    @property
    def backwards_per_microbatch(self) -> int:
        """How many times a training step calls backward for each microbatch."""
        return {"central": 3, "one_sided": 2, "exact": 1}[self.penalty]

    def relative_step(self, dtype: torch.dtype) -> float:
        """`step`, or the default one for a model that computes in `dtype`.

        Raises:
            ValueError: "one_sided" in half precision, which has no good one.
        """
        if self.step is not None:
            return self.step
        if dtype not in HALF:
            return STEPS[self.penalty]
        if self.penalty == "one_sided":
            raise ValueError(
                f"WDPO's penalty 'one_sided' has no good step in {str(dtype).removeprefix('torch.')}, where its "
                "gradient would be off by 5% to 26%: choose penalty 'central', or float32, or give a step"
            )
        return float(self.measured_step) or 0.02

    def measures_step(self, dtype: torch.dtype) -> bool:
        """Whether the step for a model that computes in `dtype` is still to be measured."""
        return self.penalty == "central" and self.step is None and dtype in HALF and float(self.measured_step) == 0

    def remember(self, stretch: Tensor, mean_square: Tensor) -> None:
        """Take a step's means into the running ones."""
        for running, now in ((self.stretch, stretch), (self.mean_square, mean_square)):
            moved = torch.where(running > 0, 0.9 * running + 0.1 * now, now)
            self._write(running, torch.where(now.isfinite(), moved, running))

    def extra_repr(self) -> str:
        step = "" if self.step is None else f", step={self.step:g}"
        return f"{super().extra_repr()}, rho={self.rho:g}, squared={self.squared}, penalty={self.penalty!r}{step}"

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        embeddings: Tensor | None = None,
        weights: Tensor | None = None,
        return_metrics: bool = False,
    ) -> LossOutput:
        """As `DPOLoss.forward`, with the embeddings that the policy's log-probabilities were computed from.

        For training that is penalty "exact" alone: the others need the model. Under torch.no_grad all are the same.

        Args:
            embeddings: [2B, T, H], chosen rows first, then rejected (any [k B, ...] whose row i + j B belongs to pair
                i): part of the graph of the log-probabilities. Under torch.no_grad the penalty's value is still
                computed, if the log-probabilities themselves carry a graph.

        Raises:
            ValueError: embeddings missing, of a number of rows that is no multiple of B, or not in the graph; gradients
                wanted of a penalty that is not exact.
        """
        if torch.is_grad_enabled() and not self.differentiates_twice:
            raise ValueError(
                f"WDPOLoss(penalty={self.penalty!r}) needs the model to differentiate: train it with "
                "robustloss.penalty.directional_step or robustloss.train.LossModule, or choose penalty='exact'"
            )
        with torch.enable_grad():  # a conversion to float32 under torch.no_grad would cut the graph
            *logps, weights = self._prepare(
                policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, weights
            )
            embeddings = self._check_embeddings(embeddings, logps[0])
            losses = self.losses(*logps)
        if not losses.requires_grad:
            raise ValueError(
                "embeddings must be part of the graph of the policy's log-probabilities, which carry no graph"
            )
        value, _ = self.aggregate(losses, weights)
        penalty, norms = gradient_penalty(losses, embeddings, rho=self.rho, squared=self.squared, weights=weights)
        value = value + penalty
        if not torch.is_grad_enabled():
            value = value.detach()
        if not return_metrics:
            return value
        mean_norm = (normalized_weights(norms, weights) * norms).sum()
        metrics = {"penalty/gradient_norm": mean_norm.sqrt(), "penalty/value": penalty.detach()}
        return value, self._metrics(*logps) | metrics

    @staticmethod
    def _check_embeddings(embeddings: Tensor | None, like: Tensor) -> Tensor:
        if embeddings is None:
            raise ValueError(
                "embeddings is missing: WDPO differentiates its losses with respect to the input embeddings; pass the "
                "tensor given to the model as inputs_embeds (requires_grad=True), or train through "
                "robustloss.train.LossModule"
            )
        check_tensor("embeddings", embeddings)
        rows, pairs = len(embeddings) if embeddings.ndim else 0, len(like)
        if embeddings.ndim < 1 or (rows != pairs and (rows == 0 or pairs == 0 or rows % pairs)):
            raise ValueError(
                f"embeddings must have a multiple of {pairs} rows (chosen rows first, then rejected), "
                f"got {tuple(embeddings.shape)}"
            )
        if not embeddings.requires_grad:
            raise ValueError("embeddings must require grad: call .requires_grad_() before the model's forward")
        return embeddings
