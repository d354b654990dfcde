"""Log-probabilities and log-ratios of sequences; sorting and transport, which are here too, from `robustloss.sorting`.

Everything here is a pure function of tensors, twice differentiable (`sinkhorn_sort` once), and works under
torch.compile(fullgraph=True), autocast and torch.no_grad. The functions share these arguments:

- `labels`: int64 or int32. Where a label equals `ignore_index`, nothing is counted; a sequence with no label left
  gives 0 and a zero gradient. On the CPU a label outside [0, V) raises ValueError; on a GPU it gives NaN,
  because looking would make the host wait.
- `temperature`: the logits are divided by it.
- `shift`: the Hugging Face convention: position t predicts labels[t + 1]. Done on the labels; logits are never copied.
- `average`: divide by the number of counted tokens.
- `cu_seqlens`: int32 or int64 [S + 1], the packed (padding-free) form: sequence s is tokens cu_seqlens[s] to
  cu_seqlens[s + 1].
- `return_entropy`: also return the entropy in nats, reduced like the log-probabilities; it carries no gradient.
- `return_statistics`: also return `TokenStatistics`, of the same read of the logits, reduced and without gradient too.

Logits may be -inf, for tokens that cannot occur. NaN, +inf, and hidden states and weights whose product overflows give
NaN, as they do in a model. Results are float32 whatever the input type (float64 for float64 input), in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss._inputs import (
    check_head,
    check_inplace,
    check_logits,
    check_packing,
    count_statistics,
    linear_options,
    local_part,
    prepare_labels,
)
from robustloss.naive.token_logps import statistics_dtype
from robustloss.ops._linear_head import Head, Options
from robustloss.ops.linear_token_logps_with_gradient import KnownGradient
from robustloss.ops.token_logps import InplaceTokenLogps
from robustloss.ops.trainable_linear_token_logps import TrainableHead
from robustloss.sorting import sinkhorn_sort, soft_rank, soft_sort, sorted_transport
from robustloss.validation import check_same_device, check_shape, check_tensor

__all__ = [
    "TokenStatistics",
    "linear_sequence_logps",
    "linear_sequence_logps_with_cotangent",
    "linear_sequence_logratios",
    "sequence_logps",
    "sequence_logratios",
    "sinkhorn_sort",
    "soft_rank",
    "soft_sort",
    "sorted_transport",
    "token_logps",
]


class TokenStatistics(NamedTuple):
    """What the softmax of the logits looks like: one value a token, or its sum (or mean) over a sequence."""

    entropy: Tensor  #: in nats
    top1: Tensor  #: 1 where no token has a larger logit than the label: accuracy, once averaged
    mean_logit: Tensor  #: over the vocabulary, before the temperature


def token_logps(
    logits: Tensor,  # [B, T, V] or [N, V]
    labels: Tensor,  # [B, T] or [N]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    shift: bool = False,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:  # [B, T] or [N]
    r"""Log-probability of each label: :math:`z_{y} - \log \sum_v e^{z_v}`, z = logits / temperature, in nats.

    Args:
        logits: [B, T, V] or [N, V], float32, bfloat16, float16 or float64, any strides.
        labels: the logits' shape without V.
        ignore_index, temperature, shift, return_statistics: see the module's docstring.

    Returns:
        [B, T] or [N] float32 (float64 for float64 logits); 0 where the label is `ignore_index`. With shift=True
        position t holds the log-probability of labels[t + 1] and the last position 0.

    Raises:
        TypeError: an argument that is no tensor or of another dtype.
        ValueError: shapes, devices or temperature that do not fit; a label outside [0, V) on the CPU.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])  # [1, 3, 2]
        >>> token_logps(logits, torch.tensor([[0, 1, -100]]))
        tensor([[-0.6931, -0.1269,  0.0000]])
    """
    check_logits(logits, labels, temperature)
    labels = prepare_labels(labels, shift, ignore_index, None)
    n_statistics = 3 if return_statistics else 0
    logps, statistics = _from_logits(logits, None, labels, ignore_index, temperature, n_statistics, False)
    return (logps, TokenStatistics(*statistics)) if return_statistics else logps


def sequence_logps(
    logits: Tensor,  # [B, T, V], or [N, V] or [1, N, V] with cu_seqlens
    labels: Tensor,  # [B, T], or [N] or [1, N]
    *,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    return_statistics: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, TokenStatistics]:  # [B]
    r"""Log-probability of each sequence, :math:`\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})` ([W] Eq. 3).

    Args:
        logits: [B, T, V], or [N, V] or [1, N, V] with `cu_seqlens`; float32, bfloat16, float16 or float64, any strides.
        labels: the logits' shape without V.
        ignore_index, average, temperature, shift, cu_seqlens, return_entropy, return_statistics: see the module's
            docstring.
        inplace_backward: the backward pass writes the gradient over the logits, so that training needs no second [B,
            T, V] tensor. The logits must not be needed afterwards, must not be a leaf or its view, and no second
            derivative is possible; both misuses raise. Under torch.compile, whose memory planning reuses the buffer
            itself, it has no effect.

    Returns:
        [B] (or [S] for S packed sequences) float32, float64 for float64 logits; with `return_entropy` also the
        entropy, with `return_statistics` also `TokenStatistics`, each value [B].

    Raises:
        TypeError, ValueError: as `token_logps`; also a cu_seqlens that does not run from 0 to N, and both of
            return_entropy and return_statistics.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])  # [1, 3, 2]
        >>> labels = torch.tensor([[0, 1, -100]])
        >>> sequence_logps(logits, labels)  # the third position is padding
        tensor([-0.8201])
        >>> sequence_logps(logits, labels, average=True)
        tensor([-0.4100])
        >>> sequence_logps(logits, labels, shift=True)  # position 0 predicts labels[1], and so on
        tensor([-0.6931])
    """
    n_statistics = count_statistics(return_entropy, return_statistics)
    check_logits(logits, labels, temperature)
    check_packing(labels, cu_seqlens)
    check_inplace(inplace_backward, "logits", logits)
    labels = prepare_labels(labels, shift, ignore_index, cu_seqlens)
    logps, statistics = _from_logits(logits, None, labels, ignore_index, temperature, n_statistics, inplace_backward)
    return _reduce(logps, statistics, labels, ignore_index, average, cu_seqlens)


def linear_sequence_logps(
    hidden: Tensor,  # [B, T, H], or [N, H] or [1, N, H] with cu_seqlens
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T], or [N] or [1, N]
    *,
    bias: Tensor | None = None,  # [V]
    adapter: tuple[Tensor, Tensor] | None = None,  # [B, T, R], [V, R]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    return_statistics: bool = False,
    chunk_size: int | None = None,
    recompute: bool = False,
    process_group: dist.ProcessGroup | None = None,
    vocabulary_start: int | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, TokenStatistics]:  # [B]
    r"""`sequence_logps` of the output head's logits, which are never held.

    .. math:: \text{logits} = s \cdot c \tanh\big((h W^\top + u U^\top + b) / c\big)

    With 2 N H V flops a product, N the counted tokens: 2 NHV where nothing needs a gradient, 4 NHV where only the
    hidden states do, 6 NHV (up to H tokens, 8 NHV for many more) where the weight does. See the module
    `robustloss.ops.linear_token_logps`. On a GPU the host waits for the number of counted tokens, so CUDA graphs
    do not take it, and torch.compile(mode="reduce-overhead") leaves it out of its own.

    Args:
        hidden: [B, T, H], or [N, H] or [1, N, H] with `cu_seqlens`: the last hidden states h.
        weight: [V, H], the output head W (`lm_head.weight`), of hidden's dtype (under autocast all are cast). A DTensor
            that is replicated, or sharded over the vocabulary, is taken as it is. FSDP2's shards are not such: there
            every process has hidden states of its own, so call this inside of the module that FSDP2 wraps.
        bias: [V], b.
        adapter: (u, U), hidden's shape with R for H and [V, R]: a low-rank addition to the head. LoRA's is (scaling *
            lora_A(dropout(hidden)), lora_B.weight).
        softcap: Gemma's logit soft cap c; None is no cap.
        logit_scale: Cohere's factor s of the logits (Granite divides by its).
        chunk_size: tokens whose logits may be held at a time; by default 6 MiB on a CPU, 1/256 of a GPU's memory.
        recompute: compute the logits again in the backward. By default those of the first H tokens wait in the
            memory of the weight's gradient, which is therefore allocated in the forward; with several calls before one
            backward these add up.
        process_group: the head is split over the vocabulary, a part a rank; hidden states and labels are the same on
            all of them. No second derivative.
        vocabulary_start: the first token of this rank's part; by default its rank times the part's size.
        labels and the rest: see the module's docstring.

    Returns:
        [B] float32 (float64 for float64 hidden states); with `return_entropy` also the entropy, with
        `return_statistics` also `TokenStatistics`.

    Raises:
        TypeError, ValueError: as `sequence_logps`; also tensors of the head that do not fit together.

    Example:
        >>> hidden, weight = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0.0], [1.0]])  # [1, 2, 1], [2, 1]
        >>> labels = torch.tensor([[0, 1]])
        >>> linear_sequence_logps(hidden, weight, labels), sequence_logps(hidden @ weight.T, labels)
        (tensor([-1.4402]), tensor([-1.4402]))
    """
    n_statistics = count_statistics(return_entropy, return_statistics)
    weight, bias, process_group, vocabulary_start = local_part(weight, bias, process_group, vocabulary_start)
    whole = process_group is None
    head = check_head(hidden, weight, bias, adapter, labels, temperature, ignore_index, whole)
    check_packing(labels, cu_seqlens)
    labels = prepare_labels(labels, shift, ignore_index, cu_seqlens)
    options = linear_options(ignore_index, temperature, softcap, logit_scale, chunk_size)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, statistics = _from_hidden(
            head, labels.flatten(), options, n_statistics, recompute, process_group, vocabulary_start or 0
        )
    if n_statistics == 3 and logit_scale != 1.0:
        statistics = torch.cat([statistics[:2], logit_scale * statistics[2:]])
    return _reduce(
        logps.view(labels.shape),
        statistics.view(n_statistics, *labels.shape),
        labels,
        ignore_index,
        average,
        cu_seqlens,
    )


def linear_sequence_logps_with_cotangent(
    hidden: Tensor,  # [B, T, H], or [N, H] or [1, N, H] with cu_seqlens
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T], or [N] or [1, N]
    cotangent: Tensor,  # [B]
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # scalar, [B]
    r"""`linear_sequence_logps` where dL/dlogps is known beforehand: log-probabilities and gradients in one pass, 6 NHV.

    Args:
        cotangent: [B] (or [S] packed), :math:`c_i = \partial L / \partial \log \pi(y_i \mid x_i)`, held fixed. A sum of
            log-probabilities has ones; a loss of the whole batch has what a first pass without gradient found.
        hidden, weight and the rest: as `linear_sequence_logps`.

    Returns:
        (surrogate, logps): :math:`\sum_i c_i \log \pi(y_i \mid x_i)`, whose backward hands out the gradients that the
        forward has made (once, and only first derivatives), and the [B] log-probabilities, without gradient.

    Raises:
        TypeError, ValueError: as `linear_sequence_logps`; also a cotangent that is not one number a sequence.
        RuntimeError: a second backward.
    """
    weight, bias, process_group, _ = local_part(weight, bias, None, None)
    if process_group is not None:
        raise ValueError("weight is sharded over the vocabulary; use linear_sequence_logps, which can be split")
    head = check_head(hidden, weight, bias, adapter, labels, temperature, ignore_index, whole=True)
    check_packing(labels, cu_seqlens)
    n_sequences = labels.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    check_shape("cotangent", check_tensor("cotangent", cotangent), (n_sequences,), "one number a sequence")
    check_same_device("cotangent", cotangent, "hidden", hidden)
    labels = prepare_labels(labels, shift, ignore_index, cu_seqlens)
    options = linear_options(ignore_index, temperature, softcap, logit_scale, chunk_size)
    flat = labels if cu_seqlens is None else labels.flatten()
    with torch.autocast(hidden.device.type, enabled=False):
        with torch.enable_grad():
            # The adjoint of the sum over tokens, as autograd has it.
            dtype = statistics_dtype(head.hidden.dtype)
            zeros = torch.zeros(flat.shape, dtype=dtype, device=flat.device, requires_grad=True)
            sums, _ = torch.ops.robustloss.sequence_sum(zeros, flat, cu_seqlens, ignore_index, average)
            (grad_logps,) = torch.autograd.grad(sums, zeros, cotangent.detach().to(sums.dtype))
        surrogate, logps = KnownGradient.apply(
            *head, labels.flatten(), grad_logps.flatten(), options, _needs_gradient(head)
        )
    logps = _reduce(logps.view(labels.shape), logps.new_empty(0), labels, ignore_index, average, cu_seqlens)
    return surrogate, cast(Tensor, logps)


def sequence_logratios(
    policy_logits: Tensor,  # [B, T, V], or [N, V] or [1, N, V] with cu_seqlens
    ref_logits: Tensor,  # policy_logits' shape
    labels: Tensor,  # [B, T], or [N] or [1, N]
    *,
    ignore_index: int = -100,
    average: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # [B]
    """Log-ratio of each sequence, log pi(y|x) - log pi_ref(y|x), both logits read by one kernel; no gradient reaches
    the reference.

    Args:
        policy_logits, ref_logits: as `sequence_logps`'s; one shape, any two dtypes.
        inplace_backward: as `sequence_logps`'s; it concerns the policy's logits.
        labels and the rest: see the module's docstring.

    Returns:
        [B] float32 (float64 for float64 policy_logits), in nats.
    """
    check_logits(policy_logits, labels, temperature, "policy_logits")
    check_shape("ref_logits", check_tensor("ref_logits", ref_logits), policy_logits.shape, "policy_logits' shape")
    check_same_device("ref_logits", ref_logits, "policy_logits", policy_logits)
    check_packing(labels, cu_seqlens)
    check_inplace(inplace_backward, "policy_logits", policy_logits)
    labels = prepare_labels(labels, shift, ignore_index, cu_seqlens)
    logratios, _ = _from_logits(
        policy_logits, ref_logits.detach(), labels, ignore_index, temperature, 0, inplace_backward
    )
    return cast(Tensor, _reduce(logratios, logratios.new_empty(0), labels, ignore_index, average, cu_seqlens))


def linear_sequence_logratios(
    policy_hidden: Tensor,  # [B, T, H]
    policy_weight: Tensor,  # [V, H]
    ref_hidden: Tensor,  # [B, T, H']
    ref_weight: Tensor,  # [V, H']
    labels: Tensor,  # [B, T]
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:  # [B]
    """Log-ratio of each sequence from both models' hidden states; no gradient reaches the reference.

    The reference's pass is over, and its workspace free, before the policy's begins.

    Args:
        policy_hidden, policy_weight, policy_bias: as `linear_sequence_logps`.
        ref_hidden, ref_weight, ref_bias: the reference model's; its hidden size may differ, its vocabulary may not.
        options: `linear_sequence_logps`'s, except bias, return_entropy and return_statistics; `adapter` and
            `recompute` concern the policy only.

    Returns:
        [B] float32 (float64 for float64 hidden states), in nats.
    """
    if len(check_tensor("ref_weight", ref_weight)) != len(check_tensor("policy_weight", policy_weight)):
        raise ValueError(f"ref_weight must have policy_weight's {len(policy_weight)} rows, got {len(ref_weight)}")
    if options.get("return_entropy") or options.get("return_statistics"):
        raise TypeError("a log-ratio has no entropy: call linear_sequence_logps with return_entropy=True instead")
    with torch.no_grad():
        ref_options = {**options, "adapter": None, "bias": ref_bias}
        ref_logps = linear_sequence_logps(ref_hidden, ref_weight, labels, **ref_options)
    policy_logps = linear_sequence_logps(policy_hidden, policy_weight, labels, bias=policy_bias, **options)
    return cast(Tensor, policy_logps) - cast(Tensor, ref_logps)


# ---- what goes out ------------------------------------------------------------------------------------------------


def _from_logits(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    n_statistics: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities, or log-ratios where there is a reference, and statistics, in labels' shape."""
    rows, ref_rows = (None if value is None else _rows(value) for value in (logits, ref_logits))
    assert rows is not None
    row_labels, temperature = labels.view(rows.shape[:-1]), float(temperature)
    if inplace_backward and not torch.compiler.is_compiling():
        values, statistics = InplaceTokenLogps.apply(
            rows, ref_rows, row_labels, ignore_index, temperature, n_statistics
        )
    elif ref_rows is None:
        values, _, statistics = torch.ops.robustloss.token_logps(
            rows, row_labels, ignore_index, temperature, None, n_statistics
        )
    else:
        values, _ = torch.ops.robustloss.token_logratios(rows, ref_rows, row_labels, ignore_index, temperature)
        statistics = values.new_empty(0)
    return values.view(labels.shape), statistics.view(n_statistics, *labels.shape)


def _rows(logits: Tensor) -> Tensor:
    """[B, T, V] with unit stride in V."""
    rows = logits if logits.ndim == 3 else logits.unsqueeze(0)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _from_hidden(
    head: Head,
    labels: Tensor,  # [N]
    options: Options,
    n_statistics: int,
    recompute: bool,
    process_group: dist.ProcessGroup | None,
    vocabulary_start: int,
) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities and statistics, in the regime that the gradients that are needed ask for."""
    needs = _needs_gradient(head)
    waits = needs[1] and not recompute and not torch.compiler.is_compiling()
    if process_group is not None or waits:
        logps, _, statistics = TrainableHead.apply(
            *head, labels, options, n_statistics, waits, process_group, vocabulary_start
        )
    elif needs == [True, False, False, False, False]:
        logps, _, statistics, _ = torch.ops.robustloss.frozen_linear_token_logps(*head, labels, *options, n_statistics)
    else:
        logps, _, statistics = torch.ops.robustloss.linear_token_logps(*head, labels, *options, n_statistics)
    return logps, statistics


def _needs_gradient(head: Head) -> list[bool]:
    return [value is not None and value.requires_grad and torch.is_grad_enabled() for value in head]


def _reduce(
    logps: Tensor,
    statistics: Tensor,  # [n, ...]
    labels: Tensor,
    ignore_index: int,
    average: bool,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, TokenStatistics]:
    if cu_seqlens is not None:
        labels = labels.flatten()

    def total(values: Tensor) -> Tensor:
        return torch.ops.robustloss.sequence_sum(values.view(labels.shape), labels, cu_seqlens, ignore_index, average)[
            0
        ]

    # Iterating over none of them would leave a node in an exported program that torch.export.load refuses.
    reduced = [total(statistics[index]) for index in range(statistics.shape[0])]
    if not reduced:
        return total(logps)
    return (total(logps), TokenStatistics(*reduced)) if len(reduced) == 3 else (total(logps), reduced[0])
