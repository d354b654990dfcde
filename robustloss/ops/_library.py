"""The torch.library namespace `robustloss`, and whether its C++ half was built.

Every op follows one pattern: its schema is defined here in Python, `csrc/<op>.cpp` registers the CPU implementation
(TORCH_LIBRARY_IMPL), `kernels/<op>.py` serves CUDA and ROCm tensors, and `naive/<op>.py` serves the CPU where the
extension was not built. A schema with registrations per dispatch key costs a fraction of `torch.library.custom_op`.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("robustloss", "DEF")


def _load_extension() -> str | None:
    """Load the C++ half, or say why there is none."""
    if importlib.util.find_spec("robustloss._C") is None:
        return "robustloss was installed without its C++ extension"
    try:
        importlib.import_module("robustloss._C")
    except ImportError as error:
        return f"robustloss's C++ extension was built against another torch and does not load ({error})"
    return None


EXTENSION_MISSING = _load_extension()
HAS_EXTENSION = EXTENSION_MISSING is None


def register_cpu_fallback(op: str, naive: Callable[..., Any]) -> None:
    """Serve CPU tensors by `naive` where the C++ extension was not built; the first call warns, once a process."""
    if HAS_EXTENSION:
        return

    def fallback(*args: Any) -> Any:
        _warn_extension_missing()
        return naive(*args)

    LIBRARY.impl(op, fallback, "CPU")


def register_triton(op: str, launcher: str) -> None:
    """Serve CUDA and ROCm tensors (both have the dispatch key CUDA) by `robustloss.kernels.<module>:<function>`.

    The kernel is imported at the first call: an importable triton is not a usable one, so only a tensor that lives on
    a GPU asks for it.
    """
    module_name, function_name = launcher.split(":")

    def launch(*args: Any) -> Any:
        module = importlib.import_module(f"robustloss.kernels.{module_name}")
        return getattr(module, function_name)(*args)

    LIBRARY.impl(op, launch, "CUDA")


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """As `torch.library.register_autograd`, for ops without keyword-only arguments, at less than half its cost a call.

    The small losses need it: 32 us forward and backward instead of 53.
    """
    overload = getattr(torch.ops.robustloss, op).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):  # pyright: ignore[reportIncompatibleMethodOverride]
            output = below(*args)
            setup_context(ctx, args, output)
            return output

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def call(*args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        return Differentiable.apply(*args) if wanted else below(*args)

    Differentiable.backward = staticmethod(backward)
    LIBRARY.impl(op, call, "Autograd")


_warned = False


def _warn_extension_missing() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{EXTENSION_MISSING}, so CPU tensors take the slower plain-PyTorch path; with torch and a C++ compiler "
            "there, and without ROBUSTLOSS_BUILD_EXT=0, reinstall: "
            "pip install --no-build-isolation --force-reinstall --no-deps robustloss",
            RuntimeWarning,
            stacklevel=3,
        )
