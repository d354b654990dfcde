r"""Op `sorted_transport`: the optimal transport of one sample to another on the line, in one pass with its gradient.

.. math:: L = \int_0^1 \ell\left(F_u^{-1}(s) - F_v^{-1}(s)\right) ds = \sum_c w_c \, \ell(h_c), \qquad
          \frac{\partial L}{\partial u_i} = \sum_{c \in i} w_c \, \ell'(h_c)

over the cells c of the two merged quantile grids, of mass w_c and margin h_c, where :math:`c \in i` are those of
sample i ([A] section 3; `naive.sorted_transport`). Where n = m without weights it is the mean over the order
statistics, on the CPU to the bit what `preference_loss` gives for them.

Layouts: (a) u, u_ref, u_weights [R, n] and v, v_ref, v_weights [R, m], the samples being u - u_ref and v - v_ref; or
(b) desirable, bool [R, n], instead of v: u's desirable samples against its others. None for a reference is zeros, for
weights ones; a sample of weight zero is absent, and a side without samples gives 0. Any float dtypes and strides.
Vectors [n] and [m] are one row, without the R everywhere.

value [R]; u_gradient [R, n] and v_gradient [R, m] ((b): [0]), the derivatives of each row's value; statistics [R, 2],
the dominance violation's area and w1. All float32, or float64 if any sample is. Only the value is differentiable: by u
and v, and by the references, which are no constants here. The CPU refuses NaN, infinity and negative weights
(ValueError); an accelerator does not look, as in `validation.check_finite`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustloss.naive import sorted_transport as naive
from robustloss.naive.links import link_slope
from robustloss.naive.token_logps import samples_dtype
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_scaled_gradients, register_triton
from robustloss.validation import check_finite

LIBRARY.define(
    "sorted_transport(Tensor u, Tensor? u_ref, Tensor? v, Tensor? v_ref, Tensor? desirable, Tensor? u_weights,"
    " Tensor? v_weights, str link, float beta, float label_smoothing)"
    " -> (Tensor value, Tensor u_gradient, Tensor v_gradient, Tensor statistics)"
)

register_triton("sorted_transport", "sorted_transport:sorted_transport")

sorted_transport = torch.ops.robustloss.sorted_transport.default


def _naive(
    u: Tensor,
    u_ref: Tensor | None,
    v: Tensor | None,
    v_ref: Tensor | None,
    desirable: Tensor | None,
    u_weights: Tensor | None,
    v_weights: Tensor | None,
    link: str,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"u": u, "u_ref": u_ref, "v": v, "v_ref": v_ref, "u_weights": u_weights, "v_weights": v_weights}
    for name, tensor in given.items():
        if tensor is not None:
            check_finite(name, tensor)
            if name.endswith("weights") and bool((tensor < 0).any()):
                raise ValueError(f"{name} must be >= 0, got a minimum of {tensor.min().item():g}")
    options = {"link": link, "beta": beta, "label_smoothing": label_smoothing}
    tensors = (u, u_ref, v, v_ref, desirable, u_weights, v_weights)
    value, statistics = naive.sorted_transport(*tensors, **options)
    first, second, *weights = naive.two_samples(*tensors)
    # Below the dispatcher's autograd, where torch.autograd has nothing to say.
    u_cells, v_cells, mass = naive.match(first, second, *weights)
    margins = first.gather(-1, u_cells) - second.gather(-1, v_cells)
    slopes = torch.ones_like(margins) if link == "identity" else link_slope(margins, **options)
    slopes = slopes / max(u.shape[-1], 1) if mass is None else slopes * mass
    u_gradient = torch.zeros_like(first).scatter_add(-1, u_cells, slopes)
    v_gradient = torch.zeros_like(second).scatter_add(-1, v_cells, -slopes)
    if v is None:
        return value, u_gradient + v_gradient, value.new_empty(0), statistics
    return value, u_gradient, v_gradient, statistics


register_cpu_fallback("sorted_transport", _naive)


@torch.library.register_fake("robustloss::sorted_transport", lib=LIBRARY)
def _(u, u_ref, v, v_ref, desirable, u_weights, v_weights, link, beta, label_smoothing):
    value = torch.empty(u.shape[:-1], dtype=samples_dtype(u, u_ref, v, v_ref), device=u.device)
    v_shape = (0,) if v is None else v.shape
    return value, value.new_empty(u.shape), value.new_empty(v_shape), value.new_empty(*value.shape, 2)


def _value(*arguments):
    *tensors, link, beta, label_smoothing = arguments
    return naive.sorted_transport(*tensors, link=link, beta=beta, label_smoothing=label_smoothing)[0]


register_scaled_gradients("sorted_transport", 2, _value)
