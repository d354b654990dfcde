"""`robustloss losses`: every loss is told in full, and what is told is true."""

from __future__ import annotations

import inspect
import runpy
import textwrap

import pytest
import torch
import yaml

from robustloss.losses import LOSSES, catalogue
from robustloss.losses.aggregates import KLTilt
from robustloss.losses.base import PAIRED_NAMES, UNPAIRED_NAMES

config = pytest.importorskip("robustloss.train.config")


def test_the_list_has_every_loss_once_under_its_kind_of_data(robustloss):
    code, out, _ = robustloss("losses")
    assert code == 0
    paired, unpaired = out.split("of single completions")
    for name, loss in LOSSES.items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert loss.__name__ in line
        assert line in (paired if loss.paired else unpaired)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_told_with_its_formula_and_every_option_and_default(robustloss, name):
    code, out, _ = robustloss("losses", name)
    assert code == 0
    flat = " ".join(out.split())
    for line in catalogue.formula(catalogue.example(name)):
        assert line in flat
    for option, parameter in inspect.signature(LOSSES[name]).parameters.items():
        assert f"{option} (default {parameter.default!r}" in flat
    assert "https://arxiv.org/abs/" in flat
    assert robustloss("losses", LOSSES[name].__name__)[1] == out


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_has_words_of_its_own_and_every_loss_a_paper(name):
    for option in catalogue.options(LOSSES[name]):
        assert option.words, option.name
        assert not option.words.startswith("as `"), option.name
    assert catalogue.summary(LOSSES[name]).endswith(".")
    assert all(len(number) == 10 for number in catalogue.papers(LOSSES[name]))
    assert catalogue.papers(LOSSES[name])


@pytest.mark.parametrize("name", LOSSES)
def test_the_line_for_a_config_makes_the_loss_and_so_does_the_line_of_python(name):
    section = catalogue.example(name)
    assert yaml.safe_load(catalogue.as_yaml(section)) == {"loss": section}
    loss = config.build_loss(section)
    assert type(loss) is LOSSES[name]
    called = catalogue.as_python(section)
    assert called.startswith(f"{LOSSES[name].__name__}(beta=")
    for option, value in section.items():
        assert option == "name" or f"{option}={value!r}" in called


@pytest.fixture(scope="module")
def reader():
    """What a reader has whose names are those of the examples: four pairs or completions, and a model of his own."""
    pytest.importorskip("transformers")
    from tiny_models import tiny_llama

    vectors = dict(zip((*PAIRED_NAMES, *UNPAIRED_NAMES), torch.randn(6, 4).unbind(), strict=True))
    tokens = torch.randint(200, (8, 6))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    batch |= {"ref_chosen_logps": -torch.ones(4), "ref_rejected_logps": -torch.ones(4), "index": torch.arange(4)}
    classes = {"desirable": torch.tensor([True, False, True, False]), "groups": torch.tensor([0, 1, 1, 0])}
    return {**vectors, **classes, "kl_logratios": torch.randn(3), "model": tiny_llama(), "batch": batch}


@pytest.mark.parametrize("name", LOSSES)
def test_the_python_that_is_shown_runs(robustloss, reader, name, tmp_path):
    _, out, _ = robustloss("losses", name)
    *lines, last = textwrap.dedent(out.split("in Python:\n")[1].split("\npapers:")[0]).strip().splitlines()
    program = tmp_path / "shown.py"
    program.write_text("\n".join([*lines, last if last.startswith("#") else f"value = {last}"]))
    names = runpy.run_path(str(program), init_globals=reader)
    assert type(names["loss"]) is LOSSES[name]
    if LOSSES[name].needs_embeddings:
        assert all(weight.grad.abs().sum() > 0 for weight in reader["model"].parameters())
    else:
        assert torch.isfinite(names["value"])


def test_an_option_that_is_another_losss_is_told_in_the_others_words():
    words = {name: {option.name: option.words for option in catalogue.options(loss)} for name, loss in LOSSES.items()}
    assert words["kldpo"]["link"] == words["dpo"]["link"]
    assert words["aot_unpaired"] == words["aot_paired"]


def test_options_that_configs_refuse_are_marked():
    marked = {option.name for loss in LOSSES.values() for option in catalogue.options(loss) if not option.in_config}
    assert marked == {"aggregate", "reduction"}
    for name in marked:
        with pytest.raises(ValueError, match=f"no option {name!r}"):
            config.build_loss({"name": "dpo", name: "mean"})


def test_formulas_follow_the_options_and_unknown_losses_have_none():
    assert "KL(P || uniform) = rho" in catalogue.formula({"name": "kldpo", "rho": 0.1})[-1]
    assert "l(h) = max(0, 1 - beta h)" in catalogue.formula({"name": "dpo", "link": "hinge"})
    assert catalogue.formula({"name": "homemade"}) == []
    assert catalogue.formula_with_values({"name": "homemade", "gamma": 3, "delta": None}) == ["gamma = 3"]
    assert set(catalogue.FORMULAS) == set(LOSSES)
    assert KLTilt(tau=catalogue.example("kldpo")["tau"])  # tau alone is what it needs


def test_options_that_are_not_given_are_told_by_their_defaults():
    assert catalogue.with_defaults({"name": "dr_dpo", "beta": 0.3}) == {
        "name": "dr_dpo", "beta": 0.3, "beta_prime": 1.0, "link": "logistic", "label_smoothing": 0.0,
    }  # fmt: skip
    assert catalogue.formula_with_values({"name": "dpo"})[-3:] == [
        "beta = 0.1", "label_smoothing = 0.0", "link = logistic",
    ]  # fmt: skip


def test_a_configured_loss_cites_the_paper_of_its_own_link_and_of_no_other():
    assert set(catalogue.LINK_PAPERS.values()) < set(catalogue.papers(LOSSES["dpo"]))
    assert catalogue.sources({"name": "dpo"}) == ["2305.18290"]
    assert catalogue.sources({"name": "dpo", "link": "ipo"}) == ["2305.18290", "2310.12036"]
    assert catalogue.sources({"name": "kldpo", "tau": 1.0, "link": "robust"}) == ["2502.01930", "2403.00409"]
    assert all(catalogue.sources(catalogue.example(name)) for name in LOSSES)


def test_a_misspelt_name_is_told_the_nearest(refused):
    assert "'kdlpo' is unknown; did you mean 'kldpo'?" in refused("losses", "kdlpo")
    assert "there are dpo, kldpo" in refused("losses", "zzz")
