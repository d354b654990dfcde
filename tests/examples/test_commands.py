"""Every example is in the README's table, and every command that a docstring or the README names is one it takes."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from importlib.util import find_spec

import pytest
from example_settings import EXAMPLES

# Those that run by themselves; the others are plugged into another framework's command.
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "\nimport tiny\n" in path.read_text())
NEEDS = {
    "accelerate_fsdp2": "accelerate",
    "deepspeed_loop": "deepspeed",
    "lightning_module": "lightning",
    "lora_long_vocabulary": "peft",
    "quantiles": "matplotlib",
    "transformers_trainer": "transformers",
    "trl_dpo": "trl",
    "trl_kto": "trl",
}


class ParsedError(Exception):
    """What an example is stopped with, once it has its arguments."""


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every command of examples/*.py in the text."""
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"(?:python|torchrun|accelerate launch)[^\n`|]*examples/(\w+)\.py([^\n`|#]*)", text)
    return [(script, shlex.split(arguments)) for script, arguments in found if script in SCRIPTS]


def all_commands() -> list[tuple[str, list[str]]]:
    texts = [(EXAMPLES / f"{script}.py").read_text() for script in SCRIPTS]
    return [command for text in [*texts, (EXAMPLES / "README.md").read_text()] for command in commands(text)]


@pytest.mark.parametrize(("script", "arguments"), all_commands(), ids=str)
def test_the_example_takes_the_arguments_that_its_text_names(script, arguments, monkeypatch):
    if script in NEEDS and find_spec(NEEDS[script]) is None:
        pytest.skip(f"pip install {NEEDS[script]}")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *given):
        parse(parser, *given)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(ParsedError):
        import_module(script).main(arguments)


def test_every_example_has_a_command_in_its_docstring_and_in_the_readme():
    for script in SCRIPTS:
        assert script in dict(commands((EXAMPLES / f"{script}.py").read_text()))
    assert set(SCRIPTS) <= set(dict(commands((EXAMPLES / "README.md").read_text())))
