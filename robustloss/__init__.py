"""Distributionally robust and distributional preference-optimisation losses for language models, with fused kernels.

Sources: [W] "Robust LLM Alignment via Distributionally Robust Direct Preference Optimization", arXiv 2502.01930.
[A] "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv 2406.05882.
"""

from robustloss import functional
from robustloss._version import __version__
from robustloss.functional import (
    TokenStatistics,
    linear_sequence_logps,
    linear_sequence_logps_with_cotangent,
    linear_sequence_logratios,
    sequence_logps,
    sequence_logratios,
    soft_rank,
    soft_sort,
    sorted_transport,
    token_logps,
)
from robustloss.global_batch import GlobalBatch
from robustloss.losses import (
    LOSSES,
    AOTPairedLoss,
    AOTUnpairedLoss,
    BetaDPOLoss,
    ChiPOLoss,
    ChiSquare,
    CVaR,
    DPOLoss,
    DrDPOLoss,
    GroupDROLoss,
    KLDPOLoss,
    KLTilt,
    KTOLoss,
    Mean,
    SoftMin,
    TotalVariation,
    TVDPOLoss,
    WDPOLoss,
)
from robustloss.sorting import sinkhorn_sort

__all__ = [
    "LOSSES",
    "AOTPairedLoss",
    "AOTUnpairedLoss",
    "BetaDPOLoss",
    "CVaR",
    "ChiPOLoss",
    "ChiSquare",
    "DPOLoss",
    "DrDPOLoss",
    "GlobalBatch",
    "GroupDROLoss",
    "KLDPOLoss",
    "KLTilt",
    "KTOLoss",
    "Mean",
    "SoftMin",
    "TVDPOLoss",
    "TokenStatistics",
    "TotalVariation",
    "WDPOLoss",
    "__version__",
    "functional",
    "linear_sequence_logps",
    "linear_sequence_logps_with_cotangent",
    "linear_sequence_logratios",
    "sequence_logps",
    "sequence_logratios",
    "sinkhorn_sort",
    "soft_rank",
    "soft_sort",
    "sorted_transport",
    "token_logps",
]
