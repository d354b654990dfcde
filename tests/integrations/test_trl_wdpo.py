"""WDPO in RobustDPOTrainer: all passes of a step, over all its microbatches, within Trainer's loop."""

from __future__ import annotations

import pytest
import torch

from robustloss import DPOLoss, WDPOLoss
from robustloss.global_batch import NonFiniteError
from robustloss.penalty import directional_step

pytest.importorskip("trl", reason="needs TRL: pip install 'robustloss[trl]'")

from trl import DPOConfig
from trl_cases import dpo_trainer, history, load, moved, parameters_of

from robustloss.integrations.trl import RobustDPOTrainer
from robustloss.train.loss_module import LossModule

RHO = 0.5  # so that the penalty is a good part of the gradient
EAGER = {"attn_implementation": "eager"}


def trainer_of(folder, tmp_path, loss, *, size=12, accumulation=1, model=None, options=None, **changes):
    return dpo_trainer(
        RobustDPOTrainer,
        load(folder, **EAGER) if model is None else model,
        tmp_path,
        options={"loss": loss, "ref_model": moved(folder, **EAGER)} if options is None else {"loss": loss, **options},
        **{
            "max_steps": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            **changes,
        },
    )


def update_of(trainer) -> torch.Tensor:
    """What one step has added to the parameters."""
    before = parameters_of(trainer)
    trainer.train()
    return parameters_of(trainer) - before


def step_by_hand(trainer) -> tuple[float, torch.Tensor]:
    """The same from `directional_step` on the model without its head: (value, what SGD would add)."""
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = trainer.with_reference(trainer.model, trainer._prepare_inputs(inputs))
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "ref_chosen_logps", "ref_rejected_logps")}
    batch["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    batch["index"] = torch.arange(len(batch["ref_chosen_logps"]))
    module = LossModule(trainer.model, trainer.loss)
    trainer.model.train()
    value, _ = directional_step(trainer.loss, [batch], module.arguments_at, torch.Tensor.backward)
    update = torch.cat([-trainer.args.learning_rate * p.grad.flatten() for p in trainer.model.parameters()])
    return float(value), update


def relative_error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("penalty", ["central", "one_sided"])
def test_a_step_of_any_cut_is_the_directional_step_of_the_whole_batch(gpt2_folder, tmp_path, penalty, squared):
    seen = WDPOLoss(0.5, RHO, squared, penalty=penalty, step=1e-3)
    step_by_hand(trainer_of(gpt2_folder, tmp_path, seen))  # a one-sided difference has running means from here on

    def loss():
        loss = WDPOLoss(0.5, RHO, squared, penalty=penalty, step=1e-3)
        loss.load_state_dict(seen.state_dict())
        return loss

    value, expected = step_by_hand(trainer_of(gpt2_folder, tmp_path, loss()))
    whole = trainer_of(gpt2_folder, tmp_path, loss())
    assert relative_error(update_of(whole), expected) < 1e-3  # rounding of a difference over a step of 1e-3
    assert history(whole)[0]["loss"] == pytest.approx(value, rel=1e-5)

    cut = trainer_of(gpt2_folder, tmp_path, loss(), size=5, accumulation=3)  # 5 + 5 + 2
    update = update_of(cut)
    assert history(cut)[0]["loss"] == pytest.approx(value, rel=1e-5)
    assert history(cut)[0]["penalty/value"] == pytest.approx(history(whole)[0]["penalty/value"], rel=1e-5)
    assert relative_error(update, expected) < 1e-3
    assert cut.accelerator.gradient_state.sync_gradients


@pytest.mark.parametrize("squared", [True, False])
def test_the_directional_gradient_is_the_exact_one(gpt2_folder, tmp_path, squared):
    exact = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, squared, penalty="exact"))
    central = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, squared))
    plain = trainer_of(gpt2_folder, tmp_path, DPOLoss(0.5))
    expected = update_of(exact)
    assert relative_error(update_of(central), expected) < 1e-2
    assert relative_error(update_of(plain), expected) > 0.1
    for name in ("loss", "penalty/value", "penalty/gradient_norm", "entropy", "logits/chosen", "rewards/margins"):
        assert history(central)[0][name] == pytest.approx(history(exact)[0][name], rel=1e-5, abs=1e-7)


def test_exact_wdpo_accumulates_where_it_is_a_mean(gpt2_folder, tmp_path):
    whole = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, penalty="exact"))
    cut = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, penalty="exact"), size=5, accumulation=3)
    assert relative_error(update_of(cut), update_of(whole)) < 1e-5
    assert history(cut)[0]["loss"] == pytest.approx(history(whole)[0]["loss"], rel=1e-6)


def test_trls_own_metrics_are_those_of_the_unmoved_embeddings(gpt2_folder, tmp_path):
    """All microbatches are run in the last one's turn, and each is logged once."""
    ours = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO), size=4, accumulation=3)
    plain = trainer_of(gpt2_folder, tmp_path, DPOLoss(0.5), size=4, accumulation=3)
    update_of(ours), update_of(plain)
    names = history(plain)[0].keys() - {"loss", "grad_norm"}
    assert {"entropy", "num_tokens", "mean_token_accuracy", "rewards/chosen", "logps/chosen"} < names
    first = history(ours)[0]
    assert {name: first[name] for name in names} == pytest.approx({name: history(plain)[0][name] for name in names})
    assert first["penalty/slope_error"] < 0.05


def test_gradients_are_exchanged_in_the_last_backward_of_a_step_only(gpt2_folder, tmp_path):
    trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO), size=4, accumulation=3)
    exchanged, backward = [], trainer.accelerator.backward

    def remember(value, **options):
        exchanged.append(trainer.accelerator.sync_gradients)
        backward(value, **options)

    trainer.accelerator.backward = remember
    trainer.train()
    assert exchanged == [False] * 8 + [True]


def test_dropout_is_the_same_in_every_pass(gpt2_folder, tmp_path):
    """Were it not, a difference over a step of 1e-3 would be one of two masks."""
    trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO), disable_dropout=False, size=4, accumulation=3)
    update_of(trainer)
    assert history(trainer)[0]["penalty/slope_error"] < 0.05


def test_a_frozen_embedding_under_an_adapter_has_a_penalty(gpt2_folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'robustloss[train]'")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    updates = []
    for loss in (WDPOLoss(0.5, RHO, penalty="exact"), WDPOLoss(0.5, RHO, step=3e-4), DPOLoss(0.5)):
        torch.manual_seed(0)  # of the adapter, which older releases make without one
        trainer = trainer_of(gpt2_folder, tmp_path, loss, options={"peft_config": config})
        updates.append(update_of(trainer))
    exact, central, plain = updates
    assert relative_error(central, exact) < 1e-2
    assert relative_error(plain, exact) > 0.3


def test_an_evaluation_has_the_penalty_and_leaves_the_state_as_it_is(gpt2_folder, tmp_path):
    shown = {}
    for penalty in ("exact", "central", "one_sided"):
        trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, penalty=penalty))
        before = {name: value.clone() for name, value in trainer.loss.state_dict().items()}
        shown[penalty] = trainer.evaluate()
        assert all(torch.equal(value, before[name]) for name, value in trainer.loss.state_dict().items())
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert shown["exact"]["eval_penalty/value"] > 0
    for name in ("eval_loss", "eval_penalty/value", "eval_penalty/gradient_norm", "eval_rewards/margins"):
        assert shown["central"][name] == pytest.approx(shown["exact"][name], rel=1e-5)
        assert shown["one_sided"][name] == pytest.approx(shown["exact"][name], rel=1e-5)


def test_a_resumed_one_sided_run_goes_on_with_its_running_means(gpt2_folder, tmp_path):
    def run(**changes):
        loss = WDPOLoss(0.5, RHO, penalty="one_sided")
        return trainer_of(gpt2_folder, tmp_path, loss, size=4, max_steps=4, **changes)

    whole = run(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert torch.equal(resumed.loss.mean_square, whole.loss.mean_square)
    assert whole.loss.mean_square > 0


def test_a_loss_outside_of_any_step_has_the_gradient_of_one_batch(gpt2_folder, tmp_path):
    trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    ours = torch.cat([-trainer.args.learning_rate * p.grad.flatten() for p in trainer.model.parameters()])
    _, expected = step_by_hand(trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO)))
    assert relative_error(ours, expected) < 1e-3


def test_models_without_a_second_derivative_are_told_of_the_directional_one(gpt2_folder, tmp_path):
    loss = WDPOLoss(0.5, RHO, penalty="exact")
    model = load(gpt2_folder, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r'attn_implementation="eager".*penalty=\'central\''):
        trainer_of(gpt2_folder, tmp_path, loss, model=model).train()
    rooted = WDPOLoss(0.5, RHO, squared=False, penalty="exact")
    with pytest.raises(ValueError, match=r"squared=False couples.*3 accumulation step.*directional"):
        trainer_of(gpt2_folder, tmp_path, rooted, size=4, accumulation=3).train()


@pytest.mark.parametrize("penalty", ["central", "exact"])
def test_log_probabilities_that_are_not_finite_end_the_step(gpt2_folder, tmp_path, penalty):
    model = load(gpt2_folder, **EAGER)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, penalty=penalty), model=model)
    with pytest.raises(NonFiniteError, match="not finite in microbatch 0"):
        trainer.train()


def test_an_auxiliary_loss_of_experts_is_refused(gpt2_folder, tmp_path):
    if not hasattr(DPOConfig, "router_aux_loss_coef"):
        pytest.skip("this TRL has no auxiliary loss")
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
    )
    with pytest.raises(ValueError, match=r"WDPOLoss has no auxiliary loss.*router_aux_loss_coef=0\.0"):
        trainer_of(gpt2_folder, tmp_path, WDPOLoss(), model=MixtralForCausalLM(config))


def test_an_optimizer_that_steps_in_its_backward_is_refused(gpt2_folder, tmp_path):
    trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5))
    for name in ("lomo", "galore_adamw_layerwise"):
        trainer.args.optim = name
        with pytest.raises(ValueError, match=f"optim='{name}' steps in every backward"):
            trainer._check_trainer()


@pytest.mark.parametrize("penalty", ["central", "exact"])
def test_a_compiled_model_is_refused(gpt2_folder, tmp_path, penalty):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(ValueError, match=r"torch_compile=True .* set it to False"):
        trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, penalty=penalty), **compiled)


def test_the_exact_gradient_is_that_of_the_masks_that_were_drawn(gpt2_folder, tmp_path):
    """One forward: its log-probabilities, its penalty and both derivatives have one mask."""
    updates = []
    for loss in (WDPOLoss(0.5, RHO, penalty="exact"), WDPOLoss(0.5, RHO, step=3e-4)):
        trainer = trainer_of(gpt2_folder, tmp_path, loss, disable_dropout=False, seed=4)
        updates.append(update_of(trainer))
    assert relative_error(updates[1], updates[0]) < 2e-2


def test_autocast_measures_a_step_that_survives_its_rounding(gpt2_folder, tmp_path):
    with pytest.raises(ValueError, match=r"'one_sided' has no good step in bfloat16"):
        trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, penalty="one_sided"), bf16=True)
    trainer = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO), bf16=True, size=4, accumulation=3)
    exact = trainer_of(gpt2_folder, tmp_path, WDPOLoss(0.5, RHO, penalty="exact"))
    assert relative_error(update_of(trainer), update_of(exact)) < 0.05
    assert trainer.loss.measured_step > 0.005
