"""What a run is made of: dataclasses read from YAML and `key=value` overrides, and every check that needs no model.

All of it is plain data, so a mistake costs a second: unknown keys (the nearest valid one is named), wrong types,
values out of range and options that cannot hold together raise `InputError` before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from robustloss._files import replace_file
from robustloss.losses import LOSSES, PreferenceLoss, WDPOLoss
from robustloss.losses.catalogue import option_names
from robustloss.losses.catalogue import options as loss_options
from robustloss.train.data import TRUNCATIONS
from robustloss.train.texts import COMPLETIONS, shorten
from robustloss.validation import check_choice, check_number

# What a machine has run out of or does not let a run do. Other OSErrors are mistakes in what was given, or bugs.
MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENOMEM,
    errno.ESTALE,
)


class InputError(ValueError):
    """A mistake in what the user gave. The command line prints it as one line and exits with code 2."""


class DiskError(InputError):
    """A disk that is full, or a folder that cannot be written to, in the middle of a run: exit code 1."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Mark the errors of a block that checks the user's input as `InputError`, and those of the machine among them as
    `DiskError`; those of a bug keep their traceback."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, OSError) as error:
        of_machine = isinstance(error, OSError) and error.errno in MACHINE_ERRORS
        raise (DiskError if of_machine else InputError)(str(error)) from error


@dataclass
class ModelConfig:
    name_or_path: str = MISSING  # a Hugging Face name or a local folder
    attn_implementation: str | None = None  # null: "sdpa", and "eager" for exact wdpo, which differentiates twice
    gradient_checkpointing: bool = False  # compute activations again in the backward: slower, less memory
    trust_remote_code: bool = False  # run the code that a model's repository brings
    chat_template: str | None = None  # a Jinja template in place of the tokenizer's own


@dataclass
class LoraConfig:
    r: int = 8  # rank
    alpha: int = 16  # the adapter is multiplied by alpha / r
    dropout: float = 0.0  # of the adapter's input
    target_modules: Any = "all-linear"  # "all-linear", a regular expression, or a list of module names


@dataclass
class DataConfig:
    train: str = MISSING  # a .jsonl, .json, .parquet or .csv file, or a Hugging Face dataset
    train_split: str = "train"  # of a Hugging Face dataset
    eval: str | None = None  # as train; null: `eval_fraction` of train is held out
    eval_split: str = "test"  # of a Hugging Face dataset
    eval_fraction: float = 0.1  # 0: no evaluation
    kind: str = "auto"  # preference, unpaired, or auto: by the columns
    max_length: int = 1024  # tokens of prompt and completion together
    truncation: str = "prompt"  # what goes first beyond it: "prompt", its beginning; or "end", the completion's end


@dataclass
class ReferenceConfig:
    mode: str = "precomputed"  # once, cached on disk; live: a frozen copy; base: the model under the LoRA adapter
    name_or_path: str | None = None  # null: the policy before training
    cache_dir: str | None = None  # null: $ROBUSTLOSS_CACHE or ~/.cache/robustloss, shared between runs


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-6  # after warming up
    weight_decay: float = 0.0  # of matrices; biases and norms are never decayed
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW's
    epsilon: float = 1e-8  # AdamW's
    schedule: str = "cosine"  # or linear, both to zero; or constant
    warmup_ratio: float = 0.1  # the share of all steps in which the learning rate rises from zero
    gradient_clipping: float = 1.0  # the largest global norm; 0 turns it off


@dataclass
class BatchConfig:
    effective_batch: int = 8  # pairs (or unpaired samples) per optimizer step, of all processes together
    microbatch: int = 8  # the most of them in one forward of one process; the accumulation follows


@dataclass
class PenaltyConfig:
    check_every: int | None = None  # optimizer steps between comparisons of directional wdpo with exact; null: never


@dataclass
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, Any] = field(default_factory=dict)  # name (dpo, kldpo, ...), and the options of that loss
    lora: LoraConfig | None = None
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    epochs: float = 1.0  # passes over the training data
    max_steps: int | None = None  # optimizer steps; overrides epochs
    precision: str = "fp32"  # or bf16
    zero_stage: int = 0  # DeepSpeed's, 0 to 3: what is split between processes
    seed: int = 0  # of the order of the data, and of dropout
    output_dir: str = "runs/train"  # checkpoints, metrics, report and model
    resume: bool = True  # go on from the newest checkpoint in output_dir; false starts again
    log_every: int = 1  # optimizer steps between lines of metrics
    eval_every: int | None = None  # optimizer steps; null: before and after training
    save_every: int | None = None  # optimizer steps; null: about ten times in the run; 0: never
    keep_checkpoints: int = 2  # the newest, besides the best
    max_skipped: int = 3  # steps in a row that may be left out for numbers that are not finite; then the run ends


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "lora": LoraConfig,
    "reference": ReferenceConfig,
    "optimizer": OptimizerConfig,
    "batch": BatchConfig,
    "penalty": PenaltyConfig,
}
# What other programs call it, and how it is called here.
ALIASES = {
    "lr": ("optimizer.learning_rate",),
    "batch_size": ("batch.effective_batch", "batch.microbatch"),
    "train_batch_size": ("batch.effective_batch", "batch.microbatch"),
    "per_device_train_batch_size": ("batch.microbatch",),
    "gradient_accumulation_steps": ("batch.effective_batch", "batch.microbatch"),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "max_grad_norm": ("optimizer.gradient_clipping",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "warmup_steps": ("optimizer.warmup_ratio",),
    "lora_r": ("lora.r",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "bf16": ("precision",),
    "loss_type": ("loss.name",),
    "dataset": ("data.train",),
    "dataset_name": ("data.train",),
}
# What may change between the runs that share an output folder: none of it touches the parameters.
FREE_KEYS = (
    "output_dir",
    "resume",
    "batch.microbatch",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "max_skipped",
    "penalty.check_every",
    "reference.cache_dir",
)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, base: dict[str, Any] | None = None
) -> RunConfig:
    """Read `path` (YAML) over the defaults and `base`, then `overrides` ("loss.tau=0.1"), and check the result.

    Raises:
        InputError: one line that names the key, what came and what is wanted.
    """
    layers = [base or {}]
    if path is not None:
        layers.append(_read_yaml(Path(path)))
    layers.append(read_overrides(overrides))
    config = OmegaConf.structured(RunConfig)
    for layer in layers:
        if (layer.get("loss") or {}).get("name", config.loss.get("name")) != config.loss.get("name"):
            # Another loss has other options: those of the layer below would only be refused.
            config.loss = {}
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise InputError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    for key, meaning in (
        ("model.name_or_path", "a Hugging Face name or a local folder"),
        ("data.train", "a .jsonl, .json, .parquet or .csv file, or a Hugging Face dataset"),
    ):
        if OmegaConf.is_missing(OmegaConf.select(config, key.split(".")[0]), key.split(".")[1]):
            raise InputError(f"config key {key!r} is missing: give {meaning}")
    try:
        result = cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise InputError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    check_config(result)
    return result


def save_config(config: RunConfig, path: Path) -> None:
    replace_file(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def build_loss(options: dict[str, Any]) -> PreferenceLoss:
    """The loss that `loss:` names, built with its options; an unknown name or option names the nearest valid one."""
    options = dict(options)
    name = options.pop("name", None)
    if name is None:
        raise InputError(f"config key 'loss.name' is missing: give one of {', '.join(LOSSES)}")
    if not isinstance(name, str) or name not in LOSSES:
        raise InputError(f"loss.name {name!r} is unknown{_suggest(_near(str(name), LOSSES), LOSSES)}")
    accepted = [option.name for option in loss_options(LOSSES[name]) if option.in_config]
    for key in options:
        if key not in accepted:
            raise InputError(f"loss {name!r} has no option {key!r}{_suggest(_near(str(key), accepted), accepted)}")
    try:
        return LOSSES[name](**options)
    except (ValueError, TypeError) as error:
        raise InputError(f"loss {name!r}: {error}") from error


def check_config(config: RunConfig) -> None:
    """Refuse values out of range and options that cannot hold together."""
    with input_errors():
        loss = build_loss(config.loss)
        check_choice("data.kind", config.data.kind, ("auto", *COMPLETIONS))
        if config.data.kind != "auto":
            check_data_kind(loss, config.data.kind, "data.kind says")
        check_choice("data.truncation", config.data.truncation, TRUNCATIONS)
        check_choice("reference.mode", config.reference.mode, ("precomputed", "live", "base"))
        check_choice("optimizer.schedule", config.optimizer.schedule, ("cosine", "linear", "constant"))
        check_choice("precision", config.precision, ("fp32", "bf16"))
        if config.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {config.zero_stage}")
        if not 0 <= config.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31), got {config.seed}")
        check_number("data.max_length", config.data.max_length, at_least=2)
        check_number("data.eval_fraction", config.data.eval_fraction, at_least=0, below=1)
        check_number("optimizer.learning_rate", config.optimizer.learning_rate, above=0)
        check_number("optimizer.weight_decay", config.optimizer.weight_decay, at_least=0)
        check_number("optimizer.epsilon", config.optimizer.epsilon, above=0)
        check_number("optimizer.warmup_ratio", config.optimizer.warmup_ratio, at_least=0, below=1)
        check_number("optimizer.gradient_clipping", config.optimizer.gradient_clipping, at_least=0)
        if len(config.optimizer.betas) != 2:
            raise ValueError(f"optimizer.betas must be two numbers, got {list(config.optimizer.betas)}")
        for beta in config.optimizer.betas:
            check_number("optimizer.betas", beta, at_least=0, below=1)
        check_number("epochs", config.epochs, above=0)
        for name, value, least in (
            ("batch.microbatch", config.batch.microbatch, 1),
            ("batch.effective_batch", config.batch.effective_batch, 1),
            ("log_every", config.log_every, 1),
            ("keep_checkpoints", config.keep_checkpoints, 1),
            ("max_skipped", config.max_skipped, 1),
            ("penalty.check_every", config.penalty.check_every, 1),
            ("max_steps", config.max_steps, 1),
            ("eval_every", config.eval_every, 1),
            ("save_every", config.save_every, 0),
        ):
            if value is not None:
                check_number(name, value, at_least=least)
        if config.lora is not None:
            check_number("lora.r", config.lora.r, at_least=1)
            check_number("lora.alpha", config.lora.alpha, above=0)
            check_number("lora.dropout", config.lora.dropout, at_least=0, below=1)
        if config.loss["name"] == "aot_unpaired" and config.batch.effective_batch == 1:
            raise ValueError(
                "loss 'aot_unpaired' matches desirable with undesirable samples of a step, and "
                "batch.effective_batch is 1: there is nothing to match; use 8 or more"
            )
        _check_reference(config)
        if config.penalty.check_every is not None and (not loss.needs_embeddings or loss.differentiates_twice):
            raise ValueError(
                "penalty.check_every compares loss 'wdpo' with penalty 'central' or 'one_sided' with the exact one; "
                "set it to null with any other loss"
            )
        if _differentiates_twice(config):
            _check_double_backward(config)
        if isinstance(loss, WDPOLoss) and not loss.differentiates_twice and config.precision == "bf16":
            loss.relative_step(torch.bfloat16)  # refuses what has none


def _check_reference(config: RunConfig) -> None:
    reference = config.reference
    if reference.mode == "base" and config.lora is None:
        raise ValueError(
            "reference.mode 'base' is the model under a LoRA adapter, but lora is null; "
            "set lora, or use reference.mode 'precomputed' or 'live'"
        )
    if reference.mode == "base" and reference.name_or_path is not None:
        raise ValueError(
            "reference.mode 'base' is the policy's own base model, so reference.name_or_path must be null, "
            f"got {reference.name_or_path!r}"
        )


def _check_double_backward(config: RunConfig) -> None:
    exact = build_loss(config.loss).differentiates_twice
    subject = "loss 'wdpo' with penalty 'exact'" if exact else "penalty.check_every"
    instead = "loss.penalty 'central'" if exact else "penalty.check_every=null"
    attention = attention_of(config)
    if config.zero_stage == 3:
        raise ValueError(
            f"{subject} differentiates the gradient, which ZeRO-3 cannot (it releases the parameters between the two "
            f"passes); use zero_stage 0, 1 or 2, or {instead}"
        )
    if attention != "eager":
        raise ValueError(
            f"{subject} differentiates the gradient, which model.attn_implementation {attention!r} does not support; "
            f"use 'eager', or {instead}"
        )


def _differentiates_twice(config: RunConfig) -> bool:
    return build_loss(config.loss).differentiates_twice or config.penalty.check_every is not None


def attention_of(config: RunConfig) -> str:
    """The attention that the model is loaded with: a loss that differentiates twice needs "eager"."""
    fitting = "eager" if _differentiates_twice(config) else "sdpa"
    return config.model.attn_implementation or fitting


def config_name(loss: PreferenceLoss) -> str:
    return next(name for name, module in LOSSES.items() if type(loss) is module)


def check_data_kind(loss: PreferenceLoss, kind: str, told_by: str) -> None:
    """Refuse pairs for an unpaired loss and the reverse, before any model is loaded.

    `told_by` is a subject and a verb for the message: "data.train 'pairs.jsonl' holds".
    """
    wanted = "preference" if loss.paired else "unpaired"
    if kind == wanted:
        return
    others = ", ".join(name for name, module in LOSSES.items() if module.paired != loss.paired)
    columns = {"preference": "chosen and rejected", "unpaired": "completion and label"}
    raise InputError(
        f"loss {config_name(loss)!r} needs {wanted} data ({columns[wanted]}), but {told_by} {kind} data; "
        f"losses for it: {others}"
    )


def flatten(config: Any) -> dict[str, Any]:
    """Every leaf of a nested dictionary under its dotted key."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    return dict(walk(config, ""))


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise InputError(f"config file {str(path)!r} is a folder")
    if not path.is_file():
        raise InputError(f"config file {str(path)!r} does not exist")
    try:
        # OmegaConf's loader is PyYAML's safe one, with 1e-6 read as a number.
        content = _resolve(OmegaConf.load(path))
    except (YAMLError, OSError, ValueError, OmegaConfBaseException) as error:
        raise InputError(f"config file {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"config file {str(path)!r} must hold keys and values, got a {type(content).__name__}")
    _check_keys(content, RunConfig, prefix="")
    return content


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """["loss.tau=0.1"] as {"loss": {"tau": 0.1}}."""
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r} must read key=value, such as loss.tau=0.1")
    try:
        content = _resolve(OmegaConf.from_dotlist(list(overrides)))
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        raise InputError(f"overrides {' '.join(overrides)!r} cannot be read: {' '.join(str(error).split())}") from error
    _check_keys(content, RunConfig, prefix="")
    return content


def _resolve(config: Any) -> Any:
    """Its content, with ${another.key} filled in. Whoever wrote a config must not read the environment of the machine
    it runs on, as ${oc.env:HOME} would, so no other form is taken, nor one that comes out of filling in."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            for inner in [*value, *value.values()] if isinstance(value, dict) else value:
                yield from texts(inner)

    content = OmegaConf.to_container(config)
    given = [re.sub(r"\$\{[\w.]+\}", "", text) for text in texts(content)]
    if not any("${" in text for text in given):
        content = OmegaConf.to_container(config, resolve=True)
        given = list(texts(content))
    for text in given:
        if "${" in text:
            raise ValueError(f"{shorten(text)} is refused: only ${{another.key}} is filled in")
    return content


def config_keys() -> list[str]:
    """Every key of a config, dotted: "seed", "model.name_or_path", "loss", ..."""
    keys = []
    for name in (key.name for key in dataclasses.fields(RunConfig)):
        section = SECTIONS.get(name)
        keys += [f"{name}.{key.name}" for key in dataclasses.fields(section)] if section else [name]
    return keys


def _check_keys(layer: dict[str, Any], schema: type, prefix: str) -> None:
    known = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = _near_keys(str(key), known, prefix)
            raise InputError(f"unknown config key {name!r}{_suggest(near, [prefix + key for key in known])}")
        if not prefix and key in SECTIONS and isinstance(value, dict):
            _check_keys(value, SECTIONS[key], f"{key}.")
        elif not prefix and (key in SECTIONS or key == "loss") and not isinstance(value, dict):
            if key == "lora" and value is None:
                continue
            raise InputError(f"config key {name!r} must be a section of keys and values, got {value!r}")


def _near_keys(word: str, known: Iterable[str], prefix: str) -> list[str]:
    """The keys that whoever wrote `word` in the section `prefix` may have meant, there or elsewhere."""
    if word in ALIASES:
        return [*ALIASES[word]]
    if here := _near(word, known):
        return [prefix + key for key in here]
    elsewhere: dict[str, list[str]] = {}
    for key in [*config_keys(), *(f"loss.{name}" for name in sorted({"name", *option_names()}))]:
        elsewhere.setdefault(key.rpartition(".")[2], []).append(key)
    return [key for name in _near(word, elsewhere) for key in elsewhere[name]]


def _near(word: str, known: Iterable[str]) -> list[str]:
    """What is `word`, or nearest to it, or begins with it."""
    known = list(known)
    if word in known:
        return [word]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return close or [name for name in known if len(word) > 2 and name.startswith(word)]


def _suggest(near: Sequence[str], valid: Iterable[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; valid: {', '.join(valid)}"
