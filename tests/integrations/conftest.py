"""One tiny model on the disk for all trainers, and nothing that waits for a network."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode imports no module that lies beside a test: trl_cases and the worker, and tiny_models.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "train")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> str:
    """A GPT-2 of two layers with dropout, and its tokenizer."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'robustloss[train]'")
    from tiny_models import save_tiny, tiny_gpt2

    return save_tiny(tmp_path_factory.mktemp("gpt2"), tiny_gpt2())


@pytest.fixture(autouse=True)
def one_thread():
    """Threads help no model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def frozen_objects():
    """Trainer collects garbage before every run, which takes a second for all that the frameworks have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
