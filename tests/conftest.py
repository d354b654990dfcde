"""Where kernels run, and what the tests of every op share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode imports no module that lies beside a test: global_batch_cases and its worker.
sys.path.append(str(Path(__file__).parent))

# True for ROCm as well. Read once by triton.jit, so it must be settled before a kernel module is imported.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    # The training runs take longest: first, so that no worker ends with one while the others have nothing left.
    items.sort(key=lambda item: "train" not in item.path.parts)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What runs share goes to the user's cache folder, which tests leave alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTLOSS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device Triton kernels are tested on: a GPU, or the CPU by Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill uninitialised floating-point memory with NaN, so that an element which nothing wrote shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
