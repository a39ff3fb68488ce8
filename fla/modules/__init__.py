# SPDX-License-Identifier: MIT
"""Building blocks: norms, short convolution, rotary embedding, MLP, losses. Plain torch, on any
device.
"""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.modules.feature_map": ["HedgehogFeatureMap", "T2RFeatureMap", "DPFPFeatureMap"],
        "fla.modules.fused_bitlinear": ["BitLinear", "FusedBitLinear"],
        "fla.modules.layernorm_gated": ["LayerNormGated", "RMSNormGated"],
        "fla.modules.convolution": ["ShortConvolution"],
        "fla.modules.fused_cross_entropy": ["FusedCrossEntropyLoss"],
        "fla.modules.fused_kl_div": ["FusedKLDivLoss"],
        "fla.modules.fused_linear_cross_entropy": ["FusedLinearCrossEntropyLoss"],
        "fla.modules.fused_norm_gate": [
            "FusedLayerNormGated",
            "FusedLayerNormSwishGate",
            "FusedLayerNormSwishGateLinear",
            "FusedRMSNormGated",
            "FusedRMSNormSwishGate",
            "FusedRMSNormSwishGateLinear",
        ],
        "fla.modules.l2norm": ["L2Norm"],
        "fla.modules.layernorm": [
            "GroupNorm",
            "GroupNormLinear",
            "LayerNorm",
            "LayerNormLinear",
            "RMSNorm",
            "RMSNormLinear",
        ],
        "fla.modules.long_conv": ["ImplicitLongConvolution", "LongConvolution"],
        "fla.modules.mlp": ["GatedMLP", "SubNormMLP", "SwiGLULinear"],
        "fla.modules.moe": ["Experts", "MixtureOfExperts"],
        "fla.modules.token_shift": ["TokenShift", "token_shift"],
        "fla.modules.rotary": ["RotaryEmbedding"],
    },
)
