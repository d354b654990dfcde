"""`robustloss completion SHELL`: a script that completes commands, options and the keys of configs."""

from __future__ import annotations

import argparse

from robustloss.cli._errors import fail

DESCRIPTION = """\
Print a script that completes robustloss's commands and options, and in bash and zsh also losses, the suites of
`robustloss bench`, and the keys of `robustloss train`.

  bash   robustloss completion bash > ~/.local/share/bash-completion/completions/robustloss
  zsh    robustloss completion zsh > _robustloss      in a folder of $fpath
  tcsh   robustloss completion tcsh >> ~/.cshrc

It needs shtab: pip install shtab
"""
SHELLS = ("bash", "zsh", "tcsh")

# What an argument may be completed by: `argument.complete = FILE`, which argparse ignores and shtab reads.
FILE, DIRECTORY = "file", "directory"
TRAIN_KEYS, LOSS_NAMES, SUITES = (
    dict.fromkeys(("bash", "zsh"), f"_robustloss_{what}") for what in ("train_keys", "losses", "suites")
)

BASH = """\
_robustloss_losses() {{ compgen -W "{losses}" -- "$1"; }}
_robustloss_suites() {{ compgen -W "{suites}" -- "$1"; }}
_robustloss_train_keys() {{
  if [[ "$1" == loss.name=* ]]; then compgen -P loss.name= -W "{losses}" -- "${{1#*=}}"; return; fi
  compgen -W "{keys}" -- "$1"
}}
"""
# A key is followed by its value, not by a space. "=" is a word of its own unless COMP_WORDBREAKS says otherwise.
BASH_AFTER = """\
_robustloss_complete() {
  if [[ "${COMP_WORDS[*]:0:COMP_CWORD+1}" =~ \\ loss\\.name\\ =(\\ ([^ ]*))?$ ]]; then
    COMPREPLY=($(_robustloss_losses "${BASH_REMATCH[2]}"))
    return
  fi
  _shtab_robustloss "$@"
  if [[ "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _robustloss_complete robustloss
"""
ZSH = """\
_robustloss_losses() {{ compadd -- {losses}; }}
_robustloss_suites() {{ compadd -- {suites}; }}
_robustloss_train_keys() {{
  if compset -P 'loss.name='; then compadd -- {losses}; else compadd -S '' -- {keys}; fi
}}
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
    from robustloss.cli.bench import find_suites, suite_names
    from robustloss.losses import LOSSES

    suites = find_suites()
    words = {"keys": train_keys(), "losses": LOSSES, "suites": suite_names(suites) if suites else []}
    preamble = {"bash": BASH, "zsh": ZSH, "tcsh": ""}[arguments.shell]
    preamble = preamble.format(**{kind: " ".join(known) for kind, known in words.items()})
    script = shtab.complete(build_parser(), arguments.shell, preamble=preamble)
    print(script + (f"\n{BASH_AFTER}" if arguments.shell == "bash" else ""))
    return 0


def train_keys() -> list[str]:
    """Every key of a config with its "=", and the options of every loss; none where training is not installed."""
    from robustloss.losses.catalogue import option_names

    try:
        from robustloss.train.config import config_keys
    except ModuleNotFoundError:
        return []
    keys = {key for key in config_keys() if key != "loss"} | {f"loss.{name}" for name in ("name", *option_names())}
    return [f"{key}=" for key in sorted(keys)]
