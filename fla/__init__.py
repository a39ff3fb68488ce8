# SPDX-License-Identifier: MIT
"""fla: sequence models whose cost grows linearly with length, on any machine.

`import fla` imports neither torch nor Triton and touches no device; every name is loaded when first
asked for. Layers and models are here (`fla.GatedDeltaNet`, `fla.GatedDeltaNetForCausalLM`), and the
operators that transformers looks up; configs are in `fla.models`, everything else in its module.
"""

import importlib
from typing import Any

from fla._lazy import lazy_names
from fla._register import register_with_transformers

__version__ = "1.0.0"

# The operator names are those transformers resolves on the top-level package.
_getter, __all__ = lazy_names(
    __name__,
    {
        "fla.ops": [
            "chunk_gated_delta_rule",
            "fused_recurrent_gated_delta_rule",
            "recurrent_gated_delta_rule",
        ],
        "fla.core.stage": ["explain", "use_backend"],
        "fla.ops.engine.recurrence.recurrence": ["overwrite_states"],
        "fla.models.swap": ["accelerate"],
        "fla.layers": ["Attention", "DeltaNet", "GatedDeltaNet"],
        "fla.models": [
            "DeltaNetForCausalLM",
            "DeltaNetModel",
            "GatedDeltaNetForCausalLM",
            "GatedDeltaNetModel",
            "TransformerForCausalLM",
            "TransformerModel",
        ],
    },
)


def __getattr__(name: str) -> Any:
    if name in ("ops", "modules", "layers", "models", "utils"):
        return importlib.import_module(f"{__name__}.{name}")
    return _getter(name)


register_with_transformers()
