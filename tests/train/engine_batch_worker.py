"""Five SGD steps by DeepSpeed on the global batch, beside one giant batch in plain PyTorch.

engine_batch_worker.py FOLDER   alone or under torchrun; the errors go to FOLDER/<processes>.json
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor

from robustloss import losses
from robustloss.losses import LOSSES
from robustloss.train import distributed
from robustloss.train.inputs import BatchOrder
from robustloss.train.loss_module import LossModule
from robustloss.train.step import accumulate_gradients

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo"},
    "kldpo-tau": {"name": "kldpo", "tau": 0.1},
    "kldpo-rho": {"name": "kldpo", "rho": 0.1},
    "aot_paired-hard": {"name": "aot_paired"},
    "aot_paired-soft_l2": {"name": "aot_paired", "sort": "soft_l2"},
    "aot_unpaired-hard": {"name": "aot_unpaired"},
    "aot_unpaired-soft_kl": {"name": "aot_unpaired", "sort": "soft_kl"},
    "kto": {"name": "kto"},
    "group_dro": {"name": "group_dro", "groups": 2},
}
STEPS, SAMPLES, TOKENS, LEARNING_RATE = 5, 10, 12, 0.05


def make_loss(options: dict[str, Any]) -> losses.PreferenceLoss:
    options = dict(options)
    return LOSSES[options.pop("name")](**options)


def samples(loss: losses.PreferenceLoss, count: int, vocabulary: int) -> dict[str, Tensor]:
    """A dataset, by column; of pairs [2, count, ...]."""
    sides = (2, count) if loss.paired else (count,)
    tokens = torch.randint(1, vocabulary, (*sides, TOKENS))
    labels = tokens.clone()
    labels[..., :4] = -100
    columns = {"input_ids": tokens, "labels": labels, "ref": -5.0 * (TOKENS - 4) + torch.randn(sides)}
    if not loss.paired:
        columns["desirable"] = torch.arange(count) % 3 > 0
        columns["mismatched"] = torch.randint(1, vocabulary, (count, TOKENS))
        columns["ref_mismatched"] = -5.0 * (TOKENS - 1) - 8 + torch.randn(count)
    else:
        columns["group"] = torch.arange(count) % 2
    return columns


def batch_of(loss: losses.PreferenceLoss, columns: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    index = torch.tensor(rows)
    if loss.paired:
        batch = {name: columns[name][:, index].flatten(0, 1) for name in ("input_ids", "labels")}
        batch |= {"ref_chosen_logps": columns["ref"][0, index], "ref_rejected_logps": columns["ref"][1, index]}
        batch["group"] = columns["group"][index]
    else:
        batch = {name: columns[name][index] for name in ("input_ids", "labels", "desirable")}
        batch["ref_logps"] = columns["ref"][index]
        if loss.needs_mismatched:
            batch |= {f"mismatched_{name}": columns["mismatched"][index] for name in ("input_ids", "labels")}
            batch["mismatched_attention_mask"] = torch.ones_like(batch["mismatched_input_ids"])
            batch["ref_mismatched_logps"] = columns["ref_mismatched"][index]
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"]), "index": index}


def relative_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    squares = [((ours[name] - exact[name]).norm() ** 2, exact[name].norm() ** 2) for name in exact]
    return float((sum(error for error, _ in squares) / sum(whole for _, whole in squares)) ** 0.5)


def run(case: str, stage: int, microbatch: int) -> dict[str, float]:
    """The largest relative errors of five steps: of the value, of the gradients, and of the parameters at the end."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = tiny_llama() if stage % 2 else tiny_gpt2()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    loss = make_loss(CASES[case])
    columns = samples(loss, 2 * SAMPLES, model.config.vocab_size)
    order = BatchOrder(2 * SAMPLES, SAMPLES, microbatch, world, seed=0)

    exact = LossModule(copy.deepcopy(model), copy.deepcopy(loss))
    plain = torch.optim.SGD(exact.model.parameters(), lr=LEARNING_RATE)
    module = LossModule(model, loss)
    config = {
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": order.accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    with distributed.quiet_stdout():
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    parameters = dict(engine.module.model.named_parameters())
    errors = {"value": 0.0, "gradients": 0.0, "parameters": 0.0}
    for step in range(STEPS):
        whole = [
            row
            for process in range(world)
            for microstep in range(order.accumulation)
            for row in order.microbatch_rows(step, process, microstep)
        ]
        plain.zero_grad()
        value = exact(batch_of(loss, columns, whole))
        value.backward()

        own = [batch_of(loss, columns, order.microbatch_rows(step, rank, each)) for each in range(order.accumulation)]
        ours, _ = accumulate_gradients(engine, own)
        gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters.items()}
        expected = {name: parameter.grad for name, parameter in exact.model.named_parameters()}
        errors["value"] = max(errors["value"], float((ours - value.detach()).abs() / value.detach().abs()))
        errors["gradients"] = max(errors["gradients"], relative_error(gradients, expected))
        engine.step()
        plain.step()
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        trained = {name: parameter.detach() for name, parameter in parameters.items()}
        wanted = {name: parameter.detach() for name, parameter in exact.model.named_parameters()}
        errors["parameters"] = relative_error(trained, wanted)
    engine.destroy()
    return errors


def cells(world: int) -> list[tuple[str, int, int]]:
    """(case, ZeRO stage, microbatch): 10 samples are 1 x 1 and 1 x 4 of one process, 2 x 1 and 2 x 2 of two."""
    sizes = (10, 3) if world == 1 else (5, 3)
    every = [(case, stage, size) for case in CASES for stage in range(4) for size in sizes]
    if world == 1:  # alone, the stages do the same sums
        return [cell for index, cell in enumerate(every) if (index // 2) % 4 == index // 8 % 4]
    # Every loss meets every stage in microbatches, and one stage without.
    return [cell for index, cell in enumerate(every) if cell[2] == 3 or cell[1] == index // 8 % 4]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    world = torch.distributed.get_world_size()
    results = {}
    for cell in cells(world):
        results["-".join(map(str, cell))] = run(*cell)
    if distributed.is_first():
        (folder / f"{world}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
