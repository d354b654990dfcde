"""RobustKTOTrainer against TRL's own KTOTrainer, and against one gradient of the loss of a whole step, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from robustloss import AOTUnpairedLoss, DPOLoss, KLDPOLoss, KTOLoss

pytest.importorskip("trl", reason="needs TRL: pip install 'robustloss[trl]'")

import trl
from datasets import Dataset
from tiny_models import byte_tokenizer, save_tiny, tiny_gpt2, tiny_llama, unpaired_rows
from trl_cases import TIMES, history, load, parameters_of, settings

from robustloss.integrations.trl_kto import FUSED_HEAD, RobustKTOTrainer

# Before TRL gave log-probabilities itself, both round in their own way: by a unit in the last place of 50 to 100 nats.
TOLERANCE = 1e-6 if FUSED_HEAD else 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), tiny_llama())


@pytest.fixture
def make(folder, tmp_path):
    """make(trainer class, **options) -> trainer: options of the config, or of the trainer."""

    def make_trainer(kind=RobustKTOTrainer, rows=None, **options):
        names = {field.name for field in dataclasses.fields(trl.KTOConfig)}
        changes = {name: options.pop(name) for name in list(options) if name in names}
        args = trl.KTOConfig(**settings(tmp_path, learning_rate=0.3) | changes)
        data = Dataset.from_list(unpaired_rows(8) if rows is None else rows)
        return kind(options.pop("model", folder), args=args, train_dataset=data, **options)

    return make_trainer


@pytest.fixture
def train(make):
    """As make, and trained: (parameters, what was logged at each step)."""

    def train_trainer(*arguments, **options):
        trainer = make(*arguments, **options)
        trainer.train()
        return parameters_of(trainer), history(trainer)

    return train_trainer


def assert_same_run(got, expected, keys_of=None):
    (parameters, logged), (expected_parameters, expected_logged) = got, expected
    torch.testing.assert_close(parameters, expected_parameters, rtol=0, atol=TOLERANCE)
    for record, wanted in zip(logged, expected_logged, strict=True):
        names = wanted if keys_of is None else wanted.keys() & keys_of
        assert {name: record[name] for name in names} == pytest.approx(
            {name: wanted[name] for name in names}, rel=TOLERANCE, abs=TOLERANCE
        )


def moe():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        **sizes, vocab_size=257, num_key_value_heads=1, num_local_experts=3, router_aux_loss_coef=0.1
    )
    return MixtralForCausalLM(config)


def lora(folder):
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, lambda folder: {}),
        ({"loss_type": "apo_zero_unpaired"}, lambda folder: {}),
        ({"precompute_ref_log_probs": True}, lambda folder: {}),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1}, lambda folder: {}),
        ({}, lora),
    ],
    ids=["kto", "apo zero unpaired", "precomputed", "synchronised reference", "adapter"],
)
def test_with_one_microbatch_a_step_kto_is_trls_own(train, folder, options, extra):
    expected = train(trl.KTOTrainer, beta=0.5, desirable_weight=1.3, undesirable_weight=0.7, **options, **extra(folder))
    assert_same_run(train(loss=KTOLoss(0.5, 1.3, 0.7), **options, **extra(folder)), expected)
    losses = [record["loss"] for record in expected[1] if "loss" in record]
    assert len({round(loss, 4) for loss in losses}) == 3  # something was learned


def test_an_adapter_that_is_there_beforehand_is_the_reference(make, folder):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'robustloss[train]'")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    runs = []
    for kind, options in ((RobustKTOTrainer, {"loss": KTOLoss(0.5)}), (trl.KTOTrainer, {"beta": 0.5})):
        torch.manual_seed(5)
        model = peft.get_peft_model(load(folder), config)
        trainer = make(kind, model=model, processing_class=byte_tokenizer(), **options)
        assert trainer.ref_model is None
        assert "ref" in trainer.accelerator.unwrap_model(trainer.model).peft_config
        trainer.train()
        runs.append((parameters_of(trainer), history(trainer)))
    assert_same_run(*runs)


def test_the_auxiliary_loss_of_experts_is_kept(train, tmp_path):
    path = save_tiny(tmp_path / "moe", moe())
    expected = train(trl.KTOTrainer, beta=0.5, model=path)
    assert_same_run(train(loss=KTOLoss(0.5), model=path), expected)
    assert expected[1][0]["aux_loss"] > 0


def completion_logps(model, batch, prefix=""):
    """By the book: log_softmax and gather."""
    tokens, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
    logits = model(input_ids=tokens, attention_mask=batch[f"{prefix}attention_mask"]).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (logps * mask[:, 1:]).sum(-1)


@pytest.mark.parametrize("loss", [KTOLoss(0.5, 1.3, 0.7), AOTUnpairedLoss(0.5)], ids=["kto", "aot"])
def test_a_step_of_several_microbatches_is_one_gradient_of_the_loss_of_all_samples(make, loss):
    # Two undesirable, then six desirable: every microbatch holds one class only; the last has one sample.
    rows = [row | {"label": index >= 2} for index, row in enumerate(unpaired_rows(7))]
    settings = {"rows": rows, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make(loss=loss, **settings)
    model, reference = make(loss=loss, **settings).model, trainer.ref_model
    with torch.no_grad():  # so that the mismatched pairs have a say
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    arguments = {"policy_logps": [], "ref_logps": [], "desirable": [], "kl_logratios": []}
    for batch in trainer.get_train_dataloader():
        arguments["policy_logps"].append(completion_logps(model, batch))
        with torch.no_grad():
            arguments["ref_logps"].append(completion_logps(reference, batch))
            if loss.needs_mismatched:
                ratios = completion_logps(model, batch, "KL_") - completion_logps(reference, batch, "KL_")
                arguments["kl_logratios"].append(ratios)
        arguments["desirable"].append(torch.as_tensor(batch["label"], dtype=torch.bool))
    value, metrics = loss(**{n: torch.cat(every) for n, every in arguments.items() if every}, return_metrics=True)
    value.backward()
    expected = torch.cat([(p - 0.3 * p.grad).detach().flatten() for p in model.parameters()])

    trainer.train()
    torch.testing.assert_close(parameters_of(trainer), expected, rtol=0, atol=TOLERANCE)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(value.item(), rel=1e-5)
    if loss.needs_mismatched:
        assert logged["kl"] == pytest.approx(metrics["kl"].item(), rel=1e-4)
        assert logged["kl"] > 0
    else:
        assert logged["dominance/violation_w1"] == pytest.approx(metrics["dominance/violation_w1"].item(), rel=1e-4)


def test_a_sort_in_four_microbatches_is_the_sort_of_one_batch(train):
    whole = train(loss=AOTUnpairedLoss(0.5), per_device_train_batch_size=8)
    parts = train(loss=AOTUnpairedLoss(0.5), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_run(parts, whole, keys_of={"loss", "dominance/violation_area", "dominance/violation_w1"})


def test_every_metric_of_trl_is_kept_and_the_losss_are_added(train):
    its = train(trl.KTOTrainer, max_steps=1)[1]
    assert its[0].keys() <= train(loss=KTOLoss(), max_steps=1)[1][0].keys()
    ours = train(loss=AOTUnpairedLoss(), max_steps=1)[1]
    assert ours[0].keys() - its[0].keys() == {"dominance/violation_area", "dominance/violation_w1"}


def test_an_evaluation_is_trls_own_and_leaves_the_model_as_it_is(make):
    rows = Dataset.from_list(unpaired_rows(8)[4:])
    its = make(trl.KTOTrainer, beta=0.5, eval_dataset=rows)
    ours = make(loss=KTOLoss(0.5), eval_dataset=rows)
    for trainer in (its, ours):
        trainer.train()
    before = parameters_of(ours)
    timeless = {name: value for name, value in its.evaluate().items() if not name.endswith(TIMES)}
    found = ours.evaluate()
    assert {name: found[name] for name in timeless} == pytest.approx(timeless, rel=1e-5, abs=TOLERANCE)
    assert {"eval_loss", "eval_kl", "eval_rewards/margins"} <= found.keys()
    assert torch.equal(parameters_of(ours), before)


def test_a_loss_without_mismatched_pairs_makes_none(make):
    trainer = make(loss=AOTUnpairedLoss(), train_sampling_strategy="random", per_device_train_batch_size=1)
    assert "KL_completion_ids" not in trainer.train_dataset.column_names
    assert "KL_completion_ids" in make(loss=KTOLoss()).train_dataset.column_names


def test_the_models_run_no_more_often_than_needed(make):
    trainer = make(loss=KTOLoss(), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1)
    calls = {"policy": 0, "reference": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    trainer.model.get_decoder().register_forward_hook(count("policy"))
    trainer.ref_model.get_decoder().register_forward_hook(count("reference"))
    trainer.train()
    # Of 3 microbatches: mismatched pairs once each, and of the policy the first passes of two of them.
    assert calls == {"policy": 3 + 2 + 3, "reference": 3 + 3}


def test_both_passes_of_a_microbatch_draw_the_same_dropout(make, tmp_path):
    trainer = make(
        model=save_tiny(tmp_path / "gpt2", tiny_gpt2(dropout=0.3)),
        loss=KTOLoss(),
        disable_dropout=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=1,
    )
    seen, find = [], trainer.loss_arguments

    def loss_arguments(model, inputs):
        arguments = find(model, inputs)
        seen.append(arguments["policy_logps"].detach())
        return arguments

    trainer.loss_arguments = loss_arguments
    trainer.train()
    second, third, _, *again = seen  # the first has one pass
    assert torch.equal(torch.stack([second, third]), torch.stack(again))
    trainer.model.eval()
    batch = list(trainer.get_train_dataloader())[1]
    assert not torch.allclose(second, completion_logps(trainer.model, batch), atol=1e-3)


def test_the_given_config_is_left_alone_and_the_trainers_says_what_the_loss_is(make, tmp_path, folder):
    given = trl.KTOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    rows = Dataset.from_list(unpaired_rows(8))
    before = dataclasses.asdict(given)
    trainer = RobustKTOTrainer(folder, args=given, train_dataset=rows, loss=KTOLoss(0.7, 1.5, 0.2))
    args = trainer.args
    assert (args.beta, args.desirable_weight, args.undesirable_weight, trainer.beta) == (0.7, 1.5, 0.2, 0.7)
    assert dataclasses.asdict(given) == before


def test_rewards_of_a_link_whose_beta_is_an_offset_are_the_log_ratios(make):
    assert make(loss=AOTUnpairedLoss(0.2, link="least_squares")).beta == 1.0


@pytest.mark.parametrize("loss", [DPOLoss(), KLDPOLoss(tau=0.1)], ids=lambda loss: type(loss).__name__)
def test_a_paired_loss_is_sent_to_the_other_trainer(make, loss):
    with pytest.raises(TypeError, match=f"{type(loss).__name__} needs pairs: use .*RobustDPOTrainer"):
        make(loss=loss)


def test_what_is_no_loss_is_refused(make):
    with pytest.raises(TypeError, match="loss must be a PreferenceLoss such as KTOLoss\\(\\), got str"):
        make(loss="kto")


@pytest.mark.parametrize(
    ("loss", "option", "message"),
    [
        (
            KTOLoss(0.3),
            {"beta": 0.2},
            r"KTOConfig\(beta=0.2\) would be ignored, .*give it to the loss, KTOLoss\(beta=...\)",
        ),
        (KTOLoss(), {"desirable_weight": 1.3}, r"KTOLoss\(desirable_weight=...\)"),
        (KTOLoss(), {"undesirable_weight": 0.3}, r"KTOLoss\(undesirable_weight=...\)"),
        (AOTUnpairedLoss(), {"undesirable_weight": 0.3}, "undesirable_weight=0.3.* AOTUnpairedLoss has none"),
        (AOTUnpairedLoss(), {"loss_type": "apo_zero_unpaired"}, "loss_type='apo_zero_unpaired'.* would be ignored"),
    ],
)
def test_an_option_that_the_loss_would_ignore_is_refused_by_name(make, loss, option, message):
    with pytest.raises(ValueError, match=message):
        make(loss=loss, **option)


def test_a_model_that_lies_in_memory_will_do(make, folder):
    trainer = make(model=load(folder), processing_class=byte_tokenizer(), loss=KTOLoss(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5)  # at the reference, of sigmoid(0)


@pytest.mark.filterwarnings("ignore:.return_outputs:FutureWarning")
def test_compute_metrics_gets_logits(make):
    rows = Dataset.from_list(unpaired_rows(4))
    trainer = make(
        loss=KTOLoss(), eval_dataset=rows, compute_metrics=lambda found: {"vocabulary": found.predictions.shape[-1]}
    )
    assert trainer.evaluate()["eval_vocabulary"] == 257
