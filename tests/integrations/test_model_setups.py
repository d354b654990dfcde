"""Hugging Face models as people train them: ours beside a plain log_softmax of the model's own logits, in float64.

Tied heads, soft caps, logit scales and LoRA on the head are in tests/train/test_loss_module.py, one by one and through
LossModule; here are the five lines of a loop of one's own, and what goes together.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from robustloss import AOTPairedLoss, DPOLoss, KLDPOLoss, linear_sequence_logps, sequence_logps
from robustloss.train import LossModule

transformers = pytest.importorskip("transformers", reason="pip install robustloss[train]")

VOCABULARY, PAIRS, TOKENS = 64, 3, 9
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny(kind, **config):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | config)
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().train()


def phi():
    model = tiny("Phi", num_key_value_heads=4, resid_pdrop=0.0)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {
    "tied head": lambda: tiny("Llama", tie_word_embeddings=True),
    "head with a bias": phi,
    "soft cap, tied head": lambda: tiny("Gemma2", final_logit_softcapping=0.5),
    "logit scale, tied head": lambda: tiny("Cohere", logit_scale=0.25),
    "logits scaling": lambda: tiny("Granite", logits_scaling=8.0),
}


def batch():
    """Chosen rows, then rejected; of each two tokens of a prompt, and padding on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (2 * PAIRS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = mask[4, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


REFS = -25 + torch.randn(2, PAIRS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_log_softmax(model, inputs, labels):
    logps = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets != -100, picked, 0.0).sum(-1)


def by_logits(model, inputs, labels):
    return sequence_logps(model(**inputs, use_cache=False).logits, labels, shift=True, inplace_backward=True)


def by_hidden(model, inputs, labels):
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    config = model.config
    return linear_sequence_logps(
        hidden,
        model.lm_head.weight,
        labels,
        bias=model.lm_head.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        shift=True,
    )


def by_hidden_of_each_side(model, inputs, labels):
    """A forward for the chosen and one for the rejected: two calls, whose gradients meet in one head."""
    sides = [slice(0, PAIRS), slice(PAIRS, None)]
    return torch.cat([by_hidden(model, {k: v[s] for k, v in inputs.items()}, labels[s]) for s in sides])


def trained(model, logps_fn, loss):
    """(loss, gradients by name) of a step."""
    model.zero_grad()
    chosen, rejected = logps_fn(model, *batch()).chunk(2)
    value = loss(chosen, rejected, *REFS)
    value.backward()
    return value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_five_lines_train_as_a_log_softmax_does(name):
    model, loss = MODELS[name](), KLDPOLoss(beta=0.5, tau=0.1)
    expected = trained(model, by_log_softmax, loss)
    assert "model.embed_tokens.weight" in expected[1]
    assert ("lm_head.weight" in expected[1]) != ("tied" in name)
    for logps_fn in (by_logits, by_hidden, by_hidden_of_each_side):
        assert_same_step(trained(model, logps_fn, loss), expected)


def test_a_tied_head_is_trained_in_both_its_uses():
    """The embedding's gradient is the sum of what a copy of it gets as the embedding and another one as the head."""
    tied, untied = (tiny("Llama", tie_word_embeddings=tie) for tie in (True, False))
    weights = tied.state_dict()
    untied.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    loss = DPOLoss(0.5)
    value, gradients = trained(tied, by_hidden, loss)
    apart, parts = trained(untied, by_hidden, loss)
    torch.testing.assert_close(value, apart)
    torch.testing.assert_close(
        gradients["model.embed_tokens.weight"], parts["model.embed_tokens.weight"] + parts["lm_head.weight"]
    )
    assert all(parts[name].abs().max() > 0 for name in ("model.embed_tokens.weight", "lm_head.weight"))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, loss = MODELS["soft cap, tied head"](), AOTPairedLoss(0.5)
    expected = trained(model, by_log_softmax, loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for logps_fn in (by_logits, by_hidden):
        assert_same_step(trained(model, logps_fn, loss), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
def test_the_log_probabilities_themselves_may_be_checkpointed(use_reentrant, frozen):
    model, loss = MODELS["head with a bias"](), DPOLoss(0.5)
    model.lm_head.requires_grad_(not frozen)

    def checkpointed(model, inputs, labels):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state

        def logps(hidden, weight, bias):
            return linear_sequence_logps(hidden, weight, labels, bias=bias, shift=True)

        return checkpoint(logps, hidden, model.lm_head.weight, model.lm_head.bias, use_reentrant=use_reentrant)

    assert_same_step(trained(model, checkpointed, loss), trained(model, by_log_softmax, loss))


def with_adapter(**config):
    peft = pytest.importorskip("peft", reason="pip install robustloss[train]")
    config = {"r": 2, "init_lora_weights": False} | config
    return peft.get_peft_model(MODELS["soft cap, tied head"](), peft.LoraConfig(**config)).double()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["frozen head", "head with an adapter", "head trained whole"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_lora_on_a_tied_and_capped_model_that_is_checkpointed(config):
    model, loss = with_adapter(**config), KLDPOLoss(beta=0.5, rho=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    module = LossModule(model)

    def by_module(_, inputs, labels):
        return torch.cat(list(module(inputs | {"labels": labels}, output="logps").values()))

    expected = trained(model, by_log_softmax, loss)
    assert any("lora_A" in name for name in expected[1])
    assert_same_step(trained(model, by_module, loss), expected)
