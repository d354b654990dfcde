"""All suites, by op."""

from . import coupled_losses, linear_sequence_logps, sequence_logps, soft_sort, training_step

SUITES = {
    module.SUITE.op: module.SUITE
    for module in (sequence_logps, linear_sequence_logps, coupled_losses, soft_sort, training_step)
}
