"""`robustloss bench`: the library against its alternatives, on the machine at hand."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from robustloss._install import package_of, pip_install
from robustloss.cli._errors import fail
from robustloss.cli.completion import DIRECTORY, SUITES

PACKAGE = Path(__file__).resolve().parents[1]
DESCRIPTION = """\
Measure time and memory of the operations against the alternatives that are installed, and print the ratios.

  robustloss bench                                     everything: about 20 minutes on two cores
  robustloss bench --op soft_sort                      one suite
  robustloss bench --op soft_sort --tiny               tiny shapes: tries the suite, measures nothing of use
  robustloss bench --results results                   keep the results in results/, and go on from those there

Exit codes: 0 measured; 75 --seconds ran out (with --results the same command goes on); 2 a mistake in what was given;
others are pytest's.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the operations on this machine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    op = parser.add_argument("--op", help="measure one suite only, such as soft_sort")
    op.complete = SUITES
    results = parser.add_argument("--results", type=Path, metavar="DIR", help="append to DIR/<device>.jsonl")
    results.complete = DIRECTORY
    parser.add_argument("--again", action="store_true", help="measure also what --results holds already")
    parser.add_argument("--seconds", type=float, metavar="S", help="start no case after S seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the suite, measures nothing of use")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        packages = [package_of(name) for name in missing]
        told = f"{' and '.join(packages)}, which {'is' if len(packages) == 1 else 'are'} not installed"
        return fail(f"measuring needs {told}: {pip_install(*packages, extra='bench')}")
    suites = find_suites()
    if suites is None:
        return fail("this installation holds no benchmarks: reinstall robustloss, or run it from a source tree")
    if arguments.op not in (None, *suite_names(suites)):
        return fail(f"--op {arguments.op!r} is unknown; there are {', '.join(suite_names(suites))}")
    if arguments.results is not None:
        try:
            arguments.results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return fail(f"--results {str(arguments.results)!r} cannot be made a folder: {error.strerror}")
    # The suites and no other configuration; their processes for memory import them by name, wherever the user is.
    command = [sys.executable, "-m", "pytest", str(suites), "-q", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", f"--rootdir={suites}", "-c", os.devnull]
    for option in ("op", "results", "seconds"):
        value = getattr(arguments, option)
        if value is not None:
            command.append(f"--{option}={value}")
    command += [f"--{flag}" for flag in ("again", "tiny") if getattr(arguments, flag)]
    try:
        return subprocess.run(command, check=False, env=_environment(suites)).returncode
    except KeyboardInterrupt:
        return fail("interrupted; with --results the same command goes on", code=130)


def find_suites() -> Path | None:
    """The folder of the suites: installed as `robustloss.bench`, or `bench/` of the source tree."""
    for folder in (PACKAGE / "bench", PACKAGE.parent / "bench"):
        if (folder / "test_suites.py").is_file():
            return folder
    return None


def suite_names(suites: Path) -> list[str]:
    """Every module with a suite, by the name of its op; read and not imported, as they import the alternatives too."""
    return sorted(file.stem for file in suites.glob("*.py") if "\nSUITE = " in file.read_text(encoding="utf-8"))


def _environment(suites: Path) -> dict[str, str]:
    """What a test run around this one has set is none of the measurement's. A source tree's suites import each other as
    `bench`, so the tree must be on Python's path; installed ones are modules of robustloss."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if suites.parent != PACKAGE:
        path = [str(suites.parent), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment
