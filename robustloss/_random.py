"""Random numbers that can be drawn again: by a generator's state, or by a hash of what they depend on."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFF_FFFF


class RandomState:
    """The state of the CPU's generator, and of every CUDA (or ROCm) device's where these are in use."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state_all(self._devices)


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
