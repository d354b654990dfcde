"""The report: what it reads, which pictures it draws, and that its page is whole, self-contained and safe."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from run_folders import write_run

from robustloss.train import figures, report
from robustloss.train.figures import FIGURES, quantile_curve
from robustloss.train.report import write_report
from robustloss.train.run_folder import read_run

ALWAYS = {"loss", "rewards", "margins", "optimizer", "throughput"}
PAIRED = {"accuracy", "reward_quantiles", "margin_quantiles"}


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of a few bytes, for tests of everything but the drawing."""
    monkeypatch.setattr(report, "render", lambda entry, run: entry.name.encode())


def drawn(entry_name: str, run_dir: Path) -> Figure:
    figure = Figure()
    next(entry for entry in FIGURES if entry.name == entry_name).draw(figure, read_run(run_dir))
    return figure


def labels(figure: Figure) -> list[str]:
    return [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantile_curve_is_the_empirical_quantile_function(count):
    values = np.random.default_rng(count).normal(size=count)
    levels, quantiles = quantile_curve(values, points=33)
    assert levels[0] == 0
    assert levels[-1] == 1
    np.testing.assert_allclose(quantiles, [np.quantile(values, level) for level in levels], rtol=1e-12)
    # On a grid of as many levels as values, the quantiles are the order statistics themselves.
    if count > 1:
        np.testing.assert_allclose(quantile_curve(values, points=count)[1], np.sort(values), rtol=1e-12)


def test_page_is_self_contained_and_shows_every_picture(tmp_path):
    everything = {
        "rewards/accuracies": 0.5, "tilt/effective_sample_size": 4.0, "tilt/max_weight": 0.3, "penalty/value": 0.1,
        "penalty/gradient_norm": 1.0, "dominance/violation_area": 0.5, "dominance/violation_w1": 0.5,
    }  # fmt: skip
    arrays = {name: [1.0, 2.0] for name in ("chosen_rewards", "rejected_rewards", "policy_margins", "ref_margins")}
    run = write_run(tmp_path / "run", every_row=everything, evaluations={3: {**arrays, "tilt_weights": [0.4, 0.6]}})
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    assert page.tags.count("img") == len(FIGURES)
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    source = path.read_text()
    assert "http:" not in source
    assert "https:" not in source
    assert "url(" not in source
    assert {png.name for png in (run / "figures").iterdir()} == {f"{entry.name}.png" for entry in FIGURES}


@pytest.mark.usefixtures("undrawn")
def test_page_escapes_what_comes_from_config_and_data(tmp_path):
    hostile = "<script>alert('1')</script><img src=x onerror=alert(2)>"
    run = write_run(tmp_path / "<b>run", loss=f'name: "{hostile}", beta: "{hostile}"', every_row={f"{hostile}": None})
    (run / "environment.json").write_text(json.dumps({hostile: hostile, "nested": {"torch": hostile}}))
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("img") == len(list((run / "figures").iterdir()))
    assert page.text.count(hostile) >= 6  # shown as text: the title, formula, words, warning, config, versions


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("every_row", "arrays", "expected"),
    [
        ({}, {}, ALWAYS),
        ({"rewards/accuracies": 0.5}, None, ALWAYS | PAIRED),
        ({"tilt/effective_sample_size": 4.0}, {3: {"tilt_weights": [0.5, 0.5]}}, ALWAYS | {"tilt", "tilt_weights"}),
        ({"dominance/violation_w1": 0.5}, {3: {"chosen_rewards": [1.0], "rejected_rewards": [2.0]}},
         ALWAYS | {"dominance", "reward_quantiles"}),
        ({"penalty/value": 0.1}, {3: {"desirable_rewards": [1.0], "undesirable_rewards": [0.0, 2.0]}},
         ALWAYS | {"penalty", "reward_quantiles"}),
        ({"penalty/value": math.nan}, {3: {"desirable_rewards": [1.0], "undesirable_rewards": []}}, ALWAYS),
    ],
)  # fmt: skip
def test_a_picture_appears_exactly_when_its_metrics_exist(tmp_path, every_row, arrays, expected):
    run = write_run(tmp_path / "run", every_row=every_row, evaluations=arrays)
    (run / "figures").mkdir()
    (run / "figures" / "penalty.png").write_bytes(b"of another run in this folder")
    page = Page(write_report(run))
    assert {png.stem for png in (run / "figures").iterdir()} == expected
    assert page.tags.count("img") == len(expected)


@pytest.mark.usefixtures("undrawn")
def test_page_tells_the_numbers_and_the_loss(tmp_path):
    run = write_run(tmp_path / "run", loss="name: kldpo, beta: 0.1, tau: 0.05")
    text = Page(write_report(run)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "tiny was trained with kldpo for 3 optimiser steps in 1 min 30 s." in text
    assert "In training, the loss went from 0.5931 to 0.3931 and the reward margin went from 0.5 to 1.5." in text
    assert "On held-out data, the loss went from 0.6931 to 0.3931" in text
    assert "P_i proportional to exp(l(h_i) / tau)" in text
    assert "beta = 0.1; tau = 0.05" in text
    assert "1,234" in text
    assert "1 GiB" in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        ("name: dpo, label_smoothing: 0.1", "l(h) = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)"),
        ("name: dpo, link: ipo", "l(h) = (h - 1 / (2 beta))^2"),
        ("name: kldpo, rho: 0.3", "tau such that KL(P || uniform) = rho"),
        ("name: kldpo, tau: 1.0, normalize: false", "P_i = exp((l(h_i) - mean of l) / tau), neither normalised"),
        ("name: wdpo, squared: false", "R = root of the mean of |g_i|^2"),
        ("name: kto", "1 - sigmoid(s_i beta (r_i - z))"),
        ("name: dr_dpo, beta_prime: 2", "exp(-l(h_i) / beta_prime)"),
        ("name: tv_dpo", "|P_i - 1/B| / 2 <= rho"),
        ("name: chi_po", "phi(z) = z + log z"),
        ("name: beta_dpo", "1 + alpha (their mean h - M)"),
        ("name: group_dro, groups: 2", "mean of l(h_i) in group g"),
        ("name: homemade, gamma: 3", "homemade: gamma = 3"),
    ],
)
def test_the_formula_follows_the_options_of_the_loss(tmp_path, loss, formula):
    assert formula in Page(write_report(write_run(tmp_path / "run", loss=loss))).text


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_evaluation_and_with_nan_says_so(tmp_path):
    run = write_run(tmp_path / "run", every_row={"gap": math.nan}, evaluations={})
    text = Page(write_report(run)).text
    assert "Nothing was evaluated on held-out data" in text
    assert "gap is NaN or infinite in 3 logged steps, first at step 1." in text
    assert "NaN" not in Page(write_report(write_run(tmp_path / "whole"))).text


@pytest.mark.parametrize("steps", [1, 500])
def test_runs_of_one_step_and_of_many_are_drawn_with_gaps(tmp_path, steps):
    run = write_run(tmp_path / "run", steps=steps)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "split": "train", "loss": Infinity}\n{"step": 2, "split": "train", "loss": null}\n')
    entry = next(entry for entry in FIGURES if entry.name == "loss")
    assert figures.render(entry, read_run(run)).startswith(b"\x89PNG")
    held_out = [line for line in drawn("loss", run).axes[0].lines if line.get_label() == "held out"]
    np.testing.assert_allclose(held_out[0].get_xdata(), [0, steps])


def test_a_long_series_is_drawn_under_its_block_means(tmp_path):
    run = write_run(tmp_path / "run", steps=400)
    raw, mean = drawn("margins", run).axes[0].lines[1:3]
    assert len(raw.get_xdata()) == 400
    np.testing.assert_allclose(mean.get_ydata(), np.asarray(raw.get_ydata()).reshape(40, 10).mean(axis=1))


@pytest.mark.parametrize(
    ("loss", "marked"),
    [("name: dpo", True), ("name: aot_paired, link: logistic", True), ("name: dpo, link: ipo", False),
     ("name: kldpo, normalize: false", False), ("name: kto", False)],
)  # fmt: skip
def test_ln_2_is_marked_for_logistic_losses_only(tmp_path, loss, marked):
    assert ("ln 2" in labels(drawn("loss", write_run(tmp_path / "run", loss=loss)))) == marked


@pytest.mark.parametrize(("lift", "violated"), [(0.5, False), (-0.5, True)])
def test_margin_quantiles_below_the_reference_are_shaded(tmp_path, lift, violated):
    ref = np.linspace(-1, 1, 9)
    arrays = {"policy_margins": list(ref + lift), "ref_margins": list(ref)}
    figure = drawn("margin_quantiles", write_run(tmp_path / "run", evaluations={3: arrays}))
    assert ("violation" in labels(figure)) == violated


def test_reward_quantiles_compare_the_first_evaluation_with_the_last(tmp_path):
    arrays = {
        step: {"desirable_rewards": [step, step + 1.0], "undesirable_rewards": [-step, None, math.nan]}
        for step in (0, 5, 9)
    }
    figure = drawn("reward_quantiles", write_run(tmp_path / "run", evaluations=arrays))
    ends = {line.get_label(): (line.get_ydata()[0], line.get_ydata()[-1]) for line in figure.axes[0].lines}
    assert ends == {
        "desirable, step 9": (9, 10), "desirable, step 0": (0, 1),
        "undesirable, step 9": (-9, -9), "undesirable, step 0": (0, 0),
    }  # fmt: skip


def test_a_step_logged_twice_counts_as_logged_last(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "split": "train", "loss": 7.0}\n')
    steps, values = read_run(run).series("loss", "train")
    np.testing.assert_array_equal(steps, [1, 2, 3])
    assert values[1] == 7.0


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_write_leaves_the_old_report(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    old = write_report(run).read_bytes()
    write_run(run, every_row={"loss": 0.25})
    whole_write = Path.write_bytes

    def power_cut(path, content):
        whole_write(path, content[: len(content) // 2])
        if "report.html" in path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", power_cut)
        with pytest.raises(KeyboardInterrupt):
            write_report(run)
    assert (run / "report.html").read_bytes() == old
    assert write_report(run).read_bytes() != old
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "split": "train"}\n{"step": 2, ', r"metrics\.jsonl:2: not valid JSON"),
        ("metrics.jsonl", "\n[1, 2]\n", r"metrics\.jsonl:1: not valid JSON"),
        ("metrics.jsonl", "[1, 2]\n", r"metrics\.jsonl:1: must be a JSON object, got list"),
        ("metrics.jsonl", '{"step": 1, "split": "test"}\n', r"metrics\.jsonl:1: 'split' must be 'train' or 'eval'"),
        ("metrics.jsonl", '{"step": "1", "split": "eval"}\n', r"metrics\.jsonl:1: 'step' must be an integer, got '1'"),
        ("metrics.jsonl", '{"step": 1, "split": "eval", "loss": "low"}\n', r"jsonl:1: 'loss' must be .* got 'low'"),
        ("metrics.jsonl", "", r"metrics\.jsonl: holds no metrics"),
        ("environment.json", '{\n"torch": \n}', r"environment\.json:3: not valid JSON"),
        ("evaluations/step_00000003.json", '{"chosen_rewards": [1, "x"]}', r"3\.json: 'chosen_rewards'\[1\] must be"),
        ("evaluations/step_00000003.json", '{"chosen_rewards": 1}', r"'chosen_rewards' must be a list .* got int"),
        ("evaluations/last.json", "{}", r"last\.json: the name must be step_ and a number"),
        ("config.yaml", "loss:\n  name: [dpo\n", r"config\.yaml:3: not valid YAML"),
        ("config.yaml", "loss: dpo\n", r"config\.yaml: must hold the loss's name as loss\.name, got loss = 'dpo'"),
        ("config.yaml", b"\xff\xfe", r"config\.yaml: not UTF-8 text"),
    ],
)  # fmt: skip
def test_malformed_input_names_file_and_line(tmp_path, name, content, message):
    run = write_run(tmp_path / "run")
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        write_report(run)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file"):
        write_report(run)
