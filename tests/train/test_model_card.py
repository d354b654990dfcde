"""The model card beside a trained model: what the Hub reads is valid, and what a stranger wrote is text."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import yaml

pytest.importorskip("transformers")
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from robustloss.losses import LOSSES
from robustloss.losses.catalogue import example
from robustloss.train.config import load_config
from robustloss.train.loop import run
from robustloss.train.model_card import code, fenced, is_hub_name, model_card

ENVIRONMENT = {"robustloss": "0.1", "torch": "2.13.0", "device": "a|`b`<i>", "platform": "told to nobody"}
HELD_OUT = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": math.nan, "tilt/tau": 1.0}
HOSTILE = (
    "---\nbase_model: evil/model\n---",
    "a\n---\n# Title",
    "</code></p><script>alert(1)</script>",
    "``` \n<img src=x onerror=alert(1)>",
    "`` ` ``|a|b|\n|---|",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png) www.evil.example",
    "{{ 7 * 7 }}{% raw %}",
    "!!python/object/apply:os.system ['touch x']",
    "'\"\\: - # &a *b",
    "\N{RIGHT-TO-LEFT OVERRIDE}\x1b[31m\u2028\0\ud800",
)


def config_of(**changes):
    settings = {"model": {"name_or_path": "Qwen/Qwen3-0.6B"}, "data": {"train": "org/pairs"}, "loss": example("kldpo")}
    return load_config(None, base={**settings, **changes})


def front_matter(card: str) -> dict:
    """The metadata between the first two lines of dashes, and nothing else of the file."""
    opening, metadata, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    return yaml.safe_load(metadata)


def rendered(card: str) -> str:
    """The text as HTML, by CommonMark with GitHub's tables and links, raw HTML let through."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    return markdown.render(card.split("---\n", 2)[2])


def test_the_card_tells_model_data_loss_results_versions_and_sources():
    card = model_card(config_of(), ENVIRONMENT, 120, HELD_OUT)
    for told in (
        "`Qwen/Qwen3-0.6B`",
        "`org/pairs`",
        "120 optimizer steps",
        "(KLDPOLoss)",
        "P_i proportional to exp(l(h_i) / tau)",
        "tau = 0.5",
        "| accuracy of the rewards | 0.75 |",
        "learning_rate: 1.0e-06",
        "https://arxiv.org/abs/2502.01930",
        "| torch | `2.13.0` |",
    ):
        assert told in card
    assert "margin of the rewards" not in card  # it is NaN
    assert "told to nobody" not in card
    assert card == model_card(config_of(output_dir="elsewhere"), ENVIRONMENT, 120, HELD_OUT)


def test_a_plain_run_tells_the_defaults_and_cites_its_own_papers_alone():
    card = model_card(config_of(loss={"name": "dpo"}), ENVIRONMENT, 1, HELD_OUT)
    assert "Direct preference optimisation" in card
    assert "\nbeta = 0.1\nlabel_smoothing = 0.0\nlink = logistic\n" in card
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])["loss"]["beta"] == 0.1
    assert set(re.findall(r"arxiv.org/abs/([\d.]+)", card)) == {"2305.18290"}
    hinged = model_card(config_of(loss={"name": "dpo", "link": "hinge"}), ENVIRONMENT, 1, HELD_OUT)
    assert set(re.findall(r"arxiv.org/abs/([\d.]+)", hinged)) == {"2305.18290", "2305.10425"}


def test_the_hub_reads_the_metadata():
    card = ModelCard(model_card(config_of(), ENVIRONMENT, 120, HELD_OUT))
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.datasets == ["org/pairs"]
    assert card.data.tags == ["robustloss", "preference-optimization", "kldpo"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 0.5, "rewards/accuracies": 0.75}
    assert {result.dataset_type for result in card.data.eval_results} == {"org/pairs"}


def test_without_held_out_data_there_are_no_results():
    card = model_card(config_of(), ENVIRONMENT, 1, {})
    assert "Nothing was evaluated on held-out data." in card
    assert "model-index" not in front_matter(card)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_card(name):
    card = model_card(config_of(loss=example(name)), ENVIRONMENT, 1, HELD_OUT)
    assert name in front_matter(card)["tags"]
    assert f"({LOSSES[name].__name__})" in card


def test_of_local_paths_only_the_last_part_is_told(tmp_path):
    (tmp_path / "base").mkdir()
    model, data = {"name_or_path": str(tmp_path / "base")}, {"train": str(tmp_path / "rows.jsonl"), "eval": "org/test"}
    reference = {"name_or_path": str(tmp_path / "other"), "cache_dir": str(tmp_path)}
    card = model_card(config_of(model=model, data=data, reference=reference), ENVIRONMENT, 1, HELD_OUT)
    assert str(tmp_path) not in card
    for told in ("`base`", "`rows.jsonl`", "name_or_path: other"):
        assert told in card
    assert "base_model" not in front_matter(card)
    assert "datasets" not in front_matter(card)
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["type"] == "org/test"


def test_a_hub_name_is_told_by_its_form(tmp_path, monkeypatch):
    assert all(map(is_hub_name, ("gpt2", "Qwen/Qwen3-0.6B", "a_b/c.d")))
    assert not any(map(is_hub_name, (None, "", "a/b/c", "../a", "/a/b", "a b", "a/b\n", "rows.jsonl", "ä/b", *HOSTILE)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_name("gpt2")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_name_is_text_and_no_metadata(hostile):
    names = {"model": {"name_or_path": "local/a/b"}, "data": {"train": "x.jsonl"}}
    plain = model_card(config_of(**names), ENVIRONMENT, 1, HELD_OUT)
    options = {"model": {"name_or_path": hostile}, "data": {"train": hostile, "eval": hostile}}
    card = model_card(config_of(**options), {**ENVIRONMENT, "device": hostile}, 1, HELD_OUT)
    card.encode()
    metadata = front_matter(card)
    assert set(metadata) == set(front_matter(plain))
    assert ModelCard(card).data.to_dict()["tags"] == ["robustloss", "preference-optimization", "kldpo"]
    index = metadata["model-index"][0]
    assert re.fullmatch(r"[\w.-]+", index["name"])
    assert re.fullmatch(r"[\w.-]+", index["results"][0]["dataset"]["name"])
    tags = [re.findall(r"<(\w+)", rendered(text)) for text in (plain, card)]
    assert tags[0] == tags[1]
    assert not set(card) & set("\N{RIGHT-TO-LEFT OVERRIDE}\x1b\u2028\0\ud800")


def test_code_and_fences_are_not_ended_by_what_they_hold():
    assert code("a") == "`a`"
    assert code("``a`") == "``` ``a` ```"
    assert code("") == "`  `"
    assert code("a|b\nc") == r"`a\|b c`"
    assert fenced("```\nx\n````", "text") == "`````text\n```\nx\n````\n`````"


def test_a_run_writes_the_card_beside_the_last_and_the_best_model(tiny, tmp_path, without_report):
    data = shutil.copy(tiny.pairs, tmp_path / "`pairs` <b>|---.jsonl")
    base = shutil.copytree(tiny.gpt2, tmp_path / "--- model: [x](y)")
    folder = tmp_path / "run"
    options = {"model": {"name_or_path": str(base)}, "data": {"train": str(data)}, "max_steps": 2, "eval_every": 1}
    run(load_config(None, base=tiny.settings(folder, **options)))
    for name in ("model", "best"):
        card = ModelCard.load(folder / name / "README.md")
        assert card.data.library_name == "transformers"
        (result, *_) = card.data.eval_results
        assert math.isfinite(result.metric_value)
        assert "`` `pairs` <b>\\|---.jsonl ``" in card.text
        assert "2 optimizer steps" in card.text or name == "best"
        assert AutoModelForCausalLM.from_pretrained(folder / name).num_parameters()
        assert AutoTokenizer.from_pretrained(folder / name)("a").input_ids
