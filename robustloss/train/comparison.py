"""Several runs side by side: one self-contained HTML page, from nothing but the runs' folders."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustloss.losses.catalogue import formula_with_values, with_defaults
from robustloss.train.config import flatten
from robustloss.train.figures import COMPARISONS, SPLIT_LABELS, Compared, colors, render
from robustloss.train.report import TOTALS, percent, plain, render_page, totals
from robustloss.train.run_folder import Run, read_run

OWN_FOLDER = "output_dir/"
ABSENT = "\N{EN DASH}"
QUANTITIES = (("loss", "loss", plain), ("reward margin", "rewards/margins", plain),
              ("accuracy", "rewards/accuracies", percent))  # fmt: skip


class Cell(NamedTuple):
    text: str = ABSENT
    is_best: bool = False


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page `path` on two or more runs, finished or not, of whatever losses and lengths; returns `path`.

    Raises:
        ValueError: a folder is given twice, or a file in one is missing or malformed; the message names it.
    """
    names = distinct_names(run_dirs)
    runs = [
        Compared(name, color, read_run(Path(run_dir)))
        for name, color, run_dir in zip(names, colors(len(names)), run_dirs, strict=True)
    ]
    pictures = [(entry, render(entry, runs)) for entry in COMPARISONS if entry.applies(runs)]
    settings = _rows([_settings(compared.run) for compared in runs])
    environments = _rows([flatten(compared.run.environment) for compared in runs])
    return render_page(
        "comparison.html.j2",
        path,
        runs=[
            {
                "name": compared.name,
                "color": compared.color,
                "loss": compared.run.config["loss"]["name"],
                "formula_lines": formula_with_values(compared.run.config["loss"]),
                "cells": cells,
            }
            for compared, cells in zip(runs, _cells(runs), strict=True)
        ],
        splits=SPLIT_LABELS,
        quantities=[name for name, _, _ in QUANTITIES],
        totals=[total.head for total in TOTALS.values()],
        words=_words(runs),
        notes=_notes(runs),
        figures=[
            {"title": entry.title, "caption": entry.caption, "png": base64.b64encode(png).decode()}
            for entry, png in pictures
        ],
        differing={
            "Settings": {key: row for key, row in settings.items() if len(set(row)) > 1},
            "Versions and machine": {key: row for key, row in environments.items() if len(set(row)) > 1},
        },
        shared={key: row[0] for key, row in settings.items() if len(set(row)) == 1},
    )


def distinct_names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart."""
    parts = [Path(run_dir).resolve().parts for run_dir in run_dirs]
    for path, own in zip(run_dirs, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"{path}: is given twice; a comparison is of different runs")
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(Path(run_dir).resolve()) for run_dir in run_dirs]


def _cells(runs: Sequence[Compared]) -> list[list[Cell]]:
    """One row a run: the last held-out values, the training values over the last tenth, and the totals."""
    same_loss = (
        len({json.dumps(with_defaults(run.config["loss"]), sort_keys=True, default=str) for _, _, run in runs}) == 1
    )
    columns = []
    for split in ("eval", "train"):
        for _, metric, show in QUANTITIES:
            values = [_final(run, metric, split) for _, _, run in runs]
            best: Callable[..., float] = min if metric == "loss" else max
            # Losses with other options, and margins with another beta, are measured in units of their own.
            comparable = split == "eval" and (same_loss or metric == "rewards/accuracies")
            known = [value for value in values if value is not None]
            top = best(known) if comparable and len(set(known)) > 1 else None
            columns.append([Cell() if value is None else Cell(show(value), value == top) for value in values])
    for metric in TOTALS:
        columns.append([Cell(totals(run).get(metric, ABSENT)) for _, _, run in runs])
    return [list(row) for row in zip(*columns, strict=True)]


def _final(run: Run, metric: str, split: str) -> float | None:
    values = run.finite(metric, split)
    if not values.size:
        return None
    # One training batch is noise; each evaluation is of the whole held-out split.
    return float(values[-1] if split == "eval" else values[-max(1, values.size // 10) :].mean())


def _words(runs: Sequence[Compared]) -> str:
    ends = {compared.name: _final(compared.run, "rewards/accuracies", "eval") for compared in runs}
    known = {name: value for name, value in ends.items() if value is not None}
    if len(known) < 2 or _held_out_differs(runs):
        return ""
    highest, lowest = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
    if known[highest] == known[lowest]:
        return f"On held-out data all end with an accuracy of {percent(known[highest])}."
    return (
        f"On held-out data {highest} ends with the highest accuracy, {percent(known[highest])}, "
        f"and {lowest} with the lowest, {percent(known[lowest])}."
    )


def _notes(runs: Sequence[Compared]) -> list[str]:
    """What a reader must not overlook."""
    notes = [
        f"{name} is not finished: it stands at step {int(run.finite('step', 'train').max(initial=0))}."
        for name, _, run in runs
        if not run.is_finished
    ]
    losses = [with_defaults(run.config["loss"]) for _, _, run in runs]
    if len({loss["name"] for loss in losses}) > 1:
        notes.append("The runs optimise different losses: their values do not compare, accuracies do.")
    if len({json.dumps(loss.get("beta"), default=str) for loss in losses}) > 1:
        notes.append("The runs differ in loss.beta, so their rewards and margins are in different units.")
    if _held_out_differs(runs):
        notes.append("The runs hold out different data, or may do so: their held-out numbers do not compare.")
    notes += [f"{name} evaluated nothing on held-out data." for name, _, run in runs if not run.rows["eval"]]
    for name, _, run in runs:
        values = np.concatenate([run.series("loss", split)[1] for split in SPLIT_LABELS])
        if not np.isfinite(values).all():
            notes.append(f"The loss of {name} is NaN or infinite in {int((~np.isfinite(values)).sum())} logged steps.")
    return notes


def _held_out_differs(runs: Sequence[Compared]) -> bool:
    """Whether the configs name different held-out rows: a set of their own, or a share of the training data."""

    def source(run: Run) -> str:
        settings = _settings(run)
        held_out = settings.get("data.eval")
        keys = (
            ["data.eval", "data.eval_split"] if held_out else ["data.train", "data.train_split", "data.eval_fraction"]
        )
        if not held_out or str(held_out).startswith(OWN_FOLDER):  # chosen, or for a demonstration made, by chance
            keys.append("seed")
        return _text([settings.get(key) for key in keys])

    return len({source(run) for _, _, run in runs}) > 1


def _settings(run: Run) -> dict[str, Any]:
    """The config by dotted keys, with the loss's defaults and what lies in the run's own folder named as such."""
    settings = flatten({**run.config, "loss": with_defaults(run.config["loss"])})
    folder = f"{settings.pop('output_dir', None)}/"
    return {
        key: OWN_FOLDER + value.removeprefix(folder) if isinstance(value, str) and value.startswith(folder) else value
        for key, value in settings.items()
    }


def _rows(settings: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Every key with its value in each run, as text."""
    keys = sorted({str(key) for own in settings for key in own})
    texts = [{str(key): _text(value) for key, value in own.items()} for own in settings]
    return {key: [own.get(key, ABSENT) for own in texts] for key in keys}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
