"""Formulae as MathML, which browsers draw by themselves: a page needs no script and asks no other server."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def to_mathml(latex: str, as_block: bool) -> str:
    latex = " ".join(latex.split()).replace(r"\dots", r"\ldots")
    # docutils wants to be told which side a delimiter is on.
    latex = re.sub(r"\\([bB]igg?)(?=[(\[|]|\\\{|\\\|)", r"\\\1l", latex)
    latex = re.sub(r"\\([bB]igg?)(?=[)\]]|\\\})", r"\\\1r", latex)
    # A name of letters and what it is applied to stand apart, unless a bracket or an index comes between.
    latex = re.sub(r"\\(log|exp|min|max|sup|tanh|arg)(?![a-zA-Z])(?!\s*(?:[_^(\[]|\\left|\\[bB]ig))", r"\\\1\\,", latex)
    mathml = latex2mathml.tex2mathml(latex, as_block=as_block)
    # Bars grow with what follows them only where \\left and \\right say so.
    mathml = re.sub(r"<mo>([‖|])</mo>", r'<mo stretchy="false">\1</mo>', mathml)
    return re.sub(r"<mo[^>]*>_</mo>", '<mo stretchy="true">‾</mo>', mathml)  # of an overline


def visit(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    try:
        translator.body.append(to_mathml(node.astext(), isinstance(node, nodes.math_block)))
    except MathError as error:
        logger.warning("a formula that docutils cannot read: %s", error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(visit, None), block_renderers=(visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
