"""Vectors of all processes behind each other, and errors that all of them learn of.

A step has two exchanges: a header (what each process has) and the values. Nothing here differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustloss.validation import FLOATING_DTYPES, INTEGER_DTYPES

DTYPES = (*FLOATING_DTYPES, *INTEGER_DTYPES, torch.bool)  # float64 holds them all exactly (integers up to 2^53)


@dataclass(frozen=True)
class Processes:
    group: dist.ProcessGroup | None
    rank: int
    count: int

    def all_gather(self, vector: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [vector]
        parts = [torch.empty_like(vector) for _ in range(self.count)]
        dist.all_gather(parts, vector, group=self.group)
        return parts

    def agree(
        self, microbatches: int, row: list[float], problem: Exception | None, device: torch.device | None = None
    ) -> list[list[float]]:
        """Every process's row of numbers, once none has a problem and all have as many microbatches."""
        overflow = isinstance(problem, FloatingPointError)
        rows = [[0 if problem is None else 2 if overflow else 1, microbatches, *row]]
        if self.count > 1:
            own = torch.tensor(rows[0], dtype=torch.float64, device=device or self._default_device())
            rows = torch.stack(self.all_gather(own)).tolist()
        if problem is not None:
            raise problem
        failed = [process for process, row in enumerate(rows) if row[0]]
        if failed:
            kind = FloatingPointError if all(row[0] != 1 for row in rows) else ValueError
            raise kind(f"processes {failed} gave the loss what it cannot take; their own errors say why")
        numbers = [int(row[1]) for row in rows]
        if min(numbers) != max(numbers) or not numbers[0]:
            raise ValueError(f"every process must have the same number of microbatches, at least one, got {numbers}")
        return [row[2:] for row in rows]

    def _default_device(self) -> torch.device:
        """Where the group can gather, if there is no tensor to tell."""
        backend = dist.get_backend(self.group)
        cuda = "nccl" in backend or (backend not in ("gloo", "mpi") and torch.cuda.is_initialized())
        return torch.device("cuda" if cuda else "cpu")


@dataclass
class Gathered:
    processes: Processes
    whole: dict[str, Tensor]  # by argument, [n]: every process's microbatches behind each other
    lengths: dict[str, list[int]]  # by argument, of each process
    own_sizes: dict[str, list[int]]  # by argument, of each own microbatch

    def own(self, name: str) -> slice:
        """Where the own samples are."""
        start = sum(self.lengths[name][: self.processes.rank])
        return slice(start, start + self.lengths[name][self.processes.rank])

    def by_own_microbatch(self, vectors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        parts = {name: vector[self.own(name)].split(self.own_sizes[name]) for name, vector in vectors.items()}
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def non_finite(self) -> tuple[list[str], list[tuple[int, int, int]]]:
        """The arguments that hold NaN or infinity, and where: (process, microbatch, row), sorted."""
        vectors = {name: vector for name, vector in self.whole.items() if vector.is_floating_point()}
        if torch.cat(list(vectors.values())).isfinite().all():
            return [], []
        names, positions = [], set()
        for name, vector in vectors.items():
            own_sizes = torch.tensor(self.own_sizes[name], device=vector.device)
            places = [
                (process, microbatch, row)
                for process, sizes in enumerate(self.processes.all_gather(own_sizes))
                for microbatch, size in enumerate(sizes.tolist())
                for row in range(size)
            ]
            bad = [places[index] for index in (~vector.isfinite()).nonzero().flatten().tolist()]
            names += [name] if bad else []
            positions |= set(bad)
        return names, sorted(positions)


def gather(
    processes: Processes, names: Sequence[str], logps: list[dict[str, Tensor]], problem: Exception | None = None
) -> Gathered:
    """What all processes give the loss, from each own microbatch's arguments: one exchange of sizes, one of values.

    `problem`: what this process has met before, to be raised once all know of it.
    """
    problem = _problem_of(logps, names) or problem
    present = [] if problem or not logps else [name for name in names if name in logps[0]]
    columns = {name: torch.cat([own[name].detach() for own in logps]) for name in present}
    dtypes = [DTYPES.index(columns[name].dtype) if name in columns else -1 for name in names]
    own_lengths = [len(columns[name]) if name in columns else 0 for name in names]
    device = columns[present[0]].device if present else None
    rows = processes.agree(len(logps), [*dtypes, *own_lengths], problem, device)

    told = [
        {name: DTYPES[int(code)] for name, code in zip(names, row[: len(names)], strict=True) if code >= 0}
        for row in rows
    ]
    for process, arguments in enumerate(told):
        if arguments != told[0]:
            raise ValueError(
                "every process must give the loss the same arguments of the same dtypes, got "
                f"{told[0]} in process 0 and {arguments} in process {process}"
            )
    lengths = {name: [int(row[len(names) + names.index(name)]) for row in rows] for name in present}
    totals = [sum(length[process] for length in lengths.values()) for process in range(processes.count)]
    payload = torch.cat([column.to(torch.float64) for column in columns.values()])
    parts = processes.all_gather(nn.functional.pad(payload, (0, max(totals) - len(payload))))
    fields = [
        part[:total].split([length[process] for length in lengths.values()])
        for process, (part, total) in enumerate(zip(parts, totals, strict=True))
    ]
    whole = {
        name: torch.cat(vectors).to(columns[name].dtype)
        for name, vectors in zip(present, zip(*fields, strict=True), strict=True)
    }
    return Gathered(processes, whole, lengths, {name: [len(own[name]) for own in logps] for name in present})


def _problem_of(logps: list[dict[str, Tensor]], names: Sequence[str]) -> Exception | None:
    """What is wrong with the own microbatches' arguments: told to all processes before it is raised."""
    for index, own in enumerate(logps):
        where = f"in microbatch {index}"
        if not own or own.keys() != logps[0].keys() or not own.keys() <= set(names):
            wanted = f"arguments of the loss ({', '.join(names)}), the same in every microbatch"
            return ValueError(f"logps_fn must give {wanted}, got {', '.join(own) or 'none'} {where}")
        for name, value in own.items():
            if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.ndim != 1:
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                return TypeError(f"{name} must be a tensor [B] of numbers or bools, got {got} {where}")
        devices = {name: str(value.device) for name, value in own.items()}
        if len(set(devices.values())) > 1:
            return ValueError(f"the arguments must be on one device, got {devices} {where}")
        # The mismatched pairs are a sample of their own.
        lengths = {name: len(value) for name, value in own.items() if name != "kl_logratios"}
        if len(set(lengths.values())) > 1:
            return ValueError(f"the arguments must be of one length, got {lengths} {where}")
    return None
