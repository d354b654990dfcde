"""Writing the model in the middle of training changes nothing of the model that is trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tiny_models import byte_tokenizer

from robustloss.losses import DPOLoss
from robustloss.train.config import load_config
from robustloss.train.engine import load_model, save_model
from robustloss.train.loss_module import LossModule

DROPOUTS = ("embd_pdrop", "resid_pdrop", "attn_pdrop")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_in_training_keeps_its_config_and_the_written_one_its_dropout(tiny, tmp_path, monkeypatch, fails):
    config = load_config(None, base=tiny.settings(tmp_path / "run"))
    model = load_model(config)
    engine = SimpleNamespace(module=LossModule(model, DPOLoss(beta=0.1)))
    before = {name: getattr(model.config, name) for name in DROPOUTS}
    assert set(before.values()) == {0.0}
    if fails:

        def full(*_, **__):
            assert model.config.attn_pdrop == 0.1
            raise OSError("full")

        monkeypatch.setattr(model, "save_pretrained", full)
        with pytest.raises(OSError, match="full"):
            save_model(engine, config, byte_tokenizer(), tmp_path / "model")
    else:
        save_model(engine, config, byte_tokenizer(), tmp_path / "model")
        written = json.loads((tmp_path / "model" / "config.json").read_text())
        assert {written[name] for name in DROPOUTS} == {0.1}
    assert {name: getattr(model.config, name) for name in DROPOUTS} == before
