"""The held-out split: its loss as one batch, and every sample's rewards for the report's pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustloss.train.distributed import gather, mean_by_name
from robustloss.train.loss_module import loss_arguments
from robustloss.train.references import Batch, logps_table


def evaluate(
    engine: Any,
    count: int,
    collate: Callable[[list[int]], Batch],
    reference: Callable[[Batch], Batch],
    *,
    size: int,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The loss and its metrics over the whole split, and rewards, margins and tilt weights sample by sample.

    A coupled loss is that of the split as one batch, whatever the microbatch and the number of processes. WDPO's
    penalty needs the model, so it is the mean over microbatches. All processes call it.
    """
    loss = engine.module.loss
    with_model = loss.needs_embeddings
    penalised: list[tuple[dict[str, float], float]] = []

    def columns(batch: Batch) -> dict[str, Tensor]:
        batch = reference(batch)
        if with_model:
            value = engine(batch)
            metrics = {name: float(metric) for name, metric in engine.module.metrics.items()}
            penalised.append(({"loss": float(value), **metrics}, len(batch["index"])))
            logps = engine.module.logps
        else:
            logps = engine(batch, output="logps")
        given = {name: batch[name] for name in batch if name.startswith("ref_") or name in ("desirable", "group")}
        return {**logps, **given}

    engine.eval()
    try:
        return _evaluate(loss, *logps_table(columns, count, collate, size=size, device=device), penalised)
    finally:
        engine.train()  # not before: a loss with a state would learn from the held-out split


def _evaluate(
    loss: Any, table: dict[str, Tensor], counted: list[bool], penalised: list[tuple[dict[str, float], float]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    for name, column in table.items():
        if not bool(column.isfinite().all()):
            raise FloatingPointError(f"{name} of the held-out split are not finite")
    arrays = _arrays(loss, {name: column.cpu() for name, column in table.items()})
    if loss.needs_embeddings:
        kept = [record for record, counts in zip(penalised, counted, strict=True) if counts]
        return mean_by_name(record for records in gather(kept) for record in records), arrays
    with torch.no_grad():
        value, metrics = loss(**loss_arguments(loss, table, table), return_metrics=True)
    return {"loss": float(value), **{name: float(metric) for name, metric in metrics.items()}}, arrays


def _pairs(table: dict[str, Tensor]) -> tuple[Tensor, ...]:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return tuple(table[name] for name in names)


def _arrays(loss: Any, table: dict[str, Tensor]) -> dict[str, list[float]]:
    if not loss.paired:
        rewards, desirable = loss.rewards(table["logps"], table["ref_logps"]), table["desirable"].bool()
        return {"desirable_rewards": rewards[desirable].tolist(), "undesirable_rewards": rewards[~desirable].tolist()}
    chosen, rejected, ref_chosen, ref_rejected = _pairs(table)
    arrays = {
        "chosen_rewards": loss.rewards(chosen, ref_chosen),
        "rejected_rewards": loss.rewards(rejected, ref_rejected),
        "policy_margins": chosen - rejected,
        "ref_margins": ref_chosen - ref_rejected,
    }
    aggregate = getattr(loss, "aggregate", None)
    if aggregate is not None and aggregate.coupled:
        # An aggregate's weight of a sample is the derivative of its value by the sample's loss.
        losses = loss.losses(chosen, rejected, ref_chosen, ref_rejected).detach().requires_grad_()
        (arrays["tilt_weights"],) = torch.autograd.grad(aggregate(losses, None)[0], losses)
    return {name: array.tolist() for name, array in arrays.items()}
