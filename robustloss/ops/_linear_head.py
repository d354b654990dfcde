r"""What the ops on an output head share: the logits by the tile, what is known of a tile, and the derivatives.

.. math:: a = h W^\top + u U^\top + b, \quad \log p = z_y - \mathrm{lse}(z), \quad z = c \tanh(a / c) / T

with the bias b, the soft cap c, the temperature T and the low-rank adapter (u, U) optional. The [N, V] logits are never
held: they are made a tile at a time in one workspace, and each tile goes through the row kernels of `token_logps`.
Tokens whose label is `ignore_index` are dropped before any product.

A tile is all counted tokens by a part of the vocabulary wherever possible: then every entry of the weight's gradient is
one product over all tokens, summed in float32 by the BLAS and rounded once, where chunks of tokens would round, or read
and write the whole gradient, many times. Chunks of tokens remain where a gradient is made before the next tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustloss.naive.token_logps import statistics_dtype
from robustloss.ops.token_logps import pair_gradient

# Of the ops' schemas.
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapter_hidden, Tensor? adapter_weight"
OPTIONS = "int ignore_index, float temperature, float? softcap, int? chunk_size"
# The host waits for the number of counted tokens, which a CUDA graph cannot.
TAGS = (torch.Tag.cudagraph_unsafe,)

EVERY_TOKEN = -1  # an ignore_index for rows that are all counted
NARROWEST_TILE = 256  # columns; narrower products are bound by reading the hidden states


class Options(NamedTuple):
    ignore_index: int
    temperature: float
    softcap: float | None
    chunk_size: int | None  # tokens whose logits the workspace holds; None for a size by the device

    def workspace_logits(self, weight: Tensor) -> int:
        """Logits that the workspace holds: `chunk_size` tokens' worth, or by the device.

        6 MiB on a CPU: its cache holds them between the products and the row kernels, and tiles are still wide enough
        for products at full speed. 1/256 of a GPU's memory: thousands of columns, for few launches. Its memory, not
        what is free of it: that differs from run to run, and with it would the order of summation and the last bits.
        """
        if self.chunk_size is not None:
            return self.chunk_size * len(weight)
        size = 6 << 20
        if weight.is_cuda:
            size = torch.cuda.get_device_properties(weight.device).total_memory // 256
        return size // weight.element_size()


class Head(NamedTuple):
    """What the logits are made of; see the module's docstring."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    adapter_hidden: Tensor | None
    adapter_weight: Tensor | None

    @property
    def products(self) -> list[tuple[int, Tensor, Tensor]]:
        """(where the left factor stands among the five, left [N, .], right [V, .]): logits = sum left @ right.T + bias.

        The right factor stands behind the left one.
        """
        products = [(0, self.hidden, self.weight)]
        if self.adapter_hidden is not None and self.adapter_weight is not None:
            products.append((3, self.adapter_hidden, self.adapter_weight))
        return products

    def of_tokens(self, index: Tensor | slice) -> Head:
        adapter_hidden = None if self.adapter_hidden is None else self.adapter_hidden[index]
        return self._replace(hidden=self.hidden[index], adapter_hidden=adapter_hidden)

    def write_logits(self, tile: slice, out: Tensor) -> Tensor:
        """The logits of the tile's tokens of the vocabulary, before the soft cap."""
        if self.bias is None:
            torch.mm(self.hidden, self.weight[tile].t(), out=out)
        else:
            torch.addmm(self.bias[tile], self.hidden, self.weight[tile].t(), out=out)
        for _, left, right in self.products[1:]:
            out.addmm_(left, right[tile].t())
        return out


class Part(NamedTuple):
    """What is known of K tokens from a part of the vocabulary."""

    logps: Tensor  # [K], within the part; NaN where the label is in another part
    lse: Tensor  # [2, K]
    statistics: Tensor  # [n, K]
    size: int | Tensor  # of the part, in tokens of the vocabulary


def log_shares(lses: Tensor) -> tuple[Tensor, Tensor]:  # of [parts, 2, K]: [2, K] and [parts, K]
    """The log-sum-exp of the union, and the log of each part's share of its sum.

    Maxima and log-sums are merged apart, so that large logits keep their digits.
    """
    largest = lses[:, 0].amax(0)
    # A part that is all -inf weighs nothing, whatever its log-sum.
    log_weights = torch.where(lses[:, 0] == -float("inf"), -float("inf"), lses[:, 0] - largest + lses[:, 1])
    log_sum = log_weights.logsumexp(0)
    return torch.stack([largest, log_sum]), log_weights - log_sum


def merge(parts: list[Part]) -> Part:
    """What is known from the union of the parts."""
    if len(parts) == 1:
        return parts[0]
    lse, shares = log_shares(torch.stack([part.lse for part in parts]))
    logps = torch.full_like(lse[0], float("nan"))
    statistics = torch.zeros_like(parts[0].statistics)
    for part, log_share in zip(parts, shares, strict=True):
        logps = torch.where(part.logps.isnan(), logps, part.logps + log_share)
        if len(statistics):
            share = log_share.exp()
            statistics[0] += torch.where(share > 0, share * (part.statistics[0] - log_share), 0.0)
        if len(statistics) > 1:
            statistics[1] += torch.where(part.lse[0] == lse[0], part.statistics[1], 0.0)
            statistics[2] += part.statistics[2] * part.size
    size = sum(part.size for part in parts)
    if len(statistics) > 1:
        statistics[2] /= size
    return Part(logps, lse, statistics, size)


def tiles(n_vocabulary: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, n_vocabulary)) for start in range(0, n_vocabulary, width))


def tile_width(n_tokens: int, head: Head, options: Options) -> int:
    """Columns of a tile that has all tokens: as many as the workspace holds, in even parts of whole 128s."""
    n_vocabulary = len(head.weight)
    most = max(NARROWEST_TILE, options.workspace_logits(head.weight) // max(1, n_tokens))
    n_tiles = -(-n_vocabulary // most)
    width = -(-n_vocabulary // n_tiles)
    return min(n_vocabulary, -(-width // 128) * 128)


def kept_tokens(head: Head, labels: Tensor, ignore_index: int) -> tuple[Tensor | slice, Head, Tensor]:
    """The tokens that count: where they are, their rows, and their labels. Nothing is copied where all do."""
    kept = (labels != ignore_index).nonzero().squeeze(-1)
    if len(kept) == len(labels):
        return slice(None), head, labels
    return kept, head.of_tokens(kept), labels[kept]


def tile_part(logits: Tensor, labels: Tensor, tile: slice, whole: bool, options: Options, n_statistics: int) -> Part:
    """What a tile's logits say; `tile` is in the labels' count, and `whole` where it is the whole vocabulary."""
    label = labels - tile.start
    inside = (label >= 0) & (label < tile.stop - tile.start)
    outputs = torch.ops.robustloss.token_logps(
        logits.unsqueeze(0),
        torch.where(inside, label, 0).unsqueeze(0),
        EVERY_TOKEN,
        *options[1:3],
        n_statistics,
    )
    logps, lse, statistics = outputs[0][0], outputs[1][:, 0], outputs[2][:, 0]
    if not whole:  # of a whole row that is -inf no softmax exists
        logps = torch.where(lse[0] == -float("inf"), -float("inf"), logps)
    if n_statistics > 1:
        statistics[1] *= inside
    return Part(torch.where(inside, logps, float("nan")), lse, statistics, tile.stop - tile.start)


def statistics_of(
    head: Head,
    labels: Tensor,
    options: Options,
    n_statistics: int,
    width: int,
    storage: Callable[[slice], Tensor],
    vocabulary_start: int = 0,
) -> Part:
    """One pass over the vocabulary; `storage` says where a tile's logits go."""
    parts = []
    for tile in tiles(len(head.weight), width):
        logits = head.write_logits(tile, storage(tile))
        place = slice(vocabulary_start + tile.start, vocabulary_start + tile.stop)
        parts.append(tile_part(logits, labels, place, width >= len(head.weight), options, n_statistics))
    return merge(parts)


def spread(values: Tensor, kept: Tensor | slice, n_tokens: int, dim: int = 0) -> Tensor:
    """The counted tokens' values along `dim` among all tokens', 0 elsewhere."""
    if isinstance(kept, slice):
        return values
    shape = list(values.shape)
    shape[dim] = n_tokens
    return values.new_zeros(shape).index_copy_(dim, kept, values)


def scatter(part: Part, kept: Tensor | slice, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, lse, statistics) of all tokens, 0 where they do not count."""
    logps, lse, statistics = (spread(value, kept, n_tokens, dim=-1) for value in part[:3])
    return logps, lse, statistics


def workspace(head: Head, width: int) -> Callable[[slice], Tensor]:
    """Room for one tile's logits, used again for each."""
    n_tokens = len(head.hidden)
    room = head.hidden.new_empty(n_tokens * width)

    def storage(tile: slice) -> Tensor:
        width = tile.stop - tile.start
        return room[: n_tokens * width].view(n_tokens, width)

    return storage


def waiting_room(gradient: Tensor, n_tokens: int) -> Callable[[slice], Tensor]:
    """Where `n_tokens` <= H tokens' logits of a tile wait in the weight's gradient [V, H]: among the tile's rows."""
    n_hidden = gradient.shape[1]
    flat = gradient.view(-1)

    def storage(tile: slice) -> Tensor:
        width = tile.stop - tile.start
        return flat[tile.start * n_hidden :][: n_tokens * width].view(n_tokens, width)

    return storage


def forward(
    head: Head, labels: Tensor, options: Options, n_statistics: int, vocabulary_start: int = 0
) -> tuple[Part, Tensor | slice]:
    """No gradient, or one that recomputes."""
    kept, rows, kept_labels = kept_tokens(head, labels, options.ignore_index)
    width = tile_width(len(kept_labels), rows, options)
    storage = workspace(rows, width)
    return statistics_of(rows, kept_labels, options, n_statistics, width, storage, vocabulary_start), kept


def forward_waiting(
    head: Head, labels: Tensor, options: Options, n_statistics: int, vocabulary_start: int, gradient: Tensor
) -> tuple[Part, Tensor | slice]:
    """The forward that leaves the logits of the first H tokens in `gradient`, until `backward` comes for them."""
    kept, rows, kept_labels = kept_tokens(head, labels, options.ignore_index)
    width = tile_width(len(kept_labels), rows, options)
    n_waiting = min(len(kept_labels), gradient.shape[1])
    arguments = (options, n_statistics, width)
    waiting, others = rows.of_tokens(slice(n_waiting)), rows.of_tokens(slice(n_waiting, None))
    storage = waiting_room(gradient, n_waiting)
    part = statistics_of(waiting, kept_labels[:n_waiting], *arguments, storage, vocabulary_start)
    if len(others.hidden):
        storage = workspace(others, width)
        rest = statistics_of(others, kept_labels[n_waiting:], *arguments, storage, vocabulary_start)
        both = [torch.cat(pair, -1) for pair in zip(part[:3], rest[:3], strict=True)]
        part = Part(both[0], both[1], both[2], part.size)
    return part, kept


def forward_with_jacobian(
    head: Head, labels: Tensor, options: Options, n_statistics: int
) -> tuple[Part, Tensor | slice, Tensor]:
    r"""The forward that also makes J = d logp / dh [K, H], in one pass over the vocabulary.

    As in attention, an average under a softmax can be had by tiles: with p of a tile's own softmax and the tile's share
    sigma of the whole, J = (sum_tiles sigma (1_y - p) s' W + (1 - sigma_y) s'_y W_y) / T, and earlier tiles' shares
    shrink as later ones come. Nowhere is 1 - p taken of a p that is nearly 1.
    """
    kept, rows, kept_labels = kept_tokens(head, labels, options.ignore_index)
    width = tile_width(len(kept_labels), rows, options)
    storage = workspace(rows, width)
    whole = width >= len(head.weight)
    jacobian = torch.zeros(rows.hidden.shape, dtype=statistics_dtype(head.hidden.dtype), device=labels.device)
    parts, so_far = [], None
    for tile in tiles(len(head.weight), width):
        logits = rows.write_logits(tile, storage(tile))
        part = tile_part(logits, kept_labels, tile, whole, options, n_statistics)
        parts.append(part)
        share = torch.ones_like(part.logps)
        if so_far is None:
            so_far = part.lse
        else:
            so_far, shares = log_shares(torch.stack([so_far, part.lse]))
            jacobian *= shares[0].exp().unsqueeze(-1)
            share = shares[1].exp()
        # A tile that is all -inf has the gradient 0 under any finite log-sum-exp, and no other.
        lse = part.lse if whole else torch.where(part.lse[0] == -float("inf"), 0.0, part.lse)
        row_gradient(share, logits, kept_labels, lse, options, tile.start, logits)
        add_product(jacobian, logits, head.weight[tile])

    if len(parts) > 1:
        _, shares = log_shares(torch.stack([part.lse for part in parts]))
        others = torch.zeros_like(parts[0].logps)
        for part, log_share in zip(parts, shares, strict=True):
            others = torch.where(part.logps.isnan(), others, -torch.expm1(log_share))
        target = torch.where((kept_labels >= 0) & (kept_labels < len(head.weight)), kept_labels, 0)
        slope = 1.0
        if options.softcap is not None:
            logit = torch.zeros_like(others) if head.bias is None else head.bias[target].to(others.dtype)
            for _, left, right in rows.products:
                logit = logit + (left.to(logit.dtype) * right[target].to(logit.dtype)).sum(-1)
            slope = torch.cosh(logit / options.softcap).square().reciprocal()
        jacobian.addcmul_(head.weight[target].to(jacobian.dtype), (others * slope / options.temperature).unsqueeze(-1))
    return merge(parts), kept, jacobian


def row_gradient(
    grad_logps: Tensor,  # [K]
    logits: Tensor,  # [K, tile]
    labels: Tensor,  # [K]
    lse: Tensor,  # [2, K]
    options: Options,
    vocabulary_start: int,
    out: Tensor,  # [K, tile], possibly the logits
) -> None:
    """The gradient of a tile's logits."""
    torch.ops.robustloss.token_logps_bwd_out(
        grad_logps.unsqueeze(0),
        logits.unsqueeze(0),
        labels.unsqueeze(0),
        lse.unsqueeze(1),
        EVERY_TOKEN,
        *options[1:3],
        vocabulary_start,
        out.unsqueeze(0),
    )


def backward(
    grad_logps: Tensor,
    head: Head,
    labels: Tensor,
    lse: Tensor,
    options: Options,
    needs: list[bool],
    vocabulary_start: int = 0,
    waiting: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients that are needed, of the head's five tensors; `waiting` becomes the weight's."""
    kept, rows, kept_labels = kept_tokens(head, labels, options.ignore_index)
    n_tokens = len(kept_labels)
    upstream, kept_lse = grad_logps[kept], lse[:, kept]
    width = tile_width(n_tokens, rows, options)
    storage = workspace(rows, width)
    n_waiting = 0 if waiting is None else min(n_tokens, waiting.shape[1])
    others = rows.of_tokens(slice(n_waiting, None))

    gradients: dict[int, Tensor] = {}  # by place among the five
    for place, left, right in rows.products:
        if needs[place]:
            gradients[place] = torch.zeros(left.shape, dtype=statistics_dtype(left.dtype), device=left.device)
        if needs[place + 1]:
            gradients[place + 1] = torch.empty_like(right) if waiting is None or place else waiting
    if needs[2]:
        gradients[2] = head.weight.new_empty(len(head.weight))

    for tile in tiles(len(head.weight), width):
        gradient = storage(tile)  # of the logits
        logits = [] if waiting is None else [(slice(n_waiting), waiting_room(waiting, n_waiting)(tile))]
        if n_waiting < n_tokens:
            rest = slice(n_waiting, n_tokens)
            logits.append((rest, others.write_logits(tile, gradient[rest])))
        for tokens, values in logits:
            row_gradient(
                upstream[tokens],
                values,
                kept_labels[tokens],
                kept_lse[:, tokens],
                options,
                vocabulary_start + tile.start,
                gradient[tokens],
            )
        for place, left, right in rows.products:
            if needs[place]:
                add_product(gradients[place], gradient, right[tile])
            if needs[place + 1]:
                torch.mm(gradient.t(), left, out=gradients[place + 1][tile])
        if needs[2]:
            gradients[2][tile] = gradient.sum(0, dtype=statistics_dtype(gradient.dtype))

    for place, left, _ in head.products:
        if needs[place]:
            gradients[place] = spread(gradients[place].to(left.dtype), kept, len(labels))
    return [gradients.get(place) for place in range(5)]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total is float32 and the factors may be of fewer bits."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right  # CPU products of bfloat16 come rounded to it; their sum does not


def empty_statistics(hidden: Tensor, labels: Tensor, n_statistics: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (logps, lse, statistics)."""
    logps = torch.empty(labels.shape, dtype=statistics_dtype(hidden.dtype), device=hidden.device)
    return logps, logps.new_empty(2, *labels.shape), logps.new_empty(n_statistics, *labels.shape)


# ---- second derivative ----------------------------------------------------------------------------------------------


def second_derivative(
    grad_logps: Tensor, head: Head, labels: Tensor, options: Options, cotangents: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    r"""Cotangents of grad_logps and of the head's tensors, chunk by chunk of tokens, in plain PyTorch.

    With D [N, V] the gradient of a, the backward is dh = D W, dW = D^T h, db = 1^T D (and the same of the adapter), so
    its pairing with cotangents G is <D, P>, P = G_h W^T + h G_W^T + G_b + .... D depends on (g, a): `pair_gradient`'s
    d<D, P>/da flows into the factors of a like any gradient of a, and D itself into the factors of P that are inputs.
    """
    dtype = statistics_dtype(head.hidden.dtype)
    exact = [None if value is None else value.to(dtype) for value in head]
    into = [None if value is None else value.to(dtype) for value in cotangents]
    to_grad_logps = torch.zeros_like(grad_logps)
    to_head = [None if value is None else torch.zeros_like(value) for value in exact]

    kept = (labels != options.ignore_index).nonzero().squeeze(-1)
    with torch.autocast(labels.device.type, enabled=False):  # which a backward may be called under
        for index in kept.split(max(64, options.workspace_logits(head.weight) // max(1, len(head.weight)))):
            products = [
                (place, left.to(dtype), right.to(dtype)) for place, left, right in head.of_tokens(index).products
            ]
            logits = grad_logps.new_zeros(len(index), len(head.weight), dtype=dtype)
            paired = torch.zeros_like(logits)
            for place, left, right in products:
                logits = logits + left @ right.t()
                if (to_left := into[place]) is not None:
                    paired = paired + to_left[index] @ right.t()
                if (to_right := into[place + 1]) is not None:
                    paired = paired + left @ to_right.t()
            if (bias := exact[2]) is not None:
                logits = logits + bias
            if (to_bias := into[2]) is not None:
                paired = paired + to_bias
            upstream, label = grad_logps[index].to(dtype).unsqueeze(-1), labels[index].unsqueeze(-1)
            to_grad, curved, gradient = pair_gradient(
                upstream, logits, label, paired, options.temperature, options.softcap
            )
            to_grad_logps = to_grad_logps.index_copy(0, index, to_grad.to(grad_logps.dtype))
            for place, left, right in products:
                into_left, into_right = curved @ right, curved.t() @ left
                if (to_right := into[place + 1]) is not None:
                    into_left = into_left + gradient @ to_right
                if (to_left := into[place]) is not None:
                    into_right = into_right + gradient.t() @ to_left[index]
                to_head[place] = _given(to_head[place]).index_copy(0, index, into_left)
                to_head[place + 1] = _given(to_head[place + 1]) + into_right
            if to_head[2] is not None:
                to_head[2] = to_head[2] + curved.sum(0)
    return to_grad_logps, [
        None if value is None else _given(result).to(value.dtype) for value, result in zip(head, to_head, strict=True)
    ]


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
