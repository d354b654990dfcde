"""Checkpoints are whole or not there, run nothing, and do not mind how many processes go on from them."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kills import Killed, kill_at
from safetensors.torch import load_file
from shared_state_worker import cut_back

from robustloss import _files
from robustloss._files import recover_folder, replace_file, replace_folder
from robustloss.train import checkpoint, checkpoint_files, distributed
from robustloss.train.checkpoint import completed_checkpoints, load_checkpoint, remove_unfinished, save_checkpoint
from robustloss.train.config import DiskError, InputError, load_config
from robustloss.train.loop import run

pytestmark = pytest.mark.usefixtures("without_report")
STAGES = (0, 1, 2, 3)


class Engine:
    """As much of DeepSpeed's engine as a checkpoint needs: one file, with the state of the run and a tensor."""

    checkpoint_engine = None

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        self.checkpoint_engine.save({**client_state, "weights": torch.arange(100.0)}, f"{folder}/{tag}/states.pt")

    def load_checkpoint(self, folder, tag):
        return tag, torch.load(f"{folder}/{tag}/states.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone():
    """A process group of this process."""
    _, started = distributed.start()
    yield
    if started:
        distributed.stop()


@pytest.fixture
def engine(alone):
    return Engine()


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in completed_checkpoints(folder)]


def test_a_kill_at_any_point_leaves_the_old_checkpoint_or_the_new_one(engine, tmp_path):
    left = set()
    for count in range(1000):
        folder = tmp_path / str(count)
        save_checkpoint(engine, folder, 1, {"value": 1}, keep=1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(monkeypatch, count)
            try:
                save_checkpoint(engine, folder, 2, {"value": 2}, keep=1)
                killed = False
            except Killed:
                killed = True
        remove_unfinished(folder)
        assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in steps(folder)]
        state = load_checkpoint(engine, folder, seed=0)
        assert state["value"] == state["step"] == steps(folder)[-1]
        left.add(tuple(steps(folder)))
        if not killed:
            break
    assert not killed
    assert left == {(1,), (1, 2), (2,)}


def test_a_kill_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path):
    left = set()
    for count in range(100):
        folder, new = tmp_path / f"{count}", tmp_path / f"{count}.tmp"
        for path, text in ((folder, "old"), (new, "new")):
            path.mkdir()
            (path / "file").write_text(text)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(monkeypatch, count)
            try:
                replace_folder(new, folder)
                killed = False
            except Killed:
                killed = True
        recover_folder(folder)
        left.add((folder / "file").read_text())
        assert not (tmp_path / f"{count}.old").exists()
        if not killed:
            break
    assert not killed
    assert left == {"old", "new"}


def test_a_folder_that_cannot_be_replaced_is_back_at_its_place(tmp_path, monkeypatch):
    folder, new = tmp_path / "folder", tmp_path / "folder.tmp"
    for path in (folder, new):
        path.mkdir()
        (path / path.name).write_text("")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, to: full() if old == new else replace(old, to))
    with pytest.raises(OSError, match="No space left"):
        replace_folder(new, folder)
    assert [path.name for path in folder.iterdir()] == ["folder"]
    assert not (tmp_path / "folder.old").exists()


def test_what_is_renamed_is_on_the_disk_before(engine, tmp_path, monkeypatch):
    """Every file and folder of a checkpoint is synced before it gets its name, and the folder around it after that."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    save_checkpoint(engine, tmp_path, 1, {}, keep=1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    temporary = tmp_path / "step_00000001.tmp"
    assert {str(temporary), str(temporary / "COMPLETED"), str(temporary / "states.pt")} <= set(before)
    assert after == [str(tmp_path)]

    events.clear()
    replace_file(tmp_path / "file", "text")
    assert events[1:] == ["rename", str(tmp_path)]
    assert Path(events[0]).parent == tmp_path


def test_a_superseded_checkpoint_has_lost_its_name_on_the_disk_before_it_is_removed(engine, tmp_path, monkeypatch):
    save_checkpoint(engine, tmp_path, 1, {}, keep=1)
    events, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append(Path(paths[1]).name), replace(*paths)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (events.append(f"remove {path.name}"), rmtree(path)))
    save_checkpoint(engine, tmp_path, 2, {}, keep=1)
    assert events[-3:] == ["step_00000001.tmp", str(tmp_path), "remove step_00000001.tmp"]


def test_the_newest_and_the_best_are_kept(engine, tmp_path):
    losses = {10: 0.7, 20: 0.5, 30: None, 40: 0.5, 50: math.nan, 60: 0.6}
    for step, loss in losses.items():
        save_checkpoint(engine, tmp_path, step, {}, keep=2, held_out_loss=loss)
    assert steps(tmp_path) == [20, 50, 60]
    save_checkpoint(engine, tmp_path, 70, {}, keep=2, held_out_loss=0.4)
    assert steps(tmp_path) == [60, 70]


def test_a_step_that_is_saved_twice_is_replaced(engine, tmp_path):
    for value in (1, 2):
        save_checkpoint(engine, tmp_path, 10, {"value": value}, keep=2)
    assert steps(tmp_path) == [10]
    assert load_checkpoint(engine, tmp_path, seed=0)["value"] == 2


def test_the_state_comes_back_to_the_bit_and_the_generators_with_it(engine, tmp_path):
    import random

    import numpy as np

    def draw():
        return random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()  # noqa: NPY002

    state = {"best": 0.1 + 0.2, "lowest": math.inf, "list": [1, "a", {"b": None}], "tensor": torch.tensor([1 / 3])}
    draw()  # leaves half of a pair of normal numbers in python's generator and in numpy's
    save_checkpoint(engine, tmp_path, 3, state, keep=1)
    drawn = draw()
    restored = load_checkpoint(engine, tmp_path, seed=0)
    assert draw() == drawn
    assert restored == {**state, "step": 3}


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forbidden(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("module", "name", "failure", "reason"),
    [
        (os, "fsync", full, "No space left on device"),
        (os, "replace", full, "No space left on device"),
        (os, "mkdir", forbidden, "Permission denied"),
        (os, "replace", forbidden, "Permission denied"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_named_and_leaves_nothing(
    engine, tmp_path, monkeypatch, module, name, failure, reason
):
    save_checkpoint(engine, tmp_path, 1, {"value": 1}, keep=1)
    monkeypatch.setattr(module, name, failure)
    with pytest.raises(InputError, match=rf"checkpoint {tmp_path}/step_00000002 cannot be written \({reason}\)"):
        save_checkpoint(engine, tmp_path, 2, {}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_checkpoint(engine, tmp_path, seed=0)["value"] == 1


def test_a_disk_that_is_full_in_the_middle_of_a_file_is_told(engine, tmp_path):
    """By a device that is always full: torch.save writes to a file's name without saying why it could not."""
    files = checkpoint_files._DurableFiles()
    files.save({"weights": torch.zeros(100_000)}, "/dev/full")
    assert files.error.errno == errno.ENOSPC


def test_a_disk_that_is_full_anywhere_in_a_file_is_told(tmp_path):
    """By the limit to a file's size: behind the first tensors, torch.save has an error of its own for it."""
    state = {str(index): torch.full((3000,), float(index)) for index in range(40)}
    torch.save(state, tmp_path / "whole.pt")
    size = (tmp_path / "whole.pt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, *range(1, size, size // 20), size - 1):
        files = checkpoint_files._DurableFiles()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            files.save(state, str(tmp_path / "file.pt"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert isinstance(files.error, OSError)
        assert files.error.errno == errno.EFBIG


def test_whatever_fails_in_writing_is_raised_behind_deepspeed(engine, tmp_path, monkeypatch):
    """Raised within it, the other processes would wait for this one."""

    (tmp_path / "step_00000001").mkdir()

    def failing(*arguments, **options):
        raise MemoryError("no room")

    left = []
    save = Engine.save_checkpoint
    monkeypatch.setattr(Engine, "save_checkpoint", lambda *args, **named: (save(*args, **named), left.append(True)))
    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(MemoryError, match="no room"):
        checkpoint_files.write(engine, tmp_path / "step_00000001", {})
    assert left == [True]


def test_a_file_that_is_cut_short_anywhere_is_told_from_one_that_cannot_be_opened(tmp_path, monkeypatch):
    file = tmp_path / "file.pt"
    torch.save({"weights": torch.zeros(10_000)}, file)
    whole = file.read_bytes()
    for length in (0, 1, 4, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^file\.pt: "):
            checkpoint_files.load_structure(file)
    file.write_bytes(whole)

    def failing(*arguments, **options):
        raise RuntimeError(f"unable to mmap 40000 bytes from file <{file}>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(OSError, match="Cannot allocate memory") as raised:
        checkpoint_files.load_structure(file)
    assert raised.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    ("error", "told", "message"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), DiskError, "Input/output error"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), DiskError, "Too many open files"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), DiskError, "Permission denied"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), RuntimeError, "closed by peer"),
        (torch.distributed.DistNetworkError("the shape of things"), torch.distributed.DistNetworkError, "shape"),
        (torch.OutOfMemoryError("CUDA out of memory, max_split_size_mb"), torch.OutOfMemoryError, "memory"),
        (RuntimeError("Error(s) in loading state_dict for Model: size mismatch"), InputError, "remove that folder"),
        (KeyError("optimizer_state"), InputError, "remove that folder"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_checkpoint_is_to_be_removed_only_for_what_is_wrong_with_it(
    engine, tmp_path, monkeypatch, error, told, message
):
    save_checkpoint(engine, tmp_path, 1, {"value": 1}, keep=1)

    def failing(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "load_checkpoint", failing)
        with pytest.raises(told, match=message) as raised:
            load_checkpoint(engine, tmp_path, seed=0)
    assert type(raised.value) is told
    assert ("remove that folder" in str(raised.value)) == (told is InputError)
    assert load_checkpoint(engine, tmp_path, seed=0)["value"] == 1


@pytest.fixture
def of_two(tiny, tmp_path):
    """Settings of a run whose one checkpoint says that it is of two processes, so that it is converted."""
    settings = tiny.settings(tmp_path / "run", zero_stage=1, save_every=1, max_steps=2)
    run_dir = run(load_config(None, base=settings))
    shutil.rmtree(run_dir / "model")
    (newest,) = completed_checkpoints(run_dir / "checkpoints")
    marker = json.loads((newest / "COMPLETED").read_text())
    (newest / "COMPLETED").write_text(json.dumps({**marker, "processes": 2}))
    return settings, newest


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 470"),
    ],
    ids=["of the disk", "of torch.save"],
)
def test_a_conversion_without_room_leaves_the_checkpoint_and_nothing_else(of_two, monkeypatch, error):
    settings, newest = of_two

    def failing(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", failing)
        with pytest.raises(DiskError, match=rf"cannot be converted in {newest}\.universal\.tmp \(") as raised:
            run(load_config(None, base=settings))
    assert "remove that folder" not in str(raised.value)
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]
    run(load_config(None, base=settings))


@pytest.mark.parametrize("key", ["ds_autoep_layers", "autoep_layers", None])
def test_a_mixture_of_experts_is_refused_whose_names_would_become_paths(of_two, tmp_path, key):
    settings, newest = of_two
    file = newest / "mp_rank_00_model_states.pt"
    layers = [{"moe_layer_id": 0, "expert_key_prefix": "../../../../../away"}]
    if key:
        torch.save({**torch.load(file, weights_only=False), key: layers}, file)
    else:
        torch.save({"../../../../../away": torch.zeros(1)}, newest / "layer_0_expert_0_mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="is of a mixture of experts"):
        run(load_config(None, base=settings))
    assert not list(tmp_path.rglob("away*"))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stranger_s_checkpoint_is_refused_and_runs_nothing(tiny, tmp_path, stage):
    settings = tiny.settings(tmp_path / "run", zero_stage=stage, save_every=1, max_steps=2)
    run_dir = run(load_config(None, base=settings))
    shutil.rmtree(run_dir / "model")
    (newest,) = completed_checkpoints(run_dir / "checkpoints")
    exploded = tmp_path / "exploded"
    files = list(newest.glob("*.pt"))
    assert len(files) == (2 if stage else 1)
    for file in files:
        whole = file.read_bytes()
        content = torch.load(file, weights_only=False)
        torch.save({**content, "run": Bomb(exploded)}, file)
        with pytest.raises(InputError, match=rf"{newest} holds other things .* is not loaded; remove that folder"):
            run(load_config(None, base=settings))
        file.write_bytes(whole)
    assert not exploded.exists()
    assert run(load_config(None, base=settings)) == run_dir


def test_nothing_runs_even_where_the_code_that_loads_asks_for_it(tmp_path, monkeypatch):
    """As DeepSpeed does, and the environment may."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "file.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"file\.pt: "):  # not the archive that torch.save writes
        checkpoint_files.check(tmp_path)
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "file.pt")
    with checkpoint_files.tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_the_best_model_is_a_folder_of_its_own(tiny, tmp_path, monkeypatch, alone):
    from transformers import AutoModelForCausalLM

    from robustloss.train.config import build_loss
    from robustloss.train.engine import build_engine, load_tokenizer

    config = load_config(None, base=tiny.settings(tmp_path / "run"))
    engine, tokenizer = build_engine(config, build_loss(config.loss), 1, 1), load_tokenizer(config.model)
    tmp_path.joinpath("run").mkdir()
    weight = engine.module.model.lm_head.weight
    lowest = math.inf
    for loss in (0.7, 0.8, math.nan, 0.6, 0.6):
        torch.nn.init.constant_(weight, loss)
        lowest = checkpoint.save_best(engine, config, tokenizer, tmp_path / "run", loss, lowest)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best").lm_head.weight
        assert saved[0, 0].item() == pytest.approx(lowest)
    assert lowest == 0.6
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["best"]

    monkeypatch.setattr(_files, "sync", full)
    with pytest.raises(InputError, match=r"model folder .*best cannot be written \(No space left on device\)"):
        checkpoint.save_best(engine, config, tokenizer, tmp_path / "run", 0.1, lowest)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["best"]
    engine.destroy()


CELLS = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero1, bf16": {"zero_stage": 1, "precision": "bf16"},
    "zero2, bf16": {"zero_stage": 2, "precision": "bf16"},
    "zero2, LoRA": {"zero_stage": 2, "lora": {"r": 4, "dropout": 0.0}},
    "zero3": {"zero_stage": 3},
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Three steps of each cell on one process and on two, and the last of them again on the other number."""
    from robustloss.train import report

    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report, "write_report", lambda run_dir: run_dir / "report.html")
        every = {}
        for name, changes in CELLS.items():
            every[name] = tiny.settings(
                folder / "one" / name,
                loss={"name": "beta_dpo", "beta": 0.1},  # its state is one of buffers
                # Nearly plain gradients: Adam would blow rounding errors up where a gradient is zero.
                optimizer={"epsilon": 1e-3, "learning_rate": 3e-2, "weight_decay": 0.1, "schedule": "constant"},
                max_steps=3,  # the first has no margins for the loss to remember
                save_every=2,
                **changes,
            )
            (folder / f"{name}.json").write_text(json.dumps(every[name]))
            whole = run(load_config(None, base=every[name]))
            (folder / "one-cut").mkdir(exist_ok=True)
            cut_back(whole, folder / "one-cut" / name)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        finished = subprocess.run(
            [*launcher, str(Path(__file__).with_name("checkpoint_worker.py")), str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        (folder / "two-cut").mkdir()
        for name, settings in every.items():
            cut = cut_back(folder / "two" / name, folder / "two-cut" / name)
            run(load_config(None, base={**settings, "output_dir": str(cut)}))
    return folder


def train_rows(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("begun", ["one", "two"])
def test_another_number_of_processes_takes_the_same_next_step(runs, begun, name):
    """As the undisturbed run of as many processes as began it."""
    whole, resumed = (load_file(runs / kind / name / "model" / "model.safetensors") for kind in (begun, f"{begun}-cut"))
    tolerance = 2e-2 if "bf16" in name else 1e-5
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=tolerance, atol=tolerance)
    # No step is missing, none is told twice, and the loss's own state went on.
    rows = {kind: train_rows(runs / kind / name) for kind in (begun, f"{begun}-cut")}
    assert [row["step"] for row in rows[f"{begun}-cut"]] == [1, 2, 3]
    for state in ("beta_dpo/margin_mean", "beta_dpo/margin_std"):
        expected, got = (rows[kind][-1][state] for kind in (begun, f"{begun}-cut"))
        assert expected != 0
        assert got == pytest.approx(expected, rel=5e-2 if "bf16" in name else 1e-4)
    starts = [json.loads(line) for line in (runs / f"{begun}-cut" / name / "starts.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts] == ([1, 2] if begun == "one" else [2, 1])
    # The copies that were put together for it are gone.
    assert [path.name for path in (runs / f"{begun}-cut" / name / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.distributed
def test_one_process_without_room_ends_all_with_the_same_line(runs):
    said = [(runs / str(rank)).read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "step_00000002 cannot be written (No space left on device)" in said[0]
    assert not list((runs / "full" / "checkpoints").iterdir())


@pytest.mark.distributed
def test_names_that_would_lead_out_of_the_folder_are_refused(runs, tmp_path):
    """A conversion makes paths of the names in a checkpoint."""
    settings = json.loads((runs / "zero1.json").read_text())
    cut = cut_back(runs / "two" / "zero1", tmp_path / "cut")
    (newest,) = completed_checkpoints(cut / "checkpoints")
    file = newest / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["module"]["../../../../../away"] = torch.zeros(1)
    torch.save(content, file)
    with pytest.raises(InputError, match=r"step_00000002 cannot be read \(the model has no '\.\./"):
        run(load_config(None, base={**settings, "output_dir": str(cut)}))
    assert not list(tmp_path.rglob("away*"))


@pytest.mark.distributed
def test_a_step_of_another_size_is_another_run(runs):
    settings = json.loads((runs / "zero0.json").read_text()) | {"output_dir": str(runs / "two" / "zero0")}
    shutil.copytree(runs / "two" / "zero0", runs / "other")
    shutil.rmtree(runs / "other" / "model")
    with pytest.raises(InputError, match=r"another batch.effective_batch \(there 4, here 2\)"):
        run(load_config(None, base={**settings, "output_dir": str(runs / "other"), "batch": {"effective_batch": 2}}))
