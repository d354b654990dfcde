r"""Op `preference_loss`: a loss of a batch of pairs with its gradient, worst case and statistics, in one pass.

.. math:: h_i = (\text{chosen}_i - \text{ref\_chosen}_i) - (\text{rejected}_i - \text{ref\_rejected}_i), \quad
          L = \text{aggregate}(\ell(h_1), \dots, \ell(h_B)), \quad \frac{\partial L}{\partial h_i} = P_i \, \ell'(h_i)

with the links, aggregates and their one parameter as `naive.preference_loss`. The op returns the value [], the gradient
by the margins [B], P [B] and the statistics [8] (`naive.preference_loss.STATISTICS`), in float32, or in float64 if a
log-probability is float64; only the value is differentiable, by chosen and rejected. The backward scales the gradient.
A second derivative, and the first under create_graph=True, is that of the naive composition, which on a GPU may make
the host wait. A KL tilt of given temperature differentiates
:math:`\tau \log \sum_i q_i e^{l_i/\tau}`.

Layouts: vectors [B] of any float dtypes and strides; None counts as zeros, and as equal weights. On the CPU NaN,
infinity, negative weights and weights that are all zero raise ValueError.
"""

from __future__ import annotations

import torch

from robustloss.naive import preference_loss as naive
from robustloss.naive.links import link_slope
from robustloss.naive.token_logps import samples_dtype
from robustloss.ops._library import LIBRARY, register_cpu_fallback, register_scaled_gradients, register_triton
from robustloss.validation import check_finite, check_weight_values

LIBRARY.define(
    "preference_loss(Tensor chosen, Tensor? rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? weights,"
    " str link, float beta, float label_smoothing, str aggregate, float parameter, float max_weight)"
    " -> (Tensor value, Tensor gradient, Tensor worst_case, Tensor statistics)"
)

register_triton("preference_loss", "preference_loss:preference_loss")

preference_loss = torch.ops.robustloss.preference_loss.default


def _composition(chosen, others, options, dtype):
    """The naive (value, P, statistics) of vectors brought to the computing dtype."""
    link, beta, label_smoothing, aggregate, parameter, max_weight = options
    return naive.preference_loss(
        chosen.to(dtype),
        *(None if x is None else x.to(dtype) for x in others),
        link=link,
        beta=beta,
        label_smoothing=label_smoothing,
        aggregate=aggregate,
        parameter=parameter,
        max_weight=max_weight,
    )


def _naive(chosen, rejected, ref_chosen, ref_rejected, weights, *options):
    logps = (chosen, rejected, ref_chosen, ref_rejected)
    for name, vector in zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), logps, strict=True):
        if vector is not None:
            check_finite(name, vector)
    if weights is not None:
        check_weight_values(weights)
    dtype = samples_dtype(*logps)
    value, worst_case, statistics = _composition(chosen, (*logps[1:], weights), options, dtype)
    if not torch.isfinite(value):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"the log-probabilities (or losses) are too large: the loss overflows {name}")
    link, beta, label_smoothing = options[:3]
    if link == "identity":
        return value, worst_case.clone(), worst_case, statistics
    others = [None if x is None else x.to(dtype) for x in logps[1:]]
    chosen_ratios, rejected_ratios = naive.logratios(chosen.to(dtype), *others)
    slope = link_slope(chosen_ratios - rejected_ratios, link=link, beta=beta, label_smoothing=label_smoothing)
    return value, worst_case * slope, worst_case, statistics


register_cpu_fallback("preference_loss", _naive)


@torch.library.register_fake("robustloss::preference_loss", lib=LIBRARY)
def _(chosen, rejected, ref_chosen, ref_rejected, weights, *options):
    dtype = samples_dtype(chosen, rejected, ref_chosen, ref_rejected)
    gradient = torch.empty(chosen.shape, dtype=dtype, device=chosen.device)
    return gradient.new_empty(()), gradient, torch.empty_like(gradient), gradient.new_empty(len(naive.STATISTICS))


def _value(chosen, rejected, ref_chosen, ref_rejected, weights, *options):
    dtype = samples_dtype(chosen, rejected, ref_chosen, ref_rejected)
    return _composition(chosen, (rejected, ref_chosen, ref_rejected, weights), options, dtype)[0]


register_scaled_gradients("preference_loss", 1, _value)
