"""Every code block of README.md and of docs/ does what its page says.

Python runs, one namespace a page (hidden set-up stands in HTML comments), and a `text` block right behind it is what it
prints. The YAML of a run goes through `load_config`. Of a shell command the arguments are parsed by the program's own
parser, because to run it would install, train or need GPUs. What no test runs is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import functools
import importlib
import io
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml

pytest.importorskip("sybil", reason="code blocks are found by sybil: pip install sybil")

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
LANGUAGES = {"python", "yaml", "bash", "text"}

# page -> the reasons of its skipped Python blocks, in their order.
NOT_RUN: dict[str, list[str]] = {
    "docs/guide/integrations.md": [
        "OpenRLHF reads its command line and wants GPUs",  # tests/integrations/test_openrlhf.py
        "LLaMA-Factory reads its command line",  # tests/integrations/test_llamafactory.py
    ],
}
# The first line of a YAML block that is no run's names the file of another tool, whose own schema is not at hand.
OTHER_FILES = re.compile(r"# (?!run\.yaml|part of run\.yaml)\S+\.(yaml|json)\b")
# What a run needs and a part of one leaves out.
BASE = {"model": {"name_or_path": "model"}, "data": {"train": "pairs.jsonl"}, "loss": {"name": "dpo"}}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def place(example) -> str:
    return f"{name_of(Path(example.path))}, line {example.line}"


# ---- Python -------------------------------------------------------------------------------------------------------


class Python(PythonCodeBlockParser):
    """Runs a block and keeps what it prints for the `text` block behind it; blocks that begin with >>> are doctests."""

    def __init__(self):
        super().__init__(doctest_optionflags=doctest.ELLIPSIS)
        self.codeblock_parser = CodeBlockParser("python", self.run)

    def run(self, example) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            PythonEvaluator()(example)
        example.document.printed = example.end, printed.getvalue()


def check_output(example) -> None:
    end, printed = getattr(example.document, "printed", (0, ""))
    if example.document.text[end : example.start].strip():
        return  # not right behind a block of Python: prose
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(example.parsed.strip() + "\n", printed.strip() + "\n", flags)
    assert same, f"{place(example)}: the block before prints\n{printed}\nand not\n{example.parsed}"


# ---- YAML ---------------------------------------------------------------------------------------------------------


def check_yaml(example) -> None:
    content = yaml.safe_load(example.parsed)
    if OTHER_FILES.match(example.parsed):
        assert content, f"{place(example)}: empty"
        return
    if example.parsed.startswith("# run.yaml"):
        example.document.run = content
    from robustloss.train.config import load_config

    path = Path("run.yaml").resolve()
    path.write_text(example.parsed, encoding="utf-8")
    try:
        load_config(path, base={key: value for key, value in BASE.items() if key not in content})
    except ValueError as error:
        pytest.fail(f"{place(example)}: {error}", pytrace=False)


# ---- the shell ----------------------------------------------------------------------------------------------------


def check_commands(example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment
            words.pop(0)
        if words:
            with contextlib.redirect_stderr(io.StringIO()) as told:
                try:
                    check_command(words, getattr(example.document, "run", BASE))
                except (SystemExit, ValueError, AssertionError, KeyError) as error:
                    pytest.fail(f"{place(example)}: {line.strip()}\n{error!r} {told.getvalue()}", pytrace=False)


def check_command(words: list[str], run: dict) -> None:
    """`run` is the page's run.yaml, which overrides on a command line belong to."""
    program, *arguments = words
    assert program in PROGRAMS, f"no parser for {program}: write one in tests/docs/test_code_blocks.py"
    PROGRAMS[program](arguments, run)


def robustloss_command(arguments: list[str], run: dict) -> None:
    from robustloss.cli import build_parser

    parsed = build_parser().parse_args(arguments)
    if getattr(parsed, "op", None):
        check_suite(parsed.op)
    overrides = getattr(parsed, "overrides", None)
    if overrides:
        from robustloss.train.config import load_config

        load_config(None, overrides, base=run if parsed.config else {**BASE, "loss": {"name": "kldpo", "tau": 1.0}})


def torchrun(arguments: list[str], run: dict) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    script(parsed.training_script, parsed.module, parsed.training_script_args, run)


def deepspeed(arguments: list[str], run: dict) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner", reason='pip install "robustloss[train]"')
    parsed = runner.parse_args(arguments)
    script(parsed.user_script, parsed.module, parsed.user_args, run)


def accelerate(arguments: list[str], run: dict) -> None:
    launch = pytest.importorskip("accelerate.commands.launch", reason='pip install "robustloss[train]"')
    assert arguments.pop(0) == "launch"
    parsed = launch.launch_command_parser().parse_args(arguments)
    script(parsed.training_script, parsed.module, parsed.training_script_args, run)


def script(name: str, is_module: bool, arguments: list[str], run: dict) -> None:
    """What a launcher starts: a module of the package, a script of examples/, or one of the reader's own."""
    if is_module:
        python(["-m", name, *arguments], run)
    elif name.startswith("examples/"):
        assert (ROOT / name).is_file(), f"{name} does not exist"
        if "\nimport tiny\n" in (ROOT / name).read_text(encoding="utf-8"):  # the others are another command's front
            example(Path(name).stem, arguments)


class ParsedError(Exception):
    """What an example is stopped with, once it has its arguments."""


def example(name: str, arguments: list[str]) -> None:
    """Its own parser reads the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, given):
        parse(parser, given)
        raise ParsedError

    with mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as missing:
            pytest.skip(f"examples/{name}.py needs {missing.name}")
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop), pytest.raises(ParsedError):
        module.main(arguments)


def python(arguments: list[str], run: dict) -> None:
    if arguments[0] == "-m":
        _, module, *rest = arguments
        assert module.split(".")[0] in ("robustloss", "bench", "pytest", "pip", "build"), module
        if module == "robustloss":
            robustloss_command(rest, run)
        elif module == "pytest":
            pytest_command(rest, run)
        elif module == "pip":
            pip(rest, run)
        elif module.startswith(("bench.", "robustloss.")):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"{module} does not exist"
    else:
        script(arguments[0], False, arguments[1:], run)


def pytest_command(arguments: list[str], run: dict) -> None:
    """Of pytest's own options those that a page has needed; and those that bench/ adds."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("-q", action="store_true")
    if "bench" in arguments:
        from bench.conftest import pytest_addoption

        group = SimpleNamespace(addoption=parser.add_argument)
        pytest_addoption(SimpleNamespace(getgroup=lambda name: group))
    parsed = parser.parse_args(arguments)
    for path in parsed.paths:
        assert (ROOT / path).exists(), f"{path} does not exist"
    if getattr(parsed, "op", None):
        check_suite(parsed.op)


def check_suite(op: str) -> None:
    assert (ROOT / "bench" / f"{op}.py").is_file(), f"{op} is no suite of bench/"


def pip(arguments: list[str], run: dict) -> None:
    from packaging.requirements import Requirement

    assert arguments.pop(0) == "install"
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        if argument.startswith("-"):
            continue
        own = argument.startswith(".")
        wanted = Requirement(argument.replace(".", project["name"], 1) if own else argument)
        if wanted.name == project["name"]:
            missing = wanted.extras - set(project["optional-dependencies"])
            assert not missing, f"pyproject.toml has no extra {missing}"


def make(arguments: list[str], run: dict) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for argument in arguments:
        assert "=" in argument or argument in targets, f"the Makefile has no target {argument}"


def shell_builtin(arguments: list[str], run: dict) -> None:
    """cd, export, source: nothing that a test could check."""


PROGRAMS = {
    "robustloss": robustloss_command,
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "accelerate": accelerate,
    "python": python,
    "pip": pip,
    "make": make,
    "cd": shell_builtin,
    "export": shell_builtin,
    "source": shell_builtin,
}


# ---- the tests ----------------------------------------------------------------------------------------------------


@functools.cache
def sybil() -> Sybil:
    return Sybil(
        parsers=[
            Python(),
            CodeBlockParser("yaml", check_yaml),
            CodeBlockParser("bash", check_commands),
            CodeBlockParser("text", check_output),
            SkipParser(),
        ]
    )


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """In an empty folder, on one thread, with no window and no network."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_of_a_page(page, as_a_reader):
    reasons = []
    for example in sybil().parse(page).examples():
        try:
            example.evaluate()
        except pytest.skip.Exception:
            raise
        except Exception as skipped:
            if type(skipped).__name__ != "SkipTest":
                raise
            reasons.append(str(skipped))
    assert reasons == NOT_RUN.get(name_of(page), [])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_code_block_names_its_language(page):
    document = sybil().parse(page)
    for region in RawFencedCodeBlockLexer(re.compile(r"(?P<info>[^\n]*)$\n", re.MULTILINE))(document):
        info = region.lexemes["info"].strip()
        line = document.text.count("\n", 0, region.start) + 1
        assert info in LANGUAGES or info.startswith("{"), f"{name_of(page)}, line {line}: a block in {info!r}"


@pytest.mark.parametrize(
    "command",
    [
        "robustloss train --no-such-option",
        "robustloss bench --op no_such_suite",
        "python -m pytest bench --no-such-option",
        "python -m pytest bench --op no_such_suite",
        "python -m pytest no_such_folder",
        "python examples/plain_pytorch.py --no-such-option",
        "torchrun --nproc_per_node 2 examples/plain_pytorch.py --steps many",
        "make no-such-target",
        "no-such-program",
    ],
)
def test_a_command_that_is_wrong_is_found(command):
    with pytest.raises((SystemExit, AssertionError)), contextlib.redirect_stderr(io.StringIO()):
        check_command(shlex.split(command), BASE)
