"""TRL's trainers with robustloss's losses: `from robustloss.integrations.trl import RobustDPOTrainer`.

`RobustDPOTrainer` trains on pairs, `RobustKTOTrainer` on single completions with a label. Each is imported when it is
asked for, as they need different releases of TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustloss.integrations.trl_dpo import RobustDPOTrainer
    from robustloss.integrations.trl_kto import RobustKTOTrainer

__all__ = ["RobustDPOTrainer", "RobustKTOTrainer"]

_MODULES = {
    "RobustDPOTrainer": "robustloss.integrations.trl_dpo",
    "RobustKTOTrainer": "robustloss.integrations.trl_kto",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
