"""A run that is asked to stop (SIGTERM, as a scheduler sends it before it takes the machine) stops after its step.

What reaches the processes, and what the launcher makes of it (torch 2.10 to 2.13, DeepSpeed 0.19):

| started by | on SIGTERM to the launcher | exit code |
|---|---|---|
| `python`, or `srun` with one task a process | it is the process itself | 0 |
| `torchrun` | passes it to all workers of its host, and kills what is left after 30 s | 1, with its own traceback |
| `deepspeed` | ends without telling its workers, which go on | 143 |
| `deepspeed`'s child `deepspeed.launcher.launch` | tells one worker after the other, 30 s each | 1 |

So: give torchrun the time that a checkpoint takes (torch 2.13: `--shutdown-timeout 600`, or
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600; 2.10 knows 30 s only) and the scheduler at least as much (Slurm:
`--signal=TERM@900`); do not take torchrun's 1 for a failure, or signal a worker in place of the launcher: one that is
told is enough on any number of hosts, all stop at the same step, and the launcher ends with 0. Under `deepspeed`
always signal a worker. SIGUSR1, which Slurm's users are used to, does the same; torchrun itself would die of it unless
it is among its `--signals-to-handle`.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Takes SIGTERM and SIGUSR1 for a request to stop while it is entered; SIGINT stays a KeyboardInterrupt.

    Further signals change nothing, so a checkpoint that is being written is written to its end. Signals can only be
    taken in the main thread: entered in another one, it never asks for anything.

    Args:
        device: where the processes' flags are summed: the device of the process group's backend.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False  # this process
        self._agreed = False  # any process, when the flags were last summed
        self._summed = False  # whether that was in this step
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self) -> bool:
        """Whether any process has been asked to stop: the same answer in all of them, which call it once a step.

        One process may get its signal a step earlier than another, and one that stopped alone would leave the others
        waiting for ever. It costs one all-reduce of a number, or none where `sum_with` has been called in this step.
        """
        if not self._summed:
            self.sum_with(torch.zeros((), device=self._device))
        self._summed = False
        return self._agreed

    def sum_with(self, value: Tensor) -> float:
        """The sum of a scalar over all processes; their flags travel in the same all-reduce."""
        asked = torch.full_like(value, float(self._asked), dtype=torch.float64)
        packed = torch.stack([value.double(), asked])
        if dist.is_initialized():
            dist.all_reduce(packed)
        total, askers = packed.tolist()
        self._agreed, self._summed = askers > 0, True
        return total
