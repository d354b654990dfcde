"""`robustloss report`: one run redrawn, and runs of any loss, length and state side by side."""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import write_run

pytest.importorskip("matplotlib")
from robustloss.train import comparison, figures, report
from robustloss.train.comparison import distinct_names, write_comparison
from robustloss.train.run_folder import read_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{|`"


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.sources, self.cells, self.text = [], set(), [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of a few bytes, for tests of everything but the drawing."""
    for module in (report, comparison):
        monkeypatch.setattr(module, "render", lambda entry, runs: entry.name.encode())


@pytest.fixture
def runs(tmp_path):
    """A finished run, and one of another loss that is longer, holds other arrays, and is not finished."""
    accurate = write_run(tmp_path / "accurate", every_row={"rewards/accuracies": 0.75})
    unpaired = {9: {"desirable_rewards": [1.0, 2.0], "undesirable_rewards": [0.0, None]}}
    settings = {
        "loss": "name: kldpo, beta: 0.2, tau: 0.5",
        "every_row": {"rewards/accuracies": 0.5, "tilt/max_weight": 1},
    }
    longer = write_run(tmp_path / "longer", steps=9, evaluations=unpaired, **settings)
    (accurate / "model").mkdir()
    return accurate, longer


@pytest.mark.usefixtures("undrawn")
def test_one_run_is_redrawn_where_it_lies_or_where_told(robustloss, runs, tmp_path):
    run, _ = runs
    assert robustloss("report", run) == (0, f"report: {run / 'report.html'}\n", "")
    assert robustloss("report", run, "--output", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()


def test_a_comparison_is_one_self_contained_page_with_every_picture_that_applies(robustloss, runs, tmp_path):
    output = tmp_path / "both.html"
    assert robustloss("report", *runs, "--output", output) == (0, f"report: {output}\n", "")
    page = Page(output)
    drawn = {"loss", "accuracy", "margins", "rewards", "reward_quantiles", "tilt", "optimizer", "throughput"}
    assert page.tags.count("img") == len(drawn)
    assert {entry.name for entry in figures.COMPARISONS} >= drawn
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in output.read_text().replace("http-equiv", "")


@pytest.mark.usefixtures("undrawn")
def test_without_an_output_the_page_lies_here(robustloss, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert robustloss("report", *runs) == (0, "report: comparison.html\n", "")
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.usefixtures("undrawn")
def test_the_page_tells_what_differs_what_is_the_same_and_what_to_beware_of(runs, tmp_path):
    page = Page(write_comparison(runs, tmp_path / "page.html"))
    cells = [cell.strip() for cell in page.cells]
    for key, ours, theirs in (("loss.name", "dpo", "kldpo"), ("loss.beta", "0.1", "0.2"), ("loss.tau", "–", "0.5")):
        assert cells[cells.index(key) + 1 : cells.index(key) + 3] == [ours, theirs]
    # The one's own default and the other's written value are the same.
    assert cells.index("loss.link") > cells.index("loss.tau")
    assert cells[cells.index("model.name_or_path") + 1] == "tiny"
    for told in (
        "accurate ends with the highest accuracy, 75.0%, and longer with the lowest, 50.0%",
        "longer is not finished: it stands at step 9.",
        "The runs optimise different losses",
        "The runs differ in loss.beta",
        "P_i proportional to exp(l(h_i) / tau)",
    ):
        assert told in page.text
    assert "accurate is not finished" not in page.text
    assert page.tags.count("strong") == 2 + 1  # the losses' names, and the better accuracy


@pytest.mark.usefixtures("undrawn")
def test_losses_and_margins_are_ranked_among_runs_of_one_loss_only(tmp_path):
    for number in (1, 2):
        write_run(tmp_path / f"run{number}", every_row={"rewards/margins": number, "loss": number})
    page = Page(write_comparison([tmp_path / "run1", tmp_path / "run2"], tmp_path / "page.html"))
    assert page.tags.count("strong") == 2 + 2


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("ours", "theirs", "differs"),
    [
        ("eval: a", "eval: a", False),
        ("eval: a", "eval: b", True),
        ("eval_fraction: 0.1", "eval_fraction: 0.2", True),
        ("eval: OWN/demo/eval.jsonl", "eval: OWN/demo/eval.jsonl", False),
    ],
)
def test_held_out_numbers_of_different_data_are_not_ranked(tmp_path, ours, theirs, differs):
    folders = []
    for name, data in (("one", ours), ("two", theirs)):
        run = write_run(tmp_path / name, every_row={"rewards/accuracies": 0.5 if name == "one" else 0.6})
        with (run / "config.yaml").open("a") as config:
            config.write(f"output_dir: runs/{name}\ndata: {{train: t, {data.replace('OWN', f'runs/{name}')}}}\n")
        folders.append(run)
    text = Page(write_comparison(folders, tmp_path / "page.html")).text
    assert ("held-out numbers do not compare" in text) == differs
    assert ("two ends with the highest accuracy" in text) != differs


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_evaluation_or_with_nan_is_compared_and_said(tmp_path, runs):
    bare = write_run(tmp_path / "bare", every_row={"loss": float("nan")}, evaluations={})
    text = Page(write_comparison([bare, runs[0]], tmp_path / "page.html")).text
    assert "bare evaluated nothing on held-out data." in text
    assert "The loss of bare is NaN or infinite in 3 logged steps." in text


@pytest.mark.usefixtures("undrawn")
def test_whatever_the_folders_say_is_text(tmp_path, runs):
    hostile = write_run(tmp_path / "a<b>$c$", every_row={HOSTILE: 1.0}, loss=f"name: '{HOSTILE}', beta: '{HOSTILE}'")
    (hostile / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "torch": {"x": HOSTILE}}))
    page = Page(write_comparison([hostile, runs[0]], tmp_path / "page.html"))
    harmless = Page(write_comparison(runs, tmp_path / "page.html"))
    assert set(page.tags) <= set(harmless.tags)
    assert page.attributes <= harmless.attributes
    assert page.tags.count("img") <= harmless.tags.count("img")
    assert page.text.count(HOSTILE) >= 4
    assert "a<b>$c$" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, ', "metrics.jsonl:1: not valid JSON"),
        ("config.yaml", "loss: {name: dpo}\nmodel: tiny\n", "model must be a section of keys and values, got 'tiny'"),
        ("config.yaml", "[1, 2]\n", "must hold the loss's name"),
        ("metrics.jsonl", '{"step": 1, "split": "eval", "loss": 1' + 400 * "0" + "}\n", "that a float can hold"),
        ("environment.json", None, "environment.json: no such file"),
    ],
)
def test_a_folder_that_is_no_run_is_named_in_one_line(refused, runs, tmp_path, name, content, message):
    broken = runs[1]
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content)
    for arguments in ([broken], runs):
        line = refused("report", *arguments, "--output", tmp_path / "page.html")
        assert message in line
        assert str(broken) in line
    assert not (tmp_path / "page.html").exists()


def test_a_link_is_not_followed(refused, runs):
    (runs[0] / "evaluations").rename(runs[0] / "elsewhere")
    (runs[0] / "evaluations").symlink_to(runs[0] / "elsewhere")
    assert "is a link" in refused("report", *runs)


def test_a_run_given_twice_is_refused(refused, runs):
    assert "is given twice" in refused("report", runs[0], runs[0].parent / "." / runs[0].name)


def test_names_are_as_long_as_it_takes_to_tell_them_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert distinct_names(folders) == ["a/run", "b/run"]
    assert distinct_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_exit_code_1_and_leaves_the_old_page(robustloss, runs, tmp_path, monkeypatch):
    output = tmp_path / "page.html"
    write_comparison(runs, output)
    old = output.read_bytes()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, _, error = robustloss("report", *reversed(runs), "--output", output)
    assert (code, error) == (1, "robustloss: error: the report could not be made: No space left on device\n")
    assert output.read_bytes() == old
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("undrawn")
def test_an_output_that_is_no_file_is_refused_before_anything_is_drawn(refused, runs, tmp_path):
    for arguments in (runs, runs[:1]):
        line = refused("report", *arguments, "--output", tmp_path)
        assert line.endswith(f"--output '{tmp_path}' is a folder: name the HTML file in it")
        line = refused("report", *arguments, "--output", tmp_path / "nowhere" / "x.html")
        assert line.endswith(f"x.html' is in no folder that exists: make '{tmp_path / 'nowhere'}' first")
    assert not (runs[0] / "figures").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_headings_tell_the_options_that_were_not_given(runs, tmp_path):
    assert "beta = 0.1; label_smoothing = 0.0; link = logistic" in Page(report.write_report(runs[0])).text
    page = Page(write_comparison(runs, tmp_path / "page.html"))
    assert "beta = 0.1; label_smoothing = 0.0; link = logistic" in page.text
    heads = [total.head for total in report.TOTALS.values()]
    assert [cell.strip() for cell in page.cells if cell.strip() in heads] == heads


def test_captions_name_what_is_drawn_and_no_colour():
    for entry in (*figures.FIGURES, *figures.COMPARISONS):
        assert not re.search(r"\b(green|red|orange|blue|purple|gr[ea]y)\b", entry.caption), entry.name


def test_every_run_has_a_colour_of_its_own_and_no_name_is_drawn(tmp_path):
    for count in (2, 8, 30):
        assert len(set(figures.colors(count))) == count
    run = read_run(write_run(tmp_path / "run", steps=60))
    compared = [figures.Compared(HOSTILE, color, run) for color in figures.colors(2)]
    entry = next(entry for entry in figures.COMPARISONS if entry.name == "loss")
    figure = figures.Figure()
    entry.draw(figure, compared)
    assert figure.axes[0].get_legend_handles_labels()[1] == ["training", "held out"]


def test_a_report_without_its_libraries_says_what_to_install(refused, runs, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **options):
        if name == "robustloss.train.comparison":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    line = refused("report", runs[0])
    assert line.endswith(
        "a report needs jinja2, which is not installed: pip install jinja2 "
        '(or in the checkout: pip install --no-build-isolation ".[train]")'
    )
