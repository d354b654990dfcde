"""The reference's log-probabilities on disk: found by content, shared, whole, and the same to the bit after a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny_models import byte_tokenizer, pair_rows, save_tiny, tiny_gpt2, write_rows

from robustloss import _files
from robustloss.train import leftovers, reference_cache, references
from robustloss.train import model_identity as identities
from robustloss.train.config import DiskError, InputError, load_config
from robustloss.train.model_identity import model_identity
from robustloss.train.reference_cache import ReferenceCache, default_folder, digest_of, key_of

ROWS, BATCH = 15, 2  # eight batches, the last one of a single row; four parts


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    """A group of one, small parts, and a user's cache of its own."""
    monkeypatch.setenv("ROBUSTLOSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "PART_BATCHES", 2)
    monkeypatch.setattr(references, "PART_ROUNDS", 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def settings(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(ROWS))
    data = {"train": rows, "eval": None, "eval_fraction": 0.0}

    def of(name="run", **changes):
        return tiny.settings(tmp_path / name, **{"data": data, "batch": {"microbatch": BATCH}, **changes})

    return of


@pytest.fixture
def look_up(settings):
    """(the table, forwards it took) of a run with these changes."""
    from references_worker import looked_up

    def call(name="run", before_forward=lambda number: None, **changes):
        return looked_up(load_config(None, base=settings(name, **changes)), before_forward)

    return call


def tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if ".part-" not in path.name)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.part-*.safetensors"))


class Interrupted(Exception):
    pass


def interrupt_at(number):
    def interrupt(forward):
        if forward == number:
            raise Interrupted

    return interrupt


# ---- shared ---------------------------------------------------------------------------------------------------------


def test_runs_that_need_the_same_numbers_compute_them_once(look_up, tmp_path):
    table, forwards = look_up("first")
    assert forwards == 8
    again, forwards = look_up("second", loss={"name": "kldpo", "tau": 1.0}, optimizer={"learning_rate": 1.0}, seed=3)
    assert forwards == 0
    assert {name: column.tolist() for name, column in again.items()} == {
        name: column.tolist() for name, column in table.items()
    }
    assert len(tables(tmp_path / "cache" / "references")) == 1
    assert not (tmp_path / "first").exists()


def test_two_splits_of_the_same_rows_are_one_table(look_up, settings, tmp_path):
    rows = settings()["data"]["train"]
    assert look_up(data={"train": rows, "eval": rows})[1] == 8
    assert len(tables(tmp_path)) == 1


def test_what_changes_the_numbers_changes_the_table(look_up, settings, tmp_path, tiny, monkeypatch):
    rows = settings()["data"]
    changes = [
        {},
        {"precision": "bf16"},
        {"model": {"name_or_path": tiny.gpt2, "attn_implementation": "eager"}},
        {"model": {"name_or_path": tiny.llama}},
        {"reference": {"name_or_path": tiny.llama}},  # the same reference as above
        {"data": {**rows, "max_length": 12}},
        {"batch": {"microbatch": 4}},
    ]
    for change in changes:
        look_up(**change)
    assert len(tables(tmp_path)) == len(changes) - 1
    monkeypatch.setattr(references, "version", lambda package: f"another {package}")
    look_up()
    assert len(tables(tmp_path)) == len(changes)


def test_a_named_reference_is_loaded_only_where_its_table_is_missing(look_up, tiny, monkeypatch):
    first, _ = look_up(reference={"name_or_path": tiny.llama})

    def refuse(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(references, "build_reference", refuse)
    again, _ = look_up(reference={"name_or_path": tiny.llama})
    assert digest_of(again) == digest_of(first)
    with pytest.raises(AssertionError, match="loaded"):
        look_up(reference={"name_or_path": tiny.gpt2}, batch={"microbatch": 3})


def test_the_folder_is_the_users_unless_another_is_named(monkeypatch, tmp_path, settings):
    assert default_folder() == tmp_path / "cache" / "references"
    monkeypatch.delenv("ROBUSTLOSS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "robustloss" / "references"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "robustloss" / "references"
    config = load_config(None, base=settings(reference={"cache_dir": "~/own"}))
    assert ReferenceCache.of(config).folders == [tmp_path / "home" / "own"]


def test_writers_of_one_table_leave_it_whole_at_every_moment(tmp_path, caplog):
    settings = {"rows": 2000}
    table = {"ref_logps": torch.randn(2000)}
    caches = [ReferenceCache([tmp_path]) for _ in range(4)]
    caches[0].save(settings, table)

    def write_and_read(cache):
        for _ in range(5):
            cache.save_part(settings, torch.arange(1000), {"ref_logps": table["ref_logps"][:1000]})
            cache.save(settings, table)
            assert digest_of(cache.load(settings)) == digest_of(table)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_read, caches))
    assert [path.name for path in tmp_path.iterdir()] == [f"{key_of(settings)}.safetensors"]
    assert caplog.text == ""


# ---- which model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model_copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny.gpt2, tmp_path / "model"))


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read to be hashed."""
    names = []
    digest = identities._block_digest
    monkeypatch.setattr(identities, "_block_digest", lambda file, start: names.append(file.name) or digest(file, start))
    return names


def flip_a_bit(file: Path) -> None:
    """In place, with the size and the time of change that it had."""
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_one_bit_of_the_weights_is_another_model(model_copy, look_up, tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(identities, "SETTLED", 0.0)
    changes = {"model": {"name_or_path": str(model_copy)}}
    weights = model_copy / "model.safetensors"
    look_up(**changes)
    assert look_up(**changes)[1] == 0
    assert hashed == ["config.json", "model.safetensors"]  # the second run remembers
    before = weights.stat()
    flip_a_bit(weights)
    after = weights.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    assert look_up(**changes)[1] == 8
    assert hashed == ["config.json", "model.safetensors", "model.safetensors"]
    assert len(tables(tmp_path / "cache")) == 2


def test_a_model_is_its_content_and_not_its_place(tiny, model_copy, tmp_path):
    identity = model_identity(tiny.gpt2, tmp_path)
    (model_copy / "README.md").write_text("of no consequence")
    os.utime(model_copy / "model.safetensors")
    assert model_identity(str(model_copy), tmp_path) == identity


def test_a_file_that_has_only_just_changed_is_not_remembered(model_copy, tmp_path, hashed):
    model_identity(str(model_copy), tmp_path)
    model_identity(str(model_copy), tmp_path)
    assert hashed == ["config.json", "model.safetensors"] * 2


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": [1, 2, 3, 4, "short"]}'])
def test_a_memory_that_makes_no_sense_is_forgotten(model_copy, tmp_path, content):
    identity = model_identity(str(model_copy), tmp_path)
    (tmp_path / identities.MEMORY).write_text(content)
    assert model_identity(str(model_copy), tmp_path) == identity


def test_a_large_file_is_hashed_in_blocks_and_each_of_them_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(identities, "BLOCK", 1000)
    file, content = tmp_path / "model.safetensors", bytearray(os.urandom(4321))

    def digest():
        file.write_bytes(content)
        return identities.file_digests([file], tmp_path / "memory")[file.name]

    blocks = [content[start : start + 1000] for start in range(0, 4321, 1000)]
    assert digest() == hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()
    seen = {digest()}
    for position in (0, 999, 1000, 4320):
        content[position] ^= 1
        seen.add(digest())
    assert len(seen) == 5


def test_a_model_is_known_by_its_code_too(model_copy, tmp_path):
    known = [model_identity(str(model_copy), tmp_path)]
    for code in ("x = 1", "x = 2"):
        (model_copy / "modeling_own.py").write_text(code)
        known.append(model_identity(str(model_copy), tmp_path))
    assert all(known.count(identity) == 1 for identity in known)


def test_an_adapter_is_known_by_the_model_under_it(model_copy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_copy)}))
    before = model_identity(str(adapter), tmp_path)
    flip_a_bit(model_copy / "model.safetensors")
    assert model_identity(str(adapter), tmp_path) != before


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--owner--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        # The model's own code would have to be trusted and run before its config could be read.
        (snapshot / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
        (tmp_path / "models--owner--model" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--owner--model" / "refs" / "main").write_text(commit)
        assert model_identity("owner/model", tmp_path) == {"name": "owner/model", "commit": commit}


# ---- verified -------------------------------------------------------------------------------------------------------

SETTINGS = {"model": {"files": {"a": "b"}}, "rows": 5, "batch": 2}


@pytest.fixture
def kept(tmp_path):
    """(cache, file, table) of a table of five rows."""
    cache = ReferenceCache([tmp_path / "tables"])
    table = {"ref_chosen_logps": torch.randn(5), "ref_rejected_logps": torch.randn(5)}
    cache.save(SETTINGS, table)
    return cache, tmp_path / "tables" / f"{key_of(SETTINGS)}.safetensors", table


def test_no_changed_byte_of_a_file_changes_a_number_that_is_used(kept, caplog):
    cache, file, table = kept
    content = file.read_bytes()
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        caplog.clear()
        found = cache.load(SETTINGS)
        if found is None:
            refused += 1
            assert len(caplog.records) == 1
            assert caplog.text.count("computed again") == 1
        else:  # blanks that pad the header
            assert digest_of(found) == digest_of(table)
    assert refused >= len(content) - 8


def test_a_file_that_is_cut_short_is_refused(kept, caplog):
    cache, file, _ = kept
    content = file.read_bytes()
    for length in (*range(0, len(content), 37), len(content) - 1):
        file.write_bytes(content[:length])
        assert cache.load(SETTINGS) is None
    file.write_bytes(content + b"\0")
    assert cache.load(SETTINGS) is None


@pytest.mark.parametrize(
    ("changes", "columns", "told"),
    [
        ({"batch": 3}, torch.ones(5), "other settings"),
        ({}, torch.ones(4), "does not hold the 5 rows"),
        ({}, torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0]), "not finite"),
        ({}, torch.tensor([1.0, 2.0, -torch.inf, 4.0, 5.0]), "not finite"),
    ],
)
def test_a_file_whose_seal_is_right_and_whose_content_does_not_fit_is_refused(kept, caplog, changes, columns, told):
    cache, file, _ = kept
    written = {**SETTINGS, **changes}
    cache._write(file.name, {"ref_logps": columns}, written)
    assert cache.load(SETTINGS) is None
    assert len(caplog.records) == 1
    assert told in caplog.text


@pytest.mark.parametrize("damage", ["bit", "truncated", "unsealed", "empty"])
def test_a_damaged_table_is_computed_again_with_one_line(look_up, tmp_path, damage, caplog):
    expected, _ = look_up()
    (file,) = tables(tmp_path / "cache")
    content = file.read_bytes()
    damaged = {
        "bit": content[:-1] + bytes([content[-1] ^ 1]),
        "truncated": content[:-20],
        "unsealed": save({name: column + 1 for name, column in load_file(file).items()}),
        "empty": b"",
    }
    file.write_bytes(damaged[damage])
    found, forwards = look_up()
    assert forwards == 8
    assert digest_of(found) == digest_of(expected)
    assert file.read_bytes() == content
    assert len([record for record in caplog.records if "computed again" in record.message]) == 1


def test_rows_whose_log_probabilities_are_not_finite_are_named(tmp_path, look_up, caplog):
    model = tiny_gpt2(tied=False)
    with torch.no_grad():
        model.transformer.wte.weight[byte_tokenizer()("!").input_ids[0]] = torch.nan
    folder = save_tiny(tmp_path / "broken", model)
    bad = [index for index, row in enumerate(pair_rows(ROWS)) if "!" in row["chosen"]]
    assert 0 < len(bad) < ROWS
    with pytest.raises(FloatingPointError, match=re.escape(f"for the dataset's rows {bad}")):
        look_up(model={"name_or_path": folder})
    assert len(caplog.records) == 1  # at the first of them: the others may take hours
    assert tables(tmp_path / "cache") == []


# ---- resumed --------------------------------------------------------------------------------------------------------


def run_workers(tmp_path, processes=1, **job) -> list[int]:
    """Their exit codes."""
    from references_worker import __file__ as worker

    (tmp_path / "meeting").unlink(missing_ok=True)
    (tmp_path / "job.json").write_text(json.dumps({"folder": str(tmp_path), "processes": processes, **job}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(processes):
        command = [sys.executable, worker, str(tmp_path / "job.json"), str(rank)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    told = [process.communicate(timeout=120)[1] for process in running]
    codes = [process.returncode for process in running]
    assert "kill_at" in job or not any(codes), told[0][-4000:]
    return codes


def test_a_kill_in_the_middle_loses_a_part_at_most_and_changes_no_bit(look_up, settings, tmp_path):
    expected, _ = look_up()
    (file,) = tables(tmp_path / "cache")
    content = file.read_bytes()
    file.unlink()

    assert run_workers(tmp_path, settings=settings(), kill_at=6) == [-signal.SIGKILL]
    assert tables(tmp_path / "cache") == []
    assert len(parts(tmp_path / "cache")) == 2  # of two batches each; the fifth batch is lost with the sixth
    found, forwards = look_up()
    assert forwards == 4
    assert digest_of(found) == digest_of(expected)
    assert file.read_bytes() == content
    assert parts(tmp_path / "cache") == []


@pytest.mark.parametrize("number", range(1, 9))
def test_wherever_it_was_cut_the_table_is_the_same_file(look_up, tmp_path, number):
    look_up()
    (file,) = tables(tmp_path / "cache")
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(Interrupted):
        look_up(before_forward=interrupt_at(number))
    assert len(parts(tmp_path / "cache")) == (number - 1) // 2
    assert look_up()[1] == 8 - 2 * ((number - 1) // 2)
    assert file.read_bytes() == content


def test_a_kill_behind_the_last_part_leaves_nothing_to_compute(look_up, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceCache, "save", lambda *_: interrupt_at(0)(0))
        with pytest.raises(Interrupted):
            look_up()
    assert (len(tables(tmp_path)), len(parts(tmp_path))) == (0, 4)
    assert look_up()[1] == 0
    assert (len(tables(tmp_path)), len(parts(tmp_path))) == (1, 0)


@pytest.mark.parametrize("damage", ["bit", "other settings", "rows"])
def test_a_damaged_part_is_computed_again_and_the_others_are_used(look_up, tmp_path, damage, caplog):
    expected, _ = look_up()
    (file,) = tables(tmp_path / "cache")
    file.unlink()
    with pytest.raises(Interrupted):
        look_up(before_forward=interrupt_at(7))
    first, second, _ = parts(tmp_path / "cache")
    if damage == "bit":
        content = second.read_bytes()
        second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other settings":
        ReferenceCache([first.parent])._write(second.name, load_file(second), {"rows": ROWS})
    else:
        second.write_bytes(first.read_bytes())  # a whole part under a wrong name is a part all the same
    found, forwards = look_up()
    assert forwards == 4
    assert digest_of(found) == digest_of(expected)
    assert caplog.text.count("computed again") == (damage != "rows")


def test_what_killed_writers_left_goes_when_the_table_is_found(kept):
    cache, file, table = kept
    old, new = (file.with_name(f"{file.name}.host-1-{token}.tmp") for token in ("0123abcd", "4567cdef"))
    old.write_text("half")
    new.write_text("half")
    os.utime(old, (0, time.time() - 2 * leftovers.STALE))
    cache.save_part(SETTINGS, torch.arange(2), {name: column[:2] for name, column in table.items()})
    cache.load(SETTINGS)
    assert sorted(file.parent.iterdir()) == sorted([file, new])  # the new one's writer may be alive
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = file.with_name(f"{file.name}.{platform.node()}-{gone.pid}-4567cdef.tmp")
    here.write_text("half")
    file.unlink()
    assert cache.load(SETTINGS) is None  # nor need there be a table
    assert list(file.parent.iterdir()) == [new]


@pytest.mark.distributed
def test_two_processes_go_on_from_where_one_was_cut_with_the_first_ones_view(look_up, settings, tmp_path):
    """The second process has a disk of its own, where a table stands that looks right and is not."""
    expected, _ = look_up()
    (file,) = tables(tmp_path / "cache")
    content = file.read_bytes()
    other = tmp_path / "other" / "references"
    with safe_open(file, framework="pt") as opened:
        written = json.loads(opened.metadata()[reference_cache.SEAL])["settings"]
    ReferenceCache([other]).save(written, {name: column + 1 for name, column in load_file(file).items()})
    file.unlink()
    with pytest.raises(Interrupted):
        look_up(before_forward=interrupt_at(4))
    caches = [str(tmp_path / "cache"), str(tmp_path / "other")]
    run_workers(tmp_path, 2, settings=settings(), caches=caches)
    for rank in range(2):
        assert digest_of(load_file(tmp_path / f"rank{rank}.safetensors")) == digest_of(expected)
    assert file.read_bytes() == content
    assert parts(tmp_path / "cache") == []


@pytest.mark.distributed
def test_one_process_goes_on_from_where_two_were_killed(look_up, settings, tmp_path):
    look_up()
    (file,) = tables(tmp_path / "cache")
    content = file.read_bytes()
    file.unlink()
    assert run_workers(tmp_path, 2, settings=settings(), kill_at=3)[1] == -signal.SIGKILL
    assert len(parts(tmp_path / "cache")) == 2  # a batch of each process
    assert look_up()[1] == 4
    assert file.read_bytes() == content


# ---- folders that cannot be written ---------------------------------------------------------------------------------


def test_where_the_users_cache_cannot_be_written_the_runs_own_folder_is_taken(look_up, tmp_path, caplog, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    expected, _ = look_up()
    assert len(caplog.records) == 1
    assert str(tmp_path / "run" / "reference_cache") in caplog.text
    assert len(tables(tmp_path / "run" / "reference_cache")) == 1
    found, forwards = look_up()
    assert forwards == 0
    assert digest_of(found) == digest_of(expected)


def test_a_user_without_a_home_has_the_runs_own_folder(look_up, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("ROBUSTLOSS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    look_up()
    assert len(tables(tmp_path / "run" / "reference_cache")) == 1


def test_a_folder_that_was_asked_for_and_cannot_be_made_is_named(look_up, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be kept in '.*/file': .*; make it writable, or set") as raised:
        look_up(reference={"cache_dir": str(tmp_path / "file")})
    assert not isinstance(raised.value, DiskError)
    assert "\n" not in str(raised.value)


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full once `left` files are written below a folder: {"left": 2, "folder": path}."""
    state = {"left": None, "folder": ""}
    replace_file = reference_cache.replace_file

    def write(path, content):
        if state["left"] is not None and str(path).startswith(str(state["folder"])):
            if state["left"] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            state["left"] -= 1
        replace_file(path, content)

    monkeypatch.setattr(reference_cache, "replace_file", write)
    return state


def test_a_disk_that_fills_up_is_told_in_one_line_and_gone_on_from(look_up, tmp_path, disk):
    cache = {"cache_dir": str(tmp_path / "own")}
    disk.update(left=2, folder=tmp_path / "own")
    with pytest.raises(DiskError, match=r"cannot be kept in .*: No space left on device") as raised:
        look_up(reference=cache)
    assert "\n" not in str(raised.value)
    assert len(parts(tmp_path / "own")) == 2
    assert tables(tmp_path / "own") == []
    disk["left"] = None
    assert look_up(reference=cache)[1] == 4


def test_a_users_cache_that_fills_up_gives_way_to_the_runs_own_folder(look_up, tmp_path, disk, caplog):
    disk.update(left=2, folder=tmp_path / "cache")
    table, forwards = look_up()
    assert forwards == 8
    assert len(caplog.records) == 1
    (file,) = tables(tmp_path)
    assert file.is_relative_to(tmp_path / "run" / "reference_cache")
    assert digest_of(load_file(file)) == digest_of(table)
    assert parts(tmp_path) == []


def test_a_table_in_a_folder_that_cannot_be_written_is_used(look_up, tmp_path, disk, caplog):
    expected, _ = look_up(reference={"cache_dir": str(tmp_path / "own")})
    disk.update(left=0, folder=tmp_path)
    found, forwards = look_up(reference={"cache_dir": str(tmp_path / "own")})
    assert forwards == 0
    assert digest_of(found) == digest_of(expected)
    assert caplog.text == ""


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    file = tmp_path / "file"
    _files.replace_file(file, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _files.replace_file(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


# ---- told -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(look_up, monkeypatch, capsys, terminal):
    bar = references.tqdm
    monkeypatch.setattr(references, "tqdm", lambda **options: bar(**{**options, "delay": 0}))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    look_up()
    shown = capsys.readouterr().err
    assert ("reference of train: 100%" in shown and f"{ROWS}/{ROWS}" in shown) == terminal
    assert ("reference of" in shown) == terminal
