"""`robustloss train [--config run.yaml] [key=value ...]`."""

from __future__ import annotations

import argparse
import errno
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from robustloss.cli._errors import fail, fail_missing
from robustloss.cli.completion import FILE, TRAIN_KEYS

if TYPE_CHECKING:
    from robustloss.train.config import RunConfig

DESCRIPTION = """\
Fine-tune a Hugging Face causal language model on preference data, with DeepSpeed.

  robustloss train                                        a small demonstration: data, model and all
  robustloss train loss.name=dpo                          the same with another loss
  robustloss train --config run.yaml                      your own run
  robustloss train --config run.yaml loss.tau=0.1 seed=1  with some keys overridden
  torchrun --nproc_per_node 8 -m robustloss train --config run.yaml
  deepspeed --module robustloss train --config run.yaml

A run.yaml that is complete:

  model: {name_or_path: Qwen/Qwen3-0.6B}         # a Hugging Face name or a local folder
  data: {train: pairs.jsonl}                     # prompt, chosen, rejected; or prompt, completion, label
  loss: {name: kldpo, beta: 0.1, tau: 0.5}       # or another: robustloss losses
  output_dir: runs/first

The same command goes on where a killed run stopped. At the end output_dir holds model/ and report.html.
SIGTERM ends a run after its step, with a checkpoint.

Exit codes: 0 finished, or stopped by SIGTERM; 2 a mistake in the settings or the data, or training that diverged;
3 another process was lost; 130 interrupted from the keyboard; 1 anything else, such as a full disk.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="fine-tune a model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = parser.add_argument(
        "--config", type=Path, help="a YAML file; without it, model and data: the demonstration"
    )
    config.complete = FILE
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    overrides = parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    overrides.complete = TRAIN_KEYS
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(format="robustloss: %(message)s", level=logging.WARNING)
    logging.getLogger("robustloss").setLevel(logging.INFO if _speaks() else logging.ERROR)
    try:
        return _train(arguments)
    finally:
        _leave_process_group()  # once nothing in a frame of the run holds on to it


def _train(arguments: argparse.Namespace) -> int:
    try:
        from robustloss.train.config import MACHINE_ERRORS, DiskError, InputError, load_config
        from robustloss.train.distributed import LostProcessError, raised_by_all, telling_lost_processes
        from robustloss.train.guard import TooManySkippedSteps
        from robustloss.train.loop import run
    except ModuleNotFoundError as error:
        return fail_missing("training", error, "train")

    try:
        with telling_lost_processes(), _telling_full_disks():
            demo = arguments.config is None and not _names_own_inputs(arguments.overrides)
            with raised_by_all():  # who are given the same command line
                config = (
                    _demo_config(arguments.overrides) if demo else load_config(arguments.config, arguments.overrides)
                )
            if demo:
                _prepare_demo(config)
            run(config)
    except DiskError as error:
        return fail(str(error), code=1) if _speaks(error) else 1
    except InputError as error:
        return fail(str(error)) if _speaks(error) else 2
    except TooManySkippedSteps as error:  # which every process finds
        return fail(str(error)) if _speaks() else 2
    except FloatingPointError as error:
        return fail(str(error))  # it may be one process's alone
    except LostProcessError as error:
        return fail(str(error), code=3)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        return fail(f"{error}; the same command goes on from the last checkpoint", code=1)
    except KeyboardInterrupt:
        print("robustloss: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _telling_full_disks() -> Iterator[None]:
    """The libraries that write weights tell of a full disk by errors of their own: make them OSErrors."""
    try:
        yield
    except Exception as error:
        message = str(error)
        if "PytorchStreamWriter failed" in message or "unexpected pos" in message:  # torch.save
            raise OSError(errno.ENOSPC, "a checkpoint could not be written (is the disk full?)") from error
        number = re.search(r"\(os error (\d+)\)", message)
        if type(error).__name__ == "SafetensorError" and number:
            raise OSError(int(number[1]), "the model could not be written: " + os.strerror(int(number[1]))) from error
        raise


def _leave_process_group() -> None:
    """The demonstration's processes meet before the run does, so it is not the run that parts them; and what an error
    held while the run ended, groups among it, goes before the process does."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from robustloss.train import distributed

        distributed.stop()
    for _ in range(2):  # an engine has a finaliser, and what a finaliser has seen goes at the second time
        gc.collect()


def _speaks(error: Exception | None = None) -> bool:
    """Whether this process tells an error: one of each host does where all raise it, and everyone its own."""
    first_of_host = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if first_of_host or error is None:
        return first_of_host
    from robustloss.train.distributed import is_raised_by_all

    return not is_raised_by_all(error)


def _names_own_inputs(overrides: Sequence[str]) -> bool:
    return any(override.startswith(("model.name_or_path=", "data.train=")) for override in overrides)


def _demo_config(overrides: Sequence[str]) -> RunConfig:
    from robustloss.train.config import load_config, read_overrides
    from robustloss.train.demo import demo_settings

    output_dir = str(read_overrides(overrides).get("output_dir", "runs/demo"))
    return load_config(None, overrides, base={**demo_settings(Path(output_dir)), "output_dir": output_dir})


def _prepare_demo(config: RunConfig) -> None:
    """The demonstration's data and model are made by the first process while the others wait."""
    from robustloss.train import distributed
    from robustloss.train.config import input_errors
    from robustloss.train.demo import prepare_demo
    from robustloss.train.output_dir import prepare_folder

    distributed.prepare_libraries()
    run_dir = Path(config.output_dir)

    def prepare() -> None:
        with input_errors(), prepare_folder(run_dir):  # two that begin at once must not write the same files
            prepare_demo(run_dir, config.seed)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.start()
        distributed.on_first(prepare)
    else:
        prepare()
