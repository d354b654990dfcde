"""Whole runs of a second or two, in this process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import pair_rows, unpaired_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from robustloss.train import cli, references
from robustloss.train.config import InputError, load_config
from robustloss.train.engine import learning_rate_factor
from robustloss.train.inputs import BatchOrder
from robustloss.train.loop import run
from robustloss.train.loss_module import LossModule

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


def test_accumulated_microbatches_train_as_one_batch(train):
    whole = metrics_of(train("whole", batch={"microbatch": 8}), "eval")[-1]
    parts = metrics_of(train("parts", batch={"microbatch": 2, "accumulation": 4}), "eval")[-1]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_each_epoch_holds_every_row_once_and_every_step_is_full():
    order = BatchOrder(rows=10, microbatch=2, accumulation=2, processes=2, seed=3)
    steps = order.total_steps(epochs=4)
    assert steps == 5
    stream = [
        row
        for step in range(steps)
        for microstep in range(2)
        for rank in range(2)
        for row in order.microbatch_rows(step, microstep, rank)
    ]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew each time


def test_a_step_holds_the_same_rows_however_it_is_divided():
    whole = BatchOrder(rows=10, microbatch=8, accumulation=1, processes=1, seed=0)
    divided = BatchOrder(rows=10, microbatch=2, accumulation=2, processes=2, seed=0)
    for step in range(4):
        parts = [
            row for microstep in range(2) for rank in range(2) for row in divided.microbatch_rows(step, microstep, rank)
        ]
        assert parts == whole.microbatch_rows(step, 0, 0)


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
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 1  # train and held-out rows are the same here
    calls = []
    forward = LossModule.forward
    monkeypatch.setattr(
        LossModule, "forward", lambda self, batch, output="loss": calls.append(output) or forward(self, batch, output)
    )
    second = train("second", reference=cache)
    assert weights_of(first) == weights_of(second)
    # The check of the head asks once, and two evaluations of three batches; a reference would ask three times more.
    assert calls.count("logps") == 7
    train("other tokens", reference=cache, data={"max_length": 12})
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_reference_is_computed_anew_where_its_numbers_would_be_others(train, tmp_path, monkeypatch):
    # By default wdpo computes attention in another way than dpo does; max_steps and the like change nothing.
    cache = {"cache_dir": str(tmp_path / "cache")}
    train("dpo", reference=cache, max_steps=1)
    train("wdpo", reference=cache, max_steps=1, loss={"name": "wdpo", "penalty": "exact"})
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(references, "version", lambda package: f"another {package}")
    train("newer", reference=cache, max_steps=1)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_model_is_known_by_its_code_too(tiny, tmp_path):
    folder = shutil.copytree(tiny.gpt2, tmp_path / "model")
    identities = [references.model_identity(str(folder))]
    for code in ("x = 1", "x = 2"):
        (folder / "modeling_own.py").write_text(code)
        identities.append(references.model_identity(str(folder)))
    assert all(identities.count(identity) == 1 for identity in identities)


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
        assert references.model_identity("owner/model") == {"name": "owner/model", "commit": commit}


@pytest.mark.parametrize("damage", ["truncated", "short", "nan"])
def test_a_damaged_cache_is_computed_again(train, tmp_path, damage, caplog):
    cache = {"cache_dir": str(tmp_path / "cache")}
    first = train("first", reference=cache)
    (file,) = (tmp_path / "cache").iterdir()
    content, table = file.read_bytes(), load_file(file)
    if damage == "truncated":
        file.write_bytes(content[:-20])
    elif damage == "short":
        save_file({name: column[:-1].clone() for name, column in table.items()}, file)
    else:
        save_file({name: column * float("nan") for name, column in table.items()}, file)
    second = train("second", reference=cache)
    assert "computed again" in caplog.text
    assert file.read_bytes() == content
    assert weights_of(first) == weights_of(second)


def test_a_first_loss_that_is_not_ln_2_is_explained(train, tmp_path, caplog):
    cache = {"cache_dir": str(tmp_path / "cache")}
    train("first", reference=cache)
    assert "ln 2" not in caplog.text
    (file,) = (tmp_path / "cache").iterdir()
    table = load_file(file)
    save_file({**table, "ref_chosen_logps": table["ref_chosen_logps"] + 5}, file)
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


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(train):
    with pytest.raises(FloatingPointError, match=r"^step 2: .*not finite"):
        train(optimizer={"learning_rate": 1e30, "gradient_clipping": 0, "warmup_ratio": 0})


def test_a_sort_of_one_pair_warns_that_it_is_plain_dpo(train):
    with pytest.warns(UserWarning, match="plain DPO"):
        train(loss={"name": "aot_paired"}, batch={"microbatch": 1}, max_steps=1)


def test_a_tilt_of_one_pair_warns_that_it_is_plain_dpo(train, caplog):
    train(loss={"name": "kldpo", "tau": 1.0}, batch={"microbatch": 1}, max_steps=1)
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
