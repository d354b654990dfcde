r"""One global batch, exactly: a loss of all processes' and all accumulation steps' samples.

Tilts and sorts look at the whole batch, so their value on one microbatch of one process is another, worse loss. Here
the log-probabilities (a few numbers a sample) are gathered, the loss is computed once on all of them, the same in every
process, and every process sends its own part of the gradient through its own model:

.. code-block:: text

                 process 0                         process 1
    microbatch 0     microbatch 1     microbatch 0     microbatch 1
       l0 l1              l2              l3 l4           (none)     1. log-probabilities; the last keeps its graph
         \                |                /                |
          +---------------+---- gather ---+-----------------+        2. once a step
                               |
                        l0 l1 l2 l3 l4  -->  L                       3. the same in every process, once
                               |
                        c0 c1 c2 c3 c4,  c_i = dL / dl_i
                               |
          +---------------+---------------+-----------------+        4. the own slice x processes x divisor
         /                |                \                |
       c0 c1              c2              c3 c4           (none)
         |                |                |                |
      backward         backward         backward         backward    5. of sum_i c_i l_i: one microbatch's graph a time
             \         /                       \         /
         accumulated / divisor             accumulated / divisor
                        \                   /
                     mean over the processes                         6. = sum_i dL/dl_i dl_i/dtheta = dL/dtheta

The data-parallel mean (of DistributedDataParallel, FSDP, DeepSpeed or an all-reduce of one's own) divides by the number
of processes, and some frameworks by the accumulation steps (`divisor`): step 4 multiplies by what they divide by.
Only the first K - 1 of K microbatches are run twice, which costs (K - 1) / K of a forward pass. A loss that is a mean,
of samples whose number is known beforehand, needs no first pass at all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustloss._gather import Gathered, Processes, gather
from robustloss._random import RandomState
from robustloss.losses.base import LossOutput, PreferenceLoss
from robustloss.validation import check_number

LogpsFunction = Callable[[Any], Mapping[str, Tensor | None]]
BackwardFunction = Callable[[Tensor], object]
SurrogateFunction = Callable[[Any, dict[str, Tensor]], Tensor]
NoSync = Callable[[], AbstractContextManager[Any]]


class NonFiniteError(FloatingPointError):
    """NaN or infinity in what the loss is given, raised in every process alike.

    Attributes:
        positions: list of (process, microbatch, row), each counted from 0.
    """

    def __init__(self, message: str, positions: Sequence[tuple[int, int, int]] = ()):
        super().__init__(message)
        self.positions: list[tuple[int, int, int]] = list(positions)


class GlobalBatch(nn.Module):
    """A loss of the samples of all processes (`forward`), and of all accumulation steps (`step`).

    The gradients are such that their usual data-parallel mean is the gradient of one giant batch in one process.

    Args:
        loss: a module of `robustloss.losses`. In evaluation mode (`eval()`) its state, if it has one, stays as it is.
        group: the processes; None is torch.distributed's default group where one is initialised at the call, else this
            process alone.

    Raises:
        TypeError: what is no PreferenceLoss.
        ValueError: reduction="none", or a loss that differentiates embeddings.

    Example:
        Three pairs in microbatches of two and one: the value and the gradient are those of the three together.

        >>> from robustloss import KLDPOLoss
        >>> theta = torch.tensor([1.0, -0.5, -1.0], requires_grad=True)  # the "model": its log-ratios
        >>> def logps_of(rows):
        ...     zeros = torch.zeros(len(rows))
        ...     return dict(policy_chosen_logps=theta[rows], policy_rejected_logps=zeros,
        ...                 ref_chosen_logps=zeros, ref_rejected_logps=zeros)
        >>> loss = KLDPOLoss(beta=1.0, tau=1.0)
        >>> value, metrics = GlobalBatch(loss).step([[0, 1], [2]], logps_of, torch.Tensor.backward)
        >>> value, theta.grad
        (tensor(1.0203), tensor([-0.0476, -0.2132, -0.3514]))
        >>> loss(**logps_of([0, 1, 2])).detach()
        tensor(1.0203)
    """

    def __init__(self, loss: PreferenceLoss, group: dist.ProcessGroup | None = None):
        super().__init__()
        if not isinstance(loss, PreferenceLoss):
            raise TypeError(f"loss must be a PreferenceLoss such as KLDPOLoss(tau=0.1), got {type(loss).__name__}")
        if loss.needs_embeddings:
            instead = "robustloss.penalty.directional_step, which sees all processes and microbatches"
            if loss.differentiates_twice:
                instead = "robustloss.train.LossModule, or with penalty='central' or 'one_sided' with " + instead
            raise ValueError(
                f"{type(loss).__name__} differentiates embeddings, which are not gathered; train it with {instead}"
            )
        if loss.reduction == "none":
            raise ValueError("loss has reduction='none', and a global batch has one value; use reduction='mean'")
        self.loss = loss
        self.group = group
        self._signature = inspect.signature(loss.forward)
        self._names = [name for name in self._signature.parameters if name != "return_metrics"]

    @property
    def looks_at_all(self) -> bool:
        """Whether a sample's gradient depends on the others; of other losses, the mean over samples is all there is."""
        return self.loss.coupled or self.loss.needs_mismatched

    def forward(self, *vectors: Tensor, return_metrics: bool = False, **options: Tensor | None) -> LossOutput:
        """The loss of all processes' samples, the same value in each; all must call it together.

        With several processes there is no second derivative. With one, this is the loss itself.

        Args:
            vectors, options: the arguments of the loss, this process's samples: any number of them, or none. The same
                arguments, of the same dtypes, in every process.
            return_metrics: also return the metrics, which are those of all samples.

        Raises:
            TypeError, ValueError: in every process: arguments that differ between processes, or that the loss refuses.
        """
        processes = self._processes()
        if processes.count == 1:
            return self.loss(*vectors, return_metrics=return_metrics, **options)
        own = _present(self._signature.bind(*vectors, **options).arguments)
        gathered = gather(processes, self._names, [own])
        arguments = dict(gathered.whole)
        for name in filter(_is_policy, own):
            arguments[name] = _GradientOfOwn.apply(own[name], arguments[name], gathered.own(name), processes.count)
        return self.loss(**arguments, return_metrics=return_metrics)

    def step(
        self,
        microbatches: Sequence[Any],
        logps_fn: LogpsFunction,
        backward_fn: BackwardFunction,
        *,
        surrogate_fn: SurrogateFunction | None = None,
        masses: Sequence[float] | None = None,
        divisor: float = 1.0,
        no_sync: NoSync | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradient of one optimizer step; all processes must call it together.

        Random numbers of PyTorch's generators (the CPU's, and the CUDA devices') are the same in both passes of a
        microbatch, and afterwards stand where one pass would have left them. Buffers that count forward passes (batch
        normalisation) see the first K - 1 microbatches twice.

        Args:
            microbatches: K of whatever `logps_fn` takes. K is the same in every process, their sizes are free.
            logps_fn: microbatch -> {argument of the loss's forward by name: [B] tensor}. Names that begin with
                "policy_" carry the gradient, all others are constants. The same names in every process.
            backward_fn: called with a scalar exactly once a microbatch, such as `torch.Tensor.backward` or DeepSpeed's
                `engine.backward`.
            surrogate_fn: (microbatch, {"policy_...": [B] cotangents c}) -> the scalar sum_i c_i logp_i, for the second
                passes, where the cotangents are known beforehand (`linear_sequence_logps_with_cotangent`). It must draw
                its random numbers in the order in which `logps_fn` does. By default `logps_fn` makes the sum.
            masses: [K] the number of samples (with weights, their sum) of each own microbatch, in all processes or in
                none. With them a loss that is a mean (not `coupled`, nor with a shared reference point) needs one pass.
            divisor: what the framework divides by besides the mean over processes: the gradient accumulation steps, in
                `engine.backward` and Accelerate.
            no_sync: makes a context in which backward accumulates gradients in this process alone, such as
                `DistributedDataParallel.no_sync`. It is entered before the first forward and left before the last one
                with a graph, so that gradients are exchanged once a step and not once a microbatch.

        Returns:
            (value, metrics): of all samples, detached, the same in every process.

        Raises:
            NonFiniteError: in every process; before any backward, or after them all where one pass is enough. Where a
                finite sample of another process overflows its loss, a FloatingPointError.
            TypeError, ValueError: in every process: arguments that do not fit together or differ between processes,
                numbers of microbatches that differ, or that the loss refuses. An error within `logps_fn` ends its own
                process only, and it is the launcher that ends the others.
            RuntimeError: gradients are disabled.
        """
        check_number("divisor", divisor, above=0)
        if not torch.is_grad_enabled():
            raise RuntimeError("step trains, and gradients are disabled here; forward gives the value without them")
        microbatches = list(microbatches)
        if masses is not None and not self.looks_at_all:
            return self._one_pass(microbatches, logps_fn, backward_fn, masses, divisor, no_sync)
        if surrogate_fn is None:
            surrogate_fn = partial(_surrogate, logps_fn)
        return self._two_passes(microbatches, logps_fn, backward_fn, surrogate_fn, divisor, no_sync)

    def cotangents(
        self,
        logps: Sequence[Mapping[str, Tensor | None]],
        *,
        divisor: float = 1.0,
        problem: Exception | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
        """Steps 2 to 4 alone, for a loop that someone else owns: what to backpropagate in each of its microbatches.

        There, backward is called on `weighted_sum(logps, cotangents)` of each microbatch, computed again with a graph
        (and the same random numbers: `step` restores them, here that is the caller's part).

        Args:
            logps: [K] the arguments of the loss of each own microbatch, by name, as `step`'s logps_fn gives them; with
                or without a graph, which is not used. All processes call this together, with as many microbatches.
            divisor: as for `step`.
            problem: what this process has met before (of `part_of_mean`, say), raised once all processes know of it;
                the others raise an error that names this one.

        Returns:
            (value, metrics, cotangents): of all samples, detached, the same in every process; and of each own
            microbatch {"policy_...": [B] scale * dL/dlogps}.

        Raises:
            NonFiniteError, TypeError, ValueError: in every process, as `step`.
        """
        check_number("divisor", divisor, above=0)
        processes = self._processes()
        gathered = gather(processes, self._names, [_present(own) for own in logps], problem)
        _check_finite(gathered)
        policy = {name: whole.requires_grad_() for name, whole in gathered.whole.items() if _is_policy(name)}
        with torch.enable_grad():
            value, metrics = self._whole_loss(gathered)
            scale = processes.count * divisor
            gradients = torch.autograd.grad(scale * value, list(policy.values()), materialize_grads=True)
        return value.detach(), metrics, gathered.by_own_microbatch(dict(zip(policy, gradients, strict=True)))

    def shares(self, masses: Sequence[float], *, divisor: float = 1.0) -> list[float]:
        """What to multiply the loss of each own microbatch by, where the loss is a mean (not `looks_at_all`).

        Args:
            masses: [K] the number of samples (with weights, their sum) of each own microbatch. All processes call this
                together, with as many microbatches.
            divisor: as for `step`.

        Raises:
            ValueError: in every process: a loss that looks at all samples, masses that are no numbers >= 0, numbers of
                microbatches that differ.
        """
        check_number("divisor", divisor, above=0)
        processes, problem = self._processes(), None
        if self.looks_at_all:
            problem = ValueError(f"{type(self.loss).__name__} looks at the whole batch: call cotangents instead")
        total = _total(processes, masses, len(masses), problem)
        return [processes.count * divisor * mass / total if total else 0.0 for mass in masses]

    def part_of_mean(self, arguments: Mapping[str, Tensor | None], share: float) -> tuple[Tensor, Exception | None]:
        """What to call backward on for one microbatch, where the loss is a mean (not `looks_at_all`): share * loss.

        It raises nothing that the samples are to blame for, as other processes may be waiting in the backward already:
        where the share is zero, an argument on the CPU is not finite, or the loss refuses the arguments, it is a zero
        of the same graph. After the last backward, `cotangents(..., problem=problem)` of all microbatches' arguments
        raises in every process.

        Args:
            arguments: those of the loss, by name; names that begin with "policy_" carry the gradient.
            share: of `shares`.

        Returns:
            (value, problem): [] with a graph; and what the loss has refused, None otherwise.
        """
        own = {name: v if _is_policy(name) else v.detach() for name, v in _present(arguments).items()}
        nothing = zero_of(own)
        if not share or any(v.device.type == "cpu" and not v.isfinite().all() for v in own.values()):
            return nothing, None
        try:
            return share * self.loss(**own), None
        except (TypeError, ValueError) as error:
            return nothing, _as_overflow(error)

    def _two_passes(
        self,
        microbatches: list[Any],
        logps_fn: LogpsFunction,
        backward_fn: BackwardFunction,
        surrogate_fn: SurrogateFunction,
        divisor: float,
        no_sync: NoSync | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps, random_states = [], []
        with ExitStack() as unsynchronized:
            if no_sync is not None and len(microbatches) > 1:
                unsynchronized.enter_context(no_sync())
            for index, microbatch in enumerate(microbatches, start=1):
                last = index == len(microbatches)
                if last:
                    torch.clear_autocast_cache()  # older torch keeps weights cast without a graph
                random_states.append(RandomState())
                with torch.set_grad_enabled(last):
                    logps.append(_present(logps_fn(microbatch)))
            after = RandomState()

            value, metrics, cotangents = self.cotangents(logps, divisor=divisor)
            backward_fn(weighted_sum(logps.pop(), cotangents.pop()))
            try:
                for index, cotangent in enumerate(cotangents, start=1):
                    if index == len(cotangents):
                        unsynchronized.close()
                    random_states[index - 1].restore()
                    backward_fn(surrogate_fn(microbatches[index - 1], cotangent))
            finally:
                after.restore()
        return value, metrics

    def _one_pass(
        self,
        microbatches: list[Any],
        logps_fn: LogpsFunction,
        backward_fn: BackwardFunction,
        masses: Sequence[float],
        divisor: float,
        no_sync: NoSync | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        processes, logps, problem = self._processes(), [], None
        total = _total(processes, masses, len(microbatches))
        with ExitStack() as unsynchronized:
            if no_sync is not None and len(microbatches) > 1:
                unsynchronized.enter_context(no_sync())
            for microbatch, mass in zip(microbatches, masses, strict=True):
                if len(logps) + 1 == len(microbatches):
                    unsynchronized.close()
                own = _present(logps_fn(microbatch))
                share = processes.count * divisor * mass / total if total else 0.0
                value, refused = self.part_of_mean(own, share)
                problem = problem or refused
                backward_fn(value)
                logps.append({name: value.detach() for name, value in own.items()})

        gathered = gather(processes, self._names, logps, problem)
        _check_finite(gathered)
        with torch.no_grad():
            value, metrics = self._whole_loss(gathered)
        weights = gathered.whole.get("weights")
        actual = float(weights.sum()) if weights is not None else sum(gathered.lengths[self._names[0]])
        if not math.isclose(actual, total, rel_tol=1e-4):
            raise ValueError(f"masses add up to {total:g}, but the samples to {actual:g}, so this gradient is wrong")
        return value, metrics

    def _whole_loss(self, gathered: Gathered) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self.loss(**gathered.whole, return_metrics=True)
        except ValueError as error:
            overflow = _as_overflow(error)
            if overflow is error:
                raise
            raise overflow from error

    def _processes(self) -> Processes:
        if self.group is None and not (dist.is_available() and dist.is_initialized()):
            return Processes(None, 0, 1)
        return Processes(self.group, dist.get_rank(self.group), dist.get_world_size(self.group))


class _GradientOfOwn(torch.autograd.Function):
    """The whole vector; its gradient is the own slice's, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor, where: slice, count: int) -> Tensor:
        ctx.where, ctx.count = where, count
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable  # a second derivative would have to be gathered again
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.count * grad[ctx.where], None, None, None


def _total(processes: Processes, masses: Sequence[float], microbatches: int, problem: Exception | None = None) -> float:
    """The masses of all processes added up, once all know that none has a problem."""
    if len(masses) != microbatches or not all(0 <= mass < math.inf for mass in masses):
        problem = ValueError(f"masses must be {microbatches} numbers >= 0, one a microbatch, got {masses}")
    return sum(row[0] for row in processes.agree(microbatches, [0.0 if problem else float(sum(masses))], problem))


def _is_policy(name: str) -> bool:
    return name.startswith("policy_")


def _present(arguments: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if value is not None}


def _check_finite(gathered: Gathered) -> None:
    names, positions = gathered.non_finite()
    if positions:
        told = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
        message = f"{' and '.join(names)} not finite at (process, microbatch, row) {told}"
        raise NonFiniteError(message, positions)


def _as_overflow(error: Exception) -> Exception:
    """What a loss says on a CPU of finite numbers that it overflows for; on a GPU it is infinite then."""
    return NonFiniteError(str(error)) if "too large" in str(error) else error


def _surrogate(logps_fn: LogpsFunction, microbatch: Any, cotangents: dict[str, Tensor]) -> Tensor:
    return weighted_sum(_present(logps_fn(microbatch)), cotangents)


def zero_of(arguments: Mapping[str, Tensor]) -> Tensor:
    """Nothing, with the graph of a microbatch, for a backward that other processes wait in."""
    policy = {name: value for name, value in arguments.items() if _is_policy(name)}
    return weighted_sum(policy, {name: torch.zeros_like(value) for name, value in policy.items()})


def weighted_sum(logps: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]) -> Tensor:
    """sum_i c_i logp_i over one microbatch, [], whose gradient is that microbatch's part of the global batch's.

    Args:
        logps: by name, [B] with a graph; names without a cotangent are not used.
        cotangents: {"policy_...": [B]}, of `GlobalBatch.cotangents`.
    """
    return torch.stack([(cotangent * logps[name]).sum() for name, cotangent in cotangents.items()]).sum()
