"""What the tests and their worker share."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

# Four microbatches a step, or one.
SHORT = ["--steps", "3", "--batch", "16", "--learning-rate", "0.01", "--microbatch", "4"]
GIANT = ["--steps", "3", "--batch", "16", "--learning-rate", "0.01", "--microbatch", "16"]

init = torch.optim.AdamW.__init__


def with_large_epsilon(optimizer, *arguments, **options):
    """AdamW of another epsilon: with its own, a gradient that is wrong by a factor would give the same training."""
    init(optimizer, *arguments, **{**options, "eps": 0.01})
