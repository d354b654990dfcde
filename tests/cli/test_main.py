"""The command line's front: its commands, their help, and that asking for help waits for nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import robustloss
from robustloss.cli import COMMANDS, build_parser, losses, main

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]
# What takes seconds to import, or is installed by an extra.
HEAVY = ("transformers", "deepspeed", "datasets", "peft", "trl", "matplotlib", "jinja2", "omegaconf", "shtab", "pytest")


def help_of(*arguments: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_each_command_shows_how_it_is_called(capsys):
    overview = help_of(capsys=capsys)
    for name in NAMES:
        assert name in overview
        assert f"robustloss {name}" in help_of(name, capsys=capsys)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"robustloss {robustloss.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND (see robustloss --help)"),
        (["nonsense"], "(see robustloss --help)"),
        (["--nonsense", "train"], "unrecognized arguments: --nonsense (see robustloss --help)"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense (see robustloss train --help)"),
        (["bench", "more"], "unrecognized arguments: more (see robustloss bench --help)"),
        (["bench", "--seconds", "x"], "(see robustloss bench --help)"),
        (["completion", "nonsense"], "(see robustloss completion --help)"),
        (["report"], "required: RUN (see robustloss report --help)"),
    ],
)
def test_a_command_line_that_is_none_is_told_in_one_line_with_code_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("robustloss: error: ")
    assert line.endswith(told)


def test_the_overview_names_every_exit_code_that_a_command_names(capsys):
    def codes(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w.])\d+(?= )", text.split("xit code")[1]))

    overview = codes(help_of(capsys=capsys))
    assert overview >= {"0", "1", "2", "3", "75", "130"}
    for name in ("train", "bench", "doctor"):
        assert codes(help_of(name, capsys=capsys)) <= overview, name


def test_launchers_may_put_the_local_rank_before_or_behind_the_command():
    for arguments in (["--local_rank=3", "train"], ["train", "--local-rank", "3"]):
        assert build_parser().parse_args([*arguments, "seed=1"]).overrides == ["seed=1"]


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as out:

        def closed():
            raise BrokenPipeError

        monkeypatch.setattr(losses, "_list", closed)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["losses"]) == 1


def test_no_remedy_asks_an_index_for_robustloss_which_is_on_none():
    for file in Path(robustloss.__file__).parent.rglob("*.py"):
        for command in re.findall(r"pip install.*", file.read_text()):
            assert "robustloss" not in command, f"{file}: {command}"


def test_help_and_losses_import_nothing_that_takes_seconds():
    program = f"""
import sys
from robustloss.cli import main
for arguments in (["losses"], ["losses", "kldpo"], ["--help"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print([name for name in {HEAVY} if name in sys.modules])
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"
