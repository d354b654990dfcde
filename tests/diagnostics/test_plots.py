"""Pictures hold the numbers that they are said to show."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from robustloss import KLTilt
from robustloss.diagnostics import (
    plot_effective_sample_size,
    plot_quantile_curves,
    plot_worst_case,
    quantile_curves,
    worst_case,
)

LOSSES = torch.tensor([0.2, 1.7, 0.9, 0.4, 1.1, 0.3], dtype=torch.float64)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


def lines_of(axes: Axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_quantile_curves_are_drawn_as_they_are_and_the_violation_is_shaded():
    u, v = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-1.0, 1.5])
    axes = plot_quantile_curves(u, v, labels=("policy", "reference"), levels=201)
    levels, of_u, of_v = quantile_curves(u, v, 201)
    drawn = lines_of(axes)
    np.testing.assert_array_equal(drawn["policy"], torch.stack([levels, of_u], 1).numpy())
    np.testing.assert_array_equal(drawn["reference"], torch.stack([levels, of_v], 1).numpy())
    (shade,) = axes.collections
    assert shade.get_label() == "violation"
    box = shade.get_datalim(axes.transData)
    # u falls short at levels between 1/2 and 2/3: 1 against 1.5.
    assert (box.x0, box.x1) == pytest.approx((0.5, 2 / 3), abs=0.01)
    assert (box.y0, box.y1) == pytest.approx((1, 1.5))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["policy", "reference", "violation"]


def test_nothing_is_shaded_where_u_dominates():
    axes = plot_quantile_curves(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert not axes.collections


def test_weights_are_drawn_over_their_nominal_ones_against_the_losses():
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    found = worst_case(LOSSES, KLTilt(tau=0.5), weights)
    axes = plot_worst_case(found)
    present = weights > 0
    expected = torch.stack([LOSSES, found.weights / found.nominal], 1)[present]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), expected.numpy())
    np.testing.assert_array_equal(lines_of(axes)["nominal"][:, 1], [1, 1])
    assert axes.get_title() == f"effective sample size {found.effective_sample_size:.4g} of 5"


def test_effective_sample_sizes_are_drawn_over_the_steps():
    axes = plot_effective_sample_size([1, 2, 5], [8.0, 6.5, 3.0], batch_size=8)
    sizes, bound = axes.lines
    assert sizes.get_xydata().tolist() == [[1, 8], [2, 6.5], [5, 3]]
    assert list(bound.get_ydata()) == [8, 8]
    assert bound.get_label() == "batch size 8"
    assert axes.get_ylim()[0] == 0
    with pytest.raises(ValueError, match=r"steps and sizes must be of one length, got 2 and 1"):
        plot_effective_sample_size([1, 2], [3.0])


@pytest.mark.parametrize(
    "plot",
    [
        lambda ax: plot_quantile_curves(LOSSES, LOSSES + 1, ax=ax),
        lambda ax: plot_worst_case(worst_case(LOSSES, KLTilt(tau=0.5)), ax=ax),
        lambda ax: plot_effective_sample_size([1, 2], [3.0, 4.0], ax=ax),
    ],
    ids=["quantile curves", "worst case", "effective sample size"],
)
def test_a_plot_is_drawn_where_it_is_asked_for(plot):
    figure, (left, right) = pyplot.subplots(1, 2)
    assert plot(left) is left
    assert not right.lines
    assert pyplot.get_fignums() == [figure.number]
    fresh = plot(None)
    assert isinstance(fresh, Axes)
    assert fresh.figure is not figure
    fresh.figure.canvas.draw()


def test_without_matplotlib_the_diagnostics_work_and_a_plot_says_what_is_missing():
    program = """
import sys
sys.modules["matplotlib"] = None  # an import of it raises ImportError
import torch
from robustloss.diagnostics import dominance_violation, plot_effective_sample_size
dominance_violation(torch.zeros(2), torch.ones(2), bootstrap=2)
try:
    plot_effective_sample_size([1], [2.0])
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "robustloss.diagnostics draws with matplotlib: pip install matplotlib\n", done.stderr
