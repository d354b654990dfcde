"""Log-probabilities of any finite logits are those of the naive float64 computation, and so are their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from property_cases import (
    KINDS,
    WRONG_NUMBERS,
    assert_right,
    exact,
    gradients,
    holds_for,
    largest,
    leaf,
    refuses,
    spoiled,
    tensors,
)
from torch import Tensor

from robustloss import (
    linear_sequence_logps,
    linear_sequence_logps_with_cotangent,
    linear_sequence_logratios,
    sequence_logps,
    sequence_logratios,
    token_logps,
)
from robustloss.naive import sequence_logps as naive
from robustloss.naive import token_logps as naive_tokens

MASKS = ("none", "all", "some", "ragged")
# A product of the largest numbers is infinite, and a sum of such products NaN: as in any matrix product.
# The head's logits are rounded to the type of the hidden states, as a model's own are.
DIGITS = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 400, torch.float16: 50}
LINEAR_KINDS = ("ordinary", "tied", "constant", "zeros", "denormal")


@st.composite
def labels_for(draw: Any, shape: tuple[int, ...], vocabulary: int, ignore_index: int) -> Tensor:
    """Labels in the vocabulary, of which a mask leaves all, none, some or the ends of the rows."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    mask = draw(st.sampled_from(MASKS))
    if mask == "all":
        labels[...] = ignore_index
    elif mask == "some":
        labels[torch.rand(shape, generator=generator) < 0.5] = ignore_index
    elif mask == "ragged" and shape[-1]:
        length = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        labels[torch.arange(shape[-1]).expand(shape) >= length] = ignore_index
    return labels.to(draw(st.sampled_from((torch.int64, torch.int32))))


@st.composite
def batches(draw: Any, last: st.SearchStrategy[int], kinds: Any = KINDS) -> tuple[Tensor, int, dict[str, Any]]:
    """(values [B, T, V], labels and options) of a batch, padded or packed."""
    packed = draw(st.booleans())
    rows, length = draw(st.integers(0, 4)), draw(st.sampled_from((0, 1, 2, 5, 9)))
    shape = (rows * length,) if packed else (rows, length)
    options: dict[str, Any] = {
        "ignore_index": draw(st.sampled_from((-100, -1, 0, 3, 10**6))),
        "temperature": draw(st.sampled_from((1.0, 1, 0.7, 1e-3, 50.0))),
        "shift": draw(st.booleans()),
        "average": draw(st.booleans()),
    }
    if packed:
        cuts = draw(st.lists(st.integers(0, shape[0]), max_size=4))
        bounds = torch.tensor([0, *sorted(cuts), shape[0]])
        options["cu_seqlens"] = bounds.to(draw(st.sampled_from((torch.int64, torch.int32))))
    values = draw(tensors((*shape, draw(last)), kinds=kinds))
    return values, draw(st.integers(1, 40)), options


def overflows(logits: Tensor, temperature: float) -> bool:
    """Whether logits / temperature, or a difference of them, has no float32."""
    limit = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).max
    return largest(logits) / temperature >= limit / 4


@holds_for(data=st.data())
def test_sequence_logps_are_those_of_the_naive_computation(data):
    logits, _, options = data.draw(batches(st.sampled_from((1, 2, 3, 31, 64, 257))))
    vocabulary = logits.shape[-1]
    labels = data.draw(labels_for(tuple(logits.shape[:-1]), vocabulary, options["ignore_index"]))
    logits = leaf(logits)
    doubles = leaf(exact(logits))
    got, entropy = sequence_logps(logits, labels, return_entropy=True, **options)
    wanted, wanted_entropy = naive.sequence_logps(doubles, labels, return_entropy=True, **options)
    scale = largest(logits) / options["temperature"] if logits.dtype != torch.float64 else 0.0
    if overflows(logits, options["temperature"]):
        assert (got <= 0).all()
        (gradient,) = gradients(got, [logits])  # inverse temperatures at most, which float16 may round to infinity
        assert gradient.isfinite().all()
        return
    assert_right(got, wanted, scale=scale + 10)
    assert_right(entropy, wanted_entropy, scale=scale + 10)
    if scale < 1e6:  # beyond, a float32 logit / temperature has no digits behind the point
        size = 1 / options["temperature"]
        assert_right(gradients(got, [logits])[0], gradients(wanted, [doubles])[0], scale=size * max(1, scale))
    assert gradients(sequence_logps(logits, labels, **options), [logits])[0].isfinite().all()


@holds_for(data=st.data())
def test_token_logps_are_never_positive_and_ignored_ones_are_zero(data):
    logits, _, options = data.draw(batches(st.sampled_from((1, 2, 3, 31, 64, 257))))
    ignored = options["ignore_index"]
    labels = data.draw(labels_for(tuple(logits.shape[:-1]), logits.shape[-1], ignored))
    got = token_logps(logits, labels, ignore_index=ignored, temperature=options["temperature"])
    assert (got <= 0).all()  # and so none is NaN
    assert (got[labels == ignored] == 0).all()
    if not overflows(logits, options["temperature"]):
        wanted = naive_tokens.token_logps(
            exact(logits), labels, ignore_index=ignored, temperature=options["temperature"]
        )
        assert_right(got, wanted, scale=10 + largest(logits) / options["temperature"])


@holds_for(data=st.data())
def test_tokens_that_cannot_occur_take_no_part(data):
    logits, _, _ = data.draw(batches(st.sampled_from((2, 3, 31, 64)), kinds=("ordinary", "wide", "tied", "thousands")))
    labels = data.draw(labels_for(tuple(logits.shape[:-1]), logits.shape[-1] - 1, -100))
    masked = torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -math.inf)], -1)
    without = token_logps(logits[..., :-1], labels)
    assert_right(token_logps(masked, labels), exact(without), scale=10)


@holds_for(data=st.data())
def test_sequence_logratios_are_the_difference_of_both_log_probabilities(data):
    policy, _, options = data.draw(batches(st.sampled_from((1, 3, 64, 257)), kinds=("ordinary", "wide", "tied")))
    reference = data.draw(tensors(tuple(policy.shape), kinds=("ordinary", "wide", "tied")))
    labels = data.draw(labels_for(tuple(policy.shape[:-1]), policy.shape[-1], options["ignore_index"]))
    policy, reference = leaf(policy), leaf(reference)
    got = sequence_logratios(policy, reference, labels, **options)
    sides = [naive.sequence_logps(exact(x), labels, **options) for x in (policy, reference)]
    # Each side is computed in a type of its own.
    digits = 1e5 if {policy.dtype, reference.dtype} > {torch.float64} else 1
    assert_right(got, sides[0] - sides[1], scale=10 + 2000 / options["temperature"], digits=digits)
    assert gradients(got, [policy])[0].isfinite().all()
    assert torch.autograd.grad(got.sum(), reference, allow_unused=True) == (None,)


@st.composite
def heads(draw: Any) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """(hidden, weight and bias; labels; options) of an output head."""
    hidden, vocabulary, options = draw(batches(st.sampled_from((1, 3, 16, 33)), kinds=LINEAR_KINDS))
    size = hidden.shape[-1]
    tensors_of = {"hidden": hidden, "weight": draw(tensors((vocabulary, size), (hidden.dtype,), LINEAR_KINDS))}
    if draw(st.booleans()):
        tensors_of["bias"] = draw(tensors((vocabulary,), (hidden.dtype,), LINEAR_KINDS))
    options["softcap"] = draw(st.sampled_from((None, 30.0, 1)))
    options["temperature"] = max(options["temperature"], 0.5)
    labels = draw(labels_for(tuple(hidden.shape[:-1]), vocabulary, options["ignore_index"]))
    return tensors_of, labels, options


@holds_for(data=st.data())
def test_linear_sequence_logps_are_those_of_the_naive_computation(data):
    head, labels, options = data.draw(heads())
    trained = data.draw(st.sets(st.sampled_from(sorted(head))))
    head = {name: leaf(value) if name in trained else value for name, value in head.items()}
    doubles = {name: leaf(exact(value)) for name, value in head.items()}
    chunk = data.draw(st.sampled_from((None, 1, 2, 1000)))
    got = linear_sequence_logps(**head, labels=labels, chunk_size=chunk, **options)
    wanted = naive.linear_sequence_logps(
        doubles["hidden"], doubles["weight"], labels, bias=doubles.get("bias"), **options
    )
    size = 4 + 5 * head["hidden"].shape[-1] ** 0.5
    digits = DIGITS[head["hidden"].dtype]
    assert_right(got, wanted, scale=10 * size, digits=digits)
    for name in sorted(trained):
        (g,), (w,) = gradients(got, [head[name]]), gradients(wanted, [doubles[name]])
        assert_right(g, w, scale=1 + largest(w) + size, digits=max(4.0, digits / (1 if g.element_size() > 2 else 20)))


@holds_for(data=st.data())
def test_a_known_cotangent_gives_the_gradient_of_the_weighted_sum(data):
    head, labels, options = data.draw(heads())
    head = {name: leaf(value) for name, value in head.items()}
    plain = linear_sequence_logps(**head, labels=labels, **options)
    cotangent = data.draw(tensors(tuple(plain.shape), kinds=("ordinary", "tied", "zeros")))
    surrogate, logps = linear_sequence_logps_with_cotangent(**head, labels=labels, cotangent=cotangent, **options)
    size = 4 + 5 * head["hidden"].shape[-1] ** 0.5
    assert_right(logps, exact(plain), scale=10 * size, digits=DIGITS[head["hidden"].dtype])
    wanted = gradients(plain * cotangent.to(plain.dtype), list(head.values()))
    for g, w in zip(gradients(surrogate, list(head.values())), wanted, strict=True):
        assert_right(g, exact(w), scale=1 + largest(w) + size, digits=8)


@holds_for(data=st.data())
def test_a_models_log_ratio_with_itself_is_zero(data):
    head, labels, options = data.draw(heads())
    hidden, weight, bias = leaf(head["hidden"]), head["weight"], head.get("bias")
    got = linear_sequence_logratios(hidden, weight, hidden, weight, labels, policy_bias=bias, ref_bias=bias, **options)
    assert_right(
        got, torch.zeros(got.shape, dtype=torch.float64), scale=20 * (4 + weight.shape[-1]), digits=DIGITS[weight.dtype]
    )
    assert gradients(got, [hidden])[0].isfinite().all()


@holds_for(data=st.data())
def test_arguments_that_do_not_fit_are_refused_by_name(data):
    packed = data.draw(st.booleans())
    logits, hidden, weight = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(5, 4)
    labels = torch.tensor([[0, 1, 4], [2, -100, 3]])
    if packed:
        logits, hidden, labels = logits.flatten(0, 1), hidden.flatten(0, 1), labels.flatten()
    given = {
        sequence_logps: {"logits": logits},
        sequence_logratios: {"policy_logits": logits, "ref_logits": logits},
        linear_sequence_logps: {"hidden": hidden, "weight": weight, "bias": torch.zeros(5)},
    }
    function = data.draw(st.sampled_from(list(given)))
    arguments: dict[str, Any] = {**given[function], "labels": labels, "temperature": 1.0}
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 2, 6])
    function(**arguments)
    name = data.draw(st.sampled_from(sorted(arguments)))
    if name == "temperature":
        arguments[name] = data.draw(st.sampled_from((*WRONG_NUMBERS, 0, 0.0, 10**400)))
    elif name == "labels":
        out_of_range = [
            torch.where(labels == value, replaced, labels) for value, replaced in ((4, 5), (0, -1), (2, 2**40))
        ]
        wrong = [labels.float(), labels.bool(), labels[..., :-1], labels.unsqueeze(0), labels.tolist(), None]
        arguments[name] = data.draw(st.sampled_from([*out_of_range, *wrong]))
    elif name == "cu_seqlens":
        bounds = [[0, 2], [1, 6], [0, 7], [0, 4, 2, 6], [], [0, -1, 6], [6]]
        wrong = [torch.tensor(x, dtype=torch.int64) for x in bounds]
        wrong += [torch.tensor([[0, 6]]), torch.tensor([0.0, 6.0]), [0, 6], torch.tensor(6)]
        arguments[name] = data.draw(st.sampled_from(wrong))
    else:
        arguments[name] = data.draw(spoiled(arguments[name], ("type", "dtype", "shape")))
    # Of two tensors that do not fit together either may be the wrong one.
    refuses(lambda: function(**arguments), name, *given[function], "labels")
