"""From a config to a DeepSpeed engine around `LossModule`, and from the engine to a Hugging Face folder."""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from robustloss._files import replace_folder
from robustloss.losses import PreferenceLoss
from robustloss.penalty import check_double_backward
from robustloss.train.config import InputError, LoraConfig, ModelConfig, RunConfig, attention_of, input_errors
from robustloss.train.distributed import is_first, quiet_stdout
from robustloss.train.loss_module import LossModule

logger = logging.getLogger(__name__)


def load_tokenizer(model: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    if model.name_or_path.startswith(("/", ".", "~")) and not Path(model.name_or_path).is_dir():
        raise InputError(f"model.name_or_path {model.name_or_path!r}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at model.name_or_path {model.name_or_path!r}: {_one_line(error)}") from error
    if not tokenizer("a").input_ids:  # what transformers makes of a folder without a tokenizer's files
        raise InputError(f"no tokenizer at model.name_or_path {model.name_or_path!r}: it has no tokens")
    return tokenizer


def load_model_config(model: ModelConfig, name_or_path: str | None = None) -> Any:
    from transformers import AutoConfig

    name = name_or_path or model.name_or_path
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {_one_line(error)}") from error


def load_model(config: RunConfig, name_or_path: str | None = None) -> Any:
    """The causal language model, with dropout off: preference training compares log-probabilities of one model with
    those of another, and noise in either would be a margin."""
    from transformers import AutoModelForCausalLM

    name = name_or_path or config.model.name_or_path
    no_dropout = dict.fromkeys(_dropouts(load_model_config(config.model, name)), 0.0)
    _refuse_pickled_weights(name)
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, loading = load(
            name,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            attn_implementation=attention_of(config),
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **no_dropout,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {_one_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"model {name!r} lacks {len(missing)} weight(s), such as {missing[0]!r}, and would train noise"
        )
    return model


def _refuse_pickled_weights(name: str) -> None:
    """A pickle runs what its writer wants; safetensors hold numbers only. Of a name on the Hub transformers says it."""
    files = {file.name for file in Path(name).iterdir()} if Path(name).is_dir() else set()
    for kind in ("pytorch_model", "adapter_model"):
        pickled = sorted(file for file in files if file.startswith(kind) and file.endswith(".bin"))
        if pickled and not any(file.endswith(".safetensors") for file in files):
            raise InputError(
                f"model {name!r} has its weights in {pickled[0]!r}, and reading a pickle can run code; if you trust "
                "it, convert it once with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained("
                "another_folder), and name that one"
            )


def add_lora(model: Any, lora: LoraConfig) -> Any:
    import peft

    adapter = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with input_errors(), warnings.catch_warnings():
        # peft tells what it sets right by itself (GPT-2 keeps its weights transposed), and calls an old name.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tied = model.config.tie_word_embeddings
        with_adapter: Any = peft.get_peft_model(model, adapter)
        if tied and type(with_adapter.get_base_model().get_output_embeddings()) is not nn.Linear:
            raise ValueError(
                f"lora.target_modules {lora.target_modules!r} takes in the output head, which shares its weight with "
                "the input embeddings: merged, the adapter would change both; leave the head out"
            )
        return with_adapter


def deepspeed_config(config: RunConfig, backwards: int = 1) -> dict[str, Any]:
    """`backwards`: how often a step calls backward, in one process."""
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.microbatch,
        "gradient_accumulation_steps": backwards,
        # Always written: DeepSpeed clips at 1.0 where it is left out.
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": int(1e8),  # elements; the default of 5e8 reserves 2 GB for any model
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": None,
    }
    if config.precision == "bf16" and config.zero_stage > 0:
        # Otherwise the gradients of an optimizer step are summed in bf16; ZeRO-0 offers nothing else.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def learning_rate_factor(step: int, *, total: int, warmup: float, schedule: str) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (from 0).

    A linear rise over the share `warmup` of the steps, then constant, linear or cosine towards zero. No step is
    spent at zero.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def build_engine(config: RunConfig, loss: PreferenceLoss, total_steps: int, backwards: int) -> Any:
    """The DeepSpeed engine around `LossModule(model, loss)`, its optimizer (torch's AdamW) and its schedule.

    `backwards`: how often a step calls backward, in one process.
    """
    import deepspeed

    ds_config = deepspeed_config(config, backwards)
    with _sharded_loading(ds_config, config.zero_stage):
        model = load_model(config)
    if config.model.gradient_checkpointing:
        _enable_checkpointing(model)
    if loss.differentiates_twice:
        with input_errors():
            check_double_backward(model, zero_stage=config.zero_stage)
    if config.lora is not None:
        model = add_lora(model, config.lora)
    module = LossModule(model, loss)

    options = config.optimizer
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # ZeRO-3 keeps a parameter's own shape in ds_shape.
    is_matrix = [len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 for parameter in trained]
    matrices = [parameter for parameter, matrix in zip(trained, is_matrix, strict=True) if matrix]
    others = [parameter for parameter, matrix in zip(trained, is_matrix, strict=True) if not matrix]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.betas[0], options.betas[1]),
        eps=options.epsilon,
    )
    factor = partial(learning_rate_factor, total=total_steps, warmup=options.warmup_ratio, schedule=options.schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with quiet_stdout():
        # DeepSpeed's annotations leave out the schedulers and optimizers that it takes and returns.
        initialize: Any = deepspeed.initialize
        engine, *_ = initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    if config.precision == "bf16" and config.zero_stage == 0:
        # DeepSpeed 0.19 prepares this optimizer by a step with zero gradients, which decays the weights once and leaves
        # Adam's bias corrections a step ahead (the first updates come out a quarter too small): undo it.
        optimizer.state.clear()
        with torch.no_grad():
            for masters, weights in zip(engine.optimizer.fp32_groups, engine.optimizer.fp16_groups, strict=True):
                for master, weight in zip(masters, weights, strict=True):
                    master.copy_(weight)
        if backwards > 1 and is_first():
            logger.warning(
                "bf16 with zero_stage 0 sums the gradients of a step in bf16; zero_stage 1 sums them in fp32"
            )
    return engine


def build_reference(config: RunConfig, device: torch.device) -> Any:
    """A frozen reference model: a plain module, or under ZeRO-3 an engine that shards it as the policy is sharded."""
    import deepspeed

    ds_config = deepspeed_config(config)
    with _sharded_loading(ds_config, config.zero_stage):
        model = load_model(config, config.reference.name_or_path)
    reference = LossModule(model).requires_grad_(False).eval()
    if config.zero_stage < 3:
        return reference.to(device)
    with quiet_stdout():
        engine, *_ = deepspeed.initialize(model=reference, config=ds_config)
    return engine


def save_model(engine: Any, config: RunConfig, tokenizer: Any, folder: Path, card: str = "") -> None:
    """Write the trained model as an ordinary Hugging Face folder (safetensors), whole or not at all.

    A LoRA adapter is merged into the model, and kept beside it in `adapter/`. `card` is the text of its README.md,
    "" for none. All processes call it.
    """
    if config.zero_stage == 3:
        weights = engine._zero3_consolidated_16bit_state_dict()
    else:
        weights = engine.module.state_dict()
    if not is_first():
        return
    # Without the state of the loss, which checkpoints hold.
    weights = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # What is written keeps the dropout that it came with.
    dropouts = _dropouts(load_model_config(config.model))
    if config.lora is None:
        model = engine.module.model
        trained_with = dict(vars(model.config))
        try:
            vars(model.config).update(dropouts)
            model.save_pretrained(temporary, state_dict=weights)
        finally:  # training may go on, and some models read their config at every forward
            vars(model.config).update(trained_with)
    else:
        # Merging in place would change the model under the engine, and ZeRO-3's is in pieces: merge a fresh copy.
        model = add_lora(load_model(config), config.lora)
        model.load_state_dict(weights)
        model.save_pretrained(temporary / "adapter")
        model = model.merge_and_unload()
        vars(model.config).update(dropouts)
        model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if card:
        (temporary / "README.md").write_text(card, encoding="utf-8", newline="\n")
    replace_folder(temporary, folder)


@contextmanager
def _sharded_loading(ds_config: dict[str, Any], zero_stage: int) -> Iterator[None]:
    """Under ZeRO-3, let from_pretrained shard a model as it loads it: transformers does while `sharding` lives."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    sharding = HfDeepSpeedConfig(ds_config) if zero_stage == 3 else None
    try:
        yield
    finally:
        del sharding
        unset_hf_deepspeed_config()


def _enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; not the reentrant kind, which cannot be differentiated twice."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers' new name
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _dropouts(model_config: Any) -> dict[str, float]:
    """Which of a model's settings are dropout probabilities above zero."""
    return {
        key: value
        for key, value in model_config.to_dict().items()
        if isinstance(value, float) and value > 0 and ("dropout" in key or key.endswith("pdrop"))
    }


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
