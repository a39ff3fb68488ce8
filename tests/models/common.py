# SPDX-License-Identifier: MIT
"""The models every model test runs over: each architecture alone and as a hybrid."""

import torch

import fla.models
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
    "gated_deltanet-dilated": (
        GatedDeltaNetForCausalLM,
        GatedDeltaNetConfig,
        GDN
        | dict(
            attn=[
                dict(
                    layers=[1],
                    kind="dilated",
                    num_heads=4,
                    segment_lengths=[4, 8],
                    dilation_rates=[1, 3],
                ),
                dict(
                    layers=[2],
                    kind="block_sparse",
                    num_heads=4,
                    block_size=2,
                    pattern_options=dict(window=3),
                ),
            ]
        ),
    ),
    "gated_deltanet-experts": (
        GatedDeltaNetForCausalLM,
        GatedDeltaNetConfig,
        GDN
        | dict(
            attn=dict(layers=[1], num_heads=4, qk_norm="all_heads", output_gate=True),
            norm_after=["full_attention"],
            moe=dict(
                layers=[1, 2],
                num_experts=4,
                top_k=2,
                intermediate_size=16,
                shared_size=8,
                shared_gate=True,
                balance_loss=0.01,
            ),
        ),
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
    "transformer-window-latent": (
        TransformerForCausalLM,
        TransformerConfig,
        dict(
            attn=dict(
                kind="mla",
                num_heads=2,
                window_size=4,
                rope_theta=None,
                q_lora_rank=None,
                kv_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                qk_head_dim=12,
                v_head_dim=16,
            ),
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            moe=dict(
                num_experts=6,
                top_k=2,
                intermediate_size=16,
                scoring="sigmoid",
                num_groups=3,
                top_groups=2,
                scale=2.0,
            ),
        ),
    ),
    "transformer-window": (
        TransformerForCausalLM,
        TransformerConfig,
        dict(num_heads=4, window_size=4),
    ),
}
# each further architecture, its linear layers alone
HEADS = dict(num_heads=2)
SSM = dict(head_dim=16, state_size=8)
FAMILY = {
    "ABC": HEADS | dict(num_slots=8),
    "Comba": GDN | dict(num_v_heads=4),
    "DeltaFormer": HEADS | dict(num_kv_heads=1, qk_norm=True),
    "GatedDeltaNet2": GDN | dict(num_v_heads=4),
    "GatedDeltaProduct": GDN | dict(num_householder=2, use_forget_gate=True),
    "GLA": HEADS | dict(num_kv_heads=1, use_short_conv=True),
    "GSA": HEADS | dict(num_slots=8, num_kv_heads=1),
    "HGRN": {},
    "HGRN2": dict(expand_ratio=16),
    "KDA": GDN | dict(num_v_heads=4, allow_neg_eigval=True),
    "LightNet": dict(expand_ratio=16, gate_low_rank_dim=8),
    "LinearAttention": HEADS,
    "LogLinearMamba2": SSM,
    "Mamba": dict(intermediate_size=64, state_size=4),
    "Mamba2": SSM | dict(n_groups=2),
    "Mamba3": SSM,
    "MesaNet": GDN,
    "PrecondGatedDeltaNet": GDN,
    "PrecondKDA": GDN,
    "BitNet": dict(num_heads=4, num_kv_heads=2),
    "MLA": dict(
        num_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        qk_nope_head_dim=8,
        qk_head_dim=12,
    ),
    "LongNet": dict(num_heads=4, num_kv_heads=2, segment_lengths=[3, 8], dilation_rates=[1, 2]),
    "Mom": GDN | dict(num_memories=3, topk=2),
    "Raven": HEADS | dict(num_slots=8, topk=2, use_rope=True),
    "RetNet": HEADS,
    "Rodimus": dict(
        expand_ratio=8, tie_word_embeddings=False, ska_attn=dict(num_heads=4, window_size=4)
    ),
    "RWKV4": {},
    "RWKV6": HEADS | dict(proj_low_rank_dim=4, gate_low_rank_dim=4),
    "RWKV7": dict(
        head_dim=16, decay_low_rank_dim=4, gate_low_rank_dim=4, a_low_rank_dim=4, v_low_rank_dim=4
    ),
    "Samba": dict(state_size=4, attn=dict(layers=[1], num_heads=2, num_kv_heads=1, window_size=4)),
}
for _rule in ("gated_deltanet", "gla", "kda", "delta_net", "retnet", "mamba2", "rwkv7", "gsa"):
    MODELS[f"hybrid-{_rule}"] = (
        fla.models.HybridForCausalLM,
        fla.models.HybridConfig,
        dict(
            num_heads=4,
            num_kv_heads=2,
            qkv_bias=True,
            qk_norm=True,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear=dict(rule=_rule, slots=8)
            | (dict(window=4) if _rule in ("gated_deltanet", "gsa") else {})
            | (dict(conv_size=3, gate="sigmoid") if _rule in ("kda", "rwkv7") else {})
            | (dict(gate=None, out_norm=False, rope=False) if _rule == "delta_net" else {}),
        ),
    )
for _name, _arguments in FAMILY.items():
    _model, _config = (getattr(fla.models, _name + x) for x in ("ForCausalLM", "Config"))
    MODELS[_config.model_type] = (_model, _config, _arguments)


def make(name: str, **changes):
    model, config, arguments = MODELS[name]
    torch.manual_seed(0)
    return model(config(**{**TINY, **arguments, **changes})).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(3))
