# SPDX-License-Identifier: MIT
"""Hugging Face-compatible language models: one decoder (`decoder.py`), one small file per
architecture.

An architecture is imported, and registers with transformers' Auto classes, when one of its names or
its model type is first asked for.
"""

from typing import TYPE_CHECKING

from fla._lazy import lazy_names

# Model type, which is also the name of its file -> the name that its classes begin with: ABCConfig,
# ABCModel, ABCForCausalLM.
MODELS = {
    "abc": "ABC",
    "bitnet": "BitNet",
    "comba": "Comba",
    "delta_net": "DeltaNet",
    "deltaformer": "DeltaFormer",
    "gated_deltanet": "GatedDeltaNet",
    "gated_deltanet2": "GatedDeltaNet2",
    "gated_deltaproduct": "GatedDeltaProduct",
    "gla": "GLA",
    "gsa": "GSA",
    "hgrn": "HGRN",
    "hgrn2": "HGRN2",
    "hybrid": "Hybrid",
    "kda": "KDA",
    "lightnet": "LightNet",
    "linear_attn": "LinearAttention",
    "log_linear_mamba2": "LogLinearMamba2",
    "longnet": "LongNet",
    "mamba": "Mamba",
    "mamba2": "Mamba2",
    "mamba3": "Mamba3",
    "mesa_net": "MesaNet",
    "mla": "MLA",
    "mom": "Mom",
    "precond_gated_deltanet": "PrecondGatedDeltaNet",
    "precond_kda": "PrecondKDA",
    "raven": "Raven",
    "retnet": "RetNet",
    "rodimus": "Rodimus",
    "rwkv4": "RWKV4",
    "rwkv6": "RWKV6",
    "rwkv7": "RWKV7",
    "samba": "Samba",
    "transformer": "Transformer",
}

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.models.utils": ["Cache"],
        **{
            f"fla.models.{model_type}": [f"{name}Config", f"{name}Model", f"{name}ForCausalLM"]
            for model_type, name in MODELS.items()
        },
    },
)

if TYPE_CHECKING:  # what editors and type checkers see
    from fla.models.abc import *
    from fla.models.bitnet import *
    from fla.models.comba import *
    from fla.models.delta_net import *
    from fla.models.deltaformer import *
    from fla.models.gated_deltanet import *
    from fla.models.gated_deltanet2 import *
    from fla.models.gated_deltaproduct import *
    from fla.models.gla import *
    from fla.models.gsa import *
    from fla.models.hgrn import *
    from fla.models.hgrn2 import *
    from fla.models.hybrid import *
    from fla.models.kda import *
    from fla.models.lightnet import *
    from fla.models.linear_attn import *
    from fla.models.log_linear_mamba2 import *
    from fla.models.longnet import *
    from fla.models.mamba import *
    from fla.models.mamba2 import *
    from fla.models.mamba3 import *
    from fla.models.mesa_net import *
    from fla.models.mla import *
    from fla.models.mom import *
    from fla.models.precond_gated_deltanet import *
    from fla.models.precond_kda import *
    from fla.models.raven import *
    from fla.models.retnet import *
    from fla.models.rodimus import *
    from fla.models.rwkv4 import *
    from fla.models.rwkv6 import *
    from fla.models.rwkv7 import *
    from fla.models.samba import *
    from fla.models.transformer import *
    from fla.models.utils import *
