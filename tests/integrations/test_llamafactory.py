"""robustloss in LLaMA-Factory's stages dpo and kto: stand-ins for 0.9.5's trainers, and these where they are there."""

from __future__ import annotations

import os
import runpy
import sys
import weakref
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'robustloss[train]'")
pytest.importorskip("accelerate", reason="pip install 'robustloss[train]'")

from released import import_released  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from robustloss import (  # noqa: E402
    AOTPairedLoss,
    AOTUnpairedLoss,
    DPOLoss,
    GroupDROLoss,
    KLDPOLoss,
    KTOLoss,
    WDPOLoss,
    sequence_logps,
)
from robustloss.integrations import llamafactory  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS, TOKENS, PROMPT, VOCABULARY = 8, 8, 3, 17
ABSENT = "torchaudio torchvision av modelscope tiktoken"
OPTIONS = {
    "pref_beta": 0.1,
    "pref_ftx": 0.0,
    "pref_bco_weight": 0.0,
    "pref_loss": "sigmoid",
    "dpo_label_smoothing": 0.0,
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "ld_alpha": None,
    "disable_shuffling": True,
}


class StandIn(Trainer):
    """What LLaMA-Factory 0.9.5's two trainers and the TRL trainers beneath them have in common."""

    def __init__(self, model, ref_model, finetuning_args, processor=None, **options):
        options["processing_class"] = options.pop("tokenizer")
        self.finetuning_args, self.ref_model = finetuning_args, ref_model
        self.beta, self.loss_type = finetuning_args.pref_beta, finetuning_args.pref_loss
        self.ftx_gamma = finetuning_args.pref_ftx
        self._stored_metrics = defaultdict(lambda: defaultdict(list))
        super().__init__(model=model, **options)

    def _get_train_sampler(self, *arguments, **options):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def get_batch_samples(self, *arguments, **options):
        return Trainer.get_batch_samples(self, *arguments, **options)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        self.store_metrics(metrics, "train")
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, metrics = self.get_batch_loss_metrics(model, inputs)
        self.store_metrics(metrics, "eval")
        return loss.detach(), None, None

    def store_metrics(self, metrics, train_eval):
        for name, value in metrics.items():
            self._stored_metrics[train_eval][name].append(value)

    def log(self, logs, *arguments, **options):
        for name, values in self._stored_metrics.pop("train" if "loss" in logs else "eval", {}).items():
            logs[name] = sum(values) / len(values)
        Trainer.log(self, logs, *arguments, **options)


class StandInDPO(StandIn):
    def concatenated_forward(self, model, batch, is_ref_model=False):
        batch = dict(batch)
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits.float()
        logps = sequence_logps(logits, labels, shift=True, average=self.loss_type == "ipo")
        chosen, rejected = logps.chunk(2)
        averages = chosen / (labels[: len(chosen), 1:] != -100).sum(-1)
        logits = dict(zip(("chosen_logits", "rejected_logits"), logits.chunk(2), strict=True))
        return {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_logps_avg": averages, **logits}

    def compute_reference_log_probs(self, model, batch):
        with torch.no_grad():
            outputs = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
        return outputs["chosen_logps"], outputs["rejected_logps"]

    def compute_preference_loss(self, chosen, rejected, ref_chosen, ref_rejected):
        raise NotImplementedError("LLaMA-Factory's own losses")

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        outputs = self.concatenated_forward(model, batch)
        chosen, rejected = outputs["chosen_logps"], outputs["rejected_logps"]
        reference = self.compute_reference_log_probs(model, batch)
        losses, chosen_rewards, rejected_rewards = self.compute_preference_loss(chosen, rejected, *reference)
        if self.ftx_gamma > 1e-6:
            losses += self.ftx_gamma * -outputs["chosen_logps_avg"]
        metrics = {"rewards/chosen": chosen_rewards.mean().item(), "logps/chosen": chosen.mean().item()}
        metrics["logits/chosen"] = outputs["chosen_logits"].mean().item()
        return losses.mean(), metrics | {"rewards/margins": (chosen_rewards - rejected_rewards).mean().item()}


class StandInKTO(StandIn):
    def forward(self, model, batch, prefix=""):
        inputs = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, return_dict=True, use_cache=False).logits.float()
        labels = batch[f"{prefix}labels"]
        return (
            logits,
            sequence_logps(logits, labels, shift=True),
            sequence_logps(logits, labels, shift=True, average=True),
        )

    def concatenated_forward(self, model, batch):
        logits, logps, averages = self.forward(model, batch)
        with torch.no_grad():
            _, mismatched, _ = self.forward(model, batch, prefix="kl_")
        desirable = batch["kto_tags"]
        sides = (logps[desirable], logps[~desirable], logits[desirable], logits[~desirable])
        return *sides, mismatched, averages[desirable]

    def compute_reference_log_probs(self, model, batch):
        with torch.no_grad():
            chosen, rejected, _, _, mismatched, _ = self.concatenated_forward(self.ref_model, batch)
        return chosen, rejected, mismatched

    def kto_loss(self, *logps):
        raise NotImplementedError("LLaMA-Factory's own loss")

    def get_batch_loss_metrics(self, model, batch):
        chosen, rejected, _, _, mismatched, _ = self.concatenated_forward(model, batch)
        ref_chosen, ref_rejected, ref_mismatched = self.compute_reference_log_probs(model, batch)
        losses, _, _, kl = self.kto_loss(chosen, rejected, mismatched, ref_chosen, ref_rejected, ref_mismatched)
        return losses.nanmean(), {"kl": kl.item()}


def stage_of(loss):
    return "dpo" if loss.paired else "kto"


@pytest.fixture(params=["stand-in", "release"], scope="module")
def trainers(request):
    """(trainer class by stage, options to what the trainer takes)."""
    if request.param == "stand-in":
        return {"dpo": StandInDPO, "kto": StandInKTO}, lambda stage, options: SimpleNamespace(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DISABLE_VERSION_CHECK", "1")
        dpo = import_released("llamafactory.train.dpo.trainer", absent=ABSENT).CustomDPOTrainer
        kto = import_released("llamafactory.train.kto.trainer", absent=ABSENT).CustomKTOTrainer
        hparams = import_released("llamafactory.hparams", absent=ABSENT)
    return {"dpo": dpo, "kto": kto}, lambda stage, options: hparams.FinetuningArguments(stage=stage, **options)


def rows(stage):
    """ROWS rows that are already padded; of pairs both completions, of labelled ones the mismatched one too."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (ROWS, 2, TOKENS), generator=generator)
    return [{"ids": pair, "tag": index % 3 != 0, "stage": stage} for index, pair in enumerate(ids)]


def collate(features):
    """As LLaMA-Factory's collators: chosen rows first; or rows, mismatched rows (kl_) and tags."""
    ids = torch.stack([feature["ids"] for feature in features], dim=1)  # [2, B, T]

    def inputs(rows, prefix=""):
        labels = rows.clone()
        labels[:, :PROMPT] = -100
        return {f"{prefix}input_ids": rows, f"{prefix}attention_mask": torch.ones_like(rows), f"{prefix}labels": labels}

    if features[0]["stage"] == "dpo":
        return inputs(ids.flatten(0, 1))
    tags = torch.tensor([feature["tag"] for feature in features])
    return inputs(ids[0]) | inputs(ids[1], "kl_") | {"kto_tags": tags}


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, **sizes))


def make_trainer(trainers, loss, folder, microbatches=1, *, stage=None, **options):
    classes, arguments_of = trainers
    stage = stage or stage_of(loss)
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4 // microbatches,
        gradient_accumulation_steps=microbatches,
        per_device_eval_batch_size=ROWS,
        learning_rate=0.2,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    return llamafactory.robust(classes[stage])(
        model=model_of(0),
        ref_model=model_of(0),
        args=arguments,
        finetuning_args=arguments_of(stage, OPTIONS | options),
        processor=None,
        tokenizer=None,
        data_collator=collate,
        train_dataset=rows(stage),
        eval_dataset=rows(stage),
        loss=loss,
    )


def trained(*arguments, **options):
    """(parameters [P] after two steps, what was logged)."""
    trainer = make_trainer(*arguments, **options)
    trainer.train()
    parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return parameters, [logs for logs in trainer.state.log_history if "loss" in logs]


@pytest.mark.parametrize(
    ("make_loss", "options"),
    [
        (lambda: DPOLoss(beta=0.5), {}),
        (lambda: KLDPOLoss(beta=0.5, tau=0.5), {"pref_ftx": 0.5}),
        (lambda: AOTPairedLoss(beta=0.5), {}),
        (lambda: DPOLoss(beta=0.5, link="ipo"), {"pref_loss": "ipo"}),
        (lambda: KTOLoss(beta=0.5), {}),
        (lambda: AOTUnpairedLoss(beta=0.5), {}),
        (lambda: WDPOLoss(beta=0.5, rho=0.1), {}),
    ],
    ids=["dpo", "kldpo with pref_ftx", "aot_paired", "ipo", "kto", "aot_unpaired", "wdpo"],
)
@pytest.mark.filterwarnings("ignore:AOTUnpairedLoss")
def test_accumulated_microbatches_train_as_one_batch(trainers, tmp_path, make_loss, options):
    whole, values = trained(trainers, make_loss(), tmp_path, **options)
    parts, accumulated = trained(trainers, make_loss(), tmp_path, 2, **options)
    start = torch.cat([parameter.detach().flatten() for parameter in model_of(0).parameters()])
    tolerance = 1e-2 if make_loss().needs_embeddings else 1e-4  # of differences in float32
    assert torch.dist(parts, whole) <= tolerance * torch.dist(whole, start)
    for got, expected in zip(accumulated, values, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert torch.dist(whole, start) > 1e-2


@pytest.mark.parametrize(
    "make_loss",
    [DPOLoss, lambda: KLDPOLoss(tau=0.5), lambda: WDPOLoss(rho=0.1), KTOLoss],
    ids=["dpo", "kldpo", "wdpo", "kto"],
)
def test_no_pass_begins_while_the_logits_of_another_are_kept(make_loss, tmp_path):
    made, kept = [], []

    def watch(base):
        class Watched(base):
            def concatenated_forward(self, *arguments, **options):
                kept.append(sum(logits() is not None for logits in made))
                outputs = super().concatenated_forward(*arguments, **options)
                made.append(weakref.ref(outputs["chosen_logits"] if isinstance(outputs, dict) else outputs[2]))
                return outputs

        return Watched

    classes = {"dpo": watch(StandInDPO), "kto": watch(StandInKTO)}
    trained((classes, lambda stage, options: SimpleNamespace(**options)), make_loss(), tmp_path, 2)
    assert len(kept) >= 2 * 2 * 2  # steps, microbatches, policy and reference
    assert not any(kept)


def test_the_first_loss_and_the_evaluation_are_the_losss_own(trainers, tmp_path):
    loss = KLDPOLoss(beta=0.5, tau=0.1)
    trainer = make_trainer(trainers, loss, tmp_path)
    # At the start the policy is the reference.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    trainer.train()
    batch = collate(rows("dpo"))
    with torch.no_grad():
        logps = [
            sequence_logps(model(batch["input_ids"]).logits, batch["labels"], shift=True).chunk(2)
            for model in (trainer.model.eval(), model_of(0))
        ]
    expected, metrics = loss(*logps[0], *logps[1], return_metrics=True)
    got = trainer.evaluate()
    assert got["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert got["eval_tilt/effective_sample_size"] == pytest.approx(
        metrics["tilt/effective_sample_size"].item(), rel=1e-3
    )


def test_metrics_are_llamafactorys_and_the_losss(trainers, tmp_path):
    _, (*_, last) = trained(trainers, KLDPOLoss(beta=0.5, tau=0.1), tmp_path, 2)
    assert {"rewards/chosen", "rewards/margins", "logps/chosen", "tilt/effective_sample_size"} <= set(last)
    assert last["rewards/margins"] != 0
    _, (*_, last) = trained(trainers, KTOLoss(beta=0.5), tmp_path, 2)
    assert last["kl"] >= 0


@pytest.mark.parametrize(
    ("loss", "options", "error", "told"),
    [
        (KTOLoss(), {"stage": "dpo"}, TypeError, "KTOLoss takes single completions.*stage: kto"),
        (KLDPOLoss(tau=0.1), {"stage": "kto"}, TypeError, "KLDPOLoss compares pairs.*stage: dpo"),
        (GroupDROLoss(), {}, ValueError, "GroupDROLoss needs the group"),
        (KLDPOLoss(tau=0.1), {"pref_beta": 0.3}, ValueError, "pref_beta: 0.3 contradicts KLDPOLoss"),
        (KLDPOLoss(tau=0.1), {"pref_loss": "simpo"}, ValueError, "pref_loss: simpo would be ignored"),
        (KLDPOLoss(tau=0.1), {"dpo_label_smoothing": 0.1}, ValueError, r"KLDPOLoss\(label_smoothing=...\)"),
        (KLDPOLoss(tau=0.1), {"pref_bco_weight": 0.1}, ValueError, "pref_bco_weight"),
        (KLDPOLoss(tau=0.1), {"ld_alpha": 0.5}, ValueError, "ld_alpha"),
        (WDPOLoss(), {"pref_ftx": 0.1}, ValueError, "pref_ftx adds a term.*WDPOLoss"),
        (AOTUnpairedLoss(), {"kto_chosen_weight": 2.0}, ValueError, "kto_chosen_weight.*AOTUnpairedLoss has none"),
        (KTOLoss(), {"kto_rejected_weight": 2.0}, ValueError, r"KTOLoss\(undesirable_weight=...\)"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(loss, options, error, told, tmp_path):
    stand_ins = {"dpo": StandInDPO, "kto": StandInKTO}, lambda stage, options: SimpleNamespace(**options)
    with pytest.raises(error, match=told):
        make_trainer(stand_ins, loss, tmp_path, **options)


def test_robust_takes_no_other_trainer():
    with pytest.raises(TypeError, match="CustomDPOTrainer or CustomKTOTrainer, got Trainer"):
        llamafactory.robust(Trainer)


@pytest.fixture
def package(monkeypatch):
    """The modules of LLaMA-Factory 0.9.5 in which `run_dpo` and `run_kto` find their trainers."""
    modules = {
        f"llamafactory{name}": ModuleType(name)
        for name in (
            "",
            ".train",
            ".train.tuner",
            ".train.dpo",
            ".train.dpo.trainer",
            ".train.kto",
            ".train.kto.workflow",
        )
    }
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    modules["llamafactory.train.dpo.trainer"].CustomDPOTrainer = StandInDPO
    modules["llamafactory.train.kto.workflow"].CustomKTOTrainer = StandInKTO
    return modules


def test_train_runs_llamafactorys_command_with_the_loss(package, monkeypatch, tmp_path):
    trained, module = [], package["llamafactory.train.dpo.trainer"]
    loss = KLDPOLoss(tau=0.1)

    def run_exp(args, callbacks):
        trainer = module.CustomDPOTrainer(
            model=model_of(0),
            ref_model=None,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            finetuning_args=SimpleNamespace(**OPTIONS),
            processor=None,
            tokenizer=None,
            callbacks=callbacks,
        )
        callbacks[0].on_train_begin(None, None, None)
        trained.append((args, trainer))

    package["llamafactory.train.tuner"].run_exp = run_exp
    llamafactory.train(loss, {"stage": "dpo"})
    ((args, trainer),) = trained
    assert args == {"stage": "dpo"}
    assert isinstance(trainer, StandInDPO)
    assert trainer.loss is loss
    assert module.CustomDPOTrainer is StandInDPO


def test_a_stage_that_would_train_without_the_loss_is_refused(package):
    def run_exp(args, callbacks):
        callbacks[0].on_train_begin(None, None, None)  # of another stage's trainer

    package["llamafactory.train.tuner"].run_exp = run_exp
    with pytest.raises(RuntimeError, match="KTOLoss would not be trained: it takes stage: kto"):
        llamafactory.train(KTOLoss())
    assert package["llamafactory.train.kto.workflow"].CustomKTOTrainer is StandInKTO


def test_the_example_trains_kldpo_in_its_stage(package, monkeypatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.setattr(llamafactory, "train", (ran := []).append)
    runpy.run_path(str(EXAMPLES / "llamafactory_kldpo.py"), run_name="__main__")
    (loss,) = ran
    options = yaml.safe_load((EXAMPLES / "llamafactory_kldpo.yaml").read_text())
    assert options["stage"] == "dpo"
    assert type(loss) is KLDPOLoss
    assert not {"pref_beta", "pref_loss"} & set(options)


def test_the_examples_options_are_llamafactorys(trainers):
    """Read by LLaMA-Factory's own dataclasses, where it is installed."""
    if trainers[0]["dpo"] is StandInDPO:
        pytest.skip("the stand-in reads no options")
    yaml = pytest.importorskip("yaml")
    import dataclasses

    hparams = import_released("llamafactory.hparams", absent=ABSENT)
    names = {"DataArguments", "FinetuningArguments", "ModelArguments", "TrainingArguments"}
    known = {field.name for name in names for field in dataclasses.fields(getattr(hparams, name))}
    assert set(yaml.safe_load((EXAMPLES / "llamafactory_kldpo.yaml").read_text())) <= known
