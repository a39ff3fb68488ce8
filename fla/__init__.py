# SPDX-License-Identifier: MIT
"""fla: sequence models whose cost grows linearly with length, on any machine.

`import fla` imports neither torch nor Triton and touches no device; every name is loaded when first
asked for. All layers, models and configs are here (`fla.GatedDeltaNet`, `fla.GatedDeltaNetConfig`,
`fla.GatedDeltaNetForCausalLM`), and the operators that transformers looks up; everything else is in
its module.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fla import layers, models
from fla._aliases import install as install_aliases
from fla._lazy import lazy_names
from fla._register import register_with_transformers

__version__ = "1.0.0"

__getattr__, __all__ = lazy_names(
    __name__,
    {
        # The operators are those that transformers resolves on the top-level package.
        "fla.ops": [
            "chunk_gated_delta_rule",
            "fused_recurrent_gated_delta_rule",
            "recurrent_gated_delta_rule",
        ],
        "fla._explain": ["explain"],
        "fla.core.stage": ["use_backend"],
        "fla.ops.engine.recurrence.recurrence": ["overwrite_states"],
        "fla.models.provider": ["provide"],
        "fla.models.swap": ["accelerate"],
        "fla.layers": layers.__all__,
        "fla.models": [
            f"{name}{kind}"
            for name in models.MODELS.values()
            for kind in ("Config", "Model", "ForCausalLM")
        ],
        "fla.utils": [],
    },
    submodules=[file.parent.name for file in Path(__file__).parent.glob("*/__init__.py")],
)

if TYPE_CHECKING:  # what editors and type checkers see
    from fla._explain import explain
    from fla.core.stage import use_backend
    from fla.layers import *
    from fla.models import *
    from fla.models.provider import provide
    from fla.models.swap import accelerate
    from fla.ops import (
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
        recurrent_gated_delta_rule,
    )
    from fla.ops.engine.recurrence.recurrence import overwrite_states

install_aliases(models.MODELS)
register_with_transformers(models.MODELS)
