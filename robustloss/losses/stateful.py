"""What losses with a state share: buffers that a checkpoint carries, the same in every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss.losses.base import PreferenceLoss


class StatefulLoss(PreferenceLoss):
    """A loss that learns from its batches: in training mode every call updates its buffers, in evaluation none does.

    With a `process_group` the batch is that of all its processes: the state is the same everywhere, and so is the
    value, and the gradient is such that the usual data-parallel mean gives that of the whole batch. All processes must
    then call the loss together, in training mode.
    """

    coupled = True
    process_group: dist.ProcessGroup | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulLoss:
        # Casting the model around the loss to bfloat16 would leave a moving average too few digits to move.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": None}  # a copy or a file is no member of it

    def _group(self) -> dist.ProcessGroup | None:
        return self.process_group if self.training else None


def sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """The sum of every process's values, of one shape."""
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


def gather_over(group: dist.ProcessGroup | None, values: Tensor) -> tuple[Tensor, slice]:
    """Every process's vector (of any length) behind each other in the order of ranks, and where this process's is."""
    if group is None:
        return values, slice(0, len(values))
    lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([len(values)], device=values.device), group=group)
    sizes = [int(length) for length in lengths]
    padded = torch.nn.functional.pad(values, (0, max(sizes) - len(values)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    start = sum(sizes[: group.rank()])
    together = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return together, slice(start, start + len(values))


def with_local_gradient(value: Tensor, share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`value`, with the gradient of this process's `share` of it times the number of processes, which the data-parallel
    mean divides by."""
    if group is None:
        return share
    share = group.size() * share
    return value.detach() + (share - share.detach())
