"""The command line. One module a command; what takes long to import is imported where a command runs, not here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from robustloss._version import __version__
from robustloss.cli import bench, completion, doctor, losses, report, train

DESCRIPTION = """\
Fine-tune causal language models with distributional preference losses.

  robustloss train                        train: with no arguments a demonstration of half a minute, on any machine
  robustloss losses kldpo                 what there is to train with: formula, options, a line for the config
  robustloss report runs/a runs/b         runs side by side, in one HTML file
  robustloss doctor                       what is installed, and which code serves each operation here
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
    parser = argparse.ArgumentParser(
        prog="robustloss",
        description=DESCRIPTION,
        epilog="robustloss COMMAND --help tells more. Exit codes: 0 done; 2 a mistake in what was given; 1 others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"robustloss {__version__}")
    # `deepspeed` puts it before the arguments; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
