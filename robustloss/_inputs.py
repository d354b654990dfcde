"""What `robustloss.functional` is given: checked before any device work, and brought into the ops' layouts."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from robustloss.naive.links import LINKS, OFFSET_LINKS, SMOOTHED_LINKS
from robustloss.naive.sequence_logps import shift_labels
from robustloss.ops._linear_head import Head, Options
from robustloss.validation import (
    INTEGER_DTYPES,
    check_choice,
    check_labels_in_range,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)


def count_statistics(return_entropy: bool, return_statistics: bool) -> int:
    if return_entropy and return_statistics:
        raise ValueError("return_entropy and return_statistics are both True; the statistics hold the entropy")
    return 3 if return_statistics else int(return_entropy)


def check_logits(logits: Tensor, labels: Tensor, temperature: float, name: str = "logits") -> None:
    check_tensor(name, logits)
    if logits.ndim not in (2, 3) or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be [B, T, V] or [N, V] with V >= 1, got {tuple(logits.shape)}")
    check_labels(labels, logits, name, temperature)


def check_inplace(inplace_backward: bool, name: str, logits: Tensor) -> None:
    owner = logits if logits._base is None else logits._base
    if inplace_backward and owner.requires_grad and owner.is_leaf:
        raise ValueError(
            f"inplace_backward=True overwrites the logits with their gradient, but {name} is a leaf tensor, or a view "
            "of one, that others hold; pass the output of a module, or leave inplace_backward=False"
        )


def local_part(
    weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, start: int | None
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None, int | None]:
    """This rank's part of the head, the group it is split over, and its first token."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.tensor import DTensor, Shard

        if isinstance(weight, DTensor):
            sharded = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
            if any(weight.placements[axis] != Shard(0) for axis in sharded) or len(sharded) > 1:
                raise ValueError(
                    f"weight must be replicated, or sharded over the vocabulary on one axis of its mesh, got "
                    f"{weight.placements}"
                )
            if sharded:
                names = weight.device_mesh.mesh_dim_names
                name = names[sharded[0]] if names else ""
                if "dp" in name:  # dp_shard, fsdp: as Accelerate and torchtitan name FSDP2's
                    raise ValueError(
                        f"weight is sharded over {name!r}, whose processes have hidden states of their own, and not "
                        "over the vocabulary of the same ones: take the loss inside of the module that is sharded, "
                        "where the weight is whole (robustloss.train.LossModule does)"
                    )
                group = weight.device_mesh.get_group(sharded[0])
                start = group.rank() * -(-len(weight) // group.size())  # DTensor's parts: torch.chunk's
            weight = weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    if group is None and start is not None:
        raise ValueError(f"vocabulary_start is {start}, but without a process_group weight has the whole vocabulary")
    if group is not None and start is None:
        start = group.rank() * len(weight)
    return weight, bias, group, start


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    temperature: float,
    ignore_index: int,
    whole: bool,  # weight has the whole vocabulary, so that labels can be held against it
) -> Head:
    """The head's tensors with one row a token, once they fit together."""
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    if weight.ndim != 2 or hidden.ndim not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [B, T, H] or [N, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    values = {"weight": weight}
    if bias is not None:
        values["bias"] = bias
        check_shape("bias", check_tensor("bias", bias), weight.shape[:1], "weight's first dimension")
    if adapter is not None:
        values["adapter[0]"], values["adapter[1]"] = (
            check_tensor(f"adapter[{index}]", value) for index, value in enumerate(adapter)
        )
        rank = adapter[0].shape[-1:]
        check_shape("adapter[0]", adapter[0], (*hidden.shape[:-1], *rank), "hidden's shape with R for H")
        check_shape("adapter[1]", adapter[1], (len(weight), *rank), "[V, R]")
    device_type = hidden.device.type
    for name, value in values.items():
        check_same_device(name, value, "hidden", hidden)
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, values = hidden.to(dtype), {name: value.to(dtype) for name, value in values.items()}
    for name, value in values.items():
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have hidden's dtype {hidden.dtype}, got {value.dtype}; cast one, or use autocast"
            )
    check_labels(labels, hidden, "hidden", temperature)
    if whole:
        # Here, because the ops see labels by the tile, and would name the wrong position.
        check_labels_in_range(labels, len(weight), ignore_index)
    adapter_hidden = values.get("adapter[0]")
    return Head(
        hidden.flatten(0, -2),
        values["weight"],
        values.get("bias"),
        None if adapter_hidden is None else adapter_hidden.flatten(0, -2),
        values.get("adapter[1]"),
    )


def linear_options(
    ignore_index: int, temperature: float, softcap: float | None, logit_scale: float, chunk_size: int | None
) -> Options:
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    check_number("logit_scale", logit_scale, above=0)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
    # The scale of the capped logits is an inverse temperature.
    return Options(ignore_index, float(temperature) / float(logit_scale), softcap, chunk_size)


def check_labels(labels: Tensor, like: Tensor, like_name: str, temperature: float) -> None:
    check_tensor("labels", labels, dtypes=INTEGER_DTYPES)
    check_shape("labels", labels, like.shape[:-1], f"{like_name}' shape without its last dimension")
    check_same_device("labels", labels, like_name, like)
    check_number("temperature", temperature, above=0)


def check_packing(labels: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if labels.ndim != 2:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} hold packed sequences: give cu_seqlens, or labels [B, T]"
            )
        return
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGER_DTYPES)
    check_same_device("cu_seqlens", cu_seqlens, "labels", labels)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be [S + 1], got {tuple(cu_seqlens.shape)}")
    if labels.ndim == 2 and labels.shape[0] != 1:
        raise ValueError(f"with cu_seqlens labels must be [N] or [1, N], got {tuple(labels.shape)}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != labels.numel() or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to {labels.numel()} (the number of tokens), got {bounds}")


def prepare_labels(labels: Tensor, shift: bool, ignore_index: int, cu_seqlens: Tensor | None) -> Tensor:
    labels = labels.long().contiguous()
    return shift_labels(labels, ignore_index, cu_seqlens) if shift else labels


def check_link(link: str, beta: float, label_smoothing: float) -> tuple[float, float]:
    """beta and label_smoothing as floats, once they fit the link."""
    check_choice("link", link, LINKS)
    # [A]'s offset may be zero; an inverse temperature of zero would ignore the data.
    beta = check_number("beta", beta, at_least=0) if link in OFFSET_LINKS else check_number("beta", beta, above=0)
    label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    if label_smoothing and link not in SMOOTHED_LINKS:
        raise ValueError(
            f"label_smoothing={label_smoothing:g} is defined for the links {SMOOTHED_LINKS}, not for {link!r}"
        )
    return beta, label_smoothing


def check_samples(name: str, values: Tensor, weights: Tensor | None, like_name: str, like: Tensor) -> None:
    """Refuse samples without the leading dimensions and the device of `like`, and weights of another shape."""
    check_tensor(name, values)
    if values.ndim == 0 or values.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"{name} must be [..., n] with {like_name}'s leading dimensions {tuple(like.shape[:-1])}, got "
            f"{tuple(values.shape)}"
        )
    check_same_device(name, values, like_name, like)
    if weights is not None:
        check_shape(f"{name}_weights", check_tensor(f"{name}_weights", weights), values.shape, f"{name}'s shape")
        check_same_device(f"{name}_weights", weights, name, values)
