# SPDX-License-Identifier: MIT
"""The models every model test runs over: each architecture alone and as a hybrid."""

import torch

from fla.models import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    TransformerConfig,
    TransformerForCausalLM,
)

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, intermediate_size=48)
GDN = dict(num_heads=2, head_dim=8)

MODELS = {
    "gated_deltanet": (GatedDeltaNetForCausalLM, GatedDeltaNetConfig, GDN),
    "gated_deltanet-hybrid": (
        GatedDeltaNetForCausalLM,
        GatedDeltaNetConfig,
        GDN | dict(attn=dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=4)),
    ),
    "delta_net": (DeltaNetForCausalLM, DeltaNetConfig, dict(num_heads=2)),
    "delta_net-hybrid": (
        DeltaNetForCausalLM,
        DeltaNetConfig,
        dict(num_heads=2, layer_types=["full_attention", "linear_attention", "linear_attention"]),
    ),
    "transformer": (
        TransformerForCausalLM,
        TransformerConfig,
        dict(num_heads=4, num_kv_heads=2, qk_norm=True),
    ),
    "transformer-window": (
        TransformerForCausalLM,
        TransformerConfig,
        dict(num_heads=4, window_size=4),
    ),
}


def make(name: str, **changes):
    model, config, arguments = MODELS[name]
    torch.manual_seed(0)
    return model(config(**{**TINY, **arguments, **changes})).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(3))
