# SPDX-License-Identifier: MIT
"""Operators: functions on tensors, one page per operator (`fla/ops/<op>.py`), on one engine
(`fla/ops/engine`).
"""

from fla._lazy import lazy_names

NAMES = {
    "fla.ops.linear_attn": [
        "chunk_linear_attn",
        "fused_chunk_linear_attn",
        "fused_recurrent_linear_attn",
        "naive_recurrent_linear_attn",
        "naive_chunk_linear_attn",
    ],
    "fla.ops.simple_gla": [
        "chunk_simple_gla",
        "fused_chunk_simple_gla",
        "fused_recurrent_simple_gla",
        "parallel_simple_gla",
        "naive_recurrent_simple_gla",
        "naive_chunk_simple_gla",
        "naive_parallel_simple_gla",
    ],
    "fla.ops.retention": [
        "naive_recurrent_retention",
        "naive_retention",
        "chunk_retention",
        "fused_chunk_retention",
        "fused_recurrent_retention",
        "parallel_retention",
    ],
    "fla.ops.lightning_attn": [
        "naive_recurrent_lightning_attn",
        "chunk_lightning_attn",
        "fused_recurrent_lightning_attn",
    ],
    "fla.ops.gla": [
        "naive_recurrent_gla",
        "chunk_gla",
        "fused_chunk_gla",
        "fused_recurrent_gla",
    ],
    "fla.ops.hgrn": [
        "naive_recurrent_hgrn",
        "naive_chunk_hgrn",
        "chunk_hgrn",
        "fused_recurrent_hgrn",
    ],
    "fla.ops.gsa": [
        "naive_recurrent_gsa",
        "chunk_gsa",
        "fused_recurrent_gsa",
    ],
    "fla.ops.abc": [
        "naive_recurrent_abc",
        "naive_cumsum_abc",
        "chunk_abc",
        "fused_recurrent_abc",
    ],
    "fla.ops.rwkv6": [
        "naive_recurrent_rwkv6",
        "chunk_rwkv6",
        "fused_recurrent_rwkv6",
    ],
    "fla.ops.rwkv7": [
        "naive_recurrent_rwkv7",
        "chunk_rwkv7",
        "fused_recurrent_rwkv7",
        "fused_mul_recurrent_rwkv7",
        "fused_addcmul_rwkv7",
        "torch_addcmul_rwkv7",
        "fused_k_rwkv7",
        "k_update_ref",
        "gate_output_correction",
        "gate_output_correction_ref",
        "channel_mixing_rwkv7",
        "channel_mixing_rwkv7_torch",
    ],
    "fla.ops.generalized_delta_rule": [
        "naive_recurrent_dplr_delta_rule",
        "naive_recurrent_iplr_delta_rule",
        "dplr_recurrence",
        "dplr_chunkwise",
        "iplr_recurrence",
        "iplr_chunkwise",
        "chunk_dplr_delta_rule",
        "fused_recurrent_dplr_delta_rule",
        "chunk_iplr_delta_rule",
        "fused_recurrent_iplr_delta_rule",
    ],
    "fla.ops.delta_rule": [
        "chunk_delta_rule",
        "fused_recurrent_delta_rule",
        "naive_recurrent_delta_rule",
        "delta_rule_recurrence",
        "delta_rule_chunkwise",
        "delta_rule_parallel",
    ],
    "fla.ops.gated_delta_rule": [
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "recurrent_gated_delta_rule",
        "chunk_gdn",
        "fused_recurrent_gdn",
        "naive_recurrent_gated_delta_rule",
        "naive_chunk_gated_delta_rule",
        "naive_gdn_gate",
        "fused_gdn_gate",
    ],
    "fla.ops.gated_delta_product": [
        "naive_recurrent_gated_delta_product",
        "chunk_gated_delta_product",
        "chunk_gated_delta_product_ref",
        "fused_recurrent_gated_delta_product",
    ],
    "fla.ops.kda": [
        "naive_kda_gate",
        "fused_kda_gate",
        "naive_kda_lowerbound_gate",
        "naive_recurrent_kda",
        "naive_chunk_kda",
        "chunk_kda",
        "fused_recurrent_kda",
    ],
    "fla.ops.gdn2": [
        "naive_recurrent_gdn2",
        "naive_chunk_gdn2",
        "chunk_gdn2",
        "fused_recurrent_gdn2",
    ],
    "fla.ops.comba": [
        "naive_recurrent_comba",
        "naive_chunk_comba",
        "chunk_comba",
        "fused_recurrent_comba",
    ],
    "fla.ops.gated_oja_rule": [
        "naive_recurrent_gated_oja_rule",
        "chunk_gated_oja_rule",
        "fused_recurrent_gated_oja_rule",
    ],
    "fla.ops.precond_gated_delta_rule": [
        "naive_recurrent_precond_gated_delta_rule",
        "chunk_precond_gated_delta_rule",
        "fused_recurrent_precond_gated_delta_rule",
    ],
    "fla.ops.precond_kda": [
        "naive_recurrent_precond_kda",
        "chunk_precond_kda",
        "fused_recurrent_precond_kda",
    ],
}

__getattr__, __all__ = lazy_names(__name__, NAMES)
