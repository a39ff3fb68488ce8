# SPDX-License-Identifier: MIT
"""Checkpoints of transformers' own architectures as ours, and back.

Whole models, with equal logits: Llama, Mistral, Qwen2 and Qwen3 as `transformer`; Qwen3.5 (its
text model, dense) as a hybrid `gated_deltanet`; Mamba and Mamba-2. Single layers, with equal
outputs: the linear attention of Qwen3-Next as `GatedDeltaNet` and that of Kimi-Linear as
`KimiDeltaAttention`; the experts of those models have no counterpart here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one of transformers' architectures reads here.

    Fields:
        model_type: ours.
        names: parts of parameter names, (theirs, ours).
        fields: config fields, theirs to ours, where the names differ.
        same: config fields with one name.
        check: further config fields; raises `ValueError` for a config that has no counterpart.
        state: further changes to the parameters, before the names change (with back, too).
    """

    model_type: str
    names: tuple[tuple[str, str], ...] = ()
    fields: dict[str, str] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    check: Callable[[Any], dict[str, Any]] = lambda config: {}
    state: Callable[[StateDict, Any, bool], StateDict] = lambda state, config, back: state


COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "initializer_range",
)
LLAMA_NAMES = (
    ("embed_tokens", "embeddings"),
    ("self_attn", "attn"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "mlp_norm"),
)
LLAMA_FIELDS = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
}


def _llama(config: Any) -> dict[str, Any]:
    """rope_theta, biases and window of a Llama-style config."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"convert: rope_type is {rope['rope_type']!r}; only 'default' is here")
    kind = config.model_type
    if kind == "llama" and (config.attention_bias or config.mlp_bias):
        raise ValueError("convert: attention_bias and mlp_bias have no counterpart; drop them")
    kinds = set(getattr(config, "layer_types", None) or [])
    windowed = (kind == "mistral" and config.sliding_window) or "sliding_attention" in kinds
    return {
        "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "qk_norm_eps": config.rms_norm_eps,
        "head_dim": getattr(config, "head_dim", None),
        "window_size": config.sliding_window if windowed else None,
    }


def _qwen3_5(config: Any) -> dict[str, Any]:
    """The linear layers' sizes, and the attention of the others."""
    if config.attention_bias:
        raise ValueError("convert: attention_bias has no counterpart in a hybrid; drop it")
    rope = config.rope_parameters or {}
    return {
        "head_dim": config.linear_key_head_dim,
        "num_heads": config.linear_num_key_heads,
        "num_v_heads": config.linear_num_value_heads,
        "expand_v": config.linear_value_head_dim / config.linear_key_head_dim,
        "attn": {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "qk_norm": True,
            "qk_norm_eps": config.rms_norm_eps,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
            "head_dim": config.head_dim,
            "output_gate": True,
        },
    }


def _qwen3_5_state(state: StateDict, config: Any, back: bool) -> StateDict:
    """Qwen3.5's norms hold their weight less one, and its linear layers are fused."""
    inner = f".{'attn' if back else 'linear_attn'}."
    linear = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    convert = linear_attention_to_qwen if back else linear_attention_of_qwen
    out = dict(state)
    for i in linear:
        prefix = f"model.layers.{i}{inner}"
        own = {n.removeprefix(prefix): out.pop(n) for n in list(out) if n.startswith(prefix)}
        target = prefix.replace(inner, ".linear_attn." if back else ".attn.")
        out |= {target + name: x for name, x in convert(own, config).items()}
    ends = ("_norm.weight", "layernorm.weight", "model.norm.weight")
    shift = -1 if back else 1
    return {
        n: x + shift if n.endswith(ends) and not n.endswith("attn.o_norm.weight") else x
        for n, x in out.items()
    }


def _mamba2(config: Any) -> dict[str, Any]:
    """transformers' Mamba-2 norms over all channels, ours over each group."""
    if config.n_groups != 1:
        raise ValueError(
            f"convert: n_groups is {config.n_groups}; transformers' norm runs over all groups at "
            "once, ours over each, so only n_groups=1 is the same model"
        )
    return {}


SSM = {
    "layer_norm_epsilon": "norm_eps",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
SSM_SAME = (
    *COMMON,
    "state_size",
    "expand",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "residual_in_fp32",
)
LLAMA = Layout(
    "transformer", LLAMA_NAMES, LLAMA_FIELDS, (*COMMON, "intermediate_size"), check=_llama
)
LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "qwen3_5_text": Layout(
        "gated_deltanet",
        LLAMA_NAMES,
        {"rms_norm_eps": "norm_eps", "linear_conv_kernel_dim": "conv_size"},
        (*COMMON, "intermediate_size", "layer_types"),
        _qwen3_5,
        _qwen3_5_state,
    ),
    "mamba": Layout(
        "mamba",
        fields=SSM | {"time_step_rank": "dt_rank", "time_step_scale": "dt_scale"},
        same=(*SSM_SAME, "intermediate_size"),
    ),
    "mamba2": Layout(
        "mamba2",
        fields=SSM | {"time_step_limit": "dt_limit"},
        same=(*SSM_SAME, "num_heads", "head_dim", "n_groups", "chunk_size"),
        check=_mamba2,
    ),
}


def convert_config(config: Any) -> Any:
    """Our config for one of transformers'; `ValueError` where there is none.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> convert_config(config).num_kv_heads
        2
    """
    import fla.models

    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise ValueError(
            f"convert: model_type {config.model_type!r} is not known; expected one of "
            f"{', '.join(LAYOUTS)}"
        )
    values = {name: getattr(config, name) for name in layout.same}
    values |= {ours: getattr(config, theirs) for theirs, ours in layout.fields.items()}
    classes = {c.model_type: c for n, c in vars(fla.models).items() if n.endswith("Config")}
    return classes[layout.model_type](**values | layout.check(config))


def convert_state_dict(state: StateDict, config: Any, back: bool = False) -> StateDict:
    """Parameters of a model with transformers' `config` under our names; with `back` the other way
    round, from ours to theirs.
    """
    layout = LAYOUTS[config.model_type]
    out = {}
    for name, value in layout.state(state, config, back).items():
        parts = name.split(".")
        for theirs, ours in layout.names:
            old, new = (ours, theirs) if back else (theirs, ours)
            parts = [new if p == old else p for p in parts]
        out[".".join(parts)] = value
    return out


def convert_model(model: Any) -> Any:
    """Our model with the weights of one of transformers'; the same logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> type(convert_model(LlamaForCausalLM(config))).__name__
        'TransformerForCausalLM'
    """
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_config(convert_config(model.config)).to(model.dtype)
    ours.load_state_dict(convert_state_dict(model.state_dict(), model.config))
    return ours.train(model.training)


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
