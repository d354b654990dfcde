"""One file per op: schema, fake, autograd and device dispatch. Importing this registers them all."""

from robustloss.ops import (
    frozen_linear_token_logps,
    linear_token_logps,
    linear_token_logps_with_gradient,
    preference_loss,
    sequence_sum,
    sinkhorn_sort,
    soft_sort,
    sorted_transport,
    token_logps,
    token_logratios,
    trainable_linear_token_logps,
)

__all__ = [
    "frozen_linear_token_logps",
    "linear_token_logps",
    "linear_token_logps_with_gradient",
    "preference_loss",
    "sequence_sum",
    "sinkhorn_sort",
    "soft_sort",
    "sorted_transport",
    "token_logps",
    "token_logratios",
    "trainable_linear_token_logps",
]
