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


def wdpo_gradients(model) -> dict[str, torch.Tensor]:
    tokens = torch.randint(17, (4, 6), generator=torch.Generator().manual_seed(1))
    inputs = model.get_input_embeddings()(tokens)
    logps = sequence_logps(model(inputs_embeds=inputs).logits, tokens, shift=True)
    reference = logps.detach() - torch.linspace(-1, 1, 4, dtype=logps.dtype)
    loss = WDPOLoss(0.5, rho=1.0)(*logps.chunk(2), *reference.chunk(2), embeddings=inputs)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, tuple(named.values()), allow_unused=True)
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


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "something_new"])
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
