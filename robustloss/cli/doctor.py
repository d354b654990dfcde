"""`robustloss doctor`: what is installed, what serves each operation on this machine, and what to do about it."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import operator
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from robustloss._install import REBUILD, pip_install

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

OK, NOTE, BROKEN = "ok", "note", "broken"
DESCRIPTION = f"""\
What is installed and in which versions, what serves each operation on this machine (C++, Triton or plain PyTorch) and
why, and, for all that is amiss, a line that mends it. Every operation is tried out against its plain definition.

  {OK}      as it should be
  {NOTE}    works, but slower than it could, or is not installed
  {BROKEN}  does not work, gives wrong numbers, or is not of a version that robustloss supports

Exit codes: 0 nothing is broken; 1 something is.
"""
# Of the packages, those whose import says whether they go with each other; the others are theirs.
IMPORTED = ("transformers", "deepspeed", "datasets", "peft", "accelerate", "trl")
TRITONS = ("triton", "pytorch-triton")  # as torch's builds call the package
NOT_SHOWN = ("dev", "docs")  # extras that are for working on robustloss itself
# The ops whose C++ is compiled once per instruction set and chosen at run time (csrc/*_kernel.cpp).
PER_INSTRUCTION_SET = ("token_logps", "token_logratios", "preference_loss", "sinkhorn_sort")


class Finding(NamedTuple):
    level: str
    subject: str
    words: str
    fix: str = ""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check what is installed and what serves each operation",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "installation": _installation,
        "devices": _devices,
        "operations": _operations,
        "attention": _attention,
        "packages": _packages,
    }
    findings = []
    for title, find in sections.items():
        print(f"{title}:")
        for finding in find():
            findings.append(finding)
            print(f"  {finding.level:<7} {finding.subject:<19} {finding.words}")
            if finding.fix:
                print(f"          {'':<19} -> {finding.fix}")
        print(flush=True)
    broken = [finding.subject for finding in findings if finding.level == BROKEN]
    print(f"broken: {', '.join(broken)}" if broken else "Nothing is broken.")
    return 1 if broken else 0


# ---- robustloss itself ----------------------------------------------------------------------------------------------


def _installation() -> Iterator[Finding]:
    import torch

    import robustloss

    yield Finding(OK, "robustloss", f"{robustloss.__version__}, {Path(robustloss.__file__).parent}")
    yield Finding(OK, "Python", f"{platform.python_version()}, {sys.executable}")
    yield Finding(OK, "torch", f"{torch.__version__}, {_build_of_torch()}")
    yield _extension()


def _build_of_torch() -> str:
    import torch

    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"


def _extension() -> Finding:
    """The C++ half: whether it loads, which torch it was built against and which instruction set it takes."""
    import torch

    from robustloss.ops._library import EXTENSION_MISSING

    subject = "C++ extension"
    if EXTENSION_MISSING is None:
        extension: Any = importlib.import_module("robustloss._C")
        built, running = getattr(extension, "torch_version", None), torch.__version__.split("+")[0]
        if built is None:
            return Finding(BROKEN, subject, "of an older robustloss, which does not go with this one", REBUILD)
        if built != running:
            return Finding(BROKEN, subject, f"built against {built}, and torch {running} runs it", REBUILD)
        asked = os.environ.get("ATEN_CPU_CAPABILITY")
        why = f", as ATEN_CPU_CAPABILITY={asked} asks" if asked else ", the best that this processor has"
        return Finding(OK, subject, f"built against this torch; takes {extension.instruction_set}{why}")
    consequence = "CPU tensors take plain PyTorch: the same numbers, several times slower, and more memory"
    if importlib.util.find_spec("robustloss._C") is not None:
        return Finding(BROKEN, subject, f"{' '.join(EXTENSION_MISSING.split())}; {consequence}", REBUILD)
    compiler = os.environ.get("CXX", "g++").split()[-1]
    first = "" if shutil.which(compiler) else f"install a C++ compiler ({compiler} is not there), then "
    return Finding(NOTE, subject, f"not built; {consequence}", first + REBUILD)


# ---- devices --------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(OK, "CPU", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {capability}")
    if not torch.cuda.is_available():
        yield _absent_gpu()
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        target = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        target = target or f"sm_{properties.major}{properties.minor}"
        yield Finding(OK, f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {target}")
    yield _triton()


def _absent_gpu() -> Finding:
    import torch

    there = [name for name, file in (("NVIDIA", "/dev/nvidiactl"), ("AMD", "/dev/kfd")) if os.path.exists(file)]
    if not there:
        return Finding(OK, "GPU", "none on this machine, so CPU tensors are all there is")
    if not (torch.version.cuda or torch.version.hip):
        fix = f"install torch for the GPU (https://pytorch.org/get-started), then {REBUILD}"
        return Finding(BROKEN, "GPU", f"there is an {there[0]} driver, but torch is built for CPUs only", fix)
    fix = "nvidia-smi tells more" if torch.version.cuda else "rocminfo tells more"
    return Finding(BROKEN, "GPU", f"there is an {there[0]} driver, but torch finds no GPU", fix)


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding(BROKEN, "Triton", "not installed, and GPU tensors need it", pip_install(_pinned_triton()))
    if os.environ.get("TRITON_INTERPRET") == "1":
        words = "TRITON_INTERPRET=1 runs every kernel in Python, thousands of times slower"
        return Finding(BROKEN, "Triton", words, "unset TRITON_INTERPRET")
    found = [f"{name} {_version(name)}" for name in TRITONS if _version(name)]
    return Finding(OK, "Triton", f"{', '.join(found) or 'installed'}; whether its kernels run is tried below")


def _pinned_triton() -> str:
    """The release that goes with the installed torch, which names it."""
    pins = (text.split(";")[0].strip() for text in _requirements("torch"))
    return next((pin for pin in pins if pin.startswith(TRITONS)), "triton")


# ---- operations -----------------------------------------------------------------------------------------------------


def _operations() -> Iterator[Finding]:
    """Of each op, what the dispatcher calls on each device, and whether that gives what the definition does."""
    import torch

    from robustloss.cli.trials import TRIALS
    from robustloss.ops._library import serving

    keys = {"cpu": "CPU"} | ({"cuda": "CUDA"} if torch.cuda.is_available() else {})
    for op, trial in TRIALS.items():
        served = {device: serving(op, key) for device, key in keys.items()}
        words = ", ".join(f"{keys[device]}: {_path(op, served[device], keys[device])}" for device in keys)
        problems = {device: problem for device in keys if (problem := _problem(trial, device))}
        if problems:
            fix = REBUILD if "cpu" in problems else pip_install("--force-reinstall", _pinned_triton())
            told = ", ".join(f"on {device} it {problem}" for device, problem in problems.items())
            yield Finding(BROKEN, op, f"{words}; {told}", fix)
        else:
            yield Finding(NOTE if "naive" in served.values() else OK, op, words)


def _path(op: str, served: str | None, key: str) -> str:
    from robustloss.ops._library import serving

    if op == "linear_token_logps":  # its tiles of logits go through another op
        return f"matrix products, then {_path('token_logps', serving('token_logps', key), key)}"
    if served == "C++" and op in PER_INSTRUCTION_SET:
        return f"C++ {getattr(importlib.import_module('robustloss._C'), 'instruction_set', '')}".strip()
    return {"naive": "plain PyTorch, as there is no C++ extension", None: "nothing"}.get(served, str(served))


def _problem(trial: Callable[[str], tuple[torch.Tensor, torch.Tensor]], device: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the slow path, which is told
            found, wanted = trial(device)
        error = float((found.detach().double().cpu() - wanted.double().cpu()).abs().max())
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        return f"fails: {_one_line(error)}"
    return "" if error < 1e-3 else f"is {error:.3g} off its definition"


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention() -> Iterator[Finding]:
    """Which implementations a model can be loaded with here; exact WDPO asks for a second derivative."""
    import torch
    from torch import nn

    from robustloss.penalty import check_double_backward

    available = {"eager": (OK, "plain PyTorch, everywhere"), "sdpa": (OK, "torch's own, everywhere")}
    with _silence():
        try:
            from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_flex_attn_available

            flash, flex = is_flash_attn_2_available(), is_torch_flex_attn_available()
        except ImportError:
            flash = flex = None
    if flash is not None:
        missing = "flash-attn is not installed" if _version("flash-attn") is None else "does not run here"
        missing += "" if torch.cuda.is_available() else ", and needs a GPU"
        available["flash_attention_2"] = (OK, "available") if flash else (NOTE, missing)
        available["flex_attention"] = (OK, "available") if flex else (NOTE, "not in this torch")
    for name, (level, words) in available.items():
        model: Any = nn.Module()
        model.config = SimpleNamespace(_attn_implementation=name)
        try:
            check_double_backward(model)
            yield Finding(level, name, f"{words}; has a second derivative, so exact WDPO takes it")
        except ValueError as error:
            reason = str(error).partition(": ")[0]  # and the remedy, which is one for exact WDPO alone
            yield Finding(level, name, f"{words}; {reason}{', unlike its math kernel' if name == 'sdpa' else ''}")


# ---- packages -------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """What robustloss's own metadata asks for: is it there, of a version in the range, and does it import."""
    requirements = _requirements("robustloss")
    if not requirements:
        words = "not installed (run from a source tree?), so the versions it needs are unknown"
        yield Finding(NOTE, "robustloss", words, "in the checkout: pip install --no-build-isolation -e .")
        return
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Finding(NOTE, "packaging", "not installed, so versions are not compared", pip_install("packaging"))
        return
    extras = importlib.metadata.metadata("robustloss").get_all("Provides-Extra") or []
    wanted: dict[str, dict[str, tuple[Requirement, list[str]]]] = {}  # by name, then by range, the extras that ask
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        of_extra = marker is not None and "extra" in str(marker)
        for extra in (extra for extra in extras if extra not in NOT_SHOWN) if of_extra else [""]:
            if marker is None or marker.evaluate({"extra": extra}):
                ranges = wanted.setdefault(requirement.name, {})
                _, of = ranges.setdefault(str(requirement.specifier), (requirement, []))
                of += [extra] if extra else []
    for name, ranges in wanted.items():
        yield _package(name, [*ranges.values()], _import_problem(name) if name in IMPORTED and _version(name) else "")


def _package(name: str, ranges: list[tuple[Requirement, list[str]]], import_problem: str) -> Finding:
    """One package, with what robustloss and its extras ask of it."""
    asking = {
        f"{name}{requirement.specifier}": f"robustloss[{','.join(extras)}]" if extras else "robustloss"
        for requirement, extras in ranges
    }
    found, extras = _version(name), ranges[0][1]
    specifiers = [requirement.specifier for requirement, _ in ranges]
    everything = pip_install(f"{name}{functools.reduce(operator.and_, specifiers)}", extra=extras[0] if extras else "")
    if found is None:
        asked = " and ".join(asking.values())
        verb = "needs" if len(asking) == 1 else "need"
        return Finding(NOTE if extras else BROKEN, name, f"not installed; {asked} {verb} it", everything)
    for specifier, (spelled, by) in zip(specifiers, asking.items(), strict=True):
        if not specifier.contains(found, prereleases=True):
            return Finding(BROKEN, name, f"{found}, but {by} needs {spelled}", everything)
    if import_problem:
        words = f"{found} is in the range, but its import fails: {import_problem}"
        return Finding(BROKEN, name, words, pip_install("--upgrade", name))
    return Finding(OK, name, f"{found} ({'; '.join(f'{spelled}, of {by}' for spelled, by in asking.items())})")


def _import_problem(name: str) -> str:
    with _silence():
        try:
            importlib.import_module(name)
        except Exception as error:  # an import runs anything
            return _one_line(error)
    return ""


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps what libraries print at their import from between the findings."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _requirements(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
