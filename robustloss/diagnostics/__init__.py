"""What a batch or a run looks like: how far one sample is from dominating another, and what a worst case looks at.

    dominance_violation(u, v)          how far u is from dominating v, with bootstrap intervals
    quantile_curves(u, v)              both quantile functions, on one grid
    worst_case(losses, aggregate)      the weight of every sample, and how far the weights are from the nominal ones
    plot_quantile_curves, plot_worst_case, plot_effective_sample_size    with matplotlib

Everything is computed in float64 on detached copies, and waits for the device: for looking, not for training steps.
"""

from robustloss.diagnostics.dominance import DominanceViolation, Interval, dominance_violation, quantile_curves
from robustloss.diagnostics.plots import plot_effective_sample_size, plot_quantile_curves, plot_worst_case
from robustloss.diagnostics.tilt import WorstCase, worst_case

__all__ = [
    "DominanceViolation",
    "Interval",
    "WorstCase",
    "dominance_violation",
    "plot_effective_sample_size",
    "plot_quantile_curves",
    "plot_worst_case",
    "quantile_curves",
    "worst_case",
]
