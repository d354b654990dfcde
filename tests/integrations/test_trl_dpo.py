"""RobustDPOTrainer is DPOTrainer where their losses are the same, and trains the loss of the whole step where not."""

from __future__ import annotations

import pytest
import torch

from robustloss import (
    AOTPairedLoss,
    AOTUnpairedLoss,
    BetaDPOLoss,
    ChiPOLoss,
    DPOLoss,
    GroupDROLoss,
    KLDPOLoss,
    KTOLoss,
)

pytest.importorskip("trl", reason="needs TRL: pip install 'robustloss[trl]'")

from tiny_models import byte_tokenizer
from trl import DPOConfig, DPOTrainer
from trl_cases import dpo_trainer, history, load, moved, pairs, parameters_of, settings

from robustloss.integrations.trl import RobustDPOTrainer

# {DPOConfig's arguments: the loss that they are}
SAME = {
    "sigmoid": ({"loss_type": "sigmoid", "beta": 0.5}, lambda: DPOLoss(0.5)),
    "hinge": ({"loss_type": "hinge", "beta": 0.2}, lambda: DPOLoss(0.2, link="hinge")),
    "ipo": ({"loss_type": "ipo", "beta": 0.5}, lambda: DPOLoss(0.5, link="ipo")),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, lambda: DPOLoss(0.1, 0.1, "robust")),
    "aot": ({"loss_type": "aot", "beta": 0.5}, lambda: AOTPairedLoss(0.5)),
    "aot smoothed": (
        {"loss_type": "aot", "beta": 0.5, "label_smoothing": 0.1},
        lambda: AOTPairedLoss(0.5, label_smoothing=0.1),
    ),
    "aot_unpaired": ({"loss_type": "aot_unpaired", "beta": 0.5}, lambda: AOTUnpairedLoss(0.5)),
}


def assert_same_runs(ours, theirs, tolerance: float = 1e-6):
    """All that `theirs` has logged, and the parameters."""
    assert len(ours.state.log_history) == len(theirs.state.log_history) >= 2
    for mine, other in zip(history(ours), history(theirs), strict=True):
        assert {name: mine[name] for name in other} == pytest.approx(other, rel=tolerance, abs=tolerance)
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SAME)
def test_a_loss_that_trl_has_is_trained_and_logged_as_trl_does(gpt2_folder, tmp_path, name):
    config, loss = SAME[name]
    runs = []
    for kind, changes, options in ((RobustDPOTrainer, {}, {"loss": loss()}), (DPOTrainer, config, {})):
        options = options | {"ref_model": moved(gpt2_folder, dtype=torch.float64)}
        trainer = dpo_trainer(kind, load(gpt2_folder, dtype=torch.float64), tmp_path, options=options, **changes)
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    assert_same_runs(*runs)
    assert "eval_rewards/margins" in history(runs[0])[-1]
    assert not torch.equal(parameters_of(runs[0]), torch.cat([p.flatten() for p in load(gpt2_folder).parameters()]))


def peft_model(folder, name="default"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(load(folder), config)


@pytest.mark.parametrize("reference", ["precomputed", "by its name", "base under an adapter", "adapter ref"])
def test_the_reference_is_what_trl_takes(gpt2_folder, tmp_path, reference):
    runs = []
    for kind, options in ((RobustDPOTrainer, {"loss": DPOLoss(0.1)}), (DPOTrainer, {})):
        changes = {}
        if reference == "precomputed":
            changes["precompute_ref_log_probs"] = True
            options["ref_model"] = moved(gpt2_folder)
        if reference == "base under an adapter":
            options["peft_config"] = peft_config()
        model = peft_model(gpt2_folder) if reference == "adapter ref" else load(gpt2_folder)
        trainer = dpo_trainer(kind, model, tmp_path, options=options, **changes)
        assert (trainer.ref_model is None) == (reference in ("base under an adapter", "adapter ref"))
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    assert_same_runs(*runs)


def peft_config():
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'robustloss[train]'")
    return peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")


def test_experts_keep_their_auxiliary_loss(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def model(seed):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            router_aux_loss_coef=0.5,
            output_router_logits=True,
        )
        return MixtralForCausalLM(config)

    runs = []
    for kind, options in ((RobustDPOTrainer, {"loss": DPOLoss(0.1)}), (DPOTrainer, {})):
        trainer = dpo_trainer(
            kind, model(0), tmp_path, options=options | {"ref_model": model(1)}, gradient_accumulation_steps=2
        )
        if not getattr(trainer, "aux_loss_enabled", False):
            pytest.skip("this TRL has no auxiliary loss")
        trainer.train()
        runs.append(trainer)
    assert_same_runs(*runs)
    assert history(runs[0])[0]["aux_loss"] > 0.1


@pytest.mark.parametrize(
    "loss",
    [
        lambda: KLDPOLoss(0.5, tau=0.1),
        lambda: AOTPairedLoss(0.5),
        lambda: AOTUnpairedLoss(0.5),
        lambda: DPOLoss(0.5, link="ipo"),
        lambda: BetaDPOLoss(0.5, 0.3, 0.3, filtering="nearest"),
    ],
    ids=["kldpo", "aot paired", "aot unpaired", "ipo", "beta dpo"],
)
def test_accumulated_microbatches_train_as_one_batch(gpt2_folder, tmp_path, loss):
    runs = []
    for size, accumulation in ((12, 1), (5, 3)):  # 5 + 5 + 2
        trainer = dpo_trainer(
            RobustDPOTrainer,
            load(gpt2_folder),
            tmp_path,
            options={"loss": loss(), "ref_model": moved(gpt2_folder)},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append(trainer)
    whole, cut = runs
    torch.testing.assert_close(parameters_of(cut), parameters_of(whole), rtol=1e-5, atol=1e-6)
    for mine, other in zip(history(cut), history(whole), strict=True):
        # TRL's own metrics are means over microbatches, whose sizes differ here.
        names = [name for name in other if name in ("loss", "train_loss") or name.split("/")[0] in ("tilt", "beta_dpo")]
        assert {name: mine[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-5)
        assert names


def test_trl_would_have_trained_another_loss(gpt2_folder, tmp_path):
    """What a user of loss_type="aot" sees change: TRL sorts each microbatch by itself."""
    options = {"ref_model": moved(gpt2_folder)}
    changes = {"beta": 2.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 12, "max_steps": 1}
    plain = {}
    for loss_type in ("aot", "sigmoid"):
        trainer = dpo_trainer(DPOTrainer, load(gpt2_folder), tmp_path, options=options, loss_type=loss_type, **changes)
        trainer.train()
        plain[loss_type] = parameters_of(trainer)
    torch.testing.assert_close(plain["aot"], plain["sigmoid"], rtol=1e-6, atol=1e-7)

    options["loss"] = AOTPairedLoss(2.0)
    trainer = dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options=options, **changes)
    trainer.train()
    assert (parameters_of(trainer) - plain["sigmoid"]).abs().max() > 1e-4


def test_dropout_of_the_policy_is_the_same_in_both_passes(gpt2_folder, tmp_path):
    """Two microbatches of one loss: what the second pass backpropagates is what the first has looked at."""
    trainer = dpo_trainer(
        RobustDPOTrainer,
        load(gpt2_folder),
        tmp_path,
        options={"loss": KLDPOLoss(0.5, tau=0.1), "ref_model": moved(gpt2_folder)},
        disable_dropout=False,
        gradient_accumulation_steps=3,
        max_steps=1,
    )
    passes, arguments_of = [], trainer.loss_arguments

    def remember(model, inputs):
        arguments = arguments_of(model, inputs)
        passes.append(arguments["policy_chosen_logps"].detach())
        return arguments

    trainer.loss_arguments = remember
    trainer.train()
    second, third, _, second_again, third_again = passes
    assert torch.equal(second, second_again)
    assert torch.equal(third, third_again)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = trainer.with_reference(trainer.model, trainer._prepare_inputs(inputs))
    once, again = (arguments_of(trainer.model, inputs)["policy_chosen_logps"] for _ in range(2))
    assert not torch.equal(once, again)  # dropout is on


def test_the_reference_is_run_once_a_microbatch(gpt2_folder, tmp_path):
    trainer = dpo_trainer(
        RobustDPOTrainer,
        load(gpt2_folder),
        tmp_path,
        options={"loss": KLDPOLoss(0.5, tau=0.1), "ref_model": moved(gpt2_folder)},
        gradient_accumulation_steps=3,
        max_steps=2,
    )
    forwards = {"reference": 0, "policy": 0}

    def count(name):
        def hook(*_):
            forwards[name] += 1

        return hook

    trainer.ref_model.transformer.register_forward_hook(count("reference"))
    trainer.model.transformer.register_forward_hook(count("policy"))
    trainer.train()
    assert forwards == {"reference": 2 * 3, "policy": 2 * (3 + 2)}


@pytest.mark.parametrize(
    "loss",
    [lambda: BetaDPOLoss(0.5, 0.3, 0.3), lambda: GroupDROLoss(0.5, 2, 0.5)],
    ids=["beta dpo", "group dro"],
)
def test_a_resumed_run_goes_on_with_the_state_of_the_loss(gpt2_folder, tmp_path, loss):
    def trainer_of(**changes):
        return dpo_trainer(
            RobustDPOTrainer,
            load(gpt2_folder),
            tmp_path,
            data=pairs(group=lambda index: index % 2),
            options={"loss": loss(), "ref_model": moved(gpt2_folder)},
            gradient_accumulation_steps=2,
            max_steps=4,
            optim="adamw_torch",
            learning_rate=1e-3,
            **changes,
        )

    whole = trainer_of(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    for name, value in whole.loss.state_dict().items():
        assert torch.equal(resumed.loss.state_dict()[name], value)
        assert not torch.equal(value, loss().state_dict()[name])
    last, expected = history(resumed)[-2], history(whole)[-2]
    del last["num_tokens"], expected["num_tokens"]  # which TRL counts from the resumption
    assert last == expected


def test_groups_come_from_the_dataset(gpt2_folder, tmp_path):
    trainer = dpo_trainer(
        RobustDPOTrainer,
        load(gpt2_folder),
        tmp_path,
        data=pairs(group=lambda index: 0),
        options={"loss": GroupDROLoss(0.5, 2, 0.5), "ref_model": moved(gpt2_folder)},
        max_steps=1,
        precompute_ref_log_probs=True,
    )
    trainer.train()
    first = history(trainer)[0]
    assert first["group_dro/loss_0"] == pytest.approx(first["loss"] / first["group_dro/weight_0"], rel=1e-5)
    assert "group_dro/loss_1" not in first  # no pair has it
    assert "eval_group_dro/loss_1" in trainer.evaluate()


def test_rewards_of_their_own_are_logged(gpt2_folder, tmp_path):
    trainer = dpo_trainer(
        RobustDPOTrainer,
        load(gpt2_folder),
        tmp_path,
        options={"loss": ChiPOLoss(0.5), "ref_model": moved(gpt2_folder)},
        max_steps=1,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = trainer.with_reference(trainer.model, inputs)
    arguments = trainer.loss_arguments(trainer.model, inputs)
    chosen = trainer.loss.rewards(arguments["policy_chosen_logps"], arguments["ref_chosen_logps"]).mean().item()
    trainer.train()
    assert history(trainer)[0]["rewards/chosen"] == pytest.approx(chosen, rel=1e-5)


def test_an_offset_link_has_log_ratios_for_rewards(gpt2_folder, tmp_path):
    trainer = dpo_trainer(
        RobustDPOTrainer, load(gpt2_folder), tmp_path, options={"loss": AOTPairedLoss(0.2, link="squared_hinge")}
    )
    assert trainer.beta == 1.0


def test_outputs_for_compute_metrics_have_logits(gpt2_folder, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape[-1])
        return {"seen": 1.0}

    options = {"loss": KLDPOLoss(0.5, tau=0.1), "compute_metrics": compute_metrics}
    trainer = dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options=options)
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert seen == [257]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "aot"}, r"loss_type=\['aot'\].*AOTPairedLoss\(\)"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, "loss_type"),
        ({"loss_weights": [2.0]}, r"loss_weights=\[2\.0\]"),
        ({"label_smoothing": 0.1}, r"label_smoothing=0\.1.*DPOLoss\(label_smoothing=\.\.\.\)"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence'"),
        ({"f_alpha_divergence_coef": 0.3}, r"f_alpha_divergence_coef=0\.3"),
        ({"ld_alpha": 0.5}, r"ld_alpha=0\.5"),
        ({"use_weighting": True}, "use_weighting=True"),
        ({"discopop_tau": 0.1}, r"discopop_tau=0\.1.*KLDPOLoss\(tau=\.\.\.\)"),
        ({"beta": 0.3}, r"beta=0\.3\) contradicts DPOLoss\(beta=0\.5.*give beta to the loss"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor .* DPOLoss\(label_smoothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_the_loss_would_ignore_are_refused_by_name(gpt2_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options={"loss": DPOLoss(0.5)}, **changes)


def test_beta_may_be_said_twice(gpt2_folder, tmp_path):
    trainer = dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options={"loss": DPOLoss(0.3)}, beta=0.3)
    assert trainer.beta == 0.3


def test_liger_is_refused_where_it_replaces_the_loss(gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("robustloss.integrations.trl_dpo.FUSED_HEAD", False)
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        RobustDPOTrainer(load(gpt2_folder), args=args, train_dataset=pairs(), loss=DPOLoss())


def test_losses_of_other_data_name_their_trainer(gpt2_folder, tmp_path):
    with pytest.raises(TypeError, match=r"KTOLoss needs single completions.*RobustKTOTrainer"):
        dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options={"loss": KTOLoss()})
    with pytest.raises(TypeError, match=r"loss must be a PreferenceLoss .* got str"):
        dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options={"loss": "kldpo"})
    with pytest.raises(ValueError, match="GroupDROLoss needs the column 'group' in train_dataset"):
        dpo_trainer(RobustDPOTrainer, load(gpt2_folder), tmp_path, options={"loss": GroupDROLoss()})


@pytest.mark.parametrize("many", [False, True])
def test_every_evaluation_dataset_needs_the_groups_too(gpt2_folder, tmp_path, many):
    args = DPOConfig(**settings(tmp_path))
    data = {"args": args, "train_dataset": pairs(group=lambda index: 0), "processing_class": byte_tokenizer()}
    lacking = {"one": data["train_dataset"], "other": pairs(4)} if many else pairs(4)
    with pytest.raises(ValueError, match="GroupDROLoss needs the column 'group' in eval_dataset"):
        RobustDPOTrainer(load(gpt2_folder), **data, eval_dataset=lacking, loss=GroupDROLoss())
    trainer = RobustDPOTrainer(load(gpt2_folder), **data, loss=GroupDROLoss())
    example = {name: value for name, value in trainer.train_dataset[0].items() if name != "group"}
    with pytest.raises(ValueError, match="the column 'group', which this dataset lacks"):
        trainer.data_collator([example])


def test_what_is_recorded_of_a_run_names_the_loss_and_its_beta(gpt2_folder, tmp_path):
    given = DPOConfig(**settings(tmp_path))
    trainer = RobustDPOTrainer(
        load(gpt2_folder),
        args=given,
        train_dataset=pairs(),
        processing_class=byte_tokenizer(),
        loss=KLDPOLoss(0.5, tau=0.2),
    )
    assert (trainer.args.beta, given.beta) == (0.5, 0.1)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "This model was trained with DPO with KLDPOLoss(beta=0.5, " in card
    assert "- robustloss" in card


def test_compiled_models_train_the_same(gpt2_folder, tmp_path):
    """As far as how they are wrapped goes: nothing is compiled here."""
    runs = []
    for changes in ({"torch_compile": True, "torch_compile_backend": "eager"}, {}):
        trainer = dpo_trainer(
            RobustDPOTrainer,
            load(gpt2_folder),
            tmp_path,
            options={"loss": KLDPOLoss(0.5, tau=0.2), "ref_model": moved(gpt2_folder)},
            gradient_accumulation_steps=3,
            max_steps=1,
            **changes,
        )
        with torch.compiler.set_stance("force_eager"):
            trainer.train()
        runs.append(trainer)
    compiled, plain = runs
    torch.testing.assert_close(parameters_of(compiled), parameters_of(plain), rtol=1e-5, atol=1e-6)


def test_a_forward_finds_no_outputs_of_the_last_one_in_memory(gpt2_folder, tmp_path):
    trainer = dpo_trainer(
        RobustDPOTrainer,
        load(gpt2_folder),
        tmp_path,
        options={"loss": KLDPOLoss(0.5, tau=0.1), "ref_model": moved(gpt2_folder)},
        gradient_accumulation_steps=3,
        max_steps=1,
    )
    kept = []
    trainer.model.register_forward_pre_hook(lambda *_: kept.append(trainer._outputs))
    trainer.train()
    assert kept == [None] * 5


def test_virtual_tokens_of_prompt_tuning_are_no_part_of_a_completion(gpt2_folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'robustloss[train]'")
    runs = []
    for kind, options in ((RobustDPOTrainer, {"loss": DPOLoss(0.1)}), (DPOTrainer, {})):
        torch.manual_seed(5)
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        trainer = dpo_trainer(kind, load(gpt2_folder), tmp_path, options={**options, "peft_config": config})
        trainer.train()
        runs.append(trainer)
    assert_same_runs(*runs)
