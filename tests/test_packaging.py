"""What an installation holds, with and without the C++ extension."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from robustloss import kernels

ROOT = Path(__file__).parent.parent


def setup_py(out: Path, *command: str, **environment: str) -> str:
    """Run setup.py with everything it writes under `out`; returns what it announced."""
    egg_info = ["egg_info", "--egg-base", str(out)]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *egg_info, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("robustloss: "))


def test_the_top_level_kernels_are_installed_as_robustloss_kernels():
    installed = Path(kernels.__file__).parent
    names = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert names == {path.name for path in installed.glob("*.py")}
    for name in names:
        assert (installed / name).read_bytes() == (ROOT / "kernels" / name).read_bytes()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ROBUSTLOSS_BUILD_EXT": "0"}, "because ROBUSTLOSS_BUILD_EXT=0"),
        ({"CXX": "/no/such/compiler"}, "no compiler /no/such/compiler was found"),
    ],
    ids=["switched off", "no compiler"],
)
def test_without_the_extension_the_rest_is_built_and_one_line_says_so(tmp_path, environment, reason):
    announced = setup_py(tmp_path, "build", "--build-base", str(tmp_path / "build"), **environment)
    assert announced == f"robustloss: installing without the C++ extension, {reason}"
    (package,) = (tmp_path / "build").glob("lib*/robustloss")
    assert (package / "kernels" / "__init__.py").exists()
    assert (package / "ops" / "token_logps.py").exists()
    assert not list(package.glob("_C*"))


def test_the_source_distribution_holds_every_source(tmp_path):
    setup_py(tmp_path, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    folders = {"csrc": "*", "kernels": "*.py", "robustloss": "**/*.py"}
    sources = {
        path.relative_to(ROOT).as_posix() for folder, kind in folders.items() for path in (ROOT / folder).glob(kind)
    }
    assert sources <= held


def test_without_the_extension_the_cpu_is_served_by_naive_with_one_warning():
    script = """
import sys, warnings
sys.modules["robustloss._C"] = None  # as if it had not been built
import torch
from robustloss.functional import sequence_logps

logits = torch.randn(2, 3, 7, requires_grad=True)
labels = torch.tensor([[1, 2, -100], [0, 6, 3]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        logps = sequence_logps(logits, labels)
        (grad,) = torch.autograd.grad(logps.sum(), logits)
messages = [str(w.message) for w in caught if "C++ extension" in str(w.message)]
assert len(messages) == 1, messages

picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
expected = torch.where(labels != -100, picked, 0.0).sum(-1)
torch.testing.assert_close(logps, expected)
torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0])
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
