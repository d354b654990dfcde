"""What the microbatches of one optimizer step share, and what processes tell each other of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss._gather import Processes
from robustloss._random import RandomState
from robustloss.global_batch import NonFiniteError


class Window:
    """The microbatches of one optimizer step in this process, and what the first of them has found out for all."""

    def __init__(self, microbatches: Sequence[Any]):
        self.microbatches = list(microbatches)
        self.trained = 0  # how many have had their turn
        self.inputs: dict[int, Any] = {}  # prepared, with their reference
        self.before: Any = {}, RunningMeans()  # the loss's state and metrics without this window
        self.problem: Exception | None = None  # of this process, which the others have not been told yet
        self.states: list[RandomState] = []  # where the random numbers stood before each
        self.after: RandomState | None = None  # and after all of them
        self.value: Any = None
        self.cotangents: list[dict[str, Tensor]] = []
        self.shares: list[float] = []
        self.arguments: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.microbatches)

    def masses(self, samples: Any) -> list[float] | None:
        masses = [samples(microbatch) for microbatch in self.microbatches]
        return None if None in masses else [float(mass) for mass in masses]


def mass_of(arguments: dict[str, Tensor]) -> float:
    weights = arguments.get("weights")
    if weights is not None:
        return float(weights.sum())
    return float(len(next(value for name, value in arguments.items() if name.startswith("policy_"))))


def wrong_mass(trainer: Any, expected: float, arguments: dict[str, Tensor]) -> ValueError | None:
    found = mass_of(arguments)
    if math.isclose(found, expected, rel_tol=1e-4):
        return None
    return ValueError(
        f"{type(trainer).__name__}.samples says {expected:g} of a microbatch, and loss_arguments gave the loss "
        f"{found:g} samples (or weights that add up to it)"
    )


def agree(arguments: dict[str, Tensor], index: int, problem: Exception | None = None) -> None:
    """Raise a problem that one process has with its microbatch in all, before they wait in a backward."""
    floating = [value for value in arguments.values() if value.is_floating_point()]
    bad = not bool(torch.stack([value.isfinite().all() for value in floating]).all())
    rows = _processes().agree(1, [float(bad)], None if bad else problem, floating[0].device)
    if any(row[0] for row in rows):
        raise NonFiniteError(f"log-probabilities are not finite in microbatch {index} of this step")


def _processes() -> Processes:
    if not (dist.is_available() and dist.is_initialized()):
        return Processes(None, 0, 1)
    return Processes(None, dist.get_rank(), dist.get_world_size())


class RunningMeans:
    """Of each metric over the batches that have it (NaN says that one has not), without waiting for a device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # by names, [2, names]: sums and counts

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        if not metrics:
            return
        names, device = tuple(metrics), next(iter(metrics.values())).device
        values = torch.stack([value.detach().to(device, torch.float64) for value in metrics.values()])
        sums = torch.stack([values.masked_fill(values.isnan(), 0.0), (~values.isnan()).double()])
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums

    def read(self) -> dict[str, float]:
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for names, sums in self._sums.items():
            for name, total, count in zip(names, *sums.tolist(), strict=True):
                totals[name][0] += total
                totals[name][1] += count
        return {name: total / count for name, (total, count) in totals.items() if count}

    def copy(self) -> RunningMeans:
        other = RunningMeans()
        other._sums = dict(self._sums)
        return other
