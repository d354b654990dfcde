"""Shell completion: the scripts are made, bash completes by them, and keys of configs are among what is completed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from robustloss.cli import bench, completion
from robustloss.losses import LOSSES

SUITES = set(bench.suite_names(folder)) if (folder := bench.find_suites()) else set()

HOW_BASH_ASKS = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_robustloss_complete robustloss "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>&-
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    pytest.importorskip("shtab")
    from robustloss.cli import main

    file = tmp_path_factory.mktemp("completion") / "robustloss.bash"
    with file.open("w") as script, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", script)
        assert main(["completion", "bash"]) == 0
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["d"], {"doctor"}),
        (["train", "loss.ta"], {"loss.tau="}),
        (["train", "seed=1", "optimizer.lea"], {"optimizer.learning_rate="}),
        (["train", "--c"], {"--config"}),
        (["bench", "--op", "x", "--t"], {"--tiny"}),
        (["completion", "z"], {"zsh"}),
        (["losses", ""], set(LOSSES)),
        (["losses", "kl"], {"kldpo"}),
        (["train", "seed=1", "loss.name", "="], set(LOSSES)),  # as bash splits words by default
        (["train", "loss.name", "=", ""], set(LOSSES)),
        (["train", "loss.name", "=", "aot_p"], {"aot_paired"}),
        (["train", "loss.name=tv"], {"loss.name=tv_dpo"}),
        (["bench", "--op", "soft"], {"soft_sort"}),
        (["bench", "--tiny", "--op", ""], SUITES),
    ],
)
def test_bash_completes(bash_script, words, completed):
    command = ["bash", "-c", HOW_BASH_ASKS, "bash", str(bash_script), "robustloss", *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(finished.stdout.split()) == completed


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(robustloss, shell):
    pytest.importorskip("shtab")
    code, out, _ = robustloss("completion", shell)
    assert code == 0
    assert "doctor" in out
    assert ("loss.tau=" in out) == ("tv_dpo" in out) == (shell == "zsh")


def test_the_keys_are_those_that_configs_take():
    config = pytest.importorskip("robustloss.train.config")
    keys = completion.train_keys()
    assert len(set(keys)) == len(keys)
    assert {"seed=", "model.name_or_path=", "lora.r=", "loss.name=", "loss.beta=", "loss.penalty="} <= set(keys)
    assert not {"loss=", "loss.reduction=", "model="} & set(keys)
    for key in keys:  # an unknown one raises
        config.read_overrides([f"{key}1"])


def test_without_shtab_it_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in refused("completion", "bash")
