"""Run by two processes: a head split over them gives what the whole head gives in one."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from robustloss.functional import linear_sequence_logps, linear_sequence_logps_with_cotangent

VOCABULARY = 37  # 19 tokens on the first rank and 18 on the second, as torch.chunk has it
OPTIONS = {"softcap": 3.0, "shift": True, "chunk_size": 2}


def check(hidden_size: int, form: str, trained: list[int], recompute: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, hidden_size), (VOCABULARY, hidden_size), (VOCABULARY,)]
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    labels = torch.randint(VOCABULARY, (2, 6), generator=generator)
    labels[0, 2] = -100
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def leaves(values):
        return [value.clone().requires_grad_(index in trained) for index, value in enumerate(values)]

    whole = leaves(tensors)
    expected, statistics = linear_sequence_logps(
        whole[0], whole[1], labels, bias=whole[2], return_statistics=True, **OPTIONS
    )
    wanted = torch.autograd.grad(expected, [whole[index] for index in trained], upstream)

    start = 19 * dist.get_rank()
    part = slice(start, start + 19)
    if form == "process_group":
        own = leaves([tensors[0], tensors[1][part], tensors[2][part]])
        more = {"process_group": dist.group.WORLD, "vocabulary_start": start}
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        placement = [Shard(0)] if form == "sharded" else [Replicate()]
        own = leaves([tensors[0], *[distribute_tensor(value, mesh, placement) for value in tensors[1:]]])
        more = {}
    actual, merged = linear_sequence_logps(
        own[0], own[1], labels, bias=own[2], return_statistics=True, recompute=recompute, **OPTIONS, **more
    )
    with torch.no_grad():
        without_gradient = linear_sequence_logps(own[0], own[1], labels, bias=own[2], **OPTIONS, **more)
    torch.testing.assert_close(without_gradient, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(merged), list(statistics), rtol=1e-12, atol=1e-12)

    if form != "replicated":
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(actual.sum(), [own[index] for index in trained], create_graph=True)
    gradients = torch.autograd.grad(actual, [own[index] for index in trained], upstream)
    for index, gradient, want in zip(trained, gradients, wanted, strict=True):
        if form == "process_group" and index > 0:
            want = want[part]
        elif form != "process_group" and index > 0:
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)

    if form == "sharded":
        with pytest.raises(ValueError, match="weight is sharded"):
            linear_sequence_logps_with_cotangent(own[0], own[1], labels, upstream)
        wrong = distribute_tensor(tensors[1], own[1].device_mesh, [Shard(1)])
        with pytest.raises(ValueError, match="weight must be replicated, or sharded over the vocabulary"):
            linear_sequence_logps(own[0], wrong, labels)
        data_parallel = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        with pytest.raises(ValueError, match="'dp_shard', whose processes have hidden states of their own"):
            linear_sequence_logps(own[0], distribute_tensor(tensors[1], data_parallel, [Shard(0)]), labels)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for hidden_size in (3, 20):  # more tokens than H, and fewer
        for form in ("process_group", "sharded", "replicated"):
            for trained, recompute in (([0], False), ([0, 1, 2], False), ([0, 1, 2], True)):
                check(hidden_size, form, trained, recompute)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the meshes' caches hold groups, whose threads would abort an ordinary exit now and then
