"""What the properties draw from: vectors and matrices of every layout and size of number, and ways to spoil them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

tried: Counter[str] = Counter()  # cases by property

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WRONG_DTYPES = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
SIZES = (0, 1, 2, 3, 7, 8, 17, 64, 129)
ORDINARY = ("ordinary", "wide", "tied", "constant", "zeros")
KINDS = (*ORDINARY, "thousands", "denormal", "huge", "largest", "astronomic")
LAYOUTS = ("contiguous", "strided", "reversed", "expanded", "offset")
WRONG_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, "0.1", None, True, [0.1], torch.tensor(0.1))


def holds_for(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try a property on a few fixed cases in every run of the tests, and on many new ones with `-m slow`."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def counted(**drawn: Any) -> None:
            check(**drawn)
            tried[check.__name__] += 1

        def test(profile: str) -> None:
            settings.get_profile(profile)(given(**strategies)(counted))()

        counted.__name__ = test.__name__ = check.__name__
        test.__doc__, test.__module__ = check.__doc__, check.__module__
        profiles = ["quick", pytest.param("many", marks=pytest.mark.slow)]
        return pytest.mark.parametrize("profile", profiles)(test)

    return decorate


def refuses(call: Callable[[], Any], *names: str) -> None:
    """The call raises ValueError or TypeError, and the message names one of the arguments."""
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    message = str(refused.value)
    assert any(re.search(rf"\b{re.escape(name)}\b", message) for name in names), message


def unless_too_large(call: Callable[[], Any], *given: Tensor) -> Any:
    """What the call gives, or None where it refuses numbers beyond 1e15 because they, or their squares, overflow."""
    try:
        return call()
    except ValueError as error:
        if not re.search("too large|losses holds .* non-finite", str(error)) or largest(*given) < 1e15:
            raise
        return None


def largest(*values: Tensor) -> float:
    """The largest magnitude in any of the tensors."""
    return max((exact(x).abs().max().item() for x in values if x.numel()), default=0.0)


# ---- tensors ------------------------------------------------------------------------------------------------------


@st.composite
def tensors(
    draw: Any,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = DTYPES,
    kinds: Sequence[str] = KINDS,
    layouts: Sequence[str] = LAYOUTS,
) -> Tensor:
    """A floating tensor of finite numbers, of any of the layouts."""
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts))
    values = numbers(draw(st.sampled_from(kinds)), tuple(shape), draw(st.integers(0, 2**20)), dtype)
    return laid_out(values, layout)


def numbers(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Finite numbers of a kind, rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    limit = torch.finfo(dtype)
    values = {
        "ordinary": lambda: normal,
        "wide": lambda: -60 + 30 * normal,
        "tied": lambda: normal.round(),
        "constant": lambda: torch.full(shape, -3.25, dtype=torch.float64),
        "zeros": lambda: 0.0 * normal,
        "thousands": lambda: 1e4 * normal.sign() + normal,
        "denormal": lambda: limit.tiny * normal,
        "huge": lambda: 1e19 * normal,
        "largest": lambda: 3.4e38 * torch.where(normal > 1, normal.sign(), (normal / 4).clamp(-1, 1)),
        "astronomic": lambda: limit.max * (normal / 2).clamp(-1, 1),  # of float64 alone it is more than "largest"
    }[kind]()
    return values.clamp(limit.min, limit.max).to(dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout of memory (an expanded one repeats the first row, or element)."""
    if not values.numel() or not values.ndim:
        return values
    if layout == "strided":
        apart = torch.stack([values, torch.full_like(values, math.nan)], -1)
        return apart[..., 0]
    if layout == "reversed":
        order = tuple(reversed(range(values.ndim)))
        return values.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "offset":
        return torch.cat([torch.full_like(values[:1], math.nan), values])[1:]
    return values


def leaf(values: Tensor) -> Tensor:
    """The tensor as it lies in memory, with a gradient."""
    return values.detach().requires_grad_()


def weights_for(size: int, seed: int, kind: str) -> Tensor | None:
    """Sample weights: none, equal, some zero, or over a hundred orders of magnitude."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
    if kind == "zeros":
        uniform = torch.where(torch.rand(size, generator=generator) < 0.5, 0.0, uniform)
        uniform[:1] = 1.0  # never all zero
    elif kind == "spread":
        uniform = 10.0 ** (12 * uniform - 6)
    return uniform if kind != "equal" else torch.full((size,), 2.5)


WEIGHTS = ("none", "none", "equal", "any", "zeros", "spread")


@st.composite
def spoiled(draw: Any, good: Tensor, ways: Sequence[str] = ("type", "dtype", "shape", "value")) -> Any:
    """Something in the place of a floating tensor that no function may take: another type, dtype or shape, or NaN."""
    how = draw(st.sampled_from(ways))
    good = good.detach()
    if how == "value" and good.numel():
        bad = good.clone(memory_format=torch.contiguous_format)
        index = draw(st.integers(0, bad.numel() - 1))
        bad.view(-1)[index] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
        return bad
    if how == "type":
        return draw(st.sampled_from((1.0, "logps", [1.0, 2.0], b"", good.float().numpy())))
    if how == "dtype":
        return torch.zeros(good.shape, dtype=draw(st.sampled_from(WRONG_DTYPES)))
    return good.new_zeros(*good.shape, 2, 2)


def exact(values: Tensor) -> Tensor:
    return values.detach().double()


def assert_right(got: Tensor, wanted: Tensor, *, scale: float = 0.0, digits: float = 1.0) -> None:
    """`got` is `wanted` (float64) rounded to got's dtype, within `digits` times what that dtype resolves.

    `scale` is the size of the numbers that were added up on the way. What exceeds the dtype is infinite there; NaN is
    never right.
    """
    assert not got.isnan().any(), got
    assert not wanted.isnan().any(), wanted
    resolution = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[got.dtype]
    resolution *= digits
    limit = torch.finfo(got.dtype).max
    near = wanted.abs() >= limit * (1 - resolution) - scale * resolution  # may round to infinity, or not
    bound = resolution * (wanted.abs() + scale) + 4 * torch.finfo(got.dtype).tiny
    off = (got.double() - wanted).abs()
    fits = torch.where(near, (got.double().abs() >= limit * (1 - 2 * resolution)) | (off <= bound), off <= bound)
    assert fits.all(), f"got {got[~fits].flatten()[:4]}, wanted {wanted[~fits].flatten()[:4]}"


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the sum of `value`; zeros where it does not depend on an input."""
    given = torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True)]
