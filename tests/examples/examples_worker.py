"""Runs the examples of several processes, one after the other; started by test_examples_distributed.py.

    torchrun ... examples_worker.py FOLDER

What each has returned is written to FOLDER/<rank>.json.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from example_settings import SHORT, with_large_epsilon

# The last ends the process group.
RUNS = {
    "distributed_data_parallel": [],
    "deepspeed_loop": ["--zero-stage", "3"],
    "lightning_module": ["--devices", "2"],
    "transformers_trainer": [],
    "accelerate_fsdp2": [],
}


def count_shards():
    """The modules that FSDP2 shards, from here on."""
    sharded, fully_shard = [], fsdp.fully_shard

    def counted(module, **options):
        sharded.append(module)
        return fully_shard(module, **options)

    fsdp.fully_shard = counted
    return sharded


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.optim.AdamW.__init__ = with_large_epsilon
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sharded = count_shards()
    result = {name: import_module(name).main([*SHORT, *own]) for name, own in RUNS.items()}
    result["shards"] = len(sharded)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # meshes and engines hold groups, whose threads would abort an ordinary exit now and then


if __name__ == "__main__":
    main(sys.argv[1])
