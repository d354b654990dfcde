from __future__ import annotations

import pytest
import torch
from tiny_models import byte_tokenizer, pair_rows, tiny_gpt2, tiny_llama, unpaired_rows
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from robustloss.losses import LOSSES, DPOLoss, KTOLoss, WDPOLoss
from robustloss.train import data
from robustloss.train.loss_module import LossModule, check_head

SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


def gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.5))


def cohere():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.0625))


def granite():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0))


MODELS = {
    "gpt2, tied": lambda: tiny_gpt2(tied=True),
    "gpt2, untied": lambda: tiny_gpt2(tied=False),
    "llama, tied": lambda: tiny_llama(tied=True),
    "llama, untied": lambda: tiny_llama(tied=False),
    "gemma2, soft cap": gemma2,
    "cohere, logit scale": cohere,
    "granite, logits scaling": granite,
}


def make_batch(rows=None, kind="preference", mismatched=False):
    tokenizer = byte_tokenizer()
    rows = rows or pair_rows(4)
    examples = data.tokenize_rows(rows, tokenizer, kind=kind, max_length=64, truncation="prompt", source="test")
    if mismatched:
        examples = data.add_mismatched(examples, tokenizer, max_length=64)
    return data.Collator(256, kind, mismatched=mismatched)(list(enumerate(examples)))


def naive_logps(model, batch, prefix=""):
    """Of the model's own logits, by the definition."""
    ids, mask, labels = (batch[prefix + key] for key in ("input_ids", "attention_mask", "labels"))
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets != -100, picked, 0.0).sum(-1)


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_are_those_of_the_models_own_logits(name):
    model = MODELS[name]().double().eval()
    batch = make_batch()
    module = LossModule(model)
    ours = torch.cat(list(module(batch, output="logps").values()))
    theirs = naive_logps(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    # The head's gradient (and through it a tied embedding's) comes from outside the head's own forward.
    ours.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    theirs.square().mean().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[key], parameter.grad, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )
    check_head(module, model, batch)


def test_a_model_with_a_transform_of_its_own_is_refused():
    class Doubled(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model = Doubled(tiny_gpt2().config).eval()
    nn.init.normal_(model.transformer.wte.weight)
    with pytest.raises(ValueError, match="Doubled transforms its logits"):
        check_head(LossModule(model), model, make_batch())


def lora_head(**config):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, **config)
    return peft.get_peft_model(tiny_llama().double(), config).double()


@pytest.mark.parametrize("form", ["one adapter", "two adapters", "merged", "dora"])
def test_a_lora_wrapped_head_is_applied(form, caplog):
    import peft

    wrapped = lora_head(use_dora=form == "dora").eval()
    if form == "two adapters":
        wrapped.add_adapter("other", peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
        wrapped.double().base_model.set_adapter(["default", "other"])
    elif form == "merged":
        wrapped.merge_adapter()
    with caplog.at_level("INFO", logger="robustloss"):
        module = LossModule(wrapped)
    assert ("logits are computed in full" in caplog.text) == (form == "dora")
    batch = make_batch()
    ours = torch.cat(list(module(batch, output="logps").values()))
    torch.testing.assert_close(ours, naive_logps(wrapped, batch), rtol=1e-10, atol=1e-10)
    base = torch.cat(list(module(batch, output="base_logps").values()))
    with wrapped.disable_adapter():
        torch.testing.assert_close(base, naive_logps(wrapped, batch), rtol=1e-10, atol=1e-10)
    assert (base - ours).abs().max() > 1e-3


def test_a_lora_wrapped_head_is_trained_and_drops_out():
    wrapped = lora_head(lora_dropout=0.5)
    module, batch = LossModule(wrapped), make_batch()
    losses = []
    for logps in (
        lambda: torch.cat(list(module(batch, output="logps").values())),
        lambda: naive_logps(wrapped, batch),
    ):
        torch.manual_seed(0)  # of the dropout
        losses.append(logps().square().sum())
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    torch.testing.assert_close(*[torch.autograd.grad(loss, trained) for loss in losses], rtol=1e-8, atol=1e-8)


def with_reference(module, batch, shift=0.0):
    with torch.no_grad():
        logps = module(batch, output="logps")
    return batch | {f"ref_{name}": value + shift * torch.randn_like(value) for name, value in logps.items()}


@pytest.mark.parametrize("name", ["dpo", "aot_paired"])
def test_the_loss_is_ln_2_where_the_policy_is_its_reference(name):
    module = LossModule(tiny_gpt2().eval(), LOSSES[name](beta=0.1))
    loss = module(with_reference(module, make_batch()))
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-6)
    assert set(module.logps) == {"chosen_logps", "rejected_logps"}
    assert float(module.metrics["rewards/margins"]) == 0


def test_the_loss_is_the_losss_own_of_the_naive_log_probabilities():
    torch.manual_seed(0)
    model = tiny_llama().double().eval()
    module = LossModule(model, DPOLoss(beta=0.3))
    batch = with_reference(module, make_batch(), shift=1.0)
    chosen, rejected = naive_logps(model, batch).chunk(2)
    expected = DPOLoss(beta=0.3)(chosen, rejected, batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    torch.testing.assert_close(module(batch), expected)


def test_kto_takes_its_reference_point_from_mismatched_pairs():
    torch.manual_seed(0)
    model = tiny_gpt2().double().eval()
    module = LossModule(model, KTOLoss(beta=0.5))
    batch = with_reference(module, make_batch(unpaired_rows(6), "unpaired", mismatched=True), shift=1.0)
    kl = naive_logps(model, batch, "mismatched_") - batch["ref_mismatched_logps"]
    expected = KTOLoss(beta=0.5)(naive_logps(model, batch), batch["ref_logps"], batch["desirable"], kl_logratios=kl)
    torch.testing.assert_close(module(batch), expected)


@pytest.fixture
def wdpo():
    torch.manual_seed(0)
    model = tiny_gpt2()
    model.set_attn_implementation("eager")
    # Weights of order one, so that the penalty is no rounding error beside the loss.
    for parameter in model.parameters():
        parameter.data.mul_(4)
    module = LossModule(model.double().eval(), WDPOLoss(beta=0.5, rho=0.3, penalty="exact"))
    return module, with_reference(module, make_batch(), shift=1.0)


def test_wdpo_gradient_through_the_model_is_that_of_finite_differences(wdpo):
    module, batch = wdpo
    module(batch).backward()
    generator = torch.Generator().manual_seed(1)
    parameters = list(module.parameters())
    direction = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters]
    along = sum((parameter.grad * part).sum() for parameter, part in zip(parameters, direction, strict=True))

    def loss_at(step):
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.add_(part, alpha=step)
            value = module(batch)
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.sub_(part, alpha=step)
        return value

    step = 1e-6
    torch.testing.assert_close(along, (loss_at(step) - loss_at(-step)) / (2 * step), rtol=1e-5, atol=1e-7)
    assert float(module.metrics["penalty/value"]) > 0.01 * float(loss_at(0.0))


def test_wdpo_evaluates_without_grad_to_the_same_value(wdpo):
    module, batch = wdpo
    with torch.no_grad():
        evaluated = module(batch)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, module(batch).detach())


def test_wdpo_penalty_does_not_depend_on_the_padding(wdpo):
    module, batch = wdpo
    expected = module(batch).detach()
    padding = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    padded = {key: nn.functional.pad(batch[key], (0, 5), value=value) for key, value in padding.items()}
    torch.testing.assert_close(module(batch | padded).detach(), expected)


def test_log_probabilities_that_are_not_finite_name_the_rows():
    model = tiny_gpt2().eval()
    module = LossModule(model, DPOLoss())
    batch = with_reference(module, make_batch())
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"chosen_logps are not finite for rows \[0, 1, 2, 3\]"):
        module(batch)
