"""LLaMA-Factory: robustloss in its DPO and KTO stages, over the global batch.

    from robustloss import KLDPOLoss
    from robustloss.integrations import llamafactory

    llamafactory.train(KLDPOLoss(beta=0.1, tau=0.5))  # takes what `llamafactory-cli train` takes: run.yaml, key=value

Data, templates, adapters, reference, metrics, evaluation and saving are LLaMA-Factory's; `pref_ftx` adds its term as
ever. With the link "ipo" log-probabilities are means over the tokens of a completion, as in LLaMA-Factory's "ipo".

Written for LLaMA-Factory 0.9.5 (with TRL 0.24), whose stage dpo was run from its configuration on, and
whose two trainers were, with tiny models on a CPU, under transformers 5.23, though that release asks for at most 5.6.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustloss.integrations.transformers import GlobalBatchMixin
from robustloss.losses import PreferenceLoss
from robustloss.losses.base import PAIRED_NAMES

DEFAULTS = {"pref_beta": 0.1, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0}
REFERENCE = "reference_logps"  # what with_reference adds to a microbatch, which no model takes


class _Robust(GlobalBatchMixin):
    """What both stages share: their metrics are made by LLaMA-Factory of the forward that made the loss."""

    finetuning_args: Any
    _forward: Any = None  # what the policy's last concatenated_forward has returned
    _counted: Any = None  # that of the pass that counts, and the reference's
    _value: Tensor | None = None  # the loss, while LLaMA-Factory makes its metrics

    def with_reference(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, REFERENCE: super().compute_reference_log_probs(model, inputs)}

    def observe(self, model: Any, inputs: dict[str, Any]) -> None:
        self._counted = self._forward, inputs[REFERENCE]

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Any], *others: Any, **options: Any) -> Any:
        self._value = self.global_loss(model, batch)
        try:
            return super().get_batch_loss_metrics(model, batch, *others, **options)
        finally:
            self._value = self._counted = self._forward = None

    def concatenated_forward(self, model: Any, batch: dict[str, Any], *others: Any, **options: Any) -> Any:
        if self._value is not None:
            return self._counted[0]
        self._forward = None  # the previous pass's, before memory must hold this one's
        batch = {name: value for name, value in batch.items() if name != REFERENCE}
        return super().concatenated_forward(model, batch, *others, **options)

    def compute_reference_log_probs(self, model: Any, batch: dict[str, Any]) -> Any:
        return self._counted[1]


class _RobustPairs(_Robust):
    def loss_arguments(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        outputs = self.concatenated_forward(model, inputs)
        # Metrics take the means of the logits, which are by far the largest.
        self._forward = {
            name: value.detach().mean() if name.endswith("_logits") else value for name, value in outputs.items()
        }
        policy = self._forward["chosen_logps"], self._forward["rejected_logps"]
        return dict(zip(PAIRED_NAMES, (*policy, *inputs[REFERENCE]), strict=True))

    def samples(self, microbatch: dict[str, Any]) -> float:
        return len(microbatch["input_ids"]) / 2

    def compute_preference_loss(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected, ref_chosen, ref_rejected = logps
        assert self._value is not None
        # LLaMA-Factory takes the mean over the pairs.
        value = self._value.repeat(len(chosen))
        rewards = self.loss.rewards(chosen, ref_chosen), self.loss.rewards(rejected, ref_rejected)
        return value, rewards[0].detach(), rewards[1].detach()


class _RobustUnpaired(_Robust):
    def loss_arguments(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        self._forward = self.concatenated_forward(model, inputs)
        chosen, rejected, _, _, mismatched, _ = self._forward
        *ref_logps, ref_mismatched = inputs[REFERENCE]
        arguments = {
            "policy_logps": torch.cat([chosen, rejected]),
            "ref_logps": torch.cat(ref_logps),
            "desirable": torch.arange(len(chosen) + len(rejected), device=chosen.device) < len(chosen),
        }
        if self.loss.needs_mismatched:
            arguments["kl_logratios"] = (mismatched - ref_mismatched).detach()
        return arguments

    def samples(self, microbatch: dict[str, Any]) -> float:
        return len(microbatch["input_ids"])

    def forward(self, model: Any, batch: dict[str, Any], prefix: str = "") -> Any:
        if prefix == "kl_" and not self.loss.needs_mismatched:
            return None, torch.zeros(len(batch["kl_input_ids"]), device=self.args.device), None
        return super().forward(model, batch, prefix)

    def kto_loss(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen, rejected, mismatched, ref_chosen, ref_rejected, ref_mismatched = logps
        assert self._value is not None
        rewards = self.loss.rewards(chosen, ref_chosen), self.loss.rewards(rejected, ref_rejected)
        baseline = (mismatched - ref_mismatched).mean().clamp(min=0).detach()
        return self._value.reshape(1), rewards[0].detach(), rewards[1].detach(), baseline


def robust(trainer_class: Any) -> type:
    """LLaMA-Factory's CustomDPOTrainer or CustomKTOTrainer, or a subclass, with one more keyword: `loss`.

    The former takes paired losses, and WDPO (without `pref_ftx`); the latter KTOLoss and AOTUnpairedLoss.

    Raises (the constructor, besides `GlobalBatchMixin`'s):
        TypeError: `trainer_class` is neither; a loss for the other stage.
        ValueError: an option of LLaMA-Factory's own losses, which would be ignored.
    """
    base: Any
    if hasattr(trainer_class, "compute_preference_loss"):
        base, check = _RobustPairs, _check_pairs
    elif hasattr(trainer_class, "kto_loss"):
        base, check = _RobustUnpaired, _check_unpaired
    else:
        raise TypeError(f"robust takes CustomDPOTrainer or CustomKTOTrainer, got {trainer_class.__name__}")

    class RobustTrainer(base, trainer_class):
        compute_loss: Any = trainer_class.compute_loss  # which calls get_batch_loss_metrics, as does
        prediction_step: Any = trainer_class.prediction_step

        def __init__(self, *arguments: Any, loss: PreferenceLoss, finetuning_args: Any, **options: Any):
            if isinstance(loss, PreferenceLoss):  # else GlobalBatchMixin says what is wanted
                check(loss, finetuning_args)
            super().__init__(*arguments, loss=loss, finetuning_args=finetuning_args, **options)
            if loss.paired:
                self.loss_type = "ipo" if loss.link == "ipo" else "sigmoid"  # which log-probabilities, not which loss

    RobustTrainer.__name__ = RobustTrainer.__qualname__ = f"Robust{trainer_class.__name__}"
    return RobustTrainer


def train(loss: PreferenceLoss, args: Any = None) -> None:
    """`llamafactory-cli train` with this loss in place of its own, in stage dpo (or, for unpaired losses, kto).

    On several GPUs start it with torchrun, as `llamafactory-cli` does itself.

    Args:
        args: a dict of options; None reads the command line, such as `run.yaml key=value`.

    Raises:
        TypeError, ValueError: as `robust`.
        RuntimeError: before the first step: the options train with another trainer, and so without this loss.
    """
    from llamafactory.train import tuner
    from llamafactory.train.dpo import trainer as dpo
    from llamafactory.train.kto import workflow as kto
    from transformers import TrainerCallback

    made = []

    class Guard(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if not made:
                raise RuntimeError(
                    f"{type(loss).__name__} would not be trained: it takes stage: {'dpo' if loss.paired else 'kto'}, "
                    "without use_ray or USE_MCA (which have processes and trainers of their own)"
                )

    def make(trainer_class: type, **options: Any) -> Any:
        made.append(trainer_class)
        return robust(trainer_class)(loss=loss, **options)

    originals = dpo.CustomDPOTrainer, kto.CustomKTOTrainer
    dpo.CustomDPOTrainer, kto.CustomKTOTrainer = (partial(make, original) for original in originals)
    try:
        tuner.run_exp(args, [Guard()])
    finally:
        dpo.CustomDPOTrainer, kto.CustomKTOTrainer = originals


def _check_pairs(loss: PreferenceLoss, options: Any) -> None:
    name = type(loss).__name__
    if not loss.paired:
        raise TypeError(f"{name} takes single completions with a label, and stage: dpo has pairs: use stage: kto")
    if loss.needs_groups:
        raise ValueError(
            f"{name} needs the group of each pair, which LLaMA-Factory's batches lack: train it with `robustloss "
            "train` or robustloss.integrations.trl.RobustDPOTrainer"
        )
    _check_beta(loss, options)
    if options.pref_loss != "sigmoid" and options.pref_loss != loss.link:
        raise ValueError(f"pref_loss: {options.pref_loss} would be ignored, the loss being {loss}: leave it out")
    if options.dpo_label_smoothing and options.dpo_label_smoothing != loss.label_smoothing:
        raise ValueError(f"dpo_label_smoothing would be ignored: give it to the loss, as {name}(label_smoothing=...)")
    if options.pref_bco_weight:
        raise ValueError(f"pref_bco_weight would be ignored, the loss being {loss}: leave it out")
    if options.ld_alpha is not None:
        raise ValueError(
            "ld_alpha changes the policy's log-probabilities and not the reference's, so that their ratio is none: "
            "leave it out"
        )
    if options.pref_ftx and loss.needs_embeddings:
        raise ValueError(f"pref_ftx adds a term to the forward, of which {name} makes several: leave it out")


def _check_unpaired(loss: PreferenceLoss, options: Any) -> None:
    name = type(loss).__name__
    if loss.paired:
        raise TypeError(f"{name} compares pairs, and stage: kto has single completions with a label: use stage: dpo")
    _check_beta(loss, options)
    for option, attribute in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
        if getattr(options, option) not in (DEFAULTS[option], own := getattr(loss, attribute, None)):
            instead = f"{name} has none" if own is None else f"give it to the loss, as {name}({attribute}=...)"
            raise ValueError(f"{option} would be ignored: {instead}")


def _check_beta(loss: PreferenceLoss, options: Any) -> None:
    if options.pref_beta not in (DEFAULTS["pref_beta"], loss.beta):
        raise ValueError(f"pref_beta: {options.pref_beta} contradicts {loss}: give beta to the loss, and leave it out")
