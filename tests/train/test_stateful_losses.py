"""Runs with the whole family of losses: they train, and a loss's state is part of a checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_state_worker import cut_back
from tiny_models import byte_tokenizer, pair_rows, write_rows

from robustloss.losses import LOSSES
from robustloss.train import data
from robustloss.train.checkpoint import completed_checkpoints
from robustloss.train.config import InputError, load_config
from robustloss.train.loop import run

pytestmark = pytest.mark.usefixtures("without_report")

FAMILY = {
    "dr_dpo": {"beta": 0.1, "beta_prime": 1.0},
    "tv_dpo": {"beta": 0.1, "rho": 0.2},
    "chi_po": {"beta": 0.1, "max_reward": 20.0},
    "beta_dpo": {"beta": 0.1, "alpha": 0.1},
    "group_dro": {"beta": 0.1, "groups": 3, "step_size": 0.5},
}


def grouped_rows(count: int = 12) -> list[dict]:
    return [{**row, "group": index % 3} for index, row in enumerate(pair_rows(count))]


@pytest.fixture
def grouped(tmp_path) -> str:
    return write_rows(tmp_path / "grouped.jsonl", grouped_rows())


@pytest.fixture
def settings(tiny, tmp_path, grouped):
    """The tiny settings with a loss of the family; group_dro gets data with groups."""

    def make(name: str, loss: str, **changes) -> dict:
        if loss == "group_dro":
            changes = {"data": {"train": grouped, "eval": grouped}, **changes}
        return tiny.settings(tmp_path / name, loss={"name": loss, **FAMILY[loss]}, **changes)

    return make


def metrics_of(run_dir: Path, split: str) -> list[dict]:
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in measured} for row in rows if row["split"] == split]


@pytest.mark.parametrize("loss", FAMILY)
def test_every_loss_of_the_family_trains_from_its_name_in_a_config(settings, loss):
    run_dir = run(load_config(None, base=settings("run", loss, max_steps=8, batch={"effective_batch": 6})))
    before, after = metrics_of(run_dir, "eval")
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert after["loss"] < before["loss"] - 0.02
    assert after["rewards/margins"] > before["rewards/margins"] + 0.05
    trained = metrics_of(run_dir, "train")[-1]
    if loss == "beta_dpo":
        assert trained["beta_dpo/margin_mean"] > 0
    if loss == "group_dro":
        assert sum(trained[f"group_dro/weight_{g}"] for g in range(3)) == pytest.approx(1, abs=1e-6)
        assert trained["group_dro/weight_0"] != pytest.approx(1 / 3, abs=1e-4)
    # The model alone is what transformers will load.
    assert not [name for name in load_file(run_dir / "model" / "model.safetensors") if "loss" in name]


@pytest.mark.parametrize(
    ("loss", "zero_stage", "precision"),
    [("beta_dpo", 0, "fp32"), ("group_dro", 1, "bf16"), ("beta_dpo", 2, "bf16"), ("group_dro", 3, "fp32")],
)
def test_a_state_is_restored_with_its_checkpoint_to_the_bit(settings, tmp_path, loss, zero_stage, precision):
    options = {"zero_stage": zero_stage, "precision": precision, "max_steps": 6, "save_every": 3, "eval_every": 2}
    whole = run(load_config(None, base=settings("whole", loss, **options)))
    cut = cut_back(whole, tmp_path / "cut")
    resumed = run(load_config(None, base=settings("cut", loss, **options)))
    assert resumed == cut
    for split in ("train", "eval"):
        assert metrics_of(resumed, split) == metrics_of(whole, split)
    model = Path("model") / "model.safetensors"
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()

    # What was saved is the state, in its own precision, after three steps of one microbatch.
    (file, *_) = (completed_checkpoints(whole / "checkpoints")[0]).glob("*model_states.pt")
    saved = torch.load(file, weights_only=False)["module"]
    state = {name: value for name, value in saved.items() if name.startswith("loss.")}
    expected = LOSSES[loss](**FAMILY[loss]).state_dict()
    assert {name.removeprefix("loss.") for name in state} == set(expected)
    assert all(value.dtype == expected[name.removeprefix("loss.")].dtype for name, value in state.items())
    if loss == "beta_dpo":
        assert state["loss.batches"] == 3


@pytest.mark.distributed
def test_two_processes_share_one_state_and_resume_it_to_the_bit(settings, tmp_path):
    options = {"max_steps": 4, "save_every": 2, "batch": {"effective_batch": 4, "microbatch": 2}}
    stages = {"beta_dpo": 3, "group_dro": 1}
    for loss, zero_stage in stages.items():
        (tmp_path / f"{loss}.json").write_text(json.dumps(settings(loss, loss, zero_stage=zero_stage, **options)))
    worker = Path(__file__).with_name("shared_state_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [sys.executable, *launcher, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    model = Path("model") / "model.safetensors"
    for loss in stages:
        whole, cut = tmp_path / loss, tmp_path / f"{loss}-cut"
        assert "going on from step 2 of 4" in finished.stdout
        assert metrics_of(cut, "train") == metrics_of(whole, "train")
        assert (cut / model).read_bytes() == (whole / model).read_bytes()


def test_evaluation_leaves_the_state_alone(settings):
    """A run that evaluates at every step trains the same model as one that does not."""
    runs = [
        run(load_config(None, base=settings(f"every{eval_every}", "beta_dpo", max_steps=4, eval_every=eval_every)))
        for eval_every in (1, 4)
    ]
    assert metrics_of(runs[0], "train") == metrics_of(runs[1], "train")


def test_another_grouping_is_other_data(settings, tmp_path):
    options = {"max_steps": 4, "save_every": 2}
    whole = run(load_config(None, base=settings("run", "group_dro", **options)))
    shutil.rmtree(whole / "model")
    rows = grouped_rows()
    rows[0]["group"] = 2
    write_rows(tmp_path / "grouped.jsonl", rows)
    with pytest.raises(InputError, match=r"data\.train or data\.eval has changed"):
        run(load_config(None, base=settings("run", "group_dro", **options)))


@pytest.mark.parametrize(
    ("group", "got"),
    [(3, "int 3"), (-1, "int -1"), (1.0, "float 1.0"), (None, "NoneType None"), ("red", "str 'red'"), (True, "bool")],
)
def test_a_group_that_is_none_is_told_by_its_line(settings, tmp_path, group, got):
    rows = grouped_rows()
    rows[4]["group"] = group
    write_rows(tmp_path / "grouped.jsonl", rows)
    message = rf"grouped.jsonl:5: column 'group': got {got}.*, want an integer from 0 to 2 \(loss.groups is 3\)"
    with pytest.raises(InputError, match=message):
        run(load_config(None, base=settings("run", "group_dro")))


def test_groups_are_read_only_where_they_are_asked_for():
    options = {"tokenizer": byte_tokenizer(), "kind": "preference", "max_length": 64, "source": "test"}
    rows = [{**row, "group": "of no use"} for row in pair_rows(3)]
    plain = data.tokenize_rows(rows, **options)
    assert "group" not in data.Collator(256, "preference")(list(enumerate(plain)))
    from_csv = data.tokenize_rows([{**row, "group": "1"} for row in rows], groups=2, **options)
    batch = data.Collator(256, "preference")(list(enumerate(from_csv)))
    assert batch["group"].tolist() == [1, 1, 1]
    assert batch["group"].dtype == torch.int64
    assert data.fingerprint(plain) != data.fingerprint(from_csv)
