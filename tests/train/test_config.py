from __future__ import annotations

import pytest

from robustloss.train.config import (
    ALIASES,
    FREE_KEYS,
    InputError,
    RunConfig,
    attention_of,
    config_keys,
    flatten,
    load_config,
    read_overrides,
    save_config,
)

COMPLETE = {"model": {"name_or_path": "m"}, "data": {"train": "d.jsonl"}, "loss": {"name": "dpo"}}


def write(path, text):
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "model: {name_or_path: m}\ndata: {train: d}\nloss: {name: kldpo, tau: 0.5}\noptimizer: {learning_rate: 1e-5}\n",
    )
    config = load_config(file, ["loss.tau=0.1", "seed=3"])
    assert config.loss == {"name": "kldpo", "tau": 0.1}
    assert config.seed == 3
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.epsilon == RunConfig().optimizer.epsilon


def test_naming_another_loss_drops_the_options_of_the_one_below():
    base = {**COMPLETE, "loss": {"name": "kldpo", "tau": 0.5}}
    assert load_config(None, ["loss.name=dpo"], base=base).loss == {"name": "dpo"}
    assert load_config(None, ["loss.beta=0.2"], base=base).loss == {"name": "kldpo", "tau": 0.5, "beta": 0.2}


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = load_config(None, ["lora.r=4", "max_steps=7", "loss.beta=0.3"], base=COMPLETE)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rate=1", "unknown config key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.learning_rat=1", "did you mean 'optimizer.learning_rate'"),
        ("max_step=1", "did you mean 'max_steps'"),
        ("loss.label_smooth=0.1", "did you mean 'label_smoothing'"),
        ("loss.reduction=none", "loss 'dpo' has no option 'reduction'"),
        ("loss.name=kldop", "did you mean 'kldpo'"),
        ("loss.beta=-1", "loss 'dpo': beta must be > 0, got -1"),
        ("loss.beta=much", "loss 'dpo': beta must be a number"),
        ("batch.microbatch=many", "config key 'batch.microbatch'"),
        ("batch.microbatch=0", "batch.microbatch must be >= 1, got 0"),
        ("zero_stage=4", "zero_stage must be 0, 1, 2 or 3, got 4"),
        ("precision=fp8", "precision must be one of 'fp32', 'bf16', got 'fp8'"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be two numbers"),
        ("optimizer.warmup_ratio=1", "optimizer.warmup_ratio must be < 1"),
        ("data.eval_fraction=1.5", "data.eval_fraction must be < 1"),
        ("data.truncation=middle", "data.truncation must be one of"),
        ("reference.mode=base", "lora is null"),
        ("model=gpt2", "config key 'model' must be a section"),
        ("seed", "must read key=value"),
        ("lr=1", "unknown config key 'lr'; did you mean 'optimizer.learning_rate'?"),
        ("optimizer.lr=1", "did you mean 'optimizer.learning_rate'?"),
        ("learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("batch_size=4", "did you mean 'batch.effective_batch' or 'batch.microbatch'?"),
        ("beta=0.1", "did you mean 'loss.beta'?"),
        ("tau=0.1", "did you mean 'loss.tau'?"),
        ("lora_r=4", "did you mean 'lora.r'?"),
        ("num_epochs=4", "did you mean 'epochs'?"),
        ("optimizer.epochs=4", "unknown config key 'optimizer.epochs'; did you mean 'epochs'?"),
        ("gradient_clip=1", "did you mean 'optimizer.gradient_clipping'?"),
        ("model.name=gpt2", "did you mean 'model.name_or_path'?"),
        ("data.path=x", "unknown config key 'data.path'; valid: data.train, "),
        ("loss.name=aot", "did you mean 'aot_paired' or 'aot_unpaired'?"),
        ("max_steps=0", "max_steps must be >= 1, got 0"),
        ("seed=99999999999999", "seed must be in [0, 2**31), got 99999999999999"),
        ("seed=-1", "seed must be in [0, 2**31), got -1"),
        ("loss.name=[dpo]", "loss.name ['dpo'] is unknown"),
        ("data.kind=unpaired", "loss 'dpo' needs preference data (chosen and rejected), but data.kind says unpaired"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        load_config(None, [override], base=COMPLETE)
    assert message in str(error.value)
    assert f"{message}.0" not in str(error.value)  # an integer is told as one


def test_a_one_sided_difference_in_bfloat16_wants_a_step():
    overrides = ["loss.name=wdpo", "loss.penalty=one_sided", "precision=bf16"]
    with pytest.raises(InputError, match=r"^WDPO's penalty 'one_sided' has no good step in bfloat16"):
        load_config(None, overrides, base=COMPLETE)
    assert load_config(None, [*overrides, "loss.step=0.01"], base=COMPLETE).loss["step"] == 0.01
    assert load_config(None, [*overrides, "precision=fp32"], base=COMPLETE).precision == "fp32"


def test_what_keys_are_called_elsewhere_are_no_keys_here_and_lead_to_such():
    keys = {*config_keys(), "loss.name"}
    assert not ALIASES.keys() & {key.rpartition(".")[2] for key in keys}
    assert {key for meant in ALIASES.values() for key in meant} <= keys


@pytest.mark.parametrize(("override", "valid"), [("loss.name=zzz", "kldpo"), ("loss.zzz=1", "label_smoothing")])
def test_what_is_near_no_name_lists_the_valid_ones_once(override, valid):
    with pytest.raises(InputError) as error:
        load_config(None, [override], base=COMPLETE)
    assert str(error.value).count(valid) == 1


def test_attention_is_told_by_the_loss_where_the_config_leaves_it_open():
    def attention(*overrides):
        return attention_of(load_config(None, overrides, base=COMPLETE))

    assert attention() == "sdpa"
    assert attention("loss.name=wdpo") == "sdpa"
    assert attention("loss.name=wdpo", "loss.penalty=exact") == "eager"
    assert attention("model.attn_implementation=eager") == "eager"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "kldpo"}, "exactly one of tau and rho"),
        ({"name": "kldpo", "tau": 0.1, "rho": 0.1}, "exactly one of tau and rho"),
        ({"name": "kldpo", "tau": 0}, "tau must be > 0"),
        ({"name": "kldpo", "rho": -1}, "rho must be >= 0"),
    ],
)
def test_the_options_of_a_loss_are_checked_by_building_it(loss, message):
    with pytest.raises(InputError, match=message):
        load_config(None, base={**COMPLETE, "loss": loss})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.attn_implementation=sdpa"], "model.attn_implementation 'sdpa' does not support; use 'eager'"),
        (["model.attn_implementation=flash_attention_2"], "use 'eager'"),
        (["zero_stage=3"], "use zero_stage 0, 1 or 2"),
    ],
)
def test_exact_wdpo_refuses_what_has_no_second_derivative(changes, message):
    with pytest.raises(InputError, match=message):
        load_config(None, ["loss.name=wdpo", "loss.penalty=exact", *changes], base=COMPLETE)


def test_what_is_missing_is_asked_for():
    with pytest.raises(InputError, match=r"'model.name_or_path' is missing"):
        load_config(None)
    with pytest.raises(InputError, match=r"'data.train' is missing"):
        load_config(None, ["model.name_or_path=m"])


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.yaml' does not exist"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match=r"' is a folder$"):
        load_config(tmp_path)
    with pytest.raises(InputError, match=r"bad\.yaml' cannot be read: [^\n]*$"):
        load_config(write(tmp_path / "bad.yaml", "loss: [1, 2\n"))
    with pytest.raises(InputError, match=r"list\.yaml' must hold keys and values"):
        load_config(write(tmp_path / "list.yaml", "- 1\n"))


def test_yaml_cannot_run_code(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_config(write(tmp_path / "evil.yaml", "seed: !!python/object/apply:os.getpid []\n"))


def test_overrides_nest():
    assert read_overrides(["loss.tau=0.1", "loss.name=kldpo", "seed=1"]) == {
        "loss": {"tau": 0.1, "name": "kldpo"},
        "seed": 1,
    }


def test_free_keys_exist():
    from dataclasses import asdict

    assert set(FREE_KEYS) <= flatten(asdict(RunConfig())).keys()
