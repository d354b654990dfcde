r"""TRL's DPOTrainer with any loss of pairs, over the global batch.

    from robustloss import KLDPOLoss
    from robustloss.integrations.trl import RobustDPOTrainer

    trainer = RobustDPOTrainer(model, args=DPOConfig("run"), train_dataset=dataset, loss=KLDPOLoss(beta=0.1, tau=0.1))
    trainer.train()

Data, reference (precomputed, another model, or the base under an adapter), metrics, evaluation and saving are
DPOTrainer's, whose own `_compute_loss` makes its metrics of the same forward; what it says the loss is goes nowhere.

What differs from DPOTrainer's losses: AOT sorts the samples of all processes and accumulation steps, where TRL sorts
one microbatch of one process; a mean is over all pairs, where TRL takes the mean of the microbatches' means; and
`label_smoothing` of a logistic loss works. With one process, one microbatch a step, both are the same.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustloss._random import RandomState
from robustloss.functional import sequence_logps
from robustloss.integrations._versions import require_methods, require_trl
from robustloss.integrations.transformers import GlobalBatchMixin
from robustloss.losses.base import PreferenceLoss
from robustloss.naive.links import OFFSET_LINKS

require_trl("RobustDPOTrainer")

from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer.dpo_config import DPOConfig  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402

require_methods(DPOTrainer, "RobustDPOTrainer", "_compute_loss", "compute_ref_log_probs")

# Whether TRL's models give log-probabilities in place of logits.
FUSED_HEAD = hasattr(dpo_trainer, "add_fused_lm_head")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
NOT_THE_MODELS = ("completion_mask", "group", *REFERENCE)
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
# What DPOConfig says of the loss, and where that is said here.
INSTEAD = {
    "loss_type": "a loss of robustloss has its own name and link, such as DPOLoss(link='hinge') or AOTPairedLoss()",
    "loss_weights": "there is one loss; a weighted sum is a PreferenceLoss of your own",
    "label_smoothing": "give it to the loss, as DPOLoss(label_smoothing=...)",
    "f_divergence_type": "a loss has its own divergence: reverse KL, or ChiPOLoss()",
    "f_alpha_divergence_coef": "a loss has its own divergence: reverse KL, or ChiPOLoss()",
    "ld_alpha": "log-probabilities are sums over all tokens of a completion",
    "use_weighting": "pairs are weighted by the loss, as KLDPOLoss() or DrDPOLoss() do",
    "discopop_tau": "it belongs to loss_type='discopop'; KLDPOLoss(tau=...) is a temperature of another kind",
}


class RobustDPOTrainer(GlobalBatchMixin, DPOTrainer):
    """`trl.DPOTrainer` that trains a loss of `robustloss.losses` on pairs.

    The loss is that of all processes' and all accumulation steps' pairs, as `robustloss.GlobalBatch` has it. With the
    link "ipo" log-probabilities are means over the tokens of a completion, as TRL's "ipo" has them, and else sums.
    `AOTUnpairedLoss` takes the chosen completions for desirable and the rejected ones for the others. `GroupDROLoss`
    takes the group of each pair from the dataset's column "group" (integers from 0). `WDPOLoss` runs its passes within
    the step; with penalty="exact" the model needs attn_implementation="eager", and its logits are computed in full.

    Besides DPOTrainer's metrics the loss's own are logged (tilt/*, dominance/*, penalty/* and so on). For a loss with
    rewards of its own (`ChiPOLoss`) rewards/* are those.

    Args:
        model, ref_model, args, ...: DPOTrainer's.
        loss: says all that the loss is. `args.beta` may be left alone or say the same.

    Raises:
        TypeError: `loss` is no PreferenceLoss, or needs unpaired data (`KTOLoss`).
        ValueError: an option of `args` that the loss would ignore; a loss of groups without a column "group"; WDPO with
            a mixture of experts' auxiliary loss.
        ImportError: at import, a TRL that is not installed, or too old or too new.
    """

    _tag_names: ClassVar = [*DPOTrainer._tag_names, "robustloss"]
    compute_loss: Any = DPOTrainer.compute_loss  # which calls _compute_loss
    prediction_step: Any = DPOTrainer.prediction_step

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *others: Any,
        loss: PreferenceLoss,
        **options: Any,
    ):
        if isinstance(loss, PreferenceLoss):  # else GlobalBatchMixin says what is wanted
            _check_loss(loss, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
            args = _config_of(loss, args)
        self._outputs: Any = None  # of the last forward of the policy
        super().__init__(
            model, ref_model, args, data_collator, train_dataset, eval_dataset, *others, loss=loss, **options
        )
        self.args.beta, self._name = loss.beta, f"DPO with {loss} of robustloss"  # for the records and the model card
        # The rewards that DPOTrainer logs; an offset link's beta is no factor.
        self.beta = 1.0 if loss.link in OFFSET_LINKS else loss.beta
        if loss.needs_embeddings and getattr(self, "aux_loss_enabled", False):
            raise ValueError("WDPOLoss has no auxiliary loss of experts: set DPOConfig(router_aux_loss_coef=0.0)")
        if loss.needs_groups:
            self.data_collator = _WithGroups(self.data_collator)

    def with_reference(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.precompute_ref_logps:
            return inputs
        # Before TRL 1.9 it finds its model itself.
        models = (
            ()
            if _takes_one(DPOTrainer.compute_ref_log_probs)
            else (self.model if self.ref_model is None else self.ref_model,)
        )
        return {**inputs, **dict(zip(REFERENCE, self.compute_ref_log_probs(*models, inputs), strict=True))}

    def loss_arguments(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        labels, self._outputs = _labels(inputs), None  # the last ones' memory
        if FUSED_HEAD and not self.loss.differentiates_twice:
            self._outputs = model(**self._model_arguments(inputs), labels=labels, fused_lm_head=True)
            # Prompt-learning adapters put virtual tokens in front.
            logps = self._outputs.log_probs[:, 1 - labels.shape[1] :].sum(1)
        else:
            self._outputs = model(**self._model_arguments(inputs))
            logps: Any = sequence_logps(self._outputs.logits[:, -labels.shape[1] :], labels, shift=True)
        ref_logps = torch.cat([inputs[name] for name in REFERENCE])
        if self.loss.link == "ipo":
            tokens = inputs["completion_mask"].sum(1).clamp(min=1)
            logps, ref_logps = logps / tokens, ref_logps / tokens
        if not self.loss.paired:
            desirable = torch.arange(len(logps), device=logps.device) < len(logps) // 2
            return {"policy_logps": logps, "ref_logps": ref_logps, "desirable": desirable}
        arguments = {}
        for side, policy, reference in zip(("chosen", "rejected"), logps.chunk(2), ref_logps.chunk(2), strict=True):
            arguments |= {f"policy_{side}_logps": policy, f"ref_{side}_logps": reference}
        return arguments | ({"groups": inputs["group"]} if self.loss.needs_groups else {})

    def samples(self, microbatch: dict[str, Any]) -> int:
        rows = len(microbatch["input_ids"])
        return rows // 2 if self.loss.paired else rows

    @torch.no_grad()
    def observe(self, model: Any, inputs: dict[str, Any]) -> None:
        """DPOTrainer's metrics, of the policy's last forward."""
        outputs = self._outputs
        if FUSED_HEAD and self.loss.differentiates_twice:
            state = RandomState()
            outputs = model(**self._model_arguments(inputs), labels=_labels(inputs), fused_lm_head=True)
            state.restore()
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            super()._compute_loss(lambda **_: outputs, inputs, False)
        finally:
            self.precompute_ref_logps = precomputed
        if type(self.loss).rewards is not PreferenceLoss.rewards:
            for name in REWARDS:  # the loss's own metrics have these
                self._metrics["train" if self.model.training else "eval"].pop(name, None)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        value = self.global_loss(model, inputs)
        outputs, self._outputs = self._outputs, None
        if getattr(self, "aux_loss_enabled", False):
            value = value + self.router_aux_loss_coef * outputs.aux_loss
        if not return_outputs:
            return value
        if not hasattr(outputs, "logits"):
            with torch.no_grad():
                outputs = model(**self._model_arguments(inputs))
        return value, outputs

    def compute_ref_log_probs(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        *models, inputs = arguments
        inputs = {name: value for name, value in inputs.items() if name != "group"}  # which no model takes
        find: Any = super().compute_ref_log_probs
        return find(*models, inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.loss.needs_groups and "group" not in self._signature_columns:
            self._signature_columns.append("group")

    def _model_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        arguments = {name: value for name, value in inputs.items() if name not in NOT_THE_MODELS}
        if getattr(self, "aux_loss_enabled", False):
            arguments["output_router_logits"] = True
        return {**arguments, "use_cache": False}


class _WithGroups:
    """A collator that keeps the column "group", which TRL's does not know."""

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        if not all("group" in example for example in examples):
            raise ValueError("the loss needs the column 'group', which this dataset lacks")
        return {**self.collator(examples), "group": torch.tensor([int(example["group"]) for example in examples])}


def _labels(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def _takes_one(function: Callable[..., Any]) -> bool:
    return len(inspect.signature(function).parameters) == 2  # self and the inputs


def _check_loss(loss: PreferenceLoss, datasets: dict[str, Any]) -> None:
    if loss.needs_mismatched:
        raise TypeError(
            f"RobustDPOTrainer has pairs, and {type(loss).__name__} needs single completions with a label and "
            "mismatched ones: use robustloss.integrations.trl.RobustKTOTrainer"
        )
    if not loss.needs_groups:
        return
    for name, dataset in datasets.items():
        for one in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
            columns = getattr(one, "column_names", None)
            if columns is not None and "group" not in columns:
                raise ValueError(f"{type(loss).__name__} needs the column 'group' in {name}, which has {columns}")


def _config_of(loss: PreferenceLoss, args: DPOConfig | None) -> DPOConfig | None:
    """A copy of args that says what the loss says, once it is sure that args said nothing else."""
    if args is None:
        return None
    for name, instead in INSTEAD.items():
        value, default = getattr(args, name, None), _default(name)
        if value != default:
            raise ValueError(f"DPOConfig({name}={value!r}) would be ignored, the loss being {loss}: {instead}")
    if args.beta not in (_default("beta"), loss.beta):
        raise ValueError(f"DPOConfig(beta={args.beta}) contradicts {loss}: give beta to the loss")
    # Before the fused head it replaces the loss (up to 1.13) or the logits (1.14), and later the layers only.
    if args.use_liger_kernel and not FUSED_HEAD:
        raise ValueError("DPOConfig(use_liger_kernel=True) would replace the loss: leave it out")
    args = copy.copy(args)
    args.beta = loss.beta
    return args


def _default(name: str) -> Any:
    field = DPOConfig.__dataclass_fields__.get(name)
    if field is None:  # not in this release
        return None
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
