"""Checks that every public entry shares: the message names the argument, what came and what is wanted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32)


def check_tensor(name: str, value: object, *, dtypes: Sequence[torch.dtype] = FLOATING_DTYPES) -> Tensor:
    """Refuse what is no tensor (TypeError) or a tensor of another dtype (TypeError)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def check_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Refuse a tensor whose shape is not `shape`; `meaning` says where the wanted shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({meaning}), got {tuple(value.shape)}")


def check_same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}; move one of them")


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity in a CPU tensor.

    On an accelerator the check would make the host wait for the device, so it is left to the training loop, which
    looks at the loss it has copied to the host anyway; under torch.compile it is left out for the same reason.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        index = tuple((~torch.isfinite(value)).nonzero()[0].tolist()) if value.ndim else ()
        raise ValueError(
            f"{name} holds {bad} non-finite value(s), the first at index {index}: "
            f"{value[index].item() if index else value.item()}; log-probabilities and losses must be finite"
        )


def check_magnitude(name: str, value: Tensor) -> None:
    """Refuse NaN, infinity and numbers so large that their differences overflow, where `check_finite` looks."""
    if value.device.type != "cpu" or torch.compiler.is_compiling() or not value.numel():
        return
    largest = value.detach().abs().max().item()
    limit = 1e37 if value.dtype == torch.float32 else 1e150
    if not largest <= limit:
        check_finite(name, value)
        raise ValueError(f"{name} is too large: got a magnitude of {largest:g}, want {limit:g} at most")


def check_weight_values(weights: Tensor) -> None:
    """Refuse sample weights that are not finite, negative or all zero, where `check_finite` looks."""
    check_finite("weights", weights)
    if weights.device.type == "cpu" and not torch.compiler.is_compiling() and weights.numel():
        if bool((weights < 0).any()):
            raise ValueError(f"weights must be >= 0, got a minimum of {weights.min().item():g}")
        if not bool((weights > 0).any()):
            raise ValueError("weights must not all be zero")


def check_labels_in_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse a label outside [0, vocabulary) that is not `ignore_index`, where `check_finite` looks."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"labels{index} is {labels[tuple(index)].item()}, but must be in [0, {vocabulary}) (the vocabulary) or "
            f"ignore_index = {ignore_index}"
        )


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> float:
    """Refuse what is no finite number (TypeError), or one outside the open or closed bounds (ValueError).

    A number that torch.compile or torch.export holds as a symbol is returned as it is, so that it stays one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # an int may be larger than any float
        raise ValueError(f"{name} must be finite, got {value if isinstance(value, float) else 'a larger integer'}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be > {above:g}, got {_plain(value)}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {_plain(value)}")
    if below is not None and not value < below:
        raise ValueError(f"{name} must be < {below:g}, got {_plain(value)}")
    return float(value) if isinstance(value, (int, float)) else cast(float, torch.sym_float(value))


def _plain(value: float | torch.SymInt | torch.SymFloat) -> float:
    """A number as it was given, and a symbol's own, which torch.compile would not write."""
    return int(value) if isinstance(value, (int, torch.SymInt)) else float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)
