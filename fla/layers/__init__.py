# SPDX-License-Identifier: MIT
"""Token mixers: projections and gates around an operator. Padding, boundaries and the cache are
`mixer.py`'s.
"""

from typing import TYPE_CHECKING

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.layers.abc": ["ABCAttention"],
        "fla.layers.attn": ["Attention"],
        "fla.layers.based": ["BasedLinearAttention", "ReBasedLinearAttention"],
        "fla.layers.bitattn": ["BitAttention"],
        "fla.layers.block_sparse_attn": ["BlockSparseAttention"],
        "fla.layers.comba": ["Comba"],
        "fla.layers.delta_net": ["DeltaNet"],
        "fla.layers.deltaformer": ["DeltaFormerAttention"],
        "fla.layers.dilated_attn": ["DilatedAttention"],
        "fla.layers.gated_deltanet": ["GatedDeltaNet"],
        "fla.layers.gated_deltaproduct": ["GatedDeltaProduct"],
        "fla.layers.gdn2": ["GatedDeltaNet2"],
        "fla.layers.gla": ["GatedLinearAttention"],
        "fla.layers.gsa": ["GatedSlotAttention"],
        "fla.layers.hgrn": ["HGRNAttention", "HGRN2Attention"],
        "fla.layers.kda": ["KimiDeltaAttention"],
        "fla.layers.lightnet": ["LightNetAttention"],
        "fla.layers.linear_attn": ["LinearAttention"],
        "fla.layers.linearized": ["LinearizedAttention"],
        "fla.layers.log_linear_mamba2": ["LogLinearMamba2"],
        "fla.layers.mamba": ["Mamba"],
        "fla.layers.mamba2": ["Mamba2"],
        "fla.layers.mamba3": ["Mamba3"],
        "fla.layers.mesa_net": ["MesaNet"],
        "fla.layers.mla": ["MultiheadLatentAttention"],
        "fla.layers.mom": ["MomAttention"],
        "fla.layers.multiscale_retention": ["MultiScaleRetention"],
        "fla.layers.precond_gated_deltanet": ["PrecondGatedDeltaNet"],
        "fla.layers.precond_kda": ["PrecondKDA"],
        "fla.layers.raven": ["Raven"],
        "fla.layers.rodimus": ["RodimusAttention", "SlidingWindowSharedKeyAttention"],
        "fla.layers.rwkv4": ["RWKV4Attention", "RWKV4FeedForward"],
        "fla.layers.rwkv6": [
            "LoRA",
            "LerpLinear",
            "DDLerpLinear",
            "RWKV6Attention",
            "RWKV6FeedForward",
        ],
        "fla.layers.rwkv7": ["RWKV7Attention", "RWKV7FeedForward"],
        "fla.layers.simple_gla": ["SimpleGatedLinearAttention"],
    },
)

if TYPE_CHECKING:  # what editors and type checkers see
    from fla.layers.abc import *
    from fla.layers.attn import *
    from fla.layers.based import *
    from fla.layers.bitattn import *
    from fla.layers.block_sparse_attn import *
    from fla.layers.comba import *
    from fla.layers.delta_net import *
    from fla.layers.deltaformer import *
    from fla.layers.dilated_attn import *
    from fla.layers.gated_deltanet import *
    from fla.layers.gated_deltaproduct import *
    from fla.layers.gdn2 import *
    from fla.layers.gla import *
    from fla.layers.gsa import *
    from fla.layers.hgrn import *
    from fla.layers.kda import *
    from fla.layers.lightnet import *
    from fla.layers.linear_attn import *
    from fla.layers.linearized import *
    from fla.layers.log_linear_mamba2 import *
    from fla.layers.mamba import *
    from fla.layers.mamba2 import *
    from fla.layers.mamba3 import *
    from fla.layers.mesa_net import *
    from fla.layers.mla import *
    from fla.layers.mom import *
    from fla.layers.multiscale_retention import *
    from fla.layers.precond_gated_deltanet import *
    from fla.layers.precond_kda import *
    from fla.layers.raven import *
    from fla.layers.rodimus import *
    from fla.layers.rwkv4 import *
    from fla.layers.rwkv6 import *
    from fla.layers.rwkv7 import *
    from fla.layers.simple_gla import *
