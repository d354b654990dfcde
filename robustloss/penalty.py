r"""The Wasserstein penalty trained by first-order backward passes, and whether a model has the second derivative that
training it exactly needs.

Of the sequences s of pair i (chosen and rejected) let u_s be the gradient of log pi_s by its own input embeddings z_s,
and p_s the derivative of l_i by log pi_s. Then

.. math:: \|\nabla_z l_i\|^2 = \sum_s p_s^2 \|u_s\|^2, \qquad
          \nabla_\theta \|\nabla_z l_i\|^2 = \sum_s k_s \nabla_\theta \log\pi_s
          + 2 p_s^2 \frac{d}{de} \nabla_\theta \log\pi_s(z_s + e u_s) \Big|_{e=0},

k_s the derivative of the first sum by log pi_s with every u held fixed. So the link is differentiated exactly, and only
the model by a difference, as in the product of a Hessian with a vector (Pearlmutter 1994, section 2): central,

.. math:: \frac{d}{de} \nabla_\theta \log\pi_s \approx
          \frac{\nabla_\theta \log\pi_s(z_s + e_s u_s) - \nabla_\theta \log\pi_s(z_s - e_s u_s)}{2 e_s},

or one-sided. e_s moves the token that is moved most by the fraction `step` of its embedding's norm. Nothing is
differentiated twice, so any attention, checkpointing, ZeRO stage and adapter will do. The rooted penalty rho sqrt(m), m
the weighted mean of the squared norms, has the gradient of the squared one with rho / (2 sqrt(m)) in place of rho.

The loss (`robustloss.losses.WDPOLoss`) is an argument here: this module lies below the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustloss._gather import Processes
from robustloss._random import RandomState
from robustloss.naive.gradient_penalty import gradient_penalty
from robustloss.naive.token_logps import samples_dtype

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# A one-sided pass must fix its weights before it knows the directions; a step off by more than this is not trusted.
TRUSTED_FACTOR = 10.0
# In half precision the step is measured: where the quotients of log-probabilities are off by AIM, those of gradients
# are by about five times that, and rounding adds as much again (random GPT-2, Llama, Qwen2 and Qwen3).
AIM, SHORT_STEP, LONG_STEP = 0.005, 0.005, 0.1
OUTSIDE = "embeddings must be part of the graph of the policy's log-probabilities, and require grad"


def directional_step(
    loss: Any,
    microbatches: Sequence[Any],
    logps_fn: Callable[[Any, Tensor | None], tuple[dict[str, Tensor], Tensor]],
    backward_fn: Callable[[Tensor], Any],
    *,
    masses: Sequence[float] | None = None,
    divisor: float = 1.0,
    group: dist.ProcessGroup | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of a directional `WDPOLoss` over all microbatches of all processes, one first-order pass at a time.

    No two graphs live together, so the memory is that of one pass and of one gradient by the embeddings (of one for
    each microbatch with `squared=False`, whose scale is known only after all of them). Every pass over a microbatch
    draws the same random numbers, so dropout is the same in all of them.

    Args:
        loss: a `WDPOLoss` whose penalty is "central" or "one_sided".
        microbatches: this process's, of any sizes; every process has the same number of them.
        logps_fn: (microbatch, offset) -> (arguments, embeddings). The arguments of `loss.forward` by name (weights [B]
            may be among them), the policy's computed from input embeddings plus offset and with a graph; and the
            embeddings [2B, T, H] without the offset, chosen rows first, in that graph. The offset is float32 (float64
            beside float64 log-probabilities) or None.
        backward_fn: takes a scalar, such as `Tensor.backward` or an engine's backward: called exactly
            `loss.backwards_per_microbatch` times for each microbatch.
        masses: the sum of weights (the number of pairs) of each of this process's microbatches. Where None, it is found
            by a forward without gradient of each microbatch but the first.
        divisor: what backward_fn divides by besides the mean over processes, such as gradient accumulation steps.
        group: the processes whose gradients are averaged; None: torch.distributed's default group where there is one.
        no_sync: as for `GlobalBatch.step`: gradients are exchanged in the last of all passes only.
        dtype: what the model computes in, which the default step depends on. None: what autocast casts to where this is
            called under autocast, else the embeddings' dtype; give it where logps_fn itself enters autocast.

    Returns:
        The loss over all processes' pairs, its penalty exact, detached; and `WDPOLoss`'s metrics. The same everywhere.

    Raises:
        ValueError: an exact loss; "one_sided" without a step in half precision; embeddings outside of the graph, or of
            another number of rows than 2B; masses that are not those of the pairs; numbers of microbatches that differ
            between processes.
    """
    if loss.differentiates_twice:
        raise ValueError("penalty 'exact' has no directions: call backward on the loss of LossModule.forward")
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    passes = len(microbatches) * loss.backwards_per_microbatch

    def counted(microbatch: Any, offset: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        nonlocal passes
        if torch.is_grad_enabled():
            passes -= 1
            if passes == 0:
                unsynchronized.close()
        return logps_fn(microbatch, offset)

    with ExitStack() as unsynchronized:
        if no_sync is not None:
            unsynchronized.enter_context(no_sync())
        return _directional_step(loss, microbatches, counted, backward_fn, masses, divisor, group, dtype)


def _directional_step(
    loss: Any,
    microbatches: Sequence[Any],
    logps_fn: Callable[[Any, Tensor | None], tuple[dict[str, Tensor], Tensor]],
    backward_fn: Callable[[Tensor], Any],
    masses: Sequence[float] | None,
    divisor: float,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    state = RandomState()
    first: Any = logps_fn(microbatches[0], None)
    if masses is None:
        with torch.no_grad():
            others = [logps_fn(microbatch, None)[0] for microbatch in microbatches[1:]]
        masses = [float(_weights(arguments).double().sum()) for arguments in (first[0], *others)]
    problem = None
    if len(masses) != len(microbatches):
        problem = ValueError(f"masses must be {len(microbatches)} numbers, one a microbatch, got {list(masses)}")
    processes = Processes(group, *((0, 1) if group is None else (group.rank(), group.size())))
    rows = processes.agree(len(microbatches), [float(sum(masses))], problem, first[1].device)
    mass = sum(row[0] for row in rows)
    scale = divisor * (1 if group is None else group.size()) / mass if mass else 0.0
    dtype = _computing_dtype_of(first[1]) if dtype is None else dtype
    step = loss.relative_step(dtype)
    one_sided = loss.penalty == "one_sided"
    stretch, square = (float(loss.stretch), float(loss.mean_square)) if one_sided else (0.0, 0.0)

    def further_passes(directions: _Directions, microbatch: Any, state: RandomState, rho: float) -> None:
        for offset, cotangents in directions.passes(rho):
            state.restore()
            logps = _logps(logps_fn(microbatch, offset)[0])
            directions.seen.append(logps.detach())
            backward_fn(scale * (cotangents * logps).sum())
        directions.gradient = None

    done: list[tuple[_Directions, Any, RandomState]] = []
    for index, microbatch in enumerate(microbatches):
        if index:
            state = RandomState()
            first = logps_fn(microbatch, None)
        arguments, embeddings = first
        first = None  # from here on nothing but this round's names keeps the graph alive
        logps = _logps(arguments)
        directions = _Directions(loss, arguments, logps.detach(), embeddings, step)
        if one_sided:
            directions.plan(loss.rho if loss.squared else _rooted(loss.rho, square), stretch)
        cotangents, gradient = _caught(logps), _caught(embeddings)
        backward_fn(scale * (directions.first_cotangents() * logps).sum())
        if not gradient or gradient[0] is None:  # a compiled model gives None for what only leaves it
            raise ValueError(OUTSIDE)
        # What has arrived at the log-probabilities, and not what was sent: a framework may scale a loss.
        directions.measure(gradient.pop(), cotangents.pop(), embeddings.detach())
        if index == 0 and loss.measures_step(dtype):
            step = _measure_step(directions, dtype, partial(logps_fn, microbatch), state, group)
        del arguments, embeddings, logps
        if one_sided and not stretch:
            stretch, square = directions.expectations()
        done.append((directions, microbatch, state))
        if loss.squared:
            further_passes(*done[-1], loss.rho)
    every = [directions for directions, _, _ in done]
    if not loss.squared:
        squares = torch.stack([directions.squares().sum() for directions in every]).sum()
        rho = _rooted(loss.rho, float(_sum_over(group, squares)) / mass if mass else 0.0)
        for each in done:
            further_passes(*each, rho)
    sums = _sums(loss, every, group)
    if not math.isclose(float(sums["mass"]), mass, rel_tol=1e-4):
        raise ValueError(
            f"masses add up to {mass:g}, but the pairs to {float(sums['mass']):g}, so this gradient is wrong"
        )
    if one_sided:
        loss.remember(sums["stretch"] / sums["mass"], sums["square"] / sums["mass"])
    return _value_and_metrics(loss, sums, every[0].logps.dtype)


def directional_loss(
    loss: Any, run: Callable[[Tensor | None], tuple[dict[str, Tensor], Any]], dtype: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One microbatch's loss as one number to call backward on: (loss, metrics).

    It has `directional_step`'s gradient, but all the passes' graphs are alive together. Where gradients are off it is
    the value alone.

    Args:
        loss: a directional `WDPOLoss`.
        run: offset -> (arguments, embeddings), as `directional_step`'s logps_fn of one microbatch.
        dtype: as for `directional_step`.
    """
    training, state = torch.is_grad_enabled(), RandomState()
    with torch.enable_grad():
        logps, directions = _directions_of(loss, run, state, training, dtype)
    if not training:
        return _value_and_metrics(loss, _sums(loss, [directions], None), logps.dtype)
    mass = directions.weights.sum() / 2
    rho = loss.rho if loss.squared else _rooted(loss.rho, float(directions.squares().sum() / mass))
    surrogate = (directions.weights * directions.slopes * logps).sum()
    surrogate = (surrogate + _penalty_surrogate(directions, logps, run, rho, state)) / mass
    value, metrics = _value_and_metrics(loss, _sums(loss, [directions], None), logps.dtype)
    return value + (surrogate - surrogate.detach()), metrics


def direction_error(module: Any, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> float:
    r"""How far the directional penalty's gradient by the parameters is from the exact one, on one microbatch:
    :math:`\|g - g_{exact}\| / \|g_{exact}\|`, both in the model's own dtype.

    Args:
        module: a `robustloss.train.LossModule` around a `WDPOLoss` that is not exact, outside of any engine.
        batch: as for the module.
        dtype: as for `directional_step`.

    Raises:
        ValueError: a model without a right second derivative, as `check_double_backward`; an exact loss.
    """
    loss = module.loss
    if loss.differentiates_twice:
        raise ValueError("penalty 'exact' has no directions, and so no error")
    check_double_backward(module)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = {name: buffer.clone() for name, buffer in loss.state_dict().items()}  # other processes' must stay equal

    def run(offset: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        return module.arguments_at(batch, offset)

    def gradient_of(value: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return [torch.zeros(()) if gradient is None else gradient.double() for gradient in gradients]

    with torch.enable_grad():
        state = RandomState()
        logps, directions = _directions_of(loss, run, state, True, dtype)
        mass = float(directions.weights.sum()) / 2
        factor = 1.0 if loss.squared else _rooted(1.0, float(directions.squares().sum()) / mass)
        ours = gradient_of(_penalty_surrogate(directions, logps, run, factor, state) / mass)
        state.restore()
        arguments, embeddings = run(None)
        losses = _pair_losses(loss, _logps(arguments), arguments)
        weights = arguments.get("weights")
        penalty, _ = gradient_penalty(losses, embeddings, rho=1.0, squared=loss.squared, weights=weights)
        exact = gradient_of(penalty)
    loss.load_state_dict(before)
    state.restore()
    error = sum(float((mine - right).square().sum()) for mine, right in zip(ours, exact, strict=True))
    size = sum(float(right.square().sum()) for right in exact)
    if size == 0:  # no pair has a slope, as beyond a hinge
        return 0.0 if error == 0 else float("inf")
    return (error / size) ** 0.5


class _Directions:
    """What the pass at z tells of a microbatch's sequences (2B, chosen first), and the passes that follow from it."""

    def __init__(self, loss: Any, arguments: dict[str, Tensor], logps: Tensor, embeddings: Tensor, step: float) -> None:
        if embeddings.ndim != 3 or len(embeddings) != len(logps):
            raise ValueError(
                f"embeddings must be [{len(logps)}, tokens, hidden] (chosen rows first, then rejected), "
                f"got {tuple(embeddings.shape)}"
            )
        self.loss = loss
        self.step = step  # relative; settled before `passes`
        self.logps = logps
        self.weights = _weights(arguments).to(logps.dtype).repeat(2)
        with torch.enable_grad():
            self._point = logps.clone().requires_grad_()
            losses = _pair_losses(loss, self._point, arguments)
            (self._slopes,) = torch.autograd.grad(losses.sum(), self._point, create_graph=True)
        self.losses, self.slopes = losses.detach(), self._slopes.detach()  # l_i [B], p_s [2B]
        chosen, rejected = logps.chunk(2)
        self.metrics = loss._metrics(chosen, rejected, *_reference(arguments, logps.dtype))
        self.planned = torch.zeros_like(logps)  # the weights of one-sided differences, known before their directions
        self.skipped = torch.zeros_like(self.losses, dtype=torch.bool)
        self.seen: list[Tensor] = []  # the log-probabilities of the further passes

    def plan(self, rho: float, stretch: float) -> None:
        """Fix 2 rho p^2 / e before the directions are known, e as for sequences of an expected stretch."""
        weights = 2 * rho * self.weights * self.slopes.square() * (stretch / self.step)
        # A weight of zero at z would hide the direction.
        hidden = (self.weights * self.slopes - weights).abs() < 0.05 * weights
        self.planned = torch.where(hidden, 1.1 * weights, weights)

    def first_cotangents(self) -> Tensor:  # [2B]
        return self.weights * self.slopes - self.planned

    def measure(self, gradient: Tensor, cotangents: Tensor, embeddings: Tensor) -> None:
        """Take `gradient` [2B, T, H], that of the embeddings, for `cotangents` [2B] times the directions u."""
        dtype = self.logps.dtype
        inverse = cotangents.to(dtype).reciprocal()
        inverse = torch.where(inverse.isfinite(), inverse, 0.0)
        self.gradient: Tensor | None = gradient
        self.inverse = inverse
        tokens = torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype) * inverse.abs().unsqueeze(-1)
        norms = torch.linalg.vector_norm(embeddings, dim=-1, dtype=dtype)
        self.direction_squares = tokens.square().sum(-1)  # ||u_s||^2
        self.stretch = torch.where(norms > 0, tokens / norms, 0.0).amax(-1)  # max_t ||u_t|| / ||z_t||
        self.curvature = torch.zeros_like(self.logps)  # k_s
        if self._slopes.requires_grad:  # the slope of a hinge is constant
            penalty = (self._slopes.square() * self.direction_squares).sum()
            (self.curvature,) = torch.autograd.grad(penalty, self._point)

    def squares(self) -> Tensor:
        """w_i ||grad_z l_i||^2, [B]."""
        chosen, rejected = (self.weights * self.slopes.square() * self.direction_squares).chunk(2)
        return chosen + rejected

    def expectations(self) -> tuple[float, float]:
        """The weighted means of the stretch and of ||grad_z l||^2."""
        mass = self.weights.sum().clamp(min=1e-30)
        return float((self.weights * self.stretch).sum() / mass), float(2 * self.squares().sum() / mass)

    def passes(self, rho: float) -> Iterator[tuple[Tensor, Tensor]]:
        """(offset [2B, T, H], cotangents of the log-probabilities there [2B]) of every further pass."""
        squares, curvature = self.weights * self.slopes.square(), rho * self.weights * self.curvature
        if self.loss.penalty == "central":
            self.lengths = _ratio(torch.full_like(self.stretch, self.step), self.stretch)
            difference = rho * _ratio(squares, self.lengths)
            offset = self.offset()
            yield offset, curvature / 2 + difference
            yield offset.neg_(), curvature / 2 - difference
        else:
            self.lengths = _ratio(2 * rho * squares, self.planned)
            moved = self.lengths * self.stretch / self.step
            trusted = (moved >= 1 / TRUSTED_FACTOR) & (moved <= TRUSTED_FACTOR)
            skipped = ~trusted & (squares * self.direction_squares > 0) & (rho > 0)
            self.skipped = skipped.view(2, -1).any(0)
            trusted = trusted & ~self.skipped.repeat(2)
            # At offset zero the two passes' weights add up to those of the plain loss.
            self.lengths = torch.where(trusted, self.lengths, 0.0)
            yield self.offset(), self.planned + torch.where(trusted, curvature, 0.0)

    def slope_error(self) -> Tensor:
        """sum w p^2 | ||u||^2 - its difference quotient |, of the sequences that were moved."""
        central = len(self.seen) == 2
        quotient = _ratio(self.seen[0] - (self.seen[1] if central else self.logps), self.lengths * len(self.seen))
        error = (quotient - self.direction_squares).abs() * (self.lengths > 0)
        return (self.weights * self.slopes.square() * error).sum()

    def offset(self) -> Tensor:
        assert self.gradient is not None
        return self.gradient.to(self.logps.dtype) * (self.lengths * self.inverse).view(-1, 1, 1)


def _directions_of(
    loss: Any, run: Any, state: RandomState, training: bool, dtype: torch.dtype | None
) -> tuple[Tensor, _Directions]:
    """The log-probabilities at z with their graph, and the directions, of one microbatch in a graph of its own. Where
    nothing trains there is no step.
    """
    arguments, embeddings = run(None)
    logps = _logps(arguments)
    dtype = _computing_dtype_of(embeddings) if dtype is None else dtype
    step = loss.relative_step(dtype) if training else math.nan
    directions = _Directions(loss, arguments, logps.detach(), embeddings, step)
    ones = torch.ones_like(logps)
    # grad_outputs and not logps.sum(), which would have no graph of its own under torch.no_grad.
    (gradient,) = torch.autograd.grad(logps, embeddings, ones, retain_graph=training, allow_unused=True)
    if gradient is None:
        raise ValueError(OUTSIDE)
    directions.measure(gradient, ones, embeddings.detach())
    if training and loss.measures_step(dtype):
        _measure_step(directions, dtype, run, state, None)
    return logps, directions


def _penalty_surrogate(directions: _Directions, logps: Tensor, run: Any, rho: float, state: RandomState) -> Tensor:
    """A sum of log-probabilities whose gradient is that of the penalty, times the sum of weights."""
    surrogate = torch.zeros_like(logps.sum())
    if directions.loss.penalty == "one_sided":
        squares = directions.weights * directions.slopes.square()
        directions.planned = 2 * rho * squares * directions.stretch / directions.step
        surrogate = surrogate - (directions.planned * logps).sum()
    for offset, cotangents in directions.passes(rho):
        state.restore()
        surrogate = surrogate + (cotangents * _logps(run(offset)[0])).sum()
    return surrogate


def _measure_step(
    directions: _Directions, dtype: torch.dtype, run: Any, state: RandomState, group: dist.ProcessGroup | None
) -> float:
    """Remember, take and return the step at which the log-probabilities' central difference quotients are off by AIM.

    It is read off a step so long that rounding is nothing beside it; the error is of second order in the step.
    """
    directions.lengths = _ratio(torch.full_like(directions.stretch, LONG_STEP), directions.stretch)
    offset = directions.offset()
    with torch.no_grad():
        for _ in range(2):
            state.restore()
            directions.seen.append(_logps(run(offset)[0]))
            offset.neg_()
    missed, known = _sum_over(group, torch.stack([directions.slope_error(), directions.squares().sum()])).tolist()
    directions.seen.clear()
    if known > 0 and missed < float("inf"):  # else there is nothing to measure here: another step will
        step = LONG_STEP * (AIM * known / missed) ** 0.5 if missed > 0 else LONG_STEP
        directions.loss.measured_step.fill_(min(max(step, SHORT_STEP), LONG_STEP))
    directions.step = directions.loss.relative_step(dtype)
    return directions.step


def _sums(loss: Any, every: Sequence[_Directions], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """What the value and the metrics are made of, summed over microbatches and processes: float64 scalars."""
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor | float) -> None:
        value = torch.as_tensor(value, dtype=torch.float64, device=every[0].logps.device)
        sums[name] = sums[name] + value if name in sums else value

    for directions in every:
        pairs = len(directions.losses)
        weights = directions.weights.chunk(2)[0]
        add("pairs", pairs)
        add("mass", weights.sum())
        add("loss", (weights * directions.losses).sum())
        add("square", directions.squares().sum())
        for name, metric in directions.metrics.items():
            add(name, metric * pairs if pairs else 0.0)
        if directions.seen:
            add("slope_error", directions.slope_error())
        if loss.penalty == "one_sided":
            add("stretch", (directions.weights * directions.stretch).sum() / 2)
            add("skipped", directions.skipped.sum())
    total = _sum_over(group, torch.stack(list(sums.values())))
    return dict(zip(sums, total.unbind(), strict=True))


def _value_and_metrics(loss: Any, sums: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    sums = dict(sums)
    pairs, mass = sums.pop("pairs"), sums.pop("mass").clamp(min=1e-300)
    square = sums.pop("square") / mass
    penalty = loss.rho * (square if loss.squared else square.sqrt())
    value = sums.pop("loss") / mass + penalty
    sums.pop("stretch", None)
    skipped, slope_error = sums.pop("skipped", None), sums.pop("slope_error", None)
    metrics = {name: metric / pairs for name, metric in sums.items()}
    metrics |= {"penalty/gradient_norm": square.sqrt(), "penalty/value": penalty}
    if slope_error is not None:
        metrics["penalty/slope_error"] = slope_error / (square * mass).clamp(min=1e-300)
    if skipped is not None:
        metrics["penalty/skipped"] = skipped
    return value.to(dtype), {name: metric.to(dtype) for name, metric in metrics.items()}


def computing_dtype(embeddings: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What a model computes in, of embeddings of that dtype and under autocast to the other: float64 is not cast."""
    return autocast if autocast is not None and embeddings == torch.float32 else embeddings


def _computing_dtype_of(embeddings: Tensor) -> torch.dtype:
    device = embeddings.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return computing_dtype(embeddings.dtype, autocast)


def _logps(arguments: dict[str, Tensor]) -> Tensor:  # [2B], chosen rows first
    logps = [arguments[name] for name in POLICY]
    return torch.cat(logps).to(samples_dtype(*logps))


def _reference(arguments: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(arguments[name].detach().to(dtype) for name in REFERENCE)


def _pair_losses(loss: Any, logps: Tensor, arguments: dict[str, Tensor]) -> Tensor:  # [B]
    return loss.losses(*logps.chunk(2), *_reference(arguments, logps.dtype))


def _weights(arguments: dict[str, Tensor]) -> Tensor:  # [B]
    weights = arguments.get("weights")
    return torch.ones_like(arguments[POLICY[0]].detach()) if weights is None else weights.detach()


def _rooted(rho: float, square: float) -> float:
    """rho / (2 sqrt(m)); zero is a subgradient of the root at m = 0."""
    return rho / (2 * square**0.5) if square > 0 else 0.0


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The ratio, and 0 where the denominator is."""
    return torch.where(denominator != 0, numerator / denominator, 0.0)


def _caught(value: Tensor) -> list[Any]:
    """An empty list that will hold the gradient of `value`, None if it has none, once a backward pass has come by."""
    if not value.requires_grad:
        raise ValueError(OUTSIDE)
    caught: list[Any] = []
    value.register_hook(caught.append)
    return caught


def _sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


INSTEAD = 'load the model with attn_implementation="eager"'
OTHERWISE = "or WDPOLoss(penalty='central')"


def check_double_backward(model: nn.Module, *, zero_stage: int = 0) -> None:
    """Refuse a model whose second derivative is missing or wrong.

    Args:
        model: a Hugging Face model, wrapped or not (its attention is read from its modules' `config`); a DeepSpeed
            engine must hold the loss too, as one around `robustloss.train.LossModule` does.
        zero_stage: DeepSpeed's ZeRO stage that the model will be trained with, where it is in no engine yet.

    Raises:
        ValueError: ZeRO-3; a loss outside of the engine; flash, flex or other fused attention; SDPA while its fused
            kernels are allowed; reentrant checkpointing.
    """
    # ZeRO-3 marks the parameters that it has taken to pieces.
    if zero_stage == 3 or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "exact WDPO has no second derivative under ZeRO-3, which releases parameters in between: use zero_stage 0, "
            f"1 or 2, {OTHERWISE}"
        )
    for module in model.modules():
        if any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__) and not any(
            getattr(inside, "differentiates_twice", False) for inside in module.modules()
        ):
            # Its outputs carry hooks that divide every gradient by the accumulation steps, the inner one too.
            raise ValueError(
                "exact WDPO outside of the DeepSpeed engine has no second derivative, or (ZeRO-1) a wrong one: give "
                f"deepspeed.initialize robustloss.train.LossModule(model, loss), {OTHERWISE}"
            )
    # Every module's config, so that a model inside a wrapper (DDP, PEFT, an engine) is seen too.
    configs = [getattr(module, "config", None) for module in model.modules()]
    for attention in {getattr(config, "_attn_implementation", None) for config in configs}:
        _check_attention(attention)
    for name, module in model.named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if (
            getattr(module, "gradient_checkpointing", False)
            and checkpoint is not None
            # Reentrant is what torch.utils.checkpoint, DeepSpeed's and others are unless they are told otherwise.
            and not (isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant") is False)
        ):
            raise ValueError(
                "exact WDPO needs a second derivative, which the reentrant gradient checkpointing of "
                f"{name or 'the model'} lacks: "
                f'enable it with gradient_checkpointing_kwargs={{"use_reentrant": False}}, {OTHERWISE}'
            )


def _check_attention(attention: str | None) -> None:
    if attention == "sdpa":
        allowed = [
            name
            for name, enabled in (
                ("flash", torch.backends.cuda.flash_sdp_enabled()),
                ("memory-efficient", torch.backends.cuda.mem_efficient_sdp_enabled()),
                ("cuDNN", torch.backends.cuda.cudnn_sdp_enabled()),
            )
            if enabled
        ]
        if allowed:
            raise ValueError(
                f"exact WDPO needs a second derivative, which SDPA's {' and '.join(allowed)} kernels lack: {INSTEAD}, "
                "allow only the math kernel (torch.backends.cuda.enable_flash_sdp(False) and its siblings), "
                f"{OTHERWISE}"
            )
    elif attention not in (None, "eager"):
        raise ValueError(
            f"exact WDPO needs a second derivative, which attention {attention!r} lacks or drops silently: {INSTEAD}, "
            f"{OTHERWISE}"
        )
