"""axolotl: robustloss as a plugin, in `rl: dpo` and `rl: kto`, over the global batch.

    plugins:
      - robustloss.integrations.axolotl.RobustLossPlugin
    rl: dpo
    robustloss:
      loss: kldpo      # `robustloss losses` tells their names and options
      beta: 0.1
      tau: 0.5

The trainers are axolotl's own and `RobustDPOTrainer` or `RobustKTOTrainer` (robustloss.integrations.trl) in one, so
options of TRL's losses (`rl_beta`, `dpo_loss_type`, `dpo_label_smoothing` and so on) are refused where they contradict.

Written for axolotl 0.19.0 (with TRL 1.9), whose plugin manager, configuration and trainer builder were run on a CPU
with a tiny model. axolotl goes on without a plugin that it cannot import: look for "Plugin loaded" in its log.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from pydantic import BaseModel, field_validator

from robustloss.losses import LOSSES, PreferenceLoss

# By `rl`, what `trainer_cls` names; __getattr__ makes them, as axolotl's trainers cannot be imported this early.
TRAINERS = {"dpo": "AxolotlRobustDPOTrainer", "kto": "AxolotlRobustKTOTrainer"}


class RobustLossArgs(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        robustloss: `loss`, a name of `robustloss.LOSSES`, and its options.
    """

    robustloss: dict[str, Any] | None = None

    @field_validator("robustloss")
    @classmethod
    def _check(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        if options is not None:
            build_loss(options)
        return options


class RobustLossPlugin(BasePlugin):
    """Trains the loss that `robustloss:` names.

    Raises:
        ValueError: when the configuration is read: `robustloss` missing or wrong, an `rl` without a trainer for the
            loss, another `trainer_cls`.
        RuntimeError: before training: another plugin has put its own trainer in.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{RobustLossArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        loss, rl = build_loss(cfg.get("robustloss")), str(getattr(cfg.get("rl"), "value", cfg.get("rl")))
        name = cfg["robustloss"]["loss"]
        fitting = ("dpo",) if loss.paired else ("kto",) if loss.needs_mismatched else ("dpo", "kto")
        if rl not in fitting:
            raise ValueError(f"robustloss.loss {name!r} is trained with rl: {' or '.join(fitting)}, got rl: {rl}")
        # get_trainer_cls would do, were axolotl to give the model to a plugin's trainer.
        trainer, given = f"{__name__}.{TRAINERS[rl]}", cfg.get("trainer_cls")
        if given not in (None, trainer):
            raise ValueError(f"trainer_cls: {given} would train without robustloss: leave it out, or the plugin")
        cfg["trainer_cls"] = trainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not isinstance(getattr(trainer, "loss", None), PreferenceLoss):
            raise RuntimeError(
                f"{type(trainer).__name__} would train without robustloss: another plugin has put it in place of "
                f"{cfg['trainer_cls']}"
            )


def build_loss(options: Any) -> PreferenceLoss:
    """The loss that {"loss": name, option: value, ...} describes.

    Raises:
        ValueError: the name or an option is missing, unknown or out of range.
    """
    if not isinstance(options, Mapping) or not options.get("loss"):
        raise ValueError(
            f"robustloss must hold a loss and its options, such as {{loss: kldpo, tau: 0.5}}, got {options}"
        )
    name, given = options["loss"], {key: value for key, value in options.items() if key != "loss"}
    if name not in LOSSES:
        raise ValueError(f"robustloss.loss {name!r} is unknown{_nearest(str(name), LOSSES)}")
    # A run trains one number, and YAML cannot name an aggregate other than the loss's own.
    accepted = [key for key in inspect.signature(LOSSES[name]).parameters if key not in ("reduction", "aggregate")]
    for key in given:
        if key not in accepted:
            raise ValueError(f"robustloss.loss {name!r} has no option {key!r}{_nearest(str(key), accepted)}")
    try:
        return LOSSES[name](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"robustloss.loss {name!r}: {error}") from error


def __getattr__(name: str) -> type:
    for rl, trainer in TRAINERS.items():
        if name == trainer:
            return _trainer(rl)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _trainer(rl: str) -> type:
    ours: Any
    if rl == "dpo":
        from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer as theirs

        from robustloss.integrations.trl import RobustDPOTrainer as ours
    else:
        from axolotl.core.trainers import AxolotlKTOTrainer as theirs

        from robustloss.integrations.trl import RobustKTOTrainer as ours

    class Trainer(ours, theirs):
        def __init__(self, *arguments: Any, **options: Any):
            loss = build_loss(PluginManager.get_instance().cfg["robustloss"])
            super().__init__(*arguments, loss=loss, **options)

    Trainer.__name__ = Trainer.__qualname__ = TRAINERS[rl]
    return Trainer


def _nearest(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f": did you mean {close[0]!r}?" if close else f": use one of {', '.join(valid)}"
