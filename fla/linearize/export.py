# SPDX-License-Identifier: MIT
"""A student as transformers' own `Qwen3_5ForCausalLM`, which loads without this package and without
remote code.

That model's linear layers are the gated delta rule behind a short convolution with silu, without
rotary positions, with a gate that has no bias; its attention has q/k norms and an output gate,
which a weight of zero holds at one half. `NATIVE` are the options under which a student fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NATIVE: dict[str, Any] = dict(
    rule="gated_deltanet", rope=False, qk_norm=False, gate="swish", gate_bias=False, out_norm=True,
    conv_size=4, window=0,
)  # fmt: skip


def obstacle(config: Any) -> str | None:
    """Why a hybrid does not fit, or None where it does."""
    linear = config.linear or {}
    wrong = [f"{n}={linear.get(n)!r}" for n, x in NATIVE.items() if linear.get(n) != x]
    if wrong:
        wanted = ", ".join(f"{n}={x!r}" for n, x in NATIVE.items())
        return f"linear has {', '.join(wrong)}; Qwen3.5 wants {wanted}"
    if config.qk_norm is not True or config.qkv_bias or config.norm_after:
        return "Qwen3.5's attention has q/k norms per head, no biases, and its norms come first"
    if "sliding_attention" in config.layer_types:
        return "Qwen3.5 has no sliding windows"
    return None


def native_config(config: Any) -> Any:
    from transformers import Qwen3_5TextConfig

    head_dim = config.head_dim or config.hidden_size // config.num_heads
    return Qwen3_5TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        head_dim=head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=config.rope_theta,
            partial_rotary_factor=config.partial_rotary_factor,
            mrope_section=[head_dim // 2, 0, 0],
            mrope_interleaved=True,
        )
        | (config.rope_scaling or {}),
        layer_types=list(config.layer_types),
        linear_conv_kernel_dim=config.linear["conv_size"],
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        linear_num_key_heads=config.num_heads,
        linear_num_value_heads=config.num_heads,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _linear(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    def joined(kind: str) -> Tensor:
        return torch.cat([layer[f"{name}_{kind}.weight"] for name in "qkv"])

    return {
        "linear_attn.in_proj_qkv.weight": joined("proj"),
        "linear_attn.conv1d.weight": joined("conv1d"),
        "linear_attn.in_proj_z.weight": layer["g_proj.weight"],
        "linear_attn.in_proj_b.weight": layer["rule.b_proj.weight"],
        "linear_attn.in_proj_a.weight": layer["rule.decay.proj.weight"],
        "linear_attn.A_log": layer["rule.decay.A_log"],
        "linear_attn.dt_bias": layer["rule.decay.dt_bias"],
        "linear_attn.norm.weight": layer["o_norm.weight"],
        "linear_attn.out_proj.weight": layer["o_proj.weight"],
    }


def _softmax(layer: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    q = layer["q_proj.weight"].unflatten(0, (heads, -1))
    return {
        "self_attn.q_proj.weight": torch.cat([q, torch.zeros_like(q)], 1).flatten(0, 1),
        "self_attn.k_proj.weight": layer["k_proj.weight"],
        "self_attn.v_proj.weight": layer["v_proj.weight"],
        "self_attn.o_proj.weight": 2 * layer["o_proj.weight"],
        "self_attn.q_norm.weight": layer["q_norm.weight"] - 1,
        "self_attn.k_norm.weight": layer["k_norm.weight"] - 1,
    }


@torch.no_grad()
def to_qwen3_5(student: Any) -> Any:
    """A `Qwen3_5ForCausalLM` with the student's weights and logits, in fp32 (its norms hold their
    weight less one, which bf16 would round); `ValueError` where `obstacle` names one.
    """
    from transformers import Qwen3_5ForCausalLM

    config = student.config
    reason = obstacle(config)
    if reason is not None:
        raise ValueError(f"export: it cannot be a Qwen3.5 model: {reason}")
    model: Any = Qwen3_5ForCausalLM(native_config(config))
    model.to(torch.float32)
    source = {n: x.float() for n, x in student.state_dict().items()}
    state = {
        "model.embed_tokens.weight": source["model.embeddings.weight"],
        "model.norm.weight": source["model.norm.weight"] - 1,
        "lm_head.weight": source["lm_head.weight"],
    }
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}."
        own = {n.removeprefix(prefix): x for n, x in source.items() if n.startswith(prefix)}
        attn = {n.removeprefix("attn."): x for n, x in own.items() if n.startswith("attn.")}
        linear = kind == "linear_attention"
        mixer = _linear(attn) if linear else _softmax(attn, config.num_heads)
        mixer |= {n: x for n, x in own.items() if n.startswith("mlp.")}
        mixer["input_layernorm.weight"] = own["attn_norm.weight"] - 1
        mixer["post_attention_layernorm.weight"] = own["mlp_norm.weight"] - 1
        state |= {prefix + n: x for n, x in mixer.items()}
    model.load_state_dict(state)
    return model.eval()
