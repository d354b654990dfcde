"""Whether a model can be differentiated twice, which exact WDPO needs.

Flash and memory-efficient attention have no second derivative: SDPA's raise, and FlashAttention-2's most likely drops
the second-order term silently. The training loop asks here before it starts; a loop of your own
calls `check_double_backward(model)` once.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

INSTEAD = 'load the model with attn_implementation="eager"'


def check_double_backward(model: nn.Module, *, zero_stage: int = 0) -> None:
    """Refuse a model whose second derivative is missing or wrong.

    Args:
        model: a Hugging Face model, wrapped or not (its attention is read from its modules' `config`).
        zero_stage: DeepSpeed's ZeRO stage that the model will be trained with.

    Raises:
        ValueError: ZeRO-3; flash, flex or other fused attention; SDPA while its fused kernels are allowed; reentrant
            checkpointing.
    """
    if zero_stage == 3:
        raise ValueError(
            "exact WDPO has no second derivative under ZeRO-3, which releases parameters in between: use zero_stage 0, "
            "1 or 2"
        )
    # Every module's config, so that a model inside a wrapper (DDP, PEFT, an engine) is seen too.
    configs = [getattr(module, "config", None) for module in model.modules()]
    for attention in {getattr(config, "_attn_implementation", None) for config in configs}:
        _check_attention(attention)
    for name, module in model.named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if (
            getattr(module, "gradient_checkpointing", False)
            and checkpoint is not None
            # Reentrant is what torch.utils.checkpoint, DeepSpeed's and others are unless they are told otherwise.
            and not (isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant") is False)
        ):
            raise ValueError(
                "exact WDPO needs a second derivative, which the reentrant gradient checkpointing of "
                f"{name or 'the model'} lacks: "
                'enable it with gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def _check_attention(attention: str | None) -> None:
    if attention == "sdpa":
        allowed = [
            name
            for name, enabled in (
                ("flash", torch.backends.cuda.flash_sdp_enabled()),
                ("memory-efficient", torch.backends.cuda.mem_efficient_sdp_enabled()),
                ("cuDNN", torch.backends.cuda.cudnn_sdp_enabled()),
            )
            if enabled
        ]
        if allowed:
            raise ValueError(
                f"exact WDPO needs a second derivative, which SDPA's {' and '.join(allowed)} kernels lack: {INSTEAD}, "
                "or allow only the math kernel (torch.backends.cuda.enable_flash_sdp(False) and its siblings)"
            )
    elif attention not in (None, "eager"):
        raise ValueError(
            f"exact WDPO needs a second derivative, which attention {attention!r} lacks or drops silently: {INSTEAD}"
        )
