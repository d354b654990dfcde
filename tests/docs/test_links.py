"""What a reader on GitHub sees of README.md, examples/ and docs/: links lead somewhere, and directives are not all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "examples", "robustloss/losses")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
PAGES = [page for page in PAGES if "_build" not in page.parts]


def links(text: str) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def slugs(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_its_heading(page):
    for link in links(page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading and target.suffix == ".md":
            assert heading in slugs(target.read_text(encoding="utf-8")), link


def test_an_example_that_only_the_site_shows_is_linked_before():
    shown = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for directive in re.finditer(r"^```\{example\} (\S+)$", text, re.MULTILINE):
            assert f"/examples/{directive[1]})" in text[: directive.start()], f"{page.name}: {directive[1]}"
            shown += 1
    assert shown
