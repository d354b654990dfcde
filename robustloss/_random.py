"""Where PyTorch's random number generators stand, so that a later pass can draw the same numbers."""

from __future__ import annotations

import torch


class RandomState:
    """The state of the CPU's generator, and of every CUDA (or ROCm) device's where these are in use."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state_all(self._devices)
