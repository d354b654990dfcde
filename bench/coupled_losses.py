"""`coupled_losses`: from log-probabilities of n sequences (or pairs) to a loss of the whole batch, and back.

The measured call is what a training step does: the module is called, then torch.autograd.grad by the policy's
log-probabilities, float32. At n = 64 it is overhead alone. "eager torch" is the shortest that one would write by hand,
without checks. There are no rates and no ceiling: so few bytes and flops bound nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import TRAINING, Case, Peer, Problem, Suite, compiled, ours
from .results import OURS

LossFunction = Callable[..., Tensor]

BETA, TAU, RHO, ALPHA, BETA_PRIME = 0.1, 0.1, 0.1, 0.1, 1.0
STEPS = 30  # of bisection, as many as float32 can use

# ---- losses [n] -> their aggregate [], by hand ----------------------------------------------------------------------


def kl_tilt(losses: Tensor) -> Tensor:
    return ((losses.detach() / TAU).softmax(0) * losses).sum()


def kl_ball(losses: Tensor) -> Tensor:
    fixed = losses.detach()
    low, high = fixed.new_tensor(-10.0), fixed.new_tensor(10.0)  # log(1 / tau)
    for _ in range(STEPS):
        middle = (low + high) / 2
        log_weights = (fixed * middle.exp()).log_softmax(0)
        inside = (log_weights.exp() * log_weights).sum() + math.log(len(losses)) < RHO
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return ((fixed * low.exp()).softmax(0) * losses).sum()


def cvar(losses: Tensor) -> Tensor:
    threshold = losses.topk(math.ceil(ALPHA * len(losses))).values[-1]
    return threshold + (losses - threshold).relu().mean() / ALPHA


def chi_square(losses: Tensor) -> Tensor:
    fixed = losses.detach()
    low, high = fixed.mean() - fixed.std(correction=0) / math.sqrt(RHO), fixed.max()
    for _ in range(STEPS):
        middle = (low + high) / 2
        excess = (fixed - middle).relu()
        inside = excess.square().mean() < (1 + RHO) * excess.mean().square()
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    weights = (fixed - low).relu()
    return (weights / weights.sum() * losses).sum()


def soft_min(losses: Tensor) -> Tensor:
    return -BETA_PRIME * ((-losses / BETA_PRIME).logsumexp(0) - math.log(len(losses)))


# ---- log-probabilities [n] -> the loss [], by hand ------------------------------------------------------------------


def paired(aggregate: Callable[[Tensor], Tensor]) -> LossFunction:
    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        return aggregate(-F.logsigmoid(BETA * ((chosen - rejected) - (ref_chosen - ref_rejected))))

    return loss


def aot_paired(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    u, v = (chosen - rejected).sort().values, (ref_chosen - ref_rejected).sort().values
    return -F.logsigmoid(BETA * (u - v)).mean()


def aot_unpaired(policy: Tensor, ref: Tensor, desirable: Tensor) -> Tensor:
    logratios = policy - ref
    u, v = logratios[desirable].sort().values, logratios[~desirable].sort().values
    # The quantile levels at which u and v step, times n m.
    u_levels = torch.arange(1, len(u) + 1, device=u.device) * len(v)
    v_levels = torch.arange(1, len(v) + 1, device=u.device) * len(u)
    levels = torch.cat([u_levels, v_levels]).sort().values
    mass = levels.diff(prepend=levels.new_zeros(1)) / (len(u) * len(v))
    margins = u[torch.searchsorted(u_levels, levels)] - v[torch.searchsorted(v_levels, levels)]
    return -(mass * F.logsigmoid(BETA * margins)).sum()


# ---- the suite ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    module: Callable[[], LossFunction]
    eager: LossFunction


def _dpo(aggregate: str, **options: float) -> Callable[[], LossFunction]:
    return lambda: ours("DPOLoss")(beta=BETA, aggregate=ours(aggregate)(**options))


AOT_UNPAIRED = f"AOT unpaired, {TRAINING}"
PASSES = {
    f"{name}, {TRAINING}": loss
    for name, loss in {
        "DPO": Loss(lambda: ours("DPOLoss")(beta=BETA), paired(torch.mean)),
        "KLDPO(tau)": Loss(lambda: ours("KLDPOLoss")(beta=BETA, tau=TAU), paired(kl_tilt)),
        "KLDPO(rho)": Loss(lambda: ours("KLDPOLoss")(beta=BETA, rho=RHO), paired(kl_ball)),
        "DPO, CVaR": Loss(_dpo("CVaR", alpha=ALPHA), paired(cvar)),
        "DPO, ChiSquare": Loss(_dpo("ChiSquare", rho=RHO), paired(chi_square)),
        "DPO, SoftMin": Loss(_dpo("SoftMin", beta_prime=BETA_PRIME), paired(soft_min)),
        "AOT paired": Loss(lambda: ours("AOTPairedLoss")(beta=BETA), aot_paired),
        "AOT unpaired": Loss(lambda: ours("AOTUnpairedLoss")(beta=BETA), aot_unpaired),
    }.items()
}
EAGER = "eager torch"


class CoupledLosses(Suite):
    op = "coupled_losses"
    cpu_shapes: ClassVar = [{"n": n} for n in (64, 1024, 65_536)]
    gpu_shapes: ClassVar = [{"n": n} for n in (64, 1024, 4096, 65_536)]
    tiny_shape: ClassVar = {"n": 20}
    # Each loads a function from Loss to what is called with the log-probabilities.
    peers: ClassVar = {
        OURS: Peer(lambda: lambda loss: loss.module()),
        EAGER: Peer(lambda: lambda loss: loss.eager),
        f"torch.compile({EAGER})": Peer(lambda: lambda loss: compiled(loss.eager), compiled=True),
    }
    small_calls = True
    in_turn = True

    def dtypes(self, on_gpu: bool) -> tuple[str, ...]:
        return ("float32",)

    def passes(self, dtype: str, on_gpu: bool) -> tuple[str, ...]:
        return tuple(PASSES)

    def compiles(self, case: Case, on_gpu: bool) -> bool:
        # Compiling takes longer than all else.
        return case.shape["n"] == 1024

    def reference(self) -> Callable[[Loss], LossFunction]:
        def of_doubles(loss: Loss) -> LossFunction:
            def function(*arguments: Tensor) -> Tensor:
                return loss.eager(*(value.double() if value.is_floating_point() else value for value in arguments))

            return function

        return of_doubles

    def problem(self, case: Case, load: Callable[[Loss], LossFunction], device: torch.device) -> Problem:
        n = case.shape["n"]
        ref = torch.randn(2, n, device=device).mul_(20).sub_(200)
        policy = ref + torch.randn(2, n, device=device).mul_(5)
        if case.pass_name == AOT_UNPAIRED:
            desirable = torch.randperm(n, device=device) <= n // 2  # one more than half
            leaves, constants = [policy[0]], [ref[0], desirable]
        else:
            leaves, constants = [*policy], [*ref]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        function = load(PASSES[case.pass_name])

        def run() -> list[Tensor]:
            value = function(*leaves, *constants)
            return [value.detach(), *torch.autograd.grad(value, leaves)]

        return Problem(run, [*leaves, *constants])


SUITE = CoupledLosses()
