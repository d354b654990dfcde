"""The site builds, without a warning and without a network, and shows what the code says."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import robustloss
from robustloss import diagnostics, penalty
from robustloss.losses import LOSSES

for needed in ("furo", "myst_parser", "sphinx_copybutton", "trl", "transformers"):  # the last two by their versions
    if find_spec(needed) is None:
        pytest.skip(
            f"the site needs {needed}: pip install --no-build-isolation '.[docs,train,trl]'", allow_module_level=True
        )

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A build as `make docs` makes it, in a folder of its own."""
    output = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        output / "doctrees",
        ROOT / "docs",
        output,
    ]
    # A proxy that refuses: a build that asks the network fails instead of waiting.
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def anchors(site: Path) -> set[str]:
    pages = (site / "api").glob("*.html")
    return {name for page in pages for name in re.findall(r'id="(robustloss[\w.]*)"', page.read_text(encoding="utf-8"))}


def test_every_public_name_has_its_place_in_the_reference(site):
    names = {f"robustloss.{name}" for name in robustloss.__all__} - {"robustloss.__version__", "robustloss.functional"}
    names |= {f"robustloss.diagnostics.{name}" for name in diagnostics.__all__}
    names |= {f"robustloss.penalty.{name}" for name in vars(penalty) if name.startswith(("direction", "check_"))}
    missing = names - anchors(site)
    assert not missing


def test_every_key_of_a_run_is_told_with_its_default_and_meaning(site):
    sys.path.insert(0, str(ROOT / "docs" / "_extensions"))
    try:
        import run_config
    finally:
        sys.path.pop(0)
    page = text_of(site / "api" / "configuration.html")
    schemas = {"": run_config.config.RunConfig, **{f"{name}.": kind for name, kind in run_config.sections().items()}}
    for prefix, schema in schemas.items():
        rows = run_config.rows_of(schema, prefix)
        assert all(meaning for _, _, meaning in rows), rows
        assert all(key in page and re.sub("[`\\\\]", "", meaning) in page for key, _, meaning in rows)
        own = [field.name for field in dataclasses.fields(schema) if run_config.section_of(schema, field) is None]
        assert len(rows) == len(own) - own.count("loss")
    assert all(name in page for name in LOSSES)


def test_every_command_tells_its_help(site):
    from robustloss.cli import COMMANDS

    page = text_of(site / "cli.html")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert f"usage: robustloss {name}" in page


def test_docstrings_leave_no_markup_behind(site):
    """Backticks, roles and directives that a reader sees are docstrings that render badly."""
    for page in sorted((site / "api").glob("*.html")):
        source = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = html.unescape(re.sub(r"<[^>]+>", "", source))
        left = re.findall(r".*(?:``|(?<!\w):\w+:`|\.\. \w+::).*", text)
        assert not left, f"{page.name}: {left}"


def test_formulae_are_drawn(site):
    """An underscore or a backslash within a formula is LaTeX that was not understood, and outside one that was not
    found; names of the environment keep their dollar."""
    pages = list(site.rglob("*.html"))
    formulae = [
        re.sub(r"<[^>]+>", "", formula)
        for page in pages
        for formula in re.findall(r"<math\b.*?</math>", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(formulae) > 50
    assert not [formula for formula in formulae if set(formula) & set("_\\$")]
    for page in pages:
        source = page.read_text(encoding="utf-8")
        source = re.sub(r"<(pre|code|math|script|style|svg)\b.*?</\1>", "", source, flags=re.DOTALL)
        text = html.unescape(re.sub(r"<[^>]+>", "", source))
        left = re.findall(r".*(?:\$(?!ROBUSTLOSS_)|\\[a-zA-Z]+).*", text)
        assert not left, f"{page.name}: {left}"


def test_pages_ask_no_other_server(site):
    for page in site.rglob("*.html"):
        asked = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page.read_text("utf-8")
        )
        assert not asked, f"{page.name}: {asked}"
