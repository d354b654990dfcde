"""What is measured: ops, shapes, types and passes, the least work of each, and the problems themselves.

Passes
    forward                            log-probabilities, without gradient
    backward                           row op on a GPU only: the backward alone, its forward untimed
    forward+backward                   per-sequence log-probabilities, then any gradient per sequence
    forward+backward, known gradient   linear op: their sum, so that a contestant may use its gradient in the forward
    forward+backward, frozen head      linear op: hidden states want a gradient, the weight does not (LoRA)

Work, for rates
    row op: bytes of one read of the logits (forward), a read and a write (backward), or all three, N V each.
    linear op: flops of the products that the pass cannot do without: 2 N H V for the logits and as much for each
        gradient, so 2, 4 or 6. A contestant that computes the logits again does more than it is credited for.

Ceilings, measured beside the contestants
    row op: plain read and plain copy of the logits. The forward is held against the faster of the two, others against
        the copy; each in GB/s.
    linear op: the matrix products that robustloss does, alone, into memory that is there: 2, 4 or 6 N H V, and 2 more
        for the tokens beyond the first H where the gradient comes later than the forward (the logits of the first H
        wait in the weight's gradient; others are computed twice); each in ms.

All labels count. Every contestant gets the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import OURS, Absent, Head, LogitsFunction, Peer, linear_peers, sequence_peers
from bench.results import COPY, PRODUCTS, READ

SEQUENCE, LINEAR = "sequence_logps", "linear_sequence_logps"
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
KNOWN, FROZEN = "forward+backward, known gradient", "forward+backward, frozen head"

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # "cuda" is ROCm too

PEERS = {SEQUENCE: sequence_peers(), LINEAR: linear_peers()}
# Passes over the logits that a pass needs at least.
TRAFFIC = {READ: 1, COPY: 2, FORWARD: 1, BACKWARD: 2, TRAINING: 3}
# N H V times this: what a pass cannot do without.
LEAST_FLOPS = {FORWARD: 2, FROZEN: 4, KNOWN: 6, TRAINING: 6}


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    V: int
    H: int | None = None

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def tokens_twice(self) -> int:
        """Tokens whose logits do not fit the weight's gradient to wait there for a gradient that comes later."""
        return max(self.tokens - self.H, 0)

    def as_dict(self) -> dict[str, int]:
        sizes = {"B": self.B, "T": self.T, "V": self.V}
        return sizes if self.H is None else sizes | {"H": self.H}


CPU_SHAPES = {
    SEQUENCE: [Shape(2, 512, 32_000), Shape(2, 128, 151_936)],
    LINEAR: [Shape(2, 512, 32_000, 1024)],
}
GPU_TOKENS_AND_VOCABULARY = [(8192, 32_000), (8192, 128_256), (8192, 151_936), (4096, 256_000)]
GPU_SHAPES = {
    SEQUENCE: [Shape(n // 1024, 1024, v) for n, v in GPU_TOKENS_AND_VOCABULARY],
    LINEAR: [Shape(n // 1024, 1024, v, 4096) for n, v in GPU_TOKENS_AND_VOCABULARY],
}
TINY_SHAPES = {SEQUENCE: [Shape(2, 32, 512)], LINEAR: [Shape(2, 32, 512, 128)]}


@dataclass(frozen=True)
class Case:
    op: str
    shape: Shape
    dtype: str
    pass_name: str
    peer: str

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.shape.as_dict().values())
        return f"{sizes}-{self.dtype}-{self.pass_name}-{self.peer}"

    @property
    def is_ceiling(self) -> bool:
        return self.peer in (READ, COPY, PRODUCTS)

    @property
    def is_ours(self) -> bool:
        return self.peer.startswith(OURS)

    @property
    def contestant(self) -> Peer:
        return PEERS[self.op][self.peer]

    def work(self) -> tuple[float, str]:
        """The amount that this case is credited with, and the unit of its rate: bytes and GB/s or flops and TFLOP/s."""
        if self.op == SEQUENCE:
            passes = TRAFFIC[self.peer if self.is_ceiling else self.pass_name]
            return passes * self.shape.tokens * self.shape.V * getattr(torch, self.dtype).itemsize, "GB/s"
        rows = LEAST_FLOPS[self.pass_name] * self.shape.tokens
        if self.is_ceiling and self.pass_name == TRAINING:
            rows += 2 * self.shape.tokens_twice
        return rows * self.shape.H * self.shape.V, "TFLOP/s"


def cases(op: str, device: torch.device, tiny: bool = False) -> list[Case]:
    """In the order of measuring: ceilings first, then by contestant; compiled ones, which cost most, after all else."""
    on_gpu = device.type == "cuda"
    shapes = (TINY_SHAPES if tiny else GPU_SHAPES if on_gpu else CPU_SHAPES)[op]
    shapes = sorted(shapes, key=lambda shape: shape.tokens * shape.V)
    found = [
        Case(op, shape, dtype, pass_name, peer)
        for shape in shapes
        for dtype in (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
        for pass_name in _passes(op, dtype, on_gpu)
        for peer in [*_ceilings(op, pass_name), *PEERS[op]]
    ]
    eager = [case for case in found if case.is_ceiling or not case.contestant.compiled]
    compiled = [case for case in found if case not in eager]
    if not on_gpu:
        # Compiling takes a CPU minutes: at one shape, and of the linear op the passes in which anything could be fused.
        compiled = [
            case
            for case in compiled
            if case.shape == shapes[0] and (op == SEQUENCE or case.pass_name in (FORWARD, TRAINING))
        ]
    return eager + compiled


def _passes(op: str, dtype: str, on_gpu: bool) -> tuple[str, ...]:
    if op == LINEAR:
        # In bfloat16 on a CPU the other two would take minutes to say nothing new.
        return (FORWARD, FROZEN, KNOWN, TRAINING) if on_gpu or dtype == "float32" else (FORWARD, TRAINING)
    return (FORWARD, BACKWARD, TRAINING) if on_gpu else (FORWARD, TRAINING)


def _ceilings(op: str, pass_name: str) -> tuple[str, ...]:
    if op == LINEAR:
        return (PRODUCTS,)
    return (READ, COPY) if pass_name == FORWARD else (COPY,)


# ---- problems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """`run()` does the work once and returns what the contestant delivers; `refill()`, untimed, undoes overwriting."""

    run: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    refill: Callable[[], None]

    def gradient_bytes(self, delivered: list[Tensor], pass_name: str) -> int:
        """Memory of the returned gradients; none for one that lies in an input's memory."""
        if pass_name == FORWARD:
            return 0
        held = {tensor.untyped_storage().data_ptr() for tensor in self.inputs}
        return sum(tensor.nbytes for tensor in delivered if tensor.untyped_storage().data_ptr() not in held)


def build(case: Case, device: torch.device) -> Problem:
    """The inputs on the device and the contestant over them. Raises what a contestant that cannot do it raises."""
    torch.manual_seed(0)
    function = None if case.is_ceiling else case.contestant.load()
    return (_sequence_problem if case.op == SEQUENCE else _linear_problem)(case, function, device)


class _HandOver(torch.autograd.Function):
    """Logits as a model hands them over: no leaf, already in memory, and free to be overwritten."""

    @staticmethod
    def forward(ctx, anchor: Tensor, buffer: Tensor) -> Tensor:
        # Not a view, so that its version counter is its own: each round's graph starts anew.
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, buffer.shape, buffer.stride())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


def _sequence_problem(case: Case, function: LogitsFunction | None, device: torch.device) -> Problem:
    B, T, V = case.shape.B, case.shape.T, case.shape.V
    buffer = torch.randn(B, T, V, device=device, dtype=getattr(torch, case.dtype)).mul_(3)
    labels = torch.randint(V, (B, T), device=device)
    cotangent = torch.randn(B, device=device)
    anchor = torch.zeros((), device=device, requires_grad=True)
    if case.is_ceiling:
        return _traffic_problem(case, buffer)

    def logits_and_logps() -> tuple[Tensor, Tensor]:
        logits = _HandOver.apply(anchor, buffer)
        return logits, function(logits, labels)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(buffer, labels)]

    def training() -> list[Tensor]:
        logits, logps = logits_and_logps()
        return [torch.autograd.grad(logps, logits, cotangent.to(logps.dtype))[0]]

    run = {FORWARD: forward, TRAINING: training}.get(case.pass_name)
    if case.pass_name == BACKWARD:
        if case.contestant.compiled or (case.peer != OURS and case.is_ours):
            raise Absent("its backward runs once only, as it reuses the memory of its forward")
        logits, logps = logits_and_logps()
        logps_cotangent = cotangent.to(logps.dtype)

        def run() -> list[Tensor]:
            return list(torch.autograd.grad(logps, logits, logps_cotangent, retain_graph=True))

    refill = _nothing
    # On a CPU all start from logits just written. On a GPU, whose kernels take no branch by value, nothing is refilled.
    if device.type == "cpu" and case.pass_name != BACKWARD:
        source = buffer.clone()

        def refill() -> None:
            buffer.copy_(source)

    return Problem(run, [buffer, labels, cotangent], refill)


def _traffic_problem(case: Case, buffer: Tensor) -> Problem:
    if case.peer == READ:
        # The fastest of torch's reductions over the same bytes: no NaN to look for, and few elements.
        words = buffer.view(torch.int64)
        return Problem(lambda: [words.amax()], [buffer], _nothing)
    target = torch.empty_like(buffer)
    return Problem(lambda: [target.copy_(buffer)], [buffer, target], _nothing)


def _linear_problem(case: Case, head: Head | None, device: torch.device) -> Problem:
    B, T, V, H = case.shape.B, case.shape.T, case.shape.V, case.shape.H
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(B, T, H, device=device, dtype=dtype)
    # Logits of standard deviation 3, as in the row op.
    weight = torch.randn(V, H, device=device, dtype=dtype).mul_(3 * H**-0.5)
    labels = torch.randint(V, (B, T), device=device)
    cotangent = torch.randn(B, device=device)
    inputs = [hidden, weight, labels, cotangent]
    if case.is_ceiling:
        return _products_problem(case, hidden.flatten(0, 1), weight)

    if head.logps is None and case.pass_name != KNOWN:
        raise Absent("it returns no log-probabilities, only their sum")
    if head.loss is None and case.pass_name == KNOWN:
        raise Absent(f"it has nothing of its own for a known gradient: see {TRAINING}")
    hidden.requires_grad_(case.pass_name != FORWARD)
    weight.requires_grad_(case.pass_name in (TRAINING, KNOWN))
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [head.logps(hidden, weight, labels)]

    def any_gradient() -> list[Tensor]:
        logps = head.logps(hidden, weight, labels)
        return list(torch.autograd.grad(logps, wanted, cotangent.to(logps.dtype)))

    def known_gradient() -> list[Tensor]:
        return list(torch.autograd.grad(head.loss(hidden, weight, labels), wanted))

    run = {FORWARD: forward, KNOWN: known_gradient}.get(case.pass_name, any_gradient)
    return Problem(run, inputs, _nothing)


def _products_problem(case: Case, hidden: Tensor, weight: Tensor) -> Problem:
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> list[Tensor]:
        torch.mm(hidden, weight.T, out=logits)
        if case.pass_name == TRAINING and case.shape.tokens_twice:
            torch.mm(hidden[case.shape.H :], weight.T, out=logits[case.shape.H :])
        if case.pass_name != FORWARD:
            torch.mm(logits, weight, out=grad_hidden)
        if case.pass_name in (KNOWN, TRAINING):
            torch.mm(logits.T, hidden, out=grad_weight)
        return []

    return Problem(run, [hidden, weight], _nothing)


def _nothing() -> None:
    pass


def check_agreement(case: Case, device: torch.device) -> None:
    """Compare with eager float32 on a tiny problem: what computes something else is no peer.

    Also the warm-up: libraries load and threads start here. Raises Absent where they differ.
    """
    small = Case(case.op, TINY_SHAPES[case.op][0], case.dtype, case.pass_name, case.peer)
    for got, expected in zip(build(small, device).run(), _expected(small, device), strict=True):
        error = ((got.float() - expected).norm() / expected.norm()).item()
        allowed = 1e-3 if case.dtype == "float32" else 5e-2
        if not error <= allowed:
            raise Absent(f"it differs from eager float32 by {error:.1%} on a tiny problem; {allowed:.1%} is allowed")


def _expected(case: Case, device: torch.device) -> Iterator[Tensor]:
    reference = "log_softmax + gather" if case.op == SEQUENCE else "linear + log_softmax + gather"
    exact = Case(case.op, case.shape, case.dtype, case.pass_name, reference)
    head = exact.contestant.load()

    def in_float32(*arguments: Tensor) -> Tensor:
        function = head if case.op == SEQUENCE else head.logps
        return function(*[argument.float() for argument in arguments[:-1]], arguments[-1])

    def loss_in_float32(*arguments: Tensor) -> Tensor:
        return -in_float32(*arguments).sum()

    torch.manual_seed(0)
    problem = _sequence_problem if case.op == SEQUENCE else _linear_problem
    function = in_float32 if case.op == SEQUENCE else Head(in_float32, loss_in_float32)
    return (tensor.float() for tensor in problem(exact, function, device).run())
