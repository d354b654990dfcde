"""The training loop, from a config to a run's folder.

A run folder holds config.yaml, environment.json, metrics.jsonl, evaluations/, tensorboard/, checkpoints/ and, at the
end, model/ (an ordinary Hugging Face folder, with a model card) and report.html. The same command goes on where a
killed run stopped.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss._version import __version__
from robustloss.losses import PreferenceLoss
from robustloss.train import distributed
from robustloss.train.checkpoint import load_checkpoint, save_best, save_checkpoint, save_model
from robustloss.train.config import InputError, RunConfig, build_loss, input_errors
from robustloss.train.data import fingerprint
from robustloss.train.evaluation import evaluate
from robustloss.train.guard import Guard
from robustloss.train.inputs import BatchOrder, Inputs, load_inputs
from robustloss.train.interrupt import Preemption
from robustloss.train.metrics import MetricsWriter, peak_memory_bytes
from robustloss.train.model_card import model_card
from robustloss.train.output_dir import check_same_run, open_run, prepare_folder

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> Path:
    """Train as `config` says and return the run's folder.

    It may be called several times in one process; a process group that exists already is used, and left as it is.

    Raises:
        InputError: a mistake in the config or the data.
        FloatingPointError: `max_skipped` steps in a row that are not finite; names the step and the rows.
    """
    run_dir = Path(config.output_dir)
    if config.resume and (run_dir / "model").exists():
        check_same_run(config)
        return _finish(run_dir, "is finished already", redraw=False)
    loss = build_loss(config.loss)
    distributed.prepare_libraries()
    with distributed.raised_by_all():  # who read the same files, before anything that takes long
        inputs = load_inputs(config, loss)
    with ExitStack() as cleanup:
        device, started = distributed.start()
        if started:
            cleanup.callback(distributed.stop)
        lock = distributed.on_first(partial(prepare_folder, run_dir))
        if lock is not None:
            cleanup.enter_context(lock)
        left = _train(config, loss, inputs, run_dir, device, cleanup)
        if left:
            if distributed.is_first():
                print(f"{run_dir} stopped as it was asked to, {left} step(s) before its end; the same command goes on")
            return run_dir
        distributed.on_first(partial(_finish, run_dir, "is finished", redraw=True))
        return run_dir


def _train(
    config: RunConfig,
    loss: PreferenceLoss,
    inputs: Inputs,
    run_dir: Path,
    device: torch.device,
    cleanup: ExitStack,
) -> int:
    """Train to the end, or until the run is asked to stop: the number of steps still to do."""
    # Imported here: they take seconds, and a mistake in the config should be told at once.
    from robustloss.train.engine import build_engine
    from robustloss.train.loss_module import check_head
    from robustloss.train.references import build_references
    from robustloss.train.step import take_step

    first, rank, world = distributed.is_first(), dist.get_rank(), dist.get_world_size()
    order = BatchOrder(
        len(inputs.examples["train"]), config.batch.effective_batch, config.batch.microbatch, world, config.seed
    )
    if loss.differentiates_twice and loss.coupled and world * order.accumulation > 1:
        raise InputError(
            "loss 'wdpo' with penalty 'exact' and squared=false takes the root over one microbatch, which here is not "
            "the step's batch; use loss.penalty 'central', loss.squared=true, or a microbatch of the whole batch"
        )
    total_steps = config.max_steps or order.total_steps(config.epochs)
    if first:
        _warn_of_batches(config, loss, order)
    save_every = max(1, total_steps // 10) if config.save_every is None else config.save_every
    environment = _environment(device, world)
    distributed.on_first(partial(open_run, config, environment))

    distributed.seed_everything(config.seed)
    engine = build_engine(config, loss, total_steps, order.accumulation * loss.backwards_per_microbatch)
    cleanup.callback(engine.destroy)
    with input_errors():
        check_head(engine, engine.module.model, inputs.collate("train", [0], device))
    reference = build_references(config, engine, inputs, device)
    distributed.seed_everything(config.seed + rank)

    checkpoints = run_dir / "checkpoints"
    data_state = {split: fingerprint(examples) for split, examples in inputs.examples.items()}
    guard = Guard(config.max_skipped)
    state = load_checkpoint(engine, checkpoints, config.seed) or {
        "step": 0,
        "seconds": 0.0,
        "metrics_offset": 0,
        "data": data_state,
        "guard": guard.state_dict(),
        "lowest": math.inf,
    }
    if state["data"] != data_state:
        raise InputError(
            f"output_dir {str(run_dir)!r} holds a run on other data (data.train or data.eval has changed since); use "
            "another output_dir, or resume=false to start again in this one"
        )
    guard.load_state_dict(state["guard"])
    done, lowest = state["step"], state["lowest"]
    began = time.monotonic() - state["seconds"]
    metrics = MetricsWriter(run_dir, active=first, total_steps=total_steps, step=done, offset=state["metrics_offset"])
    if done and first:
        print(f"{run_dir}: going on from step {done} of {total_steps}", flush=True)

    def evaluation(step: int) -> dict[str, float]:
        count = len(inputs.examples["eval"])
        if not count:
            return {}
        collate = partial(inputs.collate, "eval", device=device)
        add_reference = partial(reference, "eval")
        values, arrays = evaluate(engine, count, collate, add_reference, size=config.batch.microbatch, device=device)
        metrics.write(step, "eval", {"seconds": time.monotonic() - began, **values})
        metrics.evaluation(step, arrays, values)
        return values

    def microbatches(step: int) -> list[dict[str, Tensor]]:
        rows = [order.microbatch_rows(step - 1, rank, microstep) for microstep in range(order.accumulation)]
        return [reference("train", inputs.collate("train", part, device)) for part in rows]

    held_out: dict[str, float] = {}
    if done == 0:
        evaluation(0)
    engine.train()
    with Preemption(device) as preemption:
        for step in range(done + 1, total_steps + 1):
            step_began, learning_rate = time.monotonic(), engine.get_lr()[0]
            batches = microbatches(step)
            values = take_step(
                engine,
                batches,
                guard,
                preemption,
                step=step,
                rows_of=partial(order.microbatch_rows, step - 1),
                checks_directions=bool(config.penalty.check_every) and step % (config.penalty.check_every or 1) == 0,
            )
            stops = preemption.requested() and step < total_steps
            due = save_every > 0 and step % save_every == 0 and step < total_steps
            saves = stops or (due and values is not None)  # not in a row of steps that were left out
            writes = values is not None and (step % config.log_every == 0 or step in (1, total_steps) or saves)
            if values is not None and writes:
                tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
                values |= _sums_over_processes(tokens, device)
                values["tokens_per_second"] = values.pop("tokens") / (time.monotonic() - step_began)
                values |= {"learning_rate": learning_rate, "skipped_steps": guard.skipped}
                if step == 1 and first:
                    _check_first_loss(config, loss, values["loss"])
                metrics.write(step, "train", {"seconds": time.monotonic() - began, **values})
            metrics.advance()
            held_out = {}
            if step == total_steps or (config.eval_every and step % config.eval_every == 0):
                held_out = evaluation(step)
            if config.eval_every and held_out:
                card = model_card(config, environment, step, held_out)
                lowest = save_best(engine, config, inputs.tokenizer, run_dir, held_out["loss"], lowest, card)
            if saves:
                state = {
                    "seconds": time.monotonic() - began,
                    "metrics_offset": metrics.offset(),
                    "data": data_state,
                    "guard": guard.state_dict(),
                    "lowest": lowest,
                }
            if saves or writes or held_out:
                metrics.check()
            if saves:
                save_checkpoint(engine, checkpoints, step, state, config.keep_checkpoints, held_out.get("loss"))
            done = step
            if stops:
                break
        if done == total_steps:
            card = model_card(config, environment, total_steps, held_out)
            save_model(engine, config, inputs.tokenizer, run_dir / "model", card)
    metrics.close()
    metrics.check()
    return total_steps - done


def _warn_of_batches(config: RunConfig, loss: PreferenceLoss, order: BatchOrder) -> None:
    aggregate = getattr(loss, "aggregate", None)
    if aggregate is not None and aggregate.coupled and order.effective_batch == 1:
        # A sort of one warns by itself.
        name = config.loss["name"]
        logger.warning(
            "loss %r with batch.effective_batch 1 is plain DPO: a tilt of one pair has nothing to weigh", name
        )
    if order.effective_batch > order.rows:
        logger.warning(
            "a step takes %d samples and data.train holds %d, so a step repeats some; lower batch.effective_batch",
            order.effective_batch,
            order.rows,
        )


def _sums_over_processes(tokens: int, device: torch.device) -> dict[str, float]:
    """The tokens of all processes, and the largest memory."""
    gathered = distributed.gather((tokens, peak_memory_bytes(device)))
    return {"tokens": sum(tokens for tokens, _ in gathered), "peak_memory_bytes": max(bytes_ for _, bytes_ in gathered)}


def _check_first_loss(config: RunConfig, loss: PreferenceLoss, value: float) -> None:
    """Warn of a first loss that is not what it must be."""
    tolerance = 1e-3 if config.precision == "fp32" else 3e-2
    if _starts_at_ln_2(config, loss) and abs(value - math.log(2)) > tolerance:
        logger.warning(
            "the first loss is %.4f and should be ln 2 = %.4f, as the policy still is its own reference: something "
            "makes their log-probabilities differ (lora.dropout is %s; other sources are a model with dropout or "
            "noise of its own, another model's cache in reference.cache_dir, or precision %s on long completions)",
            value,
            math.log(2),
            config.lora.dropout if config.lora else "not in use",
            config.precision,
        )


def _starts_at_ln_2(config: RunConfig, loss: PreferenceLoss) -> bool:
    """Whether every margin is zero at first and the loss is -log sigmoid of it, with weights that sum to one."""
    names = ("dpo", "kldpo", "aot_paired", "dr_dpo", "tv_dpo", "chi_po", "beta_dpo")
    plain = config.loss["name"] in names and loss.link == "logistic"
    normalised = config.loss.get("normalize", True)
    return plain and normalised and config.reference.name_or_path is None


def _finish(run_dir: Path, state: str, *, redraw: bool) -> Path:
    """Write the report (unless it is there and need not be drawn again), and say where everything is."""
    if distributed.is_first():
        from robustloss.train.report import write_report

        report = run_dir / "report.html"
        if redraw or not report.is_file():
            with input_errors():  # a folder that somebody has changed; the model is whole all the same
                report = write_report(run_dir)
        print(f"{run_dir} {state}\nreport: {report}\nmodel: {run_dir / 'model'}", flush=True)
    return run_dir


def _environment(device: torch.device, world_size: int) -> dict[str, Any]:
    import deepspeed
    import transformers

    from robustloss.ops._library import HAS_EXTENSION

    return {
        "robustloss": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "extension": HAS_EXTENSION,
    }
