"""Any subclass of Trainer trains the loss of the whole step's samples, however these are cut into microbatches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robustloss import AOTPairedLoss, AOTUnpairedLoss, BetaDPOLoss, DPOLoss, GroupDROLoss, KLDPOLoss, WDPOLoss
from robustloss.functional import sequence_logps
from robustloss.global_batch import NonFiniteError

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'robustloss[train]'")

from robustloss.integrations.transformers import GlobalBatchMixin  # noqa: E402

VOCABULARY, TOKENS, WIDTH = 11, 5, 6
LOSSES = {
    "dpo": lambda: DPOLoss(0.5),
    "kldpo": lambda: KLDPOLoss(0.5, tau=0.2),
    "aot paired": lambda: AOTPairedLoss(0.5),
    "aot unpaired": lambda: AOTUnpairedLoss(0.5),
    "beta dpo": lambda: BetaDPOLoss(0.5, 0.3, 0.3),
    "group dro": lambda: GroupDROLoss(0.5, 2, 0.5),
}


class Policy(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.forwards = 0
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, input_ids):
        self.forwards += 1
        return self.head(torch.tanh(self.hidden(self.dropout(self.embed(input_ids)))))


class PairTrainer(GlobalBatchMixin, transformers.Trainer):
    """The least that a user writes."""

    def loss_arguments(self, model, inputs):
        labels = torch.cat([inputs["chosen"], inputs["rejected"]])
        logps = sequence_logps(model(labels), labels, shift=True)
        ref = torch.cat([inputs["ref_chosen"], inputs["ref_rejected"]])
        if not self.loss.paired:
            desirable = torch.arange(len(logps)) < len(logps) // 2
            return {"policy_logps": logps, "ref_logps": ref, "desirable": desirable}
        (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref.chunk(2)
        arguments = {
            "policy_chosen_logps": chosen,
            "policy_rejected_logps": rejected,
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        return arguments | ({"groups": inputs["group"]} if self.loss.needs_groups else {})


class CountingTrainer(PairTrainer):
    def samples(self, microbatch):
        return len(microbatch["chosen"]) * (1 if self.loss.paired else 2)


def rows(count: int = 10) -> list[dict]:
    generator = torch.Generator().manual_seed(1)

    def tokens():
        return torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    return [
        {
            "chosen": tokens(),
            "rejected": tokens(),
            "ref_chosen": torch.tensor(-9.0 - index, dtype=torch.float64),
            "ref_rejected": torch.tensor(-12.0 + index, dtype=torch.float64),
            "group": torch.tensor(index % 2),
        }
        for index in range(count)
    ]


def trainer_of(folder, loss, *, kind=PairTrainer, model=None, data=None, **changes):
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 10,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": [],
    }
    args = transformers.TrainingArguments(str(folder), **(options | changes))
    return kind(model or Policy(), args, train_dataset=data or rows(), eval_dataset=rows(4), loss=loss)


def parameters_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.mark.parametrize("kind", [PairTrainer, CountingTrainer])
@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_of_any_sizes_train_as_one_batch(tmp_path, name, kind):
    whole = trainer_of(tmp_path, LOSSES[name]())
    whole.train()
    # Ten rows an epoch, as 4 + 4 + 2.
    cut = trainer_of(tmp_path, LOSSES[name](), kind=kind, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    cut.train()

    torch.testing.assert_close(parameters_of(cut), parameters_of(whole), rtol=1e-12, atol=0)
    assert not torch.equal(parameters_of(cut), parameters_of(trainer_of(tmp_path, LOSSES[name]())))
    for metric in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert logged(cut, metric) == pytest.approx(logged(whole, metric), rel=1e-6)
    for key, value in whole.loss.state_dict().items():
        torch.testing.assert_close(cut.loss.state_dict()[key], value, rtol=1e-12, atol=0)


def test_a_last_step_of_fewer_microbatches_is_the_loss_of_its_own_samples(tmp_path):
    cut = trainer_of(
        tmp_path,
        KLDPOLoss(0.5, tau=0.2),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_grad_norm=0.0,
    )
    steps, fetch = [], cut.get_batch_samples

    def remember(*arguments):
        microbatches, items = fetch(*arguments)
        steps.append(microbatches)
        return microbatches, items

    cut.get_batch_samples = remember
    cut.train()
    assert [len(microbatches) for microbatches in steps] == [3, 2]

    model = Policy()
    for microbatches in steps:
        inputs = {key: torch.cat([each[key] for each in microbatches]) for key in microbatches[0]}
        model.zero_grad()
        cut.loss(**cut.loss_arguments(model, inputs)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(parameters_of(cut), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["dpo", "kldpo"])
def test_dropout_is_the_same_in_both_passes_of_a_microbatch(tmp_path, name):
    trainer = trainer_of(
        tmp_path,
        LOSSES[name](),
        model=Policy(dropout=0.5),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_grad_norm=0.0,
        seed=3,
    )
    microbatches, arguments_of = [], trainer.loss_arguments

    def remember(model, inputs):
        if not torch.is_grad_enabled() and not microbatches:
            microbatches.append(torch.get_rng_state())
        arguments = arguments_of(model, inputs)
        if torch.is_grad_enabled():
            microbatches.append(inputs)
        return arguments

    trainer.loss_arguments = remember
    before = Policy(dropout=0.5)
    trainer.train()

    # One graph of all microbatches, drawn in the order of the first passes: 1, 2 and then 0.
    state, first, second, third = microbatches
    torch.set_rng_state(state)
    arguments = [arguments_of(before, inputs) for inputs in (second, third, first)]
    whole = {key: torch.cat([each[key] for each in arguments]) for key in arguments[0]}
    LOSSES[name]()(**whole).backward()
    with torch.no_grad():
        expected = torch.cat([(p - 0.05 * p.grad).flatten() for p in before.parameters()])
    torch.testing.assert_close(parameters_of(trainer), expected, rtol=1e-12, atol=1e-14)


def test_a_mean_whose_samples_are_counted_needs_no_extra_forward(tmp_path):
    forwards = {}
    for kind in (PairTrainer, CountingTrainer):
        for name in ("dpo", "kldpo"):
            trainer = trainer_of(
                tmp_path, LOSSES[name](), kind=kind, per_device_train_batch_size=4, gradient_accumulation_steps=3
            )
            trainer.train()
            forwards[kind.__name__, name] = trainer.model.forwards
    assert forwards == {
        ("PairTrainer", "dpo"): 2 * (3 + 2),
        ("PairTrainer", "kldpo"): 2 * (3 + 2),
        ("CountingTrainer", "dpo"): 2 * 3,
        ("CountingTrainer", "kldpo"): 2 * (3 + 2),
    }


def test_random_numbers_stand_afterwards_where_one_pass_leaves_them(tmp_path):
    states = []
    for name in ("dpo", "kldpo"):  # one pass, and two
        trainer = trainer_of(
            tmp_path,
            LOSSES[name](),
            kind=CountingTrainer,
            model=Policy(dropout=0.5),
            per_device_train_batch_size=5,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_evaluation_is_the_loss_of_its_batches_and_leaves_the_state_as_it_is(tmp_path):
    trainer = trainer_of(tmp_path, BetaDPOLoss(0.5, 0.3, 0.3), per_device_eval_batch_size=4)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.loss.state_dict().items()}
    metrics = trainer.evaluate()
    assert before.keys() == {"margin_mean", "margin_std", "batches"}
    assert all(torch.equal(value, before[name]) for name, value in trainer.loss.state_dict().items())

    inputs = transformers.default_data_collator(rows(4))
    with torch.no_grad():
        value, shown = trainer.loss.eval()(**trainer.loss_arguments(trainer.model, inputs), return_metrics=True)
    assert metrics["eval_loss"] == pytest.approx(float(value), rel=1e-6)
    assert metrics["eval_beta_dpo/beta"] == pytest.approx(float(shown["beta_dpo/beta"]), rel=1e-6)


@pytest.mark.parametrize("name", ["beta dpo", "group dro"])
def test_a_resumed_run_has_the_state_of_the_loss(tmp_path, name):
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
    }
    whole = trainer_of(tmp_path, LOSSES[name](), save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = trainer_of(tmp_path, LOSSES[name](), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    for key, value in whole.loss.state_dict().items():
        assert torch.equal(resumed.loss.state_dict()[key], value)
        assert not torch.equal(value, LOSSES[name]().state_dict()[key])


def test_a_checkpoint_without_the_state_or_with_anothers_is_refused(tmp_path):
    trainer_of(tmp_path, BetaDPOLoss(0.5), save_strategy="steps", save_steps=1, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="not the state of GroupDROLoss"):
        trainer_of(tmp_path, GroupDROLoss(0.5)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "loss.safetensors").unlink()
    with pytest.raises(ValueError, match=r"loss\.safetensors.* is missing, which holds the state of BetaDPOLoss"):
        trainer_of(tmp_path, BetaDPOLoss(0.5)).train(resume_from_checkpoint=str(checkpoint))


def test_a_loss_without_a_state_writes_no_file(tmp_path):
    trainer_of(tmp_path, KLDPOLoss(0.5, tau=1.0), save_strategy="steps", save_steps=1, max_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "loss.safetensors").exists()


@pytest.mark.parametrize("kind", [PairTrainer, CountingTrainer])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["dpo", "kldpo"])
def test_what_is_not_finite_ends_the_step_before_its_last_backward(tmp_path, name, accumulation, kind):
    data = rows()
    data[7]["ref_chosen"].fill_(math.nan)
    size = 10 if accumulation == 1 else 4
    trainer = trainer_of(
        tmp_path,
        LOSSES[name](),
        kind=kind,
        data=data,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    before = parameters_of(trainer)
    with pytest.raises(NonFiniteError, match="ref_chosen_logps not finite at"):
        trainer.train()
    assert torch.equal(parameters_of(trainer), before)


def test_a_step_taken_by_hand_is_one_batch(tmp_path):
    trainer = trainer_of(tmp_path, KLDPOLoss(0.5, tau=0.2))
    inputs = transformers.default_data_collator(rows())
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    trainer.model.zero_grad()
    expected = trainer.loss(**trainer.loss_arguments(trainer.model, inputs))
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    theirs = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


class WrongTrainer(PairTrainer):
    def samples(self, microbatch):
        return 1


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"loss must be a PreferenceLoss such as KLDPOLoss\(tau=0\.1\), got str"):
        trainer_of(tmp_path, "kldpo")
    with pytest.raises(ValueError, match="reduction='none'"):
        trainer_of(tmp_path, DPOLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"WrongTrainer\.samples says 1 of a microbatch.* 4 samples"):
        trainer_of(
            tmp_path,
            DPOLoss(),
            kind=WrongTrainer,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
        ).train()
    trainer = trainer_of(tmp_path, DPOLoss())
    with pytest.raises(ValueError, match="override prediction_step"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


def test_a_class_that_is_no_trainer_or_another_releases_is_told_so(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"GlobalBatchMixin before a subclass of transformers\.Trainer"):
        type("Alone", (GlobalBatchMixin,), {})(loss=DPOLoss())
    monkeypatch.delattr(transformers.Trainer, "get_batch_samples")
    with pytest.raises(ImportError, match=r"PairTrainer needs get_batch_samples of Trainer, which transformers \d"):
        trainer_of(tmp_path, DPOLoss())


def test_what_the_loss_would_ignore_or_not_work_with_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, DPOLoss())
    for owner, name, value, message in (
        (trainer, "compute_loss_func", print, "compute_loss_func would not be called"),
        (trainer.args, "label_smoothing_factor", 0.1, r"label_smoothing_factor .* DPOLoss\(label_smoothing"),
        (trainer.args, "_n_gpu", 2, "one process sees 2"),
        (trainer.accelerator.state, "parallelism_config", SimpleNamespace(tp_size=2), "has tp_size=2: use data par"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(ValueError, match=message):
                trainer._check_trainer()


def test_exact_wdpo_that_couples_several_microbatches_names_the_directional_one(tmp_path):
    trainer = trainer_of(
        tmp_path,
        WDPOLoss(squared=False, penalty="exact"),
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(ValueError, match=r"2\s+accumulation step\(s\).*penalty='central'.*directional"):
        trainer.train()


class WeightedTrainer(PairTrainer):
    def loss_arguments(self, model, inputs):
        return super().loss_arguments(model, inputs) | {"weights": inputs["weight"]}


class CountingWeightedTrainer(WeightedTrainer):
    def samples(self, microbatch):
        return float(microbatch["weight"].sum())


@pytest.mark.parametrize("kind", [WeightedTrainer, CountingWeightedTrainer])
def test_a_microbatch_whose_weights_are_all_zero_adds_nothing(tmp_path, kind):
    data = rows()
    for index, row in enumerate(data):
        row["weight"] = torch.tensor(0.0 if 4 <= index < 8 else 1.0 + index, dtype=torch.float64)
    options = {"kind": kind, "data": data, "train_sampling_strategy": "sequential"}
    whole = trainer_of(tmp_path, DPOLoss(0.5), **options)
    whole.train()
    cut = trainer_of(tmp_path, DPOLoss(0.5), per_device_train_batch_size=4, gradient_accumulation_steps=3, **options)
    cut.train()
    torch.testing.assert_close(parameters_of(cut), parameters_of(whole), rtol=1e-12, atol=0)
    assert logged(cut, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)


def backwards_until(trainer, error, match) -> int:
    """How many backward calls there were before the error."""
    calls, backward = [], trainer.accelerator.backward

    def count(value, **options):
        calls.append(value)
        backward(value, **options)

    trainer.accelerator.backward = count
    before = parameters_of(trainer)
    with pytest.raises(error, match=match):
        trainer.train()
    assert torch.equal(parameters_of(trainer), before)
    return len(calls)


@pytest.mark.parametrize("kind", [CountingTrainer, WrongTrainer])
def test_what_one_process_finds_wrong_is_told_to_all_after_their_backwards(tmp_path, kind):
    """Raised at once, it would leave the others waiting: only the last backward of a step has not been started."""
    data = rows()
    if kind is CountingTrainer:
        data[0]["ref_chosen"].fill_(1.7e308)
        data[0]["ref_rejected"].fill_(-1.7e308)
    trainer = trainer_of(
        tmp_path,
        DPOLoss(0.5),
        kind=kind,
        data=data,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        train_sampling_strategy="sequential",
    )
    error, match = (NonFiniteError, "too large") if kind is CountingTrainer else (ValueError, "samples says 1")
    assert backwards_until(trainer, error, match) == 2


def test_under_deepspeed_numbers_of_samples_keep_their_digits(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, DPOLoss())
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    trainer.is_deepspeed_enabled = True
    inputs = {
        "pixels": torch.rand(2, 3),
        "tokens": torch.tensor([[1, 2]]),
        "ref_chosen": torch.tensor([-351.3, -0.1]),
        "weight": torch.tensor([0.3, 1.1], dtype=torch.float64),
        "ref_token_logps": torch.tensor([[-0.3, -0.1]]),
    }
    prepared = trainer._prepare_inputs(inputs)
    assert prepared.keys() == inputs.keys()
    assert prepared["pixels"].dtype == torch.bfloat16
    for name in inputs.keys() - {"pixels"}:
        assert prepared[name].dtype == inputs[name].dtype
        assert torch.equal(prepared[name], inputs[name])


def state_of(trainer) -> dict:
    return {name: value.tolist() for name, value in trainer.loss.state_dict().items()}


@pytest.mark.parametrize("name", ["beta dpo", "group dro"])
def test_samples_that_a_smaller_batch_size_takes_again_count_once(tmp_path, name):
    options = {"max_steps": 2, "logging_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = trainer_of(tmp_path, LOSSES[name](), auto_find_batch_size=True, per_device_train_batch_size=8, **options)
    backward, failures = trainer.accelerator.backward, []

    def overflow(value, **arguments):
        if trainer._train_batch_size == 8:
            failures.append(value)
            raise RuntimeError("CUDA out of memory. Tried")
        backward(value, **arguments)

    trainer.accelerator.backward = overflow
    trainer.train()
    assert len(failures) == 1
    direct = trainer_of(tmp_path, LOSSES[name](), per_device_train_batch_size=trainer._train_batch_size, **options)
    direct.train()
    assert state_of(trainer) == state_of(direct)
    assert logged(trainer, "logps/chosen") == pytest.approx(logged(direct, "logps/chosen"), rel=1e-12)


def test_a_model_that_begins_anew_has_a_loss_that_does(tmp_path):
    args = trainer_of(tmp_path, DPOLoss()).args
    loss = BetaDPOLoss(0.5, 0.3, 0.3)
    trainer = PairTrainer(None, args, model_init=lambda: Policy(), train_dataset=rows(), loss=loss)
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append((logged(trainer, "loss"), parameters_of(trainer).tolist(), state_of(trainer)))
    assert runs[0] == runs[1]
    assert runs[0][2] != {name: value.tolist() for name, value in BetaDPOLoss(0.5, 0.3, 0.3).state_dict().items()}


def test_the_best_model_comes_with_the_state_that_its_loss_had(tmp_path):
    trainer = trainer_of(
        tmp_path,
        BetaDPOLoss(0.5, 0.3, 0.3),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_global_step < 3
    assert int(trainer.loss.batches) == trainer.state.best_global_step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-9)


def test_metrics_are_the_means_since_the_last_log_of_the_batches_that_have_them(tmp_path):
    data = rows()
    for index, row in enumerate(data):
        row["group"].fill_(0 if index < 5 else 1)
    options = {"data": data, "per_device_train_batch_size": 5, "max_steps": 4, "train_sampling_strategy": "sequential"}
    every = trainer_of(tmp_path, LOSSES["group dro"](), **options)
    every.train()
    some = trainer_of(tmp_path, LOSSES["group dro"](), logging_steps=4, **options)
    some.train()
    for name, count in (("logps/chosen", 4), ("group_dro/loss_0", 2), ("group_dro/loss_1", 2)):
        values = logged(every, name)
        assert len(values) == count
        assert logged(some, name) == [pytest.approx(sum(values) / count, rel=1e-12)]


def test_an_evaluations_metrics_have_its_prefix_and_are_its_own(tmp_path):
    trainer = trainer_of(tmp_path, KLDPOLoss(0.5, tau=0.2))
    first = trainer.evaluate()
    trainer.predict(rows(10))
    assert trainer.evaluate()["eval_logps/chosen"] == first["eval_logps/chosen"]
    test = trainer.evaluate(metric_key_prefix="test")
    assert test["test_logps/chosen"] == first["eval_logps/chosen"]
    assert not any(name.startswith("eval_") for name in test)
    found = trainer.evaluate({"few": rows(4), "many": rows(10)})
    assert found["eval_few_logps/chosen"] == first["eval_logps/chosen"]
    assert found["eval_many_logps/chosen"] != first["eval_logps/chosen"]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


@pytest.mark.parametrize("sized", [False, True])
def test_a_step_that_trainer_leaves_unfinished_is_warned_of_once(tmp_path, sized, recwarn):
    trainer = trainer_of(
        tmp_path,
        KLDPOLoss(0.5, tau=0.2),
        data=rows() if sized else Stream(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=4,
    )
    trainer.train()
    told = [str(warning.message) for warning in recwarn if "accumulation steps" in str(warning.message)]
    assert len(told) == (0 if sized else 1)
    assert sized or "an epoch ended after 2 of 3 accumulation steps" in told[0]


def test_every_place_that_trainer_knows_parallelism_from_is_asked(tmp_path):
    trainer = trainer_of(tmp_path, DPOLoss())
    trainer.get_cp_size = lambda: 2
    with pytest.raises(ValueError, match=r"cp_size=2: use data parallelism"):
        trainer._check_trainer()
