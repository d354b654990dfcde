"""The directive `run-config`: every key of a training run, read from `robustloss/train/config.py`.

A dataclass field's default comes from the dataclass, and its meaning from the comment behind it, so that the reference
cannot say anything else than the code does. `run-config-losses` lists the options of every `loss.name`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from robustloss.losses import LOSSES
from robustloss.losses.catalogue import PYTHON_ONLY
from robustloss.train import config


def meanings(schema: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    source = inspect.getsource(schema)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: comments.get(node.lineno, "") for node in fields}


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def in_yaml(value: Any) -> str:
    if value == config.MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`"
    return f"`{value}`"


def rows_of(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every field that is no section."""
    told = meanings(schema)
    return [
        (f"{prefix}{field.name}", in_yaml(default_of(field)), told[field.name])
        for field in dataclasses.fields(schema)
        if section_of(schema, field) is None and field.name != "loss"
    ]


def section_of(schema: type, field: dataclasses.Field) -> type | None:
    """The dataclass of a field that holds keys of its own."""
    hint = get_type_hints(schema)[field.name]
    kinds = [kind for kind in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None


def sections() -> dict[str, type]:
    found = {field.name: section_of(config.RunConfig, field) for field in dataclasses.fields(config.RunConfig)}
    return {name: kind for name, kind in found.items() if kind is not None}


def table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {default} | {escape(meaning)} |" for key, default, meaning in rows]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text for a cell of a table; what stands in backticks is code already."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\|<*_])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


class RunConfigReference(SphinxDirective):
    """The tables of one section (its name is the argument), or of the keys at the top level."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(inspect.getsourcefile(config))
        name = self.arguments[0] if self.arguments else ""
        rows = rows_of(sections()[name], f"{name}.") if name else rows_of(config.RunConfig)
        return self.parse_text_to_nodes(table(rows))


class LossOptions(SphinxDirective):
    """The names that `loss.name` may have, each with its options and their defaults."""

    def run(self) -> list[nodes.Node]:
        lines = ["| `loss.name` | class | options and defaults |", "|---|---|---|"]
        for name, module in LOSSES.items():
            options = [
                f"`{key}: {in_yaml(parameter.default)[1:-1]}`"
                for key, parameter in inspect.signature(module).parameters.items()
                if key not in PYTHON_ONLY
            ]
            lines.append(f"| `{name}` | {{py:class}}`~robustloss.{module.__name__}` | {', '.join(options)} |")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("run-config", RunConfigReference)
    app.add_directive("run-config-losses", LossOptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
