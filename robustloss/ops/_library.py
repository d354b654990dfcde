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

from robustloss._install import REBUILD

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

# By op and dispatch key: how what serves it is called, where that is not plain PyTorch by design.
_SERVING: dict[tuple[str, str], str] = {}


def serving(op: str, key: str) -> str | None:
    """What serves the op's tensors of a dispatch key, "CPU" or "CUDA" (ROCm too): "C++", "Triton", "naive" (plain
    PyTorch in place of the extension), "PyTorch" (by design), or None where nothing does."""
    if torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"robustloss::{op}", key):
        return _SERVING.get((op, key), "PyTorch")
    return None


def register_cpu_fallback(op: str, naive: Callable[..., Any]) -> None:
    """Serve CPU tensors by `naive` where the C++ extension was not built; the first call warns, once a process."""
    _SERVING[op, "CPU"] = "C++" if HAS_EXTENSION else "naive"
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

    _SERVING[op, "CUDA"] = "Triton"
    LIBRARY.impl(op, launch, "CUDA")


def register_scaled_gradients(op: str, sides: int, composition: Callable[..., torch.Tensor]) -> None:
    """Autograd of an op that returns gradients together with its value: the backward scales them.

    Arguments 2 k and 2 k + 1, for k < sides, are a sample and what is subtracted from it: output 1 + k is the gradient
    of output 0 ([], or [R] for rows) by the one, minus it by the other. The other arguments are constants. A second
    derivative is that of `composition`, from the op's arguments to output 0.

    csrc/autograd.cpp does this at a third of the cost of a call; what is here serves where it was not built.
    """
    overload = getattr(torch.ops.robustloss, op).default
    arguments = str(overload._schema).split("(", 1)[1].split(") -> ")[0]
    LIBRARY.define(f"{op}_gradients(Tensor grad_value, bool[] needed, {arguments}) -> Tensor[]")

    def gradients(grad_value, needed, *arguments):
        """The needed ones of the first 2 * sides arguments, differentiable once more."""
        nodes = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        for i in range(2 * sides):
            if needed[i]:  # a node of its own: one may be computed from another, or be the other
                nodes[i] = arguments[i].view_as(arguments[i])
        wanted = [nodes[i] for i in range(2 * sides) if needed[i]]
        return list(torch.autograd.grad(composition(*nodes), wanted, grad_value, create_graph=True))

    LIBRARY.impl(f"{op}_gradients", gradients, "CompositeImplicitAutograd")
    if HAS_EXTENSION:
        return

    def save(ctx, inputs, output):
        tensors = [x for x in inputs if x is None or isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*output[1 : 1 + sides], *tensors)
        ctx.options = inputs[len(tensors) :]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_value, *_):
        found: list[Any] = [None] * len(ctx.needs_input_grad)
        if grad_value is None:
            return tuple(found)
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        needed = ctx.needs_input_grad[: 2 * sides]
        wanted = [i for i in range(2 * sides) if needed[i]]
        if torch.is_grad_enabled():
            for i, gradient in zip(wanted, gradients(grad_value, needed, *saved[sides:], *ctx.options), strict=True):
                found[i] = gradient
        else:
            scale = grad_value.unsqueeze(-1) if grad_value.dim() else grad_value
            for i in wanted:
                gradient = scale * saved[i // 2]
                found[i] = (-gradient if i % 2 else gradient).to(saved[sides + i].dtype)
        return tuple(found)

    torch.library.register_autograd(f"robustloss::{op}", backward, setup_context=save, lib=LIBRARY)


_warned = False


def _warn_extension_missing() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{EXTENSION_MISSING}, so CPU tensors take the slower plain-PyTorch path; with torch and a C++ compiler "
            f"there, and without ROBUSTLOSS_BUILD_EXT=0, reinstall it {REBUILD}",
            RuntimeWarning,
            stacklevel=3,
        )
