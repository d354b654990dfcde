"""The command line: `robustloss train [--config run.yaml] [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustloss._version import __version__

if TYPE_CHECKING:
    from robustloss.train.config import RunConfig

DESCRIPTION = "Fine-tune causal language models with distributional preference losses."
TRAIN = """\
Fine-tune a Hugging Face causal language model on preference data, with DeepSpeed.

  robustloss train                                        a small demonstration: data, model and all
  robustloss train loss.name=dpo                          the same with another loss
  robustloss train --config run.yaml                      your own run
  robustloss train --config run.yaml loss.tau=0.1 seed=1  with some keys overridden
  torchrun --nproc_per_node 8 -m robustloss.train.cli train --config run.yaml
  deepspeed --module robustloss.train.cli train --config run.yaml

A run.yaml that is complete:

  model: {name_or_path: Qwen/Qwen3-0.6B}         # a Hugging Face name or a local folder
  data: {train: pairs.jsonl}                     # prompt, chosen, rejected; or prompt, completion, label
  loss: {name: kldpo, beta: 0.1, tau: 0.5}       # or dpo, wdpo, aot_paired, aot_unpaired, kto
  output_dir: runs/first

The same command goes on where a killed run stopped. At the end output_dir holds model/ and report.html.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for a mistake in the input, told in one line."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="robustloss: %(message)s", level=logging.WARNING)
    logging.getLogger("robustloss").setLevel(logging.INFO if _speaks() else logging.ERROR)
    # The loop, torch and transformers take seconds to import; --help should not wait for them.
    from robustloss.train.config import InputError, load_config
    from robustloss.train.loop import run

    try:
        if arguments.config is None and not _names_own_inputs(arguments.overrides):
            config = _demo(arguments.overrides)
        else:
            config = load_config(arguments.config, arguments.overrides)
        run(config)
    except (InputError, FloatingPointError) as error:
        # Every process finds the same mistake; one of each host tells it.
        if _speaks():
            print(f"robustloss: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="robustloss", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"robustloss {__version__}")
    # `deepspeed` puts it before the arguments; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="train")
    train = commands.add_parser(
        "train",
        help="fine-tune a model (robustloss train --help)",
        description=TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--config", type=Path, help="a YAML file; without it, model and data: the demonstration")
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    return parser


def _speaks() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _names_own_inputs(overrides: Sequence[str]) -> bool:
    return any(override.startswith(("model.", "data.")) for override in overrides)


def _demo(overrides: Sequence[str]) -> RunConfig:
    """The demonstration's settings; its data and model are made by the first process while the others wait."""
    from robustloss.train import distributed
    from robustloss.train.config import InputError, input_errors, load_config, read_overrides
    from robustloss.train.demo import prepare_demo

    distributed.prepare_libraries()
    given = read_overrides(overrides)
    output_dir, seed = Path(str(given.get("output_dir", "runs/demo"))), given.get("seed", 0)
    if not isinstance(seed, int):
        raise InputError(f"config key 'seed': {seed!r} is no integer")

    def prepare() -> dict[str, Any]:
        with input_errors():
            return prepare_demo(output_dir, seed)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.start()
        distributed.on_first(prepare)
    base = prepare()
    return load_config(None, overrides, base={**base, "output_dir": str(output_dir)})


if __name__ == "__main__":
    sys.exit(main())
