"""Steps whose loss, log-probabilities or gradient are not finite are left out, not trained on.

A step that is left out leaves no trace in the engine: the parameters, the optimizer's states, DeepSpeed's counters and
the learning-rate schedule (a function of the optimizer steps that were taken) are those of before it, to the bit. So
each of them shifts the schedule by one step, and the run ends that much before its end. What a step draws from the
random generators stays drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from robustloss.train.distributed import is_first
from robustloss.train.interrupt import Preemption

logger = logging.getLogger(__name__)

TOLD_ROWS = 16  # more would not be read


class TooManySkippedSteps(FloatingPointError):
    """Steps in a row that could not be taken; every process finds the same."""


class Guard:
    """Counts the steps that are left out, and stops a run that leaves out `max_skipped` of them in a row.

    Args:
        max_skipped: 1 stops at the first.

    Attributes:
        skipped: all steps left out so far, for the metrics.
    """

    def __init__(self, max_skipped: int = 3) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0
        self._in_a_row = 0

    def accept(self) -> None:
        """The step was taken."""
        self._in_a_row = 0

    def skip(
        self, step: int, reason: Exception | str, rows_of: Callable[[int, int], Sequence[int]] | None = None
    ) -> None:
        """The step is left out. All processes call it, for the same reason.

        Args:
            step: its number, from 1.
            reason: what was not finite. Of an error with `positions`, (process, microbatch, row) of the samples that
                were not finite, the rows of the data are told.
            rows_of: (process, microbatch) -> the indices of its rows in the training split, in this step.

        Raises:
            TooManySkippedSteps: it is the last of `max_skipped` in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        message = f"step {step}: {reason}{_told_rows(getattr(reason, 'positions', ()), rows_of)}"
        if self._in_a_row >= self.max_skipped:
            in_a_row = f"{self._in_a_row} steps in a row were" if self._in_a_row > 1 else "the step was"
            raise TooManySkippedSteps(
                f"{message}; {in_a_row} left out, and the run ends; start again with a lower "
                "optimizer.learning_rate in another output_dir, or look at the data of these steps"
            )
        if is_first():
            logger.warning("%s; the step is left out (%d in a row)", message, self._in_a_row)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint holds of it, so that a resumed run counts on."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


def _told_rows(positions: Sequence[tuple[int, int, int]], rows_of: Callable[[int, int], Sequence[int]] | None) -> str:
    if not positions or rows_of is None:
        return ""
    rows = sorted({int(rows_of(process, microbatch)[row]) for process, microbatch, row in positions})
    more = f" and {len(rows) - TOLD_ROWS} more" if len(rows) > TOLD_ROWS else ""
    return f", rows {rows[:TOLD_ROWS]}{more} of data.train (counted from 0)"


@torch.no_grad()
def gradient_norm(engine: Any, preemption: Preemption | None = None) -> float:
    """The norm of the gradient of all parameters and processes, before clipping; not finite where the gradient is not.

    All processes call it, between the last engine.backward of a step and engine.step, and get the same number.
    DeepSpeed by itself trains on a NaN in fp32 without ZeRO, and elsewhere counts a step that it has left out.

    Args:
        engine: DeepSpeed's, without offloading.
        preemption: lets its flags travel along, so that `requested()` costs nothing in this step.

    Raises:
        RuntimeError: gradients are still to be accumulated, and not yet summed over the processes.
    """
    if not engine.is_gradient_accumulation_boundary():
        raise RuntimeError("gradient_norm must be called after the last engine.backward of a step")
    optimizer, share = engine.optimizer, 1 / dist.get_world_size()  # of a gradient that every process holds whole
    if engine.zero_optimization_stage() == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    elif hasattr(optimizer, "averaged_gradients"):  # its own partition, with zeros for padding
        gradients, share = [gradient for group in optimizer.averaged_gradients.values() for gradient in group], 1.0
    else:  # ZeRO-1 in bf16 with sums in fp32 has an optimizer of its own
        gradients = optimizer.get_grads_for_norm(for_clipping=True)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    if norms:
        squares = torch.stack(norms).double().square().sum() * share
    else:
        squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    return math.sqrt((preemption or Preemption(engine.device)).sum_with(squares))


def discard_gradients(engine: Any) -> None:
    """Throw away what has been accumulated since the last optimizer step, wherever the engine keeps it.

    The next engine.backward is the first of a new step. All processes call it, in place of engine.step; how many
    microbatches went backward before it does not matter.
    """
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)  # ZeRO-3: and the next microbatch overwrites the partitions
    if hasattr(optimizer, "all_grad_tensors"):  # ZeRO-1 and 2
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
        optimizer.all_grad_tensors.update(dict.fromkeys(optimizer.all_grad_tensors))
    elif hasattr(optimizer, "averaged_gradients"):  # ZeRO-3
        for group in optimizer.averaged_gradients.values():
            for gradient in group:
                gradient.zero_()  # a parameter that the next step leaves out must not find a NaN here
        optimizer.averaged_gradients = {}
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
