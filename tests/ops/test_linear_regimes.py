"""The regimes of linear_sequence_logps: one result, and as little computed as each of them promises."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from robustloss import functional
from robustloss.naive import sequence_logps as naive_sequence
from robustloss.naive import token_logps as naive_token
from robustloss.ops import trainable_linear_token_logps
from robustloss.ops._linear_head import Head, Options, tile_width, tiles

BATCH, TOKENS, VOCABULARY, RANK = 3, 8, 1003, 2
OPTIONS = {"softcap": 3.0, "logit_scale": 0.5, "temperature": 0.8, "shift": True}


def make_inputs(hidden_size=5, dtype=torch.float64, vocabulary=VOCABULARY):
    """hidden, weight, bias, and the two of an adapter; labels with a masked stretch and a sequence with none left."""
    torch.manual_seed(0)
    shapes = [(BATCH, TOKENS, hidden_size), (vocabulary, hidden_size), (vocabulary,)]
    shapes += [(BATCH, TOKENS, RANK), (vocabulary, RANK)]
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    labels = torch.randint(0, vocabulary, (BATCH, TOKENS))
    labels[0, 2:4] = -100
    labels[1] = -100
    return tensors, labels


def in_float64(tensors, labels, **options):
    """The naive value; logit_scale and the adapter by hand."""
    hidden, weight, bias, adapter_hidden, adapter_weight = (value.double() for value in tensors)
    softcap, scale = options.pop("softcap", None), options.pop("logit_scale", 1.0)
    logits = naive_sequence.linear_logits(hidden, weight, bias=bias) + adapter_hidden @ adapter_weight.t()
    return naive_sequence.sequence_logps(scale * naive_token.soft_cap(logits, softcap), labels, **options)


def call(tensors, labels, **options):
    hidden, weight, bias, *adapter = tensors
    return functional.linear_sequence_logps(hidden, weight, labels, bias=bias, adapter=tuple(adapter), **options)


# Which of the five tensors need a gradient, and whether logits may wait.
REGIMES = {
    "no gradient": ([], {}),
    "frozen": ([0], {}),
    "frozen with a trainable adapter": ([0, 3, 4], {}),
    "trainable": ([0, 1, 2, 3, 4], {}),
    "trainable weight only": ([1], {}),
    "recompute": ([0, 1, 2, 3, 4], {"recompute": True}),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("hidden_size", [5, 40], ids=["more tokens than H", "fewer tokens than H"])
@pytest.mark.parametrize("chunk_size", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_regime_gives_the_naive_value_and_gradients(regime, hidden_size, chunk_size, dtype):
    trained, changes = REGIMES[regime]
    tensors, labels = make_inputs(hidden_size, dtype)
    inputs = [value.requires_grad_(index in trained) for index, value in enumerate(tensors)]
    exact = [value.detach().double().requires_grad_(index in trained) for index, value in enumerate(tensors)]
    actual = call(inputs, labels, chunk_size=chunk_size, **changes, **OPTIONS)
    expected = in_float64(exact, labels, **OPTIONS)
    # bfloat16 rounds every logit, as the model's own head would.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    if not trained:
        assert not actual.requires_grad
        return
    upstream = torch.tensor([1.0, 3.0, -0.5])
    wanted = torch.autograd.grad(expected, [exact[i] for i in trained], upstream.double())
    for gradient, want in zip(
        torch.autograd.grad(actual, [inputs[i] for i in trained], upstream.to(actual.dtype)), wanted, strict=True
    ):
        assert gradient.dtype == dtype
        bound = 10 * tolerance if dtype == torch.float32 else tolerance
        torch.testing.assert_close(gradient.double() / want.abs().max(), want / want.abs().max(), rtol=0, atol=bound)


@pytest.mark.parametrize("regime", ["frozen", "frozen with a trainable adapter", "trainable", "recompute"])
def test_every_regime_has_right_first_and_second_derivatives(regime):
    trained, changes = REGIMES[regime]
    tensors, labels = make_inputs(3, vocabulary=13)
    inputs = [value.requires_grad_(index in trained) for index, value in enumerate(tensors)]

    def function(*tensors):
        return call(tensors, labels, chunk_size=5, **changes, **OPTIONS)

    # Another backward of a trainable head computes anew what waited for the first: the same but for the last bits.
    assert gradcheck(function, inputs, nondet_tol=1e-12)
    assert gradgradcheck(function, inputs)


# ---- what is computed ---------------------------------------------------------------------------------------------


@pytest.fixture
def logits_made(monkeypatch):
    """How many logits have been computed so far."""
    made = [0]
    write = Head.write_logits

    def counting(self, tile, out):
        made[0] += out.numel()
        return write(self, tile, out)

    monkeypatch.setattr(Head, "write_logits", counting)
    return made


@pytest.mark.parametrize(
    ("regime", "hidden_size", "again"),
    [
        ("frozen", 5, 0.0),
        ("trainable", 40, 0.0),
        ("trainable", 5, 1 - 5 / 12),  # 12 tokens count, and the logits of H of them wait
        ("recompute", 40, 1.0),
    ],
)
def test_the_backward_computes_no_logits_that_the_forward_could_keep(logits_made, regime, hidden_size, again):
    trained, changes = REGIMES[regime]
    tensors, labels = make_inputs(hidden_size)
    counted = int((labels[:, 1:] != -100).sum())
    assert counted == 12
    inputs = [value.requires_grad_(index in trained) for index, value in enumerate(tensors)]
    if regime == "frozen":
        inputs[3:] = [value.detach() for value in inputs[3:]]
    logps = call(inputs, labels, shift=True, **changes)
    assert logits_made[0] == counted * VOCABULARY
    logps.sum().backward()
    assert logits_made[0] - counted * VOCABULARY == round(again * counted) * VOCABULARY


@pytest.mark.parametrize("recompute", [False, True])
def test_the_weights_gradient_is_allocated_early_only_where_logits_wait_in_it(monkeypatch, recompute):
    waiting = []
    forward_waiting = trainable_linear_token_logps.forward_waiting
    monkeypatch.setattr(
        trainable_linear_token_logps,
        "forward_waiting",
        lambda *arguments: waiting.append(True) or forward_waiting(*arguments),
    )
    tensors, labels = make_inputs(40)
    inputs = [value.requires_grad_() for value in tensors]
    call(inputs, labels, recompute=recompute)
    assert bool(waiting) != recompute
    waiting.clear()
    with torch.no_grad():
        call(inputs, labels, recompute=recompute)
    assert not waiting


def test_a_second_backward_through_the_same_graph_gives_the_same(logits_made):
    tensors, labels = make_inputs(40)
    inputs = [value.requires_grad_() for value in tensors]
    loss = call(inputs, labels).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    before = logits_made[0]
    second = torch.autograd.grad(loss, inputs)
    assert logits_made[0] > before  # the logits that waited became the gradient
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_the_gradients_are_the_same(reentrant):
    tensors, labels = make_inputs(40)
    inputs = [value.requires_grad_() for value in tensors]
    expected = torch.autograd.grad(call(inputs, labels).sum(), inputs)
    logps = torch.utils.checkpoint.checkpoint(lambda *values: call(values, labels), *inputs, use_reentrant=reentrant)
    logps.sum().backward()
    torch.testing.assert_close([value.grad for value in inputs], list(expected))


@pytest.mark.parametrize(("n_tokens", "vocabulary"), [(1, 1), (7, 1003), (1024, 32_000), (100_000, 151_936)])
def test_tiles_cover_the_vocabulary_once_and_fit_the_workspace(n_tokens, vocabulary):
    weight = torch.empty(vocabulary, 8, device="meta")
    head = Head(torch.empty(n_tokens, 8, device="meta"), weight, None, None, None)
    options = Options(-100, 1.0, None, None)
    width = tile_width(n_tokens, head, options)
    covered = [index for tile in tiles(vocabulary, width) for index in range(tile.start, tile.stop)]
    assert covered == list(range(vocabulary))
    # A workspace of 6 MiB and at most 128 columns of rounding, or the narrowest tile that is worth a product.
    assert n_tokens * width * 4 <= max((6 << 20) + n_tokens * 128 * 4, n_tokens * 256 * 4)


# ---- tiles of odd rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["frozen", "trainable"])
def test_huge_logits_keep_their_digits_across_tiles(regime):
    trained = REGIMES[regime][0]
    tensors, labels = make_inputs(5)
    tensors[1][100:110] *= 3e3
    tensors[1][900:910] = tensors[1][100:110] * (1 + 1e-5)  # logits of 1e4, and their like in another tile
    labels = torch.where(labels == -100, labels, 103)
    single = [value.float().requires_grad_(index in trained) for index, value in enumerate(tensors)]
    exact = [value.detach().double().requires_grad_(index in trained) for index, value in enumerate(single)]
    if regime == "frozen":
        single[3:], exact[3:] = ([value.detach() for value in values[3:]] for values in (single, exact))
    actual, expected = call(single, labels, chunk_size=1), in_float64(exact, labels)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-2)  # the product's own error at 1e4
    gradient = torch.autograd.grad(actual.sum(), single[0])[0].double()
    wanted = torch.autograd.grad(expected.sum(), exact[0])[0]
    torch.testing.assert_close(gradient / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=2e-3)
    with torch.no_grad():
        in_tiles, at_once = (call(exact, labels, chunk_size=size) for size in (1, 1000))
    torch.testing.assert_close(in_tiles, at_once, rtol=1e-12, atol=1e-12)


def test_a_tile_of_tokens_that_cannot_occur_has_no_share():
    tensors, labels = make_inputs(5)
    labels = torch.where(labels == -100, labels, labels % 200)
    tensors[2][256:768] = -float("inf")  # two whole tiles
    logps, statistics = call(tensors, labels, chunk_size=1, return_statistics=True)
    torch.testing.assert_close(logps, in_float64(tensors, labels), rtol=1e-12, atol=1e-12)
    assert statistics.entropy.isfinite().all()
    labels[0, 0] = 300
    assert call(tensors, labels, chunk_size=1)[0] == -float("inf")


@pytest.mark.parametrize("regime", ["no gradient", "frozen", "trainable"])
def test_statistics_do_not_depend_on_tiles_or_regime(regime):
    tensors, labels = make_inputs(5)
    with torch.no_grad():
        wanted = call(tensors, labels, chunk_size=1000, return_statistics=True, **OPTIONS)
        hidden, weight, bias, *adapter = tensors
        logits = naive_sequence.linear_logits(hidden, weight, bias=bias) + adapter[0] @ adapter[1].t()
        capped = 0.5 * naive_token.soft_cap(logits, 3.0)
        _, statistics = functional.sequence_logps(capped, labels, temperature=0.8, shift=True, return_statistics=True)
    torch.testing.assert_close(list(wanted[1]), list(statistics), rtol=1e-12, atol=1e-12)
    inputs = [value.requires_grad_(index in REGIMES[regime][0]) for index, value in enumerate(tensors)]
    logps, statistics = call(inputs, labels, chunk_size=1, return_statistics=True, **OPTIONS)
    torch.testing.assert_close(logps, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(statistics), list(wanted[1]), rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in statistics)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3)], ids=["no sequence", "no token", "nothing counted"])
@pytest.mark.parametrize("regime", REGIMES)
def test_nothing_to_count_gives_zeros_and_zero_gradients(shape, regime):
    trained, changes = REGIMES[regime]
    labels = torch.full(shape, -100)
    tensors = [torch.randn(*shape, 4), torch.randn(7, 4), torch.randn(7), torch.randn(*shape, 2), torch.randn(7, 2)]
    inputs = [value.requires_grad_(index in trained) for index, value in enumerate(tensors)]
    logps = call(inputs, labels, **changes)
    assert torch.equal(logps, torch.zeros(shape[0]))
    if trained:
        logps.sum().backward()
        for index in trained:
            assert torch.equal(inputs[index].grad, torch.zeros_like(inputs[index]))


# ---- the gradient known beforehand --------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [[0], [0, 1], [0, 1, 2, 3, 4]], ids=["hidden", "head", "all"])
@pytest.mark.parametrize("options", [OPTIONS, {"average": True}, {"cu_seqlens": [0, 5, 5, 24]}], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_with_cotangent_gives_the_same_log_probabilities_and_gradients(logits_made, trained, options, chunk_size):
    tensors, labels = make_inputs()
    options = dict(options)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"])
        tensors[0], tensors[3], labels = tensors[0].flatten(0, 1), tensors[3].flatten(0, 1), labels.flatten()
    inputs = [value.requires_grad_(index in trained) for index, value in enumerate(tensors)]
    cotangent = torch.tensor([1.0, 3.0, -0.5])
    logps = call(inputs, labels, **options)
    wanted = torch.autograd.grad(logps, [inputs[i] for i in trained], 2 * cotangent.double())

    before = logits_made[0]
    hidden, weight, bias, *adapter = inputs
    surrogate, same = functional.linear_sequence_logps_with_cotangent(
        hidden, weight, labels, cotangent, bias=bias, adapter=tuple(adapter), chunk_size=chunk_size, **options
    )
    torch.testing.assert_close(same, logps, rtol=1e-12, atol=1e-12)
    assert not same.requires_grad
    torch.testing.assert_close(surrogate, (cotangent * logps).sum(), rtol=1e-12, atol=1e-12)
    counted = int((labels[..., 1:] != -100).sum() if options.get("shift") else (labels != -100).sum())
    gradients = torch.autograd.grad(2 * surrogate, [inputs[i] for i in trained], retain_graph=True)
    assert logits_made[0] - before == counted * VOCABULARY
    torch.testing.assert_close(gradients, wanted, rtol=1e-11, atol=1e-11)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(surrogate, [inputs[i] for i in trained])


def test_with_cotangent_rounds_bfloat16_weight_gradients_once():
    """Summing [V, H] over chunks in bfloat16 would lose what is small beside the sum."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 512, 4).bfloat16(), torch.randn(300, 4).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (1, 512))

    def gradient(chunk_size):
        surrogate, _ = functional.linear_sequence_logps_with_cotangent(
            hidden, weight, labels, torch.ones(1), chunk_size=chunk_size
        )
        return torch.autograd.grad(surrogate, weight)[0].double()

    exact_weight = weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        functional.linear_sequence_logps(hidden.double(), exact_weight, labels).sum(), exact_weight
    )[0]
    error_in_one, error_in_many = ((gradient(size) - exact).norm() / exact.norm() for size in (512, 8))
    assert error_in_many < 1.5 * error_in_one < 0.02
