# SPDX-License-Identifier: MIT
"""Kimi-Linear as a hybrid `kda` with latent attention and experts."""

from functools import partial
from typing import Any

import torch

from fla.models.convert.layout import (
    COMMON,
    HYBRID_FIELDS,
    LLAMA_NAMES,
    Layout,
    StateDict,
    map_layer,
    no_bias,
    rename,
)

LATENT_EPS = 1e-6  # for norms on latents; the config's value is for the other norms


def _fields(config: Any) -> dict[str, Any]:
    no_bias(config, "attention_bias")
    sparse = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    experts = {
        "layers": sparse,
        "num_experts": config.num_local_experts,
        "top_k": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "shared_size": config.moe_intermediate_size * config.n_shared_experts,
        "scoring": "sigmoid",
        "renormalize": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
        "num_groups": config.n_group,
        "top_groups": config.topk_group,
    }
    sizes = ("q_lora_rank", "qk_rope_head_dim", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim")
    return {
        "expand_v": 1.0,
        "attn": {
            "kind": "mla",
            "num_heads": config.num_attention_heads,
            "qk_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "rope_theta": None,
            "latent_norm_eps": LATENT_EPS,
            **{name: getattr(config, name) for name in sizes},
        },
        "moe": experts if sparse else None,
    }


def _state(state: StateDict, config: Any, back: bool) -> StateDict:
    out, inner = dict(state), "attn" if back else "self_attn"
    linear = linear_attention_to_kimi if back else linear_attention_of_kimi
    latent = partial(_latent_to_kimi if back else _latent_of_kimi, config=config)
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}."
        own = f"{prefix}{inner}."
        map_layer(out, own, own, linear if kind == "linear_attention" else latent)
        names = {f"{prefix}mlp.gate.e_score_correction_bias": f"{prefix}mlp.correction_bias"}
        for part in ("gate", "up", "down"):
            theirs = f"{prefix}mlp.shared_experts.{part}_proj.weight"
            names[theirs] = f"{prefix}mlp.shared_expert.{part}_proj.weight"
        out = rename(out, names, back)
    return out


KIMI = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "forget_gate.f_a_proj.weight": "f_proj.0.weight",
    "forget_gate.f_b_proj.weight": "f_proj.1.weight",
    "forget_gate.dt_bias": "dt_bias",
    "b_proj.weight": "b_proj.weight",
    "g_a_proj.weight": "g_proj.0.weight",
    "g_b_proj.weight": "g_proj.1.weight",
    "o_norm.weight": "o_norm.weight",
    "o_proj.weight": "o_proj.weight",
}


def linear_attention_of_kimi(state: StateDict) -> StateDict:
    """The parameters of Kimi-Linear's delta attention as those of a `KimiDeltaAttention`."""
    out = {ours: state[theirs] for theirs, ours in KIMI.items()}
    convs = state["conv1d.weight"].chunk(3)
    out |= {f"{n}_conv1d.weight": x for n, x in zip("qkv", convs, strict=True)}
    bias = state["g_b_proj.weight"]
    return out | {
        "A_log": state["forget_gate.A_log"].flatten(),
        "g_proj.1.bias": bias.new_zeros(bias.shape[0]),
    }


def linear_attention_to_kimi(state: StateDict) -> StateDict:
    """The inverse of `linear_attention_of_kimi`; a bias of the gate that is not 0 is refused."""
    if state["g_proj.1.bias"].any():
        raise ValueError("convert: g_proj.1.bias is not 0, and Kimi-Linear's gate has no bias")
    out = {theirs: state[ours] for theirs, ours in KIMI.items()}
    out["conv1d.weight"] = torch.cat([state[f"{n}_conv1d.weight"] for n in "qkv"])
    out["forget_gate.A_log"] = state["A_log"].view(1, 1, -1, 1)
    return out


LATENT = {
    "kv_a_layernorm.weight": "kv_proj.1.weight",
    "kv_b_proj.weight": "kv_proj.2.weight",
}
LOW_RANK_QUERY = {
    "q_a_proj.weight": "q_proj.0.weight",
    "q_a_layernorm.weight": "q_proj.1.weight",
    "q_b_proj.weight": "q_proj.2.weight",
}


def _latent_names(config: Any) -> dict[str, str]:
    return LATENT if config.q_lora_rank is None else LATENT | LOW_RANK_QUERY


def _latent_of_kimi(state: StateDict, config: Any) -> StateDict:
    """The parameters of a latent attention, whose latent and shared key are one projection."""
    both = state.pop("kv_a_proj_with_mqa.weight")
    latent, turned = both.split([config.kv_lora_rank, config.qk_rope_head_dim])
    parts = {"kv_proj.0.weight": latent, "k_rope.weight": turned}
    return rename(state, _latent_names(config), False) | parts


def _latent_to_kimi(state: StateDict, config: Any) -> StateDict:
    both = torch.cat([state.pop("kv_proj.0.weight"), state.pop("k_rope.weight")])
    return rename(state, _latent_names(config), True) | {"kv_a_proj_with_mqa.weight": both}


LAYOUTS = {
    "kimi_linear": Layout(
        "kda",
        LLAMA_NAMES,
        HYBRID_FIELDS | {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads"},
        (*COMMON, "layer_types", "intermediate_size"),
        _fields,
        _state,
    )
}
