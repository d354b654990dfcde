"""The directive `example`: what a file of `examples/` is about, between its comments [start] and [end].

The tests run these files, so a page that shows them cannot go stale. Imports of robustloss stand before the part.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def part_of(source: str) -> str:
    imports = re.findall(r"^from robustloss.*$", source, re.MULTILINE)
    part = re.search(r"^ *# \[start\]\n(.*?)^ *# \[end\]$", source, re.MULTILINE | re.DOTALL)
    if part is None:
        raise ValueError("no lines between '# [start]' and '# [end]'")
    return "\n".join([*imports, "", textwrap.dedent(part[1]).strip()])


class Example(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = EXAMPLES / self.arguments[0]
        self.env.note_dependency(path)
        try:
            text = part_of(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"examples/{self.arguments[0]}: {error}") from error
        block = nodes.literal_block(text, text, language="python")
        where = nodes.caption("", "", nodes.inline("", "from "), nodes.literal("", f"examples/{self.arguments[0]}"))
        return [nodes.container("", where, block, literal_block=True, classes=["literal-block-wrapper"])]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("example", Example)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
