"""What losses with a state share: buffers that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from robustloss.losses.base import PreferenceLoss


class StatefulLoss(PreferenceLoss):
    """A loss that learns from its batches: a step of training updates its buffers, an evaluation does not.

    Under `robustloss.GlobalBatch` the batch is that of all processes and microbatches: the state is updated once a
    step, and is the same in every process.
    """

    coupled = True

    @staticmethod
    def _write(buffer: Tensor, value: Tensor) -> None:
        # By a view: torch.compile takes a float64 scalar on the CPU for a number, and loses what is written to it.
        buffer.view(-1).copy_(value.view(-1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulLoss:
        # Casting the model around the loss to bfloat16 would leave a moving average too few digits to move.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
