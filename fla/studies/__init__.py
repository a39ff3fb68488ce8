# SPDX-License-Identifier: MIT
"""Studies: many small models trained alike, and what follows from comparing them."""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.models.ablation": ["AblatedGatedDeltaNetConfig", "AblatedGatedDeltaNetForCausalLM"],
        "fla.studies.config": ["Cell", "Study", "load"],
        "fla.studies.report": ["power_law"],
        "fla.studies.run": ["run_study"],
    },
)
