"""The pictures of a run's report, `FIGURES`, and of a comparison of runs, `COMPARISONS`.

Each is one entry: file, title, when it applies, drawing, caption.

[A] = arXiv 2406.05882.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from robustloss.train.run_folder import SPLITS, Run

# After Okabe and Ito, whose colours stay apart under every common colour blindness. They, and the grey of the text,
# keep a contrast above 3 on white and on near-black alike, so one transparent picture serves light and dark pages.
BLUE, GREEN, RED, PURPLE, GREY = "#1b80c4", "#009e73", "#d55e00", "#b3619b", "#7c828a"
COLORS = (BLUE, RED, GREEN, PURPLE, "#a57c00", "#7a6fd0", "#c2455d", "#5f8f2c")  # of the runs of a comparison
FEW_POINTS = 30  # up to here, every point is marked
SPLIT_LABELS = {"train": "training", "eval": "held out"}


def quantile_curve(values: np.ndarray, points: int = 201) -> tuple[np.ndarray, np.ndarray]:
    """The empirical quantile function of finite `values` [n], n >= 1, as drawn in [A] Fig. 1.

    Returns levels from 0 (the minimum) to 1 (the maximum) and the quantiles there, both float64 [points].
    """
    levels = np.linspace(0.0, 1.0, points)
    return levels, np.quantile(values, levels)


def _panels(figure: Figure, *labels: str, x: str = "step") -> list[Axes]:
    """Panels above each other that share the horizontal axis `x`; `labels` name the vertical ones."""
    panels = list(figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0])
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label, color=GREY, fontsize=8.5)
        axes.tick_params(colors=GREY, labelsize=8, length=2.5)
        axes.ticklabel_format(useOffset=False, useMathText=True, scilimits=(-2, 5))
        axes.yaxis.offsetText.set(color=GREY, fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(6 if len(labels) == 1 else 4))
        axes.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=GREY, alpha=0.5)
    panels[-1].set_xlabel(x, color=GREY, fontsize=8.5)
    if x == "step":
        panels[-1].xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    return panels


def _lines(
    axes: Axes,
    run: Run,
    metric: str,
    color: str = BLUE,
    name: str = "",
    scale: float = 1.0,
    splits: Sequence[str] = SPLITS,
    blocks: int = 40,
) -> None:
    """A metric over the steps: training as a solid line, held out as rings on a dashed one.

    Over a long training series, of more than 2.5 times as many points, its means over `blocks` blocks are drawn.
    """
    for split in splits:
        steps, values = run.series(metric, split)
        if not np.isfinite(values).any():
            continue
        label = f"{name}, {SPLIT_LABELS[split]}" if name else SPLIT_LABELS[split]
        if split == "eval":
            style = "--o" if len(steps) <= FEW_POINTS else "--"
            axes.plot(steps, values * scale, style, color=color if name else PURPLE, linewidth=1.3, markersize=4.5,
                      markerfacecolor="none", label=label, zorder=3)  # fmt: skip
        elif len(steps) <= 2.5 * blocks:
            style = "-o" if len(steps) <= FEW_POINTS else "-"
            axes.plot(steps, values * scale, style, color=color, linewidth=1.4, markersize=3, label=label)
        else:
            axes.plot(steps, values * scale, color=color, linewidth=0.5, alpha=0.3)
            parts = np.array_split(np.flatnonzero(np.isfinite(values)), blocks)
            means = [(steps[part].mean(), values[part].mean() * scale) for part in parts if part.size]
            axes.plot(*np.transpose(means), color=color, linewidth=1.6, label=f"{label} (mean)")


def _mark(axes: Axes, height: float, label: str | None = None) -> None:
    axes.axhline(height, color=GREY, linewidth=1.1, linestyle=":", label=label, zorder=1)


def _starts_at_ln_2(loss: dict[str, Any]) -> bool:
    logistic = loss["name"] != "kto" and loss.get("link", "logistic") in ("logistic", "robust")
    return logistic and loss.get("normalize", True)  # KLDPO's weights sum to one, unless told otherwise


def draw_loss(figure: Figure, run: Run) -> None:
    (axes,) = _panels(figure, "loss")
    _lines(axes, run, "loss")
    if _starts_at_ln_2(run.config["loss"]):
        _mark(axes, math.log(2.0), "ln 2")


def draw_accuracy(figure: Figure, run: Run) -> None:
    (axes,) = _panels(figure, "ranked correctly")
    _lines(axes, run, "rewards/accuracies")
    _mark(axes, 0.5, "chance")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def draw_rewards(figure: Figure, run: Run) -> None:
    (axes,) = _panels(figure, "reward (nats)")
    _mark(axes, 0.0)
    _lines(axes, run, "rewards/chosen", GREEN, run.sides[0])
    _lines(axes, run, "rewards/rejected", RED, run.sides[1])


def draw_margins(figure: Figure, run: Run) -> None:
    (axes,) = _panels(figure, "margin of the rewards (nats)")
    _mark(axes, 0.0)
    _lines(axes, run, "rewards/margins")


def draw_reward_quantiles(figure: Figure, run: Run) -> None:
    (axes,) = _panels(figure, "reward (nats)", x="quantile level")
    for side, color in zip(run.sides, (GREEN, RED), strict=True):
        before, after = run.held_out(f"{side}_rewards")[0], run.held_out(f"{side}_rewards")[-1]
        axes.plot(*quantile_curve(after[1]), color=color, linewidth=1.8, label=f"{side}, step {after[0]}", zorder=3)
        if before[0] < after[0]:
            axes.plot(*quantile_curve(before[1]), "--", color=color, linewidth=1.1, label=f"{side}, step {before[0]}")


def draw_margin_quantiles(figure: Figure, run: Run) -> None:
    (axes,) = _panels(figure, "chosen - rejected (nats)", x="quantile level")
    (step, margins), (_, ref_margins) = run.held_out("policy_margins")[-1], run.held_out("ref_margins")[-1]
    levels, policy = quantile_curve(margins)
    _, reference = quantile_curve(ref_margins)
    axes.plot(levels, policy, color=BLUE, linewidth=1.8, label=f"policy, step {step}")
    axes.plot(levels, reference, "--", color=GREY, linewidth=1.2, label="reference")
    axes.fill_between(levels, policy, reference, where=list(policy < reference), color=RED, alpha=0.4, linewidth=0,
                      label="violation" if (policy < reference).any() else None)  # fmt: skip


def draw_tilt_weights(figure: Figure, run: Run) -> None:
    step, weights = run.held_out("tilt_weights")[-1]
    (axes,) = _panels(figure, "weight / uniform weight", x="held-out pairs, heaviest first")
    heights, edges = np.sort(weights)[::-1] * weights.size, np.linspace(0.0, 1.0, weights.size + 1)
    axes.stairs(heights, edges, fill=True, color=BLUE, alpha=0.2)
    axes.stairs(heights, edges, color=BLUE, linewidth=1.5, label=f"step {step} (largest weight {weights.max():.3g})")
    _mark(axes, 1.0, "uniform")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def two_panels(*panels: tuple[str, str, float], splits: Sequence[str] = SPLITS) -> Callable[[Figure, Run], None]:
    """Draw metrics, each given as (name, label, scale), above each other and from zero up."""

    def draw(figure: Figure, run: Run) -> None:
        for axes, (metric, _, scale) in zip(_panels(figure, *(label for _, label, _ in panels)), panels, strict=True):
            _lines(axes, run, metric, scale=scale, splits=splits)
            axes.set_ylim(bottom=0.0)

    return draw


class Entry(NamedTuple):
    name: str
    title: str
    applies: Callable[[Any], object]  # of a `Run`, or in `COMPARISONS` of a list of `Compared`
    draw: Callable[[Figure, Any], None]
    caption: str  # what a good run looks like, or how to compare


FIGURES = [
    Entry(
        "loss",
        "Loss",
        lambda run: run.has("loss"),
        draw_loss,
        "A good run falls in training and held out alike; a logistic loss starts at ln 2 (WDPO: plus its penalty) if "
        "the policy starts at the reference.",
    ),
    Entry(
        "accuracy",
        "Accuracy",
        lambda run: run.has("rewards/accuracies"),
        draw_accuracy,
        "A good run climbs above chance and held out stays close to training; while the policy equals the reference "
        "every pair ties, which counts as wrong.",
    ),
    Entry(
        "rewards",
        "Rewards",
        lambda run: run.has("rewards/chosen", "rewards/rejected"),
        draw_rewards,
        "A good run parts the two curves; when both sink far below zero, the policy is forgetting what it could say.",
    ),
    Entry(
        "margins",
        "Reward margin",
        lambda run: run.has("rewards/margins"),
        draw_margins,
        "A good run climbs and levels off; a held-out margin that turns down while training climbs is over-fitting.",
    ),
    Entry(
        "reward_quantiles",
        "Quantiles of the rewards",
        lambda run: all(run.held_out(f"{side}_rewards") for side in run.sides),
        draw_reward_quantiles,
        "A good run lifts the whole curve of the chosen (or desirable) completions above the whole curve of the "
        "others on held-out data, not only its middle.",
    ),
    Entry(
        "margin_quantiles",
        "Quantiles of the margins",
        lambda run: run.held_out("policy_margins") and run.held_out("ref_margins"),
        draw_margin_quantiles,
        "A good run puts the policy above the reference at every level (first-order dominance); where it does "
        "not, the gap is filled and called a violation.",
    ),
    Entry(
        "tilt_weights",
        "Tilt weights",
        lambda run: run.held_out("tilt_weights"),
        draw_tilt_weights,
        "A good run slopes gently towards the hard pairs: one spike means that the tilt is too strong, a flat line "
        "that it does nothing.",
    ),
    Entry(
        "tilt",
        "Tilt over the steps",
        lambda run: run.has("tilt/effective_sample_size", "tilt/max_weight", splits=("train",)),
        two_panels(
            ("tilt/effective_sample_size", "effective\nsample size", 1.0),
            ("tilt/max_weight", "largest\nweight", 1.0),
            splits=("train",),  # the held-out split is one large batch: its numbers share no scale with training's
        ),
        "A good run stays well above an effective sample of 1, where a single pair drives the step, and below the "
        "batch size, where the tilt does nothing.",
    ),
    Entry(
        "dominance",
        "Violation of dominance",
        lambda run: run.has("dominance/violation_area", "dominance/violation_w1"),
        two_panels(("dominance/violation_area", "share of levels", 1.0), ("dominance/violation_w1", "W1 (nats)", 1.0)),
        "A good run returns to zero: the share of quantile levels that are out of order, and how far apart they are "
        "there, averaged over all levels.",
    ),
    Entry(
        "penalty",
        "Gradient penalty",
        lambda run: run.has("penalty/value", "penalty/gradient_norm"),
        two_panels(("penalty/value", "penalty", 1.0), ("penalty/gradient_norm", "gradient\nnorm", 1.0)),
        "A good run keeps both small and steady while the loss falls; growth means a loss that small changes of the "
        "input can raise.",
    ),
    Entry(
        "optimizer",
        "Optimiser",
        lambda run: run.has("learning_rate", "gradient_norm"),
        two_panels(("learning_rate", "learning\nrate", 1.0), ("gradient_norm", "gradient\nnorm", 1.0)),
        "A good run has a gradient norm without bursts; a norm that keeps growing asks for a smaller learning rate.",
    ),
    Entry(
        "throughput",
        "Throughput and memory",
        lambda run: run.has("tokens_per_second", "peak_memory_bytes"),
        two_panels(("tokens_per_second", "tokens / s", 1.0), ("peak_memory_bytes", "peak GiB", 2.0**-30)),
        "A good run is flat in both once it has warmed up.",
    ),
]


class Compared(NamedTuple):
    """One of the runs of a comparison. Its name stays out of the pictures, where a "$" would begin a formula."""

    name: str
    color: str
    run: Run


def colors(count: int) -> list[str]:
    """As many colours; beyond eight they are less far apart."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(colormaps["turbo"](level)) for level in np.linspace(0.08, 0.92, count)]


def _explain_lines(figure: Figure, *styles: tuple[str, str]) -> None:
    """A legend of (line style, label) in place of the runs' own labels."""
    for axes in figure.axes:
        for line in axes.lines:
            line.set_label("_")
    for style, label in styles:
        figure.axes[0].plot(
            [], [], style, color=GREY, linewidth=1.4, markersize=4.5, markerfacecolor="none", label=label
        )


def over_each_other(
    *panels: tuple[str, str, float], splits: Sequence[str] = SPLITS
) -> Callable[[Figure, Sequence[Compared]], None]:
    """Draw metrics, each given as (name, label, scale), of all runs over each other."""

    def draw(figure: Figure, runs: Sequence[Compared]) -> None:
        for axes, (metric, _, scale) in zip(_panels(figure, *(label for _, label, _ in panels)), panels, strict=True):
            for compared in runs:
                _lines(axes, compared.run, metric, compared.color, "run", scale, splits, blocks=16)
        styles = {"train": ("-", SPLIT_LABELS["train"]), "eval": ("--o", SPLIT_LABELS["eval"])}
        _explain_lines(figure, *(styles[split] for split in splits))

    return draw


def draw_quantiles_together(figure: Figure, runs: Sequence[Compared]) -> None:
    panels = _panels(figure, "chosen (nats)", "rejected (nats)", x="quantile level")
    for side, axes in enumerate(panels):
        _mark(axes, 0.0)
        for compared in runs:
            rewards = compared.run.held_out(f"{compared.run.sides[side]}_rewards")
            if rewards:
                axes.plot(*quantile_curve(rewards[-1][1]), color=compared.color, linewidth=1.6)
    _explain_lines(figure)


def _any_has(*metrics: str, splits: Sequence[str] = SPLITS) -> Callable[[Sequence[Compared]], bool]:
    return lambda runs: any(compared.run.has(*metrics, splits=splits) for compared in runs)


COMPARISONS = [
    Entry(
        "loss",
        "Loss",
        _any_has("loss"),
        over_each_other(("loss", "loss", 1.0)),
        "Only curves of the same loss with the same options measure the same thing.",
    ),
    Entry(
        "accuracy",
        "Accuracy",
        _any_has("rewards/accuracies"),
        over_each_other(("rewards/accuracies", "ranked correctly", 1.0)),
        "The share of pairs whose chosen completion has the larger reward: it compares across losses and temperatures.",
    ),
    Entry(
        "margins",
        "Reward margin",
        _any_has("rewards/margins"),
        over_each_other(("rewards/margins", "margin of the rewards (nats)", 1.0)),
        "In each run's own reward, which is beta x log-ratio for most losses: a larger beta alone makes it larger.",
    ),
    Entry(
        "rewards",
        "Rewards",
        _any_has("rewards/chosen", "rewards/rejected"),
        over_each_other(("rewards/chosen", "chosen\n(nats)", 1.0), ("rewards/rejected", "rejected\n(nats)", 1.0)),
        "A run that sinks both pushes completions down faster than it lifts the chosen ones. Unpaired data: desirable "
        "and undesirable.",
    ),
    Entry(
        "reward_quantiles",
        "Quantiles of the rewards",
        lambda runs: any(run.held_out(f"{side}_rewards") for _, _, run in runs for side in run.sides),
        draw_quantiles_together,
        "Held out, at each run's last evaluation. Averages hide tails: on the left fare the worst completions.",
    ),
    Entry(
        "tilt",
        "Tilt over the steps",
        _any_has("tilt/effective_sample_size", "tilt/max_weight", splits=("train",)),
        over_each_other(
            ("tilt/effective_sample_size", "effective\nsample size", 1.0),
            ("tilt/max_weight", "largest\nweight", 1.0),
            splits=("train",),
        ),
        "The fewer samples count, the more a run is about its hardest pairs, and the noisier its steps.",
    ),
    Entry(
        "dominance",
        "Violation of dominance",
        _any_has("dominance/violation_area", "dominance/violation_w1"),
        over_each_other(
            ("dominance/violation_area", "share of levels", 1.0), ("dominance/violation_w1", "W1 (nats)", 1.0)
        ),
        "How far the one distribution still is from lying above the other at every level.",
    ),
    Entry(
        "penalty",
        "Gradient penalty",
        _any_has("penalty/value", "penalty/gradient_norm"),
        over_each_other(("penalty/value", "penalty", 1.0), ("penalty/gradient_norm", "gradient\nnorm", 1.0)),
        "How much small changes of the input move the loss.",
    ),
    Entry(
        "optimizer",
        "Optimiser",
        _any_has("learning_rate", "gradient_norm"),
        over_each_other(
            ("learning_rate", "learning\nrate", 1.0), ("gradient_norm", "gradient\nnorm", 1.0), splits=("train",)
        ),
        "Gradient norms of different losses differ in scale; bursts are what to look for.",
    ),
    Entry(
        "throughput",
        "Throughput and memory",
        _any_has("tokens_per_second", "peak_memory_bytes"),
        over_each_other(
            ("tokens_per_second", "tokens / s", 1.0), ("peak_memory_bytes", "peak GiB", 2.0**-30), splits=("train",)
        ),
        "Comparable on the same machine only.",
    ),
]


def render(entry: Entry, drawn: Run | Sequence[Compared]) -> bytes:
    """The PNG of one picture, transparent, 920 x 580 pixels."""
    figure = Figure(figsize=(4.6, 2.9), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    entry.draw(figure, drawn)
    named = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    if named:  # above the panels, where it covers no data
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside upper left",
            ncols=3 if len(named) <= 3 else 2,
            frameon=False,
            fontsize=7.5,
            labelcolor=GREY,
            handlelength=1.8,
            columnspacing=1.2,
            borderpad=0.1,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()
