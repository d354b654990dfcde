"""What an integration says of a framework that is missing, too old, too new, or not what its version promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from robustloss.integrations import _versions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch):
    """installed("0.29.1"): as if that release were the installed one."""

    def install(release):
        monkeypatch.setattr(_versions, "version", lambda package: release)

    return install


@pytest.mark.parametrize("release", ["1.8", "1.8.0", "1.16.0", "1.99.3", "1.8.1.dev0"])
def test_a_release_within_the_range_will_do(installed, release):
    installed(release)
    assert _versions.require_trl("RobustKTOTrainer", at_least="1.8") == release


@pytest.mark.parametrize("release", ["0.29.1", "1.7.1", "1.8.0.dev0", "1.8.0rc1", "2.0.0", "2.1"])
def test_another_is_refused_with_what_is_needed_what_was_found_and_the_command(installed, release):
    installed(release)
    with pytest.raises(ImportError) as caught:
        _versions.require_trl("RobustKTOTrainer", at_least="1.8")
    assert str(caught.value) == (
        f"RobustKTOTrainer needs trl>=1.8,<2, and trl {release} is installed: pip install 'trl>=1.8,<2'"
    )


def test_where_there_is_none_the_command_is_named(monkeypatch):
    def missing(package):
        raise _versions.PackageNotFoundError(package)

    monkeypatch.setattr(_versions, "version", missing)
    with pytest.raises(ImportError, match=r"needs trl>=1.0,<2, and trl is not installed: pip install 'trl>=1\.0,<2'$"):
        _versions.require_trl("RobustDPOTrainer")


def test_a_range_may_be_open(installed):
    installed("5.23.0")
    assert _versions.require("transformers", "a trainer", at_least="4.57") == "5.23.0"
    installed("4.40.2")
    with pytest.raises(ImportError, match=r"a trainer needs transformers>=4\.57, and transformers 4.40.2 is installed"):
        _versions.require("transformers", "a trainer", at_least="4.57")


def test_a_method_that_a_later_release_has_renamed_is_named(installed):
    installed("1.77.0")
    trainer = type("KTOTrainer", (), {"__module__": "trl.trainer.kto_trainer", "compute_loss": None})
    _versions.require_methods(trainer, "RobustKTOTrainer", "compute_loss")
    with pytest.raises(
        ImportError, match=r"RobustKTOTrainer needs _compute_loss of KTOTrainer, which trl 1\.77\.0 has not"
    ):
        _versions.require_methods(trainer, "RobustKTOTrainer", "compute_loss", "_compute_loss")


FAKE = """
import importlib.metadata, sys

releases, found = {"trl": ""}, importlib.metadata.version
importlib.metadata.version = lambda package: releases.get(package) or found(package)
sys.modules["trl"] = None  # so that to import it is another error
from robustloss.integrations import trl

asked = {"0.29.1": "RobustDPOTrainer", "1.7.1": "RobustKTOTrainer", "2.0.0": "RobustKTOTrainer"}
for releases["trl"] in asked:
    try:
        getattr(trl, asked[releases["trl"]])
    except ImportError as error:
        print(error)
"""


def test_the_version_is_looked_at_before_anything_of_trl_is_imported():
    pytest.importorskip("transformers")
    finished = subprocess.run([sys.executable, "-c", FAKE], capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout.splitlines() == [
        "RobustDPOTrainer needs trl>=1.0,<2, and trl 0.29.1 is installed: pip install 'trl>=1.0,<2'",
        "RobustKTOTrainer needs trl>=1.8,<2, and trl 1.7.1 is installed: pip install 'trl>=1.8,<2'",
        "RobustKTOTrainer needs trl>=1.8,<2, and trl 2.0.0 is installed: pip install 'trl>=1.8,<2'",
    ], finished.stderr
