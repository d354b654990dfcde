"""Every mistake in the input is one line on stderr and exit code 2, before a model is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import pair_rows, save_tiny, tiny_gpt2, unpaired_rows, write_rows

from robustloss.cli import main
from robustloss.train.config import DiskError, InputError, input_errors
from robustloss.train.distributed import raised_by_all
from robustloss.train.loop import _finish


@pytest.fixture
def refuse(tiny, tmp_path, capsys, monkeypatch):
    """Run the command line on the tiny model with some changes; returns what it says, which must be one line."""

    def call(*overrides: str, data: str = tiny.pairs, model: str = tiny.gpt2, loads_model: bool = False) -> str:
        if not loads_model:
            monkeypatch.setattr("robustloss.train.engine.load_model", lambda *_: pytest.fail("the model was loaded"))
        config = tmp_path / "run.yaml"
        config.write_text(json.dumps(tiny.settings(tmp_path / "run", data={"train": data, "eval": None})))
        code = main(["train", "--config", str(config), f"model.name_or_path={model}", *overrides])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith("robustloss: error: ")
        return lines[0]

    return call


def rows_file(tmp_path, rows):
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_an_unknown_key_names_the_nearest(refuse):
    assert "unknown config key 'optimizer.learning_rte'; did you mean 'optimizer.learning_rate'?" in refuse(
        "optimizer.learning_rte=1"
    )


def test_a_run_without_a_loss_is_told_their_names(capsys, tiny):
    assert main(["train", f"model.name_or_path={tiny.gpt2}", f"data.train={tiny.pairs}"]) == 2
    assert "'loss.name' is missing: give one of dpo, kldpo" in capsys.readouterr().err


def test_a_model_folder_that_is_missing(refuse, tmp_path):
    assert "no such folder" in refuse(model=str(tmp_path / "nowhere"))


def test_a_model_folder_without_a_tokenizer(refuse, tiny, tmp_path):
    folder = shutil.copytree(tiny.gpt2, tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    assert "no tokenizer" in refuse(model=str(folder))


def test_weights_that_are_cut_short_or_missing(refuse, tiny, tmp_path):
    folder = shutil.copytree(tiny.gpt2, tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    whole.pop(next(name for name in whole if "c_attn" in name))
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weight(s)" in refuse(model=str(folder), loads_model=True)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    assert "cannot be loaded" in refuse(model=str(folder), loads_model=True)


def test_data_of_one_class_for_a_loss_that_matches_two(refuse, tmp_path):
    file = rows_file(tmp_path, [row for row in unpaired_rows() if row["label"]])
    assert "one value of 'label' only" in refuse("loss={name: aot_unpaired}", data=file)


def test_a_config_file_that_is_missing(capsys):
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "robustloss: error: config file 'nowhere.yaml' does not exist\n"


def test_a_data_file_that_is_missing(refuse, tmp_path):
    assert "nowhere.jsonl" in refuse(data=str(tmp_path / "nowhere.jsonl"))


def test_a_json_line_that_does_not_parse_names_file_and_line(refuse, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": oops}\n')
    assert f"{file}:2" in refuse(data=str(file))


def test_a_missing_column_is_named_with_those_present(refuse, tmp_path):
    message = refuse(data=rows_file(tmp_path, [{"prompt": "a", "chosen": "b"}]))
    assert "'rejected'" in message
    assert "'chosen'" in message


def test_an_empty_completion_names_the_line(refuse, tmp_path):
    file = rows_file(tmp_path, [*pair_rows(3), {"prompt": "a", "chosen": "", "rejected": "c"}])
    assert f"{file}:4" in refuse(data=file)


def test_a_completion_of_which_truncation_leaves_nothing(refuse, tmp_path):
    file = rows_file(tmp_path, [{"prompt": "long " * 20, "chosen": "b", "rejected": "c"}] * 4)
    assert "data.max_length=16" in refuse("data.max_length=16", "data.truncation=end", data=file)


def test_both_tau_and_rho(refuse):
    assert "exactly one of tau and rho" in refuse("loss.name=kldpo", "loss.tau=1", "loss.rho=1")


def test_tau_must_be_positive(refuse):
    assert "tau must be > 0, got 0" in refuse("loss.name=kldpo", "loss.tau=0")


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_wdpo_refuses_fused_attention(refuse, attention):
    message = refuse("loss.name=wdpo", "loss.penalty=exact", f"model.attn_implementation={attention}")
    assert attention in message
    assert "'eager'" in message


def test_wdpo_refuses_zero_3(refuse):
    assert "zero_stage 0, 1 or 2" in refuse("loss.name=wdpo", "loss.penalty=exact", "zero_stage=3")


def test_a_paired_loss_refuses_unpaired_data_and_the_reverse(refuse, tmp_path, tiny):
    assert "loss 'dpo' needs preference data" in refuse(data=rows_file(tmp_path, unpaired_rows()))
    assert "loss 'kto' needs unpaired data" in refuse("loss.name=kto", data=tiny.pairs)
    message = refuse(f"data.eval={tiny.unpaired}")
    assert f"but data.eval {tiny.unpaired!r} holds unpaired data" in message


def test_mismatched_pairs_need_two_prompts_on_both_sides(refuse, tmp_path):
    file = rows_file(tmp_path, unpaired_rows(4))
    message = refuse("loss.name=kto", "data.eval_fraction=0.1", data=file)
    assert f"the eval rows of {file}: mismatched pairs need two different prompts, got 1 example(s)" in message
    assert message.endswith("raise data.eval_fraction or give data.eval")
    single = write_rows(tmp_path / "single.jsonl", unpaired_rows(1))
    message = refuse("loss.name=kto", f"data.eval={single}", data=file)
    assert f"the eval rows of {single}: mismatched" in message
    assert "data.eval_fraction" not in message


def test_aot_unpaired_has_nothing_to_match_in_a_batch_of_one(refuse, tiny):
    message = refuse("loss.name=aot_unpaired", "batch.effective_batch=1", data=tiny.unpaired)
    assert "batch.effective_batch is 1" in message


def test_base_reference_needs_lora(refuse):
    assert "lora is null" in refuse("reference.mode=base")


def test_a_model_that_is_not_there(refuse, tmp_path):
    assert "nowhere" in refuse(model=str(tmp_path / "nowhere"))


def test_sequences_longer_than_the_model(refuse, tmp_path):
    file = rows_file(tmp_path, [{"prompt": "a", "chosen": "long " * 40, "rejected": "c"}] * 4)
    assert "the model has 128 positions; set data.max_length=128 or less" in refuse("data.max_length=512", data=file)


def test_mismatched_sequences_longer_than_the_model(refuse, tmp_path):
    # Each row fits, and the long prompt with the other's long completion does not.
    rows = [
        {"prompt": "long " * 20, "completion": "b", "label": True},
        {"prompt": "a", "completion": "long " * 20, "label": False},
    ]
    file = rows_file(tmp_path, rows)
    message = refuse("loss.name=kto", "data.max_length=512", f"data.eval={file}", data=file)
    assert "lets 201 tokens through, but the model has 128 positions" in message


def test_a_tokenizer_with_more_tokens_than_the_model(refuse, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1, n_positions=128))
    message = refuse(model=save_tiny(tmp_path / "small", small))
    assert "the tokenizer gives token 256, but the model's vocabulary has 100" in message


def test_holding_out_everything(refuse, tmp_path):
    assert "leaves none to train on" in refuse("data.eval_fraction=0.9", data=rows_file(tmp_path, pair_rows(2)))


def test_log_probabilities_that_are_not_finite(refuse, tmp_path):
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[0] = float("nan")
    message = refuse(model=save_tiny(tmp_path / "nan", model), loads_model=True)
    assert "not finite" in message


def test_a_tied_output_head_takes_no_adapter(refuse):
    message = refuse("lora.target_modules=[c_attn,lm_head]", loads_model=True)
    assert "leave the head out" in message


@pytest.fixture
def second_process(tiny, monkeypatch, capsys):
    """What the second process of a host tells of an error of its run."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def call(fail, *overrides: str) -> tuple[int, str]:
        monkeypatch.setattr("robustloss.train.loop.run", fail)
        given = [f"model.name_or_path={tiny.gpt2}", f"data.train={tiny.pairs}", "loss.name=dpo"]
        return main(["train", *given, *overrides]), capsys.readouterr().err

    return call


@pytest.mark.parametrize(("kind", "code"), [(InputError, 2), (DiskError, 1)])
def test_an_error_of_one_process_alone_is_told_by_it(second_process, kind, code):
    def fail(_):
        raise kind("mine alone")

    assert second_process(fail) == (code, "robustloss: error: [process 1] mine alone\n")


@pytest.mark.parametrize(("kind", "code"), [(InputError, 2), (DiskError, 1)])
@pytest.mark.parametrize("of_another", [False, True])
def test_an_error_that_all_processes_raise_is_told_by_one_of_each_host(second_process, kind, code, of_another):
    def fail(_):
        try:
            with raised_by_all():
                raise OSError("everyone's") if of_another else kind("everyone's")
        except OSError as error:
            raise kind("everyone's") from error

    assert second_process(fail) == (code, "")
    assert second_process(fail, "loss.bta=1") == (2, "")  # a command line is everyone's too


def test_a_full_disk_is_told_as_such_where_input_is_checked():
    with pytest.raises(DiskError, match="No space left"), input_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match="No such file") as raised, input_errors():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    assert not isinstance(raised.value, DiskError)


def test_a_report_or_a_demonstration_for_which_there_is_no_space_is_exit_code_1(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("robustloss.train.report.write_report", full)
    monkeypatch.setattr("robustloss.train.loop.run", lambda config: _finish(tmp_path, "is finished", redraw=True))
    assert main(["train", "model.name_or_path=a", "data.train=b", "loss.name=dpo"]) == 1
    monkeypatch.setattr("robustloss.train.demo.make_pairs", full)
    assert main(["train", f"output_dir={tmp_path / 'run'}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("No space left on device" in line for line in lines)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    def buggy(*_):
        raise KeyError("a bug")

    monkeypatch.setattr("robustloss.train.loop.load_inputs", buggy)
    with pytest.raises(KeyError, match="a bug"):
        main(["train", f"model.name_or_path={tiny.gpt2}", f"data.train={tiny.pairs}", "loss.name=dpo"])


def test_the_process_ends_with_code_2_and_says_nothing_else(tiny, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "robustloss", "--local_rank=0", "train", f"model.name_or_path={tiny.gpt2}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.splitlines() == [
        "robustloss: error: config key 'data.train' is missing: give a .jsonl, .json, .parquet or .csv file, or a "
        "Hugging Face dataset"
    ]


def test_version_and_help(capsys):
    from robustloss import __version__

    for argument, told in (("--version", __version__), ("--help", "train")):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
        assert told in capsys.readouterr().out
