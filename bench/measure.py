"""Time and memory of one case, on a GPU by triton's do_bench, on a CPU by pytest-benchmark and in a process of its own.

Extra memory is the peak beyond the inputs, minus the gradients that every contestant must return. It is measured, not
computed: on a GPU by torch's allocator; on a CPU as the peak resident set (VmHWM, set back through
/proc/self/clear_refs) of a fresh process in which a tiny problem has loaded the libraries and started the threads, so
that only what the problem itself touches counts.
"""

from __future__ import annotations

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

from bench import results
from bench.cases import BACKWARD, SEQUENCE, Case, Problem, build, check_agreement
from bench.results import Result

CPU_SECONDS = 1.5  # of measuring per case, but
MOST_CPU_ROUNDS = 9
SLOW_SECONDS = 4.0  # what takes longer than this, far behind all others, has two calls only
GPU_MILLISECONDS = (100, 1000)
GPU_ROUNDS = 10
MEMORY_TIMEOUT = 120  # seconds


@dataclass(frozen=True)
class Timing:
    ms: float
    ms_spread: float
    rounds: int


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
    *,
    ceilings: Sequence[Result] = (),
    absent: str | None = None,
) -> Result:
    """The line for a case: measured, absent, or, with neither, a blank that has the same key."""
    work, unit = case.work()
    rate = None
    ceiling = fraction = None
    if timing is not None:
        rate = work / timing.ms / (1e6 if unit == "GB/s" else 1e9)
        if ceilings and case.op == SEQUENCE:
            best = max(ceilings, key=lambda result: result.rate)
            ceiling, fraction = best.peer, rate / best.rate
        elif ceilings:
            # By time, not by rate: the ceiling computes what the regime must, more than the least work.
            ceiling, fraction = ceilings[0].peer, ceilings[0].ms / timing.ms
    return Result(
        op=case.op,
        peer=case.peer,
        shape=case.shape.as_dict(),
        dtype=case.dtype,
        pass_name=case.pass_name,
        device=results.device_name(),
        commit=results.commit(),
        threads=torch.get_num_threads(),
        ms=timing and timing.ms,
        ms_spread=timing and timing.ms_spread,
        rounds=timing and timing.rounds,
        peak_bytes=memory and memory.peak_bytes,
        gradient_bytes=memory and memory.gradient_bytes,
        rate=rate,
        rate_unit=unit,
        ceiling=ceiling,
        fraction_of_ceiling=fraction,
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


def timing_on_cpu(problem: Problem, benchmark: Any) -> Timing:
    """`benchmark`: pytest-benchmark's fixture. The first call tells how many rounds there is time for."""

    def round_arguments() -> tuple[tuple, dict]:
        problem.refill()
        return (), {}

    problem.refill()
    start = time.perf_counter()
    problem.run()
    first = time.perf_counter() - start
    rounds = min(max(int(CPU_SECONDS / first), 1 if first > SLOW_SECONDS else 2), MOST_CPU_ROUNDS)
    fast = rounds == MOST_CPU_ROUNDS
    # The first calls of a fast one pay for memory that the machine has never touched; of a slow one each call counts.
    benchmark.pedantic(problem.run, setup=round_arguments, rounds=rounds, warmup_rounds=2 if fast else 0)
    times = [1e3 * seconds for seconds in [*benchmark.stats.stats.data, *([] if fast else [first])]]
    return Timing(statistics.median(times), _interquartile_range(times), len(times))


def _interquartile_range(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def memory_on_gpu(case: Case, problem: Problem) -> Memory | None:
    if case.is_ceiling or case.pass_name == BACKWARD:
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
    if case.is_ceiling or case.dtype != "float32":
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
        check_agreement(case, torch.device("cpu"))
    problem = build(case, torch.device("cpu"))
    if case.contestant.compiled:
        problem.run()  # the compiler's own memory is not the contestant's
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    delivered = problem.run()
    gradient_bytes = problem.gradient_bytes(delivered, case.pass_name)
    return Memory(_resident("VmHWM") - before - gradient_bytes, gradient_bytes)


def _resident(name: str) -> int:
    (kibibytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)
