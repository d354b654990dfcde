"""A checkpoint of another number of processes, by way of DeepSpeed's universal checkpoints.

ZeRO-0 keeps everything in every process, and needs none of this.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from contextlib import redirect_stderr
from fnmatch import fnmatch
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY

from robustloss._files import remove_folder
from robustloss.train import checkpoint_files
from robustloss.train.config import DiskError
from robustloss.train.distributed import on_first, quiet_stdout, together

# Where DeepSpeed's automatic expert parallelism keeps its layers, with an expert_key_prefix that becomes a path.
EXPERT_KEYS = (AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY)


def read(engine: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint that any number of processes has written, and return the run's state. All processes call it.

    Every parameter is put together from its pieces, in a folder beside the checkpoint that is removed at the end.
    """
    if engine.zero_optimization_stage() == 0:
        return together(partial(checkpoint_files.read, engine, folder))
    temporary = folder.with_name(folder.name + ".universal.tmp")
    on_first(partial(_check_names, folder, set(engine.module.state_dict())))
    on_first(partial(_convert, folder, temporary))
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        state = together(partial(checkpoint_files.read, engine, temporary / "universal"))
    finally:
        engine._config.load_universal_checkpoint = False
    # Under ZeRO-3 DeepSpeed 0.19 gives every group the settings of the first one, and all of them one tensor to count
    # the steps in, which each then counts up.
    for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
    for adam in engine.optimizer.optimizer.state.values():
        adam["step"] = adam["step"].clone()
    together(partial(_load_buffers, engine, temporary / "universal"))
    on_first(partial(remove_folder, temporary))
    return state


def _check_names(folder: Path, known: set[str]) -> None:
    """Refuse names that are not the model's: the conversion makes paths of them."""
    for file in sorted(folder.glob("*.pt")):
        content = checkpoint_files.load_structure(file)
        if fnmatch(file.name, "layer_*_expert_*") or any(content.get(key) for key in EXPERT_KEYS):
            raise ValueError(f"{file.name} is of a mixture of experts, whose names cannot be checked")
        groups = [content.get("module", {}), *(content.get("param_shapes") or [])]
        groups += content.get("optimizer_state_dict", {}).get("param_slice_mappings", [])
        unknown = {str(name) for group in groups for name in group} - known
        if unknown:
            raise ValueError(f"the model has no {min(unknown)!r}")


def _convert(folder: Path, temporary: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(folder),
        output_folder=str(temporary / "universal"),  # a note of the newest is written beside it
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        remove_folder(temporary)
        with quiet_stdout(), redirect_stderr(StringIO()), checkpoint_files.tensors_only():  # it has a progress bar
            ds_to_universal.main(options)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # The file's own structure has been checked: what torch.save says here is of the disk.
        if isinstance(error, OSError | RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise DiskError(
                f"checkpoint {folder} is of another number of processes, and cannot be converted in {temporary} "
                f"({' '.join(str(error).split())[:200]}); the checkpoint is as it was"
            ) from error
        raise


def _load_buffers(engine: Any, folder: Path) -> None:
    """Such as the state of a loss: DeepSpeed leaves them out."""
    file = sorted(folder.glob("*model_states.pt"))[0]
    saved = checkpoint_files.load_structure(file)
    buffers = dict(engine.module.named_buffers())
    for name in saved["buffer_names"]:
        buffers[name].copy_(saved["module"][name])
