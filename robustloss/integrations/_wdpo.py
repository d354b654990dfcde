"""WDPO's passes within one optimizer step of Hugging Face's `Trainer`: a penalty on the gradient by the embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss.global_batch import GlobalBatch, zero_of
from robustloss.integrations._window import Window, agree, mass_of, wrong_mass
from robustloss.losses import DPOLoss
from robustloss.penalty import check_double_backward, computing_dtype, directional_loss, directional_step

shares_of = GlobalBatch(DPOLoss()).shares  # of any mean over samples


class PenaltyPasses:
    """The part of `GlobalBatchMixin` for a loss that needs embeddings."""

    # GlobalBatchMixin's, and Trainer's.
    loss: Any
    loss_arguments: Any
    with_reference: Any
    samples: Any
    observe: Any
    args: Any
    accelerator: Any
    model: Any
    is_deepspeed_enabled: Any
    is_fsdp_enabled: Any
    _turn: Any
    _loss_metrics: Any
    _inputs_of: Any
    _prepare_inputs: Any

    def _check_penalty(self) -> None:
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise ValueError(f"optim={optimizer!r} steps in every backward, and WDPO has several in a step")
        if getattr(self.args, "torch_compile", False):
            raise ValueError(
                "torch_compile=True leaves out the hook that gives WDPOLoss the input embeddings: set it to False"
            )
        if not self.loss.differentiates_twice:
            # Accelerate enters autocast inside the model's forward, and another trainer changes what is read here.
            autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            self._computing_dtype = computing_dtype(self.model.get_input_embeddings().weight.dtype, autocast)
            self.loss.relative_step(self._computing_dtype)  # refuses what has none

    def _penalized_loss(self, model: Any, inputs: Any, window: Window, index: int) -> Tensor:
        if self.loss.differentiates_twice:
            return self._exact_loss(model, inputs, window, index)
        if self._turn is None:  # by hand, outside of any step: the graphs of all its passes live together
            inputs = self._inputs_of(model, inputs, window, index)
            value, metrics = directional_loss(
                self.loss, partial(self._arguments_at, model, inputs), self._computing_dtype
            )
            self._loss_metrics[True].add(metrics)
            self.observe(model, inputs)
            return value
        return self._directional_loss(model, window)

    def _directional_loss(self, model: Any, window: Window) -> Tensor:
        """All passes over the window's microbatches, and backward of all but the last, which is Trainer's."""
        with torch.no_grad():
            batches = [
                self.with_reference(model, self._prepare_inputs(microbatch)) for microbatch in window.microbatches
            ]
        count, called, held = len(batches), 0, []
        total = count * self.loss.backwards_per_microbatch
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}

        def arguments_at(index: int, offset: Tensor | None) -> tuple[dict[str, Tensor], Any]:
            arguments, embeddings = self._arguments_at(model, batches[index], offset)
            if offset is None and torch.is_grad_enabled():
                agree(arguments, index)
                self.observe(model, batches[index])
            return arguments, embeddings

        def backward(value: Tensor) -> None:
            nonlocal called
            called += 1
            if called == total:
                held.append(value)
            else:
                self.accelerator.backward(value / count, **options)

        value, metrics = directional_step(
            self.loss,
            range(count),
            arguments_at,
            backward,
            masses=window.masses(self.samples),
            divisor=count,
            no_sync=partial(self._no_sync, model),
            dtype=self._computing_dtype,
        )
        self._loss_metrics[True].add(metrics)
        # The other microbatches have returned zero, and Trainer takes the mean.
        return count * value + (held[0] - held[0].detach())

    @contextmanager
    def _no_sync(self, model: Any) -> Iterator[None]:
        """Backward calls accumulate in this process alone, and DeepSpeed takes none of them for a step's last."""
        state = self.accelerator.gradient_state
        synchronizes = state.sync_gradients
        state._set_sync_gradients(False)
        with ExitStack() as contexts:
            contexts.callback(state._set_sync_gradients, synchronizes)
            if not self.is_deepspeed_enabled:
                contexts.enter_context(self.accelerator.no_sync(model))
            yield

    def _exact_loss(self, model: Any, inputs: Any, window: Window, index: int) -> Tensor:
        instead = "use WDPOLoss(penalty='central'), which is directional"
        if getattr(self, "is_fsdp_enabled", False):
            raise ValueError(f"exact WDPO has no second derivative under FSDP, which releases parameters: {instead}")
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.loss.squared and (processes > 1 or len(window) > 1):
            raise ValueError(
                f"exact WDPO with squared=False couples the samples of {processes} process(es) and {len(window)} "
                f"accumulation step(s), and its second derivative sees one microbatch: {instead}, or squared=True"
            )
        check_double_backward(model)
        inputs = self._inputs_of(model, inputs, window, index)
        arguments, embeddings = self._arguments_at(model, inputs)
        masses = window.masses(self.samples)
        if masses is None:
            if len(window) > 1:
                raise ValueError(f"exact WDPO with gradient accumulation needs {type(self).__name__}.samples")
            masses = [mass_of(arguments)]
        if index == 0:
            window.shares = shares_of(masses, divisor=len(window))
        value, metrics, problem = zero_of(arguments), {}, wrong_mass(self, masses[index], arguments)
        if window.shares[index] and problem is None:
            try:
                value, metrics = self.loss(**arguments, embeddings=embeddings, return_metrics=True)
            except (TypeError, ValueError) as error:
                problem = error
        agree(arguments, index, problem)
        self._loss_metrics[True].add(metrics)
        self.observe(model, inputs)
        return window.shares[index] * value

    def _penalized_evaluation(self, model: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.loss.differentiates_twice:
            return directional_loss(self.loss, partial(self._arguments_at, model, inputs), self._computing_dtype)
        with torch.enable_grad():
            arguments, embeddings = self._arguments_at(model, inputs)
            return self.loss(**arguments, embeddings=embeddings, return_metrics=True)

    def _arguments_at(
        self, model: Any, inputs: Any, offset: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The loss's arguments at the input embeddings plus an offset; and, without one, the embeddings."""
        caught: list[Tensor] = []

        def hook(module: Any, arguments: Any, embeddings: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not embeddings.requires_grad:  # a frozen embedding, under LoRA
                embeddings.requires_grad_()
            caught.append(embeddings)
            if offset is None:
                return embeddings
            return (embeddings.to(offset.dtype) + offset).to(embeddings.dtype)

        layer = self.accelerator.unwrap_model(model).get_input_embeddings()
        handle = layer.register_forward_hook(hook)
        try:
            arguments = self.loss_arguments(model, inputs)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ValueError(f"loss_arguments must embed its tokens once for {self.loss}, got {len(caught)} times")
        return arguments, caught[0] if offset is None else None
