"""What a suite is: one op against what people use for it today. Each has a file of its own; bench/suites.py lists them.

A suite says at which shapes, types and passes its op is measured, who takes part, what a problem is, the least work of
a pass, its ceilings (the same data only read, copied, multiplied or sorted) and, for the check that all compute the
same, a reference. Every contestant gets the same tensors.

A contestant is loaded only when it is measured. One that does not import, or lacks what a pass needs, raises, and is
listed as absent with that reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .results import CEILINGS, OURS

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # "cuda" is ROCm too

Shape = dict[str, int]  # sizes by name


class Absent(Exception):
    """The contestant cannot do what is asked; the message says why."""


@dataclass(frozen=True)
class Peer:
    load: Callable[[], Any]  # returns what the suite's problem calls
    compiled: bool = False  # by torch.compile: the first call at a shape compiles


@dataclass(frozen=True)
class Problem:
    """`run()` does the work once and returns what the contestant delivers; `refill()`, untimed, undoes overwriting."""

    run: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    refill: Callable[[], None] | None = None

    def gradient_bytes(self, delivered: list[Tensor], pass_name: str) -> int:
        """Memory of the returned gradients; none for one that lies in an input's memory."""
        if pass_name == FORWARD:
            return 0
        held = {tensor.untyped_storage().data_ptr() for tensor in self.inputs}
        return sum(tensor.nbytes for tensor in delivered if tensor.untyped_storage().data_ptr() not in held)


@dataclass(frozen=True)
class Case:
    suite: Suite
    shape: Shape
    dtype: str
    pass_name: str
    peer: str

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape.values()))
        return f"{self.suite.op}-{sizes}-{self.dtype}-{self.pass_name}-{self.peer}"

    @property
    def is_ceiling(self) -> bool:
        return self.peer in CEILINGS

    @property
    def is_ours(self) -> bool:
        return self.peer.startswith(OURS)

    @property
    def is_held_against_ours(self) -> bool:
        """Round by round; see `Suite.in_turn`."""
        return self.suite.in_turn and self.peer != OURS

    @property
    def contestant(self) -> Peer:
        return self.suite.peers[self.peer]

    @property
    def is_compiled(self) -> bool:
        return not self.is_ceiling and self.contestant.compiled


class Suite:
    """A subclass sets class attributes, not an instance's: so a case can go to the process that measures memory."""

    op: ClassVar[str]
    cpu_shapes: ClassVar[list[Shape]]
    gpu_shapes: ClassVar[list[Shape]]
    tiny_shape: ClassVar[Shape]
    peers: ClassVar[dict[str, Peer]]
    # Calls of microseconds: on a GPU, too, timed from outside with Python included, and its launches counted; the
    # memory of these is not measured.
    small_calls = False
    # Of measuring a case on a CPU: an optimizer step takes long, and wanders by a tenth from call to call.
    seconds = 1.5
    # Whether robustloss has its rounds between those of each other contestant, and so the same of what a machine that
    # is shared with others does; there is no refilling then.
    in_turn = False

    def dtypes(self, on_gpu: bool) -> tuple[str, ...]:
        raise NotImplementedError

    def passes(self, dtype: str, on_gpu: bool) -> tuple[str, ...]:
        raise NotImplementedError

    def ceilings(self, pass_name: str) -> tuple[str, ...]:
        return ()

    def compiles(self, case: Case, on_gpu: bool) -> bool:
        """Whether a contestant that must compile, which may take a minute, is measured here."""
        return on_gpu

    def work(self, case: Case) -> tuple[float, str] | None:
        """What the case is credited with, and the unit of its rate: bytes and GB/s, flops and TFLOP/s, or nothing."""
        return None

    def problem(self, case: Case, function: Any, device: torch.device) -> Problem:
        """`function`: what the contestant's `load` returned; None for a ceiling."""
        raise NotImplementedError

    def reference(self) -> Any:
        """Like what a contestant's `load` returns, in float32 or better."""
        raise NotImplementedError

    def cases(self, device: torch.device, tiny: bool = False) -> list[Case]:
        """In the order of measuring: ceilings first, then by contestant; compiled ones, which cost most, at last."""
        on_gpu = device.type == "cuda"
        found = [
            Case(self, shape, dtype, pass_name, peer)
            for shape in ([self.tiny_shape] if tiny else self.gpu_shapes if on_gpu else self.cpu_shapes)
            for dtype in self.dtypes(on_gpu)
            for pass_name in self.passes(dtype, on_gpu)
            for peer in [*self.ceilings(pass_name), *self.peers]
        ]
        compiled = [case for case in found if case.is_compiled and self.compiles(case, on_gpu)]
        return [case for case in found if not case.is_compiled] + compiled

    def build(self, case: Case, device: torch.device) -> Problem:
        """The inputs on the device and the contestant over them. Raises what one that cannot do it raises."""
        torch.manual_seed(0)
        return self.problem(case, None if case.is_ceiling else case.contestant.load(), device)

    def check_agreement(self, case: Case, device: torch.device) -> None:
        """Compare with the reference on a tiny problem: what computes something else is no peer.

        Also the warm-up, which is all that a ceiling needs: libraries load and threads start here. Raises Absent where
        they differ.
        """
        small = replace(case, shape=self.tiny_shape)
        delivered = self.build(small, device).run()
        if case.is_ceiling:
            return
        torch.manual_seed(0)
        expected = self.problem(replace(small, peer="reference"), self.reference(), device).run()
        allowed = 1e-3 if case.dtype == "float32" else 5e-2
        for got, exact in zip(delivered, expected, strict=True):
            error = ((got.double() - exact.double()).norm() / exact.double().norm()).item()
            if not error <= allowed:
                raise Absent(
                    f"it differs from the reference by {error:.1%} on a tiny problem; {allowed:.1%} is allowed"
                )


def ours(name: str) -> Any:
    """A public name of robustloss."""
    robustloss = importlib.import_module("robustloss")
    if not hasattr(robustloss, name):
        raise Absent(f"this robustloss has no {name}")
    return getattr(robustloss, name)


def compiled(function: Callable) -> Callable:
    # Without the reset a second shape would be compiled for all shapes, or not at all after eight of them.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
