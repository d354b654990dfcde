"""One set of tiny models and data for all the training tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest's importlib mode imports no module that lies beside a test: tiny_models and distributed_worker.
sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Tiny:
    """Folders and files to train with; `settings` is a run of a second or so on them."""

    gpt2: str
    llama: str
    pairs: str
    unpaired: str

    def settings(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "output_dir": str(output_dir),
            "model": {"name_or_path": self.gpt2},
            "data": {"train": self.pairs, "eval": self.pairs, "max_length": 64},
            "loss": {"name": "dpo", "beta": 0.1},
            "optimizer": {"learning_rate": 3e-3},
            "batch": {"effective_batch": 4},
            "max_steps": 4,
            "save_every": 0,
        }
        for key, value in changes.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) and key != "loss" else value
        return settings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    from tiny_models import pair_rows, save_tiny, tiny_gpt2, tiny_llama, unpaired_rows, write_rows

    folder = tmp_path_factory.mktemp("tiny")
    return Tiny(
        gpt2=save_tiny(folder / "gpt2", tiny_gpt2()),
        llama=save_tiny(folder / "llama", tiny_llama()),
        pairs=write_rows(folder / "pairs.jsonl", pair_rows()),
        unpaired=write_rows(folder / "unpaired.jsonl", unpaired_rows()),
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Threads help no model of this size, and two that wait for each other on a busy machine cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_report(monkeypatch):
    """The report takes seconds to draw and has tests of its own."""
    from robustloss.train import report

    monkeypatch.setattr(report, "write_report", lambda run_dir: run_dir / "report.html")
