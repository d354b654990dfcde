r"""Losses of the global batch in any subclass of Hugging Face's `Trainer`.

    class MyTrainer(GlobalBatchMixin, Trainer):
        def loss_arguments(self, model, inputs):
            logps = sequence_logps(model(input_ids=inputs["input_ids"]).logits, inputs["labels"], shift=True)
            chosen, rejected = logps.chunk(2)
            return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected,
                    "ref_chosen_logps": inputs["ref_chosen_logps"],
                    "ref_rejected_logps": inputs["ref_rejected_logps"]}

    trainer = MyTrainer(model, args, train_dataset=dataset, loss=KLDPOLoss(beta=0.1, tau=0.1))

`Trainer` owns the loop: it fetches the K microbatches of an optimizer step (`get_batch_samples`), and calls backward on
what `compute_loss` returns for each, divided by K. Here the first of them finds what to backpropagate in all:

    get_batch_samples     microbatches 0 .. K-1 of this process are kept
    compute_loss(0)       log-probabilities of 1 .. K-1 without a graph, then of 0 with its own; gathered over the
                          processes; L and c_i = dL / dl_i of all samples, once
    compute_loss(k)       returns L + (s - s.detach()), s = sum_i c_i l_i over microbatch k: its value is the loss of
                          the global batch, its gradient microbatch k's part of that loss's

so backward, no_sync, clipping, gradient scaling and logging stay Trainer's, and the mean that it logs is the loss of
the global batch. That costs K - 1 forwards more; a loss that is a mean over samples needs none, where `samples` tells
their number. The random numbers (dropout) are the same in both passes of a microbatch.

An evaluation's loss is that of each evaluation batch of all processes, averaged over the batches by Trainer, and leaves
the loss's state as it is. (A tilt or a sort of smaller batches is another loss: compare evaluations of equal batch
sizes. WDPO's is the mean over the processes of each one's.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss._files import replace_file
from robustloss._random import RandomState
from robustloss.global_batch import GlobalBatch, NonFiniteError, weighted_sum
from robustloss.integrations._versions import require, require_methods
from robustloss.losses import DPOLoss
from robustloss.losses.base import PreferenceLoss
from robustloss.penalty import check_double_backward, directional_loss, directional_step

require("transformers", "robustloss.integrations.transformers", at_least="4.57")

STATE_FILE = "loss.safetensors"  # in each checkpoint folder, of a loss that has a state
OVERRIDDEN = (
    "get_batch_samples",
    "training_step",
    "compute_loss",
    "prediction_step",
    "log",
    "_prepare_inputs",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
)  # or called, of Trainer's methods


class GlobalBatchMixin:
    """Put before a subclass of `transformers.Trainer`: it trains `loss` on the samples of all processes and of all
    accumulation steps.

    Args:
        loss: keyword only, a module of `robustloss.losses`; all other arguments are the trainer's. It is moved to the
            trainer's device. Its state, if it has one, is saved in each checkpoint (`loss.safetensors`) and loaded on
            resume.

    Raises:
        TypeError: `loss` is no PreferenceLoss.
        ValueError: reduction="none"; an option of the trainer that the loss would ignore or does not work with.
        NonFiniteError: in training, in every process: log-probabilities that are not finite.
    """

    loss: PreferenceLoss
    loss_is_scaled_for_ga = False  # so that Trainer divides by the accumulation steps, as `divisor` expects
    # Trainer's.
    args: Any
    accelerator: Any
    model: Any

    def __init__(self, *arguments: Any, loss: PreferenceLoss, **options: Any):
        if not isinstance(loss, PreferenceLoss):
            raise TypeError(f"loss must be a PreferenceLoss such as KLDPOLoss(tau=0.1), got {type(loss).__name__}")
        self.loss = loss
        self._global_batch: Any = None if loss.needs_embeddings else GlobalBatch(loss)
        self._window: _Window | None = None
        self._turn: tuple[_Window, int] | None = None  # the microbatch that Trainer is training
        self._loss_metrics: dict[bool, list[dict[str, Tensor]]] = {True: [], False: []}  # by whether in training
        _check_class(type(self))
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = False
        self._check_trainer()
        loss.to(self.args.device)

    # What a trainer defines.

    def loss_arguments(self, model: Any, inputs: Any) -> dict[str, Tensor]:
        """The arguments of `loss.forward` by name, [B] each, of one microbatch: one call of `model`.

        Names that begin with "policy_" carry the gradient, with a graph where gradients are enabled. It is called up to
        twice a microbatch and step, and must draw the same random numbers in both.

        Args:
            model: the policy, as Trainer has wrapped it.
            inputs: the microbatch, as `Trainer._prepare_inputs` and then `with_reference` have returned it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss_arguments(model, inputs)")

    def with_reference(self, model: Any, inputs: Any) -> Any:
        """The microbatch with what does not change within a step, such as the reference's log-probabilities.

        It is called once a microbatch and step, without gradient. By default the microbatch as it is.
        """
        return inputs

    def samples(self, microbatch: Any) -> float | None:
        """The number of samples (pairs) of a microbatch, before any forward; with weights, their sum.

        With it a loss that is a mean needs no extra passes. By default None: not known.
        """
        return None

    def observe(self, model: Any, inputs: Any) -> None:
        """Called once a microbatch, after its `loss_arguments` of the pass that counts: the place for other metrics."""

    # What a trainer calls.

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if return_outputs:
            raise ValueError(
                "the model's outputs are not kept: override prediction_step for what compute_metrics needs"
            )
        return self.global_loss(model, inputs)

    def global_loss(self, model: Any, inputs: Any) -> Tensor:
        """What `compute_loss` returns for a microbatch, [].

        Its value is the loss of all samples, and its gradient this microbatch's part of it. (Of a loss that is a mean,
        whose samples are counted beforehand: its share of the value.)
        """
        training = torch.is_grad_enabled() and self.model.training
        self.loss.train(training)
        if not training:
            return self._evaluation_loss(model, inputs)
        window, index = self._turn or (_Window([inputs]), 0)
        if self.loss.needs_embeddings:
            return self._penalized_loss(model, inputs, window, index)
        if len(window) == 1 or self._global_batch.looks_at_all or window.masses(self.samples) is None:
            return self._coupled_loss(model, inputs, window, index)
        return self._mean_loss(model, inputs, window, index)

    # Trainer's methods.

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        microbatches, items = super().get_batch_samples(*arguments, **options)
        self._window = _Window(microbatches)
        return microbatches, items

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        window = self._window
        if window is None or window.trained == len(window):  # called by hand
            window = _Window([inputs])
        index, last = window.trained, window.trained + 1 == len(window)
        window.trained += 1
        if self.loss.needs_embeddings and not self.loss.differentiates_twice and not last:
            return torch.zeros((), device=self.args.device)  # the last one's turn trains them all
        if index and window.states:
            window.states[index].restore()
        self._turn = window, index
        try:
            return super().training_step(model, inputs, *arguments, **options)
        finally:
            self._turn = None
            if last:
                self._window = None
                if window.after is not None:
                    window.after.restore()

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        if not prediction_loss_only and getattr(self, "compute_metrics", None) is not None:
            raise ValueError(
                "the model's outputs are not kept: override prediction_step for what compute_metrics needs"
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        training = bool(self.model.training)
        records, self._loss_metrics[training] = self._loss_metrics[training], []
        prefix = "" if training else "eval_"
        # In place, as `evaluate` returns the dict that it logs. A trainer's own metrics of the same name stay.
        logs.update({f"{prefix}{name}": value for name, value in _means(records).items()} | logs)
        super().log(logs, *arguments, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {name: value.detach().cpu().contiguous() for name, value in self.loss.state_dict().items()}
        if state and self.args.should_save:
            from safetensors.torch import save

            replace_file(Path(output_dir) / STATE_FILE, save(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.loss.state_dict():
            _load_state(self.loss, Path(checkpoint) / STATE_FILE)

    # The parts.

    def _check_trainer(self) -> None:
        kind = type(self).__name__
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{kind} needs a process for each GPU, and one process sees {self.args.n_gpu} (nn.DataParallel): start "
                "it with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        for dimension in ("tp", "cp", "sp"):
            size = getattr(parallelism, f"{dimension}_size", 1) or 1
            if size > 1:
                raise ValueError(
                    f"{kind} takes every process for one that has samples of its own, and parallelism_config has "
                    f"{dimension}_size={size}: use data parallelism (DDP, FSDP, DeepSpeed)"
                )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func would not be called: the loss is `loss`")
        if getattr(self.args, "label_smoothing_factor", 0.0):
            raise ValueError(
                "label_smoothing_factor smooths a cross-entropy, and would be ignored: give the loss its own, such as "
                "DPOLoss(label_smoothing=...)"
            )
        if self.loss.needs_embeddings:
            self._check_penalty()

    def _check_penalty(self) -> None:
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optimizer:
            raise ValueError(f"optim={optimizer!r} steps in every backward, and WDPO has several in a step")
        if self.loss.differentiates_twice or self.loss.step is not None:
            return
        precision = self.accelerator.mixed_precision
        autocast = precision in ("bf16", "fp16") and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if autocast and self.model.get_input_embeddings().weight.dtype == torch.float32:
            raise ValueError(
                f"{precision}=True rounds what float32 embeddings are moved by, which WDPOLoss's default step does not "
                "know: give WDPOLoss(step=0.02), load the model in bfloat16 (for which the step is measured), or set "
                f"{precision}=False"
            )

    def _evaluation_loss(self, model: Any, inputs: Any) -> Tensor:
        with torch.no_grad():
            inputs = self.with_reference(model, inputs)
        if self.loss.needs_embeddings:
            value, metrics = self._penalized_evaluation(model, inputs)
        else:
            value, metrics = self._global_batch(**self.loss_arguments(model, inputs), return_metrics=True)
        self._loss_metrics[False].append(metrics)
        self.observe(model, inputs)
        return value.detach()

    def _coupled_loss(self, model: Any, inputs: Any, window: _Window, index: int) -> Tensor:
        # Before the first's own pass, so that they find no graph in memory.
        others = self._first_passes(model, window) if index == 0 else []
        inputs = self._inputs_of(model, inputs, window, index)
        arguments = self.loss_arguments(model, inputs)
        if index == 0:
            window.value, metrics, window.cotangents = self._global_batch.cotangents(
                [arguments, *others], divisor=len(window)
            )
            self._loss_metrics[True].append(metrics)
            window.after = RandomState()
        self.observe(model, inputs)
        surrogate = weighted_sum(arguments, window.cotangents[index])
        return window.value + (surrogate - surrogate.detach())

    @torch.no_grad()
    def _first_passes(self, model: Any, window: _Window) -> list[dict[str, Tensor]]:
        """The arguments of all microbatches but the first, and where the random numbers stood before each."""
        window.states, every = [RandomState()], []
        for index in range(1, len(window)):
            inputs = self._inputs_of(model, self._prepare_inputs(window.microbatches[index]), window, index)
            window.states.append(RandomState())
            every.append(self.loss_arguments(model, inputs))
        torch.clear_autocast_cache()  # older torch keeps weights cast without a graph
        return every

    def _mean_loss(self, model: Any, inputs: Any, window: _Window, index: int) -> Tensor:
        masses = window.masses(self.samples)
        assert masses is not None
        if index == 0:
            window.shares = self._global_batch.shares(masses, divisor=len(window))
        inputs = self._inputs_of(model, inputs, window, index)
        arguments = self.loss_arguments(model, inputs)
        _check_mass(self, masses[index], arguments)
        constants = {name: value.detach() for name, value in arguments.items()}
        window.arguments.append(constants)
        if index + 1 == len(window):
            _, metrics, _ = self._global_batch.cotangents(window.arguments)  # NonFiniteError in all processes alike
            self._loss_metrics[True].append(metrics)
        self.observe(model, inputs)
        policy = {name: value for name, value in arguments.items() if name.startswith("policy_")}
        if not all(value.isfinite().all() for value in arguments.values() if value.device.type == "cpu"):
            # The loss refuses it on the CPU, while other processes may be waiting in the backward.
            return weighted_sum(policy, {name: torch.zeros_like(value) for name, value in policy.items()})
        return window.shares[index] * self.loss(**(constants | policy))

    @torch.no_grad()
    def _inputs_of(self, model: Any, inputs: Any, window: _Window, index: int) -> Any:
        """The prepared microbatch with its reference, found once a step."""
        if index not in window.inputs:
            window.inputs[index] = self.with_reference(model, inputs)
        return window.inputs[index]

    # A penalty on the gradient by the input embeddings (WDPO).

    def _penalized_loss(self, model: Any, inputs: Any, window: _Window, index: int) -> Tensor:
        if self.loss.differentiates_twice:
            return self._exact_loss(model, inputs, window, index)
        if self._turn is None:  # by hand, outside of any step: the graphs of all its passes live together
            inputs = self._inputs_of(model, inputs, window, index)
            value, metrics = directional_loss(self.loss, partial(self._arguments_at, model, inputs))
            self._loss_metrics[True].append(metrics)
            self.observe(model, inputs)
            return value
        return self._directional_loss(model, window)

    def _directional_loss(self, model: Any, window: _Window) -> Tensor:
        """All passes over the window's microbatches, and backward of all but the last, which is Trainer's."""
        with torch.no_grad():
            batches = [
                self.with_reference(model, self._prepare_inputs(microbatch)) for microbatch in window.microbatches
            ]
        count, passes, held = len(batches), 0, []
        total = count * self.loss.backwards_per_microbatch
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}

        def arguments_at(index: int, offset: Tensor | None) -> tuple[dict[str, Tensor], Any]:
            nonlocal passes
            if torch.is_grad_enabled():
                passes += 1
                if passes == total:
                    unsynchronized.close()
            arguments, embeddings = self._arguments_at(model, batches[index], offset)
            if offset is None and torch.is_grad_enabled():
                self._check_finite(arguments, index)
                self.observe(model, batches[index])
            return arguments, embeddings

        def backward(value: Tensor) -> None:
            if passes == total:
                held.append(value)
            else:
                self.accelerator.backward(value / count, **options)

        with ExitStack() as unsynchronized:
            unsynchronized.enter_context(self._no_sync(model))
            value, metrics = directional_step(
                self.loss, range(count), arguments_at, backward, masses=window.masses(self.samples), divisor=count
            )
        self._loss_metrics[True].append(metrics)
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

    def _exact_loss(self, model: Any, inputs: Any, window: _Window, index: int) -> Tensor:
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
            masses = [_mass(arguments)]
        _check_mass(self, masses[index], arguments)
        if index == 0:
            window.shares = _shares(masses, divisor=len(window))
        self._check_finite(arguments, index)
        value, metrics = self.loss(**arguments, embeddings=embeddings, return_metrics=True)
        self._loss_metrics[True].append(metrics)
        self.observe(model, inputs)
        return window.shares[index] * value

    def _penalized_evaluation(self, model: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.loss.differentiates_twice:
            return directional_loss(self.loss, partial(self._arguments_at, model, inputs))
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

    def _check_finite(self, arguments: dict[str, Tensor], index: int) -> None:
        """NonFiniteError in every process, of one microbatch."""
        bad = torch.stack([~value.isfinite().all() for value in arguments.values() if value.is_floating_point()]).any()
        if dist.is_available() and dist.is_initialized():
            bad = bad.to(torch.float32)
            dist.all_reduce(bad)
        if bool(bad):
            raise NonFiniteError(f"log-probabilities are not finite in microbatch {index} of this step")


class _Window:
    """The microbatches of one optimizer step in this process, and what the first of them has found out for all."""

    def __init__(self, microbatches: Sequence[Any]):
        self.microbatches = list(microbatches)
        self.trained = 0  # how many have had their turn
        self.inputs: dict[int, Any] = {}  # prepared, with their reference
        self.states: list[RandomState] = []  # where the random numbers stood before each
        self.after: RandomState | None = None  # and after all of them
        self.value: Any = None
        self.cotangents: list[dict[str, Tensor]] = []
        self.shares: list[float] = []
        self.arguments: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.microbatches)

    def masses(self, samples: Any) -> list[float] | None:
        masses = [samples(microbatch) for microbatch in self.microbatches]
        return None if None in masses else [float(mass) for mass in masses]


_shares = GlobalBatch(DPOLoss()).shares  # of any mean over samples


def _check_class(kind: type) -> None:
    """Refuse a class that is no Trainer, and a Trainer without what is overridden here, which would go unnoticed."""
    parents = kind.__mro__[kind.__mro__.index(GlobalBatchMixin) + 1 :]
    trainers = [parent for parent in parents if parent.__module__.startswith("transformers.")]
    if not trainers:
        raise TypeError(f"{kind.__name__} must name GlobalBatchMixin before a subclass of transformers.Trainer")
    require_methods(trainers[0], kind.__name__, *OVERRIDDEN)


def _mass(arguments: dict[str, Tensor]) -> float:
    weights = arguments.get("weights")
    if weights is not None:
        return float(weights.sum())
    return float(len(next(value for name, value in arguments.items() if name.startswith("policy_"))))


def _check_mass(trainer: GlobalBatchMixin, expected: float, arguments: dict[str, Tensor]) -> None:
    found = _mass(arguments)
    if not math.isclose(found, expected, rel_tol=1e-4):
        raise ValueError(
            f"{type(trainer).__name__}.samples says {expected:g} of a microbatch, and loss_arguments gave the loss "
            f"{found:g} samples (or weights that add up to it)"
        )


def _means(records: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of each metric over the records that have it; a group or a class that a batch lacks has NaN."""
    values = defaultdict(list)
    for record in records:
        for name, value in record.items():
            values[name].append(float(value))
    kept = {name: [value for value in every if value == value] for name, every in values.items()}
    return {name: sum(every) / len(every) for name, every in kept.items() if every}


def _load_state(loss: PreferenceLoss, path: Path) -> None:
    from safetensors.torch import load_file

    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is missing, which holds the state of {type(loss).__name__}: the checkpoint was saved with "
            "another loss or trainer (or with save_only_model=True), so training cannot go on from it"
        )
    try:
        loss.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} is not the state of {loss}: {error}") from error
