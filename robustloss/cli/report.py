"""`robustloss report RUN [RUN ...]`: one run's report anew, or several runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustloss.cli._errors import fail, fail_missing
from robustloss.cli.completion import DIRECTORY, FILE

DESCRIPTION = """\
Reports of training runs, from their folders alone: no model and no GPU is needed. A run may still be at work.

  robustloss report runs/a                                draw runs/a/report.html again
  robustloss report runs/a runs/b --output a-and-b.html   side by side: curves, final numbers, what was set differently
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="draw the report of a run again, or compare runs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runs = parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output_dir of a training run")
    runs.complete = DIRECTORY
    output = parser.add_argument(
        "--output", type=Path, help="the HTML file; without it RUN/report.html, or of several runs comparison.html here"
    )
    output.complete = FILE
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    output = arguments.output
    if output is not None and output.is_dir():
        return fail(f"--output {str(output)!r} is a folder: name the HTML file in it")
    if output is not None and not output.parent.is_dir():
        return fail(f"--output {str(output)!r} is in no folder that exists: make {str(output.parent)!r} first")
    try:
        from robustloss.train.comparison import write_comparison
        from robustloss.train.report import write_report
    except ModuleNotFoundError as error:
        return fail_missing("a report", error, "train")

    try:
        if len(arguments.runs) == 1:
            page = write_report(arguments.runs[0], output)
        else:
            page = write_comparison(arguments.runs, output or Path("comparison.html"))
    except ValueError as error:  # names the folder and the file
        return fail(str(error))
    except OSError as error:
        # Its file may be the temporary one that would have become the page.
        return fail(f"the report could not be made: {error.strerror or error}", code=1)
    print(f"report: {page}")
    return 0
