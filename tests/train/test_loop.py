"""Whole runs of a second or two, in this process."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import pair_rows, unpaired_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from robustloss import cli
from robustloss.train.checkpoint import completed_checkpoints
from robustloss.train.config import InputError, load_config
from robustloss.train.engine import learning_rate_factor
from robustloss.train.evaluation import evaluate
from robustloss.train.inputs import BatchOrder
from robustloss.train.loop import run
from robustloss.train.loss_module import LossModule, loss_arguments
from robustloss.train.reference_cache import ReferenceCache

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.fixture
def train(tiny, tmp_path):
    """Train with the tiny settings and some changes; returns the run's folder."""

    def call(name="run", **changes) -> Path:
        return run(load_config(None, base=tiny.settings(tmp_path / name, **changes)))

    return call


def metrics_of(run_dir, split):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def weights_of(run_dir):
    return (run_dir / "model" / "model.safetensors").read_bytes()


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_lowers_the_loss_from_ln_2_and_leaves_a_model_that_transformers_loads(train, tiny):
    run_dir = train(max_steps=6)
    before, after = metrics_of(run_dir, "eval")
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics_of(run_dir, "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["loss"] < before["loss"] - 0.05
    assert after["rewards/margins"] > 0.1

    # The saved model is the one that was evaluated: its rewards are those of the last evaluation.
    evaluation = json.loads((run_dir / "evaluations" / "step_00000006.json").read_text())
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    reference = AutoModelForCausalLM.from_pretrained(tiny.gpt2).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    rewards = []
    for row in pair_rows():
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([prompt + tokenizer(row["chosen"]).input_ids + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        length = (labels != -100).sum()
        with torch.no_grad():
            nll = [model(input_ids=ids, labels=labels).loss * length for model in (policy, reference)]
        rewards.append(float(0.1 * (nll[1] - nll[0])))
    torch.testing.assert_close(torch.tensor(evaluation["chosen_rewards"]), torch.tensor(rewards), rtol=1e-4, atol=1e-4)


def gloo_threads() -> int:
    return sum("gloo" in task.read_text() for task in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize(("learning_rate", "code"), [(1e-3, 0), (1e30, 2)], ids=["finished", "not finite"])
def test_no_thread_of_the_process_group_outlives_the_command(tiny, tmp_path, learning_rate, code):
    """One that does aborts the exiting process now and then, with "terminate called without an active exception"."""
    optimizer = {"learning_rate": learning_rate, "gradient_clipping": 0, "warmup_ratio": 0}
    settings = tiny.settings(tmp_path / "run", optimizer=optimizer)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings))
    before = gloo_threads()
    assert cli.main(["train", "--config", str(config)]) == code
    assert gloo_threads() == before


def test_the_saved_config_keeps_the_models_own_dropout(train):
    # The model was trained without dropout (its first loss is ln 2 to the last digit), and is handed back as it came.
    run_dir = train()
    assert json.loads((run_dir / "model" / "config.json").read_text())["resid_pdrop"] == 0.1


def test_every_line_of_the_metrics_tells_what_the_report_needs(train):
    run_dir = train(loss={"name": "kldpo", "tau": 1.0})
    (first, *_), (_, last) = metrics_of(run_dir, "train"), metrics_of(run_dir, "eval")
    common = {"step", "split", "seconds", "loss", "rewards/chosen", "rewards/rejected", "tilt/effective_sample_size"}
    assert common <= last.keys()
    throughput = {"learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_bytes"}
    assert common | throughput <= first.keys()
    assert [row["step"] for row in metrics_of(run_dir, "train")] == [1, 2, 3, 4]
    evaluation = json.loads((run_dir / "evaluations" / "step_00000004.json").read_text())
    assert sum(evaluation["tilt_weights"]) == pytest.approx(1, abs=1e-5)
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 1


@pytest.mark.parametrize("loss", ["aot_unpaired", "kto"])
def test_unpaired_losses_train_and_tell_both_classes(train, tiny, loss):
    run_dir = train(loss={"name": loss}, data={"train": tiny.unpaired, "eval": tiny.unpaired}, max_steps=8)
    before, after = metrics_of(run_dir, "eval")
    assert after["loss"] < before["loss"]
    assert after["rewards/margins"] > before["rewards/margins"]
    evaluation = json.loads((run_dir / "evaluations" / "step_00000008.json").read_text())
    assert len(evaluation["desirable_rewards"]) == len(evaluation["undesirable_rewards"]) == 6


# ---- batches -------------------------------------------------------------------------------------------------------


def test_kto_trains_on_desirable_completions_alone(train, tmp_path):
    """Its reference point comes from mismatched pairs, so it needs no second class."""
    file = write_rows(tmp_path / "desirable.jsonl", [{**row, "label": True} for row in unpaired_rows()])
    run_dir = train(loss={"name": "kto"}, data={"train": file, "eval": file})
    before, after = metrics_of(run_dir, "eval")
    assert after["loss"] < before["loss"]
    assert after["rewards/chosen"] > 0


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "dpo"},
        {"name": "kldpo", "tau": 0.1},
        {"name": "kldpo", "rho": 0.1},
        {"name": "wdpo"},
        {"name": "wdpo", "penalty": "exact"},
        {"name": "aot_paired"},
        {"name": "aot_paired", "sort": "soft_l2"},
        {"name": "aot_unpaired"},
        {"name": "kto"},
        {"name": "beta_dpo", "filter_ratio": 0.0},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_accumulated_microbatches_train_as_one_batch(train, tiny, loss):
    data = tiny.unpaired if loss["name"] in ("aot_unpaired", "kto") else tiny.pairs
    options = {"loss": loss, "data": {"train": data, "eval": data}}
    whole = train("whole", batch={"effective_batch": 8, "microbatch": 8}, **options)
    parts = train("parts", batch={"effective_batch": 8, "microbatch": 3}, **options)  # of 2, 3 and 3
    for split in ("train", "eval"):
        for one, other in zip(metrics_of(whole, split), metrics_of(parts, split), strict=True):
            for name in ("loss", "rewards/margins", "logps/chosen"):
                assert other[name] == pytest.approx(one[name], rel=2e-4, abs=1e-5)


def test_each_epoch_holds_every_row_once_and_every_step_is_full():
    order = BatchOrder(rows=10, effective_batch=8, microbatch=2, processes=2, seed=3)
    steps = order.total_steps(epochs=4)
    assert steps == 5
    stream = [
        row
        for step in range(steps)
        for rank in range(2)
        for microstep in range(2)
        for row in order.microbatch_rows(step, rank, microstep)
    ]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew each time


@pytest.mark.parametrize(
    ("effective", "microbatch", "processes"), [(8, 2, 2), (7, 2, 2), (7, 3, 1), (9, 8, 4), (5, 1, 5)]
)
def test_a_step_holds_the_same_rows_however_it_is_dealt(effective, microbatch, processes):
    whole = BatchOrder(rows=10, effective_batch=effective, microbatch=effective, processes=1, seed=0)
    dealt = BatchOrder(rows=10, effective_batch=effective, microbatch=microbatch, processes=processes, seed=0)
    for step in range(4):
        parts = [
            dealt.microbatch_rows(step, rank, microstep)
            for rank in range(processes)
            for microstep in range(dealt.accumulation)
        ]
        assert list(itertools.chain(*parts)) == whole.microbatch_rows(step, 0, 0)
        sizes = {len(part) for part in parts}
        assert max(sizes) <= microbatch
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


def test_a_step_that_cannot_be_dealt_is_refused():
    with pytest.raises(InputError, match="effective_batch 3 cannot be dealt to 4 processes"):
        BatchOrder(rows=10, effective_batch=3, microbatch=8, processes=4, seed=0)
    with pytest.raises(InputError, match="use a multiple of 2"):
        BatchOrder(rows=10, effective_batch=5, microbatch=1, processes=2, seed=0)


def test_the_learning_rate_rises_then_falls_and_never_wastes_a_step():
    def factors(schedule):
        return [learning_rate_factor(step, total=10, warmup=0.2, schedule=schedule) for step in range(10)]

    assert factors("constant") == pytest.approx([1 / 3, 2 / 3] + [1] * 8)
    assert factors("linear") == pytest.approx([1 / 3, 2 / 3] + [1 - step / 8 for step in range(8)])
    assert factors("cosine")[2:] == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


# ---- references ----------------------------------------------------------------------------------------------------

LORA = {"lora": {"r": 4}, "optimizer": {"learning_rate": 1e-2}}


def test_live_and_base_references_equal_the_precomputed_one(train):
    expected = metrics_of(train("precomputed", **LORA), "eval")[-1]
    for mode in ("live", "base"):
        found = metrics_of(train(mode, reference={"mode": mode}, **LORA), "eval")[-1]
        for name in ("loss", "rewards/chosen", "rewards/margins"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


def test_lora_leaves_the_merged_model_and_the_adapter(train, tiny):
    import peft

    run_dir = train(**LORA)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny.gpt2).eval()
    adapted = peft.PeftModel.from_pretrained(base, run_dir / "model" / "adapter").eval()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
        with adapted.disable_adapter():
            assert (merged(ids).logits - adapted(ids).logits).abs().max() > 1e-3


def test_an_adapter_on_the_output_head_trains_the_same_when_its_parts_are_gathered(train, tiny):
    """ZeRO-3 holds parameters in parts, and the head's are used outside of their modules."""
    lora = {"lora": {"r": 4, "target_modules": ["lm_head", "q_proj"]}, "optimizer": {"learning_rate": 1e-2}}
    losses = []
    for stage in (0, 3):
        run_dir = train(f"stage{stage}", model={"name_or_path": tiny.llama}, zero_stage=stage, **lora)
        losses.append([row["loss"] for row in metrics_of(run_dir, "train")])
        adapter = load_file(run_dir / "model" / "adapter" / "adapter_model.safetensors")
        assert any("lm_head" in name and column.abs().max() > 0 for name, column in adapter.items() if "lora_B" in name)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_another_reference_model_gives_another_first_loss_and_no_warning(train, tiny, caplog):
    run_dir = train(reference={"name_or_path": tiny.llama})
    assert metrics_of(run_dir, "eval")[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert "ln 2" not in caplog.text


def test_the_reference_is_computed_once_for_all_runs_that_share_it(train, tmp_path, monkeypatch):
    cache = {"cache_dir": str(tmp_path / "cache")}
    first = train("first", reference=cache)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1  # train and held-out rows are the same here
    calls = []
    forward = LossModule.forward

    def counting(self, batch, output="loss", **options):
        calls.append(output)
        return forward(self, batch, output, **options)

    monkeypatch.setattr(LossModule, "forward", counting)
    second = train("second", reference=cache)
    assert weights_of(first) == weights_of(second)
    # Once for the check of the head, four steps, two evaluations of two batches; a reference would ask twice more.
    assert calls.count("logps") == 9
    train("other tokens", reference=cache, data={"max_length": 12})
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_a_first_loss_that_is_not_ln_2_is_explained(train, tmp_path, monkeypatch, caplog):
    cache = {"cache_dir": str(tmp_path / "cache")}
    train("first", reference=cache)
    assert "ln 2" not in caplog.text
    load = ReferenceCache.load

    def wrong(cache, settings):
        table = load(cache, settings)
        return {**table, "ref_chosen_logps": table["ref_chosen_logps"] + 5}

    monkeypatch.setattr(ReferenceCache, "load", wrong)
    train("second", reference=cache)
    assert caplog.text.count("should be ln 2 = 0.6931") == 1


# ---- one folder, one run -------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(train, capsys):
    run_dir = train()
    modified = (run_dir / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train(log_every=3)  # a key that does not touch the parameters
    assert "is finished already" in capsys.readouterr().out
    assert (run_dir / "model" / "model.safetensors").stat().st_mtime_ns == modified


def test_another_config_in_the_same_folder_names_the_keys_that_differ(train):
    train()
    with pytest.raises(InputError, match=r"another loss.beta \(there 0.1, here 0.3\), seed \(there 0, here 1\); use"):
        train(loss={"name": "dpo", "beta": 0.3}, seed=1)


def test_resume_false_starts_again(train):
    run_dir = train()
    before = weights_of(run_dir)
    train(resume=False, seed=1, max_steps=2)
    assert weights_of(run_dir) != before
    assert [row["step"] for row in metrics_of(run_dir, "train")] == [1, 2]
    assert not (run_dir / "evaluations" / "step_00000004.json").exists()


# ---- what goes wrong, and what is only odd -------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "step"), [(1, 2), (3, 4)])
def test_steps_in_a_row_that_are_not_finite_stop_the_run_and_name_the_rows(train, most, step):
    with pytest.raises(FloatingPointError, match=rf"^step {step}: policy_chosen_logps .*not finite.* rows \[.*\] of"):
        train(optimizer={"learning_rate": 1e30, "gradient_clipping": 0, "warmup_ratio": 0}, max_skipped=most)


@pytest.mark.parametrize("where", ["log-probabilities", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(train, monkeypatch, caplog, where):
    calls = []

    def poisoned(loss, logps, batch):
        arguments = loss_arguments(loss, logps, batch)
        calls.append(batch)
        if len(calls) == 3:
            policy = arguments["policy_chosen_logps"]
            if where == "gradient":
                policy.register_hook(lambda grad: grad * float("nan"))
            else:
                arguments["policy_chosen_logps"] = policy * float("nan")
        return arguments

    monkeypatch.setattr("robustloss.train.step.loss_arguments", poisoned)
    run_dir = train(loss={"name": "beta_dpo", "filter_ratio": 0.0})
    rows = metrics_of(run_dir, "train")
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(1, 0), (2, 0), (4, 1)]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert "step 3" in caplog.text


@pytest.mark.parametrize("penalty", ["central", "one_sided"])
def test_directions_are_checked_on_the_fly(train, penalty):
    rows = metrics_of(train(loss={"name": "wdpo", "penalty": penalty}, penalty={"check_every": 2}), "train")
    errors = {row["step"]: row["penalty/direction_error"] for row in rows if "penalty/direction_error" in row}
    assert list(errors) == [2, 4]
    assert all(0 < error < 0.01 for error in errors.values())


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(train, monkeypatch, capsys):
    whole = train("whole")

    def asked(loss, logps, batch):
        calls.append(batch)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_arguments(loss, logps, batch)

    calls = []
    monkeypatch.setattr("robustloss.train.step.loss_arguments", asked)
    stopped = train("stopped")
    assert "2 step(s) before its end; the same command goes on" in capsys.readouterr().out
    assert not (stopped / "model").exists()
    assert [folder.name for folder in completed_checkpoints(stopped / "checkpoints")] == ["step_00000002"]
    assert train("stopped") == stopped
    assert weights_of(stopped) == weights_of(whole)
    assert [row["step"] for row in metrics_of(stopped, "train")] == [1, 2, 3, 4]


def test_the_best_model_and_its_checkpoint_are_kept(train, monkeypatch):
    constant = {"schedule": "constant", "warmup_ratio": 0.0}
    shorter = train("shorter", max_steps=2, optimizer=constant)
    losses = iter([0.1, 0.5, 0.2, 0.4, 0.3])  # before the first step, and after each

    def told(*arguments, **options):
        values, arrays = evaluate(*arguments, **options)
        return {**values, "loss": next(losses)}, arrays

    monkeypatch.setattr("robustloss.train.loop.evaluate", told)
    run_dir = train(eval_every=1, save_every=1, keep_checkpoints=1, optimizer=constant)
    kept = [folder.name for folder in completed_checkpoints(run_dir / "checkpoints")]
    assert kept == ["step_00000002", "step_00000003"]
    assert (run_dir / "best" / "model.safetensors").read_bytes() == weights_of(shorter) != weights_of(run_dir)


def test_a_sort_of_one_pair_warns_that_it_is_plain_dpo(train):
    with pytest.warns(UserWarning, match="plain DPO"):
        train(loss={"name": "aot_paired"}, batch={"effective_batch": 1}, max_steps=1)


def test_a_tilt_of_one_pair_warns_that_it_is_plain_dpo(train, caplog):
    train(loss={"name": "kldpo", "tau": 1.0}, batch={"effective_batch": 1}, max_steps=1)
    assert caplog.text.count("plain DPO") == 1


def test_without_held_out_rows_a_run_trains_all_the_same(train, tiny):
    run_dir = train(data={"eval": None, "eval_fraction": 0.0})
    assert metrics_of(run_dir, "eval") == []
    assert (run_dir / "model").is_dir()


def test_rows_held_out_are_not_trained_on(tiny, tmp_path):
    from robustloss.losses import DPOLoss
    from robustloss.train.inputs import load_inputs

    data = write_rows(tmp_path / "rows.jsonl", pair_rows())
    config = load_config(None, base=tiny.settings(tmp_path, data={"train": data, "eval": None, "eval_fraction": 0.25}))
    inputs = load_inputs(config, DPOLoss())
    prompts = {split: {bytes(example.prompt_ids) for example in inputs.examples[split]} for split in inputs.examples}
    assert len(prompts["eval"]) == 3
    assert len(prompts["train"]) == 9
    assert not prompts["train"] & prompts["eval"]
