"""Preference-optimisation losses as modules: a margin, a link and an aggregate (and, for WDPO, a penalty)."""

from robustloss.losses.aggregates import Aggregate, ChiSquare, CVaR, KLTilt, Mean, SoftMin, TotalVariation
from robustloss.losses.aot import AOTPairedLoss, AOTUnpairedLoss
from robustloss.losses.base import PairedLoss, PreferenceLoss, UnpairedLoss
from robustloss.losses.beta_dpo import BetaDPOLoss
from robustloss.losses.chi_po import ChiPOLoss
from robustloss.losses.dpo import DPOLoss
from robustloss.losses.dr_dpo import DrDPOLoss
from robustloss.losses.group_dro import GroupDROLoss
from robustloss.losses.kldpo import KLDPOLoss
from robustloss.losses.kto import KTOLoss
from robustloss.losses.stateful import StatefulLoss
from robustloss.losses.tv_dpo import TVDPOLoss
from robustloss.losses.wdpo import WDPOLoss

# The names that configuration files use.
LOSSES: dict[str, type[PreferenceLoss]] = {
    "dpo": DPOLoss,
    "kldpo": KLDPOLoss,
    "wdpo": WDPOLoss,
    "aot_paired": AOTPairedLoss,
    "aot_unpaired": AOTUnpairedLoss,
    "kto": KTOLoss,
    "dr_dpo": DrDPOLoss,
    "chi_po": ChiPOLoss,
    "beta_dpo": BetaDPOLoss,
    "group_dro": GroupDROLoss,
    "tv_dpo": TVDPOLoss,
}

__all__ = [
    "LOSSES",
    "AOTPairedLoss",
    "AOTUnpairedLoss",
    "Aggregate",
    "BetaDPOLoss",
    "CVaR",
    "ChiPOLoss",
    "ChiSquare",
    "DPOLoss",
    "DrDPOLoss",
    "GroupDROLoss",
    "KLDPOLoss",
    "KLTilt",
    "KTOLoss",
    "Mean",
    "PairedLoss",
    "PreferenceLoss",
    "SoftMin",
    "StatefulLoss",
    "TVDPOLoss",
    "TotalVariation",
    "UnpairedLoss",
    "WDPOLoss",
]
