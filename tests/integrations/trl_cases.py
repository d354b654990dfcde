"""A TRL trainer of a second or less: a GPT-2 of two layers, twelve rows, plain SGD."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tiny_models import byte_tokenizer, pair_rows
from transformers import AutoModelForCausalLM
from trl import DPOConfig

TIMES = ("runtime", "samples_per_second", "steps_per_second")


def load(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def moved(folder: str, seed: int = 1, **options: Any) -> Any:
    """The model a little away from what the folder has, as another policy."""
    model = load(folder, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def settings(output_dir: Any, **changes: Any) -> dict[str, Any]:
    """The arguments of a config of TRL's."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **changes,
    }


def pairs(count: int = 12, **columns: Any) -> Dataset:
    rows = pair_rows(count)
    return Dataset.from_list([{**row, **{name: f(i) for name, f in columns.items()}} for i, row in enumerate(rows)])


def dpo_trainer(kind: Any, model: Any, folder: Any, *, data: Any = None, options: Any = None, **changes: Any) -> Any:
    """A trainer of pairs. `options` are its own arguments, and `changes` DPOConfig's."""
    return kind(
        model,
        args=DPOConfig(**settings(folder, **changes)),
        train_dataset=pairs() if data is None else data,
        eval_dataset=pairs(4, group=lambda index: index % 2),
        processing_class=byte_tokenizer(),
        **(options or {}),
    )


def parameters_of(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def history(trainer: Any) -> list[dict[str, float]]:
    """What the trainer has logged, but for what measures time."""
    return [
        {name: value for name, value in record.items() if not name.endswith(TIMES)}
        for record in trainer.state.log_history
    ]
