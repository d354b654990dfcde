"""A run's folder: nothing in it that others need is lost, and no two runs are mixed in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil

import pytest
from kills import Killed, kill_at

from robustloss.train.checkpoint import completed_checkpoints
from robustloss.train.config import InputError, load_config
from robustloss.train.loop import run
from robustloss.train.output_dir import is_run, open_run, prepare_folder

pytestmark = pytest.mark.usefixtures("without_report")


def start(tiny, folder, **changes):
    return run(load_config(None, base=tiny.settings(folder, **changes)))


@pytest.fixture
def interrupted(tiny, tmp_path):
    """The folder of a run of four steps with checkpoints at one, two and three, that ended before its model."""
    folder = start(tiny, tmp_path / "run", save_every=1, keep_checkpoints=3)
    shutil.rmtree(folder / "model")
    return folder


def test_starting_again_deletes_what_a_run_wrote_and_nothing_else(tiny, interrupted):
    note = interrupted / "note.txt"
    note.write_text("mine")
    start(tiny, interrupted, save_every=0, resume=False)
    assert note.read_text() == "mine"
    assert not completed_checkpoints(interrupted / "checkpoints")
    assert (interrupted / "model" / "model.safetensors").is_file()


def test_starting_again_refuses_a_folder_that_is_no_run(tiny, tmp_path):
    kept = tmp_path / "home" / "model" / "weights"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"'model'.* no run"):
            start(tiny, tmp_path / "home", resume=resume)
    assert kept.read_text() == "mine"


def test_starting_again_refuses_to_delete_its_own_input(tiny, tmp_path):
    folder = start(tiny, tmp_path / "run")
    with pytest.raises(InputError, match=r"would delete model\.name_or_path"):
        start(tiny, folder, resume=False, model={"name_or_path": str(folder / "model")})
    assert (folder / "model" / "model.safetensors").is_file()


def test_a_refused_run_leaves_half_written_checkpoints_of_others(tiny, interrupted):
    half = interrupted / "checkpoints" / "step_00000009" / "file"
    half.parent.mkdir()
    half.write_text("half")
    with pytest.raises(InputError, match="another seed"):
        start(tiny, interrupted, seed=5)
    assert half.is_file()


def test_a_second_run_in_the_folder_is_refused_while_the_first_is_at_work(tiny, tmp_path):
    with prepare_folder(tmp_path / "run"), pytest.raises(InputError, match="another run is at work in it"):
        start(tiny, tmp_path / "run")
    start(tiny, tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_and_used(tiny, tmp_path, monkeypatch, caplog, number):
    def refusing(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    start(tiny, tmp_path / "run", max_steps=1)
    assert caplog.text.count("a second run in it cannot be kept out") == 1


def test_a_lock_that_fails_otherwise_is_one_line(tmp_path, monkeypatch):
    def refusing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refusing)
    with pytest.raises(InputError, match="cannot be used: Input/output error"):
        prepare_folder(tmp_path / "run")


@pytest.mark.parametrize("then", [True, False], ids=["then resumed", "then started again"])
@pytest.mark.parametrize("begun", ["new", "resumed", "started again"])
def test_a_start_that_is_killed_at_any_point_can_be_done_again(tiny, tmp_path, begun, then):
    def config(folder, resume):
        return load_config(None, base=tiny.settings(folder, resume=resume))

    for count in range(1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        if begun != "new":
            open_run(config(folder, resume=True), {})
            for name in ("best", "best.old", "model.tmp"):
                (folder / name).mkdir()
                (folder / name / "weights").write_text("")
            (folder / "metrics.jsonl").write_text("")
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(monkeypatch, count)
            try:
                open_run(config(folder, resume=begun != "started again"), {"start": 1})
                killed = False
            except Killed:
                killed = True
        open_run(config(folder, resume=then), {"start": 2})
        assert is_run(folder)
        assert json.loads((folder / "starts.jsonl").read_text().splitlines()[-1]) == {"start": 2}
        left = {path.name for path in folder.iterdir()} - {"config.yaml", "environment.json", "starts.jsonl"}
        if begun == "started again" and then:  # the kill may have come before anything was cleared
            assert left <= {"best", "metrics.jsonl"}
        else:
            assert left == ({"best", "metrics.jsonl"} if begun == "resumed" and then else set())
        if not killed:
            break
    assert not killed
    assert count > 5


def test_starting_again_does_not_bring_the_best_model_of_the_run_before_back(tiny, interrupted):
    for name in ("best", "model"):
        assert not (interrupted / name).exists()
        (interrupted / f"{name}.old").mkdir()  # as a kill between the two renames leaves it
    open_run(load_config(None, base=tiny.settings(interrupted, resume=False)), {})
    assert not list(interrupted.glob("best*"))
    assert not list(interrupted.glob("model*"))


def test_files_of_the_user_are_left_whatever_their_ending(tiny, interrupted):
    mine = [interrupted / "thesis.tmp", interrupted / "evaluations" / "notes.tmp"]
    for path in mine:
        path.write_text("mine")
    (interrupted / "folder.tmp").mkdir()
    left = ["starts.jsonl.host-1-aa.tmp", "report.html.host-1-aa.tmp", "evaluations/step_00000001.json.host-1-aa.tmp"]
    for name in left:
        (interrupted / name).write_text("half")
    start(tiny, interrupted, save_every=1, keep_checkpoints=3)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert (interrupted / "folder.tmp").is_dir()
    assert not any((interrupted / name).exists() for name in left)


def test_data_that_changed_under_their_path_are_not_gone_on_with(tiny, tmp_path):
    copy = tmp_path / "pairs.jsonl"
    shutil.copy(tiny.pairs, copy)
    changes = {"data": {"train": str(copy), "eval": tiny.pairs, "max_length": 64}, "save_every": 1}
    folder = start(tiny, tmp_path / "run", **changes)
    shutil.rmtree(folder / "model")
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join(reversed(lines)))
    with pytest.raises(InputError, match="run on other data"):
        start(tiny, folder, **changes)


def test_a_checkpoint_that_cannot_be_read_is_named(tiny, interrupted):
    newest = completed_checkpoints(interrupted / "checkpoints")[-1]
    for file in newest.glob("*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=rf"{newest.name} cannot be read.*the run goes on from the one before"):
        start(tiny, interrupted, save_every=1, keep_checkpoints=3)
    shutil.rmtree(newest)
    start(tiny, interrupted, save_every=1, keep_checkpoints=3)
    steps = [json.loads(line)["step"] for line in (interrupted / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 4]


def test_a_step_of_more_samples_than_there_are_says_so(tiny, tmp_path, caplog):
    start(tiny, tmp_path / "run", batch={"effective_batch": 500, "microbatch": 500}, max_steps=1)
    assert "a step takes 500 samples" in caplog.text


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir .* cannot be used"):
        start(tiny, tmp_path / name)
