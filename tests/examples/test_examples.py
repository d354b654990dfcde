"""What the examples claim: the same training in every framework, a loss that falls, memory that is not held."""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib import import_module

import pytest
from example_settings import GIANT, SHORT

pytest.importorskip("transformers", reason="pip install 'robustloss[train]'")


def assert_learns(history):
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the policy is its own reference
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["loss"] < 0.6
    assert history[-1]["rewards/margins"] > 0.5


def test_the_plain_loop_learns_and_its_worst_case_is_of_fewer_and_fewer_pairs(plain):
    assert_learns(plain)
    assert plain[0]["tilt/effective_sample_size"] == pytest.approx(16, rel=1e-5)
    assert plain[-1]["tilt/effective_sample_size"] < 15.5


def test_four_microbatches_are_one_giant_batch(run, plain, assert_same):
    assert_same(run("plain_pytorch", SHORT), plain)


def test_a_model_and_data_from_files_are_those_that_were_written(run, plain, tmp_path, assert_same):
    tiny = import_module("tiny")
    model, tokenizer, rows = tiny.load(None, None)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same(run("plain_pytorch", [*GIANT, "--model", tmp_path, "--data", data]), plain)


def test_a_batch_that_its_microbatches_do_not_make_up_is_refused(run):
    with pytest.raises(SystemExit, match="--batch 10 is no multiple of --microbatch 4 x 1 processes"):
        run("plain_pytorch", ["--batch", 10, "--microbatch", 4])


@pytest.mark.parametrize("arguments", [GIANT, SHORT], ids=["automatic", "manual"])
def test_lightning_trains_as_the_plain_loop_in_either_optimisation(run, plain, arguments, assert_same):
    pytest.importorskip("lightning", reason="pip install lightning")
    assert_same(run("lightning_module", arguments), plain)


def test_deepspeed_trains_as_the_plain_loop(run, plain, assert_same):
    pytest.importorskip("deepspeed", reason="pip install 'robustloss[train]'")
    assert_same(run("deepspeed_loop", [*SHORT, "--zero-stage", "0"]), plain)


@pytest.fixture(scope="module")
def trainers(run):
    """Trainer's history of one giant batch a step; its sampler is another than the plain loop's."""
    return run("transformers_trainer", GIANT)


def test_trainer_learns_and_four_microbatches_are_one_giant_batch(run, trainers, assert_same):
    assert_learns(trainers)
    assert_same(run("transformers_trainer", SHORT), trainers)


def test_trl_dpo_is_the_same_training_as_ones_own_trainer(run, trainers, assert_same):
    pytest.importorskip("trl", reason="pip install 'robustloss[trl]'")
    assert_same(run("trl_dpo", SHORT), trainers)


@pytest.mark.parametrize(("loss", "first"), [("aot_unpaired", math.log(2)), ("kto", 0.5)])
def test_trl_kto_learns_and_four_microbatches_are_one_giant_batch(run, loss, first, assert_same):
    pytest.importorskip("trl", reason="pip install 'robustloss[trl]'")
    whole = run("trl_kto", [*GIANT, "--loss", loss])
    assert whole[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert whole[-1]["loss"] < 0.9 * first
    assert whole[-1]["rewards/margins"] > 0.4
    assert_same(run("trl_kto", [*SHORT, "--loss", loss]), whole)


def test_lora_learns_without_ever_holding_the_logits(run):
    pytest.importorskip("peft", reason="pip install 'robustloss[train]'")
    result = run("lora_long_vocabulary", ["--steps", 4, "--batch", 4])
    assert result["history"][0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert result["history"][-1]["rewards/margins"] > 0.02
    lean, through_logits = result["compared"].values()
    assert lean["gradient_norm"] == pytest.approx(through_logits["gradient_norm"], rel=1e-4)
    assert lean["gradient_norm"] > 0
    if not math.isnan(lean["memory"]):
        assert through_logits["memory"] > 0.9 * result["logits"]
        assert lean["memory"] < 0.5 * result["logits"]


def test_the_worst_case_is_made_of_the_minority(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    result = import_module("quantiles").main(["--output", str(tmp_path)])
    worst, groups = result["worst"], [row["group"] for row in result["rows"]]
    share = Counter(groups)["brief"] / len(groups)
    heaviest = Counter(groups[i] for i in worst.top(Counter(groups)["brief"]).tolist())
    assert share < 0.2
    assert heaviest["brief"] > 0.7 * heaviest.total()

    assert worst.kl == pytest.approx(0.5, rel=1e-4)
    assert float(worst.weights.sum()) == pytest.approx(1)
    assert worst.value > 2 * float(result["losses"].mean())
    lines = [json.loads(line) for line in (tmp_path / "worst_case.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == worst.top(len(groups)).tolist()
    assert lines[0]["text"] == result["rows"][lines[0]["index"]]["prompt"]

    chosen, rejected = (sorted(rewards.tolist()) for rewards in result["rewards"])
    short = [max(0.0, v + 1 - u) for u, v in zip(chosen, rejected, strict=True)]
    assert 0 < result["short"].area.estimate < 0.5
    assert result["short"].area.estimate == pytest.approx(sum(s > 0 for s in short) / len(short))
    assert result["short"].w1.estimate == pytest.approx(sum(short) / len(short), rel=1e-5)
    assert (tmp_path / "quantiles.png").read_bytes().startswith(b"\x89PNG")
