"""One optimizer step: the loss of all processes' and all microbatches' samples as one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss.global_batch import GlobalBatch, NonFiniteError
from robustloss.penalty import direction_error, directional_step
from robustloss.train.distributed import gather, mean_by_name
from robustloss.train.guard import Guard, discard_gradients, gradient_norm
from robustloss.train.interrupt import Preemption
from robustloss.train.loss_module import loss_arguments

Batch = dict[str, Tensor]


def take_step(
    engine: Any,
    microbatches: list[Batch],
    guard: Guard,
    preemption: Preemption,
    *,
    step: int,
    rows_of: Callable[[int, int], list[int]],
    checks_directions: bool = False,
) -> dict[str, float] | None:
    """One optimizer step: its metrics; None where it was left out, as something in it was not finite.

    Args:
        step: its number, from 1.
        rows_of: (process, microbatch) -> its rows of the training split.
        checks_directions: also compare the directional penalty's gradient with the exact one.
    """
    loss = engine.module.loss
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    reason, values = None, {}
    try:
        value, metrics = accumulate_gradients(engine, microbatches)
        values = _as_numbers({"loss": value, **metrics})
        values["gradient_norm"] = gradient_norm(engine, preemption)  # their flags travel together
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        if bad:
            reason = " and ".join(f"{name} is {values[name]}" for name in bad)
    except FloatingPointError as error:
        reason = error.with_traceback(None)  # which would keep a graph alive
    if reason is not None:
        discard_gradients(engine)
        loss.load_state_dict(state)
        guard.skip(step, reason, rows_of)
        return None
    if checks_directions:
        values |= check_directions(engine, microbatches[0])
    engine.step()
    guard.accept()
    return values


def _as_numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, by one copy from the device, for which the host waits."""
    numbers = torch.stack([value.detach().to(torch.float64) for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def accumulate_gradients(engine: Any, microbatches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the gradient of the global batch's loss in the engine, for `engine.step()` to use: (loss, metrics), both
    of the global batch. All processes call it, each with as many microbatches.

    Raises:
        FloatingPointError: log-probabilities or a loss that are not finite, in all processes alike.
    """
    loss = engine.module.loss
    # DeepSpeed divides by it what it is given.
    divisor = engine.gradient_accumulation_steps()
    backward = _Backward(engine)
    sizes = [float(len(batch["index"])) for batch in microbatches]
    if not loss.needs_embeddings:

        def arguments(batch: Batch) -> dict[str, Tensor]:
            return loss_arguments(loss, engine(batch, output="logps"), batch)

        def surrogate(batch: Batch, cotangents: dict[str, Tensor]) -> Tensor:
            named = {name.removeprefix("policy_"): value for name, value in cotangents.items()}
            return engine(batch, output="surrogate", cotangents=named)

        return GlobalBatch(loss).step(
            microbatches, arguments, backward, surrogate_fn=surrogate, masses=sizes, divisor=divisor
        )
    if loss.differentiates_twice:
        return _with_exact_penalty(engine, microbatches, backward, divisor)

    def arguments_at(batch: Batch, offset: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        logps = engine(batch, output="logps", embedding_offset=offset)
        embeddings, engine.module.embeddings = engine.module.embeddings, None  # not kept beyond the step
        return loss_arguments(loss, logps, batch), embeddings

    return directional_step(loss, microbatches, arguments_at, backward, masses=sizes, divisor=divisor)


class _Backward:
    """`engine.backward`, with the `engine.step` by which DeepSpeed counts it, but for the last of a step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.called = False

    def __call__(self, value: Tensor) -> None:
        if self.called:
            self.engine.step()
        self.engine.backward(value)
        self.called = True


def _with_exact_penalty(
    engine: Any, microbatches: list[Batch], backward: Callable[[Tensor], None], divisor: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Exact WDPO differentiates inside the engine, microbatch by microbatch: its loss is a mean over them."""
    sizes = [len(batch["index"]) for batch in microbatches]
    total = sum(sum(sizes) for sizes in gather(sizes))
    records = []
    for batch, size in zip(microbatches, sizes, strict=True):
        problem = None
        try:
            value: Tensor = engine(batch)
        except FloatingPointError as error:  # in this process alone
            problem, value = str(error), torch.zeros(())
        if not bool(value.isfinite()):
            problem = f"the loss is {float(value.detach())}"
        problems = [problem for problem in gather(problem) if problem]
        if problems:
            raise NonFiniteError(problems[0])
        backward(value * (divisor * dist.get_world_size() * size / total))
        records.append((_as_numbers({"loss": value.detach(), **engine.module.metrics}), float(size)))
    means = mean_by_name(record for records in gather(records) for record in records)
    metrics = {name: torch.tensor(mean) for name, mean in means.items()}
    return metrics.pop("loss"), metrics


def check_directions(engine: Any, batch: Batch) -> dict[str, float]:
    """How far the directional penalty's gradient is from the exact one, on one microbatch, the worst process's."""
    return {"penalty/direction_error": max(gather(direction_error(engine.module, batch)))}
