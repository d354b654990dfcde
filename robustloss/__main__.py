"""`python -m robustloss`, as `torchrun -m robustloss train` and `deepspeed --module robustloss train` start it."""

import sys

from robustloss.cli import main

if __name__ == "__main__":
    sys.exit(main())
