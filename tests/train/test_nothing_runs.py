"""Nothing runs that a stranger sent: models, tokenizers, templates, data, configs and run folders are read, no more."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, pair_rows, save_tiny, tiny_gpt2, unpaired_rows, write_rows

import robustloss
from robustloss.cli import main
from robustloss.train import report
from robustloss.train.config import InputError, load_config
from robustloss.train.data import tokenize_rows
from robustloss.train.engine import load_model, load_model_config, load_tokenizer
from robustloss.train.loop import run
from robustloss.train.output_dir import prepare_folder
from robustloss.train.report import write_report
from robustloss.train.rows import Row, load_rows

PACKAGE = Path(robustloss.__file__).parent


@pytest.fixture
def trap(tmp_path):
    """A file that hostile code would make, and the code that makes it; none of it may have run at the end."""

    class Trap:
        path = tmp_path / "ran"
        code = f"open({str(path)!r}, 'w').close()"

        def __reduce__(self):
            return os.system, (f"touch {self.path}",)

    yield Trap()
    assert not Trap.path.exists()


@pytest.fixture
def hostile_pickle(trap):
    """Writes a pickle that runs the trap when it is read."""
    return lambda path: Path(path).write_bytes(pickle.dumps(trap))


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.gpt2, tmp_path / "model"))


def config_of(folder: Path | str, **options):
    model = {"name_or_path": str(folder), **options}
    return load_config(None, base={"model": model, "data": {"train": "none.jsonl"}, "loss": {"name": "dpo"}})


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(capsys, *arguments: str) -> str:
    """What the command line says: one line, and exit code 2."""
    assert main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
def test_weights_in_a_pickle_are_refused_with_what_to_do(copied, hostile_pickle, name):
    (copied / "model.safetensors").unlink()
    hostile_pickle(copied / name)
    with pytest.raises(InputError, match=rf"'{name}', and reading a pickle can run code.*save_pretrained"):
        load_model(config_of(copied))


def test_a_pickle_beside_safetensors_is_not_read(copied, hostile_pickle):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        hostile_pickle(copied / name)
    assert load_model(config_of(copied)).num_parameters() == tiny_gpt2().num_parameters()


def test_an_adapter_in_a_pickle_is_not_read(copied, hostile_pickle):
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"]}
    (copied / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": str(copied)}))
    hostile_pickle(copied / "adapter_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(config_of(copied))


@pytest.mark.parametrize("model_type", ["unheard_of", "gpt2"])
def test_code_of_a_model_runs_only_if_the_user_says_so(copied, trap, model_type):
    (copied / "modeling_theirs.py").write_text(trap.code)
    auto_map = {"AutoConfig": "modeling_theirs.Config", "AutoModelForCausalLM": "modeling_theirs.Model"}
    change_json(copied / "config.json", model_type=model_type, auto_map=auto_map)
    tokenizer = {"AutoTokenizer": ["modeling_theirs.Tokenizer", "modeling_theirs.Tokenizer"]}
    change_json(copied / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=tokenizer)
    config = config_of(copied)
    assert config.model.trust_remote_code is False
    for load in (
        lambda: load_model_config(config.model),
        lambda: load_model(config),
        lambda: load_tokenizer(config.model),
    ):
        try:
            load()  # of a type that transformers knows, its own code serves
        except InputError:
            assert model_type == "unheard_of"
    assert not trap.path.exists()
    trusted = config_of(copied, trust_remote_code=True)
    with pytest.raises(Exception, match="Config"):
        load_model_config(trusted.model)
    assert trap.path.exists()  # so the trap is a real one
    trap.path.unlink()


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.popen('touch PATH').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ messages[0].update(content='changed') }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
)


@pytest.mark.parametrize("of_the_user", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_runs_in_a_sandbox(trap, template, of_the_user):
    template = template.replace("PATH", str(trap.path))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'theirs' }}" if of_the_user else template
    answer = [{"role": "assistant", "content": "yes"}]
    row = Row({"prompt": [{"role": "user", "content": "a"}], "chosen": answer, "rejected": answer}, "pairs.jsonl:1")
    options = {"kind": "preference", "source": "pairs.jsonl", "max_length": 64, "truncation": "prompt", "groups": None}
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: the chat template failed"):
        tokenize_rows([row], tokenizer, chat_template=template if of_the_user else None, **options)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_script_is_no_data(tiny, tmp_path, trap, capsys):
    script = tmp_path / "theirs" / "theirs.py"
    script.parent.mkdir()
    script.write_text(trap.code)
    settings = (f"model.name_or_path={tiny.gpt2}", "loss.name=dpo")
    assert "ending in '.py', want one of .jsonl" in refused(capsys, *settings, f"data.train={script}")
    assert "no file named train*" in refused(capsys, *settings, f"data.train={script.parent}")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):  # nor is it one for the library
        datasets.load_dataset(str(script))


def test_a_script_beside_data_is_let_alone(tmp_path, trap):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("theirs.py", "train.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(trap.code)
    write_rows(folder / "train.jsonl", pair_rows())
    assert len(load_rows(str(folder), "train")) == len(pair_rows())


def test_a_pickle_under_another_name_is_no_data(tmp_path, hostile_pickle):
    for suffix in (".parquet", ".jsonl", ".json", ".csv"):
        hostile_pickle(tmp_path / f"rows{suffix}")
        with pytest.raises(ValueError, match=rf"rows\{suffix}"):
            load_rows(str(tmp_path / f"rows{suffix}"), "train")


# ---- configs --------------------------------------------------------------------------------------------------------

HOSTILE_YAML = (
    "seed: !!python/object/apply:os.system ['touch PATH']",
    "seed: !!python/object/new:os.system ['touch PATH']",
    "seed: !!python/name:os.system",
    "output_dir: ${oc.env:SECRET}",
    "output_dir: runs/${ oc.env:SECRET }",
    "output_dir: ${oc.decode:'${oc.env:SECRET}'}",
    "output_dir: ${oc.create:{a: 1}}",
    "output_dir: ${unheard_of:1}",
    "loss: {name: dpo, beta: '${oc.env:SECRET}'}",
    "lora: {target_modules: [a, '${oc.env:SECRET}']}",
    # the dollar and the rest come together only when the first reference is filled in
    "{data: {train: '$'}, output_dir: '${data.train}{oc.env:SECRET}'}",
)


@pytest.mark.parametrize("text", HOSTILE_YAML)
def test_a_config_neither_runs_anything_nor_reads_the_environment(text, tmp_path, monkeypatch, trap, capsys):
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "theirs.yaml"
    path.write_text(text.replace("PATH", str(trap.path)))
    said = refused(capsys, "--config", str(path))
    assert "theirs.yaml' cannot be read" in said
    assert "hunter2" not in said


def test_an_override_neither_runs_anything_nor_reads_the_environment(monkeypatch, trap, capsys):
    monkeypatch.setenv("SECRET", "hunter2")
    for override in ("output_dir=${oc.env:SECRET}", f"seed=!!python/object/apply:os.system ['touch {trap.path}']"):
        said = refused(capsys, override)
        assert "cannot be read" in said
        assert "hunter2" not in said


def test_a_config_may_refer_to_its_own_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "{model: {name_or_path: m}, data: {train: d.jsonl}, loss: {name: dpo}, output_dir: 'runs/${loss.name}'}"
    )
    assert load_config(path).output_dir == "runs/dpo"


# ---- a run's folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """What a run of one step leaves, but for the model."""
    folder = tmp_path / "run"
    for name in ("checkpoints", "evaluations", "figures", "reference_cache", "tensorboard"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("loss: {name: dpo}")
    (folder / "environment.json").write_text('{"world_size": 1}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.5}')
    (folder / "evaluations" / "step_00000001.json").write_text('{"chosen_rewards": [0.5]}')
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """A folder and a file of somebody else, which must be as they were at the end."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    yield folder
    assert [file.name for file in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "mine"


LINKED = (
    "model", "model.tmp", "checkpoints", "evaluations", "tensorboard", "figures", "reference_cache", "metrics.jsonl",
    "report.html", "config.yaml", "environment.json", ".lock", "demo", "demo.tmp",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_runs_folder_is_not_followed(run_folder, elsewhere, name):
    there = run_folder / name
    if there.is_dir():
        shutil.rmtree(there)
    else:
        there.unlink(missing_ok=True)
    is_folder = "." not in name or name in ("model.tmp", "demo.tmp")
    there.symlink_to(elsewhere if is_folder else elsewhere / "kept")
    with pytest.raises(InputError, match=rf"'{re.escape(name)}' in it is a link"):
        prepare_folder(run_folder)
    with pytest.raises(ValueError, match="is a link"):
        write_report(run_folder)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_neither_deletes_nor_writes_through_a_link(tiny, run_folder, elsewhere, resume):
    (run_folder / ("metrics.jsonl" if resume else "model")).unlink(missing_ok=True)
    (run_folder / ("metrics.jsonl" if resume else "model")).symlink_to(elsewhere / "kept" if resume else elsewhere)
    with pytest.raises(InputError, match="in it is a link, and a run writes and deletes in its own folder only"):
        run(load_config(None, base=tiny.settings(run_folder, resume=resume)))


def test_a_report_reads_no_link_and_writes_through_none(run_folder, elsewhere, monkeypatch):
    monkeypatch.setattr(report, "render", lambda entry, run: b"picture")
    (run_folder / "figures" / "loss.png").symlink_to(elsewhere / "kept")
    (run_folder / "figures" / "penalty.png").symlink_to(elsewhere / "kept")
    (run_folder / f"report.html.{os.getpid()}.tmp").symlink_to(elsewhere / "kept")
    write_report(run_folder)
    assert not (run_folder / "figures" / "loss.png").is_symlink()
    evaluation = run_folder / "evaluations" / "step_00000001.json"
    evaluation.unlink()
    evaluation.symlink_to(elsewhere / "kept")
    with pytest.raises(ValueError, match=rf"{evaluation.name}: is a link"):
        write_report(run_folder)


class Elements(HTMLParser):
    """A page's elements, and what of it is text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        pytest.fail(f"a comment: {data}")


NASTY = (
    "<script>alert(1)</script>", "</pre><svg/onload=alert(1)>", "</svg>", "</title>", "</style>", "<!--", "-->", "'",
    '"', "{{ 7 * 7 }}", "{% raw %}", "&lt;", "\u2028", "\u2029", "\0", "\x1b[31m", "\ud800",
    "\N{RIGHT-TO-LEFT OVERRIDE}", "javascript:alert(1)", "$\\frac{", "\\", "\n", "../../etc/passwd",
    "<img src=x onerror=alert(1)>",
)  # fmt: skip
nasty_texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=4)), min_size=1, max_size=4).map("".join)


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    loss=nasty_texts, option=nasty_texts, model=nasty_texts, metric=nasty_texts, key=nasty_texts, version=nasty_texts
)
def test_whatever_a_runs_folder_says_is_text_in_its_report(
    tmp_path, monkeypatch, loss, option, model, metric, key, version
):
    monkeypatch.setattr(report, "render", lambda entry, run: b"picture")
    folder = tmp_path / "run"
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    row = {metric: None, "step": 1, "split": "train", "loss": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "environment.json").write_text(json.dumps({key: version, "nested": {version: key}}))
    config = {"loss": {"name": loss, "beta": option, option: loss}, "model": {"name_or_path": model}}
    (folder / "config.yaml").write_text(json.dumps(config))
    try:
        page = write_report(folder).read_text(encoding="utf-8")
    except ValueError as error:  # YAML knows characters that it does not take
        if str(folder) not in str(error):
            raise
        return
    plain = Elements(page)
    (folder / "config.yaml").write_text("loss: {name: dpo}")
    harmless = Elements(write_report(folder).read_text(encoding="utf-8"))
    assert set(plain.tags) <= set(harmless.tags) | {"ul", "li"}
    assert plain.tags.count("img") == harmless.tags.count("img")
    assert plain.attributes <= harmless.attributes | {"class"}
    assert not {"script", "svg", "iframe", "object", "link"} & set(plain.tags)
    assert {file.name for file in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("nasty", NASTY)
def test_nasty_texts_are_data_like_any_other_or_refused_by_their_line(nasty, tmp_path):
    rows = [{**row, "prompt": nasty + "a", "chosen": " yes" + nasty, "rejected": " no" + nasty} for row in pair_rows(2)]
    options = {"kind": "preference", "source": "rows.jsonl", "max_length": 64, "truncation": "prompt", "groups": None}
    loaded = load_rows(write_rows(tmp_path / "rows.jsonl", rows), "train")
    if nasty == "\ud800":
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: column '\w+': got half a character"):
            tokenize_rows(loaded, byte_tokenizer(), chat_template=None, **options)
        return
    examples = tokenize_rows(loaded, byte_tokenizer(), chat_template=None, **options)
    assert byte_tokenizer().decode(examples[0].chosen_ids) == " yes" + nasty + "</s>"


# ---- the package ----------------------------------------------------------------------------------------------------


def calls(tree: ast.AST):
    """(dotted name, keywords) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def test_what_could_run_foreign_code_is_called_safely_or_not_at_all():
    """What ruff's S rules do not know: torch.load, from_pretrained, load_dataset and their like."""
    seen = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for name, keywords in calls(ast.parse(file.read_text())):
            last = name.rpartition(".")[2]
            seen.add(last)
            told = f"{file.relative_to(PACKAGE)}: {name}"
            if name == "torch.load":
                assert getattr(keywords.get("weights_only"), "value", None) is True, told
            if last == "from_pretrained":
                assert "trust_remote_code" in keywords, told
            if last == "load_dataset":
                assert "trust_remote_code" not in keywords, told
            if last in ("system", "popen", "Popen", "check_output", "check_call", "spawn", "spawnl", "execv"):
                pytest.fail(told)
            if name in (
                "eval",
                "exec",
                "compile",
                "__import__",
                "yaml.load",
                "pickle.load",
                "pickle.loads",
                "joblib.load",
            ):
                pytest.fail(told)
            assert getattr(keywords.get("trust_remote_code"), "value", None) is not True, told
    assert {"from_pretrained", "load_dataset", "safe_load"} <= seen


def test_unpaired_rows_and_saved_models_are_read_back(tmp_path):
    """What is refused above is refused for what it is, and not for everything."""
    assert len(load_rows(write_rows(tmp_path / "rows.jsonl", unpaired_rows()), "train")) == 12
    model = load_model(config_of(save_tiny(tmp_path / "model", tiny_gpt2())))
    assert isinstance(model.get_input_embeddings().weight, torch.Tensor)
