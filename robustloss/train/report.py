"""The report at the end of a run: one self-contained HTML page, and its pictures as PNG files.

It needs nothing but the run folder, so it can be written again on any machine, without the model or a GPU.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from robustloss._files import replace_file
from robustloss.losses.catalogue import formula_with_values
from robustloss.train.figures import FIGURES, SPLIT_LABELS, render
from robustloss.train.run_folder import Run, read_run


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 59.5:
        text = f"{seconds:.3g} s"
    elif minutes < 60:
        text = f"{minutes} min {rest:02d} s"
    else:
        text = f"{minutes // 60} h {minutes % 60:02d} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _bytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def plain(value: float) -> str:
    return "0" if abs(value) < 1e-6 else f"{value:.4g}"  # a margin of 1e-8 is rounding


def _first_and_last(run: Run) -> list[dict[str, Any]]:
    """One row per quantity: its first and last finite value, in each split."""
    quantities = [("Loss", "loss", plain), ("Reward margin", "rewards/margins", plain),
                  ("Accuracy", "rewards/accuracies", percent)]  # fmt: skip
    rows = []
    for name, metric, show in quantities:
        if run.has(metric):
            found = {split: run.finite(metric, split) for split in SPLIT_LABELS}
            rows.append({"name": name, **{split: (show(v[0]), show(v[-1])) for split, v in found.items() if v.size}})
    return rows


class Total(NamedTuple):
    """What a run has one number of."""

    name: str
    head: str  # of a narrow column
    show: Callable[[np.ndarray], str]


TOTALS = {  # by metric
    "step": Total("Optimiser steps", "steps", lambda values: f"{int(values.max()):,}"),
    "seconds": Total("Wall time", "time", lambda values: _duration(values.max())),
    "tokens_per_second": Total("Tokens per second (median)", "tokens / s", lambda values: f"{np.median(values):,.0f}"),
    "peak_memory_bytes": Total("Peak memory", "peak memory", lambda values: _bytes(values.max())),
}


def totals(run: Run) -> dict[str, str]:
    """By metric, the values of those `TOTALS` that a run has."""
    found = {metric: np.concatenate([run.finite(metric, split) for split in SPLIT_LABELS]) for metric in TOTALS}
    return {metric: TOTALS[metric].show(values) for metric, values in found.items() if values.size}


def _sentences(run: Run) -> list[str]:
    """The run in words."""
    numbers = totals(run)
    model = (run.config.get("model") or {}).get("name_or_path") or "The model"
    time = f" in {numbers['seconds']}" if "seconds" in numbers else ""
    loss, steps = run.config["loss"]["name"], numbers["step"]
    sentences = [f"{model} was trained with {loss} for {steps} optimiser step{'' if steps == '1' else 's'}{time}."]
    for split, where in {"train": "In training", "eval": "On held-out data"}.items():
        changes = []
        for row in _first_and_last(run):
            if split in row:
                first, last = row[split]
                change = f"went from {first} to {last}" if first != last else f"was {first}"
                changes.append(f"the {row['name'].lower()} {change}")
        if changes:
            sentences.append(f"{where}, {', '.join(changes[:-1])}{' and ' if changes[1:] else ''}{changes[-1]}.")
    return sentences


def _warnings(run: Run) -> list[str]:
    """What a reader must not overlook."""
    warnings = []
    if not run.rows["eval"]:
        warnings.append("Nothing was evaluated on held-out data, so nothing here says how the model does on new data.")
    for name in sorted({name for rows in run.rows.values() for row in rows for name in row}):
        # The mean over one kind of completion is NaN by design in an unpaired batch that holds none of it.
        if run.sides[0] == "desirable" and name.startswith(("rewards/", "logps/")):
            continue
        bad = [row["step"] for rows in run.rows.values() for row in rows if not np.isfinite(row.get(name, 0.0))]
        if bad:
            warnings.append(f"{name} is NaN or infinite in {len(bad)} logged steps, first at step {int(min(bad))}.")
    return warnings


def render_page(template: str, path: Path, **content: Any) -> Path:
    """Write a page of `template`, where all that comes from data is text; returns its path.

    It is written to a temporary file and renamed, so that an older page stays whole until the new one is.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**content)
    replace_file(path, page.encode(errors="backslashreplace"))  # JSON may hold half a character
    return path


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write `run_dir`/figures/*.png and a page that holds them all, and return the page's path.

    Args:
        output: the page; None: `run_dir`/report.html.

    Raises:
        ValueError: a file is missing or malformed; the message names it, and the line where there is one.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    (run_dir / "figures").mkdir(exist_ok=True)
    figures = []
    for entry in FIGURES:
        path = run_dir / "figures" / f"{entry.name}.png"
        if entry.applies(run):
            png = render(entry, run)
            replace_file(path, png)
            figures.append({"title": entry.title, "caption": entry.caption, "png": base64.b64encode(png).decode()})
        else:
            path.unlink(missing_ok=True)  # of another run in the same folder
    return render_page(
        "report.html.j2",
        output or run_dir / "report.html",
        name=run_dir.resolve().name,
        loss=run.config["loss"]["name"],
        formula_lines=formula_with_values(run.config["loss"]),
        sentences=_sentences(run),
        warnings=_warnings(run),
        first_and_last=_first_and_last(run),
        splits=SPLIT_LABELS,
        totals=[(TOTALS[metric].name, value) for metric, value in totals(run).items()],
        figures=figures,
        config=run.config_text,
        versions={name: v if isinstance(v, str) else json.dumps(v) for name, v in run.environment.items()},
    )
