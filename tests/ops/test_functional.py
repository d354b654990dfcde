"""The public log-probability functions against naive/, and what they promise beyond it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import robustloss
from robustloss import functional, naive
from robustloss.naive import sequence_logps as naive_sequence

BATCH, TOKENS, VOCABULARY, HIDDEN = 3, 6, 11, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = [{}, {"shift": True}, {"temperature": 0.7, "average": True}, {"shift": True, "average": True}]


@pytest.fixture
def labels():
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    labels[0, 1:3] = -100
    labels[1] = -100
    return labels


def make_logits(dtype=torch.float64):
    torch.manual_seed(1)
    return (3 * torch.randn(BATCH, TOKENS, VOCABULARY, dtype=torch.float64)).to(dtype).requires_grad_()


def make_head(dtype=torch.float64):
    torch.manual_seed(2)
    shapes = [(BATCH, TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def assert_same(actual, expected, dtype):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ---- from logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sequence_logps_and_their_gradient_are_the_naive_ones(labels, dtype, options):
    logits = make_logits(dtype)
    exact = logits.detach().double().requires_grad_()
    actual = functional.sequence_logps(logits, labels, **options)
    expected = naive_sequence.sequence_logps(exact, labels, **options)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(actual, expected, torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    actual.backward(upstream.to(actual.dtype))
    expected.backward(upstream.double())
    assert_same(logits.grad, exact.grad, dtype)


def test_a_sequence_with_no_label_left_gives_zero_and_a_zero_gradient(labels):
    for options in OPTIONS:
        logits = make_logits()
        logps = functional.sequence_logps(logits, labels, **options)
        logps.sum().backward()
        assert logps[1] == 0
        assert (logits.grad[1] == 0).all()


def test_token_logps_of_flat_and_batched_logits_agree(labels):
    logits = make_logits()
    flat = functional.token_logps(logits.flatten(0, 1), labels.flatten())
    assert torch.equal(functional.token_logps(logits, labels).flatten(), flat)
    assert_same(flat, naive.token_logps.token_logps(logits.flatten(0, 1), labels.flatten()), torch.float64)


def test_shift_is_the_hugging_face_slicing(labels):
    logits = make_logits()
    sliced = functional.token_logps(logits[:, :-1], labels[:, 1:])
    shifted = functional.token_logps(logits, labels, shift=True)
    assert torch.equal(shifted[:, :-1], sliced)
    assert (shifted[:, -1] == 0).all()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_packed_sequences_equal_padded_ones(labels, shift, average):
    logits, lengths = make_logits(), [4, 0, 6]
    cu_seqlens = torch.tensor([0, 4, 4, 10])
    padded_labels = labels.clone()
    for row, length in enumerate(lengths):
        padded_labels[row, length:] = -100
    packed_logits = torch.cat([logits[row, :length] for row, length in enumerate(lengths)])
    packed_labels = torch.cat([labels[row, :length] for row, length in enumerate(lengths)])
    options = {"shift": shift, "average": average}
    padded = functional.sequence_logps(logits, padded_labels, **options)
    for form in (lambda x: x, lambda x: x.unsqueeze(0)):
        packed = functional.sequence_logps(form(packed_logits), form(packed_labels), cu_seqlens=cu_seqlens, **options)
        torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.square().sum(), logits)[0] for value in (padded, packed)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [*OPTIONS, {"cu_seqlens": torch.tensor([0, 5, 5, 18]), "shift": True}], ids=str)
def test_sequence_logps_have_right_first_and_second_derivatives(labels, options):
    logits = make_logits()
    if "cu_seqlens" in options:
        logits, labels = logits.detach().flatten(0, 1).requires_grad_(), labels.flatten()

    def function(logits):
        return functional.sequence_logps(logits, labels, **options)

    assert gradcheck(function, logits)
    assert gradgradcheck(function, logits)


def test_entropy_is_that_of_the_tempered_distribution_and_carries_no_gradient(labels):
    logits = make_logits()
    options = {"temperature": 0.5, "average": True, "shift": True}
    logps, entropy = functional.sequence_logps(logits, labels, return_entropy=True, **options)
    expected = naive_sequence.sequence_logps(logits, labels, return_entropy=True, **options)
    torch.testing.assert_close((logps, entropy), expected, rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad
    assert torch.equal(logps, functional.sequence_logps(logits, labels, **options))


@pytest.mark.parametrize("average", [False, True])
def test_statistics_are_the_naive_ones_of_each_token_and_their_sums(labels, average):
    logits = make_logits()
    naive_tokens = naive.token_logps
    expected = [
        naive_tokens.token_entropy(logits / 0.5, labels),
        naive_tokens.token_top1(logits, labels),
        naive_tokens.token_mean_logit(logits, labels),
    ]
    logps, statistics = functional.token_logps(logits, labels, temperature=0.5, return_statistics=True)
    assert torch.equal(logps, functional.token_logps(logits, labels, temperature=0.5))
    torch.testing.assert_close(list(statistics), expected, rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in statistics)
    _, reduced = functional.sequence_logps(logits, labels, temperature=0.5, average=average, return_statistics=True)
    counts = (labels != -100).sum(-1).clamp(min=1) if average else 1
    for value, tokens in zip(reduced, expected, strict=True):
        torch.testing.assert_close(value, tokens.sum(-1) / counts, rtol=1e-12, atol=1e-12)


def test_strided_logits_need_no_copy_and_give_the_same(labels):
    logits = make_logits().detach()
    transposed = logits.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    unaligned = torch.randn(BATCH, TOKENS, 2 * VOCABULARY, dtype=torch.float64)[..., ::2].copy_(logits)
    expected = functional.sequence_logps(logits, labels)
    assert torch.equal(functional.sequence_logps(transposed, labels), expected)
    assert torch.equal(functional.sequence_logps(unaligned, labels), expected)
    assert gradcheck(lambda x: functional.sequence_logps(x, labels), transposed)


def test_inplace_backward_overwrites_the_logits_with_the_same_gradient(labels):
    leaf = make_logits()
    functional.sequence_logps(leaf, labels, shift=True).square().sum().backward()
    source = make_logits()
    logits = source * 1
    functional.sequence_logps(logits, labels, shift=True, inplace_backward=True).square().sum().backward()
    assert torch.equal(source.grad, leaf.grad)
    assert torch.equal(logits, leaf.grad)


def test_inplace_backward_refuses_what_it_cannot_do(labels):
    with pytest.raises(ValueError, match="leaf"):
        functional.sequence_logps(make_logits(), labels, inplace_backward=True)
    with pytest.raises(ValueError, match="a view of one"):
        functional.sequence_logps(make_logits()[:, 1:], labels[:, 1:], inplace_backward=True)
    logits = make_logits() * 1
    loss = functional.sequence_logps(logits, labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_more_than_two_to_the_31_elements_are_a_matter_of_shape_only():
    logits = torch.empty(2, 1 << 16, 1 << 15, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(2, 1 << 16, dtype=torch.int64, device="meta")
    logps = functional.sequence_logps(logits, labels, shift=True)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert logps.shape == (2,)
    assert gradient.shape == logits.shape
    assert gradient.dtype == torch.bfloat16


# ---- from hidden states -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear_sequence_logps_and_their_gradients_are_the_naive_ones(labels, dtype, chunk_size, softcap):
    inputs = make_head(dtype)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    options = {"softcap": softcap, "shift": True, "temperature": 0.8}
    actual = functional.linear_sequence_logps(
        inputs[0], inputs[1], labels, bias=inputs[2], chunk_size=chunk_size, **options
    )
    expected = naive_sequence.linear_sequence_logps(exact[0], exact[1], labels, bias=exact[2], **options)
    # A bfloat16 head rounds every logit to 8 bits, as the model's own would.
    slack = 8 if dtype == torch.bfloat16 else 1
    torch.testing.assert_close(actual.double(), expected, rtol=slack * TOLERANCE[dtype], atol=slack * TOLERANCE[dtype])
    for gradient, wanted in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        scale = wanted.abs().max()
        torch.testing.assert_close(gradient.double() / scale, wanted / scale, rtol=0, atol=slack * TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_sequence_logps_have_right_first_and_second_derivatives(labels, softcap, chunk_size, with_bias):
    inputs = make_head()[: 2 + with_bias]

    def function(hidden, weight, bias=None):
        return functional.linear_sequence_logps(
            hidden, weight, labels, bias=bias, softcap=softcap, chunk_size=chunk_size, shift=True
        )

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_second_derivative_with_one_side_frozen(labels, frozen):
    inputs = make_head()[:2]
    inputs[frozen].requires_grad_(False)

    def function(hidden, weight):
        return functional.linear_sequence_logps(hidden, weight, labels, chunk_size=4)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_masked_tokens_are_dropped_before_the_matmul(labels):
    hidden, weight, _ = make_head()
    poisoned = hidden.detach().masked_fill((labels == -100).unsqueeze(-1), float("nan")).requires_grad_()
    logps = functional.linear_sequence_logps(poisoned, weight, labels)
    assert torch.equal(logps, functional.linear_sequence_logps(hidden, weight, labels))
    logps.sum().backward()
    assert weight.grad.isfinite().all()
    assert (poisoned.grad[labels == -100] == 0).all()


def test_no_tensor_of_all_tokens_times_vocabulary_is_ever_held():
    vocabulary = 4000
    hidden = torch.randn(4, 64, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (4, 64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        functional.linear_sequence_logps(hidden, weight, labels, chunk_size=16).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events()) // 4
    assert 16 * vocabulary <= largest < 4 * 64 * vocabulary / 4


def test_autocast_casts_the_head_and_returns_float32(labels):
    hidden, weight, bias = make_head(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = functional.linear_sequence_logps(hidden, weight, labels, bias=bias)
    expected = functional.linear_sequence_logps(hidden.bfloat16(), weight.bfloat16(), labels, bias=bias.bfloat16())
    assert logps.dtype == torch.float32
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32


# ---- log-ratios ---------------------------------------------------------------------------------------------------


def test_logratios_are_differences_whose_gradient_reaches_the_policy_only(labels):
    policy, ref = make_logits(), (make_logits() + 1).sin().detach().requires_grad_()
    ratios = functional.sequence_logratios(policy, ref, labels, shift=True)
    expected = functional.sequence_logps(policy, labels, shift=True) - functional.sequence_logps(
        ref, labels, shift=True
    )
    torch.testing.assert_close(ratios, expected, rtol=1e-12, atol=1e-12)
    ratios.sum().backward()
    assert ref.grad is None
    assert policy.grad.abs().sum() > 0
    assert gradgradcheck(lambda x: functional.sequence_logratios(x, ref, labels), policy)


def test_inplace_backward_of_logratios_overwrites_the_policys_logits(labels):
    leaf, ref = make_logits(), (make_logits() + 1).sin().detach()
    functional.sequence_logratios(leaf, ref, labels).square().sum().backward()
    source, kept = make_logits(), ref.clone()
    policy = source * 1
    functional.sequence_logratios(policy, ref, labels, inplace_backward=True).square().sum().backward()
    assert torch.equal(source.grad, leaf.grad)
    assert torch.equal(policy, leaf.grad)
    assert torch.equal(ref, kept)


def test_logratios_of_two_dtypes(labels):
    policy, ref = make_logits(torch.float32), make_logits(torch.bfloat16).detach()
    expected = functional.sequence_logps(policy, labels) - functional.sequence_logps(ref, labels)
    torch.testing.assert_close(functional.sequence_logratios(policy, ref, labels), expected)


def test_linear_logratios_of_models_of_different_width(labels):
    hidden, weight, bias = make_head()
    ref_hidden, ref_weight = torch.randn(BATCH, TOKENS, 4).double(), torch.randn(VOCABULARY, 4).double()
    ratios = functional.linear_sequence_logratios(
        hidden, weight, ref_hidden, ref_weight, labels, policy_bias=bias, shift=True
    )
    expected = functional.linear_sequence_logps(
        hidden, weight, labels, bias=bias, shift=True
    ) - functional.linear_sequence_logps(ref_hidden, ref_weight, labels, shift=True)
    assert torch.equal(ratios, expected)
    assert gradcheck(
        lambda h, w: functional.linear_sequence_logratios(h, w, ref_hidden, ref_weight, labels), (hidden, weight)
    )


# ---- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["token_logps", "sequence_logps", "packed", "linear", "linear, frozen", "logratios", "linear_logratios"]
)
def test_torch_compile_takes_every_function_as_one_graph(labels, name):
    logits, (hidden, weight, bias) = make_logits(), make_head()
    cu_seqlens = torch.tensor([0, 5, 18])
    functions = {
        "token_logps": lambda: functional.token_logps(logits, labels, shift=True),
        "sequence_logps": lambda: functional.sequence_logps(logits, labels, inplace_backward=True, average=True),
        "packed": lambda: functional.sequence_logps(
            logits.flatten(0, 1), labels.flatten(), cu_seqlens=cu_seqlens, shift=True
        ),
        "linear": lambda: functional.linear_sequence_logps(hidden, weight, labels, bias=bias, softcap=2.0, shift=True),
        "linear, frozen": lambda: functional.linear_sequence_logps(hidden, weight.detach(), labels, average=True),
        "logratios": lambda: functional.sequence_logratios(logits, logits.detach().sin(), labels),
        "linear_logratios": lambda: functional.linear_sequence_logratios(
            hidden, weight, hidden.detach().sin(), weight.detach(), labels
        ),
    }
    if name == "sequence_logps":
        logits = logits * 1
    inputs = (hidden,) if "frozen" in name else (hidden, weight) if "linear" in name else (logits,)
    expected = functions[name]()
    wanted = torch.autograd.grad(expected.sum(), inputs)
    if name == "sequence_logps":
        logits = make_logits() * 1
        inputs = (logits,)
    torch.compiler.reset()
    actual = torch.compile(functions[name], fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), inputs), wanted)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(3, 6, 11, dtype=torch.int64)}, TypeError, "logits must have dtype float32"),
        ({"logits": torch.zeros(3, 6, 0)}, ValueError, "V >= 1"),
        ({"logits": torch.zeros(11)}, ValueError, r"logits must be \[B, T, V\]"),
        (
            {"labels": torch.zeros(3, 5, dtype=torch.int64)},
            ValueError,
            r"labels must have shape \(3, 6\).*got \(3, 5\)",
        ),
        ({"labels": torch.zeros(3, 6)}, TypeError, "labels must have dtype int64, int32, got float32"),
        ({"labels": torch.full((3, 6), 11)}, ValueError, "label"),
        ({"labels": torch.full((3, 6), -1)}, ValueError, "label"),
        ({"labels": torch.zeros(3, 6, dtype=torch.int64, device="meta")}, ValueError, "labels is on meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"with cu_seqlens labels must be \[N\]"),
    ],
    ids=str,
)
def test_bad_input_is_named(labels, change, error, message):
    arguments = {"logits": make_logits(), "labels": labels} | change
    with pytest.raises(error, match=message):
        functional.sequence_logps(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_bad_packing_is_named(labels):
    logits, labels = make_logits().flatten(0, 1), labels.flatten()
    with pytest.raises(ValueError, match="give cu_seqlens"):
        functional.sequence_logps(logits, labels)
    for bad in ([0, 5], [1, 18], [0, 9, 5, 18]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 18"):
            functional.sequence_logps(logits, labels, cu_seqlens=torch.tensor(bad))
    with pytest.raises(TypeError, match="cu_seqlens must have dtype"):
        functional.sequence_logps(logits, labels, cu_seqlens=torch.tensor([0.0, 18.0]))


def test_bad_heads_are_named(labels):
    hidden, weight, bias = make_head()
    with pytest.raises(ValueError, match="hidden must be"):
        functional.linear_sequence_logps(hidden, weight[:, 1:], labels)
    with pytest.raises(TypeError, match="weight must have hidden's dtype"):
        functional.linear_sequence_logps(hidden, weight.float(), labels)
    with pytest.raises(ValueError, match=r"bias must have shape \(11,\)"):
        functional.linear_sequence_logps(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="softcap must be > 0"):
        functional.linear_sequence_logps(hidden, weight, labels, softcap=0.0)
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        functional.linear_sequence_logps(hidden, weight, labels, chunk_size=0)
    with pytest.raises(ValueError, match=r"labels\[2, 5\] is 11, but must be in \[0, 11\)"):
        functional.linear_sequence_logps(
            hidden, weight, labels.index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(11))
        )
    with pytest.raises(TypeError, match=r"ref_weight must be a torch.Tensor, got NoneType"):
        functional.linear_sequence_logratios(hidden, weight, hidden, None, labels)
    with pytest.raises(ValueError, match="ref_weight must have policy_weight's 11 rows, got 10"):
        functional.linear_sequence_logratios(hidden, weight, hidden, weight[1:], labels)
    with pytest.raises(TypeError, match="log-ratio has no entropy"):
        functional.linear_sequence_logratios(hidden, weight, hidden, weight, labels, return_entropy=True)
    with pytest.raises(ValueError, match=r"adapter\[1\] must have shape \(11, 2\)"):
        functional.linear_sequence_logps(hidden, weight, labels, adapter=(hidden[..., :2], weight[:, :3]))
    with pytest.raises(ValueError, match="logit_scale must be > 0"):
        functional.linear_sequence_logps(hidden, weight, labels, logit_scale=0.0)
    with pytest.raises(ValueError, match="vocabulary_start is 3, but without a process_group"):
        functional.linear_sequence_logps(hidden, weight, labels, vocabulary_start=3)
    with pytest.raises(ValueError, match=r"cotangent must have shape \(3,\)"):
        functional.linear_sequence_logps_with_cotangent(hidden, weight, labels, torch.ones(2))
    with pytest.raises(TypeError, match=r"weight must be a torch.Tensor, got NoneType"):
        functional.linear_sequence_logps_with_cotangent(hidden, None, labels, torch.ones(3))
    with pytest.raises(ValueError, match="return_entropy and return_statistics are both True"):
        functional.linear_sequence_logps(hidden, weight, labels, return_entropy=True, return_statistics=True)


def test_int32_labels_are_taken(labels):
    logits = make_logits()
    assert torch.equal(functional.sequence_logps(logits, labels.int()), functional.sequence_logps(logits, labels))


def test_the_public_names_are_at_top_level():
    for name in ("token_logps", "sequence_logps", "linear_sequence_logps", "sequence_logratios"):
        assert getattr(robustloss, name) is getattr(functional, name)
