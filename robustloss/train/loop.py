"""The training loop, from a config to a run's folder.

A run folder holds config.yaml, environment.json, metrics.jsonl, evaluations/, tensorboard/, checkpoints/ and, at the
end, model/ (an ordinary Hugging Face folder) and report.html. The same command goes on where a killed run stopped.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss._version import __version__
from robustloss.losses import PreferenceLoss, StatefulLoss
from robustloss.train import distributed
from robustloss.train.checkpoint import load_checkpoint, save_checkpoint, save_model
from robustloss.train.config import InputError, RunConfig, build_loss, input_errors
from robustloss.train.data import fingerprint
from robustloss.train.evaluation import evaluate
from robustloss.train.inputs import BatchOrder, Inputs, load_inputs
from robustloss.train.metrics import MetricsWriter, gradient_norm, peak_memory_bytes
from robustloss.train.output_dir import check_same_run, open_run, prepare_folder

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> Path:
    """Train as `config` says and return the run's folder.

    It may be called several times in one process; a process group that exists already is used, and left as it is.

    Raises:
        InputError: a mistake in the config or the data.
        FloatingPointError: a loss that is not finite; names the step.
    """
    run_dir = Path(config.output_dir)
    if config.resume and (run_dir / "model").exists():
        check_same_run(config)
        return _finish(run_dir, "is finished already", redraw=False)
    loss = build_loss(config.loss)
    distributed.prepare_libraries()
    inputs = load_inputs(config, loss)  # before anything that takes long
    device, started = distributed.start()
    lock = None
    try:
        lock = distributed.on_first(partial(prepare_folder, run_dir))
        _train(config, loss, inputs, run_dir, device)
        return _finish(run_dir, "is finished", redraw=True)
    finally:
        if lock is not None:
            lock.close()
        if started:
            distributed.stop()


def _train(config: RunConfig, loss: PreferenceLoss, inputs: Inputs, run_dir: Path, device: torch.device) -> None:
    # Imported here: they take seconds, and a mistake in the config should be told at once.
    from robustloss.train.engine import build_engine
    from robustloss.train.loss_module import check_head
    from robustloss.train.references import build_references

    first, rank, world = distributed.is_first(), dist.get_rank(), dist.get_world_size()
    order = BatchOrder(
        len(inputs.examples["train"]), config.batch.microbatch, config.batch.accumulation, world, config.seed
    )
    total_steps = config.max_steps or order.total_steps(config.epochs)
    aggregate = getattr(loss, "aggregate", None)
    if aggregate is not None and aggregate.coupled and config.batch.microbatch == 1 and first:
        # A sort of one warns by itself.
        name = config.loss["name"]
        logger.warning("loss %r with batch.microbatch 1 is plain DPO: a tilt of one pair has nothing to weigh", name)
    if order.step_size > order.rows and first:
        logger.warning(
            "a step takes %d samples and data.train holds %d, so a step repeats some; lower batch.microbatch",
            order.step_size,
            order.rows,
        )
    save_every = max(1, total_steps // 10) if config.save_every is None else config.save_every
    distributed.on_first(partial(open_run, config, _environment(device, world)))

    if isinstance(loss, StatefulLoss) and world > 1:
        loss.process_group = dist.group.WORLD  # one state, which one process can save for all
    distributed.seed_everything(config.seed)
    engine = build_engine(config, loss, total_steps)
    with input_errors():
        check_head(engine, engine.module.model, inputs.collate("train", [0], device))
    reference = build_references(config, engine, inputs, device)
    distributed.seed_everything(config.seed + rank)
    data_state = {split: fingerprint(examples) for split, examples in inputs.examples.items()}
    state = load_checkpoint(engine, run_dir / "checkpoints", config.seed)
    state = state or {"step": 0, "seconds": 0.0, "metrics_offset": 0}
    if state.get("data", data_state) != data_state:
        raise InputError(
            f"output_dir {str(run_dir)!r} holds a run on other data (data.train or data.eval has changed since); use "
            "another output_dir, or resume=false to start again in this one"
        )
    began = time.monotonic() - state["seconds"]
    metrics = MetricsWriter(
        run_dir, active=first, total_steps=total_steps, step=state["step"], offset=state["metrics_offset"]
    )
    if state["step"] and first:
        print(f"{run_dir}: going on from step {state['step']} of {total_steps}", flush=True)

    def evaluation(step: int) -> None:
        if not inputs.examples["eval"]:
            return
        collate = partial(inputs.collate, "eval", device=device)
        add_reference = partial(reference, "eval")
        count = len(inputs.examples["eval"])
        values, arrays = evaluate(engine, count, collate, add_reference, size=config.batch.microbatch, device=device)
        metrics.write(step, "eval", {"seconds": time.monotonic() - began, **values})
        metrics.evaluation(step, arrays, values)

    if state["step"] == 0:
        evaluation(0)
    engine.train()
    for step in range(state["step"] + 1, total_steps + 1):
        step_began = time.monotonic()
        learning_rate = engine.get_lr()[0]
        records: list[dict[str, Tensor]] = []
        tokens, norm = torch.zeros((), dtype=torch.int64, device=device), None
        for microstep in range(config.batch.accumulation):
            batch = inputs.collate("train", order.microbatch_rows(step - 1, microstep, rank), device)
            with distributed.naming_step(step):
                loss_value = engine(reference("train", batch))
            records.append({"loss": loss_value.detach(), **engine.module.metrics})
            tokens = tokens + batch["attention_mask"].sum()
            engine.backward(loss_value)
            norm = gradient_norm(engine)  # None before the last microbatch
            engine.step()  # the optimizer's, at the last microbatch; before it DeepSpeed only counts
        saves = save_every > 0 and step % save_every == 0 and step < total_steps
        if step % config.log_every == 0 or step in (1, total_steps) or saves:
            values = _gather_metrics(records, tokens, device)
            values["gradient_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
            values["learning_rate"] = learning_rate
            values["tokens_per_second"] = values.pop("tokens") / (time.monotonic() - step_began)
            _check_step(config, loss, step, values)  # before anything of it is kept
            metrics.write(step, "train", {"seconds": time.monotonic() - began, **values})
        metrics.advance()
        if step == total_steps or (config.eval_every and step % config.eval_every == 0):
            evaluation(step)
        if saves:
            state = {"seconds": time.monotonic() - began, "metrics_offset": metrics.offset(), "data": data_state}
            save_checkpoint(engine, run_dir / "checkpoints", step, state, config.keep_checkpoints)

    save_model(engine, config, inputs.tokenizer, run_dir / "model")
    metrics.close()
    engine.destroy()
    dist.barrier()


def _gather_metrics(records: list[dict[str, Tensor]], tokens: Tensor, device: torch.device) -> dict[str, float]:
    """Means over the microbatches of all processes, the tokens of all, and the largest memory."""
    own = [{name: float(value) for name, value in record.items()} for record in records]
    gathered = distributed.gather((own, int(tokens), peak_memory_bytes(device)))
    everyone = [record for records, _, _ in gathered for record in records]
    values = distributed.mean_by_name((record, 1.0) for record in everyone)
    # A mean by name leaves NaN out (a class that a microbatch does not hold), but the loss must not hide one.
    values["loss"] = sum(record["loss"] for record in everyone) / len(everyone)
    values["tokens"] = sum(tokens for _, tokens, _ in gathered)
    values["peak_memory_bytes"] = max(memory for _, _, memory in gathered)
    return values


def _check_step(config: RunConfig, loss: PreferenceLoss, step: int, values: dict[str, float]) -> None:
    """Stop at a loss or gradient that is not finite; warn of a first loss that is not what it must be."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise FloatingPointError(
                f"step {step}: {name} is {values[name]}; lower optimizer.learning_rate, or look at the data of this "
                "step; the newest checkpoint is from before it"
            )
    value = values["loss"]
    if step == 1 and _starts_at_ln_2(config, loss):
        tolerance = 1e-3 if config.precision == "fp32" else 3e-2
        if abs(value - math.log(2)) > tolerance and distributed.is_first():
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
