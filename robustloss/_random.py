"""Random numbers that can be drawn again: by a generator's state, or by a hash of what they depend on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORD = 0xFFFF_FFFF


class RandomState:
    """The state of the CPU's generator, and of every device's of the accelerator (CUDA, ROCm, XPU, ...) in use."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._module = _accelerator_in_use()
        self._devices = None if self._module is None else self._module.get_rng_state_all()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state_all(self._devices)


def _accelerator_in_use() -> Any:
    """torch.cuda or another accelerator's module, once that is initialised: asking never initialises it."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    if hasattr(module, "is_initialized"):
        return module if module.is_initialized() else None
    return _OneDevice(module) if hasattr(module, "get_rng_state") else None


class _OneDevice:
    """The module of an accelerator that has one device at most (MPS)."""

    def __init__(self, module: Any) -> None:
        self.get_rng_state_all, self.set_rng_state_all = module.get_rng_state, module.set_rng_state


def hashed_uniforms(count: int, seed: int, draw: Tensor) -> Tensor:
    """[count] numbers in (0, 1), float64, from `seed` and the number of the draw (int64 []) alone.

    Plain integer arithmetic where `draw` lives: the same numbers on every device, and no host that waits for one.
    """
    key = _mix(_mix(torch.full_like(draw, seed)) ^ draw)
    return (_mix(_mix(torch.arange(count, device=draw.device)) ^ key) + 0.5) / (WORD + 1.0)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that leaves no pattern; constants of Wellons's hash-prospector, below 2^31 so that no
    product overflows an int64."""
    x = x & WORD
    for multiplier, shift in ((0x21F0AAAD, 16), (0x735A2D97, 15)):
        x = ((x ^ (x >> shift)) * multiplier) & WORD
    return x ^ (x >> 15)
