"""The demonstration: made once, the same everywhere, and with a tail to care for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer

from robustloss.train.data import detect_kind, load_rows, tokenize_rows
from robustloss.train.demo import EVAL_PAIRS, MAX_LENGTH, TRAIN_PAIRS, VOCABULARY_SIZE, make_pairs, prepare_demo


def hashes(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, prepare_demo(folder, seed=0)


def test_the_same_seed_gives_the_same_bytes_in_another_process(demo, tmp_path):
    folder, _ = demo
    program = "import pathlib, sys; from robustloss.train import demo; demo.prepare_demo(pathlib.Path(sys.argv[1]), 0)"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment, capture_output=True)
    assert hashes(tmp_path / "demo") == hashes(folder / "demo")


def test_another_seed_gives_other_pairs():
    assert make_pairs(0) == make_pairs(0)
    assert make_pairs(0) != make_pairs(1)


def test_a_second_call_rewrites_nothing(demo):
    folder, settings = demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare_demo(folder, seed=0) == settings
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in folder.iterdir()] == ["demo"]


def test_a_folder_of_another_seed_is_refused(demo):
    folder, _ = demo
    with pytest.raises(ValueError, match="made with seed 0, got seed 1; choose another output_dir"):
        prepare_demo(folder, seed=1)


def test_what_a_killed_demonstration_left_is_no_hindrance_and_goes(tmp_path, monkeypatch):
    (tmp_path / "demo.tmp" / "model").mkdir(parents=True)
    (tmp_path / "demo.tmp" / "model" / "half").write_text("half")
    monkeypatch.setattr("robustloss.train.demo._save_model", lambda texts, folder, seed: folder.mkdir())
    prepare_demo(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert sorted(path.name for path in (tmp_path / "demo").rglob("*")) == [
        "eval.jsonl",
        "model",
        "seed.json",
        "train.jsonl",
    ]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr("robustloss.train.demo._save_model", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare_demo(tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_the_evaluation_pairs_are_clean_and_share_no_prompt_with_training(demo):
    _, settings = demo
    train, evaluation = (load_rows(settings["data"][name], name) for name in ("train", "eval"))
    assert (len(train), len(evaluation)) == (TRAIN_PAIRS, EVAL_PAIRS)
    prompts = [row["prompt"] for row in train + evaluation]
    assert len(set(prompts)) == len(prompts)
    shorter = {"everyday": "rejected", "brief": "chosen"}
    longer = {"everyday": "chosen", "brief": "rejected"}
    clean = [len(row[shorter[row["group"]]]) < len(row[longer[row["group"]]]) for row in evaluation]
    assert all(clean)
    for rows in (train, evaluation):
        assert 0.05 < sum(row["group"] == "brief" for row in rows) / len(rows) < 0.3


def test_the_model_is_small_and_loads_as_any_other(demo):
    _, settings = demo
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name_or_path"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["name_or_path"])
    assert model.num_parameters() < 1_000_000
    assert len(tokenizer) == model.config.vocab_size <= VOCABULARY_SIZE
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode(tokenizer("Grüße, how do I bake bread?").input_ids) == "Grüße, how do I bake bread?"


def test_no_row_of_the_demo_is_cut(demo, caplog):
    _, settings = demo
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name_or_path"])
    rows = load_rows(settings["data"]["train"], "train")
    assert detect_kind(rows, "train") == "preference"
    tokenize_rows(rows, tokenizer, kind="preference", max_length=MAX_LENGTH, source="train")
    assert not caplog.records


def test_the_settings_are_a_valid_configuration(demo):
    config = pytest.importorskip("robustloss.train.config")
    _, settings = demo
    assert config.load_config(None, base=settings).loss["name"] == "kldpo"
