"""A causal language model and a loss as one module: `LossModule(model, loss).forward(batch) -> loss`.

This is the unit that DeepSpeed (or DDP, or FSDP) wraps, because a loss that differentiates a gradient (WDPO) is wrong
or refused outside of the wrapper. The model's output head is skipped: the last hidden states and the head's weight (and
LoRA adapter) go to `linear_sequence_logps`, which never holds the [tokens, vocabulary] logits.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from robustloss.functional import linear_sequence_logps, linear_sequence_logps_with_cotangent, sequence_logps
from robustloss.losses import PreferenceLoss
from robustloss.penalty import directional_loss

logger = logging.getLogger(__name__)


class LossModule(nn.Module):
    """`forward(batch)` is the loss of one microbatch, as a scalar to call backward on.

    Args:
        model: a Hugging Face causal language model, with or without a LoRA adapter of peft.
        loss: a module of `robustloss.losses`; None for a model that only gives log-probabilities (a reference).

    A batch holds these, of B pairs or samples of T tokens (`robustloss.train.data.Collator` makes it):

    Batch:
        input_ids, attention_mask, labels: int64 [2B, T] (chosen rows first, then rejected), or [B, T] of unpaired data;
            labels are -100 on prompt and padding, and not shifted.
        desirable: bool [B], unpaired data only.
        group: int64 [B], pairs in groups (GroupDRO) only.
        mismatched_input_ids, mismatched_attention_mask, mismatched_labels: int64 [B, T'], KTO only.
        ref_chosen_logps, ref_rejected_logps | ref_logps(, ref_mismatched_logps): float32 [B], the reference's.
        index: int64 [B], the rows of the dataset, for error messages.

    After a call `metrics` holds the loss's metrics and `logps` the policy's log-probabilities by name, detached; and
    `embeddings` [rows, T, H], of a loss that needs them, the input embeddings in the graph of what the call returned.
    """

    def __init__(self, model: nn.Module, loss: PreferenceLoss | None = None) -> None:
        super().__init__()
        # Untyped: Hugging Face's and peft's classes share names, not a base class.
        self.model: Any = model
        self.loss: Any = loss
        self.metrics: dict[str, Tensor] = {}
        self.logps: dict[str, Tensor] = {}
        self._needs_embeddings = loss is not None and loss.needs_embeddings
        self.embeddings: Tensor | None = None

        causal_lm = self.model.get_base_model() if hasattr(model, "get_base_model") else self.model
        text_config = causal_lm.config.get_text_config()
        # Plain tuples, so that nn.Module does not register the same modules a second time.
        self._parts = (causal_lm.get_decoder(), causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings())
        # The transforms of the logits that are known; check_head refuses a model that has another one.
        self._softcap = getattr(text_config, "final_logit_softcapping", None)
        self._logit_scale = float(getattr(text_config, "logit_scale", None) or 1.0)  # Cohere multiplies
        self._logit_scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)  # Granite divides

        head = self._parts[1]
        if not (type(head) is nn.Linear or _is_plain_lora(head)):
            logger.info("the output head is a %s, so its logits are computed in full", type(head).__name__)
        for parameter in _used_outside(head):
            if hasattr(parameter, "ds_id"):
                # ZeRO-3 gathers a parameter for its own module's forward; here it is used outside of it.
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)

    def forward(
        self,
        batch: dict[str, Tensor],
        output: str = "loss",
        *,
        cotangents: dict[str, Tensor] | None = None,
        embedding_offset: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this batch alone (output="loss"), or log-probabilities by name: the policy's ("logps"), or those
        of the base model under the LoRA adapter ("base_logps"); or sum c_i logp_i ("surrogate").

        Args:
            cotangents: of a surrogate, {name in logps: [B] c}; its output head takes one pass, as c is known.
            embedding_offset: [rows, T, H], what is added to the input embeddings (in its own dtype, which is float32 or
                float64), for log-probabilities only.

        Raises:
            FloatingPointError: log-probabilities that are not finite (of a loss, on the CPU, where looking is free).
        """
        if output == "surrogate":
            assert cotangents is not None, "a surrogate needs cotangents"
            return self._surrogate(batch, cotangents)
        if output != "loss":
            with self.model.disable_adapter() if output == "base_logps" else nullcontext():
                return self._named_logps(batch, embedding_offset)[0]
        assert self.loss is not None, "a LossModule without a loss gives log-probabilities only"
        if self._needs_embeddings and not self.loss.differentiates_twice:
            loss, self.metrics = directional_loss(self.loss, partial(self.arguments_at, batch))
            return loss
        # An evaluation of WDPO needs the graph from the embeddings to the log-probabilities even where nothing trains.
        with torch.set_grad_enabled(torch.is_grad_enabled() or self._needs_embeddings):
            logps, embeddings = self._named_logps(batch)
        _check_finite(logps, batch["index"])
        options = {"embeddings": embeddings} if self._needs_embeddings else {}
        loss, metrics = self.loss(**loss_arguments(self.loss, logps, batch), return_metrics=True, **options)
        self.metrics = metrics
        self.logps = {name: value.detach() for name, value in logps.items()}
        return loss

    def arguments_at(
        self, batch: dict[str, Tensor], embedding_offset: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """A paired loss's arguments by name at the batch's embeddings plus an offset, and the embeddings without it."""
        logps, embeddings = self._named_logps(batch, embedding_offset)
        if embedding_offset is None:
            _check_finite(logps, batch["index"])
            self.logps = {name: value.detach() for name, value in logps.items()}
        return loss_arguments(self.loss, logps, batch), embeddings

    def _named_logps(
        self, batch: dict[str, Tensor], offset: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The policy's log-probabilities by name, and the input embeddings where the loss differentiates by them."""
        logps, embeddings = self._sequence_logps(batch, offset)
        self.embeddings = embeddings
        named = {"logps": logps}
        if "desirable" not in batch:
            chosen, rejected = (half.clone() for half in logps.chunk(2))  # FSDP2 warns of outputs that are views
            named = {"chosen_logps": chosen, "rejected_logps": rejected}
        if "mismatched_input_ids" in batch:
            with torch.no_grad():  # KTO's reference point is held fixed
                mismatched = {key: batch[f"mismatched_{key}"] for key in ("input_ids", "attention_mask", "labels")}
                named["mismatched_logps"] = self._sequence_logps(mismatched)[0]
        return named, embeddings

    def _surrogate(self, batch: dict[str, Tensor], cotangents: dict[str, Tensor]) -> Tensor:
        names = ("logps",) if "desirable" in batch else ("chosen_logps", "rejected_logps")
        return self._sequence_logps(batch, cotangent=torch.cat([cotangents[name] for name in names]))[0]

    def _sequence_logps(
        self, batch: dict[str, Tensor], offset: Tensor | None = None, cotangent: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:  # [rows] (or, with a cotangent, their product []), [rows, T, H]
        decoder, head, embed = self._parts
        inputs: dict[str, Tensor] = {"input_ids": batch["input_ids"]}
        embeddings = None
        if offset is not None or (self._needs_embeddings and torch.is_grad_enabled()):
            embeddings = embed(batch["input_ids"])
            if torch.is_grad_enabled() and not embeddings.requires_grad:  # a frozen embedding, under LoRA
                embeddings.requires_grad_()
            inputs = {"inputs_embeds": embeddings}
        if embeddings is not None and offset is not None:
            inputs = {"inputs_embeds": (embeddings.to(offset.dtype) + offset).to(embeddings.dtype)}
        hidden = decoder(**inputs, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
        linear = _as_linear(head, hidden)
        if linear is not None:
            options = {"softcap": self._softcap, "logit_scale": self._logit_scale, "shift": True}
            if cotangent is not None:
                surrogate, _ = linear_sequence_logps_with_cotangent(
                    hidden, labels=batch["labels"], cotangent=cotangent, **linear, **options
                )
                return surrogate, embeddings
            logps = linear_sequence_logps(hidden, labels=batch["labels"], **linear, **options)
        else:
            logits = head(hidden)
            if self._softcap is not None:
                logits = self._softcap * torch.tanh(logits / self._softcap)
            logps = sequence_logps(logits, batch["labels"], temperature=1 / self._logit_scale, shift=True)
        logps = cast(Tensor, logps)  # without return_entropy it is one tensor
        return logps if cotangent is None else (cotangent.to(logps.dtype) * logps).sum(), embeddings


def loss_arguments(loss: PreferenceLoss, logps: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of `loss.forward` by name, from log-probabilities as `LossModule` names them and their batch."""
    if loss.paired:
        arguments = {}
        for side in ("chosen_logps", "rejected_logps"):
            arguments |= {f"policy_{side}": logps[side], f"ref_{side}": batch[f"ref_{side}"]}
        return arguments | ({"groups": batch["group"].long()} if loss.needs_groups else {})
    arguments = {
        "policy_logps": logps["logps"],
        "ref_logps": batch["ref_logps"],
        "desirable": batch["desirable"].bool(),
    }
    if "mismatched_logps" in logps:
        arguments["kl_logratios"] = logps["mismatched_logps"] - batch["ref_mismatched_logps"]
    return arguments


def _is_plain_lora(head: nn.Module) -> bool:
    """Whether the head is peft's Linear over an ordinary one, its adapters a sum of products (DoRA's are not)."""
    peft: Any = sys.modules.get("peft")
    if peft is None or type(head) is not peft.tuners.lora.Linear:
        return False
    layer: Any = head
    biased = any(adapter.bias is not None for adapter in layer.lora_B.values())
    return type(layer.base_layer) is nn.Linear and not layer.lora_variant and not biased


def _used_outside(head: Any) -> list[Tensor]:
    """The head's parameters that `linear_sequence_logps` takes without calling their module."""
    if type(head) is nn.Linear:
        return [head.weight] if head.bias is None else [head.weight, head.bias]
    if _is_plain_lora(head):
        return [*_used_outside(head.base_layer), *(adapter.weight for adapter in head.lora_B.values())]
    return []


def _as_linear(head: Any, hidden: Tensor) -> dict[str, Any] | None:
    """weight, bias and adapter, as `linear_sequence_logps` takes them; None of a head that it cannot be told of."""
    if type(head) is nn.Linear:
        return {"weight": head.weight, "bias": head.bias}
    if not _is_plain_lora(head) or (head.merged and head.disable_adapters):  # peft takes the merged one out again
        return None
    base = {"weight": head.base_layer.weight, "bias": head.base_layer.bias}
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or head.merged or not names:
        return base
    inputs = [
        head.scaling[name] * head.lora_A[name](head.lora_dropout[name](hidden.to(head.lora_A[name].weight.dtype)))
        for name in names
    ]
    adapter = torch.cat(inputs, -1), torch.cat([head.lora_B[name].weight for name in names], -1)
    return {**base, "adapter": tuple(value.to(hidden.dtype) for value in adapter)}


@torch.no_grad()
def check_head(module: Callable[..., dict[str, Tensor]], model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Refuse a model whose logits are not the head's product with the last hidden state.

    A scale or a cap that LossModule does not know would train another model than the one that is then sampled.

    Args:
        module: a LossModule, or the engine around one.
        model: the model in it.
        batch: as for LossModule; a row or two will do.

    Raises:
        ValueError: the model's own logits give other log-probabilities.
        FloatingPointError: they are not finite.
    """
    named = module(batch, output="logps")
    ours = named["logps"] if "logps" in named else torch.cat([named["chosen_logps"], named["rejected_logps"]])
    if not bool(ours.isfinite().all()):
        raise FloatingPointError("the model's log-probabilities are not finite before any training")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    theirs = cast(Tensor, sequence_logps(logits, batch["labels"], shift=True))
    tokens = (batch["labels"][:, 1:] != -100).sum(-1).clamp(min=1)
    difference = float(((ours - theirs).abs() / tokens).max())
    # Per token; bfloat16 logits of about 10 are rounded to 0.03.
    if not difference < (5e-2 if logits.dtype == torch.bfloat16 else 1e-3):
        raise ValueError(
            f"model {type(model).__name__} transforms its logits in a way that robustloss does not know: its own "
            f"log-probabilities differ by {difference:.3g} nats a token from those of its output head"
        )


def _check_finite(logps: dict[str, Tensor], index: Tensor) -> None:
    if index.device.type != "cpu":
        return
    for name, value in logps.items():
        if not bool(value.isfinite().all()):
            rows = index[~value.detach().isfinite()].tolist()
            raise FloatingPointError(
                f"the policy's {name} are not finite for rows {rows} of the split (counted from 0); lower "
                "optimizer.learning_rate, or look at these rows"
            )
