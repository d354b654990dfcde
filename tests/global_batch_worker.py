"""Trains on this process's share of every batch; started by test_global_batch_distributed.py.

    torchrun ... global_batch_worker.py FOLDER

What came of every cell of the matrix, and of the calls that must fail, is written to FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from global_batch_cases import LOSSES, SHARES, UNCOUPLED, logps_of, make_batch, make_policy, take, train_cut
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from robustloss import BetaDPOLoss, DPOLoss, GlobalBatch, KLDPOLoss

WRAPPERS = ("all-reduce", "DDP", "FSDP2")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def cells() -> list[tuple[str, str, int, str, bool]]:
    """(loss, dtype, microbatches, wrapper, whether masses are known beforehand)."""
    return [
        (loss, dtype, microbatches, wrapper, masses)
        for loss in LOSSES
        for dtype in DTYPES
        for microbatches in (1, 2)
        for wrapper in WRAPPERS
        for masses in ((False, True) if loss in UNCOUPLED else (False,))
    ]


def average(policy: nn.Module) -> None:
    for parameter in policy.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def train(loss: str, dtype: str, microbatches: int, wrapper: str, masses: bool, **options: Any) -> dict[str, Any]:
    policy = make_policy(DTYPES[dtype])
    options["shares"] = SHARES[2, microbatches][dist.get_rank()]
    if wrapper == "all-reduce":
        options |= {"reduce": average, "divisor": 3.0}
    elif wrapper == "DDP":
        options["forward"] = DistributedDataParallel(policy)
    else:
        fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
        options["full"] = lambda value: value.full_tensor()
    return train_cut(loss, DTYPES[dtype], policy=policy, masses=masses, **options)


def forward(dtype: torch.dtype, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """GlobalBatch.forward on this process's rows: seven of ten in the first, three in the second."""
    policy, rank = make_policy(dtype), dist.get_rank()
    result: dict[str, Any] = {}
    for name, (make, _) in LOSSES.items():
        arguments = logps_of(policy)(take(make_batch(name, 0, dtype), SHARES[2, 1][rank][0]))
        value, metrics = GlobalBatch(make(), group)(**arguments, return_metrics=True)
        policy.zero_grad()
        value.backward()
        average(policy)
        result[name] = {
            "value": value.item(),
            "metrics": {key: metric.item() for key, metric in metrics.items()},
            "gradient": [parameter.grad.double().flatten().tolist() for parameter in policy.parameters()],
        }
    return result


def attempt(call: Callable[[], Any]) -> dict[str, Any]:
    """The error that a call ends in."""
    try:
        call()
    except Exception as error:
        return {
            "type": type(error).__name__,
            "message": str(error),
            "positions": getattr(error, "positions", None),
        }
    return {"type": None}


def failures() -> dict[str, Any]:
    """What each process gets where one of them, or both, do something wrong."""
    rank = dist.get_rank()
    policy = make_policy()

    def step(loss: Any, rows: list[range], spoil: Callable[[dict], dict] = dict, **options: Any) -> dict[str, Any]:
        backward = []

        def logps_fn(batch: dict) -> dict:
            return spoil(logps_of(policy)(batch))

        microbatches = [take(make_batch("kldpo tau", 0), share) for share in rows]
        result = attempt(lambda: GlobalBatch(loss).step(microbatches, logps_fn, backward.append, **options))
        return {**result, "backward": len(backward)}

    def put_nan(arguments: dict) -> dict:
        if rank == 1 and len(arguments["ref_chosen_logps"]) == 3:
            policy_logps = arguments["policy_rejected_logps"]
            nan = torch.where(torch.arange(3) == 2, torch.inf, policy_logps.detach())
            arguments["policy_rejected_logps"] = policy_logps + (nan - policy_logps.detach())
        return arguments

    def overflow(arguments: dict) -> dict:
        if rank == 1 and len(arguments["ref_chosen_logps"]) == 3:
            arguments["ref_chosen_logps"] = torch.full((3,), 1e300, dtype=torch.float64)
        return arguments

    def only_first(**extra: Any) -> Callable[[dict], dict]:
        return lambda arguments: {**arguments, **(extra if rank == 0 else {})}

    tilt, mean, rows = KLDPOLoss(0.5, tau=0.2), DPOLoss(0.5), [range(4), range(3)]
    beta = BetaDPOLoss()
    result = {
        "not finite, two passes": step(tilt, rows, put_nan),
        "not finite, one pass": step(mean, rows, put_nan, masses=[4, 3]),
        "not finite, state": step(beta, rows, put_nan),
        "microbatches": step(tilt, rows[: 1 + rank]),
        "microbatches, one pass": step(mean, rows[: 1 + rank], masses=[4, 3][: 1 + rank]),
        "no microbatches in one": step(tilt, rows[:rank]),
        "arguments": step(tilt, rows[:1], only_first(weights=torch.ones(4))),
        "dtypes": step(tilt, rows[:1], only_first(ref_chosen_logps=torch.zeros(4))),
        "unknown": step(tilt, rows[:1], only_first(temperature=torch.zeros(4))),
        "shape": step(tilt, rows[:1], only_first(ref_chosen_logps=torch.zeros(4, 1))),
        "length": step(tilt, rows[:1], only_first(ref_chosen_logps=torch.zeros(3))),
        "no tensor": step(tilt, rows[:1], only_first(ref_chosen_logps=[0.0] * 4)),
        "masses": step(mean, rows[:1], masses=[4, 4] if rank else [4]),
        "wrong masses": step(mean, rows[:1], masses=[4 + rank]),
        "reference not finite": step(tilt, rows[:1], only_first(ref_chosen_logps=torch.full((4,), torch.nan).double())),
        "overflow, two passes": step(DPOLoss(0.5, link="squared_hinge"), rows, overflow),
        "overflow, one pass": step(DPOLoss(0.5, link="squared_hinge"), rows, overflow, masses=[4, 3]),
        "nobody has samples": step(tilt, [range(0), range(0)]),
        "forward": attempt(
            lambda: GlobalBatch(tilt)(*[torch.zeros(3)] * 4, **({"weights": torch.ones(3)} if rank else {}))
        ),
    }
    result["not finite, state"]["batches"] = int(beta.batches)
    logps = torch.zeros(3, requires_grad=True)
    value = GlobalBatch(tilt)(logps, *[torch.zeros(3)] * 3)
    (gradient,) = torch.autograd.grad(value, logps, create_graph=True)
    result["second derivative"] = attempt(lambda: gradient.sum().backward())
    zeros = torch.zeros(3)
    with torch.no_grad():
        result["value without gradient"] = GlobalBatch(tilt)(zeros - rank, zeros, zeros, zeros).item()
    evaluated = GlobalBatch(BetaDPOLoss()).eval()
    evaluated(*[torch.randn(3) for _ in range(4)])
    result["batches in evaluation"] = int(evaluated.loss.batches)
    return result


def exchanges() -> dict[str, int]:
    """How often a step of two microbatches gathers."""
    counts, gather = {}, dist.all_gather
    for name, loss, options in (
        ("two passes", KLDPOLoss(0.5, tau=0.2), {}),
        ("one pass", DPOLoss(0.5), {"masses": [4, 3]}),
    ):
        counts[name] = 0

        def counted(*args: Any, name: str = name, **kwargs: Any) -> Any:
            counts[name] += 1
            return gather(*args, **kwargs)

        dist.all_gather = counted
        microbatches = [take(make_batch("kldpo tau", 0), rows) for rows in (range(4), range(3))]
        GlobalBatch(loss).step(microbatches, logps_of(make_policy()), torch.Tensor.backward, **options)
        dist.all_gather = gather
    return counts


def synchronizations() -> dict[str, Any]:
    """How often DistributedDataParallel averages a bucket, of which there is one, and what is trained so."""
    result: dict[str, Any] = {}
    for name, masses in (("kldpo tau", False), ("dpo weighted", True)):
        for once in (False, True):
            policy, averaged = make_policy(), []

            def average_bucket(group, bucket, averaged=averaged):  # whose annotations torch would check
                averaged.append(bucket.index())
                return allreduce_hook(group, bucket)

            wrapped = DistributedDataParallel(policy)
            wrapped.register_comm_hook(None, average_bucket)
            shares = SHARES[2, 2][dist.get_rank()]
            options = {"masses": masses, "no_sync": wrapped.no_sync if once else None}
            trained = train_cut(name, torch.float64, shares, policy=policy, forward=wrapped, **options)
            result[f"{name} {'once' if once else 'always'}"] = {**trained, "averaged": averaged}
    return result


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # one class in a process is what is wanted here
    dist.init_process_group("gloo")
    result: dict[str, Any] = {"cells": {}}
    for cell in cells():
        result["cells"][" ".join(map(str, cell))] = train(*cell)
    result["alone"] = {name: train(name, "float64", 1, "all-reduce", False, global_batch=False) for name in LOSSES}
    result["forward"] = {name: forward(dtype) for name, dtype in DTYPES.items()}
    result["in a group"] = forward(torch.float64, dist.new_group([0, 1]))
    result["failures"] = failures()
    result["exchanges"] = exchanges()
    result["synchronizations"] = synchronizations()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the meshes' caches hold groups, whose threads would abort an ordinary exit now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]))
