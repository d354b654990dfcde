"""`python -m robustloss.bench [--op OP] ...`, in the tree also `python -m bench`: pytest on this folder."""

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), *sys.argv[1:]]))
