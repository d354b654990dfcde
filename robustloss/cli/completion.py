"""`robustloss completion SHELL`: a script that completes commands, options and the keys of configs."""

from __future__ import annotations

import argparse

from robustloss.cli._errors import fail

DESCRIPTION = """\
Print a script that completes robustloss's commands, options and (in bash and zsh) the keys of `robustloss train`.

  bash   robustloss completion bash > ~/.local/share/bash-completion/completions/robustloss
  zsh    robustloss completion zsh > _robustloss      in a folder of $fpath
  tcsh   robustloss completion tcsh >> ~/.cshrc

It needs shtab: pip install shtab
"""
SHELLS = ("bash", "zsh", "tcsh")

# What an argument may be completed by: `argument.complete = FILE`, which argparse ignores and shtab reads.
FILE, DIRECTORY = "file", "directory"
TRAIN_KEYS = {"bash": "_robustloss_train_keys", "zsh": "_robustloss_train_keys"}

BASH = """\
_robustloss_train_keys() {{ compgen -W "{keys}" -- "$1"; }}
"""
# A key is followed by its value, not by a space.
BASH_AFTER = """\
_robustloss_complete() {
  _shtab_robustloss "$@"
  if [[ "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _robustloss_complete robustloss
"""
ZSH = """\
_robustloss_train_keys() {{ compadd -S '' -- {keys}; }}
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a shell's completion script",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        return fail("completion needs shtab, which is not installed: pip install shtab")
    from robustloss.cli import build_parser

    keys = " ".join(train_keys())
    preamble = {"bash": BASH.format(keys=keys), "zsh": ZSH.format(keys=keys), "tcsh": ""}[arguments.shell]
    script = shtab.complete(build_parser(), arguments.shell, preamble=preamble)
    print(script + (f"\n{BASH_AFTER}" if arguments.shell == "bash" else ""))
    return 0


def train_keys() -> list[str]:
    """Every key of a config with its "=", and the options of every loss; none where training is not installed."""
    from robustloss.losses import LOSSES
    from robustloss.losses.catalogue import options

    try:
        from robustloss.train.config import config_keys
    except ModuleNotFoundError:
        return []
    of_losses = {f"loss.{option.name}" for loss in LOSSES.values() for option in options(loss) if option.in_config}
    keys = {key for key in config_keys() if key != "loss"} | {"loss.name"} | of_losses
    return [f"{key}=" for key in sorted(keys)]
