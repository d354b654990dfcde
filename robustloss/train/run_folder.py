"""What a training run leaves in its folder, read back and checked: config, environment, metrics, evaluations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SPLITS = ("train", "eval")
# Everything that a run writes into its folder.
WRITTEN = (
    ".lock",
    "best",
    "best.old",
    "best.tmp",
    "checkpoints",
    "config.yaml",
    "demo",
    "demo.tmp",
    "environment.json",
    "evaluations",
    "figures",
    "metrics.jsonl",
    "model",
    "model.old",
    "model.tmp",
    "reference_cache",
    "report.html",
    "starts.jsonl",
    "tensorboard",
)


@dataclass(frozen=True)
class Run:
    """What the training loop wrote, read and checked."""

    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    rows: dict[str, list[dict[str, float]]]  # by split, in the order of their steps
    evaluations: list[tuple[int, dict[str, np.ndarray]]]  # (step, arrays over the held-out split), in order
    is_finished: bool  # whether the trained model stands there

    def series(self, metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, float64 [n] both; values may be NaN or infinite."""
        pairs = [(row["step"], row[metric]) for row in self.rows[split] if metric in row]
        steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
        return steps, values

    def finite(self, metric: str, split: str) -> np.ndarray:
        values = self.series(metric, split)[1]
        return values[np.isfinite(values)]

    def has(self, *metrics: str, splits: Sequence[str] = SPLITS) -> bool:
        """Whether there is anything to draw of one of the metrics."""
        return any(self.finite(metric, split).size for metric in metrics for split in splits)

    def held_out(self, name: str) -> list[tuple[int, np.ndarray]]:
        """(step, finite values) of one array, for every evaluation that has some."""
        found = [(step, arrays[name][np.isfinite(arrays[name])]) for step, arrays in self.evaluations if name in arrays]
        return [(step, values) for step, values in found if values.size]

    @property
    def sides(self) -> tuple[str, str]:
        """What the two kinds of completion are called; the metrics of either kind are rewards/chosen and so on."""
        return ("desirable", "undesirable") if self.held_out("desirable_rewards") else ("chosen", "rejected")


def links_in(run_dir: Path) -> list[str]:
    """What in the folder is a link where a run writes or deletes: following one would reach files of somebody else."""
    return [name for name in WRITTEN if (run_dir / name).is_symlink()]


def _read_text(path: Path) -> str:
    if path.is_symlink():
        raise ValueError(f"{path}: is a link; a run's folder holds its files itself")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the report needs a run folder, as `robustloss train` writes") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parse_object(text: str, path: Path, first_line: int = 1) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{first_line + error.lineno - 1}: not valid JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{first_line}: must be a JSON object, got {type(value).__name__}")
    return value


def _number(value: Any, where: str) -> float:
    if value is None:  # strict JSON has no NaN
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} must be a number or null, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where} must be a number that a float can hold, got {str(value)[:20]}...") from None


def _read_metrics(path: Path) -> dict[str, list[dict[str, float]]]:
    rows: dict[str, dict[int, dict[str, float]]] = {split: {} for split in SPLITS}
    for line, text in enumerate(_read_text(path).splitlines(), start=1):
        row = _parse_object(text, path, line)
        split, step = row.pop("split", None), row.get("step")
        if split not in rows:
            raise ValueError(f"{path}:{line}: 'split' must be 'train' or 'eval', got {split!r}")
        if not isinstance(step, int):
            raise ValueError(f"{path}:{line}: 'step' must be an integer, got {step!r}")
        # A resumed run may log a step again: the later line is the one whose parameters were kept.
        rows[split][step] = {name: _number(value, f"{path}:{line}: {name!r}") for name, value in row.items()}
    if not any(rows.values()):
        raise ValueError(f"{path}: holds no metrics, so there is nothing to report")
    return {split: [by_step[step] for step in sorted(by_step)] for split, by_step in rows.items()}


def _read_evaluation(path: Path) -> tuple[int, dict[str, np.ndarray]]:
    match = re.fullmatch(r"step_(\d+)\.json", path.name)
    if match is None:
        raise ValueError(f"{path}: the name must be step_ and a number, as in step_00000010.json")
    arrays = {}
    for name, values in _parse_object(_read_text(path), path).items():
        if not isinstance(values, list):
            raise ValueError(f"{path}: {name!r} must be a list of numbers, got {type(values).__name__}")
        arrays[name] = np.array([_number(value, f"{path}: {name!r}[{i}]") for i, value in enumerate(values)])
    return int(match[1]), arrays


def read_run(run_dir: Path) -> Run:
    """Read a run folder, which a run may be at work in; it holds its files itself, and no links.

    Raises:
        ValueError: a file is missing, malformed or a link; the message names it, and the line where there is one.
    """
    linked = links_in(run_dir)
    if linked:
        raise ValueError(f"{run_dir / linked[0]}: is a link; a report is written and read in the run's own folder only")
    path = run_dir / "config.yaml"
    text = _read_text(path)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else 1
        raise ValueError(f"{path}:{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    loss = config.get("loss") if isinstance(config, dict) else None
    if not isinstance(loss, dict) or not isinstance(loss.get("name"), str):
        raise ValueError(f"{path}: must hold the loss's name as loss.name, got loss = {loss!r}")
    for section in ("model", "data"):
        if not isinstance(config.get(section) or {}, dict):
            raise ValueError(f"{path}: {section} must be a section of keys and values, got {config[section]!r}")
    environment = _parse_object(_read_text(run_dir / "environment.json"), run_dir / "environment.json")
    evaluations = sorted(map(_read_evaluation, (run_dir / "evaluations").glob("*.json")), key=lambda pair: pair[0])
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    return Run(config, text, environment, metrics, evaluations, is_finished=(run_dir / "model").is_dir())
