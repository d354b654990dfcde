"""Exact WDPO refuses every model that is not known to have the right second derivative."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustloss import WDPOLoss
from robustloss.functional import sequence_logps
from robustloss.penalty import check_double_backward

transformers = pytest.importorskip("transformers")

SMALL = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=17, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    ),
}
pytestmark = pytest.mark.parametrize("kind", SMALL)


def build(kind: str, attention: str = "eager"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(SMALL[kind](), attn_implementation=attention)


def checkpointed(model, **options):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
    return model


def wdpo_loss(model) -> torch.Tensor:
    tokens = torch.randint(17, (4, 6), generator=torch.Generator().manual_seed(1))
    inputs = model.get_input_embeddings()(tokens)
    logps = sequence_logps(model(inputs_embeds=inputs).logits, tokens, shift=True)
    reference = logps.detach() - torch.linspace(-1, 1, 4, dtype=logps.dtype)
    return WDPOLoss(0.5, rho=1.0, penalty="exact")(*logps.chunk(2), *reference.chunk(2), embeddings=inputs)


def wdpo_gradients(model) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(wdpo_loss(model), tuple(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def test_eager_attention_passes_and_sdpa_is_refused(kind):
    check_double_backward(build(kind))
    with pytest.raises(ValueError, match=r"SDPA's flash and memory-efficient.* kernels lack.*\"eager\""):
        check_double_backward(build(kind, "sdpa"))


def test_sdpa_passes_where_only_its_math_kernel_is_allowed(kind):
    model = build(kind, "sdpa")
    with sdpa_kernel(SDPBackend.MATH):
        check_double_backward(model)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]), pytest.raises(ValueError, match=r"SDPA's flash"):
        check_double_backward(model)


@pytest.mark.filterwarnings("ignore")
def test_what_passes_has_the_gradient_of_eager_attention(kind):
    close = {"rtol": 1e-4, "atol": 1e-5}  # Llama's eager softmax is float32 whatever the model is
    expected = wdpo_gradients(build(kind).double())
    with sdpa_kernel(SDPBackend.MATH):
        model = build(kind, "sdpa").double()
        check_double_backward(model)
        torch.testing.assert_close(wdpo_gradients(model), expected, **close)
    model = checkpointed(build(kind).double(), use_reentrant=False)
    check_double_backward(model)
    torch.testing.assert_close(wdpo_gradients(model), expected, **close)


class FirstOrderAttention(torch.autograd.Function):
    """As FlashAttention-2's: the backward fills tensors by a kernel, through which no graph goes."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return FirstOrderAttention.plain(query, key, value, mask, scale)

    @staticmethod
    def plain(query, key, value, mask, scale):
        return ((query @ key.mT * scale + mask).softmax(-1)) @ value

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            *inputs, mask = (saved.detach() for saved in ctx.saved_tensors)
            inputs = [saved.requires_grad_() for saved in inputs]
            output = FirstOrderAttention.plain(*inputs, mask, ctx.scale)
            filled = torch.autograd.grad(output, inputs, gradient.detach())
        return *filled, None, None


def first_order_attention(module, query, key, value, attention_mask, scaling=None, **_):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    mask = torch.full((query.shape[2],) * 2, float("-inf"), dtype=query.dtype).triu(1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return FirstOrderAttention.apply(query, key, value, mask, scale).transpose(1, 2), None


def test_attention_whose_backward_has_no_graph_has_the_right_value_and_a_wrong_gradient(kind):
    """Why FlashAttention is refused: nothing raises."""
    transformers.AttentionInterface.register("first_order", first_order_attention)
    right, wrong = build(kind).double(), build(kind).double()
    for parameter in (*right.parameters(), *wrong.parameters()):
        parameter.data.mul_(3)  # attention that tells its tokens apart
    wrong.set_attn_implementation("first_order")
    torch.testing.assert_close(wdpo_loss(wrong), wdpo_loss(right), rtol=1e-5, atol=1e-6)
    expected = torch.cat([gradient.flatten() for gradient in wdpo_gradients(right).values()])
    ours = torch.cat([gradient.flatten() for gradient in wdpo_gradients(wrong).values()])
    assert (ours - expected).norm() > 0.2 * expected.norm()
    with pytest.raises(ValueError, match=r"attention 'first_order' lacks or drops silently"):
        check_double_backward(wrong)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["flash", "math"])
def test_sdpa_has_a_second_derivative_in_its_math_kernel_alone(kind, backend):
    model = build(kind, "sdpa")
    with sdpa_kernel(backend):
        if backend == SDPBackend.MATH:
            wdpo_gradients(model)
            return
        with pytest.raises(RuntimeError, match=r"derivative for .*flash_attention.* is not implemented"):
            wdpo_gradients(model)


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_has_no_second_derivative(kind):
    with pytest.raises(RuntimeError, match=r"(?i)checkpoint"):
        wdpo_gradients(checkpointed(build(kind), use_reentrant=True))


@pytest.mark.parametrize(
    "attention",
    ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "flex_attention", "something_new"],
)
def test_attention_without_a_known_second_derivative_is_refused(kind, attention):
    model = build(kind)
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=rf"attention '{attention}' lacks or drops silently.*\"eager\""):
        check_double_backward(model)


def test_a_model_inside_a_wrapper_is_seen(kind):
    wrapper = torch.nn.ModuleDict({"module": build(kind)})
    check_double_backward(wrapper)
    wrapper["module"].config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        check_double_backward(wrapper)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_below_stage_3_passes(kind, stage):
    check_double_backward(build(kind), zero_stage=stage)


def test_zero_3_is_refused(kind):
    with pytest.raises(ValueError, match=r"ZeRO-3.*zero_stage 0, 1 or 2"):
        check_double_backward(build(kind), zero_stage=3)


def test_a_model_that_zero_3_has_taken_to_pieces_is_seen(kind):
    model = build(kind)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO-3"):
        check_double_backward(model)


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_is_refused(kind):
    with pytest.raises(ValueError, match=r"reentrant gradient checkpointing of .*\"use_reentrant\": False"):
        check_double_backward(checkpointed(build(kind), use_reentrant=True))
    # A function that was told nothing, like DeepSpeed's, is reentrant.
    checkpoint = torch.utils.checkpoint.checkpoint
    for untold in (checkpoint, functools.partial(checkpoint, preserve_rng_state=False)):
        model = build(kind)
        model._set_gradient_checkpointing(gradient_checkpointing_func=untold)
        with pytest.raises(ValueError, match=r"reentrant gradient checkpointing"):
            check_double_backward(model)


@pytest.mark.filterwarnings("ignore")
def test_checkpointing_that_was_disabled_again_passes(kind):
    model = checkpointed(build(kind), use_reentrant=True)
    model.gradient_checkpointing_disable()
    check_double_backward(model)
