"""The README.md beside a trained model: what it is, from what, by which loss, and how well it does on held-out data.

Names in a config may come from a stranger, and cards are published. In the metadata stand only names that have the form
of the Hugging Face Hub's; in the text names are code, which nothing in them ends; of a local path no more than its last
part is told. Nothing in a card changes from one run of a config to the next: no date, no duration, no folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from robustloss._version import __version__
from robustloss.losses import LOSSES
from robustloss.losses.catalogue import formula_with_values, sources, summary, with_defaults
from robustloss.train.config import RunConfig

# What says where and how often a run wrote, and not how the model was trained.
NOT_TOLD = ("output_dir", "resume", "log_every", "save_every", "keep_checkpoints")
VERSIONS = ("robustloss", "torch", "transformers", "deepspeed", "python", "device", "world_size")
RESULTS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy of the rewards",
    "rewards/margins": "margin of the rewards (nats)",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def model_card(config: RunConfig, environment: Mapping[str, Any], step: int, held_out: Mapping[str, float]) -> str:
    """The card of the model after optimizer step `step`, as the text of a README.md in UTF-8.

    Args:
        environment: versions and machine, as in environment.json.
        held_out: metrics of the evaluation at this step; empty without held-out data.
    """
    found = {name: float(held_out[name]) for name in RESULTS if math.isfinite(held_out.get(name, math.nan))}
    loss = LOSSES[config.loss["name"]]
    base, data = _shown(config.model.name_or_path), _shown(config.data.train)
    cited = ", ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in sources(config.loss))
    paragraphs = [
        f"---\n{yaml.safe_dump(_metadata(config, found), sort_keys=False)}---",
        f"# {code(base)} trained with {config.loss['name']}",
        f"This is {code(base)}, fine-tuned on the preferences in {code(data)} for {step} optimizer steps with the loss "
        f"{config.loss['name']} ({loss.__name__}) of robustloss.",
        "## Loss",
        summary(loss),
        fenced(_printable("\n".join(formula_with_values(config.loss))), "text"),
        f"Source: {cited}.",
        "## Results on held-out data",
        _results(found),
        "## Use",
        fenced(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "."  # this folder, or the name of its repository\n'
            "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
            "python",
        ),
        "## Training",
        "All settings, with the defaults of those that were not set. Of local files only the name is given.",
        fenced(_printable(yaml.safe_dump(_told(config), sort_keys=False, allow_unicode=True)), "yaml"),
        "## Versions",
        _table("", "", {name: code(environment[name]) for name in VERSIONS if name in environment}),
        "## Citation",
        f"Cite the loss's source ({cited}), and robustloss {__version__}, with which the model was trained.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def code(text: object) -> str:
    """Anything as a span of code in one line: text, without the power of markup or HTML, that turns no direction."""
    line = " ".join(_printable(str(text)).split()).replace("|", "\\|")  # a bar ends a table's cell even in code
    fence = "`" * (_longest_fence(line) + 1)
    edge = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{edge}{line}{edge}{fence}"


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in it can end: its fence is longer than any in the text."""
    fence = "`" * max(3, _longest_fence(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_fence(text: str) -> int:
    return max((len(found) for found in re.findall("`+", text)), default=0)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _metadata(config: RunConfig, found: Mapping[str, float]) -> dict[str, Any]:
    """What the Hub reads at the head of a card; of given names, only such as have the form of the Hub's."""
    name = config.loss["name"]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_hub_name(config.model.name_or_path):
        metadata["base_model"] = config.model.name_or_path
    if is_hub_name(config.data.train):
        metadata["datasets"] = [config.data.train]
    metadata["tags"] = ["robustloss", "preference-optimization", name]
    if found:
        held_out = config.data.eval or config.data.train
        dataset = {"type": held_out if is_hub_name(held_out) else "local", "name": _plain_name(held_out)}
        metrics = [{"type": metric, "name": RESULTS[metric], "value": value} for metric, value in found.items()]
        task = {"type": "text-generation"}
        results = [{"task": task, "dataset": dataset, "metrics": metrics}]
        metadata["model-index"] = [{"name": f"{_plain_name(config.model.name_or_path)}-{name}", "results": results}]
    return metadata


def is_hub_name(name: str | None) -> bool:
    """Whether it is a name on the Hugging Face Hub by its form, and nothing here is called so."""
    if name is None or _HUB_NAME.fullmatch(name) is None or Path(name).exists():
        return False
    return Path(name).suffix not in (".jsonl", ".json", ".parquet", ".csv")


def _shown(name: str) -> str:
    return name if is_hub_name(name) else Path(name).name or name


def _plain_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", _shown(name), flags=re.ASCII).strip("-") or "unnamed"


def _results(found: Mapping[str, float]) -> str:
    if not found:
        return "Nothing was evaluated on held-out data."
    return _table("metric", "value", {RESULTS[metric]: f"{value:.4g}" for metric, value in found.items()})


def _told(config: RunConfig) -> dict[str, Any]:
    """The config, with the loss's defaults, and with local paths cut down to their last part."""
    told = {key: value for key, value in asdict(config).items() if key not in NOT_TOLD}
    told["loss"] = with_defaults(config.loss)
    told["reference"].pop("cache_dir")
    for section, keys in (("model", ("name_or_path",)), ("data", ("train", "eval")), ("reference", ("name_or_path",))):
        for key in keys:
            if told[section][key] is not None:
                told[section][key] = _shown(told[section][key])
    return told
