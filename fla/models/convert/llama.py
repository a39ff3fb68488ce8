# SPDX-License-Identifier: MIT
"""Llama, Mistral, Qwen2, Qwen3 and OLMo-2 as `transformer`."""

from typing import Any

from fla.models.convert.layout import COMMON, LLAMA_NAMES, Layout, no_bias, rope_theta

FIELDS = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
}
# its norms come after attention and MLP, and the first of them has Llama's name of the second
OLMO_NAMES = (
    *LLAMA_NAMES[:2],
    ("post_attention_layernorm", "attn_norm"),
    ("post_feedforward_layernorm", "mlp_norm"),
)


def _fields(config: Any) -> dict[str, Any]:
    """Positions, biases, norms and window of a Llama-style config."""
    kind = config.model_type
    if kind != "qwen2":
        no_bias(config, "attention_bias", "mlp_bias")
    kinds = getattr(config, "layer_types", None) or []
    windowed = (kind == "mistral" and config.sliding_window) or "sliding_attention" in kinds
    return rope_theta(config) | {
        "qkv_bias": kind == "qwen2",
        "qk_norm": {"qwen3": True, "olmo2": "all_heads"}.get(kind, False),
        "qk_norm_eps": config.rms_norm_eps,
        "head_dim": getattr(config, "head_dim", None),
        "window_size": config.sliding_window if windowed else None,
        "layer_types": list(kinds) if "sliding_attention" in kinds else None,
        "norm_after": ["full_attention"] if kind == "olmo2" else None,
    }


SAME = (*COMMON, "intermediate_size")
LLAMA = Layout("transformer", LLAMA_NAMES, FIELDS, SAME, _fields)
LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "olmo2": Layout("transformer", OLMO_NAMES, FIELDS, SAME, _fields),
}
