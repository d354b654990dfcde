r"""Op `sinkhorn_sort`: sorted values as barycentres of an entropic transport plan onto an increasing grid.

.. math:: C_j = \sum_i e_{ij} z_i, \quad e_{ij} = \exp(f_i + g_j + \tfrac{2}{\varepsilon} z_i y_j), \quad
          \sum_i e_{ij} = \sum_j e_{ij} = 1, \qquad s_j = \mu + \sigma C_j

with z = (x - mu) / sigma the standardised values, y the standardised grid of n equally spaced points, and epsilon the
`strength`. The squares of the squared distance are in the potentials f and g. Source: Cuturi, Teboul and Vert 2019,
arXiv 1905.11885, Eq. 6 and 8; the solvers are this library's (`naive.sinkhorn_sort` states the linear system, the
kernels its preconditioner).

The backward solves the adjoint of the two marginal conditions at the plan that was found, so nothing of the iterations
is kept. It has no derivative of its own.

Layouts: values [R, n] ascending along the row and contiguous; sorted [R, n] in values' dtype, ascending; the potentials
f and g [R, n] and error [R] in float64. The error is the largest deviation of a row's sum from 1, or of the first i
rows' from i over sqrt(n), which shows what is missing where the plan nearly falls apart.
"""

from __future__ import annotations

import torch

from robustloss.naive import sinkhorn_sort as naive
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_triton

LIBRARY.define(
    "sinkhorn_sort(Tensor values, float strength, int max_iterations, float tolerance)"
    " -> (Tensor sorted, Tensor row_potential, Tensor column_potential, Tensor error)"
)
LIBRARY.define(
    "sinkhorn_sort_bwd(Tensor grad_sorted, Tensor values, Tensor row_potential, Tensor column_potential,"
    " float strength, float tolerance) -> Tensor"
)

register_cpu_fallback("sinkhorn_sort", naive.sort_ascending)
register_cpu_fallback("sinkhorn_sort_bwd", naive.sort_ascending_bwd)
register_triton("sinkhorn_sort", "sinkhorn_sort:sinkhorn_sort")
register_triton("sinkhorn_sort_bwd", "sinkhorn_sort:sinkhorn_sort_bwd")


@torch.library.register_fake("robustloss::sinkhorn_sort", lib=LIBRARY)
def _(values, strength, max_iterations, tolerance):
    potential = torch.empty_like(values, dtype=torch.float64)
    return torch.empty_like(values), potential, torch.empty_like(potential), potential.new_empty(values.shape[0])


@torch.library.register_fake("robustloss::sinkhorn_sort_bwd", lib=LIBRARY)
def _(grad_sorted, values, row_potential, column_potential, strength, tolerance):
    return torch.empty_like(values)


def _save(ctx, inputs, output):
    values, ctx.strength, _, ctx.tolerance = inputs
    _, row_potential, column_potential, error = output
    ctx.save_for_backward(values, row_potential, column_potential)
    ctx.mark_non_differentiable(row_potential, column_potential, error)


def _backward(ctx, grad_sorted, *_):
    op = torch.ops.robustloss.sinkhorn_sort_bwd
    return op(grad_sorted, *ctx.saved_tensors, ctx.strength, ctx.tolerance), None, None, None


def _refuse(ctx, *_):
    raise RuntimeError("sinkhorn_sort has no second derivative; soft_sort has one")


torch.library.register_autograd("robustloss::sinkhorn_sort", _backward, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "robustloss::sinkhorn_sort_bwd", _refuse, setup_context=lambda *_, **__: None, lib=LIBRARY
)
