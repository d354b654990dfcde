"""The report at the end of a run: one self-contained HTML page, and its pictures as PNG files.

It needs nothing but the run folder, so it can be written again on any machine, without the model or a GPU.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from robustloss._files import replace_file
from robustloss.train.figures import FIGURES, SPLIT_LABELS, render
from robustloss.train.run_folder import Run, links_in, read_run

PAIRED = "h_i = (policy_chosen - policy_rejected)_i - (ref_chosen - ref_rejected)_i"
FORMULAS = {
    "dpo": f"mean of l(h_i); {PAIRED}",
    "kldpo": f"sum of P_i l(h_i); {PAIRED}",
    "wdpo": f"mean of l(h_i) + rho x penalty of the gradients g_i of l(h_i) in the input embeddings; {PAIRED}",
    "aot_paired": "mean of l(h_i); h_i = i-th smallest policy margin - i-th smallest reference margin",
    "aot_unpaired": "mean of l(h_s) over quantile levels s; h_s = s-quantile of the desirable log-ratios - the others'",
    "kto": "mean of w_i (1 - sigmoid(s_i beta (r_i - z))); r_i = log-ratio, s_i = 1 if desirable, else -1; "
    "z = max(0, mean log-ratio of mismatched pairs)",
    "dr_dpo": f"-beta_prime log(mean of exp(-l(h_i) / beta_prime)); {PAIRED}",
    "tv_dpo": f"largest sum of P_i l(h_i) with sum of |P_i - 1/B| / 2 <= rho; {PAIRED}",
    "chi_po": "mean of l(h_i), beta h_i clipped at +-2 max_reward; h_i = phi(z_chosen) - phi(z_rejected), "
    "phi(z) = z + log z, z = policy / reference probability",
    "beta_dpo": f"mean of l(h_i) over the pairs kept, beta x (1 + alpha (their mean h - M)) in place of beta; {PAIRED}",
    "group_dro": f"sum of P_g (mean of l(h_i) in group g), P_g from P_g exp(step_size x that mean); {PAIRED}",
}
LINKS = {
    "logistic": "-log sigmoid(beta h)",
    "smoothed logistic": "-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing",
    "robust": "(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), e = label_smoothing",
    "hinge": "max(0, 1 - beta h)",
    "squared_hinge": "max(0, beta - h)^2",
    "least_squares": "(beta - h)^2",
    "ipo": "(h - 1 / (2 beta))^2",
}


def _formula(loss: dict[str, Any]) -> str:
    """The loss in plain text with the options it was given; a loss that is not known here gives its options alone."""
    name, link = loss["name"], loss.get("link", "logistic")
    parts = [FORMULAS[name]] if name in FORMULAS else []
    if link == "logistic" and loss.get("label_smoothing"):
        link = "smoothed logistic"
    if parts and name != "kto" and link in LINKS:
        parts.append(f"l(h) = {LINKS[link]}")
    if name == "kldpo" and not loss.get("normalize", True):
        parts.append("P_i = exp((l(h_i) - mean of l) / tau), neither normalised nor above max_weight")
    elif name == "kldpo":
        solved = ", tau such that KL(P || uniform) = rho" if loss.get("rho") is not None else ""
        parts.append(f"P_i proportional to exp(l(h_i) / tau){solved}")
    if name == "wdpo":
        parts.append("penalty = " + ("mean of |g_i|^2" if loss.get("squared", True) else "root of the mean of |g_i|^2"))
    return "; ".join(parts + [f"{key} = {value}" for key, value in loss.items() if key != "name" and value is not None])


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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _plain(value: float) -> str:
    return "0" if abs(value) < 1e-6 else f"{value:.4g}"  # a margin of 1e-8 is rounding


def _first_and_last(run: Run) -> list[dict[str, Any]]:
    """One row per quantity: its first and last finite value, in each split."""
    quantities = [("Loss", "loss", _plain), ("Reward margin", "rewards/margins", _plain),
                  ("Accuracy", "rewards/accuracies", _percent)]  # fmt: skip
    rows = []
    for name, metric, show in quantities:
        if run.has(metric):
            found = {split: run.finite(metric, split) for split in SPLIT_LABELS}
            rows.append({"name": name, **{split: (show(v[0]), show(v[-1])) for split, v in found.items() if v.size}})
    return rows


def _totals(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what a run has one number of."""
    every = {metric: np.concatenate([run.finite(metric, split) for split in SPLIT_LABELS])
             for metric in ("step", "seconds", "tokens_per_second", "peak_memory_bytes")}  # fmt: skip
    shown = [
        ("Optimiser steps", "step", lambda values: f"{int(values.max()):,}"),
        ("Wall time", "seconds", lambda values: _duration(values.max())),
        ("Tokens per second (median)", "tokens_per_second", lambda values: f"{np.median(values):,.0f}"),
        ("Peak memory", "peak_memory_bytes", lambda values: _bytes(values.max())),
    ]
    return [(name, show(every[metric])) for name, metric, show in shown if every[metric].size]


def _sentences(run: Run) -> list[str]:
    """The run in words."""
    totals = dict(_totals(run))
    model = (run.config.get("model") or {}).get("name_or_path") or "The model"
    time = f" in {totals['Wall time']}" if "Wall time" in totals else ""
    loss, steps = run.config["loss"]["name"], totals["Optimiser steps"]
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


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/figures/*.png and the page `run_dir`/report.html that holds them all; return the page's path.

    The page is written to a temporary file and renamed, so that an older report stays whole until the new one is.

    Raises:
        ValueError: a file is missing or malformed; the message names it, and the line where there is one.
    """
    run_dir = Path(run_dir)
    linked = links_in(run_dir)
    if linked:
        raise ValueError(f"{run_dir / linked[0]}: is a link; a report is written and read in the run's own folder only")
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        loss=run.config["loss"]["name"],
        formula=_formula(run.config["loss"]),
        sentences=_sentences(run),
        warnings=_warnings(run),
        first_and_last=_first_and_last(run),
        splits=SPLIT_LABELS,
        totals=_totals(run),
        figures=figures,
        config=run.config_text,
        versions={name: v if isinstance(v, str) else json.dumps(v) for name, v in run.environment.items()},
    )
    replace_file(run_dir / "report.html", page.encode(errors="backslashreplace"))  # JSON may hold half a character
    return run_dir / "report.html"
