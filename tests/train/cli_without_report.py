"""The command line, without the report at the end, which takes seconds to draw and has tests of its own."""

import sys

from robustloss import cli
from robustloss.train import report

if __name__ == "__main__":
    report.write_report = lambda run_dir: run_dir / "report.html"
    sys.exit(cli.main())
