"""`robustloss losses [NAME]`: what there is to train with."""

from __future__ import annotations

import argparse
import difflib
from textwrap import fill

from robustloss.cli._errors import fail
from robustloss.cli.completion import LOSS_NAMES

WIDTH = 110  # of wrapped text
DESCRIPTION = """\
The losses: what each optimises, its formula and options with their defaults, and the line for a config file.

  robustloss losses           all of them, one line each
  robustloss losses kldpo     one of them
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "losses",
        help="list the losses, or describe one",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    name = parser.add_argument(
        "name", nargs="?", metavar="NAME", help="as in the list and in configs: kldpo; or KLDPOLoss"
    )
    name.complete = LOSS_NAMES
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from robustloss.losses import LOSSES

    if arguments.name is None:
        print(_list())
        return 0
    names = {cls.__name__: name for name, cls in LOSSES.items()} | {name: name for name in LOSSES}
    if arguments.name not in names:
        close = difflib.get_close_matches(arguments.name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(LOSSES)}"
        return fail(f"loss {arguments.name!r} is unknown; {hint}")
    print(_describe(names[arguments.name]))
    return 0


def _list() -> str:
    from robustloss.losses import LOSSES
    from robustloss.losses.catalogue import summary

    lines = []
    for paired, title in ((True, "of pairs (chosen, rejected)"), (False, "of single completions, desirable or not")):
        lines += [f"{title}:", ""]
        for name, loss in LOSSES.items():
            if loss.paired is paired:
                lines.append(f"  {name:<13} {loss.__name__:<16} {summary(loss)}")
        lines.append("")
    return "\n".join([*lines, "robustloss losses NAME: its formula, its options and the line for a config file."])


def _describe(name: str) -> str:
    from robustloss.losses import LOSSES, catalogue

    loss, section = LOSSES[name], catalogue.example(name)
    lines = [f"{name} ({loss.__name__}): {catalogue.summary(loss)}", ""]
    lines += [fill(part, WIDTH, initial_indent="  ", subsequent_indent="    ") for part in catalogue.formula(section)]
    lines += ["", "options:"]
    for option in catalogue.options(loss):
        where = "" if option.in_config else "; in Python only"
        lines.append(f"  {option.name} (default {option.default!r}{where})")
        lines.append(fill(option.words, WIDTH, initial_indent="      ", subsequent_indent="      "))
    lines += ["", "in a config file:", f"  {catalogue.as_yaml(section)}"]
    lines += ["", "in Python:", *(f"  {line}" for line in catalogue.python_example(name))]
    lines += ["", "papers: " + ", ".join(f"https://arxiv.org/abs/{number}" for number in catalogue.papers(loss))]
    return "\n".join(lines)
