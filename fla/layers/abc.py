# SPDX-License-Identifier: MIT
"""ABC: Peng et al. (2021), arXiv:2110.02488, in the gated form of Zhang et al. (2024),
arXiv:2409.07146.
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, multiple, whole
from fla.modules import FusedRMSNormGated, RMSNorm, RotaryEmbedding, ShortConvolution
from fla.ops.abc import chunk_abc, fused_recurrent_abc


class ABCAttention(RecurrentMixer):
    """ABC between projections, on `[B, T, hidden_size]`.

        q, k = rotary(W x)        v = W_v x        s = clamp(W_s x, clamp_min, clamp_max)
        o = W_o (rms_norm(abc(q, k, v, s)) * swish(W_g x))

    `use_input_gate` puts q, k and v through swish. `gate_low_rank_dim` and `gate_logit_normalizer`
    are kept for published configs, whose layer has neither.

    Example:
        >>> import torch
        >>> ABCAttention(hidden_size=64, num_heads=2, num_slots=8)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    mode = "chunk"

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: int = 16,
        use_rope: bool = True,
        use_input_gate: bool = False,
        use_output_gate: bool = True,
        use_norm: bool = True,
        clamp_min: float | None = -32,
        clamp_max: float | None = 32,
        layer_idx: int | None = None,
    ):
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, num_heads
        key_dim = whole("ABCAttention", "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole("ABCAttention", "hidden_size * expand_v", hidden_size * expand_v)
        head_k = multiple("ABCAttention", "the key width", key_dim, "num_heads", num_heads)
        head_v = multiple("ABCAttention", "the value width", value_dim, "num_heads", num_heads)
        self.num_slots = head_k if num_slots is None else num_slots
        self.use_short_conv, self.use_input_gate = use_short_conv, use_input_gate
        self.use_output_gate, self.use_norm = use_output_gate, use_norm
        self.clamp_min, self.clamp_max = clamp_min, clamp_max
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.s_proj = nn.Linear(hidden_size, num_heads * self.num_slots, bias=False)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(value_dim, conv_size, conv_bias)
        if use_norm:
            norm = FusedRMSNormGated if use_output_gate else RMSNorm
            self.g_norm = norm(head_v, elementwise_affine, eps=norm_eps)
        self.rotary = RotaryEmbedding(head_k) if use_rope else None

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k, v), conv = self.project(x, context)
        if self.use_input_gate:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v, s = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, self.s_proj(x)))
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions=context.layout.positions(x.device))
        if self.clamp_min is not None or self.clamp_max is not None:
            s = s.clamp(self.clamp_min, self.clamp_max)
        rule = fused_recurrent_abc if self.token_by_token(x) else chunk_abc
        o, state = rule(q, k, v, s, **context.sequences)
        if self.use_output_gate:
            g = self.g_proj(x).view_as(o)
            o = self.g_norm(o, g) if self.use_norm else o * F.silu(g)
        elif self.use_norm:
            o = self.g_norm(o)
        return self.o_proj(o.flatten(-2)), context.after(state, conv)
