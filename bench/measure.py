"""Time, memory and launches of one case.

Time is measured on a GPU by triton's do_bench; on a CPU, and for suites of small calls on any device, from the call to
the last result by pytest-benchmark. A round repeats a fast call for 10 ms where nothing has to be refilled.

Extra memory is the peak beyond the inputs, minus the gradients that every contestant must return. It is measured, not
computed: on a GPU by torch's allocator; on a CPU as the peak resident set (VmHWM, set back through
/proc/self/clear_refs) of a fresh process in which a tiny problem has loaded the libraries and started the threads, so
that only what the problem itself touches counts.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import results
from .cases import BACKWARD, Case, Problem
from .results import Result

MOST_ROUNDS = 9  # of one call, and
MOST_REPEATED_ROUNDS = 100  # of many: a machine that others share changes its speed within a second
ROUND_SECONDS, WARM_UP_SECONDS = 0.01, 0.05
SLOW_SECONDS = 4.0  # what takes longer than this, far behind all others, has two calls only
GPU_MILLISECONDS = (100, 1000)
GPU_ROUNDS = 10
MEMORY_TIMEOUT = 120  # seconds


@dataclass(frozen=True)
class Timing:
    ms: float
    ms_spread: float
    rounds: int
    ours_ms: float | None = None


@dataclass(frozen=True)
class Memory:
    peak_bytes: int
    gradient_bytes: int


class MemoryUnknown(Exception):
    """The process that measures memory failed; the message says how."""


def result_of(
    case: Case,
    timing: Timing | None = None,
    memory: Memory | None = None,
    launches: int | None = None,
    *,
    ceilings: Sequence[Result] = (),
    absent: str | None = None,
) -> Result:
    """The line for a case: measured, absent, or, with neither, a blank that has the same key."""
    work, unit = case.suite.work(case) or (None, None)
    rate = ceiling = fraction = None
    if timing is not None:
        if work is not None:
            rate = work / timing.ms / (1e6 if unit == "GB/s" else 1e9)
        if ceilings and unit == "GB/s":
            best = max(ceilings, key=lambda result: result.rate)
            ceiling, fraction = best.peer, rate / best.rate
        elif ceilings:
            # By time, not by rate: the ceiling computes what the regime must, more than the least work.
            ceiling, fraction = ceilings[0].peer, ceilings[0].ms / timing.ms
    return Result(
        op=case.suite.op,
        peer=case.peer,
        shape=case.shape,
        dtype=case.dtype,
        pass_name=case.pass_name,
        device=results.device_name(),
        commit=results.commit(),
        threads=torch.get_num_threads(),
        ms=timing and timing.ms,
        ms_spread=timing and timing.ms_spread,
        rounds=timing and timing.rounds,
        ours_ms=timing and timing.ours_ms,
        peak_bytes=memory and memory.peak_bytes,
        gradient_bytes=memory and memory.gradient_bytes,
        rate=rate,
        rate_unit=unit,
        ceiling=ceiling,
        fraction_of_ceiling=fraction,
        launches=launches,
        absent=absent,
        versions=results.versions(),
    )


def timing_on_gpu(problem: Problem) -> Timing:
    from triton.testing import do_bench

    problem.run()  # compiles
    torch.cuda.synchronize()
    start = time.perf_counter()
    problem.run()
    torch.cuda.synchronize()
    once = 1e3 * (time.perf_counter() - start)
    least, most = GPU_MILLISECONDS
    times = do_bench(problem.run, warmup=25, rep=min(max(GPU_ROUNDS * once, least), most), return_mode="all")
    return Timing(statistics.median(times), _interquartile_range(times), len(times))


class _Calls:
    """A problem's first calls, which tell how many make a round, and a round of them."""

    def __init__(self, problem: Problem, device: torch.device):
        self.problem, self.device, self.number = problem, device, 1
        if problem.refill:
            problem.refill()
        self.first = [self.time_round()]
        while not problem.refill and sum(self.first) < WARM_UP_SECONDS:
            self.first.append(self.time_round())
        self.fastest = min(self.first)
        if not problem.refill:
            self.number = max(int(ROUND_SECONDS / self.fastest), 1)

    def run(self) -> None:
        for _ in range(self.number):
            self.problem.run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    def time_round(self) -> float:
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) / self.number


def timing_of_calls(
    problem: Problem, benchmark: Any, device: torch.device, seconds: float, ours: Problem | None = None
) -> Timing:
    """Of as many rounds as there is time for; before each of them comes one of `ours`, if it is given.

    `benchmark`: pytest-benchmark's fixture.
    """
    calls = _Calls(problem, device)
    most = MOST_ROUNDS if calls.number == 1 else MOST_REPEATED_ROUNDS
    rounds = min(max(int(seconds / (calls.number * calls.fastest)), 1 if calls.fastest > SLOW_SECONDS else 2), most)
    fast = rounds == most
    setup, in_turn, our_calls = problem.refill, [], None
    if ours is not None:
        assert problem.refill is None, "what is refilled is not measured in turn"
        assert ours.refill is None
        our_calls = _Calls(ours, device)

        def setup() -> None:
            in_turn.append(1e3 * our_calls.time_round())

    # The first calls of a fast one pay for memory that the machine has never touched; of a slow one each call counts.
    benchmark.pedantic(calls.run, setup=setup, iterations=1, rounds=rounds, warmup_rounds=2 if fast else 0)
    times = [1e3 * total / calls.number for total in benchmark.stats.stats.data]
    in_turn = in_turn[-rounds:]
    if not fast:
        times += [1e3 * seconds for seconds in calls.first]
        in_turn += [1e3 * seconds for seconds in our_calls.first] if our_calls else []
    ours_ms = statistics.median(in_turn) if our_calls else None
    return Timing(statistics.median(times), _interquartile_range(times), len(times), ours_ms)


def _interquartile_range(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def launches(case: Case, problem: Problem, device: torch.device) -> int | None:
    """Kernels, copies and fills of one call, as torch's profiler saw them on the GPU."""
    if device.type == "cpu" or not case.suite.small_calls:
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        problem.run()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in on_device)


def memory_on_gpu(case: Case, problem: Problem) -> Memory | None:
    if case.is_ceiling or case.suite.small_calls or case.pass_name == BACKWARD:
        return None
    device = problem.inputs[0].device
    gc.collect()
    torch.cuda.synchronize()
    # Called before, by the timing: what autotuning or compiling took then is no part of this.
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    delivered = problem.run()
    torch.cuda.synchronize()
    gradient_bytes = problem.gradient_bytes(delivered, case.pass_name)
    return Memory(torch.cuda.max_memory_allocated(device) - before - gradient_bytes, gradient_bytes)


def memory_on_cpu(case: Case) -> Memory | None:
    """Raises MemoryUnknown. In float32 only: other types ask for as much in proportion, and each case takes seconds."""
    if case.is_ceiling or case.suite.small_calls or case.dtype != "float32":
        return None
    # Forked from a server that has imported what takes long and run nothing: as good as fresh, and there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "trl.trainer.utils"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_memory, args=(case, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(MEMORY_TIMEOUT) else f"no answer within {MEMORY_TIMEOUT} s"
    except EOFError:
        answer = "the process ended without an answer"
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise MemoryUnknown(answer)
    return answer


def _send_memory(case: Case, threads: int, sender: Any) -> None:
    try:
        torch.set_num_threads(threads)
        sender.send(_memory_here(case))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _memory_here(case: Case) -> Memory:
    if not case.contestant.compiled:
        case.suite.check_agreement(case, torch.device("cpu"))
    problem = case.suite.build(case, torch.device("cpu"))
    if case.contestant.compiled:
        problem.run()  # the compiler's own memory is not the contestant's
    gc.collect()
    # What the check has freed would be taken again, and so not be counted.
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    delivered = problem.run()
    gradient_bytes = problem.gradient_bytes(delivered, case.pass_name)
    return Memory(_resident("VmHWM") - before - gradient_bytes, gradient_bytes)


def _resident(name: str) -> int:
    (kibibytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)
