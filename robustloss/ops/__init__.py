"""One file per op: schema, fake, autograd and device dispatch. Importing this registers them all."""

from robustloss.ops import linear_token_logps, sequence_sum, token_logps

__all__ = ["linear_token_logps", "sequence_sum", "token_logps"]
