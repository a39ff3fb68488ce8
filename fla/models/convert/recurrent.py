# SPDX-License-Identifier: MIT
"""Mamba, Mamba-2 and RWKV-4."""

from typing import Any

from fla.models.convert.layout import COMMON, Layout, StateDict


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
# (theirs, ours), in whole parameter names
RWKV = (
    ("rwkv.blocks.", "model.layers."),
    ("rwkv.embeddings.", "model.embeddings."),
    ("rwkv.ln_out.", "model.norm."),
    ("head.weight", "lm_head.weight"),
    (".pre_ln.", ".pre_norm."),
    (".ln1.", ".attn_norm."),
    (".ln2.", ".ffn_norm."),
    (".attention.key.", ".attn.k_proj."),
    (".attention.value.", ".attn.v_proj."),
    (".attention.receptance.", ".attn.r_proj."),
    (".attention.output.", ".attn.o_proj."),
    (".attention.time_decay", ".attn.w"),
    (".attention.time_first", ".attn.u"),
    (".attention.time_mix_key", ".attn.x_k"),
    (".attention.time_mix_value", ".attn.x_v"),
    (".attention.time_mix_receptance", ".attn.x_r"),
    (".feed_forward.time_mix_key", ".ffn.x_k"),
    (".feed_forward.time_mix_receptance", ".ffn.x_r"),
    (".feed_forward.", ".ffn."),
)


def _rwkv_state(state: StateDict, config: Any, back: bool) -> StateDict:
    """Names and values between RWKV's and ours: its mixes are `[1, 1, hidden_size]` and weigh the
    token itself, ours weigh the token before.
    """
    out = {}
    for name, x in state.items():
        mix = name.rsplit(".", 1)[-1].startswith(("time_mix_", "x_"))
        for theirs, ours in RWKV:
            old, new = (ours, theirs) if back else (theirs, ours)
            name = new + name.removeprefix(old) if name.startswith(old) else name.replace(old, new)
        out[name] = 1 - (x.view(1, 1, -1) if back else x.flatten()) if mix else x
    return out


LAYOUTS = {
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
    "rwkv": Layout(
        "rwkv4",
        fields={"layer_norm_epsilon": "norm_eps", "attention_hidden_size": "attention_size"},
        same=(*COMMON[:-1], "intermediate_size"),
        state=_rwkv_state,
    ),
}
