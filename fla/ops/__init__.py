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
}

__getattr__, __all__ = lazy_names(__name__, NAMES)
