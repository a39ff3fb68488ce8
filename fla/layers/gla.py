# SPDX-License-Identifier: MIT
"""Gated linear attention: Yang et al. (2023), arXiv:2312.06635."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import (
    Context,
    RecurrentMixer,
    State,
    check_mode,
    low_rank,
    multiple,
    repeat_heads,
    whole,
)
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.modules.activations import ACT2FN
from fla.ops.gla import chunk_gla, fused_recurrent_gla


class GatedProjections(RecurrentMixer):
    """What GLA, retention and simple GLA share: projections with grouped key heads, optional
    convolutions, and a gated norm on the way out.

        o = W_o (rms_norm(o) * gate_fn(W_g x))         or, without output gate, W_o rms_norm(o)
    """

    def __init__(
        self,
        mode: str,
        hidden_size: int,
        expand_k: float,
        expand_v: float,
        num_heads: int,
        num_kv_heads: int | None,
        feature_map: str | None,
        use_short_conv: bool,
        conv_size: int,
        conv_bias: bool,
        use_output_gate: bool,
        gate_fn: str,
        elementwise_affine: bool,
        norm_eps: float,
        fuse_norm: bool,
        layer_idx: int | None,
    ):
        super().__init__()
        name = type(self).__name__
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        groups = multiple(name, "num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        key_dim = whole(name, "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole(name, "hidden_size * expand_v", hidden_size * expand_v)
        self.head_k_dim = multiple(name, "the key width", key_dim, "num_heads", num_heads)
        self.head_v_dim = multiple(name, "the value width", value_dim, "num_heads", num_heads)
        for what, value in (("gate_fn", gate_fn), ("feature_map", feature_map)):
            if value is not None and value not in ACT2FN:
                raise ValueError(
                    f"{name}: {what} is {value!r}; expected one of {', '.join(ACT2FN)}"
                )
        self.feature_map, self.gate_fn = feature_map, gate_fn
        self.use_short_conv, self.use_output_gate = use_short_conv, use_output_gate
        self.key_dim, self.value_dim = key_dim, value_dim
        self.key_dim_per_group, self.value_dim_per_group = key_dim // groups, value_dim // groups
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim_per_group, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim_per_group, bias=False)
        if use_short_conv:
            for letter, width in zip(
                "qkv", (key_dim, self.key_dim_per_group, self.value_dim_per_group), strict=True
            ):
                conv = ShortConvolution(width, conv_size, bias=conv_bias)
                self.add_module(f"{letter}_conv1d", conv)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        # the norm has another name with any other gate, "silu" included
        self.fused_gate = use_output_gate and fuse_norm and gate_fn == "swish"
        if self.fused_gate:
            self.g_norm_swish_gate = FusedRMSNormGated(
                self.head_v_dim, elementwise_affine, norm_eps
            )
        else:
            self.g_norm = RMSNorm(self.head_v_dim, elementwise_affine, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, tuple]:
        """q, k, v `[B, T, heads, .]` after convolution and feature map, and new conv states."""
        (q, k, v), conv = self.project(x, context)
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        if self.feature_map is not None:
            q, k = ACT2FN[self.feature_map](q), ACT2FN[self.feature_map](k)
        k, v = repeat_heads(self.num_heads, self.num_kv_heads, k, v)
        return q, k, v, conv

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output projection."""
        if not self.use_output_gate:
            return self.o_proj(self.g_norm(o).flatten(-2))
        g = self.g_proj(x).view_as(o)
        if self.fused_gate:
            return self.o_proj(self.g_norm_swish_gate(o, g).flatten(-2))
        return self.o_proj((self.g_norm(o) * ACT2FN[self.gate_fn](g)).flatten(-2))


class GatedLinearAttention(GatedProjections):
    """GLA between projections, on `[B, T, hidden_size]`.

        q, k, v = W x          g = log sigmoid(W_gk x) / gate_logit_normalizer
        o = W_o (rms_norm(gla(q, k, v, g)) * swish(W_g x))

    `clamp_min` bounds g from below; W_gk has rank `gate_low_rank_dim`.

    Example:
        >>> import torch
        >>> GatedLinearAttention(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ):
        super().__init__(
            mode,
            hidden_size,
            expand_k,
            expand_v,
            num_heads,
            num_kv_heads,
            feature_map,
            use_short_conv,
            conv_size,
            conv_bias,
            use_output_gate,
            gate_fn,
            elementwise_affine,
            norm_eps,
            fuse_norm,
            layer_idx,
        )
        self.gk_proj = low_rank(hidden_size, gate_low_rank_dim, self.key_dim_per_group, bias=True)
        self.gate_logit_normalizer, self.clamp_min = gate_logit_normalizer, clamp_min

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        g = self.gk_proj(x).unflatten(-1, (-1, self.head_k_dim))
        g = F.logsigmoid(promote_to_fp32(g)) / self.gate_logit_normalizer
        (g,) = repeat_heads(self.num_heads, self.num_kv_heads, g)
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        rule = fused_recurrent_gla if self.token_by_token(x) else chunk_gla
        o, state = rule(q, k, v, g, **context.sequences)
        return self.finish(o, x), context.after(state, conv)
