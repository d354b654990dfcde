"""OpenRLHF: robustloss in its DPO trainer, gradient accumulation included.

    from robustloss import KLDPOLoss
    from robustloss.integrations import openrlhf

    openrlhf.train_dpo(KLDPOLoss(beta=0.1, tau=0.5))  # takes the arguments of `-m openrlhf.cli.train_dpo`

There each microbatch has a loss of its own, `loss_fn(chosen, rejected, ref_chosen, ref_rejected)`, whose gradients
DeepSpeed averages. Here the batch is that of all processes and all microbatches of a step (`robustloss.GlobalBatch`):
before the first microbatch of a step the others are run without gradient (their reference log-probabilities are kept),
which costs (K - 1) / K of a forward pass for K microbatches. A loss that is a mean needs none of this.

Written for OpenRLHF 0.11.2, whose trainer's fit and evaluate were run on a CPU with a stand-in for DeepSpeed.
"""

from __future__ import annotations

import runpy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustloss._random import RandomState
from robustloss.global_batch import GlobalBatch, weighted_sum
from robustloss.losses import PreferenceLoss, StatefulLoss
from robustloss.losses.base import PAIRED_NAMES

DEFAULT_BETA = 0.1  # of --model.beta


class LossFunction(nn.Module):
    """A paired loss with the arguments and results of `openrlhf.models.DPOLoss`; `loss_fn` makes one.

    Attributes:
        metrics: what the last call of training told of the whole batch, detached scalars by name; empty for a mean.
    """

    def __init__(
        self,
        loss: PreferenceLoss,
        *,
        group: dist.ProcessGroup | None = None,
        microbatches: int = 1,
        look_ahead: Callable[[], list[dict[str, Tensor]]] | None = None,
    ):
        super().__init__()
        self.global_batch = GlobalBatch(_checked(loss), group)
        self.microbatches = microbatches
        self.metrics: dict[str, Tensor] = {}
        self._look_ahead = look_ahead
        self._value = torch.zeros(())
        self._cotangents: deque[dict[str, Tensor]] = deque()

    def forward(
        self, chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without gradients (OpenRLHF's evaluation) it is the loss of all processes' pairs, and no state is updated.

        Args:
            chosen_logps, rejected_logps: [B], the trained model's log-probabilities in nats.
            ref_chosen_logps, ref_rejected_logps: [B], the reference model's.

        Returns:
            (loss [], chosen rewards [B], rejected rewards [B]), the rewards detached.
        """
        logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        own: dict[str, Tensor] = dict(zip(PAIRED_NAMES, logps, strict=True))
        self.train(torch.is_grad_enabled()).to(chosen_logps.device)
        if not self.global_batch.looks_at_all:
            value = self.global_batch.loss(**own)
        elif not self.training:
            value = self.global_batch(**own)
        elif self._look_ahead is None:
            value, self.metrics = self.global_batch(**own, return_metrics=True)
        else:
            value = self._part_of_step(own, self._look_ahead)
        with torch.no_grad():
            chosen = self.global_batch.loss.rewards(chosen_logps, ref_chosen_logps)
            rejected = self.global_batch.loss.rewards(rejected_logps, ref_rejected_logps)
        return value, chosen, rejected

    def _part_of_step(self, own: dict[str, Tensor], look_ahead: Callable[[], list[dict[str, Tensor]]]) -> Tensor:
        """The value of the whole step with the gradient of this microbatch's part of it."""
        if not self._cotangents:
            self._value, self.metrics, cotangents = self.global_batch.cotangents(
                [own, *look_ahead()], divisor=self.microbatches
            )
            self._cotangents.extend(cotangents)
        part = weighted_sum(own, self._cotangents.popleft())
        return self._value + (part - part.detach())


def loss_fn(loss: PreferenceLoss, strategy: Any) -> LossFunction:
    """What to set as the `loss_fn` of an `openrlhf.trainer.dpo_trainer.DPOTrainer` of one's own.

    It sees one microbatch of every process. `robust` sees them all.

    Args:
        loss: a paired loss.
        strategy: the trainer's DeepspeedStrategy, after `setup_distributed`.

    Raises:
        TypeError: what is no PreferenceLoss, or a loss of unpaired samples.
        ValueError: a loss that needs more than log-probabilities (WDPO, GroupDRO); one that looks at the whole batch,
            where a step has several microbatches.
    """
    function = LossFunction(loss, group=_data_parallel_group(strategy))
    steps = strategy.accumulated_gradient
    if function.global_batch.looks_at_all and steps > 1:
        raise ValueError(
            f"{type(loss).__name__} looks at the whole batch, and loss_fn sees one of the {steps} microbatches of a "
            "step: use robustloss.integrations.openrlhf.robust(DPOTrainer), or raise --train.micro_batch_size to "
            "--train.batch_size / processes"
        )
    return function


def robust(trainer_class: Any) -> type:
    """OpenRLHF's DPOTrainer, or a subclass of it, with one more keyword: `loss`, a paired loss.

    The last microbatches of an epoch, where they make no whole step, are left out: DeepSpeed would add their gradients
    to the next epoch's. Metrics of the whole batch (tilt/*, dominance/*) are logged among OpenRLHF's own.

    Raises (the constructor):
        TypeError, ValueError: as `loss_fn`, save that any number of microbatches will do; options of OpenRLHF's own
            loss, which would be ignored (--model.beta other than the loss's, label_smoothing, ipo_enable).
    """

    class RobustDPOTrainer(trainer_class):
        def __init__(self, *args: Any, loss: PreferenceLoss, **kwargs: Any):
            _checked(loss)
            super().__init__(*args, **kwargs)
            _check_options(self.args.model, loss)
            steps = self.strategy.accumulated_gradient
            self.loss_fn = LossFunction(
                loss, group=_data_parallel_group(self.strategy), microbatches=steps, look_ahead=self._look_ahead
            )
            self._others: list[dict[str, Tensor]] = []  # the arguments of all of a step's microbatches but the first
            self._states: list[RandomState] = []  # where the random numbers stood before each of those
            self._after: RandomState | None = None  # and after all of them and the first
            self._known: list[Any] = []  # what the reference has given for them
            self._references: deque[Any] = deque()  # the same, once their turn has come
            if self.loss_fn.global_batch.looks_at_all:
                self.train_dataloader = _Steps(self.train_dataloader, steps, self._begin, self._end)

        def fit(self, args: Any, consumed_samples: int = 0, *others: Any, **kwargs: Any) -> None:
            if consumed_samples and isinstance(loss := self.loss_fn.global_batch.loss, StatefulLoss):
                raise ValueError(
                    f"{type(loss).__name__} has a state, which OpenRLHF's checkpoints do not hold, so this run cannot "
                    "be resumed: leave out --ckpt.load_enable"
                )
            super().fit(args, consumed_samples, *others, **kwargs)

        def concatenated_forward(self, model: Any, *batch: Any) -> Any:
            if model is self.ref_model and self._references:
                return self._references.popleft()
            return super().concatenated_forward(model, *batch)

        def save_logs_and_checkpoints(
            self, args: Any, global_step: int, step_bar: Any, logs_dict: Any = None, client_states: Any = None
        ) -> None:
            ours = {name: float(value) for name, value in self.loss_fn.metrics.items()}
            super().save_logs_and_checkpoints(args, global_step, step_bar, ours | (logs_dict or {}), client_states)

        def _begin(self, index: int, step: list[Any]) -> None:
            """Before the microbatch of this index is handed out."""
            if index == 0:
                self._first_passes(step[1:])  # while no graph is in memory
            else:
                self._states[index - 1].restore()  # so that its dropout masks are those of its first pass

        def _end(self) -> None:
            """After the last microbatch of a step."""
            if self._after is not None:
                self._after.restore()

        @torch.no_grad()
        def _first_passes(self, others: list[Any]) -> None:
            self._others, self._states, self._known = [], [], []
            device = next(self.model.parameters()).device
            for *tensors, prompt_lengths in others:
                batch = [*(tensor.squeeze(1).to(device) for tensor in tensors), prompt_lengths]
                self._states.append(RandomState())
                chosen, rejected, *_ = super().concatenated_forward(self.model, *batch)
                reference = super().concatenated_forward(self.ref_model, *batch)
                self._known.append(reference)
                self._others.append(dict(zip(PAIRED_NAMES, (chosen, rejected, *reference[:2]), strict=True)))

        def _look_ahead(self) -> list[dict[str, Tensor]]:
            self._after = RandomState()
            self._references.extend(self._known)
            return self._others

    RobustDPOTrainer.__name__ = RobustDPOTrainer.__qualname__ = f"Robust{trainer_class.__name__}"
    return RobustDPOTrainer


def train_dpo(loss: PreferenceLoss) -> None:
    """OpenRLHF's own command, `openrlhf.cli.train_dpo`, with this loss in place of its own.

    It reads the command line, and is started as that is: `deepspeed dpo.py --model.model_name_or_path ...`.

    Raises:
        TypeError, ValueError: as `robust`.
    """
    from openrlhf.trainer import dpo_trainer

    _checked(loss)
    original = dpo_trainer.DPOTrainer
    dpo_trainer.DPOTrainer = partial(robust(original), loss=loss)
    try:
        runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")
    finally:
        dpo_trainer.DPOTrainer = original


class _Steps:
    """A data loader that has the microbatches of a step ready before it hands out the first."""

    def __init__(
        self,
        dataloader: Any,
        microbatches: int,
        begin: Callable[[int, list[Any]], None],
        end: Callable[[], None],
    ):
        self.dataloader, self.microbatches, self.begin, self.end = dataloader, microbatches, begin, end

    @property
    def sampler(self) -> Any:
        return self.dataloader.sampler

    def __len__(self) -> int:
        return len(self.dataloader) // self.microbatches * self.microbatches

    def __iter__(self) -> Iterator[Any]:
        microbatches = iter(self.dataloader)
        while len(step := list(islice(microbatches, self.microbatches))) == self.microbatches:
            for index, microbatch in enumerate(step):
                self.begin(index, step)
                yield microbatch
            self.end()


def _checked(loss: PreferenceLoss) -> PreferenceLoss:
    if not isinstance(loss, PreferenceLoss):
        raise TypeError(f"loss must be a PreferenceLoss such as KLDPOLoss(tau=0.1), got {type(loss).__name__}")
    name = type(loss).__name__
    if not loss.paired:
        raise TypeError(
            f"{name} takes unpaired samples, and OpenRLHF's DPO trainer has pairs: use AOTPairedLoss or DPOLoss"
        )
    instead = "train it with `robustloss train` or robustloss.integrations.trl.RobustDPOTrainer"
    if loss.needs_embeddings:
        raise ValueError(f"{name} differentiates embeddings, and OpenRLHF hands on log-probabilities only: {instead}")
    if loss.needs_groups:
        raise ValueError(f"{name} needs the group of each pair, which OpenRLHF's batches lack: {instead}")
    return loss


def _check_options(options: Any, loss: PreferenceLoss) -> None:
    """Refuse what OpenRLHF's own loss would have heeded."""
    name = type(loss).__name__
    if options.beta not in (DEFAULT_BETA, loss.beta):
        raise ValueError(
            f"--model.beta {options.beta:g} would be ignored: beta is the loss's, {name}(beta={loss.beta:g}); leave "
            "the option out, or give both the same"
        )
    if options.label_smoothing != 0 and options.label_smoothing != loss.label_smoothing:
        raise ValueError(
            f"--model.label_smoothing {options.label_smoothing:g} would be ignored: give {name}(label_smoothing=...)"
        )
    if options.ipo_enable and loss.link != "ipo":
        raise ValueError(f"--model.ipo_enable would be ignored: give {name}(link='ipo')")


def _data_parallel_group(strategy: Any) -> dist.ProcessGroup | None:
    """The processes that have different samples: not those that share a sequence or a layer."""
    mesh = getattr(strategy, "ds_device_mesh", None)
    return None if mesh is None else mesh["dp"].get_group()
