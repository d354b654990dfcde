"""`robustloss doctor`: what it tells is what the library does, and each thing that is amiss comes with its remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robustloss.cli import doctor, trials
from robustloss.cli.doctor import BROKEN, NOTE, OK
from robustloss.ops import _library

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the C++ extension was not built")


@pytest.fixture(autouse=True)
def unimported(monkeypatch):
    """The frameworks import each other for many seconds; whether they can is tried in one test, on one of them."""
    monkeypatch.setattr(doctor, "IMPORTED", ())


def by_subject(findings) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in findings}


def test_on_this_machine_every_op_is_told_by_what_serves_it(robustloss):
    code, out, _ = robustloss("doctor")
    served = {op: _library.serving(op, "CPU") for op in trials.TRIALS}
    for op, by in served.items():
        (line,) = [line for line in out.splitlines() if re.match(rf" +\w+ +{op} ", line)]
        if op == "linear_token_logps":
            assert "matrix products, then" in line
        else:
            assert {"C++": "CPU: C++", "naive": "plain PyTorch", "PyTorch": "PyTorch"}[str(by)] in line
    for subject in ("C++ extension", "torch", "eager", "sdpa"):
        assert subject in out
    assert code == (1 if " broken " in out else 0)
    assert out.rstrip().splitlines()[-1].startswith("broken: " if code else "Nothing is broken.")


@pytest.mark.parametrize("op", trials.TRIALS)
def test_every_op_is_tried_against_its_definition(op):
    found, wanted = trials.TRIALS[op]("cpu")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_the_ops_are_triton_s_and_right():
    findings = by_subject(doctor._operations())
    for op in trials.TRIALS:
        assert findings[op].level == OK, findings[op]
        assert "CUDA: " in findings[op].words
    assert "CUDA: Triton" in findings["token_logps"].words


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the sources")
def test_the_ops_with_code_per_instruction_set_are_those_of_the_sources():
    chosen = {"row_kernels", "ROBUSTLOSS_BEST"}
    for op in trials.TRIALS:
        source = ROOT / "csrc" / f"{op.replace('soft_rank', 'soft_sort')}.cpp"
        chooses = source.is_file() and any(word in source.read_text() for word in chosen)
        assert chooses == (op in doctor.PER_INSTRUCTION_SET), op


@needs_extension
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with AVX-512")
def test_the_instruction_set_is_the_one_that_the_kernels_take():
    program = "from robustloss.cli.doctor import _extension, _path; "
    program += "print(_extension().words); print(_path('token_logps', 'C++', 'CPU'))"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    told, path = finished.stdout.splitlines()
    assert told == "built against this torch; takes AVX2, as ATEN_CPU_CAPABILITY=avx2 asks"
    assert path == "C++ AVX2"


@needs_extension
def test_an_extension_of_another_torch_is_broken(monkeypatch, robustloss):
    extension = sys.modules["robustloss._C"]
    assert doctor._extension().level == OK
    with monkeypatch.context() as patch:
        patch.delattr(extension, "torch_version")
        assert doctor._extension() == (BROKEN, "C++ extension", doctor._extension().words, doctor.REBUILD)
        assert "of an older robustloss" in doctor._extension().words
    monkeypatch.setattr(extension, "torch_version", "1.2.3")
    assert doctor._extension().level == BROKEN
    assert "built against 1.2.3" in doctor._extension().words
    code, out, _ = robustloss("doctor")
    assert code == 1
    assert "broken: C++ extension" in out
    assert f"-> {doctor.REBUILD}" in out


@pytest.mark.parametrize("is_there", [False, True])
def test_without_the_extension_it_says_what_that_means_and_how_to_build_it(monkeypatch, is_there):
    monkeypatch.setattr(_library, "EXTENSION_MISSING", "it was built against another torch and does not load\n(why)")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if is_there else None)
    monkeypatch.delenv("CXX", raising=False)
    finding = doctor._extension()
    assert finding.level == (BROKEN if is_there else NOTE)
    assert "the same numbers, several times slower" in finding.words
    assert finding.fix.endswith(doctor.REBUILD)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert is_there or "install a C++ compiler (g++ is not there)" in doctor._extension().fix
    monkeypatch.setitem(_library._SERVING, ("token_logps", "CPU"), "naive")
    finding = by_subject(doctor._operations())["token_logps"]
    assert finding == doctor.Finding(NOTE, "token_logps", "CPU: plain PyTorch, as there is no C++ extension")


def test_an_op_that_fails_or_is_wrong_is_broken_and_the_others_are_not(monkeypatch):
    def fails(device):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setitem(trials.TRIALS, "soft_sort", fails)
    monkeypatch.setitem(trials.TRIALS, "soft_rank", lambda device: (torch.ones(3), torch.zeros(3)))
    monkeypatch.setitem(trials.TRIALS, "token_logps", lambda device: (torch.tensor(float("nan")), torch.zeros(())))
    findings = by_subject(doctor._operations())
    assert "on cpu it fails: no kernel image" in findings["soft_sort"].words
    assert "on cpu it is 1 off its definition" in findings["soft_rank"].words
    broken = [finding for finding in findings.values() if finding.level == BROKEN]
    assert {finding.subject for finding in broken} == {"soft_sort", "soft_rank", "token_logps"}
    assert all(finding.fix for finding in broken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_broken(monkeypatch):
    assert doctor._absent_gpu().level == OK
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    finding = doctor._absent_gpu()
    assert finding.level == BROKEN
    assert "there is an NVIDIA driver" in finding.words
    assert finding.fix


def test_triton_is_named_in_the_release_that_torch_pins(monkeypatch):
    pins = ["numpy", 'triton==3.7.1; platform_system == "Linux"']
    monkeypatch.setattr(doctor, "_requirements", lambda package: pins if package == "torch" else [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor._triton().fix == "pip install triton==3.7.1"
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert (doctor._triton().level, doctor._triton().fix) == (BROKEN, "unset TRITON_INTERPRET")


def test_attention_for_exact_wdpo_is_what_the_penalty_accepts():
    findings = by_subject(doctor._attention())
    assert "exact WDPO takes it" in findings["eager"].words
    assert all("exact WDPO takes it" not in finding.words for name, finding in findings.items() if name != "eager")
    assert "which SDPA's flash and memory-efficient and cuDNN kernels lack, unlike its math" in findings["sdpa"].words
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "exact WDPO takes it" in by_subject(doctor._attention())["sdpa"].words


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_that_is_absent_is_a_note():
    pytest.importorskip("transformers")
    finding = by_subject(doctor._attention())["flash_attention_2"]
    assert finding.level == NOTE
    assert finding.words.startswith("flash-attn is not installed")


@pytest.fixture
def packages(monkeypatch):
    """The findings about packages where robustloss asks for `requirements`, and `installed` are there."""
    pytest.importorskip("packaging")

    def find(requirements: list[str], installed: dict[str, str]) -> dict[str, doctor.Finding]:
        extras = SimpleNamespace(get_all=lambda key: ["train", "bench", "dev"])
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: extras)
        monkeypatch.setattr(doctor, "_requirements", lambda package: requirements)
        monkeypatch.setattr(doctor, "_version", installed.get)
        return by_subject(doctor._packages())

    return find


def test_packages_are_held_against_the_ranges_of_the_metadata(packages):
    findings = packages(
        ["torch>=2.10", 'peft>=1,<2; extra == "train"', 'numpy; extra == "train"', 'numpy; extra == "bench"',
         'trl>=1; extra == "bench"', 'trl<2; extra == "train"', 'ruff; extra == "dev"',
         'winonly; platform_system == "Plan 9"'],
        {"torch": "2.13.0+cpu", "peft": "2.1", "numpy": "2.0rc1"},
    )  # fmt: skip
    assert findings["torch"] == (OK, "torch", "2.13.0+cpu (torch>=2.10, of robustloss)", "")
    assert findings["peft"].level == BROKEN
    assert findings["peft"].words == "2.1, but robustloss[train] needs peft<2,>=1"
    assert findings["peft"].fix.startswith("pip install 'peft<2,>=1' (or in the checkout: ")
    assert findings["numpy"].words == "2.0rc1 (numpy, of robustloss[train,bench])"
    assert (findings["trl"].level, findings["trl"].words) == (
        NOTE,
        "not installed; robustloss[bench] and robustloss[train] need it",
    )
    checkout = '(or in the checkout: pip install --no-build-isolation ".[bench]")'
    assert findings["trl"].fix == f"pip install 'trl<2,>=1' {checkout}"
    assert set(findings) == {"torch", "peft", "numpy", "trl"}
    missing = packages(["torch>=2.10"], {})["torch"]
    assert (missing.level, missing.fix) == (BROKEN, "pip install 'torch>=2.10'")


def test_a_package_that_two_extras_ask_for_is_told_once_and_held_against_both(packages, robustloss):
    ranges = ['trl>=1,<2; extra == "train"', 'trl>=1.16; extra == "bench"']
    told = packages(ranges, {"trl": "1.20"})["trl"].words
    assert told == "1.20 (trl<2,>=1, of robustloss[train]; trl>=1.16, of robustloss[bench])"
    finding = packages(ranges, {"trl": "1.8"})["trl"]
    assert (finding.level, finding.words) == (BROKEN, "1.8, but robustloss[bench] needs trl>=1.16")
    packages(ranges, {"trl": "1.20"})
    section = robustloss("doctor")[1].split("packages:")[1]
    assert [line.split()[1] for line in section.splitlines() if "trl" in line] == ["trl"]


def test_a_package_that_is_there_and_does_not_import_is_broken(packages, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "IMPORTED", ("packaging",))

    def broken(name):
        print("chatter")
        raise RuntimeError("needs\nanother torch")

    assert doctor._import_problem("packaging") == ""
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = packages(['packaging>=1; extra == "train"'], {"packaging": "24.0"})["packaging"]
    assert finding.level == BROKEN
    assert "its import fails: needs another torch" in finding.words
    assert finding.fix == "pip install --upgrade packaging"
    assert capsys.readouterr() == ("", "")


def test_a_source_tree_that_is_not_installed_is_no_error(packages):
    (finding,) = packages([], {}).values()
    assert finding.level == NOTE
    assert "pip install" in finding.fix


def test_gpus_are_told_and_an_op_that_fails_on_one_alone_is_the_kernel_s(monkeypatch):
    properties = SimpleNamespace(name="H200", total_memory=141 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    devices = by_subject(doctor._devices())
    assert {"CPU", "GPU 0", "GPU 1", "Triton"} == set(devices)
    assert devices["GPU 1"].words == "H200, 141 GiB, sm_90"

    def no_image(device):
        if device == "cuda":
            raise RuntimeError("no kernel image")
        return torch.ones(1), torch.ones(1)

    for op in trials.TRIALS:
        monkeypatch.setitem(trials.TRIALS, op, no_image)
    finding = by_subject(doctor._operations())["token_logps"]
    assert finding.level == BROKEN
    assert finding.words.endswith("CUDA: Triton; on cuda it fails: no kernel image")
    assert finding.fix.startswith("pip install --force-reinstall ")
    assert "triton" in finding.fix
