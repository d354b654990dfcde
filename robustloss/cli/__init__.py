"""The command line. One module a command; what takes long to import is imported where a command runs, not here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from robustloss._version import __version__
from robustloss.cli import bench, completion, doctor, losses, report, train
from robustloss.cli._errors import Parser

DESCRIPTION = """\
Fine-tune causal language models with distributional preference losses.

  robustloss train                        train: with no arguments a demonstration of about a minute, on any machine
  robustloss losses kldpo                 what there is to train with: formula, options, a line for the config
  robustloss report runs/a runs/b         runs side by side, in one HTML file
  robustloss doctor                       what is installed, and which code serves each operation here
"""
EPILOG = """\
robustloss COMMAND --help tells more. An error is one line on standard error, and the exit code tells its kind:
0 done; 1 the machine could not do it (a full disk), or doctor found something broken; 2 a mistake in what was given,
or training that diverged; 3 another process of the training was lost; 75 bench ran out of --seconds; 130 interrupted
from the keyboard. Others of bench are pytest's.
"""
COMMANDS = (train, losses, report, bench, doctor, completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is told in one line, a bug keeps its traceback."""
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if arguments.run is train.run:  # it may be another process's
            raise
        # The reader of a pipe, such as `head`, has seen enough; and Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="robustloss",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"robustloss {__version__}")
    # `deepspeed` puts it before the arguments; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
