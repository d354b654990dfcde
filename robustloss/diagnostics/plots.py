"""Pictures of the diagnostics, on the Axes given or on new ones; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from robustloss.diagnostics.dominance import quantile_curves
from robustloss.diagnostics.tilt import WorstCase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, GREY = "#2f6db5", "#c4443c", "#777777"


def plot_quantile_curves(
    u: Tensor,
    v: Tensor,
    *,
    u_weights: Tensor | None = None,
    v_weights: Tensor | None = None,
    labels: tuple[str, str] = ("u", "v"),
    levels: int = 501,
    ax: Axes | None = None,
) -> Axes:
    """Both quantile functions ([A] Fig. 1), shaded where u falls short of v; arguments as `quantile_curves`."""
    ax = _axes(ax)
    s, of_u, of_v = (x.cpu().numpy() for x in quantile_curves(u, v, levels, u_weights=u_weights, v_weights=v_weights))
    ax.step(s, of_u, where="pre", color=BLUE, linewidth=1.8, label=labels[0])
    ax.step(s, of_v, where="pre", color=GREY, linewidth=1.4, linestyle="--", label=labels[1])
    if (of_u < of_v).any():
        shade = {"step": "pre", "color": RED, "alpha": 0.35, "linewidth": 0.0}
        ax.fill_between(s, of_u, of_v, where=list(of_u < of_v), label="violation", **shade)
    ax.set(xlabel="quantile level", ylabel="value")
    ax.legend(frameon=False)
    return ax


def plot_worst_case(worst_case: WorstCase, *, ax: Axes | None = None) -> Axes:
    """Every sample's weight over its nominal weight, P / q, against its loss; samples of nominal weight zero are left
    out."""
    ax = _axes(ax)
    present = worst_case.nominal > 0
    ratio = worst_case.weights[present] / worst_case.nominal[present]
    ax.scatter(worst_case.losses[present].cpu().numpy(), ratio.cpu().numpy(), s=14, color=BLUE, alpha=0.7)
    ax.axhline(1.0, color=GREY, linewidth=1.1, linestyle=":", label="nominal")
    ax.set(xlabel="loss", ylabel="weight / nominal weight")
    ax.set_title(f"effective sample size {worst_case.effective_sample_size:.4g} of {int(present.sum())}", fontsize=9)
    ax.legend(frameon=False)
    return ax


def plot_effective_sample_size(
    steps: Sequence[float], sizes: Sequence[float], *, batch_size: int | None = None, ax: Axes | None = None
) -> Axes:
    """The metric tilt/effective_sample_size over the steps of a run, with the batch size that bounds it."""
    if len(steps) != len(sizes):
        raise ValueError(f"steps and sizes must be of one length, got {len(steps)} and {len(sizes)}")
    ax = _axes(ax)
    ax.plot(steps, sizes, color=BLUE, linewidth=1.5)
    if batch_size is not None:
        ax.axhline(batch_size, color=GREY, linewidth=1.1, linestyle=":", label=f"batch size {batch_size}")
        ax.legend(frameon=False)
    ax.set(xlabel="step", ylabel="effective sample size")
    ax.set_ylim(bottom=0.0)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("robustloss.diagnostics draws with matplotlib: pip install matplotlib") from error
    return pyplot.subplots()[1]
