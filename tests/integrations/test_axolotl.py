"""robustloss as axolotl's plugin: a stand-in for 0.19.0's plugin manager and builder, and these where installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pydantic = pytest.importorskip("pydantic", reason="pip install axolotl")
yaml = pytest.importorskip("yaml", reason="pip install axolotl")
trl = pytest.importorskip("trl", reason="pip install 'robustloss[trl]'")

from datasets import Dataset  # noqa: E402
from released import import_released  # noqa: E402
from tiny_models import byte_tokenizer, pair_rows, save_tiny, tiny_llama, unpaired_rows  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from robustloss import AOTUnpairedLoss, KLDPOLoss  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGIN = "robustloss.integrations.axolotl.RobustLossPlugin"
# What axolotl imports at its top and the builder of preference trainers does not call.
ABSENT = (
    "wandb torchaudio xformers bitsandbytes flash_attn torchao optimum s3fs gcsfs adlfs ocifs mistral_common kernels "
    "ring_flash_attn mlflow comet_ml trackio fla cut_cross_entropy modal zstandard typer gradio lm_eval langdetect "
    "numba immutabledict schedulefree axolotl_contribs_lgpl axolotl_contribs_mit openenv"
)
OPTIONS = {
    "rl": "dpo",
    "remove_unused_columns": False,
    "plugins": [PLUGIN],
    "robustloss": {"loss": "kldpo", "beta": 0.2, "tau": 0.5},
}


class StandIn:
    """The calls of axolotl 0.19.0: `prepare_plugins`, `validate_config` and the build of a preference trainer."""

    def __init__(self, patch):
        from trl import DPOTrainer, KTOTrainer

        class BasePlugin:
            pass

        class PluginManager:
            instance = SimpleNamespace(cfg=None)

            @staticmethod
            def get_instance():
                return PluginManager.instance

        class AxolotlDPOTrainer(DPOTrainer):
            def __init__(self, *arguments, dataset_tags=None, **options):
                super().__init__(*arguments, **options)
                self.optimizer, self.model_accepts_loss_kwargs = None, False

        class AxolotlKTOTrainer(KTOTrainer):
            pass

        names = {
            "axolotl": {},
            "axolotl.integrations": {},
            "axolotl.integrations.base": {"BasePlugin": BasePlugin, "PluginManager": PluginManager},
            "axolotl.core": {},
            "axolotl.core.trainers": {"AxolotlKTOTrainer": AxolotlKTOTrainer},
            "axolotl.core.trainers.dpo": {},
            "axolotl.core.trainers.dpo.trainer": {"AxolotlDPOTrainer": AxolotlDPOTrainer},
        }
        for name, members in names.items():
            module = ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        self.manager, self.trainers = PluginManager.instance, {"dpo": AxolotlDPOTrainer, "kto": AxolotlKTOTrainer}

    def read(self, options):
        """(configuration, plugin)"""
        cfg = dict(options)
        module, _, name = PLUGIN.rpartition(".")
        plugin = getattr(importlib.import_module(module), name)()
        plugin.register(cfg)
        module, _, name = plugin.get_input_args().rpartition(".")
        arguments = getattr(importlib.import_module(module), name)

        class Base(pydantic.BaseModel):
            rl: str
            trainer_cls: str | None = None

        cfg = type("AxolotlInputConfig", (Base, arguments), {})(**cfg).model_dump(exclude_none=True)
        self.manager.cfg = cfg
        return cfg, plugin

    def build(self, cfg, model, reference, rows, folder):
        kto = cfg["rl"] == "kto"
        arguments = (trl.KTOConfig if kto else trl.DPOConfig)(
            str(folder),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        module, _, name = cfg["trainer_cls"].rpartition(".")
        trainer_cls = getattr(importlib.import_module(module), name)
        return trainer_cls(
            *([model] if kto else [model, reference]),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            callbacks=[],
            processing_class=byte_tokenizer(),
        )


class Release:
    def __init__(self, patch):
        patch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
        patch.setenv("ACCELERATE_USE_CPU", "1")
        self.builders = import_released("axolotl.core.builders.rl", absent=ABSENT)
        self.configs = import_released("axolotl.utils.config", absent=ABSENT)
        trainers = import_released("axolotl.core.trainers", absent=ABSENT)
        dpo = import_released("axolotl.core.trainers.dpo.trainer", absent=ABSENT).AxolotlDPOTrainer
        self.trainers = {"dpo": dpo, "kto": trainers.AxolotlKTOTrainer}
        self.base = importlib.import_module("axolotl.integrations.base")
        self.DictDefault = importlib.import_module("axolotl.utils.dict").DictDefault

    def read(self, options):
        kind = "llama3.argilla" if options["rl"] == "kto" else "chatml.intel"
        given = {
            "base_model": "tiny",
            "datasets": [{"path": "rows", "type": kind, "split": "train"}],
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "num_epochs": 1,
            "learning_rate": 0.1,
            "optimizer": "adamw_torch",
            "sequence_len": 64,
            "bf16": False,
            "fp16": False,
            "tf32": False,
        }
        cfg = self.DictDefault(given | options)
        self.configs.prepare_plugins(cfg)
        cfg = self.configs.validate_config(cfg)
        manager = self.base.PluginManager.get_instance()
        manager.cfg = cfg
        return cfg, manager.plugins[PLUGIN]

    def build(self, cfg, model, reference, rows, folder):
        cfg.output_dir, cfg.dataloader_num_workers = str(folder), 0
        builder = self.builders.HFRLTrainerBuilder(cfg, model, byte_tokenizer())
        builder.train_dataset, builder.eval_dataset, builder.model_ref = Dataset.from_list(rows), None, reference
        return builder.build(2)


@pytest.fixture(params=[StandIn, Release], ids=["stand-in", "release"], scope="module")
def axolotl(request):
    module = PLUGIN.rpartition(".")[0]
    with pytest.MonkeyPatch.context() as patch:
        yield request.param(patch)
    sys.modules.pop(module, None)  # which has imported one of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_llama())


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_a_configuration_trains_the_loss_on_whole_steps(axolotl, folder, tmp_path, rl):
    losses = {"dpo": OPTIONS["robustloss"], "kto": {"loss": "aot_unpaired", "beta": 0.2}}
    cfg, plugin = axolotl.read(OPTIONS | {"rl": rl, "robustloss": losses[rl]})
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    rows = pair_rows(8) if rl == "dpo" else unpaired_rows(8)
    trainer = axolotl.build(cfg, model, reference, rows, tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    assert isinstance(trainer, axolotl.trainers[rl])
    assert type(trainer.loss) is (KLDPOLoss if rl == "dpo" else AOTUnpairedLoss)
    assert trainer.loss.beta == 0.2
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    if rl == "dpo":
        assert first["tilt/effective_sample_size"] == pytest.approx(4, rel=1e-4)  # two microbatches of two


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"robustloss": None}, "must hold a loss"),
        ({"robustloss": {"loss": "kldop", "tau": 0.5}}, "'kldop' is unknown: did you mean 'kldpo'"),
        ({"robustloss": {"loss": "kldpo", "taw": 0.5}}, "no option 'taw': did you mean 'tau'"),
        ({"robustloss": {"loss": "kldpo", "tau": -1}}, "'kldpo': tau must be"),
        ({"robustloss": {"loss": "dpo", "reduction": "none"}}, "no option 'reduction'"),
        ({"rl": "kto"}, "'kldpo' is trained with rl: dpo, got rl: kto"),
        ({"rl": "dpo", "robustloss": {"loss": "kto"}}, "'kto' is trained with rl: kto, got rl: dpo"),
        ({"rl": "ipo"}, "got rl: ipo"),
        ({"trainer_cls": "my.Trainer"}, "trainer_cls: my.Trainer would train without robustloss"),
    ],
)
def test_a_mistake_is_named_when_the_configuration_is_read(axolotl, options, told):
    with pytest.raises(ValueError, match=told):
        axolotl.read(OPTIONS | options)


def test_the_example_is_a_configuration_that_trains_kldpo(axolotl):
    options = yaml.safe_load((EXAMPLES / "axolotl_kldpo.yaml").read_text())
    cfg, _ = axolotl.read(options | {"bf16": False})  # which a machine without a GPU has not
    assert cfg["trainer_cls"] == "robustloss.integrations.axolotl.AxolotlRobustDPOTrainer"
    assert cfg["robustloss"] == {"loss": "kldpo", "beta": 0.1, "tau": 0.5}


def test_a_configuration_can_be_read_twice(axolotl):
    cfg, _ = axolotl.read(OPTIONS)
    again, _ = axolotl.read(dict(cfg) | OPTIONS)
    assert again["trainer_cls"] == cfg["trainer_cls"] == "robustloss.integrations.axolotl.AxolotlRobustDPOTrainer"


def test_a_trainer_that_another_plugin_puts_in_is_refused(axolotl):
    cfg, plugin = axolotl.read(OPTIONS)
    with pytest.raises(RuntimeError, match="SimpleNamespace would train without robustloss"):
        plugin.post_trainer_create(cfg, SimpleNamespace())
