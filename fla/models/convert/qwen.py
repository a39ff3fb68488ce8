# SPDX-License-Identifier: MIT
"""Qwen3-Next, Qwen3.5 (its text model, dense or with experts) and OLMo-Hybrid as hybrid
`gated_deltanet`.
"""

from functools import partial
from typing import Any

import torch

from fla.models.convert.layout import (
    COMMON,
    HYBRID_FIELDS,
    LLAMA_NAMES,
    Layout,
    StateDict,
    linear_layers,
    map_layer,
    no_bias,
    rope_theta,
)


def _linear(config: Any) -> dict[str, Any]:
    """The linear layers' sizes, and the heads of the others."""
    no_bias(config, "attention_bias")
    return {
        "head_dim": config.linear_key_head_dim,
        "num_heads": config.linear_num_key_heads,
        "num_v_heads": config.linear_num_value_heads,
        "expand_v": config.linear_value_head_dim / config.linear_key_head_dim,
        "attn": {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "qk_norm_eps": config.rms_norm_eps,
            **rope_theta(config),
        },
    }


def _experts(config: Any) -> dict[str, Any] | None:
    """The mixtures of experts; None in a dense model. transformers counts every choice of a token
    in the load-balancing loss, `load_balance` their mean.
    """
    count = getattr(config, "num_experts", 0)
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", [])
    every = range(config.num_hidden_layers)
    layers = [i for i in every if count and (i + 1) % step == 0 and i not in dense]
    if not layers:
        return None
    balance = config.router_aux_loss_coef if config.output_router_logits else 0.0
    return {
        "layers": layers,
        "num_experts": count,
        "top_k": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "shared_size": config.shared_expert_intermediate_size,
        "shared_gate": True,
        "renormalize": getattr(config, "norm_topk_prob", True),
        "balance_loss": balance * config.num_experts_per_tok,
    }


def _qwen(config: Any) -> dict[str, Any]:
    values = _linear(config)
    values["attn"] |= {"qk_norm": True, "head_dim": config.head_dim, "output_gate": True}
    dense = {"intermediate_size": getattr(config, "intermediate_size", None)}
    return values | {"moe": _experts(config)} | dense


def _qwen_state(state: StateDict, config: Any, back: bool) -> StateDict:
    """Names and values between Qwen's and ours: its norms hold their weight less one, and its
    linear layers are fused.
    """
    convert = linear_attention_to_qwen if back else linear_attention_of_qwen
    inner, target = ("attn", "linear_attn") if back else ("linear_attn", "attn")
    out = dict(state)
    for i in linear_layers(config):
        prefix = f"model.layers.{i}."
        map_layer(out, f"{prefix}{inner}.", f"{prefix}{target}.", partial(convert, config=config))
    ends = ("_norm.weight", "layernorm.weight", "model.norm.weight")
    shift = -1 if back else 1
    return {
        n: x + shift if n.endswith(ends) and not n.endswith("attn.o_norm.weight") else x
        for n, x in out.items()
    }


def _olmo(config: Any) -> dict[str, Any]:
    values = _linear(config)
    values["attn"] |= {"qk_norm": "all_heads"}
    return values | {
        "allow_neg_eigval": config.linear_allow_neg_eigval,
        "norm_after": ["full_attention"],
        "o_norm_eps": 1e-5,
        "intermediate_size": config.intermediate_size,
    }


def _olmo_state(state: StateDict, config: Any, back: bool) -> StateDict:
    """Names and values between OLMo-Hybrid's and ours: its convolutions are one, and the norms of
    its attention layers come after, under the names that the linear layers' norms have one place
    further.
    """
    out = dict(state)
    inner, target = ("attn", "linear_attn") if back else ("linear_attn", "attn")
    convert = _join_convolutions if back else partial(_split_convolutions, config=config)
    for i in linear_layers(config):
        prefix = f"model.layers.{i}."
        map_layer(out, f"{prefix}{inner}.", f"{prefix}{target}.", convert)
    first, second = "post_attention_layernorm", "post_feedforward_layernorm"
    moves = [("mlp_norm", second), ("attn_norm", "mlp_norm")] if back else []
    moves = moves or [(first, "input_layernorm"), (second, first)]
    for i in linear_layers(config, "full_attention"):
        for old, new in moves:
            out[f"model.layers.{i}.{new}.weight"] = out.pop(f"model.layers.{i}.{old}.weight")
    return out


def _split_convolutions(state: StateDict, config: Any) -> StateDict:
    heads, K = config.linear_num_key_heads, config.linear_key_head_dim
    V = config.linear_num_value_heads * config.linear_value_head_dim
    convs = state.pop("conv1d.weight").split([heads * K, heads * K, V])
    return state | {f"{n}_conv1d.weight": x for n, x in zip("qkv", convs, strict=True)}


def _join_convolutions(state: StateDict) -> StateDict:
    convs = [state.pop(f"{n}_conv1d.weight") for n in "qkv"]
    return state | {"conv1d.weight": torch.cat(convs)}


def linear_attention_of_qwen(state: StateDict, config: Any) -> StateDict:
    """The parameters of a `linear_attn` of Qwen3-Next or Qwen3.5 as those of a `GatedDeltaNet`
    with `num_heads=config.linear_num_key_heads`, `num_v_heads=config.linear_num_value_heads`,
    `head_dim=config.linear_key_head_dim` and `norm_eps=config.rms_norm_eps`.
    """
    heads, K = config.linear_num_key_heads, config.linear_key_head_dim
    groups, V = config.linear_num_value_heads // heads, config.linear_value_head_dim
    if "in_proj_qkvz.weight" in state:  # Qwen3-Next: per key head q, k and its values and gates
        qkvz = state["in_proj_qkvz.weight"].unflatten(0, (heads, -1))
        q, k, v, z = (x.flatten(0, 1) for x in qkvz.split([K, K, groups * V, groups * V], 1))
        ba = state["in_proj_ba.weight"].unflatten(0, (heads, -1))
        b, a = (x.flatten(0, 1) for x in ba.split([groups, groups], 1))
    else:
        sizes = [heads * K, heads * K, heads * groups * V]
        q, k, v = state["in_proj_qkv.weight"].split(sizes)
        z, b, a = (state[f"in_proj_{n}.weight"] for n in "zba")
    convs = state["conv1d.weight"].split([heads * K, heads * K, heads * groups * V])
    return {
        **{f"{n}_proj.weight": x for n, x in zip("qkvgba", (q, k, v, z, b, a), strict=True)},
        **{f"{n}_conv1d.weight": x for n, x in zip("qkv", convs, strict=True)},
        "A_log": state["A_log"],
        "dt_bias": state["dt_bias"],
        "o_norm.weight": state["norm.weight"],
        "o_proj.weight": state["out_proj.weight"],
    }


def linear_attention_to_qwen(state: StateDict, config: Any) -> StateDict:
    """The inverse of `linear_attention_of_qwen`, in the layout of `config.model_type`."""
    heads = config.linear_num_key_heads
    q, k, v, z, b, a = (state[f"{n}_proj.weight"] for n in "qkvgba")
    out = {
        "conv1d.weight": torch.cat([state[f"{n}_conv1d.weight"] for n in "qkv"]),
        "A_log": state["A_log"],
        "dt_bias": state["dt_bias"],
        "norm.weight": state["o_norm.weight"],
        "out_proj.weight": state["o_proj.weight"],
    }
    if config.model_type.startswith("qwen3_next"):
        rows = [x.unflatten(0, (heads, -1)) for x in (q, k, v, z)]
        out["in_proj_qkvz.weight"] = torch.cat(rows, 1).flatten(0, 1)
        rows = [x.unflatten(0, (heads, -1)) for x in (b, a)]
        out["in_proj_ba.weight"] = torch.cat(rows, 1).flatten(0, 1)
    else:
        out["in_proj_qkv.weight"] = torch.cat([q, k, v])
        out |= {f"in_proj_{n}.weight": x for n, x in zip("zba", (z, b, a), strict=True)}
    return out


SAME = (*COMMON, "layer_types")
QWEN = Layout("gated_deltanet", LLAMA_NAMES, HYBRID_FIELDS, SAME, _qwen, _qwen_state)
LAYOUTS = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), QWEN),
    "olmo_hybrid": Layout("gated_deltanet", LLAMA_NAMES, HYBRID_FIELDS, SAME, _olmo, _olmo_state),
}
