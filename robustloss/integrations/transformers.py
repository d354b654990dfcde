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

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustloss._files import replace_file
from robustloss._random import RandomState
from robustloss.global_batch import GlobalBatch, weighted_sum
from robustloss.integrations._versions import require, require_methods
from robustloss.integrations._wdpo import PenaltyPasses
from robustloss.integrations._window import RunningMeans, Window, wrong_mass
from robustloss.losses.base import PreferenceLoss

require("transformers", "robustloss.integrations.transformers", at_least="4.57")

STATE_FILE = "loss.safetensors"  # in each checkpoint folder, of a loss that has a state
OVERRIDDEN = (
    "get_batch_samples",
    "training_step",
    "compute_loss",
    "prediction_step",
    "evaluation_loop",
    "log",
    "call_model_init",
    "_prepare_inputs",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "_load_best_model",
)  # or called, of Trainer's methods


class GlobalBatchMixin(PenaltyPasses):
    """Put before a subclass of `transformers.Trainer`: it trains `loss` on the samples of all processes and of all
    accumulation steps.

    Args:
        loss: keyword only, a module of `robustloss.losses`; all other arguments are the trainer's. It is moved to the
            trainer's device. Its state, if it has one, goes with the model's: it is saved in each checkpoint
            (`loss.safetensors`), loaded on resume and with the best model, and begins anew where `model_init` does.

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
        self._window: Window | None = None
        self._turn: tuple[Window, int] | None = None  # the microbatch that Trainer is training
        self._loss_metrics = {True: RunningMeans(), False: RunningMeans()}  # by whether in training
        self._evaluation_prefix = "eval"
        self._first_state = _state_of(loss)
        self._warned = False
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
        window, index = self._turn or (Window([inputs]), 0)
        if self.loss.needs_embeddings:
            return self._penalized_loss(model, inputs, window, index)
        if len(window) == 1 or self._global_batch.looks_at_all or window.masses(self.samples) is None:
            return self._coupled_loss(model, inputs, window, index)
        return self._mean_loss(model, inputs, window, index)

    # Trainer's methods.

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        microbatches, items = super().get_batch_samples(*arguments, **options)
        self._window = Window(microbatches)
        return microbatches, items

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        window = self._window
        if window is None or window.trained == len(window):  # called by hand
            window = Window([inputs])
        index, last = window.trained, window.trained + 1 == len(window)
        window.trained += 1
        if index == 0:
            window.before = _state_of(self.loss), self._loss_metrics[True].copy()
        if last:
            self._check_step_follows(len(window))
        if self.loss.needs_embeddings and not self.loss.differentiates_twice and not last:
            return torch.zeros((), device=self.args.device)  # the last one's turn trains them all
        if index and window.states:
            window.states[index].restore()
        self._turn = window, index
        try:
            return super().training_step(model, inputs, *arguments, **options)
        except BaseException:
            # auto_find_batch_size takes these samples again.
            state, self._loss_metrics[True] = window.before
            self.loss.load_state_dict(state)
            self._window = None
            raise
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

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        self._loss_metrics[False] = RunningMeans()  # `predict` logs nothing, and leaves its own
        self._evaluation_prefix = options.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        training = bool(self.model.training)
        means, self._loss_metrics[training] = self._loss_metrics[training].read(), RunningMeans()
        prefix = "" if training else f"{self._evaluation_prefix}_"
        # In place, as `evaluate` returns the dict that it logs. A trainer's own metrics of the same name stay.
        logs.update({f"{prefix}{name}": value for name, value in means.items()} | logs)
        super().log(logs, *arguments, **options)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if not isinstance(inputs, Mapping):
            return prepared
        # Under DeepSpeed all that floats becomes half precision, in which a sum over tokens has lost its digits.
        kept = {
            name: value.to(prepared[name].device)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and (value.dim() < 2 or name.startswith("ref_"))
            if name in prepared and prepared[name].dtype != value.dtype
        }
        return {**prepared, **kept} if kept else prepared

    def call_model_init(self, *arguments: Any, **options: Any) -> Any:
        self.loss.load_state_dict(self._first_state)
        return super().call_model_init(*arguments, **options)

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

    def _load_best_model(self) -> None:
        super()._load_best_model()
        path = Path(self.state.best_model_checkpoint) / STATE_FILE
        if self.loss.state_dict() and path.exists():
            _load_state(self.loss, path)

    # The parts.

    def _check_trainer(self) -> None:
        kind = type(self).__name__
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{kind} needs a process for each GPU, and one process sees {self.args.n_gpu} (nn.DataParallel): start "
                "it with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        for dimension in ("tp", "cp", "sp"):
            size = self._size_of(dimension)
            if size > 1:
                raise ValueError(
                    f"{kind} takes every process for one that has samples of its own, and this run has "
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

    def _size_of(self, dimension: str) -> int:
        """Of a kind of parallelism, which newer releases of Trainer know from more than one place."""
        find = getattr(self, f"get_{dimension}_size", None)
        if find is None:
            parallelism = getattr(self.accelerator, "parallelism_config", None)
            return getattr(parallelism, f"{dimension}_size", 1) or 1
        return find() or 1

    def _check_step_follows(self, microbatches: int) -> None:
        if self.accelerator.gradient_state.sync_gradients or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"an epoch ended after {microbatches} of {self.args.gradient_accumulation_steps} accumulation steps, which "
            "Trainer, not knowing the dataset's length, adds to the next epoch's first step: that one is no longer the "
            "gradient of its own samples. Give the dataset a length, or as many samples as fill its last step",
            stacklevel=4,
        )

    def _evaluation_loss(self, model: Any, inputs: Any) -> Tensor:
        with torch.no_grad():
            inputs = self.with_reference(model, inputs)
        if self.loss.needs_embeddings:
            value, metrics = self._penalized_evaluation(model, inputs)
        else:
            value, metrics = self._global_batch(**self.loss_arguments(model, inputs), return_metrics=True)
        self._loss_metrics[False].add(metrics)
        self.observe(model, inputs)
        return value.detach()

    def _coupled_loss(self, model: Any, inputs: Any, window: Window, index: int) -> Tensor:
        # Before the first's own pass, so that they find no graph in memory.
        others = self._first_passes(model, window) if index == 0 else []
        inputs = self._inputs_of(model, inputs, window, index)
        arguments = self.loss_arguments(model, inputs)
        if index == 0:
            window.value, metrics, window.cotangents = self._global_batch.cotangents(
                [arguments, *others], divisor=len(window)
            )
            self._loss_metrics[True].add(metrics)
            window.after = RandomState()
        self.observe(model, inputs)
        surrogate = weighted_sum(arguments, window.cotangents[index])
        return window.value + (surrogate - surrogate.detach())

    @torch.no_grad()
    def _first_passes(self, model: Any, window: Window) -> list[dict[str, Tensor]]:
        """The arguments of all microbatches but the first, and where the random numbers stood before each."""
        window.states, every = [RandomState()], []
        for index in range(1, len(window)):
            inputs = self._inputs_of(model, self._prepare_inputs(window.microbatches[index]), window, index)
            window.states.append(RandomState())
            every.append(self.loss_arguments(model, inputs))
        torch.clear_autocast_cache()  # older torch keeps weights cast without a graph
        return every

    def _mean_loss(self, model: Any, inputs: Any, window: Window, index: int) -> Tensor:
        masses = window.masses(self.samples)
        assert masses is not None
        if index == 0:
            window.shares = self._global_batch.shares(masses, divisor=len(window))
        inputs = self._inputs_of(model, inputs, window, index)
        arguments = self.loss_arguments(model, inputs)
        value, problem = self._global_batch.part_of_mean(arguments, window.shares[index])
        # Other processes may be waiting in the backward: they learn of it in the window's last turn.
        window.problem = window.problem or problem or wrong_mass(self, masses[index], arguments)
        window.arguments.append({name: value.detach() for name, value in arguments.items()})
        if index + 1 == len(window):
            _, metrics, _ = self._global_batch.cotangents(window.arguments, problem=window.problem)
            self._loss_metrics[True].add(metrics)
        self.observe(model, inputs)
        return value

    @torch.no_grad()
    def _inputs_of(self, model: Any, inputs: Any, window: Window, index: int) -> Any:
        """The prepared microbatch with its reference, found once a step."""
        if index not in window.inputs:
            window.inputs[index] = self.with_reference(model, inputs)
        return window.inputs[index]


def _check_class(kind: type) -> None:
    """Refuse a class that is no Trainer, and a Trainer without what is overridden here, which would go unnoticed."""
    parents = kind.__mro__[kind.__mro__.index(GlobalBatchMixin) + 1 :]
    trainers = [parent for parent in parents if parent.__module__.startswith("transformers.")]
    if not trainers:
        raise TypeError(f"{kind.__name__} must name GlobalBatchMixin before a subclass of transformers.Trainer")
    require_methods(trainers[0], kind.__name__, *OVERRIDDEN)


def _state_of(loss: PreferenceLoss) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in loss.state_dict().items()}


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
