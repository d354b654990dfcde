r"""TRL's KTOTrainer with any loss of single completions that are labelled desirable or not, over the global batch.

    from robustloss import AOTUnpairedLoss
    from robustloss.integrations.trl import RobustKTOTrainer

    trainer = RobustKTOTrainer(model, args=KTOConfig("run"), train_dataset=dataset, loss=AOTUnpairedLoss(beta=0.1))
    trainer.train()

Data, reference (precomputed, another model, or the base under an adapter), metrics, evaluation and saving are
KTOTrainer's, whose own `_compute_loss` makes its metrics of the same forward; what it says the loss is goes nowhere.

What differs from KTOTrainer with `KTOLoss`: the reference point z_0 = max(0, mean of r') is that of all processes' and
accumulation steps' mismatched pairs, where TRL takes one microbatch of each process; and the loss is a mean over all
samples, where TRL takes the mean of the microbatches' means. With one microbatch a step, of as many samples in every
process, both are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustloss.functional import sequence_logps
from robustloss.integrations._versions import require_methods, require_trl
from robustloss.integrations.transformers import GlobalBatchMixin
from robustloss.losses.base import PreferenceLoss
from robustloss.naive.links import OFFSET_LINKS

require_trl("RobustKTOTrainer", at_least="1.8")

from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer import kto_trainer  # noqa: E402
from trl.trainer.kto_config import KTOConfig  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

require_methods(KTOTrainer, "RobustKTOTrainer", "_compute_loss", "_compute_kl_logps")

# Whether TRL's models give log-probabilities in place of logits.
FUSED_HEAD = hasattr(kto_trainer, "add_fused_lm_head")
REFERENCE = ("ref_logps", "ref_KL_logps")
POLICY_KL = "policy_KL_logps"
NOT_THE_MODELS = ("completion_mask", "label", POLICY_KL, *REFERENCE)  # nor what begins with KL_


class RobustKTOTrainer(GlobalBatchMixin, KTOTrainer):
    """`trl.KTOTrainer` that trains a `KTOLoss`, an `AOTUnpairedLoss` or another unpaired loss.

    The loss is that of all processes' and all accumulation steps' samples, as `robustloss.GlobalBatch` has it; a
    microbatch, or all of a process's, may hold one class only.

    Mismatched pairs are made, and run through both models, only for a loss that needs them (`KTOLoss`). With
    `loss_type="apo_zero_unpaired"` there are none, and the reference point of `KTOLoss` is 0, as TRL's loss of that
    name has it.

    Besides KTOTrainer's metrics the loss's own are logged (dominance/* and so on). `kl` is the reference point of
    `KTOLoss`, that of the global batch.

    Args:
        model, ref_model, args, ...: KTOTrainer's.
        loss: says all that the loss is. `args.beta`, `desirable_weight` and `undesirable_weight` may be left alone or
            say the same.

    Raises:
        TypeError: `loss` is no PreferenceLoss, or is one of pairs.
        ValueError: an option of `args` that the loss would ignore.
        ImportError: at import, a TRL that is not installed, or too old or too new.
    """

    _tag_names: ClassVar = [*KTOTrainer._tag_names, "robustloss"]
    compute_loss: Any = KTOTrainer.compute_loss  # which calls _compute_loss
    prediction_step: Any = KTOTrainer.prediction_step

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: KTOConfig | None = None,
        *others: Any,
        loss: PreferenceLoss,
        **options: Any,
    ):
        _check_loss(loss)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = KTOConfig(f"{name.split('/')[-1]}-KTO")
        self._outputs: Any = None  # of the last forward of the policy
        super().__init__(model, ref_model, _config_of(loss, args), *others, loss=loss, **options)
        self._name = f"KTO with {loss} of robustloss"  # for the model card
        # The rewards that KTOTrainer logs; an offset link's beta is no factor.
        self.beta = 1.0 if loss.link in OFFSET_LINKS else loss.beta

    def with_reference(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """And with the policy's log-probabilities of the mismatched pairs, which carry no gradient either."""
        found = {POLICY_KL: self._compute_kl_logps(model, inputs)}
        if not self.precompute_ref_logps:
            with self._reference() as reference:
                kl_logps = self._compute_kl_logps(reference, inputs)
                logps = _completion_logps(reference(**_model_arguments(inputs)), inputs)
            found |= dict(zip(REFERENCE, (logps, kl_logps), strict=True))
        return {**inputs, **found}

    def loss_arguments(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        self._outputs = None  # the last ones' memory
        self._outputs = model(**_model_arguments(inputs), **router)
        logps = _completion_logps(self._outputs, inputs)
        desirable = torch.as_tensor(inputs["label"], dtype=torch.bool, device=logps.device)  # before 1.9 a list
        arguments = {"policy_logps": logps, "ref_logps": inputs["ref_logps"], "desirable": desirable}
        if self.calculate_KL:
            arguments["kl_logratios"] = inputs[POLICY_KL] - inputs["ref_KL_logps"]
        return arguments

    def samples(self, microbatch: dict[str, Any]) -> int:
        return len(microbatch["label"])

    @torch.no_grad()
    def observe(self, model: Any, inputs: dict[str, Any]) -> None:
        """KTOTrainer's metrics, of the policy's last forward."""
        inputs = dict(inputs)
        made = _Made(self._outputs, inputs.pop(POLICY_KL))
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            super()._compute_loss(made, inputs, False)
        finally:
            self.precompute_ref_logps = precomputed
        if self.loss.needs_mismatched:  # the loss's own metrics have it
            del self._metrics["train" if self.model.training else "eval"]["kl"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        value = self.global_loss(model, inputs)
        outputs, self._outputs = self._outputs, None
        if self.aux_loss_enabled:
            value = value + self.router_aux_loss_coef * outputs.aux_loss
        if not return_outputs:
            return value
        if FUSED_HEAD:
            with torch.no_grad():
                outputs = model(**_model_arguments(inputs, fused=False))
        return value, outputs

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        return model.kl_logps if isinstance(model, _Made) else super()._compute_kl_logps(model, batch)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The reference model, as KTOTrainer has it."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None:
                yield self.ref_model
            else:
                adapted = self.accelerator.unwrap_model(self.model)
                with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
                    yield self.model


class _Made:
    """In a model's place: a forward that has been made."""

    def __init__(self, outputs: Any, kl_logps: Tensor | None):
        self.outputs, self.kl_logps = outputs, kl_logps

    def __call__(self, **arguments: Any) -> Any:
        return self.outputs


def _labels(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def _model_arguments(inputs: dict[str, Any], *, fused: bool = FUSED_HEAD) -> dict[str, Any]:
    arguments = {name: inputs[name] for name in inputs if name not in NOT_THE_MODELS and not name.startswith("KL_")}
    head = {"labels": _labels(inputs), "fused_lm_head": True} if fused else {}
    return {**arguments, **head, "use_cache": False}


def _completion_logps(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """[B], in nats. Prompt-learning adapters put virtual tokens in front."""
    tokens = inputs["input_ids"].shape[1]
    if FUSED_HEAD:
        return outputs.log_probs[:, 1 - tokens :].sum(1)
    logps: Any = sequence_logps(outputs.logits[:, -tokens:], _labels(inputs), shift=True)
    return logps


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, PreferenceLoss):
        raise TypeError(f"loss must be a PreferenceLoss such as KTOLoss(), got {type(loss).__name__}")
    if loss.paired:
        raise TypeError(
            f"RobustKTOTrainer has single completions with a label, and {type(loss).__name__} needs pairs: use "
            "robustloss.integrations.trl.RobustDPOTrainer, or a loss such as KTOLoss() or AOTUnpairedLoss()"
        )


def _config_of(loss: PreferenceLoss, args: KTOConfig) -> KTOConfig:
    """A copy of args that says what the loss says, once it is sure that args said nothing else."""
    name, args = type(loss).__name__, copy.copy(args)
    for option in ("beta", "desirable_weight", "undesirable_weight"):
        given, default, own = getattr(args, option), _default(option), getattr(loss, option, None)
        if given not in (default, own):
            instead = f"{name} has none" if own is None else f"give it to the loss, {name}({option}=...)"
            raise ValueError(f"KTOConfig({option}={given}) would be ignored, the loss being {loss}: {instead}")
        setattr(args, option, default if own is None else own)
    if not loss.needs_mismatched:
        if args.loss_type != _default("loss_type"):
            raise ValueError(f"KTOConfig(loss_type={args.loss_type!r}) would be ignored: {name} is the loss")
        args.loss_type = "apo_zero_unpaired"  # of which KTOTrainer makes no mismatched pairs
    if args.use_liger_kernel and not FUSED_HEAD:  # later it is of the layers only
        raise ValueError("KTOConfig(use_liger_kernel=True) would replace the loss: leave it out")
    return args


def _default(option: str) -> Any:
    return KTOConfig.__dataclass_fields__[option].default
