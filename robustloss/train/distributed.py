"""Processes and devices: one process, or several under torchrun or deepspeed, on CPUs or GPUs."""

from __future__ import annotations

import gc
import io
import os
import random
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# Before there is a process group: its functions take the group they find for a default argument, and never let it go.
import torch.distributed.nn

from robustloss.train.config import InputError
from robustloss.validation import check_number

_set_here: dict[str, str] = {}  # environment variables

_MARK = "raised_by_all"  # an attribute of an error

# What gloo, NCCL and the store where processes meet say of one that does not answer.
_SIGNS_OF_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "timed out",
    "timeout",
    "remote process exit",
    "communicator was aborted",
)


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or has not answered for as long as `timeout()`."""


def prepare_libraries() -> None:
    """Keep the libraries below from talking: DeepSpeed of the accelerator it guesses, transformers of quick things."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # DeepSpeed's ZeRO-3 calls collectives by names that torch has since replaced; nobody who trains can change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def start() -> tuple[torch.device, bool]:
    """Join the process group, or use the one there is: this process's device, and whether this began the group."""
    prepare_libraries()
    if "RANK" not in os.environ:  # plain `python`: a world of one process
        _set_here.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        _set_here["MASTER_PORT"] = str(_free_port())
        os.environ.update(_set_here)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # On CPUs DeepSpeed would compile a shared-memory all-reduce for inference: 40 s, a compiler, no use in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator: Any = get_accelerator()
    device = torch.device(accelerator.device_name(local_rank()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    backend = accelerator.communication_backend_name() if device.type != "cpu" else "gloo"
    with telling_lost_processes():
        deepspeed.init_distributed(backend, timeout=timeout())
    return device, started


def timeout() -> timedelta:
    """How long a process waits for the others: ROBUSTLOSS_TIMEOUT, in seconds; 10 minutes where that is not set.

    The longest wait is that for the first process while it writes the model at the end. A process that is killed is
    noticed at once by gloo, whatever the timeout; NCCL may take all of it, and where its watchdog is first, that ends
    the process with a traceback of its own (SIGABRT).
    """
    given = os.environ.get("ROBUSTLOSS_TIMEOUT", "600")
    try:
        return timedelta(seconds=check_number("ROBUSTLOSS_TIMEOUT", float(given), above=0))
    except (ValueError, OverflowError) as error:
        raise InputError(f"ROBUSTLOSS_TIMEOUT must be a number of seconds > 0, got {given!r}") from error


@contextmanager
def telling_lost_processes() -> Iterator[None]:
    """Turn the errors of a collective whose other side is gone into a LostProcessError of one line."""
    try:
        yield
    except LostProcessError:
        raise
    except RuntimeError as error:
        message = str(error).lower()
        # torch's own errors have a class; gloo's come as they are.
        of_a_collective = isinstance(error, dist.DistError) or "gloo" in message or "pair closure" in message
        sign = next((sign for sign in _SIGNS_OF_LOSS if sign in message), None)
        if not of_a_collective or sign is None:
            raise
        raise LostProcessError(
            f"a process was lost (rank unknown: {sign}); see what it said last; the same command goes on from the last "
            "checkpoint"
        ) from error


def quiet_stdout() -> AbstractContextManager[Any]:
    """Swallow what DeepSpeed prints of its memory while it sets up; its warnings are logged, and come through."""
    return redirect_stdout(io.StringIO())


def stop() -> None:
    """Leave the process group; a later `start` begins a new one."""
    import deepspeed

    gc.collect()  # an engine is a cycle that holds groups, and the threads of a group that is held abort the exit
    deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with groups that are gone
    while _set_here:  # a process started later must not take this one's address for its own
        os.environ.pop(_set_here.popitem()[0], None)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- the global generator is what libraries draw from
    torch.manual_seed(seed)


def seed_anew(seed: int, step: int) -> None:
    """Seed a run that goes on from `step` with another number of processes, where no state is this process's own."""
    # Not the sum of the three, which the steps and ranks of a neighbouring seed would share.
    entropy = np.random.SeedSequence([seed, step, dist.get_rank(), dist.get_world_size()])
    seed_everything(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def random_state() -> dict[str, Any]:
    """The states of all generators, in tensors, numbers, strings and tuples of them: no class of its own to load."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {"python": random.getstate(), "numpy": (name, torch.tensor(keys.tolist()), *rest)}
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def gather(value: Any) -> list[Any]:
    """Every process's value (any picklable object), in the order of ranks, on all of them."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def raised_by_all() -> Iterator[None]:
    """Mark an error of this block as one that every process raises, so that one of them may tell it for all."""
    try:
        yield
    except Exception as error:
        vars(error)[_MARK] = True
        raise


def is_raised_by_all(error: BaseException | None) -> bool:
    """Whether the error, or one that it was made of, is marked."""
    return error is not None and (_MARK in vars(error) or is_raised_by_all(error.__cause__))


def on_first(action: Callable[[], Any]) -> Any:
    """Do something on the first process only: its result there, None elsewhere. The others wait, and raise what it
    raised."""
    result, error = None, [None]
    if is_first():
        try:
            result = action()
        except Exception as raised:  # whatever it is, the others must not wait for ever
            error = [raised]
    dist.broadcast_object_list(error)
    if error[0] is not None:
        with raised_by_all():
            raise error[0]
    return result


def together(action: Callable[[], Any]) -> Any:
    """Do something in every process: the own result in each; if it fails in any, all raise what the first of them
    raised. For actions that leave no process waiting for one that has failed."""
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    for raised in gather(error):
        if raised is not None:
            with raised_by_all():
                raise raised
    return result


def mean_by_name(records: Iterable[tuple[dict[str, float], float]]) -> dict[str, float]:
    """Weighted means of (values by name, weight), over the records that hold a name with a number (not NaN)."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for values, weight in records:
        for name, value in values.items():
            if value == value:
                sums[name] = sums.get(name, 0.0) + weight * value
                weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sums}
