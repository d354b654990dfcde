"""Steps that are left out, on every ZeRO stage and precision; used by test_guard.py, alone or as several processes.

python guard_worker.py RESULT.json   (with the environment of a process group)
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import torch
from tiny_models import tiny_gpt2
from torch import nn

from robustloss.train import distributed
from robustloss.train.guard import discard_gradients, gradient_norm

CELLS = tuple(itertools.product(range(4), ("fp32", "bf16"), (1, 2)))  # ZeRO stage, precision, accumulation
CLIPPING = 0.5


class Summed(nn.Module):
    """A language model's loss times a factor, which is NaN where the step is to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_gpt2(dropout=0.0)

    def forward(self, tokens: torch.Tensor, factor: float) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss * factor


def build(stage: int, precision: str, accumulation: int):
    import deepspeed

    module = Summed().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6},
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": None,
    }
    if precision == "bf16" and stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    with distributed.quiet_stdout():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def tokens_of(step: int, microstep: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * microstep + rank)
    return torch.randint(257, (2, 6), generator=generator)


def take_step(engine, step: int, factors: list[float], *, backwards: int | None = None) -> float | None:
    """Forward and backward of a step's microbatches (the first `backwards` of them), as the loop does; the norm."""
    rank = torch.distributed.get_rank()
    for microstep, factor in enumerate(factors):
        loss = engine(tokens_of(step, microstep, rank), factor)
        if backwards is not None and microstep >= backwards:
            return None  # the graph is thrown away, as where log-probabilities are found not to be finite
        engine.backward(loss)
        if microstep + 1 < len(factors):
            engine.step()  # counts the microbatch
    return gradient_norm(engine)


def snapshot(engine) -> list[torch.Tensor]:
    """Copies of this process's parameters, and of the optimizer's weights and states."""
    values = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    values += [parameter for group in inner.param_groups for parameter in group["params"]]
    values += [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return [value.detach().clone() for value in values]


def counters(engine) -> tuple:
    return engine.micro_steps, engine.global_steps, engine.global_samples, tuple(engine.get_lr())


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def check_cell(stage: int, precision: str, accumulation: int) -> dict[str, bool]:
    """Two steps with failing ones before each, against the same two without: what holds, by name."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    healthy = [1.0] * accumulation
    poisoned = list(healthy)
    if rank == world - 1:  # one microbatch of one process
        poisoned[0] = math.nan
    with_failures, without = build(stage, precision, accumulation), build(stage, precision, accumulation)
    held = {}

    norms = []
    for step in (1, 2):
        norms.append(take_step(without, step, healthy))
        without.step()
        theirs = without.get_global_grad_norm()
        if theirs is not None:  # fp32 without ZeRO has none
            held[f"step {step}: the norm is DeepSpeed's"] = math.isclose(norms[-1], float(theirs), rel_tol=1e-2)

    failures = {"one NaN": (poisoned, None), "no backward": (healthy, 0)}
    if accumulation > 1:
        failures["a finite gradient, half accumulated"] = (healthy, 1)
    for step in (1, 2):
        for name, (factors, backwards) in failures.items():
            before, counted = snapshot(with_failures), counters(with_failures)
            norm = take_step(with_failures, 10 + step, factors, backwards=backwards)
            if backwards is None:
                held[f"step {step}, {name}: is seen"] = not math.isfinite(norm)
            discard_gradients(with_failures)
            held[f"step {step}, {name}: nothing changes"] = same(before, snapshot(with_failures))
            held[f"step {step}, {name}: nothing is counted"] = counters(with_failures) == counted
        held[f"step {step}: the norm is that without failures"] = (
            take_step(with_failures, step, healthy) == norms[step - 1]
        )
        before = snapshot(with_failures)
        with_failures.step()
        held[f"step {step}: the next step is taken"] = not same(before, snapshot(with_failures))
    held["the end is that without failures"] = same(snapshot(with_failures), snapshot(without))
    held["the counters are those without failures"] = counters(with_failures) == counters(without)
    held["clipping was at work"] = max(norms) > CLIPPING
    for engine in (with_failures, without):
        engine.destroy()
    return held


def main(result: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    held = {str(cell): check_cell(*cell) for cell in CELLS}
    everyone = distributed.gather(held)
    if distributed.is_first():
        result.write_text(json.dumps(everyone))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
