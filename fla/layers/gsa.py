# SPDX-License-Identifier: MIT
"""Gated slot attention: Zhang et al. (2024), arXiv:2409.07146."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers import mixer
from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, multiple, whole
from fla.modules import RMSNorm, ShortConvolution
from fla.ops.gsa import chunk_gsa, fused_recurrent_gsa


class GatedSlotAttention(RecurrentMixer):
    """GSA between projections, on `[B, T, hidden_size]`.

        q, k = map(W x)        v = swish(W_v x)
        g = log sigmoid(W_f x) / gate_logit_normalizer        s = 1 - exp(g)
        o = W_o rms_norm(swish(gsa(q, k, v, s, g)))

    The norm's eps is `o_norm_eps`: published code leaves it at 1e-5 and takes `norm_eps` without
    using it. `use_output_gate` is kept for published configs: no published layer has such a gate,
    and it changes nothing. `feature_map` is an activation or "t2r". Without `use_norm` there is no
    norm; published code has one all the same.

    Example:
        >>> import torch
        >>> GatedSlotAttention(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 8,
        feature_map: str = "swish",
        use_output_gate: bool = False,
        use_norm: bool = True,
        layer_idx: int | None = None,
        scale: float = 1.0,
        o_norm_eps: float = 1e-5,
    ):
        super().__init__()
        name = "GatedSlotAttention"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        groups = multiple(name, "num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        key_dim = whole(name, "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole(name, "hidden_size * expand_v", hidden_size * expand_v)
        self.head_k_dim = multiple(name, "the key width", key_dim, "num_heads", num_heads)
        self.head_v_dim = multiple(name, "the value width", value_dim, "num_heads", num_heads)
        self.num_slots = self.head_k_dim if num_slots is None else num_slots
        self.gate_logit_normalizer, self.scale = gate_logit_normalizer, scale
        self.feature_map = mixer.feature_map(name, feature_map, self.head_k_dim)
        self.use_short_conv, self.use_norm = use_short_conv, use_norm
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim // groups, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim // groups, bias=False)
        self.f_proj = nn.Linear(hidden_size, self.num_kv_heads * self.num_slots, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(key_dim // groups, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(value_dim // groups, conv_size, conv_bias)
        if use_norm:
            self.g_norm = RMSNorm(value_dim, elementwise_affine, eps=o_norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k, v), conv = self.project(x, context)
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
        q, k = self.feature_map(q), self.feature_map(k)
        v = F.silu(v).unflatten(-1, (-1, self.head_v_dim))
        g = F.logsigmoid(promote_to_fp32(self.f_proj(x)).unflatten(-1, (-1, self.num_slots)))
        g = g / self.gate_logit_normalizer
        rule = fused_recurrent_gsa if self.token_by_token(x) else chunk_gsa
        s = (1 - g.exp()).to(v.dtype)
        o, state = rule(q, k, v, s, g, scale=self.scale, **context.sequences)
        o = F.silu(o.flatten(-2))
        o = self.g_norm(o) if self.use_norm else o
        return self.o_proj(o), context.after(state, conv)
