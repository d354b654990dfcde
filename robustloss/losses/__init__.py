"""Preference-optimisation losses as modules: a margin, a link and an aggregate (and, for WDPO, a penalty)."""

from robustloss.losses.aggregates import Aggregate, ChiSquare, CVaR, KLTilt, Mean, SoftMin, TotalVariation
from robustloss.losses.aot import AOTPairedLoss, AOTUnpairedLoss
from robustloss.losses.base import PairedLoss, PreferenceLoss, UnpairedLoss
from robustloss.losses.dpo import DPOLoss
from robustloss.losses.kldpo import KLDPOLoss
from robustloss.losses.kto import KTOLoss
from robustloss.losses.wdpo import WDPOLoss

# The names that configuration files use.
LOSSES: dict[str, type[PreferenceLoss]] = {
    "dpo": DPOLoss,
    "kldpo": KLDPOLoss,
    "wdpo": WDPOLoss,
    "aot_paired": AOTPairedLoss,
    "aot_unpaired": AOTUnpairedLoss,
    "kto": KTOLoss,
}

__all__ = [
    "LOSSES",
    "AOTPairedLoss",
    "AOTUnpairedLoss",
    "Aggregate",
    "CVaR",
    "ChiSquare",
    "DPOLoss",
    "KLDPOLoss",
    "KLTilt",
    "KTOLoss",
    "Mean",
    "PairedLoss",
    "PreferenceLoss",
    "SoftMin",
    "TotalVariation",
    "UnpairedLoss",
    "WDPOLoss",
]
